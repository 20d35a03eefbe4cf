"""Experts on prepared weights: the kernels' own source, interpreted, against integers and float64, however tokens are dealt."""

import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction
from without_layouts import interpreted

from closeness import assert_close, relative_error
from halfbyte.errors import WeightError
from halfbyte.kernels import experts, ring
from halfbyte.kernels.crews import REGISTERS
from halfbyte.kernels.experts import ExpertWeight, blocks, halves, join, join_halves, prepared, reference, tilings
from halfbyte.kernels.experts import triton_rows as rows
from halfbyte.kernels.experts.prepared import Kind
from halfbyte.kernels.w4a8 import sums, tensor_cores
from halfbyte.kernels.w4a8.prepared import PreparedWeight
from halfbyte.kernels.w4a8.tilings import Block
from halfbyte.kernels.w4a16 import codes
from halfbyte.kernels.w4a16 import tensor_cores as w4a16
from halfbyte.kernels.w4a16.prepared import TensorCoreWeight
from halfbyte.packing import int32_words

SHARED_MEMORY = 227 * 1024  # of a Hopper multiprocessor
KERNELS_OF_ROWS = [name for name in vars(rows) if name.endswith("_kernel")]
EIGHT_BITS: tuple[Kind, ...] = ("float", "integer", "weight")
KERNEL = interpreted(blocks, ring, codes, sums, halves)


@pytest.fixture(autouse=True)
def _on_three_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few that programs have several blocks, or parts of them."""
    monkeypatch.setattr(KERNEL, "processors", lambda _device: 3)
    for name in KERNELS_OF_ROWS:
        monkeypatch.setattr(rows, name, InterpretedFunction(getattr(rows, name).fn))


class Stack(NamedTuple):
    """Experts as reals, code · scale without the scales of rows, and prepared."""

    values: Tensor
    weight: ExpertWeight


def stack(
    kind: Kind, count: int, outs: int, ins: int, group_size: int = 128, *, dtype: torch.dtype = torch.float16,
    unit: bool = False, seed: int = 0,
) -> Stack:  # fmt: skip
    """The first and the last code are present; scales of uneven size; rows of scale one, or outputs about as large as inputs."""
    g = torch.Generator().manual_seed(seed)
    parts, values = [], []
    for _ in range(count):
        stored = torch.randint(0, 16, (outs, ins), dtype=torch.uint8, generator=g)
        stored[0, 0], stored[-1, -1] = 0, 15
        shape = outs, ins // group_size
        packed = int32_words.pack(stored, 4)
        rows = torch.ones(outs) if unit else torch.rand(outs, generator=g).add(0.5) / (40 * ins**0.5)
        if kind in ("float", "half"):
            scales = torch.rand(shape, generator=g).add(0.1).to(torch.bfloat16 if kind == "float" else dtype)
        else:
            scales = torch.randint(1, 16, shape, generator=g).to(torch.int16)
        if kind == "half":
            scales = (scales * 8 * rows[:, None]).to(dtype)
            parts.append([w4a16.prepare(packed, scales, None, 4, group_size, dtype)])
        else:
            parts.append([tensor_cores.prepare(kind, packed, scales, rows, group_size)])
        grouped = stored.unflatten(1, (-1, group_size)).double() - 8
        values.append((grouped * scales.double()[:, :, None]).flatten(1))
    return Stack(torch.stack(values), join_halves(parts) if kind == "half" else join(parts))


def choices(tokens: int, count: int, k: int, seed: int = 0) -> Tensor:
    """Experts of each token; the last one has none."""
    scores = torch.rand(tokens, count, generator=torch.Generator().manual_seed(seed))
    scores[:, -1] = -1
    return scores.topk(k, dim=1).indices


def activations(tokens: int, ins: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(tokens, ins, generator=torch.Generator().manual_seed(1)).to(dtype)


def product(x: Tensor, index: Tensor, weight: ExpertWeight, block: Block, dtype: torch.dtype = torch.float16) -> Tensor:
    """Rows of codes or of halves, sorted by expert, from the interpreted kernels; scales of tokens are one."""
    order, _, schedule = rows.route(index, weight.experts, block.block_m)
    sorted_x = x[order.long() // index.shape[1]]
    scales = None if weight.kind == "half" else torch.ones(len(order))
    return KERNEL.matmul(sorted_x, scales, weight, schedule, dtype, block, early=False)


CUTS = [
    pytest.param("integer", 5, 128, 512, 128, Block(8, 1, 1, 2, 2, True), id="shared"),
    pytest.param("weight", 1, 192, 256, 128, Block(8, 1, 1, 1, 3, True), id="one-token"),
    pytest.param("integer", 5, 192, 256, 128, Block(8, 2, 1, 1, 2, True), id="a-tile-that-is-not-there"),
    pytest.param("weight", 20, 64, 256, 128, Block(8, 1, 1, 2, 2, False, 2), id="several-blocks-of-an-expert"),
    pytest.param("integer", 25, 128, 384, 128, Block(32, 2, 1, 1, 2, True), id="staged"),
    pytest.param("weight", 25, 192, 512, 512, Block(32, 2, 2, 2, 2, False), id="long-groups"),
    pytest.param("integer", 10, 64, 640, 128, Block(16, 4, 1, 4, 2, True), id="units-that-do-not-divide"),
]


@pytest.mark.parametrize(("kind", "tokens", "outs", "ins", "group_size", "block"), CUTS)
def test_sums_of_integers_are_exact(
    kind: Kind, tokens: int, outs: int, ins: int, group_size: int, block: Block
) -> None:
    case, index = stack(kind, 4, outs, ins, group_size, unit=True), choices(tokens, 4, 2)
    x = torch.randint(-128, 128, (tokens, ins), dtype=torch.int8, generator=torch.Generator().manual_seed(2))
    scale = 2.0**-24  # exact, and small enough for float16
    weight = replace(case.weight, row_scales=case.weight.row_scales * scale)
    y = product(x, index, weight, block)
    order = index.flatten().argsort(stable=True)
    exact = [x[pair // 2].double() @ case.values[index.flatten()[pair]].T for pair in order]
    assert torch.equal(y, (torch.stack(exact).float() * scale).half())
    assert not weight.counters.any()
    if block.shared:
        assert torch.equal(product(x, index, weight, block), y)


@pytest.mark.parametrize("kind", ["float", "half"])
@pytest.mark.parametrize("block", [Block(8, 1, 1, 2, 2, True), Block(64, 2, 1, 1, 2, True)], ids=["few", "many"])
def test_float_scales_agree_with_float64(kind: Kind, block: Block) -> None:
    case, index = stack(kind, 3, 128, 256), choices(20, 3, 2)
    x = activations(20, 256) if kind == "half" else torch.randint(-128, 128, (20, 256), dtype=torch.int8)
    y, order = product(x, index, case.weight, block), index.flatten().argsort(stable=True)
    expected = [x[pair // 2].double() @ prepared.values(case.weight, int(index.flatten()[pair])).T for pair in order]
    # few tokens of kind "half" have sums scaled, where values are weights that were rounded once
    assert relative_error(y, torch.stack(expected)) < 5e-4


@pytest.mark.parametrize("kind", EIGHT_BITS)
def test_the_unit_vectors_read_every_code_times_its_scale(kind: Kind) -> None:
    case, index = stack(kind, 2, 128, 256, unit=True), torch.zeros(256, 1, dtype=torch.long)
    y = product(torch.eye(256, dtype=torch.int8), index, case.weight, Block(128, 2, 1, 2, 2, False))
    assert torch.equal(y.double(), case.values[0].T)
    y = product(torch.eye(256, dtype=torch.int8), 1 - index, case.weight, Block(128, 2, 1, 2, 2, False))
    assert torch.equal(y.double(), case.values[1].T)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 9), st.integers(1, 3), st.integers(1, 40), st.sampled_from([8, 16]), st.booleans(), st.integers(0, 99)
)  # fmt: skip
def test_rows_are_sorted_and_every_one_is_in_one_block(
    count: int, k: int, tokens: int, block_m: int, many: bool, seed: int
) -> None:
    index = torch.randint(0, count, (tokens, k), generator=torch.Generator().manual_seed(seed))
    # as if there were so many that every expert has a program, which takes several turns
    with patch.object(rows, "COMPARED", 0 if many else 8192), patch.object(rows, "CHUNK", 16):
        order, places, schedule = rows.route(index, count, block_m)
    assert torch.equal(order.long(), index.flatten().argsort(stable=True))
    assert torch.equal(order[places.long()], torch.arange(tokens * k, dtype=torch.int32))
    covered = []
    for expert, first, end, _ in schedule[1 : 1 + int(schedule[0, 0])].tolist():
        of_block = range(first, min(first + block_m, end))
        assert all(int(index.flatten()[order[row]]) == expert for row in of_block)
        covered += of_block
    assert covered == list(range(tokens * k))


class Mixture(NamedTuple):
    x: Tensor
    index: Tensor
    weights: Tensor
    up: ExpertWeight
    down: ExpertWeight

    def arguments(self) -> tuple[Any, ...]:
        return (*self[:3], self.up.experts, *experts._parts(self.up), *experts._parts(self.down))

    def expected(self) -> Tensor:
        return reference.gated_experts(*self)


def mixture(kind: Kind, tokens: int = 7, *, down: Kind | None = None, dtype: torch.dtype = torch.float16) -> Mixture:
    index = choices(tokens, 3, 2)
    weights = torch.rand(tokens, 2, generator=torch.Generator().manual_seed(3))
    up, second = stack(kind, 3, 256, 256, dtype=dtype), stack(down or kind, 3, 256, 128, dtype=dtype, seed=1)
    return Mixture(activations(tokens, 256, dtype), index, weights, up.weight, second.weight)


@pytest.fixture
def _launches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("halfbyte.kernels.experts.blocks", KERNEL)
    monkeypatch.setattr("torch.cuda.device_of", lambda _x: nullcontext())


@pytest.mark.usefixtures("_launches")
@pytest.mark.parametrize(
    ("kind", "down", "tokens"),
    [
        ("integer", "integer", 1), ("float", "float", 7), ("weight", "weight", 7), ("weight", "integer", 30),
        ("half", "half", 1), ("half", "half", 30),
    ],
)  # fmt: skip
def test_the_launches_compute_what_the_reference_does(kind: Kind, down: Kind, tokens: int) -> None:
    case = mixture(kind, tokens, down=down)
    y = experts._on_cuda(*case.arguments())
    # a gate on the other side of a rounding boundary moves a code, and a kind "half" rounds elsewhere
    assert relative_error(y, case.expected()) < 2e-3
    assert y.dtype == torch.float16


@pytest.mark.usefixtures("_launches")
def test_many_tokens_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    case = mixture("weight", 4)
    at_once = experts._on_cuda(*case.arguments())
    monkeypatch.setattr(experts, "LARGEST", 3 * 2 * case.up.outs)
    assert torch.equal(experts._on_cuda(*case.arguments()), at_once)


@pytest.mark.usefixtures("_launches")
def test_no_tokens_give_no_rows() -> None:
    case = mixture("integer")
    none = Mixture(case.x[:0], case.index[:0], case.weights[:0], case.up, case.down)
    assert experts._on_cuda(*none.arguments()).shape == (0, 256)
    assert experts.gated_experts(*none).shape == (0, 256)


@pytest.mark.parametrize("kind", [*EIGHT_BITS, "half"])
def test_the_op_is_a_good_citizen_of_torch(kind: Kind) -> None:
    torch.library.opcheck(torch.ops.halfbyte.gated_experts.default, mixture(kind).arguments())


def test_the_op_computes_the_experts_one_by_one_on_a_cpu() -> None:
    x, index, weights, up, down = mixture("half", dtype=torch.bfloat16)
    total = torch.zeros(len(x), 256, dtype=torch.float64)
    for token, (chosen, shares) in enumerate(zip(index.tolist(), weights.double(), strict=True)):
        for expert, share in zip(chosen, shares, strict=True):
            both = (prepared.values(up, expert) @ x[token].double()).bfloat16()
            inner = torch.nn.functional.silu(both[:128]) * both[128:]
            total[token] += share * (prepared.values(down, expert) @ inner.double()).bfloat16().double()
    assert_close(experts.gated_experts(x, index, weights, up, down), total.bfloat16())


@pytest.mark.parametrize("kind", ["float", "integer", "weight", "half"])
@pytest.mark.parametrize("count", [4, 8, 128])
@pytest.mark.parametrize("pairs", [1, 2, 16, 64, 100, 1000, 100_000])
def test_every_number_of_rows_has_a_tiling_that_fits_a_multiprocessor(pairs: int, count: int, kind: Kind) -> None:
    block = tilings.choose(kind, pairs, count)
    assert block.residents * (tilings.shared_memory(block, kind) + 1024) <= SHARED_MEMORY
    assert block.residents * (block.launch_registers or 0) * 128 * (block.workers + 1) <= REGISTERS
    own = block.block_m * block.each // 2
    assert block.worker_registers >= own * (1 if kind in ("weight", "half") else 2) + 24


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"x": torch.zeros(7, 256)}, "x is torch.float32"),
        ({"x": torch.zeros(7, 128).half()}, "give .7|tokens, 256"),
        ({"index": torch.zeros(6, 2, dtype=torch.long)}, "there are 7 tokens"),
        ({"index": torch.zeros(7, 2)}, "experts are torch.float32"),
        ({"down": mixture("integer").up}, "are not of one network"),
        ({"down": mixture("half").down}, "read different tokens"),
        ({"up": replace(mixture("integer").up, experts=4)}, "are not of one weight|are not of one network"),
        ({"up": replace(mixture("integer").up, counters=torch.zeros(1))}, "not of one weight"),
        ({"up": replace(mixture("integer").up, kind="float8")}, "kind 'float8'"),  # type: ignore[arg-type]
    ],
)
def test_arguments_that_disagree_are_refused(change: dict[str, Any], why: str) -> None:
    with pytest.raises(WeightError, match=why):
        experts.gated_experts(*mixture("integer")._replace(**change))


def test_halves_of_another_dtype_are_refused() -> None:
    with pytest.raises(WeightError, match=r"prepared for torch\.float16"):
        experts.gated_experts(*mixture("half")._replace(x=torch.zeros(7, 256).bfloat16()))


def part(outs: int, **change: Any) -> PreparedWeight:
    packed, scales = torch.zeros(outs, 32, dtype=torch.int32), torch.ones(outs, 2, dtype=torch.int16)
    return replace(tensor_cores.prepare("integer", packed, scales, torch.ones(outs), 128), **change)


def half_part(group_size: int = 128, *, zeros: bool = False) -> TensorCoreWeight:
    scales = torch.ones(64, 256 // group_size, dtype=torch.float16)
    points = torch.zeros(scales.shape, dtype=torch.uint8) if zeros else None
    return w4a16.prepare(torch.zeros(64, 32, dtype=torch.int32), scales, points, 4, group_size, torch.float16)


def test_linears_side_by_side_and_rows_of_either_kind_are_joined() -> None:
    plain = part(64, sixteenfold=False)
    whole = join([[part(64), plain], [plain, plain]])
    assert (whole.outs, whole.ins, whole.experts, whole.sixteenfold) == (128, 256, 2, False)
    assert_close(prepared.values(whole, 0)[:64], tensor_cores.values(part(64)))


@pytest.mark.parametrize(
    ("joins", "case", "why"),
    [
        (join, [[part(64)], [part(128)]], "several sizes"),
        (join, [[part(40)]], "steps of 64, not 40"),
        (join, [[part(64)], [part(64, kind="weight")]], "several kinds"),
        (join_halves, [[half_part(zeros=True)]], "have zero points"),
        (join_halves, [[half_part(64)]], "groups of 128, or multiples of it, not 64"),
        (join_halves, [[half_part()], [half_part(256)]], "several types or group sizes"),
    ],
)
def test_experts_that_differ_are_refused(joins: Callable[..., ExpertWeight], case: Any, why: str) -> None:
    with pytest.raises(WeightError, match=why):
        joins(case)


def test_the_op_is_there_without_triton() -> None:
    program = "import sys; sys.modules['triton'] = None; import halfbyte.kernels.experts"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def another_expert(schedule: Tensor) -> Tensor:
    schedule[1:, 0] = schedule[1:, 0] ^ 1
    return schedule


def a_row_too_far(schedule: Tensor) -> Tensor:
    schedule[1:, 1] += 1
    return schedule


def a_block_less(schedule: Tensor) -> Tensor:
    schedule[0, 0] -= 1
    return schedule


@pytest.mark.parametrize("bug", [another_expert, a_row_too_far, a_block_less])
def test_the_comparison_notices(bug: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    case, index = stack("integer", 3, 64, 256, unit=True), choices(20, 3, 2)
    x = torch.randint(-9, 9, (20, 256), dtype=torch.int8)
    weight = replace(case.weight, row_scales=case.weight.row_scales * 2.0**-12)
    right, route, empty = product(x, index, weight, Block(8, 1, 1, 2, 2, True)), rows.route, torch.empty
    monkeypatch.setattr(rows, "route", lambda *asked: (*(found := route(*asked))[:2], bug(found[2])))
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: empty(*shape, **options).fill_(99))
    assert relative_error(product(x, index, weight, Block(8, 1, 1, 2, 2, True)), right) > 0.1
