"""Grouped integer products: the CPU, the Triton kernel and the op against float64, every kind of group and zero point."""

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
from halfbyte.kernels import w4a8
from halfbyte.kernels.w4a8 import cpu, grouped_int8_matmul, reference, run_size, runs_of, signed_codes, triton_kernel
from halfbyte.packing import int32_words


class Problem(NamedTuple):
    """The arguments of the op by name."""

    x: Tensor
    x_scales: Tensor
    weight: Tensor
    weight_scales: Tensor
    bits: int = 8
    x_zeros: Tensor | None = None
    weight_zeros: Tensor | None = None
    bias: Tensor | None = None
    dtype: torch.dtype = torch.float32


def problem(
    tokens: int, ins: int, outs: int, x_group: int, group: int, *, bits: int = 4, packed: bool = False,
    x_zeros: bool = False, zeros: bool = False, bias: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0,
) -> Problem:  # fmt: skip
    """Codes of both signs with the extreme ones present, scales of uneven size."""
    g = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        drawn = torch.randint(low, high + 1, shape, generator=g)
        if drawn.numel():
            drawn.view(-1)[0], drawn.view(-1)[-1] = low, high
        return drawn

    half = 2 ** (bits - 1)
    codes = integers(-half, half - 1, outs, ins)
    x_scales = torch.rand(tokens, ins // x_group, generator=g).add(0.1)
    scales = torch.rand(outs, ins // group, generator=g).add(0.1).div(16)
    return Problem(
        integers(-128, 127, tokens, ins).to(torch.int8),
        x_scales,
        int32_words.pack((codes + half).to(torch.uint8), bits) if packed else codes.to(torch.int8),
        scales,
        bits,
        integers(-128, 127, *x_scales.shape).int() if x_zeros else None,
        integers(-half, half - 1, *scales.shape).to(torch.int8) if zeros else None,
        torch.randn(outs, generator=g) if bias else None,
        dtype,
    )


def through_triton(p: Problem, tile: triton_kernel.Tile | None = None) -> Tensor:
    run = run_size(p.x.shape[1], p.x_scales.shape[1], p.weight_scales.shape[1])
    return triton_kernel.grouped_int8_matmul(*p, run=run, tile=tile)


def through_the_op(p: Problem) -> Tensor:
    return grouped_int8_matmul(**p._asdict())


def expected(p: Problem) -> Tensor:
    return reference.grouped_int8_matmul(**p._asdict())


def magnitude(p: Problem) -> Tensor:
    """What the products come to without their signs."""
    weight = signed_codes(p.weight, p.bits, p.x.shape[1]) if p.weight.dtype == torch.int32 else p.weight
    x, w = reference.values(p.x, p.x_scales, p.x_zeros), reference.values(weight, p.weight_scales, p.weight_zeros)
    return x.abs() @ w.abs().T + (0 if p.bias is None else p.bias.abs())


Route = Callable[[Problem], Tensor]
ROUTES: list[Route] = [through_the_op, through_triton]
NAMES = ["op", "triton"]


def test_the_reference_multiplies_by_hand() -> None:
    x = torch.tensor([[1, -2, 3, 4]], dtype=torch.int8)
    weight = torch.tensor([[5, 6, -7, 8]], dtype=torch.int8)
    y = reference.grouped_int8_matmul(
        x, torch.tensor([[2.0]]), weight, torch.tensor([[1.0, 0.5]]),
        x_zeros=torch.tensor([[1]], dtype=torch.int32), weight_zeros=torch.tensor([[5, 8]], dtype=torch.int8),
        bias=torch.tensor([100.0]),
    )  # fmt: skip
    # x stands for 0 -6 4 6, W for 0 1 -7.5 0
    assert y.item() == -6 - 30 + 100


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.sampled_from([0, 1, 2, 5, 17]),
    outs=st.sampled_from([1, 7, 33]),
    groups=st.sampled_from([(96, 96), (96, 32), (32, 96), (32, 48), (1, 96), (24, 8)]),
    bits=st.integers(2, 8),
    x_zeros=st.booleans(),
    zeros=st.booleans(),
    packed=st.booleans(),
)
def test_the_op_agrees_with_the_reference(tokens, outs, groups, bits, x_zeros, zeros, packed) -> None:
    p = problem(tokens, 96, outs, *groups, bits=bits, packed=packed, x_zeros=x_zeros, zeros=zeros, bias=True)
    y = through_the_op(p)
    assert y.shape == (tokens, outs)
    wide = reference.grouped_int8_matmul(**(p._asdict() | {"dtype": torch.float64}))
    # element by element: a few roundings of the products and their sums, which may cancel
    assert bool(((y - wide).abs() <= 8 * torch.finfo(torch.float32).eps * magnitude(p)).all())


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("packed", [False, True], ids=["codes", "words"])
@pytest.mark.parametrize(
    ("tokens", "ins", "outs", "x_group", "group"),
    [(1, 64, 32, 64, 32), (3, 128, 7, 32, 64), (2, 100, 70, 100, 100), (17, 96, 5, 96, 48), (1, 8, 1, 8, 4)],
    ids=["one-token", "narrow", "row-ends-in-a-word", "odd-groups", "smallest"],
)
def test_triton_agrees_with_the_reference(tokens, ins, outs, x_group, group, packed, bits) -> None:
    p = problem(tokens, ins, outs, x_group, group, bits=bits, packed=packed, x_zeros=True, zeros=True, bias=True)
    assert_close(through_triton(p), expected(p), rounding_steps=8)
    p = p._replace(x_zeros=None, weight_zeros=None, bias=None)
    assert_close(through_triton(p), expected(p), rounding_steps=8)


def test_tiles_in_several_rows_and_columns_cover_the_result() -> None:
    p = problem(37, 80, 35, 80, 40, packed=True, zeros=True, bias=True)
    tile = triton_kernel.Tile(block_m=16, block_n=16, block_k=32, warps=4, stages=1)
    assert_close(through_triton(p, tile), expected(p), rounding_steps=8)


@pytest.mark.parametrize("route", ROUTES, ids=NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_result_is_rounded_once(route: Route, dtype: torch.dtype) -> None:
    p = problem(5, 128, 33, 128, 32, zeros=True, bias=True, dtype=dtype)
    assert_close(route(p), expected(p), rounding_steps=1)


@pytest.mark.parametrize("route", ROUTES, ids=NAMES)
def test_integers_of_one_run_are_exact(route: Route) -> None:
    """All codes extreme, scales of one: what rounds before the sum is complete, or saturates, shows as a difference."""
    x = torch.full((3, 512), -128, dtype=torch.int8)
    weight = torch.full((2, 512), -128, dtype=torch.int8)
    weight[:, ::2] = 127
    x[1, 1::2], x[2, 0] = 127, -127
    p = Problem(x, torch.ones(3, 1), weight, torch.ones(2, 1))
    assert torch.equal(route(p).long(), x.long() @ weight.long().T)


def test_a_processor_that_saturates_multiplies_in_short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(3, 2500, 5, 2500, 2500, bits=8)
    fast = through_the_op(p)
    monkeypatch.setattr(cpu, "product_is_exact", lambda: False)
    monkeypatch.setattr(torch, "_int_mm", None)
    assert torch.equal(through_the_op(p), fast)


def test_a_run_is_shared_by_both_groups_and_fits_int32() -> None:
    assert run_size(4096, 1, 32) == 128
    assert run_size(96, 3, 2) == 16
    assert run_size(53248, 1, 1) == 26624
    assert 255 * 255 * run_size(2**20, 1, 1) < 2**31


def test_strips_and_tiles_of_tokens_cover_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(19, 64, 37, 64, 32, x_zeros=True, zeros=True, bias=True)
    monkeypatch.setattr(cpu, "TILE_TOKENS", 8)
    monkeypatch.setattr(cpu, "TILE_SUMS", 40)
    assert_close(through_the_op(p), expected(p), rounding_steps=8)


def test_codes_may_lie_run_by_run() -> None:
    p = problem(3, 96, 7, 48, 32, x_zeros=True, zeros=True)
    assert torch.equal(through_the_op(p._replace(weight=runs_of(p.weight, 16))), through_the_op(p))


def test_words_are_codes_less_half_of_their_range() -> None:
    words = int32_words.pack(torch.arange(16, dtype=torch.uint8)[None], 4)
    assert signed_codes(words, 4, 16).tolist() == [list(range(-8, 8))]


@pytest.mark.parametrize("route", ROUTES, ids=NAMES)
def test_what_lies_around_the_arguments_is_not_read(route: Route) -> None:
    p = problem(3, 100, 9, 100, 50, x_zeros=True, zeros=True)
    around = torch.full((5, 160), 99, dtype=torch.int8)
    around[1:4, 7:107] = p.x
    strided = p._replace(x=around[1:4, 7:107], weight_scales=p.weight_scales.T.contiguous().T)
    assert_close(route(strided), expected(p), rounding_steps=8)


def forgotten_x_zeros(p: Problem) -> Problem:
    return p._replace(x_zeros=None)


def forgotten_weight_zeros(p: Problem) -> Problem:
    return p._replace(weight_zeros=None)


def zeros_of_the_neighbour(p: Problem) -> Problem:
    assert p.weight_zeros is not None
    return p._replace(weight_zeros=p.weight_zeros.roll(1, dims=1))


def scales_of_the_neighbour(p: Problem) -> Problem:
    return p._replace(weight_scales=p.weight_scales.roll(1, dims=1))


def token_scales_of_the_neighbour(p: Problem) -> Problem:
    return p._replace(x_scales=p.x_scales.roll(1, dims=0))


def forgotten_bias(p: Problem) -> Problem:
    return p._replace(bias=None)


def unsigned_codes(p: Problem) -> Problem:
    return p._replace(weight=p.weight + 8)


@pytest.mark.parametrize(
    "bug",
    [
        forgotten_x_zeros, forgotten_weight_zeros, zeros_of_the_neighbour, scales_of_the_neighbour,
        token_scales_of_the_neighbour, forgotten_bias, unsigned_codes,
    ],
)  # fmt: skip
def test_the_comparison_notices(bug: Callable[[Problem], Problem]) -> None:
    p = problem(17, 128, 33, 128, 32, x_zeros=True, zeros=True)
    p = p._replace(bias=100 * torch.randn(33, generator=torch.Generator().manual_seed(0)))
    assert relative_error(through_the_op(bug(p)), expected(p)) > 0.01


@pytest.mark.parametrize("packed", [False, True], ids=["codes", "words"])
def test_the_op_is_a_good_citizen_of_torch(packed: bool) -> None:
    p = problem(3, 64, 16, 64, 32, packed=packed, x_zeros=True, zeros=packed, bias=True, dtype=torch.bfloat16)
    torch.library.opcheck(torch.ops.halfbyte.grouped_int8_matmul.default, tuple(p))


def test_the_op_compiles_whole() -> None:
    p = problem(3, 64, 16, 64, 32)
    compiled = torch.compile(
        lambda x, scales: through_the_op(p._replace(x=x, x_scales=scales)).relu(), backend="aot_eager", fullgraph=True
    )
    assert torch.equal(compiled(p.x, p.x_scales), through_the_op(p).relu())


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"x": torch.zeros(2, 64)}, "x is torch.float32"),
        ({"x": torch.zeros(2, 72, dtype=torch.int8)}, "72 inputs of 4 bits are"),
        ({"x": torch.zeros(3, 64, dtype=torch.int8)}, "there are 3 rows"),
        ({"weight": torch.zeros(16, 64)}, "the weight is torch.float32"),
        ({"weight": torch.zeros(16, 9, dtype=torch.int32)}, "the weight is torch.int32"),
        ({"weight": torch.zeros(4, 16, 16, dtype=torch.int8)}, r"or \[2, 16, 32\]"),
        ({"weight_scales": torch.ones(16, 3)}, "divides the inputs"),
        ({"weight_scales": torch.ones(16, 2, dtype=torch.int32)}, "convert them"),
        ({"x_zeros": torch.zeros(2, 1)}, "x_zeros are torch.float32"),
        ({"weight_zeros": torch.zeros(2, 16, dtype=torch.int8)}, "one for every scale"),
        ({"bias": torch.zeros(15)}, "16 outputs"),
        ({"dtype": torch.int32}, "cannot be torch.int32"),
    ],
)
def test_arguments_that_disagree_are_refused(change: dict[str, Any], why: str) -> None:
    given: dict[str, Any] = problem(2, 64, 16, 64, 32)._asdict() | change
    with pytest.raises(WeightError, match=why):
        grouped_int8_matmul(**given)
    on_meta: dict[str, Any] = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in given.items()}
    with pytest.raises(WeightError, match=why):
        grouped_int8_matmul(**on_meta)


def test_triton_is_imported_only_where_it_runs() -> None:
    program = ast.parse(Path(w4a8.__file__).read_text())
    imported = [alias.name for node in program.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert "cpu" in imported
    assert not [name for name in imported if "triton_kernel" in name]
