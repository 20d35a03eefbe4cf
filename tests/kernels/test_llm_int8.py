"""LLM.int8(): both launches in Triton's interpreter and the CPU against the float64 reference, and the method's laws."""

import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from closeness import assert_close, relative_error
from halfbyte.errors import WeightError
from halfbyte.kernels import llm_int8
from halfbyte.kernels.llm_int8 import on_triton, reference, triton_matmul, triton_split
from halfbyte.kernels.llm_int8.triton_matmul import Tile
from halfbyte.kernels.llm_int8.triton_split import Strip
from halfbyte.kernels.token_quantize import reference as tokens_reference
from halfbyte.kernels.w8a8 import cpu as w8a8_cpu

THRESHOLD = 6.0


class Problem(NamedTuple):
    """Activations with outliers in `columns`, a weight with its codes, and a bias."""

    x: Tensor
    codes: Tensor
    scales: Tensor
    kept: Tensor
    columns: Tensor
    bias: Tensor

    def sums(self) -> Tensor:
        return self.codes.sum(dim=1, dtype=torch.int32)


def problem(
    tokens: int, ins: int, outs: int, outliers: int = 3, dtype: torch.dtype = torch.float16, seed: int = 0
) -> Problem:
    """Signed; an outlier in most of the tokens of each of the columns, one exactly at the threshold."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, ins, generator=g).clamp(-5, 5)
    columns = torch.randperm(ins, generator=g)[:outliers].sort().values
    hit = torch.rand(tokens, outliers, generator=g) < 0.75
    hit[0] = True
    x[:, columns] = torch.where(hit, x[:, columns] + 25 * x[:, columns].sign(), x[:, columns])
    if outliers:
        x[0, columns[0]] = -THRESHOLD
    weight = torch.randn(outs, ins, generator=g) * torch.rand(outs, 1, generator=g).mul(3).exp() / math.sqrt(ins)
    scales = weight.abs().amax(dim=1) / 127
    codes = (weight / scales[:, None]).round().to(torch.int8)
    bias = 10 * torch.randn(outs, generator=g)
    return Problem(x.to(dtype), codes, scales, weight.to(dtype), columns, bias.to(dtype))


def in_triton(p: Problem, threshold: float, kept: bool, symmetric: bool) -> Tensor:
    sums = None if symmetric else p.sums()
    return on_triton.llm_int8_matmul(p.x, p.codes, p.scales, threshold, p.kept if kept else None, p.bias, sums)


def through_the_op(p: Problem, threshold: float, kept: bool, symmetric: bool) -> Tensor:
    sums = None if symmetric else p.sums()
    kept_weight = p.kept if kept else None
    return llm_int8.llm_int8_matmul(p.x, p.codes, p.scales, threshold, kept_weight, p.bias, weight_sums=sums)


def static_in_triton(p: Problem, symmetric: bool) -> Tensor:
    found = llm_int8.static_outliers(p.columns, p.kept[:, p.columns], p.x.shape[1])
    sums = None if symmetric else p.sums()
    return on_triton.static_outlier_matmul(
        p.x, p.codes, p.scales, found.columns, found.weight, found.is_outlier, p.bias, sums
    )  # fmt: skip


def static_through_the_op(p: Problem, symmetric: bool) -> Tensor:
    found = llm_int8.static_outliers(p.columns, p.kept[:, p.columns], p.x.shape[1])
    sums = None if symmetric else p.sums()
    return llm_int8.static_outlier_matmul(p.x, p.codes, p.scales, found, p.bias, weight_sums=sums)


def expected(p: Problem, threshold: float, kept: bool, symmetric: bool) -> Tensor:
    return reference.llm_int8_matmul(p.x, p.codes, p.scales, threshold, p.kept if kept else None, p.bias, symmetric)


def expected_static(p: Problem, symmetric: bool) -> Tensor:
    return reference.static_outlier_matmul(
        p.x, p.codes, p.scales, p.columns, p.kept[:, p.columns], p.bias, symmetric
    )  # fmt: skip


ROUTES = {"triton": in_triton, "op": through_the_op}
STATIC_ROUTES = {"triton": static_in_triton, "op": static_through_the_op}
SIZES = {"ragged": (5, 99, 33), "one-token": (1, 64, 7), "copied": (3, 48, 20), "several-tiles": (17, 48, 40)}


def test_the_reference_multiplies_what_was_split_by_hand() -> None:
    x = torch.tensor([[1.0, -127.0, 8.0], [63.5, 2.0, 1.0]])
    codes = torch.tensor([[1, 2, 3], [-1, 0, 100]], dtype=torch.int8)
    scales = torch.tensor([0.5, 2.0])
    # at threshold 100 column 1 is an outlier's: token 0 is (1, -, 8) on the grid 8 / 127, token 1 is (63.5, -, 1) on 0.5
    coded = torch.tensor([[16 * 8 / 127, 0.0, 8.0], [63.5, 0.0, 1.0]])
    sixteen = torch.tensor([[0.0, -127.0, 0.0], [0.0, 2.0, 0.0]])
    weight = torch.tensor([[0.5, 1.0, 1.5], [-2.0, 0.0, 200.0]])
    y = reference.llm_int8_matmul(x, codes, scales, 100.0)
    torch.testing.assert_close(y, coded @ weight.T + sixteen @ weight.T)
    kept = torch.full((2, 3), 10.0)
    y = reference.llm_int8_matmul(x, codes, scales, 100.0, kept)
    torch.testing.assert_close(y, coded @ weight.T + sixteen @ kept.T)
    y = reference.static_outlier_matmul(x, codes, scales, torch.tensor([1]), kept[:, 1:2])
    torch.testing.assert_close(y, coded @ weight.T + sixteen @ kept.T)


@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("kept", [True, False], ids=["kept", "from-codes"])
def test_dynamic_outliers_agree_with_the_reference(
    route: Callable[..., Tensor], size: tuple[int, int, int], symmetric: bool, kept: bool
) -> None:
    p = problem(*size)
    assert_close(route(p, THRESHOLD, kept, symmetric), expected(p, THRESHOLD, kept, symmetric), rounding_steps=2)


@pytest.mark.parametrize("route", STATIC_ROUTES.values(), ids=STATIC_ROUTES)
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_static_outliers_agree_with_the_reference(
    route: Callable[..., Tensor], size: tuple[int, int, int], symmetric: bool
) -> None:
    p = problem(*size)
    assert_close(route(p, symmetric), expected_static(p, symmetric), rounding_steps=2)


@pytest.mark.parametrize("outliers", [0, 1, 16, 17, 40])
def test_any_number_of_outlier_columns_is_counted_in(outliers: int) -> None:
    p = problem(4, 96, 20, outliers)
    for kept in (False, True):
        assert_close(in_triton(p, THRESHOLD, kept, True), expected(p, THRESHOLD, kept, True), rounding_steps=2)
    assert_close(static_in_triton(p, True), expected_static(p, True), rounding_steps=2)
    assert_close(static_through_the_op(p, True), expected_static(p, True), rounding_steps=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kept", [True, False], ids=["kept", "from-codes"])
def test_the_op_agrees_with_the_reference_in_other_dtypes(dtype: torch.dtype, kept: bool) -> None:
    p = problem(6, 50, 31, dtype=dtype)
    assert_close(through_the_op(p, THRESHOLD, kept, False), expected(p, THRESHOLD, kept, False))
    assert_close(static_through_the_op(p, True), expected_static(p, True))


def test_a_processor_that_saturates_gets_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(*SIZES["several-tiles"])
    right = expected(p, THRESHOLD, True, True)
    monkeypatch.setattr(torch.ops.aten, "_int_mm", lambda x, weight: (x.float() @ weight.float() * 0.9).int())
    monkeypatch.setattr(w8a8_cpu, "product_is_exact", lambda: False)
    assert_close(through_the_op(p, THRESHOLD, True, True), right, rounding_steps=2)
    monkeypatch.setattr(w8a8_cpu, "product_is_exact", lambda: True)
    assert relative_error(through_the_op(p, THRESHOLD, True, True), right) > 0.01


def test_triton_keeps_float32_activations_whole() -> None:
    p = problem(3, 48, 20, dtype=torch.float32)
    for kept in (False, True):
        assert_close(in_triton(p, THRESHOLD, kept, True), expected(p, THRESHOLD, kept, True))


@pytest.mark.parametrize(
    "tile",
    [
        Tile(16, 32, 16, super_m=1, warps=1, stages=1),
        Tile(16, 16, 32, super_m=2, warps=1, stages=1),
        Tile(32, 16, 64, super_m=1, warps=1, stages=1, swapped=True),
    ],
    ids=["small", "beside", "swapped"],
)
@pytest.mark.parametrize("ins", [80, 75], ids=["copied", "loaded"])
def test_every_way_to_cut_the_result_covers_it(tile: Tile, ins: int) -> None:
    p = problem(20, ins, 35)
    x = torch.full((20, 2 * ins), float("nan"), dtype=torch.float16)[:, 3 : 3 + ins].copy_(p.x)  # rows lie apart
    scratch = llm_int8.outlier_scratch(ins, "cpu")
    codes, scales, zeros, columns = triton_split.split(x, THRESHOLD, True, scratch, False)
    y = triton_matmul.matmul(
        codes, scales, zeros, p.codes, p.scales, None, p.bias, "from codes", x, columns, tile=tile
    )  # fmt: skip
    assert_close(y, expected(p, THRESHOLD, False, True), rounding_steps=2)


@pytest.mark.parametrize("tokens", [1, 17, 33, 65, 130])
def test_the_built_in_tiles_agree_with_the_reference(tokens: int) -> None:
    p = problem(tokens, 32, 20)
    assert_close(in_triton(p, 0.0, False, True), expected(p, 0.0, False, True), rounding_steps=2)


@pytest.mark.parametrize("strip", [None, Strip(2, 16, 7, 1, 1), Strip(1, 32, 4, 1, 1)], ids=["built-in", "many", "one"])
def test_the_first_launch_lists_the_columns_and_cleans_up(strip: Strip | None) -> None:
    p = problem(9, 99, 1, outliers=9)
    scratch = llm_int8.outlier_scratch(99, "cpu")
    codes, scales, zeros, columns = triton_split.split(p.x, THRESHOLD, True, scratch, False, strip)
    outlier = p.x.abs() >= THRESHOLD
    assert columns[: 1 + columns[0]].tolist() == [9, *p.columns.tolist()]
    assert not scratch.any()
    expected_codes, expected_scales, _ = tokens_reference.quantize(p.x.masked_fill(outlier, 0))
    assert torch.equal(codes, expected_codes)
    assert torch.equal(scales, expected_scales)
    assert not zeros.numel()
    assert not codes[outlier].any()


def test_columns_are_listed_though_they_are_too_many_to_be_looked_at_at_once() -> None:
    p = problem(2, 1100, 1, outliers=30)
    scratch = llm_int8.outlier_scratch(1100, "cpu")
    columns = triton_split.split(p.x, THRESHOLD, True, scratch, False, Strip(2, 512, 3, 1, 1))[3]
    assert columns[: 1 + columns[0]].tolist() == [30, *p.columns.tolist()]
    assert not scratch.any()


def test_every_column_may_be_an_outlier_s() -> None:
    p = problem(2, 70, 5, outliers=70)
    scratch = llm_int8.outlier_scratch(70, "cpu")
    x = p.x + 20 * p.x.sign()
    columns = triton_split.split(x, THRESHOLD, True, scratch, False)[3]
    assert columns.tolist() == [70, *range(70)]
    assert_close(in_triton(p._replace(x=x), THRESHOLD, False, True), expected(p._replace(x=x), THRESHOLD, False, True))


@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_without_outliers_it_is_the_vector_wise_product(route: Callable[..., Tensor], symmetric: bool) -> None:
    p = problem(5, 64, 21)
    values = tokens_reference.dequantize(*tokens_reference.quantize(p.x, symmetric))
    y = values @ (p.codes.double() * p.scales.double()[:, None]).T + p.bias.double()
    for threshold in (0.0, math.inf, 1e4):
        assert_close(route(p, threshold, True, symmetric), y.half(), rounding_steps=2)


@given(seed=st.integers(0, 99), tokens=st.integers(1, 5), threshold=st.sampled_from([0.5, 1.0, 2.0, 6.0]))
@settings(max_examples=25, deadline=None)
def test_the_more_columns_in_16_bits_the_closer_to_the_dense_product(seed: int, tokens: int, threshold: float) -> None:
    """Against x · Wᵀ of the dequantized weight: what is left is the rounding of the activations."""
    p = problem(tokens, 40, 16, dtype=torch.float32, seed=seed)
    dense = p.x.double() @ (p.codes.double() * p.scales.double()[:, None]).T + p.bias.double()
    with_outliers = relative_error(through_the_op(p, threshold, False, True), dense)
    assert with_outliers <= relative_error(through_the_op(p, 0.0, False, True), dense)
    assert relative_error(through_the_op(p, 1e-30, False, True), dense) < 1e-6


def test_a_kept_weight_makes_outlier_columns_exact() -> None:
    p = problem(4, 40, 16, dtype=torch.float32)
    dense = p.x.double() @ p.kept.double().T + p.bias.double()
    assert relative_error(through_the_op(p, 1e-30, True, True), dense) < 1e-6
    assert relative_error(in_triton(p, 1e-30, True, True), dense) < 1e-6
    assert relative_error(through_the_op(p, 1e-30, False, True), dense) > 1e-3


def test_static_and_dynamic_agree_where_every_outlier_is_in_every_token() -> None:
    p = problem(6, 80, 20, dtype=torch.float32)
    p.x[:, p.columns] = 30 * p.x[:, p.columns].sign()
    assert_close(static_in_triton(p, True), in_triton(p, THRESHOLD, True, True))
    assert_close(static_through_the_op(p, True), through_the_op(p, THRESHOLD, True, True))


def test_triton_reads_and_writes_only_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(3, 50, 9)
    around = torch.full((5, 120), float("nan"), dtype=torch.float16)
    around[1:4, 7:57] = p.x
    inner = p._replace(x=around[1:4, 7:57])
    empty = torch.empty

    def poisoned(*shape: Any, **options: Any) -> Tensor:
        made = empty(*shape, **options)
        return made.fill_(float("nan") if made.is_floating_point() else 77)

    monkeypatch.setattr(torch, "empty", poisoned)
    found = in_triton(inner, THRESHOLD, True, False)
    static = static_in_triton(inner, True)
    monkeypatch.undo()
    assert_close(found, expected(p, THRESHOLD, True, False), rounding_steps=2)
    assert_close(static, expected_static(p, True), rounding_steps=2)


@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
def test_columns_may_lie_apart(route: Callable[..., Tensor]) -> None:
    p = problem(4, 48, 20)
    apart = p._replace(x=p.x.T.contiguous().T, codes=p.codes.T.contiguous().T, kept=p.kept.T.contiguous().T)
    assert torch.equal(route(apart, THRESHOLD, True, True), route(p, THRESHOLD, True, True))


@pytest.mark.parametrize("tokens", [0, 2])
def test_nothing_in_nothing_out(tokens: int) -> None:
    p = problem(2, 32, 9)
    empty = p._replace(x=p.x[:tokens]) if not tokens else p._replace(codes=p.codes[:0], scales=p.scales[:0])
    shape = (empty.x.shape[0], empty.codes.shape[0])
    bare = (empty.x, empty.codes, empty.scales, THRESHOLD)
    assert on_triton.llm_int8_matmul(*bare).shape == shape
    assert llm_int8.llm_int8_matmul(*bare).shape == shape


def test_extreme_codes_do_not_overflow() -> None:
    ins = 4096
    x, codes = torch.ones(2, ins), torch.full((3, ins), -127, dtype=torch.int8)
    x[1, ::2] = -1
    p = Problem(x, codes, torch.ones(3), codes.float(), torch.tensor([0]), torch.zeros(3))
    for route in ROUTES.values():
        assert_close(route(p, 0.0, False, True), expected(p, 0.0, False, True))
        assert_close(route(p, 0.0, False, False), expected(p, 0.0, False, False))


def forgotten_outliers(p: Problem) -> Problem:
    return p._replace(x=p.x.masked_fill(p.x.abs() >= THRESHOLD, 0))


def clipped_outliers(p: Problem) -> Problem:
    return p._replace(x=p.x.clamp(-THRESHOLD, THRESHOLD))


def shifted_scales(p: Problem) -> Problem:
    return p._replace(scales=p.scales.roll(1))


def unsigned_codes(p: Problem) -> Problem:
    return p._replace(codes=p.codes.abs())


def forgotten_bias(p: Problem) -> Problem:
    return p._replace(bias=torch.zeros_like(p.bias))


def neighbouring_columns(p: Problem) -> Problem:
    return p._replace(kept=p.kept.roll(1, dims=1), columns=p.columns)


def swapped_tokens(p: Problem) -> Problem:
    return p._replace(x=p.x.roll(1, dims=0))


@pytest.mark.parametrize(
    "bug",
    [
        forgotten_outliers, clipped_outliers, shifted_scales, unsigned_codes, forgotten_bias, neighbouring_columns,
        swapped_tokens,
    ],
)  # fmt: skip
def test_the_comparison_notices(bug: Callable[[Problem], Problem]) -> None:
    """A gate that no bug can fail is no gate: the loosest bound above is 4 roundings of bfloat16, 0.03."""
    p = problem(19, 80, 70)
    right = expected(p, THRESHOLD, True, True)
    assert relative_error(expected(bug(p), THRESHOLD, True, True), right) > 0.1


def test_the_comparison_notices_an_outlier_column_left_in_8_bits() -> None:
    """The finest bug: entries below the threshold stay in 8 bits though their column is an outlier's. In float32."""
    p = problem(19, 80, 70, dtype=torch.float32)
    entries_only = torch.where(p.x.abs() >= THRESHOLD, p.x.double(), 0.0) @ p.kept.double().T
    coded = tokens_reference.dequantize(*tokens_reference.quantize(p.x.masked_fill(p.x.abs() >= THRESHOLD, 0)))
    weight = p.codes.double() * p.scales.double()[:, None]
    wrong = (coded @ weight.T + entries_only + p.bias.double()).float()
    with pytest.raises(AssertionError):
        assert_close(wrong, expected(p, THRESHOLD, True, True))


def test_the_ops_are_good_citizens_of_torch() -> None:
    p = problem(3, 32, 16, dtype=torch.float32)
    found = llm_int8.static_outliers(p.columns, p.kept[:, p.columns], 32)
    ops, scratch = torch.ops.halfbyte, llm_int8.outlier_scratch(32, "cpu")
    torch.library.opcheck(
        ops.llm_int8_matmul.default, (p.x, p.codes, p.scales, THRESHOLD, p.kept, p.bias, p.sums(), scratch)
    )  # fmt: skip
    torch.library.opcheck(ops.llm_int8_matmul.default, (p.x, p.codes, p.scales, 0.0, None, None, None, None))
    torch.library.opcheck(
        ops.static_outlier_matmul.default,
        (p.x, p.codes, p.scales, found.columns, found.weight, found.is_outlier, p.bias, None),
    )


def test_the_functions_compile_whole() -> None:
    p = problem(3, 32, 16, dtype=torch.float32)
    found = llm_int8.static_outliers(p.columns, p.kept[:, p.columns], 32)
    scratch = llm_int8.outlier_scratch(32, "cpu")

    def both(x: Tensor) -> Tensor:
        y = llm_int8.llm_int8_matmul(x, p.codes, p.scales, THRESHOLD, scratch=scratch)
        return y + llm_int8.static_outlier_matmul(x, p.codes, p.scales, found, p.bias).relu()

    compiled = torch.compile(both, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (3, 2):
        assert torch.equal(compiled(p.x[:tokens]), both(p.x[:tokens]))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"x": torch.zeros(2, 32, dtype=torch.int64)}, "x is torch.int64"),
        ({"x": torch.zeros(2, 40)}, "x has 40 inputs"),
        ({"x": torch.zeros(2, 0)}, "1 to 65536 inputs"),
        ({"weight_codes": torch.zeros(16, 32)}, "the weight is torch.float32"),
        ({"weight_scales": torch.zeros(15)}, "16 outputs"),
        ({"weight_scales": torch.zeros(16, dtype=torch.float16)}, "weight scales are torch.float16"),
        ({"threshold": -1.0}, "threshold is -1"),
        ({"threshold": math.nan}, "threshold is nan"),
        ({"kept_weight": torch.zeros(16, 3)}, "keep all of its columns"),
        ({"bias": torch.zeros(15)}, "the bias is"),
        ({"weight_sums": torch.zeros(16)}, "weight sums are torch.float32"),
        ({"scratch": torch.zeros(8, dtype=torch.int32)}, "outlier_scratch"),
    ],
)
def test_arguments_that_disagree_are_refused(change: dict[str, Any], why: str) -> None:
    p = problem(2, 32, 16, dtype=torch.float32)
    given: dict[str, Any] = {
        "x": p.x,
        "weight_codes": p.codes,
        "weight_scales": p.scales,
        "threshold": THRESHOLD,
    } | change
    with pytest.raises(WeightError, match=why):
        llm_int8.llm_int8_matmul(**given)
    on_meta = {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in given.items()}
    with pytest.raises(WeightError, match=why):
        llm_int8.llm_int8_matmul(**on_meta)


def test_static_outliers_that_are_no_columns_are_refused() -> None:
    p = problem(2, 32, 16, dtype=torch.float32)
    with pytest.raises(WeightError, match="distinct columns of 32"):
        llm_int8.static_outliers(torch.tensor([1, 1]), p.kept[:, :2], 32)
    with pytest.raises(WeightError, match="distinct columns of 32"):
        llm_int8.static_outliers(torch.tensor([32]), p.kept[:, :1], 32)
    with pytest.raises(WeightError, match="one of its columns for each"):
        llm_int8.static_outliers(torch.tensor([3]), p.kept[:, :2], 32)
    found = llm_int8.static_outliers(torch.tensor([3]), p.kept[:, :1], 40)
    with pytest.raises(WeightError, match="make them with `static_outliers`"):
        llm_int8.static_outlier_matmul(p.x, p.codes, p.scales, found)


def test_static_outliers_are_sorted_and_padded() -> None:
    weight = torch.arange(6.0).view(2, 3)
    found = llm_int8.static_outliers(torch.tensor([9, 2, 5]), weight, 12)
    assert found.columns.tolist() == [2, 5, 9, *[-1] * 13]
    assert found.weight[:, :3].tolist() == [[1.0, 2.0, 0.0], [4.0, 5.0, 3.0]]
    assert not found.weight[:, 3:].any()
    assert found.is_outlier.nonzero()[:, 0].tolist() == [2, 5, 9]


@pytest.mark.parametrize("tokens", [1, 16, 17, 64, 65, 1024])
@pytest.mark.parametrize("outs", [7, 4096, 22016])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_built_in_tiles_are_powers_of_two_and_no_smaller_than_a_tensor_core(
    tokens: int, outs: int, dtype: torch.dtype
) -> None:
    tile = triton_matmul.tile_for(tokens, outs, dtype)
    for size in (tile.block_m, tile.block_n, tile.block_k):
        assert size >= 16
        assert size & (size - 1) == 0
    assert (tile.block_m + tile.block_n) * tile.block_k * tile.stages <= 227 * 1024


def test_the_ops_are_there_without_triton() -> None:
    program = "import sys; sys.modules['triton'] = None; import halfbyte.kernels.llm_int8"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
