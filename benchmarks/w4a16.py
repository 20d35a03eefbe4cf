"""How long the weight-only 4-bit matmul takes on the GPU of this machine, beside bf16 cuBLAS on the dense weight.

    python benchmarks/w4a16.py --json w4a16.json

Every launch is first compared with the float64 reference, and nothing is timed that disagrees with it. A time is the
median over replays of a CUDA graph that calls the kernel for several copies of the weight, one after the other, so many
that together they exceed the L2 cache: each call finds its weight in memory, as in a model. Replays of cuBLAS and of the
kernel take turns, since a chip that has worked for a while runs slower. A launch may start to fetch its weight while the
one before it ends; "alone" is the time when it may not.

`--search` tries many tilings, prints the tables of `kernels/w4a16/tilings.py` that come out, and measures with them.
"""

import argparse
import json
import math
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any, TypeGuard

import torch
import triton
from torch import Tensor

from halfbyte.kernels.w4a16 import few_tokens, many_tokens, streamed, tensor_cores, tilings
from halfbyte.kernels.w4a16.prepared import TensorCoreWeight
from halfbyte.kernels.w4a16.tilings import GROUP, TOKENS, Block, Stream, Streamed, Tiling
from halfbyte.packing import int32_words

DEVICE = "cuda"
DTYPE = torch.bfloat16
COPIES_BYTES = 200e6
NODES = 16  # calls in a graph at least: what a replay costs by itself is then little
REPLAYS = 20
FEW = 16  # tokens up to which times alone are taken as well
# what an H200 has been seen to sustain: the bound that times are compared with
BYTES_PER_SECOND = 4.4e12
OPERATIONS_PER_SECOND = 790e12
SHARED_MEMORY = 227 * 1024  # of a multiprocessor, and 1 KB of each of its programs
COMPILERS = 15

Call = Callable[[], Any]
Times = dict[tuple[int, int, int], dict[Tiling, float]]  # of tokens, outs, ins


@dataclass(frozen=True)
class Case:
    """One weight, often enough to exceed the L2 cache, as we read it and as cuBLAS does."""

    weights: list[TensorCoreWeight]
    dense: list[Tensor]
    exact: Tensor

    @classmethod
    def of(cls, outs: int, ins: int, group_size: int, asymmetric: bool) -> "Case":
        g = torch.Generator(DEVICE).manual_seed(0)
        codes = torch.randint(0, 16, (outs, ins), dtype=torch.uint8, device=DEVICE, generator=g)
        shape = (outs, ins // group_size)
        scales = torch.rand(shape, device=DEVICE, generator=g).add(0.1).div(16).to(DTYPE)
        points = torch.randint(0, 16, shape, dtype=torch.uint8, device=DEVICE, generator=g) if asymmetric else None
        zeros = torch.full_like(scales, 8) if points is None else points
        exact = (codes.unflatten(1, (-1, group_size)).double() - zeros[:, :, None].double()) * scales[
            :, :, None
        ].double()
        exact = exact.flatten(1)
        weight = tensor_cores.prepare(int32_words.pack(codes, 4), scales, points, 4, group_size, DTYPE)
        copies = max(2, math.ceil(COPIES_BYTES / size_of(weight)))
        weights = [weight, *(copy_of(weight) for _ in range(copies - 1))]
        dense = [exact.to(DTYPE) for _ in range(max(2, math.ceil(COPIES_BYTES / (2 * outs * ins))))]
        return cls(weights, dense, exact)


@dataclass(frozen=True)
class Row:
    """Times in microseconds."""

    outs: int
    ins: int
    tokens: int
    group_size: int
    asymmetric: bool
    cublas: float
    halfbyte: float
    alone: float | None
    tiling: str
    speedup: float
    bound: float
    gigabytes_per_second: float
    teraflops: float


def size_of(weight: TensorCoreWeight) -> int:
    """What a matmul has to read, in bytes."""
    parts = (weight.words, weight.scales, weight.offsets)
    return sum(part.numel() * part.element_size() for part in parts if part is not None)


def copy_of(weight: TensorCoreWeight) -> TensorCoreWeight:
    offsets = None if weight.offsets is None else weight.offsets.clone()
    parts = {"words": weight.words.clone(), "scales": weight.scales.clone(), "counters": weight.counters.clone()}
    return replace(weight, offsets=offsets, **parts)


def activations(tokens: int, ins: int) -> Tensor:
    return torch.randn(tokens, ins, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(1)).to(DTYPE)


def calls(x: Tensor, weights: list[TensorCoreWeight], tiling: Tiling) -> list[Call]:
    return [lambda weight=weight: tensor_cores.launch(x, weight, None, tiling) for weight in weights]


def is_right(y: Tensor, expected: Tensor) -> bool:
    """At most the weight and the result are rounded to bf16."""
    return float((y.double() - expected).norm() / expected.norm()) <= torch.finfo(DTYPE).eps


def graph_of(calls: list[Call]) -> tuple[torch.cuda.CUDAGraph, int, list[Any]]:
    """The calls as a graph, repeated to at least NODES of them; how many they are; what the last returns."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph, repeated = torch.cuda.CUDAGraph(), calls * math.ceil(NODES / len(calls))
    with torch.cuda.graph(graph):
        results = [call() for call in repeated]
    return graph, len(repeated), results[-1:]


def microseconds(contenders: list[list[Call]], replays: int = REPLAYS) -> list[float]:
    """The median time of one call of each contender, their replays taking turns."""
    graphs = [graph_of(calls) for calls in contenders]
    times: list[list[float]] = [[] for _ in graphs]
    for _ in range(replays + 2):
        for (graph, nodes, _), list_ in zip(graphs, times, strict=True):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            list_.append(1e3 * start.elapsed_time(end) / nodes)
    return [median(list_[2:]) for list_ in times]


def candidates(tokens: int) -> Iterator[Tiling]:
    """What is used so far for so many tokens, and what else may be fast and fits a multiprocessor."""
    row = TOKENS.index(tokens)
    yield from tilings.TABLE[row]
    if row < len(tilings.STREAMED):
        yield from filter(None, tilings.STREAMED[row])
        yield from candidate_streamed(tokens)
    if tokens <= 16:
        yield from candidate_streams(max(tokens, 8))
    if tokens >= 16:
        yield from candidate_blocks(tokens)


def candidate_streams(block_m: int) -> Iterator[Stream]:
    for block_n, warps, run, stages in product((16, 32, 64, 128), (2, 4, 8), (1, 2), (2, 3, 4, 5, 6, 8)):
        step = warps * run * (block_n * 32 + block_m * 128)
        programs = min(SHARED_MEMORY // (stages * step + 1500), 64 // warps)
        in_flight = programs * (stages - 1) * warps * run * block_n * 32
        if block_n * warps > 512 or programs * warps < 8 or not 40_000 < in_flight < 190_000:
            continue
        for split in (1, 2, 4, 8) if run == 2 and stages <= 4 else (1,):
            yield Stream(block_m, block_n, warps, run, stages, split)


def candidate_streamed(tokens: int) -> Iterator[Streamed]:
    for fold, workers, units, residents, beside in product((1, 2), (1, 2), (1, 2, 4), (2, 3, 4), (False, True)):
        if beside and (fold > 1 or workers == 1):
            continue
        one = Streamed(max(tokens, 8 // fold), fold, workers, units, 1, residents, beside)
        fit = stages_that_fit(residents, one.shared_memory, replace(one, stages=2).shared_memory)
        stages = min(fit, 20 // units) // one.turns * one.turns
        if stages >= 2 and one.worker_registers >= one.block_m * fold // 2 * (units + 1) + 48:
            yield replace(one, stages=stages)


def stages_that_fit(residents: int, one: int, two: int) -> int:
    """How many stages so many programs can have side by side, from the shared memory of one with one and with two."""
    return (SHARED_MEMORY // residents - 2048 - one) // (two - one) + 1


def candidate_blocks(tokens: int) -> Iterator[Block]:
    crews = ((2, 1), (2, 2), (4, 1))
    for block_m, (workers, each), run in product({min(tokens, 128), min(tokens, 256)}, crews, (1, 2)):
        if block_m * each * workers > 512 or block_m * run > 512:
            continue
        step, staged = run * (block_m * 128 + workers * each * 2048), block_m * workers * each * 128
        fit = (SHARED_MEMORY - 2048 - staged) // step
        for stages in {min(fit, 12), max(min(fit, 80 * 1024 // step), 2)} if fit > 1 else ():
            yield Block(block_m, workers, each, run, stages, False)
            if tokens <= 1024:
                yield Block(block_m, workers, each, run, stages, True)
            if tokens >= 1024:
                yield from (Block(block_m, workers, each, run, stages, False, beside) for beside in (4, 16))


def start_early(early: bool) -> None:
    """Whether launches may start before the one ahead of them ends."""
    few_tokens.EARLY = many_tokens.EARLY = streamed.EARLY = early


def compile_one(job: tuple[Tiling, int, bool, bool]) -> str | None:
    """Fill Triton's cache with a kernel, by running it on a small weight. What went wrong, if anything."""
    tiling, group_size, asymmetric, early = job
    start_early(early)
    case = Case.of(640, 2048, group_size, asymmetric)
    x = activations(tiling.block_m + (5 if isinstance(tiling, Block) else 0), 2048)
    try:
        y = tensor_cores.launch(x, case.weights[0], None, tiling)
        return None if is_right(y, x.double() @ case.exact.T) else f"WRONG: {tiling}"
    except triton.runtime.errors.OutOfResources as cause:
        return f"{tiling}: {cause}"


def compile_all(jobs: list[tuple[Tiling, int, bool, bool]]) -> set[Tiling]:
    """The tilings that work, all compiled at once."""
    with ProcessPoolExecutor(COMPILERS, multiprocessing.get_context("spawn")) as pool:
        failures = list(pool.map(compile_one, jobs, chunksize=1))
    for failure in filter(None, failures):
        print(failure)
    return {job[0] for job, failure in zip(jobs, failures, strict=True) if failure is None}


def is_for(tiling: Tiling | None, group_size: int, asymmetric: bool) -> TypeGuard[Tiling]:
    """Whether it runs weights of that kind."""
    return tiling is not None and (not isinstance(tiling, Streamed) or (group_size == GROUP and not asymmetric))


def is_sensible(tiling: Tiling, outs: int, ins: int) -> bool:
    """Whether a `Streamed` has a cell, and places for all its programs, if any has."""
    if not isinstance(tiling, Streamed):
        return True
    column, programs = tilings.streamed_column(outs, ins), math.ceil(outs / 64) * tiling.fold // tiling.tiles
    if column is None or tiling.fold != (2 if column < 2 else 1):
        return False
    return tiling.residents == 4 or programs <= tilings.PROCESSORS * tiling.residents


def search(case: Case, works: set[Tiling], times: Times) -> None:
    """Time the candidates of every row of the tables on one weight; adds to `times`."""
    outs, ins = case.exact.shape
    for tokens in TOKENS:
        x = activations(1 if tokens == 4 else tokens, ins)
        expected = x.double() @ case.exact.T
        for tiling in dict.fromkeys(candidates(tokens)):
            if tiling not in works or not is_sensible(tiling, outs, ins):
                continue
            ours = calls(x, case.weights, tiling)
            found = ours[0]()
            if not is_right(found, expected) or not all(torch.equal(call(), found) for call in ours):
                works.discard(tiling)
                print(f"WRONG: {tiling} at {outs}x{ins}, {len(x)} tokens")
                continue
            times.setdefault((tokens, outs, ins), {})[tiling] = microseconds([ours], 6)[0]


def set_tables(times: Times) -> None:
    """In every cell the tiling whose times are least over all weights that it is for. Prints them and what is near."""
    table, streamed_table = [list(row) for row in tilings.TABLE], [list(row) for row in tilings.STREAMED]
    cells: dict[tuple[str, int, int], list[dict[Tiling, float]]] = {}
    for (tokens, outs, ins), of_weight in times.items():
        row, column = TOKENS.index(tokens), tilings.streamed_column(outs, ins)
        others: dict[Tiling, float] = {
            tiling: time for tiling, time in of_weight.items() if not isinstance(tiling, Streamed)
        }
        cells.setdefault(("TABLE", row, tilings.column(outs)), []).append(others)
        if len(others) < len(of_weight) and column is not None:
            cells.setdefault(("STREAMED", row, column), []).append(of_weight)
    for (name, row, column), weights in cells.items():
        tried = [tiling for tiling in weights[0] if all(tiling in of_weight for of_weight in weights)]
        means = {tiling: geometric_mean(of_weight[tiling] for of_weight in weights) for tiling in tried}
        best = sorted(means, key=lambda tiling: means[tiling])
        taken = ", ".join(f"{of_weight[best[0]]:.1f}" for of_weight in weights)
        print(f"{name}, {TOKENS[row]} tokens, column {column}: {best[0]}, {taken} µs")
        for other in best[1:3]:
            print(f"    {means[other] / means[best[0]]:.3f} {other}")
        if name == "TABLE":
            table[row][column] = best[0]
        else:
            streamed_table[row][column] = best[0] if isinstance(best[0], Streamed) else None
    tilings.TABLE, tilings.STREAMED = tuple(map(tuple, table)), tuple(map(tuple, streamed_table))


def measure(tokens: int, case: Case) -> Row:
    (outs, ins), weight = case.exact.shape, case.weights[0]
    x = activations(tokens, ins)
    tiling = tilings.choose(tokens, outs, ins, weight.group_size, symmetric=weight.offsets is None)
    ours = calls(x, case.weights, tiling)
    expected, found = x.double() @ case.exact.T, ours[0]()
    if not is_right(found, expected):
        raise SystemExit(f"{tiling} disagrees with the reference at {outs}x{ins}, {tokens} tokens")
    graph, _, last = graph_of(ours)
    last[0].fill_(math.nan)
    graph.replay()
    torch.cuda.synchronize()
    same = torch.equal(last[0], found) and all(torch.equal(call(), found) for call in ours * 3)
    if not same or any(weight.counters.any() for weight in case.weights):
        raise SystemExit(f"{tiling} is not the same from call to call at {outs}x{ins}, {tokens} tokens")
    dense = [lambda weight=weight: torch.nn.functional.linear(x, weight) for weight in case.dense]
    cublas, time = microseconds([dense, ours])
    alone = None
    if tokens <= FEW:
        start_early(False)
        alone = microseconds([ours])[0]
        start_early(True)
    moved, operations = size_of(weight) + 2 * tokens * (ins + outs), 2 * tokens * ins * outs
    return Row(
        outs, ins, tokens, weight.group_size, weight.offsets is not None,
        cublas, time, alone, repr(tiling), cublas / time,
        1e6 * max(moved / BYTES_PER_SECOND, operations / OPERATIONS_PER_SECOND),
        moved / time / 1e3, operations / time / 1e6,
    )  # fmt: skip


HEADER = (
    f"{'out x in':>12} {'tokens':>6} {'cuBLAS':>9} {'halfbyte':>9} {'alone':>7} {'speed-up':>8} {'bound':>9} "
    f"{'GB/s':>6} {'TFLOP/s':>7}   times in µs"
)


def line(row: Row) -> str:
    alone = "" if row.alone is None else f"{row.alone:.1f}"
    return (
        f"{f'{row.outs}x{row.ins}':>12} {row.tokens:>6} {row.cublas:>9.1f} {row.halfbyte:>9.1f} {alone:>7} "
        f"{row.speedup:>7.2f}x {row.bound:>9.1f} {row.gigabytes_per_second:>6.0f} {row.teraflops:>7.1f}   {row.tiling}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes", default="4096x4096,22016x4096,28672x4096,4096x11008,4096x14336", help="out x in of the weights"
    )
    parser.add_argument("--tokens", default="1,4,16,32,64,128,256,512,1024,4096")
    parser.add_argument("--group-size", type=int, default=128, help="0: one scale per output")
    parser.add_argument("--asymmetric", action="store_true", help="with zero points")
    parser.add_argument("--search", action="store_true", help="find the tilings first: minutes")
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    options = parser.parse_args()

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, {DTYPE}")
    print(f"4 bits, group size {options.group_size}, {'a' if options.asymmetric else ''}symmetric")
    shapes = [tuple(map(int, shape.split("x"))) for shape in options.shapes.split(",")]
    kind = options.group_size or shapes[0][1], options.asymmetric
    if options.search:
        every = dict.fromkeys(tiling for tokens in TOKENS for tiling in candidates(tokens))
        works = compile_all([(tiling, *kind, True) for tiling in every if is_for(tiling, *kind)])
        times: Times = {}
        for outs, ins in shapes:
            search(Case.of(outs, ins, options.group_size or ins, options.asymmetric), works, times)
        set_tables(times)
    used = dict.fromkeys(tiling for row in tilings.TABLE + tilings.STREAMED for tiling in row if is_for(tiling, *kind))
    jobs = [(tiling, *kind, early) for tiling in used for early in (True, False) if early or tiling.block_m <= FEW]
    compile_all(jobs)
    print(HEADER)
    rows = []
    for outs, ins in shapes:
        case = Case.of(outs, ins, options.group_size or ins, options.asymmetric)
        for tokens in map(int, options.tokens.split(",")):
            rows.append(measure(tokens, case))
            print(line(rows[-1]), flush=True)
        if options.json:
            environment = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
            environment["triton"] = triton.__version__
            record = environment | {"rows": [asdict(row) for row in rows]}
            options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
