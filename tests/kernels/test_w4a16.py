"""Weight-only matmul: every route against the float64 reference, on signed inputs and ragged shapes, all codes seen."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from closeness import assert_close, relative_error
from halfbyte.errors import WeightError
from halfbyte.kernels import w4a16
from halfbyte.kernels.w4a16 import cpu, decode, reference, triton_gemv, triton_kernel, wna16_matmul
from halfbyte.packing import int32_words


class Problem(NamedTuple):
    """The arguments of the op, in its order."""

    x: Tensor
    packed: Tensor
    scales: Tensor
    zero_points: Tensor | None
    bits: int
    group_size: int
    bias: Tensor | None


def problem(
    tokens: int, ins: int, outs: int, group_size: int, *, bits: int = 4, asymmetric: bool = False, bias: bool = False,
    dtype: torch.dtype = torch.float16, seed: int = 0,
) -> Problem:  # fmt: skip
    """Signed inputs, the first and the last code present, scales of uneven size."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (outs, ins), dtype=torch.uint8, generator=g)
    codes[0, 0], codes[-1, -1] = 0, 2**bits - 1
    shape = (outs, ins // group_size)
    zero_points = torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=g)
    zero_points[0, 0], zero_points[-1, -1] = 0, 2**bits - 1
    return Problem(
        torch.randn(tokens, ins, generator=g).to(dtype),
        int32_words.pack(codes, bits),
        torch.rand(shape, generator=g).add(0.1).div(16).to(dtype),
        zero_points if asymmetric else None,
        bits,
        group_size,
        torch.randn(outs, generator=g).to(dtype) if bias else None,
    )


def through_torch(
    x: Tensor, packed: Tensor, scales: Tensor, zero_points: Tensor | None, bits: int, group_size: int,
    bias: Tensor | None,
) -> Tensor:  # fmt: skip
    return cpu.matmul(x, cpu.prepare(packed, scales, zero_points, bits, group_size, x.dtype), bias)


Route = Callable[..., Tensor]
TRITON: list[Route] = [triton_kernel.wna16_matmul, triton_gemv.wna16_matmul]
TRITON_NAMES = ["tiles", "gemv"]


def test_the_reference_multiplies_what_was_packed_by_hand() -> None:
    codes = torch.tensor([[0, 15, 8, 9], [7, 1, 2, 3]], dtype=torch.uint8)
    scales = torch.tensor([[1.0, 2.0], [0.5, 4.0]])
    zero_points = torch.tensor([[0, 15], [8, 1]], dtype=torch.uint8)
    weight = torch.tensor([[0.0, 15.0, -14.0, -12.0], [-0.5, -3.5, 4.0, 8.0]])
    symmetric = torch.tensor([[-8.0, 7.0, 0.0, 2.0], [-0.5, -3.5, -24.0, -20.0]])
    packed, x = int32_words.pack(codes, 4), torch.eye(4)
    assert torch.equal(reference.wna16_matmul(x, packed, scales, zero_points, 4, 2), weight.T)
    assert torch.equal(reference.wna16_matmul(x, packed, scales, None, 4, 2), symmetric.T)
    assert torch.equal(decode(packed, scales, zero_points, 4, 2, torch.float32), weight)
    assert torch.equal(decode(packed, scales, None, 4, 2, torch.float32), symmetric)


@pytest.mark.parametrize("matmul", TRITON, ids=TRITON_NAMES)
@pytest.mark.parametrize(
    ("tokens", "ins", "outs", "group_size"),
    [(1, 128, 32, 64), (3, 128, 7, 32), (2, 256, 33, 128), (2, 100, 9, 100), (3, 96, 5, 48), (1, 8, 1, 8)],
    ids=["one-token", "narrow", "ragged", "row-ends-in-a-word", "odd-groups", "smallest"],
)
@pytest.mark.parametrize("asymmetric", [False, True], ids=["symmetric", "asymmetric"])
def test_triton_agrees_with_the_reference(
    matmul: Route, tokens: int, ins: int, outs: int, group_size: int, asymmetric: bool
) -> None:
    arguments = problem(tokens, ins, outs, group_size, asymmetric=asymmetric, bias=asymmetric)
    # all sums are in float32: the only rounding to float16 is the result's
    assert_close(matmul(*arguments), reference.wna16_matmul(*arguments), rounding_steps=1)


@pytest.mark.parametrize("matmul", TRITON, ids=TRITON_NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("asymmetric", [False, True], ids=["symmetric", "asymmetric"])
def test_triton_agrees_with_the_reference_on_eight_bits(matmul: Route, dtype: torch.dtype, asymmetric: bool) -> None:
    arguments = problem(2, 256, 9, 256, bits=8, asymmetric=asymmetric, bias=True, dtype=dtype)
    assert_close(matmul(*arguments), reference.wna16_matmul(*arguments))


@pytest.mark.parametrize("matmul", TRITON, ids=TRITON_NAMES)
def test_triton_keeps_float32_activations_whole(matmul: Route) -> None:
    arguments = problem(2, 256, 9, 64, asymmetric=True, dtype=torch.float32)
    assert_close(matmul(*arguments), reference.wna16_matmul(*arguments))


@pytest.mark.parametrize("tokens", [17, 40, 129, 260])
def test_every_tile_agrees_with_the_reference(tokens: int) -> None:
    arguments = problem(tokens, 256, 70, 128, asymmetric=True)
    assert_close(triton_kernel.wna16_matmul(*arguments), reference.wna16_matmul(*arguments), rounding_steps=1)


def test_tiles_in_several_rows_and_columns_cover_the_result() -> None:
    arguments = problem(37, 32, 35, 16)
    tile = triton_kernel.Tile(block_m=16, block_n=16, block_k=16, warps=4, stages=1)
    expected = reference.wna16_matmul(*arguments)
    assert_close(triton_kernel.wna16_matmul(*arguments, tile=tile), expected, rounding_steps=1)


def test_more_tiles_of_tokens_than_run_side_by_side_cover_the_result() -> None:
    arguments = problem(16 * int(triton_kernel.SUPER_M) + 5, 32, 20, 32)
    tile = triton_kernel.Tile(block_m=16, block_n=16, block_k=32, warps=4, stages=1)
    expected = reference.wna16_matmul(*arguments)
    assert_close(triton_kernel.wna16_matmul(*arguments, tile=tile), expected, rounding_steps=1)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("matmul", [*TRITON, wna16_matmul], ids=[*TRITON_NAMES, "op"])
def test_the_unit_vectors_read_every_code(matmul: Route, bits: int) -> None:
    """Power-of-two scales keep every product exact, so each element of W must come out as it is."""
    codes = torch.arange(2**bits, dtype=torch.uint8).repeat(64 // 2**bits or 1).view(-1, 32)
    outs = codes.shape[0]
    scales = torch.tensor([0.5, 2.0]).expand(outs, 2).contiguous()
    zero_points = torch.tensor([3, 2**bits - 1], dtype=torch.uint8).expand(outs, 2).contiguous()
    weight = (codes.float().unflatten(1, (2, 16)) - zero_points.float()[:, :, None]) * scales[:, :, None]
    y = matmul(torch.eye(32), int32_words.pack(codes, bits), scales, zero_points, bits, 16, None)
    assert torch.equal(y, weight.flatten(1).T)


@pytest.mark.parametrize("matmul", TRITON, ids=TRITON_NAMES)
def test_triton_reads_and_writes_only_its_own(matmul: Route, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = problem(3, 100, 9, 100)
    expected = reference.wna16_matmul(*arguments)
    around = torch.full((5, 160), float("nan"), dtype=torch.float16)
    around[1:4, 7:107] = arguments.x
    empty = torch.empty
    poisoned = lambda *shape, **options: empty(*shape, **options).fill_(float("nan"))  # noqa: E731
    monkeypatch.setattr(torch, "empty", poisoned)
    y = matmul(around[1:4, 7:107], *arguments[1:])
    monkeypatch.undo()
    assert_close(y, expected, rounding_steps=1)


@pytest.mark.parametrize("matmul", [*TRITON, wna16_matmul], ids=[*TRITON_NAMES, "op"])
def test_scales_and_zero_points_may_be_transposed(matmul: Route) -> None:
    arguments = problem(2, 128, 9, 32, asymmetric=True)
    assert arguments.zero_points is not None
    transposed = arguments._replace(
        scales=arguments.scales.T.contiguous().T, zero_points=arguments.zero_points.T.contiguous().T
    )
    assert torch.equal(matmul(*transposed), matmul(*arguments))


@pytest.mark.parametrize("matmul", [*TRITON, wna16_matmul], ids=[*TRITON_NAMES, "op"])
def test_no_tokens_make_no_outputs(matmul: Route) -> None:
    assert matmul(*problem(0, 64, 9, 32)).shape == (0, 9)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("asymmetric", [False, True], ids=["symmetric", "asymmetric"])
def test_the_op_agrees_with_the_reference_at_every_width(bits: int, asymmetric: bool) -> None:
    arguments = problem(5, 99, 33, 33, bits=bits, asymmetric=asymmetric, bias=True, dtype=torch.float32)
    assert_close(wna16_matmul(*arguments), reference.wna16_matmul(*arguments))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
def test_the_op_agrees_with_the_reference_in_sixteen_bits(group_size: int, dtype: torch.dtype) -> None:
    arguments = problem(7, 256, 63, group_size, asymmetric=True, bias=True, dtype=dtype)
    assert_close(wna16_matmul(*arguments), reference.wna16_matmul(*arguments))


def test_the_op_decodes_a_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = problem(3, 64, 37, 32, asymmetric=True, dtype=torch.float32)
    monkeypatch.setattr(cpu, "DECODED_ELEMENTS", 640)
    assert_close(wna16_matmul(*arguments), reference.wna16_matmul(*arguments))


@pytest.mark.parametrize("group_size", [32, 64, 128, 256, 768])
@pytest.mark.parametrize("asymmetric", [False, True], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_torch_int4_agrees_with_the_reference(group_size: int, asymmetric: bool, dtype: torch.dtype) -> None:
    arguments = problem(5, 768, 48, group_size, asymmetric=asymmetric, bias=True, dtype=dtype)
    # in float32 it sums one after the other: about sqrt(768) / 2 roundings
    steps = 14 if dtype == torch.float32 else 4
    assert_close(through_torch(*arguments), reference.wna16_matmul(*arguments), rounding_steps=steps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 2, 5, 33])
def test_torch_int8_agrees_with_the_reference(tokens: int, dtype: torch.dtype) -> None:
    arguments = problem(tokens, 304, 33, 304, bits=8, bias=True, dtype=dtype)
    steps = 9 if dtype == torch.float32 else 4
    assert_close(through_torch(*arguments), reference.wna16_matmul(*arguments), rounding_steps=steps)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (problem(1, 128, 33, 128), "multiples of 16, not 33"),
        (problem(1, 96, 32, 48), "not 48"),
        (problem(1, 128, 32, 128, bits=8, asymmetric=True), "zero points"),
        (problem(1, 128, 32, 64, bits=8), "one per 64 of 128 inputs"),
        (problem(1, 120, 32, 120, bits=8), "multiples of 16, not 120"),
        (problem(1, 128, 32, 128, bits=3), "not 3"),
    ],
    ids=["outs", "group", "zero-points", "grouped", "ins", "bits"],
)
def test_what_torch_cannot_run_is_refused_with_the_reason(arguments: Problem, why: str) -> None:
    with pytest.raises(WeightError, match=why):
        through_torch(*arguments)


def test_torch_pays_for_few_tokens_only() -> None:
    weight = cpu.prepare(*problem(1, 128, 32, 128)[1:6], torch.bfloat16)
    assert cpu.pays(weight, torch.bfloat16, 1)
    assert not cpu.pays(weight, torch.bfloat16, 512)
    assert not cpu.pays(weight, torch.float32, 2)


def swapped_nibbles(a: Problem) -> Problem:
    octets = a.packed.view(torch.uint8)
    return a._replace(packed=(octets >> 4 | octets << 4).view(torch.int32))


def neighbouring_groups(a: Problem) -> Problem:
    return a._replace(scales=a.scales.roll(1, dims=1))


def scattered_groups(a: Problem) -> Problem:
    """Input i in group i % groups instead of i // group_size, by reading the inputs in that order."""
    return a._replace(x=a.x.unflatten(1, (a.group_size, -1)).transpose(1, 2).flatten(1))


def forgotten_zero_points(a: Problem) -> Problem:
    return a._replace(zero_points=None)


def zero_points_less_one(a: Problem) -> Problem:
    assert a.zero_points is not None
    return a._replace(zero_points=a.zero_points + 1)


def forgotten_bias(a: Problem) -> Problem:
    return a._replace(bias=None)


def signed_codes(a: Problem) -> Problem:
    return a._replace(packed=a.packed ^ -2004318072)  # 0x88888888: the sign bit of every nibble


@pytest.mark.parametrize(
    "bug",
    [
        swapped_nibbles, neighbouring_groups, scattered_groups, forgotten_zero_points, zero_points_less_one,
        forgotten_bias, signed_codes,
    ],
)  # fmt: skip
def test_the_comparison_notices(bug: Callable[[Problem], Problem]) -> None:
    """A gate that no bug can fail is no gate: the loosest bound above is 4 roundings of bfloat16, 0.03."""
    arguments = problem(17, 256, 33, 64, asymmetric=True, bias=True)
    expected = reference.wna16_matmul(*arguments)
    assert relative_error(reference.wna16_matmul(*bug(arguments)), expected) > 0.1


@pytest.mark.parametrize(("bits", "asymmetric", "bias"), [(4, True, True), (3, False, False)])
def test_the_op_is_a_good_citizen_of_torch(bits: int, asymmetric: bool, bias: bool) -> None:
    arguments = problem(3, 64, 16, 32, bits=bits, asymmetric=asymmetric, bias=bias, dtype=torch.float32)
    torch.library.opcheck(torch.ops.halfbyte.wna16_matmul.default, tuple(arguments))


def test_the_op_compiles_whole() -> None:
    arguments = problem(3, 64, 16, 32, asymmetric=True, dtype=torch.float32)
    compiled = torch.compile(
        lambda x: wna16_matmul(x, *arguments[1:]).relu(), backend="aot_eager", fullgraph=True, dynamic=True
    )
    for tokens in (3, 2):
        x = arguments.x[:tokens]
        assert torch.equal(compiled(x), wna16_matmul(x, *arguments[1:]).relu())


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"x": torch.zeros(2, 64, dtype=torch.int64)}, "x is torch"),
        ({"x": torch.zeros(2, 72)}, "72 inputs of 4 bits take"),
        ({"packed": torch.zeros(16, 8, dtype=torch.int64)}, "packed is torch"),
        ({"scales": torch.ones(16, 3)}, "choose a group size"),
        ({"scales": torch.ones(16, 2, dtype=torch.int32)}, "convert them"),
        ({"group_size": 24}, "groups of 24"),
        ({"zero_points": torch.zeros(16, 2, dtype=torch.int32)}, "unpack them"),
        ({"zero_points": torch.zeros(2, 16, dtype=torch.uint8)}, "one for every scale"),
        ({"bias": torch.zeros(15)}, "16 outputs"),
        ({"bits": 9}, "9 bits"),
    ],
)
def test_arguments_that_disagree_are_refused(change: dict[str, Any], why: str) -> None:
    given: dict[str, Any] = problem(2, 64, 16, 32, asymmetric=True, dtype=torch.float32)._asdict() | change
    with pytest.raises(WeightError, match=why):
        wna16_matmul(**given)
    on_meta: dict[str, Any] = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in given.items()}
    with pytest.raises(WeightError, match=why):
        wna16_matmul(**on_meta)


@pytest.mark.parametrize(
    ("device", "tokens", "groups", "bits", "group_size", "runs"),
    [
        ("cpu", 1, 32, 4, 128, "decode"),
        ("cuda", 1, 32, 4, 128, "gemv"),
        ("cuda", 4, 1, 8, 4097, "gemv"),
        ("cuda", 5, 32, 4, 128, "tiles"),
        ("cuda", 4096, 2, 8, 48, "tiles"),
        ("cuda", 1, 32, 3, 128, "decode"),
        ("cuda", 1, 4, 4, 24, "decode"),
    ],
)
def test_the_route_is_known_beforehand(
    device: str, tokens: int, groups: int, bits: int, group_size: int, runs: str
) -> None:
    assert w4a16.route(device, tokens, groups, bits, group_size) == runs


def test_the_op_is_there_without_triton() -> None:
    program = "import sys; sys.modules['triton'] = None; import halfbyte.kernels.w4a16"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
