"""Time the prepared W4A8 kernels in their three kinds beside bf16 cuBLAS, row-wise fp8 and our W4A16 on a Hopper GPU.

    python benchmarks/w4a8.py --json w4a8.json

The kinds, cut up alike, are float group scales on the sums, integer group scales on the sums, and integer scales on the codes
("weight"). Every launch is first compared with float64: sums of integers have to be exact, so each element of the result may
only be rounded. Times are taken as in benchmarks/w4a16.py: medians over replays of CUDA graphs, each of many calls over copies
of the weight that together exceed the L2 cache, contenders taking turns. Tokens are quantized beforehand in all columns.

`--search 8,16,64` tries many tilings for so many tokens, prints the best, and measures with them: what goes into
`kernels/w4a8/tilings.py`.
"""

import argparse
import json
import math
import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any, get_args

import torch
import triton
from torch import Tensor

from halfbyte.kernels.w4a8 import tensor_cores, tilings
from halfbyte.kernels.w4a8.prepared import Kind, PreparedWeight
from halfbyte.kernels.w4a8.tilings import TOKENS, Block, Folded, Tiling
from halfbyte.kernels.w4a16 import tensor_cores as w4a16
from halfbyte.kernels.w4a16.prepared import TensorCoreWeight
from halfbyte.kernels.w4a16.tilings import choose as choose_w4a16
from halfbyte.packing import int32_words
from w4a16 import BYTES_PER_SECOND, COPIES_BYTES, NODES, Call, stages_that_fit
from w4a16 import compile_all as compile_w4a16

DEVICE = "cuda"
DTYPE = torch.bfloat16
OPERATIONS_PER_SECOND = 1500e12
COMPILERS = 15
GROUP = 128
LARGEST_SCALE = 15  # of `integer`: a mean of 8, as an amplifier of 1024 makes of groups whose largest weight is 0.055
KINDS: tuple[Kind, ...] = get_args(Kind)

Times = dict[tuple[Kind, int], dict[Tiling, list[float]]]


@dataclass(frozen=True)
class Case:
    """One weight of one kind, often enough to exceed the L2 cache, and what it is in float64."""

    weights: list[PreparedWeight]
    exact: Tensor

    @classmethod
    def of(cls, kind: Kind, outs: int, ins: int, copies: bool = True) -> "Case":
        g = torch.Generator(DEVICE).manual_seed(0)
        codes = torch.randint(0, 16, (outs, ins), dtype=torch.uint8, device=DEVICE, generator=g)
        shape = outs, ins // GROUP
        if kind == "float":
            scales = torch.rand(shape, device=DEVICE, generator=g).add(0.1).to(DTYPE)
        elif kind == "integer":
            scales = torch.randint(1, LARGEST_SCALE + 1, shape, device=DEVICE, generator=g, dtype=torch.int16)
        else:
            scales = torch.randint(1, 16, shape, device=DEVICE, generator=g, dtype=torch.uint8)
        rows = torch.rand(outs, device=DEVICE, generator=g).add(0.1).div(1024)
        weight = tensor_cores.prepare(kind, int32_words.pack(codes, 4), scales, rows, GROUP)
        if kind == "integer" and not weight.sixteenfold:
            raise SystemExit(f"{outs}x{ins}: with these scales codes are not 16-fold, as trained weights have them")
        exact = tensor_cores.values(weight)
        count = max(2, math.ceil(COPIES_BYTES / size_of(weight))) if copies else 1
        return cls([weight, *(copy_of(weight) for _ in range(count - 1))], exact)


@dataclass(frozen=True)
class Peers:
    """The same product by others: bf16 cuBLAS, row-wise fp8, our 4-bit weight with bf16 tokens."""

    dense: list[Tensor]
    fp8: list[Tensor]
    w4a16: list[TensorCoreWeight]

    @classmethod
    def of(cls, outs: int, ins: int) -> "Peers":
        g = torch.Generator(DEVICE).manual_seed(2)
        copies = lambda bits: range(max(2, math.ceil(8 * COPIES_BYTES / (bits * outs * ins))))  # noqa: E731
        weight = torch.randn(outs, ins, device=DEVICE, generator=g)
        codes = torch.randint(0, 16, (outs, ins), dtype=torch.uint8, device=DEVICE, generator=g)
        scales = torch.rand((outs, ins // GROUP), device=DEVICE, generator=g).to(DTYPE)
        ours = w4a16.prepare(int32_words.pack(codes, 4), scales, None, 4, GROUP, DTYPE)
        parts = lambda: {name: getattr(ours, name).clone() for name in ("words", "scales", "counters")}  # noqa: E731
        return cls(
            [weight.to(DTYPE) for _ in copies(16)],
            [weight.to(torch.float8_e4m3fn) for _ in copies(8)],
            [replace(ours, **parts()) for _ in copies(4)],
        )

    def calls(self, tokens: int) -> list[list[Call]]:
        outs, ins = self.dense[0].shape
        x = torch.randn(tokens, ins, device=DEVICE)
        x16, x8 = x.to(DTYPE), x.to(torch.float8_e4m3fn)
        scaled_mm = torch._scaled_mm  # pyright: ignore[reportPrivateImportUsage]
        a, b = torch.rand(tokens, 1, device=DEVICE), torch.rand(1, outs, device=DEVICE)
        return [
            [lambda w=w: torch.nn.functional.linear(x16, w) for w in self.dense],
            [lambda w=w: scaled_mm(x8, w.T, a, b, out_dtype=DTYPE, use_fast_accum=True) for w in self.fp8],
            [lambda w=w: w4a16.matmul(x16, w) for w in self.w4a16],
        ]


def size_of(weight: PreparedWeight) -> int:
    return 4 * (weight.words.numel() + weight.pairs.numel() + weight.row_scales.numel())


def copy_of(weight: PreparedWeight) -> PreparedWeight:
    parts = {name: getattr(weight, name).clone() for name in ("words", "pairs", "row_scales", "counters")}
    return replace(weight, **parts)


def activations(tokens: int, ins: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator(DEVICE).manual_seed(1)
    x = torch.randn(tokens, ins, device=DEVICE, generator=g).mul(32).round().clamp(-128, 127).to(torch.int8)
    return x, torch.rand(tokens, device=DEVICE, generator=g).add(0.1).div(100)


def calls(x: Tensor, x_scales: Tensor, case: Case, tiling: Tiling) -> list[Call]:
    return [lambda w=w: tensor_cores.launch(x, x_scales, w, None, DTYPE, tiling) for w in case.weights]


def expected(x: Tensor, x_scales: Tensor, case: Case) -> Tensor:
    return x.double() @ case.exact.T * x_scales.double()[:, None]


def graph_of(calls: list[Call]) -> tuple[torch.cuda.CUDAGraph, int, list[Any]]:
    """The calls as a graph, repeated to at least NODES of them; how many they are; what the last returns."""
    for call in calls[:2]:
        call()
    graph, repeated, stream = torch.cuda.CUDAGraph(), calls * math.ceil(NODES / len(calls)), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):  # not `torch.cuda.graph`, which gives memory back to the driver each time
        graph.capture_begin()
        results = [call() for call in repeated][-1:]
        graph.capture_end()
    return graph, len(repeated), results


def microseconds(contenders: list[list[Call]], replays: int) -> list[float]:
    """The median time of one call of each contender, their replays taking turns."""
    graphs = [graph_of(calls) for calls in contenders]
    times: list[list[float]] = [[] for _ in graphs]
    for _ in range(replays + 2):
        for (graph, nodes, _), taken in zip(graphs, times, strict=True):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            taken.append(1e3 * start.elapsed_time(end) / nodes)
    return [median(taken[2:]) for taken in times]


def is_right(y: Tensor, exact: Tensor, kind: str) -> bool:
    """Integer sums: every element rounded once. Float sums: as well, and within float32's errors of cancelled sums."""
    spare = 2e-6 * float(exact.abs().max()) if kind == "float" else 0.0
    return bool(((y.double() - exact).abs() <= 1.01 * 2.0**-8 * exact.abs() + spare).all())


# workers, units, how many programs fit a multiprocessor
FOLDED = ((2, 1, 2), (2, 2, 2), (1, 4, 2), (1, 2, 3))
FEW = ((1, 2, 3), (1, 4, 2), (1, 2, 4), (2, 1, 2), (2, 2, 2))
SPLITS = (2, 3, 4, 6)
# block_m, workers, each, units, programs
MANY = (
    *((64, 1, 1, 2, 3), (64, 1, 1, 2, 2), (64, 2, 1, 1, 2), (64, 4, 1, 1, 1)),
    *((128, 2, 1, 2, 1), (128, 1, 1, 2, 2), (128, 3, 1, 1, 1)),
)
MANY_SCALED_CODES = ((128, 4, 1, 1, 1), (128, 2, 2, 1, 1), (256, 2, 1, 1, 1))


def candidates(kind: Kind, tokens: int) -> Iterator[Tiling]:
    """What may be fast for so many tokens and fits a multiprocessor."""
    if kind == "weight" and tokens < 128:
        return  # as the other kinds
    if tokens <= 16:
        for workers, units, residents in FOLDED:
            yield from fitting(Folded(tokens, workers, units, 1, residents))
    if tokens <= 32:
        for workers, units, residents in FEW:
            one = Block(max(tokens, 8), workers, 1, units, 1, False, residents, residents)
            for other in (one, replace(one, shared=True), *(replace(one, split=split) for split in SPLITS)):
                yield from fitting(other)
        return
    for block_m, workers, each, units, programs in MANY + (MANY_SCALED_CODES if kind == "weight" else ()):
        if block_m <= tokens:
            one = Block(block_m, workers, each, units, 1, False, programs, programs)
            yield from fitting(one)
            if tokens < 1024:
                others = [replace(one, split=split) for split in SPLITS if split <= tilings.SPLITS.get(block_m, 1)]
                for other in (replace(one, shared=True), *others):
                    yield from fitting(other)


def fitting(one: Tiling) -> Iterator[Tiling]:
    """With as many stages as shared memory holds; nothing where registers do not suffice."""
    fit = stages_that_fit(one.residents, one.shared_memory, replace(one, stages=2).shared_memory)
    fit = min(fit, 20 // one.units)
    if isinstance(one, Folded):
        fit, sums = fit // one.workers * one.workers, one.tokens * one.units
    else:
        sums = one.block_m * one.each // 2
    if fit >= 2 and one.worker_registers >= sums + 48:
        yield replace(one, stages=fit)


def compile_one(job: tuple[Kind, Tiling]) -> str | None:
    """Fill Triton's cache with a kernel, by running it on a small weight. What went wrong, if anything."""
    kind, tiling = job
    case = Case.of(kind, 664, 2048, copies=False)
    tokens = tiling.tokens - 1 if isinstance(tiling, Folded) else tiling.block_m + (5 if tiling.block_m > 16 else -1)
    x, x_scales = activations(tokens, 2048)
    try:
        y = tensor_cores.launch(x, x_scales, case.weights[0], None, DTYPE, tiling)
        return None if is_right(y, expected(x, x_scales, case), kind) else f"WRONG: {kind} {tiling}"
    except Exception as cause:  # noqa: BLE001 - a search goes on without what fails
        return f"{kind} {tiling}: {type(cause).__name__} {str(cause)[:200]}"


def compile_all(jobs: list[tuple[Kind, Tiling]]) -> set[tuple[Kind, Tiling]]:
    """What works, all compiled at once."""
    with ProcessPoolExecutor(COMPILERS, multiprocessing.get_context("spawn")) as pool:
        failures = list(pool.map(compile_one, jobs, chunksize=1))
    for failure in filter(None, failures):
        print(failure)
    return {job for job, failure in zip(jobs, failures, strict=True) if failure is None}


def is_sensible(tiling: Tiling, tokens: int, outs: int) -> bool:
    """Whether programs that share nothing, or a block each with others, about fill the chip, and all have places."""
    if isinstance(tiling, Folded):
        return 2 * math.ceil(outs / 64) <= 132 * (tiling.residents - 1)
    if tiling.shared or (tokens > 32 and tiling.split == 1):
        return True
    parts = math.ceil(tokens / tiling.block_m) * math.ceil(outs / (64 * tiling.workers * tiling.each)) * tiling.split
    return 90 <= parts <= 132 * tiling.residents


def search(
    kind: Kind, case: Case, tokens: int, works: set[tuple[Kind, Tiling]], times: Times
) -> tuple[Tiling, float] | None:
    """Time the candidates on one weight; adds to `times`. The best of them and its time."""
    outs, ins = case.exact.shape
    x, x_scales = activations(1 if tokens == 4 else tokens, ins)
    exact = expected(x, x_scales, case)
    found: list[tuple[float, Tiling]] = []
    for tiling in dict.fromkeys(candidates(kind, tokens)):
        if (kind, tiling) not in works or not is_sensible(tiling, tokens, outs):
            continue
        ours = calls(x, x_scales, case, tiling)
        if not is_right(ours[0](), exact, kind):
            works.discard((kind, tiling))
            print(f"WRONG: {kind} {tiling} at {outs}x{ins}, {len(x)} tokens")
            continue
        found.append((microseconds([ours], 5)[0], tiling))
        times.setdefault((kind, tokens), {}).setdefault(tiling, []).append(found[-1][0])
    found.sort(key=lambda pair: pair[0])
    for taken, tiling in found[:5]:
        print(f"{outs}x{ins} {kind} {len(x)}: {taken:.2f} {short(tiling)}", flush=True)
    return None if not found else (found[0][1], found[0][0])


def short(tiling: Tiling) -> str:
    return repr(tiling).replace("block_m=", "").replace("workers=", "w").replace("each=", "e").replace("units=", "u")


@dataclass(frozen=True)
class Row:
    """Times in microseconds."""

    outs: int
    ins: int
    tokens: int
    cublas: float
    fp8: float
    w4a16: float
    float_scales: float
    integer_scales: float
    weight_scales: float
    tilings: dict[str, str]
    bound: float


def measure(tokens: int, cases: dict[Kind, Case], peers: Peers, picks: dict[tuple[Kind, int, int, int], Tiling]) -> Row:
    outs, ins = peers.dense[0].shape
    x, x_scales = activations(tokens, ins)
    ours, used = [], {}
    for kind, case in cases.items():
        tiling = picks.get((kind, tokens, outs, ins), tilings.choose(kind, tokens, outs, ins, GROUP))
        run = calls(x, x_scales, case, tiling)
        y, exact = run[0](), expected(x, x_scales, case)
        if not is_right(y, exact, kind):
            raise SystemExit(f"{kind} {tiling} disagrees with float64 at {outs}x{ins}, {tokens} tokens")
        graph, _, last = graph_of(run)
        last[0].fill_(math.nan)
        graph.replay()
        torch.cuda.synchronize()
        if not torch.equal(last[0], y) or any(w.counters.any() for w in case.weights):
            raise SystemExit(f"{kind} {tiling} is not the same from call to call at {outs}x{ins}, {tokens} tokens")
        ours.append(run)
        used[kind] = repr(tiling)
    cublas, fp8, four_bits, *taken = microseconds([*peers.calls(tokens), *ours], 8)
    moved = size_of(cases["integer"].weights[0]) + tokens * (ins + 2 * outs)
    bound = 1e6 * max(moved / BYTES_PER_SECOND, 2 * tokens * ins * outs / OPERATIONS_PER_SECOND)
    return Row(outs, ins, tokens, cublas, fp8, four_bits, taken[0], taken[1], taken[2], used, bound)


def line(row: Row) -> str:
    ours = (row.float_scales, row.integer_scales, row.weight_scales)
    each = " ".join(f"{taken:>7.1f} ({row.cublas / taken:.2f})" for taken in (row.fp8, row.w4a16, *ours))
    shape = f"{row.outs}x{row.ins}"
    return f"{shape:>12} {row.tokens:>5} {row.cublas:>7.1f} {each}  F/I {ours[0] / ours[1]:.3f} {row.bound:>6.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="4096x4096,22016x4096,28672x4096,4096x11008,4096x14336", help="out x in")
    parser.add_argument("--tokens", default="1,4,16,32,64,128,256,512,1024,4096")
    parser.add_argument(
        "--search", default="", help="first find tilings for so many tokens, of " + ",".join(map(str, TOKENS))
    )
    parser.add_argument("--kinds", default="float,integer,weight", help="to search")
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop searching, then measuring, after so many")
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    options = parser.parse_args()
    began = time.monotonic()
    over = lambda share: time.monotonic() - began > share * options.seconds  # noqa: E731

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, {DTYPE}, g{GROUP}")
    shapes: list[tuple[int, int]] = [
        (int(outs), int(ins)) for outs, ins in (s.split("x") for s in options.shapes.split(","))
    ]
    searched = [int(tokens) for tokens in options.search.split(",") if tokens]
    kinds: list[Kind] = [kind for kind in KINDS if kind in options.kinds.split(",")]
    jobs: list[tuple[Kind, Tiling]] = [
        (kind, t) for kind in kinds for count in searched for t in dict.fromkeys(candidates(kind, count))
    ]
    tokens = [int(tokens) for tokens in options.tokens.split(",") if tokens]
    if not searched:
        chosen = lambda kind, t, outs, ins: (kind, tilings.choose(kind, t, outs, ins, GROUP))  # noqa: E731
        jobs = [chosen(kind, t, *shape) for kind in KINDS for t in tokens for shape in shapes]
    jobs = list(dict.fromkeys(jobs))
    with ThreadPoolExecutor(1) as beside:
        others = {choose_w4a16(t, outs, ins, GROUP, symmetric=True) for t in tokens for outs, ins in shapes}
        beside.submit(compile_w4a16, [(tiling, GROUP, False, True) for tiling in others])
        works = compile_all(jobs)
    print(f"{len(works)} of {len(jobs)} kernels compiled and right after {time.monotonic() - began:.0f} s", flush=True)
    times: Times = {}
    picks: dict[tuple[Kind, int, int, int], Tiling] = {}
    rows: list[Row] = []
    record: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    record |= {"triton": triton.__version__}
    for outs, ins in shapes:
        cases: dict[Kind, Case] = {kind: Case.of(kind, outs, ins) for kind in KINDS}
        for count in searched:
            for kind in kinds:
                if not over(0.9) and (best := search(kind, cases[kind], count, works, times)):
                    picks[kind, count, outs, ins] = best[0]
        if options.tokens:
            peers = Peers.of(outs, ins)
            for count in tokens:
                if not over(1.0):
                    rows.append(measure(count, cases, peers, picks))
                    print(line(rows[-1]), flush=True)
        if options.json:
            found = [
                {"kind": kind, "tokens": tokens, "tiling": repr(tiling), "times": taken}
                for (kind, tokens), of_cell in times.items()
                for tiling, taken in of_cell.items()
            ]
            options.json.write_text(
                json.dumps(record | {"rows": [asdict(r) for r in rows], "search": found}, indent=1) + "\n"
            )
    for (kind, tokens), of_cell in times.items():
        most = max(map(len, of_cell.values()))
        means = {tiling: geometric_mean(taken) for tiling, taken in of_cell.items() if len(taken) == most}
        for tiling in sorted(means, key=lambda tiling: means[tiling])[:3]:
            print(f"{kind} {tokens}: {means[tiling]:.2f} {[round(t, 1) for t in of_cell[tiling]]} {tiling}")


if __name__ == "__main__":
    main()
