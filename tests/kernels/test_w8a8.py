"""Int8 matmul: every route against the float64 reference, on signed inputs and ragged sizes, the extremes among them."""

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from closeness import assert_close, relative_error
from halfbyte.errors import WeightError
from halfbyte.kernels import w8a8
from halfbyte.kernels.w8a8 import cpu, int8_matmul, reference, tiling, triton_gemv, triton_tiles


class Problem(NamedTuple):
    """The arguments of the op, in its order."""

    x: Tensor
    x_scales: Tensor
    weight: Tensor
    weight_scales: Tensor
    bias: Tensor | None = None
    residual: Tensor | None = None
    x_zeros: Tensor | None = None
    weight_sums: Tensor | None = None
    dtype: torch.dtype = torch.float32


def problem(
    tokens: int, ins: int, outs: int, *, whole: bool = False, static: bool = False,
    dtype: torch.dtype = torch.float32, seed: int = 0,
) -> Problem:  # fmt: skip
    """Signed codes with both extremes, scales of uneven size; with `whole` everything that is optional, too."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(-128, 128, (tokens, ins), dtype=torch.int8, generator=g)
    weight = torch.randint(-128, 128, (outs, ins), dtype=torch.int8, generator=g)
    x[:1, :1], x[-1:, -1:], weight[0, 0], weight[-1, -1] = -128, 127, 127, -128
    x_scales = (torch.rand(1 if static else tokens, generator=g) + 0.1) / 100
    weight_scales = torch.rand(outs, generator=g) + 0.1
    if not whole:
        return Problem(x, x_scales, weight, weight_scales, dtype=dtype)
    sums = weight.sum(1, dtype=torch.int32)
    zeros = torch.randint(-128, 128, (tokens,), dtype=torch.int32, generator=g)
    # as large as the products, or a slip in them would drown; all within float16, which ends at 65504
    bias, residual = 100 * torch.randn(outs, generator=g), 100 * torch.randn(tokens, outs, generator=g)
    return Problem(x, x_scales, weight, weight_scales, bias.to(dtype), residual.to(dtype), zeros, sums, dtype)


Route = Callable[..., Tensor]


def gemv(*arguments: Any, **options: Any) -> Tensor:
    """Without the instruction that Triton's interpreter lacks."""
    return triton_gemv.int8_matmul(*arguments, **options, dp4a=False)


ROUTES: list[Route] = [int8_matmul, triton_tiles.int8_matmul]
# and a number of tokens that each takes
every_route = pytest.mark.parametrize(
    ("matmul", "tokens"), [*((route, 3) for route in ROUTES), (gemv, 1)], ids=["op", "tiles", "gemv"]
)
routes_of_any_size = pytest.mark.parametrize("matmul", ROUTES, ids=["op", "tiles"])


def ones(tokens: int) -> Tensor:
    return torch.ones(tokens)


def test_the_reference_multiplies_by_hand() -> None:
    x = torch.tensor([[1, -2], [127, -128]], dtype=torch.int8)
    weight = torch.tensor([[3, 4], [-128, 127], [0, 1]], dtype=torch.int8)
    total = torch.tensor([[-5.0, -382.0, -2.0], [-131.0, -32512.0, -128.0]])
    scales = torch.tensor([2.0, 0.5]), torch.tensor([1.0, 0.25, 4.0])
    y = reference.int8_matmul(x, scales[0], weight, scales[1], dtype=torch.float32)
    assert torch.equal(y, total * torch.tensor([[2.0, 0.5, 8.0], [0.5, 0.125, 2.0]]))
    zeros, sums = torch.tensor([10, -3], dtype=torch.int32), torch.tensor([7, -1, 1], dtype=torch.int32)
    bias, residual = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([[0.5, 0.0, 0.0], [0.0, 0.0, -0.5]])
    y = reference.int8_matmul(x, ones(2), weight, ones(3), bias, residual, zeros, sums, torch.float32)
    assert torch.equal(y, torch.tensor([[-73.5, -370.0, -9.0], [-109.0, -32513.0, -122.5]]))


def assert_exact(matmul: Route, tokens: int, ins: int, outs: int) -> None:
    x, _, weight, *_ = problem(tokens, ins, outs)
    y = matmul(x, ones(tokens), weight, ones(outs), dtype=torch.float32)
    assert torch.equal(y, (x.long() @ weight.long().T).float())


@routes_of_any_size
@pytest.mark.parametrize(
    ("tokens", "ins", "outs"),
    [(1, 128, 32), (3, 100, 7), (17, 33, 65), (1, 1, 1), (2, 272, 48), (20, 1, 3), (5, 257, 1)],
    ids=["one-token", "narrow", "ragged", "smallest", "sixteens", "one-input", "one-output"],
)
def test_sums_are_exact_integers(matmul: Route, tokens: int, ins: int, outs: int) -> None:
    assert_exact(matmul, tokens, ins, outs)


@pytest.mark.parametrize(("ins", "outs"), [(128, 32), (4, 1), (100, 7), (4100, 33)])
def test_sums_of_words_are_exact_integers(ins: int, outs: int) -> None:
    assert_exact(gemv, 1, ins, outs)


@every_route
@pytest.mark.parametrize(("left", "right"), [(127, 127), (-128, -128), (127, -128), (-128, 127)])
def test_sums_of_extremes_are_exact(matmul: Route, tokens: int, left: int, right: int) -> None:
    ins = 1020  # 128 · 128 · 1020 is below 2**24, so float32 holds the sum
    x, weight = torch.full((tokens, ins), left, dtype=torch.int8), torch.full((5, ins), right, dtype=torch.int8)
    y = matmul(x, ones(tokens), weight, ones(5), dtype=torch.float32)
    assert torch.equal(y, torch.full((tokens, 5), float(left * right * ins)))


@pytest.mark.parametrize(("right", "total"), [(-128, 2**31 - 2**14), (127, -128 * 127 * (2**17 - 1))])
def test_the_most_inputs_do_not_overflow(right: int, total: int) -> None:
    assert w8a8.MAX_INS == 2**17 - 1
    x = torch.full((1, w8a8.MAX_INS), -128, dtype=torch.int8)
    weight = torch.full((2, w8a8.MAX_INS), right, dtype=torch.int8)
    assert cpu.product(x, weight).tolist() == [[total, total]]
    assert torch.equal(int8_matmul(x, ones(1), weight, ones(2), dtype=torch.float32), torch.full((1, 2), float(total)))


def test_the_most_inputs_with_zeros_do_not_overflow() -> None:
    ins = w8a8.MAX_INS_WITH_ZEROS
    x, weight = torch.full((1, ins), -128, dtype=torch.int8), torch.full((1, ins), -128, dtype=torch.int8)
    zeros, sums = torch.tensor([127], dtype=torch.int32), weight.sum(1, dtype=torch.int32)
    y = int8_matmul(x, ones(1), weight, ones(1), x_zeros=zeros, weight_sums=sums, dtype=torch.float32)
    assert y.item() == torch.tensor(255.0 * 128 * ins).item()
    assert 255 * 128 * (ins + 1) >= 2**31


@every_route
@pytest.mark.parametrize("static", [False, True], ids=["scale-per-token", "one-scale"])
@pytest.mark.parametrize("whole", [False, True], ids=["scales-only", "everything"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_form_agrees_with_the_reference(
    matmul: Route, tokens: int, static: bool, whole: bool, dtype: torch.dtype
) -> None:
    arguments = problem(tokens, 144, 33, whole=whole, static=static, dtype=dtype)
    # float32 rounds at each of two products and two sums; the other formats at the end only
    steps = 4 if dtype == torch.float32 else 1
    assert_close(matmul(*arguments), reference.int8_matmul(*arguments), rounding_steps=steps)


@every_route
@pytest.mark.parametrize("part", ["bias", "residual", "zeros"])
def test_optional_parts_come_one_by_one(matmul: Route, tokens: int, part: str) -> None:
    whole = problem(tokens, 64, 17, whole=True)
    given_parts: dict[str, Any] = {"bias": None, "residual": None, "x_zeros": None, "weight_sums": None}
    names = ("x_zeros", "weight_sums") if part == "zeros" else (part,)
    arguments = whole._replace(**given_parts | {name: getattr(whole, name) for name in names})
    assert_close(matmul(*arguments), reference.int8_matmul(*arguments))


@every_route
def test_bias_and_residual_may_have_formats_of_their_own(matmul: Route, tokens: int) -> None:
    arguments = problem(tokens, 64, 17, whole=True)
    assert arguments.bias is not None
    assert arguments.residual is not None
    arguments = arguments._replace(bias=arguments.bias.bfloat16(), residual=(arguments.residual / 100).half())
    assert_close(matmul(*arguments), reference.int8_matmul(*arguments))


@pytest.mark.parametrize("tokens", [17, 40, 70])
def test_every_tile_agrees_with_the_reference(tokens: int) -> None:
    arguments = problem(tokens, 272, 70, whole=True)
    assert_close(triton_tiles.int8_matmul(*arguments), reference.int8_matmul(*arguments))


def test_more_tiles_of_tokens_than_run_side_by_side_cover_the_result() -> None:
    arguments = problem(16 * int(triton_tiles.SUPER_M) + 5, 32, 35)
    tile = triton_tiles.Tile(block_m=16, block_n=16, block_k=32, warps=4, stages=1)
    assert_close(triton_tiles.int8_matmul(*arguments, tile=tile), reference.int8_matmul(*arguments))


@every_route
def test_only_its_own_is_read_and_written(matmul: Route, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = problem(tokens, 100, 9, whole=True)
    expected = reference.int8_matmul(*arguments)
    assert arguments.residual is not None
    x, residual = torch.full((5, 160), 99, dtype=torch.int8), torch.full((5, 20), float("nan"))
    x, residual = x[1 : 1 + tokens, 8:108].copy_(arguments.x), residual[1 : 1 + tokens, 3:12].copy_(arguments.residual)
    empty = torch.empty
    poisoned = lambda *shape, **options: empty(*shape, **options).fill_(float("nan"))  # noqa: E731
    monkeypatch.setattr(torch, "empty", poisoned)
    y = matmul(*arguments._replace(x=x, residual=residual))
    monkeypatch.undo()
    assert_close(y, expected)


def test_the_op_takes_transposed_matrices() -> None:
    arguments = problem(3, 64, 17, whole=True)
    assert arguments.residual is not None
    transposed = arguments._replace(
        x=arguments.x.T.contiguous().T,
        weight=arguments.weight.T.contiguous().T,
        residual=arguments.residual.T.contiguous().T,
    )
    assert torch.equal(int8_matmul(*transposed), int8_matmul(*arguments))


@routes_of_any_size
def test_no_tokens_make_no_outputs(matmul: Route) -> None:
    assert matmul(*problem(0, 64, 9)).shape == (0, 9)


def test_arguments_stay_as_they_were() -> None:
    arguments = problem(3, 64, 17, whole=True)
    before = [part.clone() if isinstance(part, Tensor) else part for part in arguments]
    int8_matmul(*arguments)
    for part, was in zip(arguments, before, strict=True):
        assert part is was or torch.equal(part, was)


@given(tokens=st.integers(1, 5), left=st.integers(1, 40), right=st.integers(1, 40), outs=st.integers(1, 9))
def test_inputs_side_by_side_add_up(tokens: int, left: int, right: int, outs: int) -> None:
    """x₁ · W₁ᵀ + x₂ · W₂ᵀ: the first product is the residual of the second."""
    x, _, weight, *_ = problem(tokens, left + right, outs, seed=left)
    first = int8_matmul(x[:, :left], ones(tokens), weight[:, :left], ones(outs), dtype=torch.float32)
    both = int8_matmul(x[:, left:], ones(1), weight[:, left:], ones(outs), residual=first, dtype=torch.float32)
    assert torch.equal(both, int8_matmul(x, ones(tokens), weight, ones(outs), dtype=torch.float32))


@given(zero=st.integers(-64, 64), ins=st.integers(1, 50), seed=st.integers(0, 2**16))
def test_a_zero_shifts_its_token(zero: int, ins: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(-64, 64, (2, ins), dtype=torch.int8, generator=g)
    weight = torch.randint(-128, 128, (3, ins), dtype=torch.int8, generator=g)
    zeros, sums = torch.tensor([zero, 0], dtype=torch.int32), weight.sum(1, dtype=torch.int32)
    shifted = (x - zeros[:, None]).to(torch.int8)
    y = int8_matmul(x, ones(2), weight, ones(3), x_zeros=zeros, weight_sums=sums, dtype=torch.float32)
    assert torch.equal(y, int8_matmul(shifted, ones(2), weight, ones(3), dtype=torch.float32))


def test_a_processor_that_saturates_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def saturating(x: Tensor, weight: Tensor) -> Tensor:
        """Bytes without a sign times bytes with one, pairs of products added in 16 bits."""
        pairs = ((x.int() + 128)[:, :, None] * weight.int()).unflatten(1, (-1, 2)).sum(2)
        return pairs.clamp(-(2**15), 2**15 - 1).sum(1).int() - 128 * weight.int().sum(0).int()

    x, weight = torch.full((1, 64), 127, dtype=torch.int8), torch.full((2, 64), -128, dtype=torch.int8)
    assert cpu.product_is_exact()
    monkeypatch.setattr(torch.ops.aten, "_int_mm", saturating)
    cpu.product_is_exact.cache_clear()
    assert not cpu.product_is_exact()
    assert cpu.product(x, weight).tolist() == [[-127 * 128 * 64] * 2]
    monkeypatch.undo()
    cpu.product_is_exact.cache_clear()


def transposed_scales(a: Problem) -> Problem:
    return a._replace(weight_scales=a.weight_scales.flip(0))


def one_scale_for_all(a: Problem) -> Problem:
    return a._replace(x_scales=a.x_scales[:1])


def forgotten_zeros(a: Problem) -> Problem:
    return a._replace(x_zeros=None, weight_sums=None)


def negated_zeros(a: Problem) -> Problem:
    assert a.x_zeros is not None
    return a._replace(x_zeros=-a.x_zeros)


def forgotten_bias(a: Problem) -> Problem:
    return a._replace(bias=None)


def forgotten_residual(a: Problem) -> Problem:
    return a._replace(residual=None)


def unsigned_codes(a: Problem) -> Problem:
    """Read as 0..255, then centred: every sign bit flipped."""
    return a._replace(x=a.x ^ -128)


def lost_last_input(a: Problem) -> Problem:
    return a._replace(x=a.x.index_fill(1, torch.tensor([a.x.shape[1] - 1]), 0))


@pytest.mark.parametrize(
    "bug",
    [
        transposed_scales, one_scale_for_all, forgotten_zeros, negated_zeros, forgotten_bias, forgotten_residual,
        unsigned_codes, lost_last_input,
    ],
)  # fmt: skip
def test_the_comparison_notices(bug: Callable[[Problem], Problem]) -> None:
    """A gate that no bug can fail is no gate: the loosest bound above is one rounding of bfloat16, 0.008."""
    arguments = problem(17, 33, 33, whole=True)
    expected = reference.int8_matmul(*arguments)
    assert relative_error(reference.int8_matmul(*bug(arguments)), expected) > 0.02


@pytest.mark.parametrize("whole", [False, True], ids=["scales-only", "everything"])
def test_the_op_is_a_good_citizen_of_torch(whole: bool) -> None:
    arguments = problem(3, 64, 16, whole=whole, dtype=torch.bfloat16)
    torch.library.opcheck(torch.ops.halfbyte.int8_matmul.default, tuple(arguments))


def test_the_op_compiles_whole() -> None:
    _, _, weight, weight_scales, *_ = problem(3, 64, 16)
    compiled = torch.compile(
        lambda x, scales: int8_matmul(x, scales, weight, weight_scales).relu(),
        backend="aot_eager",
        fullgraph=True,
        dynamic=True,
    )
    for tokens in (3, 5):
        x, scales, *_ = problem(tokens, 64, 16)
        assert torch.equal(compiled(x, scales), int8_matmul(x, scales, weight, weight_scales).relu())


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"dtype": torch.int32}, "no int8 matmul gives torch.int32"),
        ({"x": torch.zeros(2, 64)}, "quantize it to torch.int8"),
        ({"x": torch.zeros(2, 72, dtype=torch.int8)}, "x has 72 columns"),
        ({"weight": torch.zeros(16, 64)}, "the weight is torch.float32"),
        ({"x_scales": torch.ones(3)}, "one for each of 2 tokens or one for all"),
        ({"x_scales": torch.ones(2, dtype=torch.float16)}, "give torch.float32"),
        ({"weight_scales": torch.ones(16, 1)}, "one for each of 16 outputs"),
        ({"bias": torch.zeros(15)}, "the bias is"),
        ({"bias": torch.zeros(16, dtype=torch.int32)}, "floating-point number"),
        ({"residual": torch.zeros(2, 15)}, r"floating-point \[2, 16\]"),
        ({"x_zeros": None}, "x_zeros is missing"),
        ({"weight_sums": None}, "weight_sums is missing"),
        ({"x_zeros": torch.zeros(2)}, "x_zeros are torch.float32"),
        ({"weight_sums": torch.zeros(2, dtype=torch.int32)}, "weight_sums are"),
    ],
)
def test_arguments_that_disagree_are_refused(change: dict[str, Any], why: str) -> None:
    arguments: dict[str, Any] = problem(2, 64, 16, whole=True)._asdict() | change
    with pytest.raises(WeightError, match=why):
        int8_matmul(**arguments)
    on_meta: dict[str, Any] = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in arguments.items()}
    with pytest.raises(WeightError, match=why):
        int8_matmul(**on_meta)


@pytest.mark.parametrize(("ins", "zeros"), [(w8a8.MAX_INS + 1, False), (w8a8.MAX_INS_WITH_ZEROS + 1, True)])
def test_inputs_that_could_overflow_are_refused(ins: int, zeros: bool) -> None:
    x = torch.empty(1, ins, dtype=torch.int8, device="meta")
    one, count = torch.empty(1, device="meta"), torch.empty(1, dtype=torch.int32, device="meta")
    with pytest.raises(WeightError, match=f"hold {ins - 1} at most"):
        int8_matmul(x, one, x, one, x_zeros=count if zeros else None, weight_sums=count if zeros else None)


@pytest.mark.parametrize(
    ("device", "tokens", "ins", "outs", "dtype", "capability", "runs"),
    [
        ("cpu", 1, 64, 64, torch.bfloat16, (0, 0), "torch"),
        ("cuda", 1, 64, 64, torch.bfloat16, (9, 0), "gemv"),
        ("cuda", 1, 63, 64, torch.bfloat16, (9, 0), "tiles"),
        ("cuda", 2, 64, 64, torch.bfloat16, (9, 0), "tiles"),
        ("cuda", 33, 64, 64, torch.bfloat16, (9, 0), "hopper"),
        ("cuda", 64, 16, 8200, torch.bfloat16, (9, 0), "tiles"),
        ("cuda", 65, 16, 8200, torch.bfloat16, (9, 0), "hopper"),
        ("cuda", 99, 64, 64, torch.bfloat16, (8, 0), "tiles"),
        ("cuda", 99, 64, 64, torch.bfloat16, (10, 0), "tiles"),
        ("cuda", 99, 72, 64, torch.bfloat16, (9, 0), "tiles"),
        ("cuda", 99, 64, 60, torch.bfloat16, (9, 0), "tiles"),
        ("cuda", 99, 64, 60, torch.float32, (9, 0), "hopper"),
    ],
)
def test_the_route_is_known_beforehand(
    device: str, tokens: int, ins: int, outs: int, dtype: torch.dtype, capability: tuple[int, int], runs: str
) -> None:
    x, weight = torch.zeros(tokens, ins, dtype=torch.int8), torch.zeros(outs, ins, dtype=torch.int8)
    assert w8a8.route(device, x, weight, dtype, capability) == runs


def test_matrices_that_begin_anywhere_take_the_plain_route() -> None:
    codes = torch.zeros(65 * 64, dtype=torch.int8)
    aligned, shifted = codes[: 64 * 64].view(64, 64), codes[1 : 64 * 64 + 1].view(64, 64)
    routes = [
        w8a8.route("cuda", x, weight, torch.float32, (9, 0))
        for x, weight in (
            (aligned, aligned),
            (aligned, shifted),
            (shifted, aligned),
            (aligned[:1].expand(64, -1), aligned),
        )
    ]
    assert routes == ["hopper", "tiles", "tiles", "tiles"]


@given(rows=st.integers(1, 40), columns=st.integers(1, 12), group=st.integers(1, 16))
def test_every_tile_has_a_place_of_its_own(rows: int, columns: int, group: int) -> None:
    places = {tiling.place(tile, rows, columns, group) for tile in range(rows * columns)}
    assert places == {(row, column) for row in range(rows) for column in range(columns)}


def test_tiles_of_a_turn_lie_together() -> None:
    places = [tiling.place(tile, 32, 16, group=8) for tile in range(tiling.MULTIPROCESSORS)]
    assert len({row for row, _ in places}) <= 16
    assert len({column for _, column in places}) <= 17


@pytest.mark.parametrize(
    ("tokens", "outs", "ins", "cut"),
    [
        (64, 4096, 4096, tiling.Cut(1, 32, 256, 8)),
        (64, 8192, 28672, tiling.Cut(1, 64, 256, 6)),
        (128, 4096, 11008, tiling.Cut(1, 64, 256, 6)),
        (512, 4096, 22016, tiling.Cut(2, 128, 128, 6)),
        (1024, 4096, 4096, tiling.Cut(2, 256, 128, 4)),
        (1024, 11008, 4096, tiling.Cut(3, 256, 128, 3)),
    ],
)
def test_a_round_of_tiles_is_nearly_full(tokens: int, outs: int, ins: int, cut: tiling.Cut) -> None:
    """Among the fastest that were measured; each has 128 tiles, or twice as many, for 132 multiprocessors."""
    rows, columns = tiling.tiles(tokens, outs, cut)
    assert -(rows * columns) % tiling.MULTIPROCESSORS < 10
    assert tiling.cut_for(tokens, outs, ins) == cut


def test_every_cut_fits_the_shared_memory_of_the_chip() -> None:
    results = 2 * 32 * 4  # two buffers of 32 columns, float32
    barriers = 1024
    for cut in tiling.COSTS:
        buffer = (cut.tokens + cut.block_n) * cut.block_k
        assert cut.stages * buffer + cut.tokens * results + barriers <= 227 * 1024


@pytest.mark.parametrize(
    ("tokens", "outs", "stages"),
    [
        (16, 4096, 6),  # 128 tiles: one on each multiprocessor does
        (16, 6144, 4),  # 192: two side by side do
        (32, 4096, 4),
        (32, 8192, 3),
        (32, 11008, 4),  # 172 wider tiles: two side by side do
        (32, 22016, 3),  # 344: three side by side do
        (64, 11008, 5),
        (64, 22016, 4),
        (64, 28672, 5),  # 448: two rounds anyway
    ],
)
def test_stages_follow_from_the_rounds(tokens: int, outs: int, stages: int) -> None:
    """As measured: what needs a round more than necessary was 5 to 25 % slower."""
    assert triton_tiles.tile_for(tokens, outs).stages == stages


COMPILE_FOR_HOPPER = """
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from halfbyte.kernels.w8a8 import tiling, triton_hopper

kernel, codes, results = triton_hopper._int8_matmul_kernel, triton_hopper._tiled(128, 8), triton_hopper._tiled(64, 16)
types = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(("cut", "form"), "constexpr")
types |= dict.fromkeys(("x_desc", "weight_desc"), f"tensordesc<i8[64, 128],{codes!r}>")
types |= {"y_desc": f"tensordesc<bf16[64, 32],{results!r}>"} | dict.fromkeys(("x_zeros", "weight_sums"), "*i32")
types |= dict.fromkeys(("x_scales", "weight_scales"), "*fp32") | dict.fromkeys(("bias", "residual"), "*bf16")
constants = {"cut": tiling.Cut(1, 64, 128, 3), "form": triton_hopper.Form(False, True, True, True)}
source = GluonASTSource(kernel, types, constants)
compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "enable_fp_fusion": True})
assert "wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8" in compiled.asm["ptx"]
"""


def test_the_kernel_for_hopper_compiles_without_one() -> None:
    """In a process of its own: what Triton's interpreter has replaced, its compiler does not find again."""
    pytest.importorskip("triton.experimental.gluon")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", COMPILE_FOR_HOPPER], check=True, timeout=120, env=environment)


def test_the_room_opens_without_triton() -> None:
    program = "import sys; sys.modules['triton'] = None; import halfbyte.kernels.w8a8"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
