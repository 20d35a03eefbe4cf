"""Products with integer group scales: the CPU, the Triton kernel and the op against int64, up to the end of int32."""

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from closeness import assert_close, relative_error
from halfbyte.errors import WeightError
from halfbyte.kernels import w4a8_integer as family
from halfbyte.kernels.w4a8 import triton_kernel as grouped
from halfbyte.kernels.w4a8_integer import (
    cpu,
    reference,
    row_sums,
    runs_of,
    signed_codes,
    triton_kernel,
    w4a8_integer,
)
from halfbyte.packing import int32_words

INT32 = 2**31 - 1


class Problem(NamedTuple):
    """The arguments of the op by name, in its order."""

    x: Tensor
    x_scales: Tensor
    weight: Tensor
    multipliers: Tensor
    factors: Tensor
    bias: Tensor | None = None
    bits: int = 4
    x_zeros: Tensor | None = None
    sums: Tensor | None = None
    weight_zeros: Tensor | None = None
    dtype: torch.dtype = torch.float32


def problem(
    tokens: int, ins: int, outs: int, group: int, *, bits: int = 4, packed: bool = False, x_zeros: bool = False,
    zeros: bool = False, bias: bool = False, narrow: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0,
) -> Problem:  # fmt: skip
    """Codes of both signs with the extreme ones present; multipliers as large as int32 can bear for any such input."""
    g = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        drawn = torch.randint(low, high + 1, shape, generator=g)
        if drawn.numel():
            drawn.view(-1)[0], drawn.view(-1)[-1] = low, high
        return drawn

    half = 2 ** (bits - 1)
    codes = integers(-half, half - 1, outs, ins).to(torch.int8)
    largest = 255 if narrow else min(2**15 - 1, INT32 // (256 * 2 * half * ins))
    multipliers = integers(1, largest, outs, ins // group).to(torch.uint8 if narrow else torch.int16)
    points = integers(-half, half - 1, outs, ins // group).to(torch.int8) if zeros else None
    return Problem(
        integers(-128, 127, tokens, ins).to(torch.int8),
        torch.rand(tokens, generator=g).add(0.1),
        int32_words.pack((codes.short() + half).to(torch.uint8), bits) if packed else codes,
        multipliers,
        1 / integers(1, 4096, outs).float(),
        torch.randn(outs, generator=g) if bias else None,
        bits,
        integers(-128, 127, tokens).int() if x_zeros else None,
        row_sums(codes, multipliers, points) if x_zeros else None,
        points,
        dtype,
    )


def through_triton(p: Problem, tile: grouped.Tile | None = None) -> Tensor:
    return triton_kernel.w4a8_integer(*p, tile=tile)


def through_the_op(p: Problem) -> Tensor:
    return w4a8_integer(**p._asdict())


def expected(p: Problem) -> Tensor:
    return reference.w4a8_integer(**p._asdict())


def exact(p: Problem) -> Tensor:
    """The accumulators, in int64."""
    return reference.accumulated(
        p.x, p.weight, p.multipliers, bits=p.bits, x_zeros=p.x_zeros, weight_zeros=p.weight_zeros
    )


def bare(p: Problem) -> Problem:
    """Scales of one and no bias: the result is the accumulator, rounded to float32 once."""
    return p._replace(x_scales=torch.ones_like(p.x_scales), factors=torch.ones_like(p.factors), bias=None)


Route = Callable[[Problem], Tensor]
ROUTES = pytest.mark.parametrize("route", [through_the_op, through_triton], ids=["op", "triton"])


def test_the_reference_multiplies_by_hand() -> None:
    x = torch.tensor([[1, -2, 3, 4]], dtype=torch.int8)
    weight = torch.tensor([[5, 6, -7, 8]], dtype=torch.int8)
    y = reference.w4a8_integer(
        x, torch.tensor([2.0]), weight, torch.tensor([[3, 10]], dtype=torch.uint8), torch.tensor([0.5]),
        torch.tensor([100.0]), x_zeros=torch.tensor([1], dtype=torch.int32),
        weight_zeros=torch.tensor([[5, 8]], dtype=torch.int8),
    )  # fmt: skip
    # x stands for 0 -3 2 3, W for 0 1 -15 0, scaled by 3 and 10
    assert y.item() == 2 * 0.5 * (-3 * 3 + 2 * -15 * 10) + 100


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.sampled_from([0, 1, 2, 5, 17]),
    outs=st.sampled_from([1, 7, 33]),
    group=st.sampled_from([96, 48, 32, 8, 1]),
    bits=st.integers(2, 8),
    x_zeros=st.booleans(),
    zeros=st.booleans(),
    packed=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_the_op_sums_exactly(tokens, outs, group, bits, x_zeros, zeros, packed, seed) -> None:
    p = problem(
        tokens, 96, outs, group, bits=bits, packed=packed, x_zeros=x_zeros, zeros=zeros, bias=True, seed=seed
    )  # fmt: skip
    assert torch.equal(through_the_op(bare(p)), exact(p).float())
    assert_close(through_the_op(p), expected(p)) if tokens else None


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("packed", [False, True], ids=["codes", "words"])
@pytest.mark.parametrize(
    ("tokens", "ins", "outs", "group"),
    [(1, 64, 32, 32), (3, 128, 7, 64), (2, 100, 70, 100), (17, 96, 5, 48), (1, 8, 1, 4)],
    ids=["one-token", "narrow", "row-ends-in-a-word", "odd-groups", "smallest"],
)
def test_triton_sums_exactly(tokens, ins, outs, group, packed, bits) -> None:
    p = problem(tokens, ins, outs, group, bits=bits, packed=packed, x_zeros=True, zeros=True, bias=True)
    assert torch.equal(through_triton(bare(p)), exact(p).float())
    assert_close(through_triton(p), expected(p))
    p = p._replace(x_zeros=None, sums=None, weight_zeros=None, bias=None)
    assert torch.equal(through_triton(bare(p)), exact(p).float())


@ROUTES
def test_multipliers_of_a_byte_are_unsigned(route: Route) -> None:
    p = problem(3, 64, 7, 16, narrow=True)
    assert int(p.multipliers.max()) == 255
    assert torch.equal(route(bare(p)), exact(p).float())


def at_the_bound(groups: int, size: int, sign: int) -> Problem:
    """A row whose certificate is full to within its last multiplier, and the input that drives it there."""
    codes = torch.full((1, groups * size), -8, dtype=torch.int8)
    codes[:, ::2] = 7
    reached = codes.short().abs().unflatten(1, (groups, size)).sum(dim=2)
    multipliers = (INT32 // 127 // groups // reached).clamp(max=2**15 - 1).to(torch.int16)
    x = (sign * 127 * codes.sign()).to(torch.int8)
    return Problem(x, torch.ones(1), codes, multipliers, torch.ones(1))


@ROUTES
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("groups", "size"), [(1, 96), (3, 32), (8, 128), (64, 16)])
def test_an_adversary_at_the_bound_is_summed_exactly(route: Route, groups, size, sign) -> None:
    p = at_the_bound(groups, size, sign)
    whole = exact(p)
    assert 0.99 * min(INT32, 127 * 7.5 * groups * size * (2**15 - 1)) < abs(int(whole)) <= INT32
    assert torch.equal(route(p), whole.float())


@ROUTES
def test_beyond_the_bound_the_sum_wraps_around(route: Route) -> None:
    """What the certificate is for: with one step more in the multiplier the answer has the wrong sign."""
    p = at_the_bound(1, 1024, 1)
    beyond = p._replace(multipliers=p.multipliers + 1)
    assert int(exact(beyond)) > INT32
    assert float(route(beyond)) < 0


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), ranks=st.integers(1, 8))
def test_prefixes_may_leave_int32_and_come_back(seed, ranks) -> None:
    """Wrapping sums need the final integer alone to fit; no order of groups changes it."""
    p = problem(3, 128, 5, 16, seed=seed)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(seed))
    columns = (order[:, None] * 16 + torch.arange(16)).flatten()
    shuffled = p._replace(
        x=p.x[:, columns], weight=p.weight[:, columns], multipliers=p.multipliers[:, order].roll(8 * ranks, 1)
    )
    assert torch.equal(through_the_op(bare(shuffled)), through_the_op(bare(p)))


def test_tiles_in_several_rows_and_columns_cover_the_result() -> None:
    p = problem(37, 80, 35, 40, packed=True, zeros=True, bias=True)
    tile = grouped.Tile(block_m=16, block_n=16, block_k=32, warps=4, stages=1)
    assert_close(through_triton(p, tile), expected(p))


def test_strips_and_tiles_of_tokens_cover_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(19, 64, 37, 32, x_zeros=True, zeros=True, bias=True)
    monkeypatch.setattr(cpu, "TILE_TOKENS", 8)
    monkeypatch.setattr(cpu, "TILE_SUMS", 40)
    assert_close(through_the_op(p), expected(p))


@ROUTES
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_result_is_rounded_to_the_asked_type(route: Route, dtype: torch.dtype) -> None:
    p = problem(5, 128, 33, 32, zeros=True, bias=True, dtype=dtype)
    p = p._replace(factors=p.factors / 2**16)
    assert_close(route(p), expected(p), rounding_steps=1)


def test_codes_may_lie_group_by_group() -> None:
    p = problem(3, 96, 7, 32, x_zeros=True, zeros=True)
    assert torch.equal(through_the_op(p._replace(weight=runs_of(p.weight, 32))), through_the_op(p))


@ROUTES
def test_what_lies_around_the_arguments_is_not_read(route: Route) -> None:
    p = problem(3, 100, 9, 50, x_zeros=True, zeros=True)
    around = torch.full((5, 160), 99, dtype=torch.int8)
    around[1:4, 7:107] = p.x
    strided = p._replace(x=around[1:4, 7:107], multipliers=p.multipliers.T.contiguous().T)
    assert torch.equal(route(bare(strided)), exact(p).float())


def multipliers_of_the_neighbour(p: Problem) -> Problem:
    return p._replace(multipliers=p.multipliers.roll(1, dims=1))


def amplifiers_of_the_neighbour(p: Problem) -> Problem:
    return p._replace(factors=p.factors.roll(1))


def signed_bytes(p: Problem) -> Problem:
    return p._replace(multipliers=p.multipliers.to(torch.uint8).to(torch.int8).to(torch.int16))


def forgotten_weight_zeros(p: Problem) -> Problem:
    return p._replace(weight_zeros=None)


def unscaled_sums(p: Problem) -> Problem:
    return p._replace(sums=signed_codes(p.weight, 4, 128).sum(dim=1, dtype=torch.int32))


def token_scales_of_the_neighbour(p: Problem) -> Problem:
    return p._replace(x_scales=p.x_scales.roll(1))


def forgotten_bias(p: Problem) -> Problem:
    return p._replace(bias=None)


@pytest.mark.parametrize(
    "bug",
    [
        multipliers_of_the_neighbour, amplifiers_of_the_neighbour, signed_bytes, forgotten_weight_zeros, unscaled_sums,
        token_scales_of_the_neighbour, forgotten_bias,
    ],
)  # fmt: skip
def test_the_comparison_notices(bug: Callable[[Problem], Problem]) -> None:
    p = problem(17, 128, 33, 32, packed=True, x_zeros=True, zeros=True, narrow=True)
    p = p._replace(bias=1e5 * torch.randn(33, generator=torch.Generator().manual_seed(0)))
    assert relative_error(through_the_op(bug(p)), expected(p)) > 0.01


@pytest.mark.parametrize("packed", [False, True], ids=["codes", "words"])
def test_the_op_is_a_good_citizen_of_torch(packed: bool) -> None:
    p = problem(3, 64, 16, 32, packed=packed, x_zeros=packed, zeros=packed, bias=True, dtype=torch.bfloat16)
    torch.library.opcheck(torch.ops.halfbyte.w4a8_integer.default, tuple(p))


def test_the_op_compiles_whole() -> None:
    p = problem(3, 64, 16, 32)
    compiled = torch.compile(
        lambda x, scales: through_the_op(p._replace(x=x, x_scales=scales)).relu(), backend="aot_eager", fullgraph=True
    )
    assert torch.equal(compiled(p.x, p.x_scales), through_the_op(p).relu())


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"x": torch.zeros(2, 64)}, "x is torch.float32"),
        ({"x": torch.zeros(2, 72, dtype=torch.int8)}, "72 inputs of 4 bits are"),
        ({"x": torch.zeros(3, 64, dtype=torch.int8)}, r"x_scales is .*give torch.float32 \[3\]"),
        ({"weight": torch.zeros(16, 64)}, "the weight is torch.float32"),
        ({"weight": torch.zeros(16, 9, dtype=torch.int32)}, "the weight is torch.int32"),
        ({"weight": torch.zeros(4, 16, 16, dtype=torch.int8)}, r"or \[2, 16, 32\]"),
        ({"multipliers": torch.ones(16, 3, dtype=torch.uint8)}, "3 groups do not divide 64"),
        ({"multipliers": torch.ones(16, 2, dtype=torch.int32)}, "torch.uint8 or torch.int16"),
        ({"factors": torch.ones(15)}, "factors is"),
        ({"x_zeros": torch.zeros(2, dtype=torch.int32)}, "go together"),
        ({"weight_zeros": torch.zeros(2, 16, dtype=torch.int8)}, r"give torch.int8 \[16, 2\]"),
        ({"bias": torch.zeros(15)}, "bias is"),
        ({"dtype": torch.int32}, "cannot be torch.int32"),
    ],
)
def test_arguments_that_disagree_are_refused(change: dict[str, Any], why: str) -> None:
    given: dict[str, Any] = problem(2, 64, 16, 32)._asdict() | change
    with pytest.raises(WeightError, match=why):
        w4a8_integer(**given)
    on_meta: dict[str, Any] = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in given.items()}
    with pytest.raises(WeightError, match=why):
        w4a8_integer(**on_meta)


def test_triton_is_imported_only_where_it_runs() -> None:
    program = ast.parse(Path(family.__file__).read_text())
    imported = [alias.name for node in program.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert "cpu" in imported
    assert not [name for name in imported if "triton_kernel" in name]
