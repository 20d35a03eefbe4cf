"""Time the experts of Mixtral- and Qwen3-shaped mixtures on prepared 4-bit weights beside bf16 on a Hopper GPU.

    python benchmarks/experts.py --json experts.json

Columns, all of them CUDA graphs of everything between the router's choice and the sum of a token's experts:

    loop           bf16 cuBLAS, expert by expert, with slices that the host knows beforehand
    grouped        bf16 `torch.nn.functional.grouped_mm`; both with our kernels for rows, gates and sums around them
    transformers   its `MixtralExperts` with the grouped_mm implementation, bf16; and its eager loop
    w4a16          kind "half"
    float, integer, weight     W4A8, the group scales in their three places

Every launch is first compared with float64 on a sample of tokens. Times are medians of replays, contenders taking turns.
Weights exceed the L2 cache by far. `--search 8,64` tries many tilings for so many tokens first and measures with the best.
"""

import argparse
import json
import math
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import triton
from torch import Tensor

from halfbyte.kernels import experts
from halfbyte.kernels.experts import prepared, reference, tilings, triton_rows
from halfbyte.kernels.experts.prepared import COUNTERS, KINDS, ExpertWeight, Kind
from halfbyte.kernels.w4a8.tilings import Block
from halfbyte.packing import int8_tiles

DEVICE = "cuda"
DTYPE = torch.bfloat16
GROUP = 128
BYTES_PER_SECOND, OPERATIONS_PER_SECOND = 4.4e12, 1500e12
SHARED_MEMORY = 227 * 1024  # of a multiprocessor, and 1 KB of each of its programs
COMPILERS = 15
SAMPLE = 16  # tokens that are compared with float64
MILLISECONDS = 2.0  # of a graph, so that what a replay costs by itself is little

Call = Callable[[], Any]
Job = tuple[Kind, Block]


@dataclass(frozen=True)
class Shape:
    hidden: int
    inner: int
    experts: int
    chosen: int


SHAPES = {"mixtral-8x7b": Shape(4096, 14336, 8, 2), "qwen3-30b-a3b": Shape(2048, 768, 128, 8)}
SMALL = Shape(1024, 512, 4, 2)


@dataclass(frozen=True)
class Mixture:
    """Experts of one kind."""

    up: ExpertWeight
    down: ExpertWeight

    @classmethod
    def of(cls, kind: Kind, shape: Shape) -> "Mixture":
        g = torch.Generator(DEVICE).manual_seed(0)
        return cls(
            random_weight(kind, shape.experts, 2 * shape.inner, shape.hidden, g),
            random_weight(kind, shape.experts, shape.hidden, shape.inner, g),
        )

    def call(self, given: "Tokens", block: Block) -> Call:
        return lambda: experts.launch(given.x, given.index, given.weights, self.up, self.down, block)


def random_weight(kind: Kind, count: int, outs: int, ins: int, g: torch.Generator) -> ExpertWeight:
    """Random words are random codes. Scales give outputs about the size of inputs; the kinds share words."""
    tiles = count * outs // 64
    words = torch.randint(-(2**31), 2**31, (tiles, ins // 64, 512), device=DEVICE, generator=g, dtype=torch.int64)
    scales = torch.randint(1, 16, (count * outs, ins // GROUP), device=DEVICE, generator=g, dtype=torch.int16)
    rows = torch.rand(count * outs, device=DEVICE, generator=g).add(0.5).div(4.6 * 9.1 * math.sqrt(ins))
    if kind == "half":
        pairs = int8_tiles.pair((scales * rows[:, None]).to(DTYPE))
        rows = torch.empty(0, dtype=DTYPE, device=DEVICE)
    elif kind == "float":
        pairs = int8_tiles.pair(scales.to(DTYPE))
    else:
        pairs = int8_tiles.pair(scales)
    counters = torch.zeros(COUNTERS, dtype=torch.int32, device=DEVICE)
    high = kind in ("float", "integer")
    return ExpertWeight(kind, count, words.int(), pairs, rows / 16 if high else rows, counters, GROUP, high)


@dataclass(frozen=True)
class Tokens:
    x: Tensor
    index: Tensor
    weights: Tensor

    @classmethod
    def of(cls, tokens: int, shape: Shape) -> "Tokens":
        g = torch.Generator(DEVICE).manual_seed(1)
        x = torch.randn(tokens, shape.hidden, device=DEVICE, generator=g).to(DTYPE)
        scores = torch.rand(tokens, shape.experts, device=DEVICE, generator=g).topk(shape.chosen, dim=1)
        return cls(x, scores.indices, scores.values / scores.values.sum(1, keepdim=True))

    def sample(self) -> Tensor:
        return torch.linspace(0, len(self.x) - 1, min(SAMPLE, len(self.x)), device=DEVICE).long()


class Exact:
    """float64 results of a sample of tokens, with each expert's values decoded once."""

    def __init__(self, mixture: Mixture) -> None:
        self.mixture, self.known = mixture, {}
        for name in ("up", "down"):
            weight = getattr(mixture, name)
            self.known[id(weight)] = [prepared.values(weight, e) for e in range(weight.experts)]

    def __call__(self, given: Tokens) -> Tensor:
        rows, up, down = given.sample(), self.mixture.up, self.mixture.down
        decode = lambda weight, expert: self.known[id(weight)][expert]  # noqa: E731
        return reference.gated_experts(given.x[rows], given.index[rows], given.weights[rows], up, down, decode).double()


def error(y: Tensor, given: Tokens, exact: Tensor) -> float:
    """Against float64: relative Frobenius error, or the largest single one where that is worse in its own measure."""
    difference = y[given.sample()].double() - exact
    if not bool(difference.isfinite().all()):
        return math.inf
    worst = float(difference.abs().max() / exact.abs().max())
    return max(float(difference.norm() / exact.norm()), worst / 3)


TOLERANCE = 6e-3  # a gate on the other side of a rounding boundary moves a token's grid


@dataclass(frozen=True)
class Peers:
    """The same mixture in bf16."""

    shape: Shape
    up: Tensor
    down: Tensor

    @classmethod
    def of(cls, shape: Shape) -> "Peers":
        g = torch.Generator(DEVICE).manual_seed(2)
        new = lambda outs, ins: (  # noqa: E731
            torch.randn(shape.experts, outs, ins, device=DEVICE, generator=g, dtype=DTYPE) / math.sqrt(ins)
        )
        return cls(shape, new(2 * shape.inner, shape.hidden), new(shape.hidden, shape.inner))

    def loop(self, given: Tokens) -> Call:
        counts = given.index.flatten().bincount(minlength=self.shape.experts).tolist()

        def call() -> Tensor:
            order, places, _ = triton_rows.route(given.index, self.shape.experts, 128)
            rows = triton_rows.spread(given.x, order, self.shape.chosen, False)[0]
            both = torch.empty(len(rows), 2 * self.shape.inner, dtype=DTYPE, device=DEVICE)
            written = torch.empty_like(rows)
            for of_expert, weight, to in zip(rows.split(counts), self.up, both.split(counts), strict=True):
                if len(of_expert):
                    torch.mm(of_expert, weight.T, out=to)
            inner = triton_rows.silu_mul(both)
            for of_expert, weight, to in zip(inner.split(counts), self.down, written.split(counts), strict=True):
                if len(of_expert):
                    torch.mm(of_expert, weight.T, out=to)
            return triton_rows.combine(written, places, given.weights)

        return call

    def grouped(self, given: Tokens) -> Call:
        grouped_mm = torch.nn.functional.grouped_mm
        counts = given.index.flatten().bincount(minlength=self.shape.experts)
        ends = counts.cumsum(0).int()

        def call() -> Tensor:
            order, places, _ = triton_rows.route(given.index, self.shape.experts, 128)
            rows = triton_rows.spread(given.x, order, self.shape.chosen, False)[0]
            inner = triton_rows.silu_mul(grouped_mm(rows, self.up.transpose(1, 2), offs=ends))
            written = grouped_mm(inner, self.down.transpose(1, 2), offs=ends)
            return triton_rows.combine(written, places, given.weights)

        return call

    def transformers(self, given: Tokens, implementation: str) -> Call:
        """transformers' own module of experts."""
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts

        config = MixtralConfig(
            hidden_size=self.shape.hidden,
            intermediate_size=self.shape.inner,
            num_local_experts=self.shape.experts,
            num_experts_per_tok=self.shape.chosen,
        )
        config._experts_implementation = implementation
        with torch.device("meta"):
            module = MixtralExperts(config).eval()
        module.gate_up_proj = torch.nn.Parameter(self.up, requires_grad=False)
        module.down_proj = torch.nn.Parameter(self.down, requires_grad=False)
        return torch.no_grad()(lambda: module(given.x, given.index, given.weights))


def once(call: Call) -> float:
    """Milliseconds of one call, as it is."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def graph_of(call: Call) -> tuple[torch.cuda.CUDAGraph, int, Any]:
    """The call as a graph, repeated for MILLISECONDS; how often; and what the last returns."""
    call()
    stream = torch.cuda.Stream()

    def captured(times: int) -> tuple[torch.cuda.CUDAGraph, Any]:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):  # not `torch.cuda.graph`, which gives memory back to the driver each time
            graph.capture_begin()
            last = [call() for _ in range(times)][-1]
            graph.capture_end()
        return graph, last

    graph, last = captured(1)
    graph.replay()
    times = max(1, min(16, round(MILLISECONDS / once(graph.replay))))
    if times > 1:
        graph, last = captured(times)
    return graph, times, last


def microseconds(calls: list[Call], replays: int) -> list[float]:
    """The median time of one call of each contender, their replays taking turns; NaN for what no graph holds."""
    graphs = []
    for call in calls:
        try:
            graphs.append(graph_of(call))
        except Exception as cause:  # noqa: BLE001 - a peer that cannot be recorded is left out
            print(f"left out: {type(cause).__name__} {str(cause)[:200]}", flush=True)
            graphs.append(None)
    times: list[list[float]] = [[] for _ in graphs]
    for _ in range(replays + 2):
        for recorded, taken in zip(graphs, times, strict=True):
            taken.append(math.nan if recorded is None else 1e3 * once(recorded[0].replay) / recorded[1])
    return [median(taken[2:]) for taken in times]


# workers, each, units, programs for a multiprocessor
CUTS: dict[int, tuple[tuple[int, int, int, int], ...]] = {
    8: ((1, 1, 4, 3), (1, 1, 4, 2), (1, 1, 2, 4), (1, 1, 2, 3), (2, 1, 2, 2), (4, 1, 2, 1)),
    16: ((1, 1, 4, 3), (1, 1, 2, 4), (1, 1, 2, 3), (2, 1, 2, 2), (4, 1, 2, 1), (2, 2, 2, 1)),
    32: ((1, 1, 2, 3), (2, 1, 2, 2), (2, 1, 1, 2), (4, 1, 2, 1), (4, 1, 1, 1), (2, 2, 1, 1)),
    64: ((2, 1, 1, 2), (2, 2, 1, 1), (4, 1, 1, 1), (4, 1, 2, 1)),
    128: ((2, 1, 1, 1), (2, 2, 1, 1), (1, 1, 1, 2)),
    256: ((2, 1, 1, 1),),
}
BLOCKS_M = {1: (8,), 4: (8,), 16: (8, 16), 32: (16, 32), 64: (16, 32, 64), 128: (32, 64, 128), 256: (64, 128)}


def candidates(kind: Kind, tokens: int) -> Iterator[Block]:
    """What may be fast for so many tokens and fits a multiprocessor."""
    if kind == "weight" and tokens < 64:
        return  # as the other kinds
    for block_m in BLOCKS_M.get(tokens, (128, 256)):
        for workers, each, units, programs in CUTS[block_m]:
            for shared in (True, False) if 256 <= tokens <= 1024 else (tokens < 256,):
                yield from fitting(Block(block_m, workers, each, units, 1, shared, programs, programs), kind)


def fitting(one: Block, kind: Kind) -> Iterator[Block]:
    """With as many stages as shared memory holds; nothing where registers do not suffice."""
    size = tilings.shared_memory(one, kind)
    step = tilings.shared_memory(replace(one, stages=2), kind) - size
    fit = (SHARED_MEMORY // one.residents - 2048 - (size - step)) // step
    sums = one.block_m * one.each // 2 * (1 if kind in ("weight", "half") else 2)
    if fit >= 2 and one.worker_registers >= sums + 40 and (one.block_m < 256 or kind in ("weight", "half")):
        yield replace(one, stages=min(fit, 16 // one.units))


def compile_one(job: Job) -> str | None:
    """Fill Triton's cache with a kernel, by running it on a small mixture. What went wrong, if anything."""
    kind, block = job
    try:
        mixture, given = Mixture.of(kind, SMALL), Tokens.of(2 * block.block_m + 3, SMALL)
        y = mixture.call(given, block)()
        found = error(y, given, Exact(mixture)(given))
        return None if found < TOLERANCE else f"WRONG by {found:.2g}: {kind} {block}"
    except Exception as cause:  # noqa: BLE001 - a search goes on without what fails
        return f"{kind} {block}: {type(cause).__name__} {str(cause)[:300]}"


def compile_all(jobs: Sequence[Job]) -> set[Job]:
    """What works, all compiled at once."""
    with ProcessPoolExecutor(COMPILERS, multiprocessing.get_context("spawn")) as pool:
        failures = list(pool.map(compile_one, jobs, chunksize=1))
    for failure in filter(None, failures):
        print(failure, flush=True)
    return {job for job, failure in zip(jobs, failures, strict=True) if failure is None}


def search(kind: Kind, mixture: Mixture, exact: Exact, given: Tokens, works: set[Job]) -> dict[Block, float]:
    """Times of the candidates, the fastest first; the same tiling for both products."""
    found, right = {}, exact(given)
    for block in dict.fromkeys(candidates(kind, len(given.x))):
        if (kind, block) not in works:
            continue
        call = mixture.call(given, block)
        if not error(call(), given, right) < TOLERANCE:
            print(f"WRONG: {kind} {block}, {len(given.x)} tokens", flush=True)
            continue
        found[block] = microseconds([call], 3)[0]
    found = dict(sorted(found.items(), key=lambda pair: pair[1]))
    for block, taken in list(found.items())[:4]:
        print(f"  {kind} {len(given.x)}: {taken:.1f} {short(block)}", flush=True)
    return found


def short(block: Block) -> str:
    b = block
    return f"({b.block_m}, {b.workers}, {b.each}, {b.units}, {b.stages}, {b.shared}, {b.programs}, {b.residents})"


@dataclass(frozen=True)
class Row:
    """Times in microseconds."""

    tokens: int
    loop: float
    grouped: float
    transformers: float
    transformers_eager: float
    w4a16: float
    float_scales: float
    integer_scales: float
    weight_scales: float
    errors: dict[str, float]
    tilings: dict[str, str]
    bound: float

    @property
    def baseline(self) -> float:
        return min(t for t in (self.loop, self.grouped, self.transformers) if t == t)  # NaN is what did not run


def measure(
    tokens: int, shape: Shape, mixtures: dict[Kind, Mixture], exact: dict[Kind, Exact], peers: Peers,
    picks: dict[tuple[Kind, int], Block],
) -> Row:  # fmt: skip
    given = Tokens.of(tokens, shape)
    ours, errors, used = [], {}, {}
    for kind, mixture in mixtures.items():
        rows = given.index.numel()
        block = picks.get((kind, tokens), tilings.choose(kind, rows, shape.experts))
        call = mixture.call(given, block)
        errors[kind], used[kind] = error(call(), given, exact[kind](given)), short(block)
        if not errors[kind] < TOLERANCE:
            raise SystemExit(f"{kind} {block} disagrees with float64 at {tokens} tokens: {errors[kind]}")
        graph, _, last = graph_of(call)
        last.fill_(math.nan)
        graph.replay()
        torch.cuda.synchronize()
        if not torch.equal(last, call()) or any(w.counters.any() for w in (mixture.up, mixture.down)):
            raise SystemExit(f"{kind} {block} is not the same from call to call at {tokens} tokens")
        ours.append(call)
    theirs, eager = [peers.loop(given), peers.grouped(given)], math.nan
    try:
        theirs.append(peers.transformers(given, "grouped_mm"))
        plain = peers.transformers(given, "eager")
        eager = median([1e3 * once(plain) for _ in range(7)][2:])
    except Exception as cause:  # noqa: BLE001 - transformers need not be there
        print(f"transformers: {type(cause).__name__} {str(cause)[:200]}", flush=True)
        theirs = [*theirs[:2], missing]
    taken = microseconds([*theirs, *ours], 6)
    used_experts = int(given.index.unique().numel())
    moved = used_experts * (mixtures["integer"].up.words.numel() + mixtures["integer"].down.words.numel()) * 4
    moved = moved / shape.experts * (1 + 2 / 64)
    operations = 2 * given.index.numel() * 3 * shape.hidden * shape.inner
    bound = 1e6 * max(moved / BYTES_PER_SECOND, operations / OPERATIONS_PER_SECOND)
    loop, grouped, stock, *four_bits = taken
    of_kind = dict(zip(mixtures, four_bits, strict=True))
    return Row(
        tokens, loop, grouped, stock, eager, of_kind["half"], of_kind["float"], of_kind["integer"], of_kind["weight"],
        errors, used, bound,
    )  # fmt: skip


def missing() -> None:
    raise RuntimeError("transformers is not there")


def line(row: Row) -> str:
    best = row.baseline
    ours = {"w4a16": row.w4a16, "F": row.float_scales, "I": row.integer_scales, "W": row.weight_scales}
    each = " ".join(f"{name} {taken:.1f} ({best / taken:.2f})" for name, taken in ours.items())
    theirs = (
        f"loop {row.loop:.1f} grouped {row.grouped:.1f} tf {row.transformers:.1f} eager {row.transformers_eager:.0f}"
    )
    fastest = min(row.float_scales, row.integer_scales, row.weight_scales)
    return f"{row.tokens:>5} {theirs} | {each} | vs w4a16 {row.w4a16 / fastest:.2f} bound {row.bound:.1f}"


def searched_picks(
    tokens: int, kinds: Sequence[Kind], shape: Shape, mixtures: dict[Kind, Mixture], exact: dict[Kind, Exact],
    works: set[Job], found: list[dict[str, Any]],
) -> dict[tuple[Kind, int], Block]:  # fmt: skip
    """The fastest tiling of every kind for so many tokens; kinds that are not searched share that of "integer"."""
    picks: dict[tuple[Kind, int], Block] = {}
    for kind in kinds:
        times = search(kind, mixtures[kind], exact[kind], Tokens.of(tokens, shape), works)
        found += [{"kind": kind, "tokens": tokens, "tiling": short(b), "microseconds": t} for b, t in times.items()]
        if times:
            picks[kind, tokens] = next(iter(times))
    alike: tuple[Kind, ...] = ("float", "weight")
    for kind in alike:
        if ("integer", tokens) in picks:
            picks.setdefault((kind, tokens), picks["integer", tokens])
    return picks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="mixtral-8x7b,qwen3-30b-a3b", help=", ".join(SHAPES))
    parser.add_argument("--tokens", default="1,4,16,32,64,128,256,512,1024,4096")
    parser.add_argument("--search", default="", help="first find tilings for so many tokens")
    parser.add_argument("--kinds", default="integer,weight,half", help="to search")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin nothing more after so many")
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    options = parser.parse_args()
    began = time.monotonic()
    passed = lambda: time.monotonic() - began  # noqa: E731
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, {DTYPE}, g{GROUP}")
    names = options.shapes.split(",")
    searched = [int(tokens) for tokens in options.search.split(",") if tokens]
    measured = [int(tokens) for tokens in options.tokens.split(",") if tokens]
    kinds: list[Kind] = [kind for kind in KINDS if kind in options.kinds.split(",")]
    jobs: list[Job] = [(kind, block) for kind in kinds for tokens in searched for block in candidates(kind, tokens)]
    for shape in map(SHAPES.__getitem__, names):
        chosen: list[Job] = [
            (kind, tilings.choose(kind, t * shape.chosen, shape.experts)) for kind in KINDS for t in measured
        ]
        jobs += chosen
    works = compile_all(list(dict.fromkeys(jobs)))
    print(f"{len(works)} of {len(set(jobs))} kernels right after {passed():.0f} s", flush=True)
    record: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    record |= {"triton": triton.__version__, "group_size": GROUP, "shapes": {}}
    for name in names:
        shape, found, rows = SHAPES[name], [], []
        mixtures: dict[Kind, Mixture] = {kind: Mixture.of(kind, shape) for kind in KINDS}
        exact: dict[Kind, Exact] = {kind: Exact(mixture) for kind, mixture in mixtures.items()}
        peers, picks = Peers.of(shape), {}
        print(f"{name}, {shape}, ready after {passed():.0f} s", flush=True)
        record["shapes"][name] = {"shape": asdict(shape), "rows": rows, "search": found}
        for tokens in searched:
            if passed() < options.seconds:
                picks |= searched_picks(tokens, kinds, shape, mixtures, exact, works, found)
        for tokens in measured:
            if passed() < options.seconds:
                row = measure(tokens, shape, mixtures, exact, peers, picks)
                print(line(row), flush=True)
                rows.append(asdict(row))
            if options.json:
                options.json.write_text(json.dumps(record, indent=1) + "\n")
        del mixtures, exact, peers
    print(f"done after {passed():.0f} s")


if __name__ == "__main__":
    main()
