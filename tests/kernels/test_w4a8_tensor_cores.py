"""Prepared W4A8 weights: the kernels' own source, interpreted, against integers and float64; extremes driven to the edge."""

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
from halfbyte.kernels import crews, ring, turns
from halfbyte.kernels.w4a8 import blocks, folded, sums, tensor_cores, tilings
from halfbyte.kernels.w4a8.prepared import Kind, PreparedWeight
from halfbyte.kernels.w4a8.tilings import Block, Folded
from halfbyte.packing import int32_words

SHARED_MEMORY = 227 * 1024  # of a Hopper multiprocessor
KERNEL = interpreted(blocks, ring, sums, turns)
FOLDED = interpreted(folded, ring, sums)
KINDS: tuple[Kind, ...] = ("float", "integer", "weight")


@pytest.fixture(autouse=True)
def _on_three_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few that programs have several blocks, or parts of them."""
    monkeypatch.setattr(KERNEL, "processors", lambda _device: 3)


class Problem(NamedTuple):
    x: Tensor
    x_scales: Tensor
    codes: Tensor
    scales: Tensor
    weight: PreparedWeight
    bias: Tensor | None

    def exact(self) -> Tensor:
        """The integer sums, which the result is times its scales."""
        grouped = self.codes.unflatten(1, (self.scales.shape[1], -1)).double() - 8
        return self.x.double() @ (grouped * self.scales.double()[:, :, None]).flatten(1).T

    def expected(self) -> Tensor:
        rows = self.weight.row_scales.double() * (16 if self.weight.sixteenfold else 1)
        y = self.exact() * rows * self.x_scales.double()[:, None]
        return y if self.bias is None else y + self.bias.double()


def problem(
    kind: Kind, tokens: int, outs: int, ins: int, group_size: int = 128, *, largest: int = 300, unit: bool = False,
    bias: bool = True, seed: int = 0,
) -> Problem:  # fmt: skip
    """Signed inputs down to -128, the first and the last code present, scales of uneven size, or all scales of rows one."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (outs, ins), dtype=torch.uint8, generator=g)
    codes[0, 0], codes[-1, -1] = 0, 15
    x = torch.randint(-128, 128, (tokens, ins), dtype=torch.int8, generator=g)
    shape = outs, ins // group_size
    if kind == "float":
        scales = torch.rand(shape, generator=g).add(0.1).bfloat16()
    else:
        scales = torch.randint(1, 16 if kind == "weight" else largest, shape, generator=g).to(torch.int16)
    if kind == "weight":  # 18 · ±7 is still an int8
        scales[-1, 0], codes[-1, :group_size] = 18, codes[-1, :group_size].clamp(min=1)
    rows = torch.ones(outs) if unit else torch.rand(outs, generator=g).add(0.1) / 2000
    x_scales = torch.ones(tokens) if unit else torch.rand(tokens, generator=g).add(0.1) / 100
    weight = tensor_cores.prepare(kind, int32_words.pack(codes, 4), scales, rows, group_size)
    return Problem(x, x_scales, codes, scales, weight, torch.randn(outs, generator=g) if bias else None)


def launch(given: Problem, block: Block, weight: PreparedWeight | None = None) -> Tensor:
    return KERNEL.matmul(given.x, given.x_scales, weight or given.weight, given.bias, torch.float16, block)


BLOCKS = [
    pytest.param(3, 72, 256, 128, Block(16, 2, 1, 2, 2, True), id="shared"),
    pytest.param(20, 136, 512, 256, Block(16, 2, 2, 2, 3, False), id="long-groups"),
    pytest.param(5, 200, 384, 128, Block(8, 1, 1, 1, 2, True, 2), id="two-programs-each"),
    pytest.param(20, 72, 512, 512, Block(16, 4, 1, 2, 2, True), id="one-group-four-crews"),
    pytest.param(40, 264, 384, 128, Block(64, 2, 1, 1, 2, True), id="staged"),
    pytest.param(3, 72, 640, 128, Block(8, 1, 1, 4, 2, True), id="units-that-do-not-divide"),
    pytest.param(3, 200, 1024, 128, Block(8, 2, 1, 1, 4, False, split=3), id="split"),
    pytest.param(3, 72, 512, 128, Block(8, 1, 1, 4, 2, False, split=6), id="split-too-often"),
    pytest.param(20, 264, 384, 128, Block(16, 3, 1, 1, 3, False), id="three-crews"),
    pytest.param(70, 72, 768, 128, Block(64, 1, 1, 2, 2, False, split=3), id="split-blocks-of-tokens"),
    pytest.param(70, 72, 512, 128, Block(64, 1, 1, 4, 2, True), id="scaled-while-the-next-is-multiplied"),
]


@pytest.mark.parametrize(("tokens", "outs", "ins", "group_size", "block"), BLOCKS)
def test_every_way_to_cut_agrees_with_float64(tokens: int, outs: int, ins: int, group_size: int, block: Block) -> None:
    given = problem("integer", tokens, outs, ins, group_size)
    assert_close(launch(given, block), given.expected().half())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("tokens", "outs", "ins", "block"),
    [
        pytest.param(3, 72, 768, Folded(4, 2, 1, 2, 2), id="two-crews"),
        pytest.param(5, 72, 1408, Folded(8, 2, 2, 2, 2), id="steps-reach-past-the-inputs"),
        pytest.param(16, 136, 512, Folded(16, 1, 2, 3, 2), id="one-crew"),
    ],
)
def test_folded_blocks_agree_with_float64(tokens: int, outs: int, ins: int, block: Folded, kind: Kind) -> None:
    given = problem(kind, tokens, outs, ins)
    y = FOLDED.matmul(given.x, given.x_scales, given.weight, given.bias, torch.float16, block)
    assert_close(y, given.expected().half())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", [Block(8, 1, 1, 1, 2, True), Block(8, 2, 1, 2, 2, False, split=2)], ids=str)
def test_shared_blocks_leave_the_counters_as_they_were(block: Block, kind: Kind) -> None:
    given = problem(kind, 3, 72, 512)
    first = launch(given, block)
    assert_close(first, given.expected().half())
    assert not given.weight.counters.any()
    assert torch.equal(launch(given, block), first)


@pytest.mark.parametrize(
    "block", [Block(16, 2, 1, 2, 2, True), Block(8, 1, 1, 1, 4, False, split=2), Folded(4, 2, 1, 2, 2)], ids=str
)
def test_few_tokens_take_rows_to_add(block: Block | Folded) -> None:
    given = problem("integer", 3, 72, 768)
    wide = torch.randn(3, 80, generator=torch.Generator().manual_seed(1))
    given = given._replace(bias=wide[:, 3:75])  # with a stride of their own
    kernel = FOLDED if isinstance(block, Folded) else KERNEL
    y = kernel.matmul(given.x, given.x_scales, given.weight, given.bias, torch.float16, block)
    assert_close(y, given.expected().half())
    assert isinstance(block, Folded) or blocks.adds_rows(block)


def test_rows_are_added_to_what_many_tokens_give(monkeypatch: pytest.MonkeyPatch) -> None:
    given = problem("integer", 40, 72, 256)
    rows, block = torch.randn(40, 72, generator=torch.Generator().manual_seed(1)).half(), Block(64, 2, 1, 1, 2, True)
    assert not blocks.adds_rows(block)
    monkeypatch.setattr(blocks, "matmul", KERNEL.matmul)
    y = tensor_cores.launch(given.x, given.x_scales, given.weight, rows, torch.float16, block)
    expected = given._replace(bias=None).expected().half() + rows
    assert_close(y, expected)
    op = tensor_cores.matmul(given.x, given.x_scales, given.weight, rows, torch.float16)
    assert_close(op, given._replace(bias=rows).expected().half())


@pytest.mark.parametrize("kind", ["integer", "weight"])
@pytest.mark.parametrize("block", [Block(16, 1, 1, 2, 2, True), Block(16, 1, 1, 2, 2, False, split=2)], ids=str)
def test_sums_of_integers_are_exact(kind: Kind, block: Block) -> None:
    given = problem(kind, 3, 72, 512, largest=30, unit=True, bias=False)
    exact = given.exact()
    given = given._replace(x_scales=1 / exact.abs().amax(1).float())
    y = launch(given, block)
    # a sum that is off by one would differ: 11 bits tell it from its neighbours after division by the largest
    assert torch.equal(y, (exact.float() * given.x_scales[:, None]).half())
    assert exact.abs().max() < 2**24


@pytest.mark.parametrize("kind", KINDS)
def test_the_unit_vectors_read_every_code_times_its_scale(kind: Kind) -> None:
    given = problem(kind, 256, 72, 256, unit=True, bias=False, largest=16)
    weight = (given.codes.unflatten(1, (2, -1)).double() - 8) * given.scales.double()[:, :, None]
    y = launch(given._replace(x=torch.eye(256, dtype=torch.int8)), Block(128, 2, 1, 2, 2, False))
    assert torch.equal(y.double(), weight.flatten(1).T)


def extreme(largest: int) -> Problem:
    """One row whose every product has its largest magnitude and the same sign."""
    codes = torch.zeros(8, 256, dtype=torch.uint8)  # -8
    scales = torch.full((8, 2), largest, dtype=torch.int16)
    weight = tensor_cores.prepare("integer", int32_words.pack(codes, 4), scales, torch.full((8,), 2.0**-24), 128)
    x = torch.full((1, 256), -128, dtype=torch.int8)
    return Problem(x, torch.ones(1), codes, scales, weight, None)


@pytest.mark.parametrize(("largest", "sixteenfold"), [(511, True), (512, False), (8191, False)])
def test_sums_up_to_the_edge_of_int32_are_exact(largest: int, sixteenfold: bool) -> None:
    """A sum may reach 8 · 128 · 256 · largest; times 16 it has to stay below 2**31, or codes are multiplied plainly."""
    given = extreme(largest)
    assert given.weight.sixteenfold == sixteenfold
    y = launch(given, Block(8, 1, 1, 2, 2, False))
    assert torch.equal(y, torch.full((1, 8), 2.0**18 * largest / 2**24).half())


def test_a_row_that_may_leave_int32_is_refused() -> None:
    with pytest.raises(WeightError, match="a sum may reach 2147483648"):
        extreme(8192)


def test_kernels_read_and_write_only_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    given, empty = problem("float", 3, 40, 256), torch.empty
    around = torch.full((5, 320), 99, dtype=torch.int8)
    around[1:4, 16:272] = given.x
    poisoned = lambda *shape, **options: empty(*shape, **options).fill_(9999)  # noqa: E731
    monkeypatch.setattr(torch, "empty", poisoned)
    y = launch(given._replace(x=around[1:4, 16:272]), Block(8, 1, 1, 1, 2, True))
    monkeypatch.undo()
    assert_close(y, given.expected().half())


@pytest.mark.parametrize("kind", KINDS)
def test_the_op_agrees_with_float64_on_a_cpu(kind: Kind) -> None:
    given = problem(kind, 7, 72, 256)
    y = tensor_cores.matmul(given.x, given.x_scales, given.weight, given.bias, torch.float16)
    assert torch.equal(y, given.expected().half())
    assert torch.equal(tensor_cores.checkpoint_words(given.weight), int32_words.pack(given.codes, 4))


@pytest.mark.parametrize("kind", KINDS)
def test_the_op_is_a_good_citizen_of_torch(kind: Kind) -> None:
    torch.library.opcheck(torch.ops.halfbyte.w4a8_matmul.default, arguments_of(problem(kind, 3, 72, 256)))


def arguments_of(given: Problem) -> tuple[Any, ...]:
    w = given.weight
    parts = (w.words, w.pairs, w.row_scales, w.counters, w.kind, w.group_size, w.sixteenfold)
    return (given.x, given.x_scales, *parts, given.bias, torch.float16)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 20])
def test_a_launch_runs_what_the_tiling_asks_for(kind: Kind, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given = problem(kind, tokens, 72, 256)
    monkeypatch.setattr("halfbyte.kernels.w4a8.blocks", KERNEL)
    monkeypatch.setattr("halfbyte.kernels.w4a8.folded", FOLDED)
    monkeypatch.setattr("torch.cuda.device_of", lambda _x: nullcontext())
    assert_close(tensor_cores._on_cuda(*arguments_of(given)), given.expected().half())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ins", [4096, 14336])
@pytest.mark.parametrize("outs", [64, 4096, 12288, 16384, 28672, 151936])
@pytest.mark.parametrize("tokens", [1, 8, 9, 16, 17, 32, 33, 100, 1000, 100_000])
def test_every_number_of_tokens_has_a_tiling_that_fits(tokens: int, outs: int, ins: int, kind: Kind) -> None:
    tiling = tilings.choose(kind, tokens, outs, ins, 128)
    assert tiling.residents * (tiling.shared_memory + 1024) <= SHARED_MEMORY
    registers = tiling.launch_registers or 0
    assert tiling.residents * registers * 32 * tiling.warps <= crews.REGISTERS
    if isinstance(tiling, Folded):
        assert tokens <= tiling.tokens
        assert tiling.stages % tiling.workers == 0
        return
    sums_each = tiling.block_m * tiling.each // 2
    assert tiling.worker_registers >= sums_each * max(tiling.split, 1 if kind == "weight" else 2) + 24


def test_groups_that_cannot_be_folded_are_not() -> None:
    assert isinstance(tilings.choose("integer", 1, 4096, 4096, 128), Folded)
    assert isinstance(tilings.choose("integer", 1, 4096, 4096, 256), Block)


@pytest.mark.parametrize(
    ("outs", "ins", "bits", "group_size", "why"),
    [
        (64, 256, 8, 128, "4 bits, not 8"),
        (60, 256, 4, 128, "steps of 8, not 60"),
        (64, 256, 4, 64, "not 64 of 256"),
        (64, 320, 4, 128, "not 128 of 320"),
    ],
)
def test_what_cannot_be_prepared_has_a_reason(outs: int, ins: int, bits: int, group_size: int, why: str) -> None:
    assert why in (tensor_cores.obstacle(outs, ins, bits, group_size) or "")
    assert tensor_cores.obstacle(64, 256, 4, 256) is None


@pytest.mark.parametrize(
    ("kind", "scales", "why"),
    [
        ("float", torch.ones(64, 2), "scales are torch.float32"),
        ("integer", torch.ones(64, 2), "scales are torch.float32"),
        ("weight", torch.full((64, 2), 17, dtype=torch.uint8), "from -136 to -136"),
        ("integer", torch.ones(64, 4, dtype=torch.int16), "groups of 128"),
    ],
)
def test_scales_that_do_not_fit_their_kind_are_refused(kind: Kind, scales: Tensor, why: str) -> None:
    packed = torch.zeros(64, 32, dtype=torch.int32)
    with pytest.raises(WeightError, match=why):
        tensor_cores.prepare(kind, packed, scales, torch.ones(64), 256 // scales.shape[1])


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"x": torch.zeros(3, 256)}, "x is torch.float32 of 2 axes"),
        ({"x": torch.zeros(3, 128, dtype=torch.int8)}, "128 inputs and the weight 256"),
        ({"x_scales": torch.ones(4)}, "3 tokens"),
        ({"bias": torch.zeros(71)}, "72 outputs"),
        ({"bias": torch.zeros(2, 72)}, "72 outputs"),
        ({"bias": torch.zeros(72, 3).T}, "side by side"),
        ({"dtype": torch.float32}, "cannot be torch.float32"),
        ({"weight": replace(problem("integer", 1, 72, 256).weight, counters=torch.zeros(1))}, "not of one weight"),
        ({"weight": replace(problem("integer", 1, 72, 256).weight, row_scales=torch.zeros(200))}, "200 outputs"),
        ({"weight": replace(problem("integer", 1, 72, 256).weight, kind="float8")}, "kind 'float8'"),  # type: ignore[arg-type]
    ],
)
def test_arguments_that_disagree_are_refused(change: dict[str, Any], why: str) -> None:
    given = problem("integer", 3, 72, 256)
    arguments = {"x": given.x, "x_scales": given.x_scales, "weight": given.weight, "bias": None, "dtype": torch.float16}
    with pytest.raises(WeightError, match=why):
        tensor_cores.matmul(**arguments | change)


def test_the_op_is_there_without_triton() -> None:
    program = "import sys; sys.modules['triton'] = None; import halfbyte.kernels.w4a8.tensor_cores"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def neighbouring_tiles(w: PreparedWeight) -> PreparedWeight:
    return replace(w, words=w.words.roll(1, dims=1))


def neighbouring_lanes(w: PreparedWeight) -> PreparedWeight:
    return replace(w, words=w.words.roll(4, dims=2))


def swapped_rows(w: PreparedWeight) -> PreparedWeight:
    return replace(w, words=w.words >> 4 & 0x0F0F0F0F | w.words << 4 & -0x0F0F0F10)


def swapped_pairs(w: PreparedWeight) -> PreparedWeight:
    return replace(w, pairs=w.pairs >> 16 & 0xFFFF | w.pairs << 16)


def neighbouring_groups(w: PreparedWeight) -> PreparedWeight:
    return replace(w, pairs=w.pairs.roll(1, dims=0))


def twice_the_codes(w: PreparedWeight) -> PreparedWeight:
    return replace(w, sixteenfold=not w.sixteenfold)


BUGS = [neighbouring_tiles, neighbouring_lanes, swapped_rows, swapped_pairs, neighbouring_groups]


@pytest.mark.parametrize(
    ("kind", "bug"),
    [*((kind, bug) for kind in KINDS for bug in BUGS), ("float", twice_the_codes), ("integer", twice_the_codes)],
)
def test_the_comparison_notices(bug: Callable[[PreparedWeight], PreparedWeight], kind: Kind) -> None:
    given = problem(kind, 3, 128, 256, bias=False)
    wrong = launch(given, Block(8, 1, 1, 2, 2, False), bug(given.weight))
    assert relative_error(wrong, given.expected()) > 0.1
