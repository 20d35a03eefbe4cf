"""Prepared 4-bit weights: every kernel against the float64 reference, on signed inputs, ragged shapes, all codes seen."""

import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from without_layouts import interpreted

from closeness import assert_close, relative_error
from halfbyte.errors import WeightError
from halfbyte.kernels import ring, turns
from halfbyte.kernels.w4a16 import codes, few_tokens, many_tokens, reference, streamed, tensor_cores, tilings
from halfbyte.kernels.w4a16.prepared import TensorCoreWeight
from halfbyte.kernels.w4a16.tilings import Block, Stream, Streamed, Tiling
from halfbyte.packing import int32_words, mma_tiles

KERNELS = {
    Stream: interpreted(few_tokens, ring, codes),
    Block: interpreted(many_tokens, ring, turns, codes),
    Streamed: interpreted(streamed, ring, codes),
}
PROCESSORS = 3


@pytest.fixture(autouse=True)
def few_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few that programs have several blocks, or parts of them."""
    monkeypatch.setattr(KERNELS[Block], "processors", lambda _device: PROCESSORS)


class Problem(NamedTuple):
    x: Tensor
    packed: Tensor
    scales: Tensor
    zero_points: Tensor | None
    group_size: int
    bias: Tensor | None

    def prepared(self) -> TensorCoreWeight:
        return tensor_cores.prepare(self.packed, self.scales, self.zero_points, 4, self.group_size, self.x.dtype)

    def expected(self) -> Tensor:
        return reference.wna16_matmul(self.x, self.packed, self.scales, self.zero_points, 4, self.group_size, self.bias)


def problem(
    tokens: int, ins: int, outs: int, group_size: int, *, asymmetric: bool = True, bias: bool = True,
    dtype: torch.dtype = torch.float16, seed: int = 0,
) -> Problem:  # fmt: skip
    """Signed inputs with an outlier, the first and the last code present, scales of uneven size."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (outs, ins), dtype=torch.uint8, generator=g)
    codes[0, 0], codes[-1, -1] = 0, 15
    shape = (outs, ins // group_size)
    zero_points = torch.randint(0, 16, shape, dtype=torch.uint8, generator=g)
    zero_points[0, 0], zero_points[-1, -1] = 0, 15
    x = torch.randn(tokens, ins, generator=g)
    x[-1, ins // 2] = -30
    return Problem(
        x.to(dtype),
        int32_words.pack(codes, 4),
        torch.rand(shape, generator=g).add(0.1).div(16).to(dtype),
        zero_points if asymmetric else None,
        group_size,
        torch.randn(outs, generator=g).to(dtype) if bias else None,
    )


def launch(problem: Problem, tiling: Tiling, weight: TensorCoreWeight | None = None) -> Tensor:
    return KERNELS[type(tiling)].matmul(problem.x, weight or problem.prepared(), problem.bias, tiling)


GROUPS = [
    pytest.param(256, 128, id="groups-of-128"),
    pytest.param(512, 256, id="groups-of-256"),
    pytest.param(192, 64, id="groups-of-64"),
    pytest.param(160, 32, id="groups-of-32"),
    pytest.param(208, 208, id="one-group"),
]
# inputs 160 and 208 are no whole tiles, outputs 40, 72, 136 and 200 no whole blocks
SPLIT, SHARED = Stream(8, 32, 2, 2, 2, 2), Block(16, 2, 1, 2, 2, True)
STREAMS = [
    pytest.param(3, 40, Stream(8, 64, 2, 2, 3, 1), id="warps"),
    pytest.param(1, 24, Stream(8, 16, 4, 2, 2, 3), id="narrow"),
    pytest.param(9, 200, Stream(16, 128, 1, 2, 2, 1), id="two-tiles"),
]
BLOCKS = [
    pytest.param(3, 40, Block(16, 2, 1, 2, 2, False), id="one"),
    pytest.param(20, 136, Block(16, 4, 1, 1, 3, True), id="four-crews"),
    pytest.param(20, 136, Block(16, 2, 2, 2, 2, False, beside=1), id="wide"),
]
ONE_OF_EACH = pytest.mark.parametrize(
    "tiling", [Stream(16, 64, 2, 2, 2, 2), Block(16, 2, 1, 2, 2, True)], ids=["stream", "block"]
)

STREAMED = [Streamed(4, 2, 2, 1, 2, 2), Streamed(8, 1, 1, 2, 2, 2)]


@pytest.mark.parametrize(("ins", "group_size"), GROUPS)
@pytest.mark.parametrize("tiling", [SPLIT, SHARED], ids=["stream", "block"])
def test_kernels_agree_with_the_reference(tiling: Tiling, ins: int, group_size: int) -> None:
    given = problem(3, ins, 72, group_size)
    # a stream's sums are in float32, so only the result is rounded to float16; in blocks the weight is, too
    assert_close(launch(given, tiling), given.expected(), rounding_steps=1 if tiling == SPLIT else 2)


@pytest.mark.parametrize(("tokens", "outs", "tiling"), [*STREAMS, *BLOCKS])
def test_every_way_to_cut_agrees_with_the_reference(tokens: int, outs: int, tiling: Tiling) -> None:
    given = problem(tokens, 256, outs, 128)
    assert_close(launch(given, tiling), given.expected(), rounding_steps=1 if isinstance(tiling, Stream) else 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "outs", "ins", "tiling"),
    [
        pytest.param(3, 72, 768, Streamed(4, 2, 2, 1, 4, 2), id="folded-for-two-crews"),
        pytest.param(5, 72, 1408, Streamed(8, 2, 1, 2, 3, 2), id="folded-steps-reach-past-the-inputs"),
        pytest.param(7, 200, 640, Streamed(8, 1, 1, 1, 3, 2), id="one-crew"),
        pytest.param(16, 136, 896, Streamed(16, 1, 2, 2, 2, 2), id="two-crews"),
        pytest.param(1, 40, 128, Streamed(8, 1, 2, 4, 2, 2), id="a-crew-without-steps"),
        pytest.param(7, 200, 640, Streamed(8, 1, 2, 2, 3, 2, beside=True), id="crews-beside-each-other"),
    ],
)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_a_streamed_weight_agrees_with_the_reference(
    tokens: int, outs: int, ins: int, tiling: Streamed, bias: bool, dtype: torch.dtype
) -> None:
    given = problem(tokens, ins, outs, 128, asymmetric=False, bias=bias, dtype=dtype)
    # one rounding, which the interpreter does by cutting off in bfloat16
    assert_close(launch(given, tiling), given.expected(), rounding_steps=1 if dtype == torch.float16 else 2)


@pytest.mark.parametrize("group_size", [32, 128])
def test_a_stream_agrees_with_the_reference_in_bfloat16(group_size: int) -> None:
    given = problem(3, 256, 40, group_size, dtype=torch.bfloat16)
    # one rounding, which the interpreter does by cutting off
    assert_close(launch(given, Stream(8, 64, 2, 2, 2, 1)), given.expected(), rounding_steps=2)


@ONE_OF_EACH
def test_without_zero_points_every_zero_is_eight(tiling: Tiling) -> None:
    given = problem(3, 256, 40, 64, asymmetric=False, bias=False)
    assert_close(launch(given, tiling), given.expected(), rounding_steps=2)


@ONE_OF_EACH
def test_the_unit_vectors_read_every_code(tiling: Tiling) -> None:
    """Power-of-two scales keep every product exact, so each element of W must come out as it is."""
    codes = torch.arange(16, dtype=torch.uint8).repeat(64).view(16, 64)
    codes = (codes + torch.arange(16, dtype=torch.uint8)[:, None]) % 16
    scales = torch.tensor([0.5, 2.0]).expand(16, 2).half()
    zero_points = torch.tensor([3, 15], dtype=torch.uint8).expand(16, 2).contiguous()
    weight = (codes.float().unflatten(1, (2, 32)) - zero_points[:, :, None]) * scales[:, :, None]
    for first in range(0, 64, 16):
        x = torch.zeros(16, 64, dtype=torch.float16)
        x[:, first : first + 16] = torch.eye(16)
        y = launch(Problem(x, int32_words.pack(codes, 4), scales, zero_points, 32, None), tiling)
        assert torch.equal(y, weight.flatten(1)[:, first : first + 16].T.half())


@pytest.mark.parametrize("tiling", STREAMED, ids=str)
def test_the_unit_vectors_read_every_streamed_code(tiling: Streamed) -> None:
    """Power-of-two scales and codes less 8 keep every product exact."""
    given = problem(256, 256, 72, 128, asymmetric=False, bias=False)
    scales = torch.tensor([0.5, 2.0]).expand(72, 2) * torch.tensor([1.0, 4.0, 8.0]).repeat(24)[:, None]
    given = given._replace(scales=scales.half(), x=torch.eye(256).half())
    assert torch.equal(launch(given, replace(tiling, block_m=256)), given.expected().half())


@pytest.mark.parametrize(
    ("tiling", "ins", "group_size"),
    [
        (Stream(16, 64, 2, 2, 2, 2), 208, 208), (Block(16, 2, 1, 2, 2, True), 208, 208),
        *((tiling, 640, 128) for tiling in STREAMED),
    ],
    ids=str,
)  # fmt: skip
def test_kernels_read_and_write_only_their_own(
    tiling: Tiling, ins: int, group_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = problem(3, ins, 40, group_size, asymmetric=not isinstance(tiling, Streamed))
    around = torch.full((5, ins + 32), float("nan"), dtype=torch.float16)
    around[1:4, 16:-16] = given.x
    weight, empty = given.prepared(), torch.empty
    poisoned = lambda *shape, **options: empty(*shape, **options).fill_(float("nan"))  # noqa: E731
    monkeypatch.setattr(torch, "empty", poisoned)
    y = launch(given._replace(x=around[1:4, 16:-16]), tiling, weight)
    monkeypatch.undo()
    assert_close(y, given.expected(), rounding_steps=2)


@ONE_OF_EACH
def test_shared_blocks_leave_the_counters_as_they_were(tiling: Tiling) -> None:
    given = problem(3, 256, 72, 128)
    weight = given.prepared()
    first = launch(given, tiling, weight)
    assert not weight.counters.any()
    assert torch.equal(launch(given, tiling, weight), first)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("ins", "group_size"), GROUPS)
def test_a_cpu_decodes_with_one_rounding(ins: int, group_size: int, dtype: torch.dtype) -> None:
    given = problem(1, ins, 72, group_size, dtype=dtype)
    w = given.prepared()
    exact = reference.dequantize(given.packed, given.scales, given.zero_points, 4, group_size).to(dtype)
    assert torch.equal(tensor_cores._decode(w.words, w.scales, w.offsets, 72, ins, group_size), exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("asymmetric", [False, True], ids=["symmetric", "asymmetric"])
def test_the_op_agrees_with_the_reference_on_a_cpu(asymmetric: bool, dtype: torch.dtype) -> None:
    given = problem(7, 256, 72, 64, asymmetric=asymmetric, dtype=dtype)
    assert_close(tensor_cores.matmul(given.x, given.prepared(), given.bias), given.expected())


def test_preparing_can_be_undone() -> None:
    given = problem(1, 208, 72, 208)
    assert torch.equal(tensor_cores.checkpoint_words(given.prepared()), given.packed)


@pytest.mark.parametrize("asymmetric", [False, True], ids=["symmetric", "asymmetric"])
def test_the_op_is_a_good_citizen_of_torch(asymmetric: bool) -> None:
    given = problem(3, 64, 72, 32, asymmetric=asymmetric)
    w = given.prepared()
    arguments = (given.x, w.words, w.scales, w.offsets, w.counters, w.outs, w.group_size, given.bias)
    torch.library.opcheck(torch.ops.halfbyte.w4a16_matmul.default, arguments)


@pytest.mark.parametrize(
    ("outs", "ins", "bits", "group_size", "dtype", "why"),
    [
        (64, 128, 8, 128, torch.float16, "4 bits, not 8"),
        (64, 128, 4, 128, torch.float32, "not torch.float32"),
        (60, 128, 4, 128, torch.float16, "not 60x128"),
        (64, 120, 4, 120, torch.float16, "not 64x120"),
        (64, 192, 4, 48, torch.float16, "not 48"),
        (64, 192, 4, 96, torch.float16, "not 96"),
    ],
)
def test_what_cannot_be_prepared_is_refused_with_the_reason(
    outs: int, ins: int, bits: int, group_size: int, dtype: torch.dtype, why: str
) -> None:
    packed = torch.zeros(outs, int32_words.words_for(ins, bits), dtype=torch.int32)
    with pytest.raises(WeightError, match=why):
        tensor_cores.prepare(packed, torch.ones(outs, ins // group_size), None, bits, group_size, dtype)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"x": torch.zeros(2, 256)}, "x is torch.float32 of 2 axes"),
        ({"x": torch.zeros(256, dtype=torch.float16)}, "of 1 axes"),
        ({"x": torch.zeros(2, 192, dtype=torch.float16)}, "192 inputs and the weight 256"),
        ({"bias": torch.zeros(71, dtype=torch.float16)}, "72 outputs"),
        ({"weight": replace(problem(2, 256, 72, 128).prepared(), outs=200)}, "200 outputs in 2 groups"),
        ({"weight": replace(problem(2, 256, 72, 128).prepared(), counters=torch.zeros(1))}, "not of one weight"),
        ({"weight": replace(problem(2, 256, 72, 128).prepared(), offsets=torch.zeros(2, 64))}, "not of one weight"),
    ],
)
def test_arguments_that_disagree_are_refused(change: dict[str, Any], why: str) -> None:
    given = problem(2, 256, 72, 128)
    weight = given.prepared()
    with pytest.raises(WeightError, match=why):
        tensor_cores.matmul(**{"x": given.x, "weight": weight, "bias": given.bias} | change)


@pytest.mark.parametrize(
    ("tokens", "asymmetric", "runs"), [(1, True, "few_tokens"), (1, False, "streamed"), (40, False, "many_tokens")]
)
def test_a_launch_runs_what_the_tiling_asks_for(
    tokens: int, asymmetric: bool, runs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = problem(tokens, 256, 72, 128, asymmetric=asymmetric)
    for module in (few_tokens, many_tokens, streamed):
        monkeypatch.setattr(module, "matmul", None)
    (kernel,) = [kernel for kernel in KERNELS.values() if kernel.__name__.startswith(f"halfbyte.kernels.w4a16.{runs}")]
    monkeypatch.setattr(f"halfbyte.kernels.w4a16.{runs}", kernel)
    monkeypatch.setattr("torch.cuda.device_of", lambda _x: nullcontext())
    monkeypatch.setattr(tilings, "PROCESSORS", 4)  # which so few outputs fill
    w = given.prepared()
    y = tensor_cores._on_cuda(given.x, w.words, w.scales, w.offsets, w.counters, w.outs, w.group_size, given.bias)
    assert_close(y, given.expected(), rounding_steps=2)


def test_the_op_is_there_without_triton() -> None:
    program = "import sys; sys.modules['triton'] = None; import halfbyte.kernels.w4a16.tensor_cores"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def neighbouring_tiles(w: TensorCoreWeight) -> TensorCoreWeight:
    return replace(w, words=w.words.roll(1, dims=1))


def neighbouring_lanes(w: TensorCoreWeight) -> TensorCoreWeight:
    return replace(w, words=w.words.roll(4, dims=2))


def swapped_halves(w: TensorCoreWeight) -> TensorCoreWeight:
    return replace(
        w, words=w.words.view(torch.int16).unflatten(2, (-1, 2)).flip(3).contiguous().view(torch.int32).squeeze(3)
    )


def rows_in_their_order(w: TensorCoreWeight) -> TensorCoreWeight:
    return replace(w, scales=mma_tiles.deinterleave(w.scales, 128).T.contiguous())


def neighbouring_groups(w: TensorCoreWeight) -> TensorCoreWeight:
    return replace(w, scales=w.scales.roll(1, dims=0))


def zeros_less_one(w: TensorCoreWeight) -> TensorCoreWeight:
    assert w.offsets is not None
    return replace(w, offsets=w.offsets + 1)


def forgotten_zeros(w: TensorCoreWeight) -> TensorCoreWeight:
    return replace(w, offsets=None)


BUGS = [neighbouring_tiles, neighbouring_lanes, swapped_halves, rows_in_their_order, neighbouring_groups]


@ONE_OF_EACH
@pytest.mark.parametrize("bug", [*BUGS, zeros_less_one, forgotten_zeros])
def test_the_comparison_notices(bug: Callable[[TensorCoreWeight], TensorCoreWeight], tiling: Tiling) -> None:
    """A gate that no bug can fail is no gate: the loosest bound above is 2 roundings of bfloat16, 0.016."""
    given = problem(3, 256, 128, 64)
    assert relative_error(launch(given, tiling, bug(given.prepared())), given.expected()) > 0.1


@pytest.mark.parametrize("tiling", STREAMED, ids=str)
@pytest.mark.parametrize("bug", BUGS)
def test_the_comparison_notices_in_a_streamed_weight(
    bug: Callable[[TensorCoreWeight], TensorCoreWeight], tiling: Streamed
) -> None:
    given = problem(3, 256, 128, 128, asymmetric=False)
    assert relative_error(launch(given, tiling, bug(given.prepared())), given.expected()) > 0.1
