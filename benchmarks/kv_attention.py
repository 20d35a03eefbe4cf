"""How long a step of attention on a packed 4-bit cache takes on the GPU of this machine, beside bf16 on a float cache.

    python benchmarks/kv_attention.py --json kv_attention.json

Heads and head dimension are those of Llama-2-7B (32 query heads on 32) and Llama-3-8B (32 on 8, 128 channels); every row
of the batch has `context` tokens and one current token. The baseline at each point is the fastest of PyTorch's
scaled-dot-product kernels (cuDNN, FlashAttention, memory-efficient) on bf16 keys and values, with shared heads given as
they are and as more queries per head. A kernel is first compared with the float64 reference on the first and the last
row, and nothing is timed that disagrees. A time is the median over replays of a CUDA graph that goes through so many
caches that together they exceed the L2 cache.

`--search` tries several cuts at each point. `--before-rope`: keys are stored before RoPE, shifted and scaled.
"""

import argparse
import json
import math
import multiprocessing
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from halfbyte.kernels import kv_attention as kv
from halfbyte.kernels.device import processors
from halfbyte.kernels.kv_attention import cuts, reference
from halfbyte.kernels.kv_attention.cuts import Cut

DEVICE = "cuda"
DTYPE = torch.bfloat16
DIM = 128
HEADS = ((32, 32), (32, 8))
CONTEXTS = (2048, 8192, 32768)
BATCHES = (1, 16, 64)
COPIES_BYTES = 200e6
AT_LEAST = 400.0  # microseconds that a replay takes
REPLAYS = 9
TOLERANCE = 6e-3  # relative, of bf16 answers
COMPILERS = 16
BYTES_PER_SECOND = 4.4e12  # what an H200 has been seen to sustain
BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
TURNING = (
    Cut(1, 32, 1, 4, 0),
    Cut(1, 32, 2, 3, 0),
    Cut(1, 32, 2, 4, 0),
    Cut(1, 16, 2, 4, 0),
    Cut(1, 16, 4, 4, 0),
    Cut(1, 16, 2, 4, 168),
)
KERNELS = (
    Cut(1, 64, 2, 2, 0),
    Cut(1, 64, 2, 3, 0),
    Cut(1, 64, 1, 3, 0),
    Cut(1, 32, 2, 4, 168),
    Cut(1, 32, 1, 4, 168),
)
WRITES = ((64, 32, 1), (64, 8, 1), (1, 32, 2048), (4, 8, 8192))  # batch, heads, tokens
Call = Callable[[], Any]


@dataclass(frozen=True)
class Point:
    query_heads: int
    kv_heads: int
    context: int
    batch: int
    turned: bool = False  # keys are stored before RoPE

    @property
    def bytes(self) -> int:
        """Of codes, steps and zeros, keys and values."""
        return self.batch * self.kv_heads * self.context * 2 * (DIM // 2 + 4)


@dataclass(frozen=True)
class Row:
    """Times in microseconds."""

    point: Point
    cut: Cut
    ours: float
    baseline: float
    backend: str
    backends: dict[str, float]
    error: float
    megabytes: float
    gigabytes_per_second: float
    bound: float
    speedup: float


@dataclass(frozen=True)
class Case:
    query: Tensor
    keys: kv.PackedTokens
    values: kv.PackedTokens
    last: Tensor
    key_now: Tensor
    value_now: Tensor
    rotation: kv.KeyRotation | None = None
    smoothing: kv.Smoothing = kv.NO_SMOOTHING

    @classmethod
    def of(cls, point: Point, seed: int) -> "Case":
        g = torch.Generator(DEVICE).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, device=DEVICE, generator=g).to(DTYPE)

        def packed() -> kv.PackedTokens:
            shape = (point.batch, point.kv_heads, point.context)
            codes = torch.randint(0, 256, (*shape, DIM // 2), dtype=torch.uint8, device=DEVICE, generator=g)
            steps = torch.rand((*shape, 1), device=DEVICE, generator=g).mul(0.2).add(0.2)
            return kv.PackedTokens(codes, steps.half(), (steps * -7.3).half())

        now = (point.batch, point.kv_heads, DIM)
        last = torch.full((point.batch,), point.context, dtype=torch.int32, device=DEVICE)
        query = normal(point.batch, point.query_heads, DIM)
        case = cls(query, packed(), packed(), last, normal(*now), normal(*now))
        if not point.turned:
            return case
        cos, sin = turns(torch.arange(point.context, device=DEVICE)).half()
        cos, sin = (part.expand(point.batch, -1, -1).contiguous() for part in (cos, sin))
        rotation = kv.KeyRotation(cos, sin, turns(torch.arange(cuts.NEAR, device=DEVICE)))
        smoothing = kv.Smoothing(*(torch.rand(point.kv_heads, DIM, device=DEVICE, generator=g) + 0.5 for _ in range(4)))
        return replace(case, rotation=rotation, smoothing=smoothing)

    def call(self, cut: Cut | None) -> Call:
        if cut is None:
            return lambda: kv.decode_attention(
                self.query, self.keys, self.values, self.last, self.key_now, self.value_now,
                smoothing=self.smoothing, rotation=self.rotation,
            )  # fmt: skip
        return lambda: kv.launch(
            self.query, self.keys, self.values, self.last, self.key_now, self.value_now, None, None, self.smoothing,
            DIM**-0.5, cut, self.rotation,
        )  # fmt: skip

    def rows(self, rows: list[int]) -> "Case":
        def of(tokens: kv.PackedTokens) -> kv.PackedTokens:
            return kv.PackedTokens(*(part[rows] for part in tokens if part is not None))

        turned = self.rotation
        if turned is not None:
            turned = turned._replace(cos=turned.cos[rows], sin=turned.sin[rows])
        return Case(
            self.query[rows], of(self.keys), of(self.values), self.last[rows], self.key_now[rows], self.value_now[rows],
            turned, self.smoothing,
        )  # fmt: skip

    def expected(self) -> Tensor:
        return reference.attention(
            self.query, self.keys, self.values, self.last, self.key_now, self.value_now, None, None, self.smoothing, None,
            self.rotation,
        )  # fmt: skip


def turns(positions: Tensor) -> Tensor:
    """Cosines and sines, [2, positions, DIM / 2]."""
    half = DIM // 2
    angles = positions[:, None].double() * 10000.0 ** (-torch.arange(half, device=DEVICE) / half)
    return torch.stack([angles.cos(), angles.sin()]).float()


def microseconds(calls: list[Call]) -> float:
    """The median time of a call."""
    calls[0]()
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    calls[-1]()
    end.record()
    end.synchronize()
    times = math.ceil(AT_LEAST / (1e3 * start.elapsed_time(end)) / len(calls) * 4)
    graph, kept = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        for _ in range(max(1, min(times, 64 // len(calls)))):
            kept = [call() for call in calls]
    count = max(1, min(times, 64 // len(calls))) * len(kept)
    found = []
    for _ in range(REPLAYS + 2):
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(1e3 * start.elapsed_time(end) / count)
    return median(found[2:])


def attend(backend: SDPBackend, query: Tensor, keys: Tensor, values: Tensor, shared: bool) -> Tensor:
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(query, keys, values, enable_gqa=shared)


def baselines(point: Point) -> Iterator[tuple[str, float]]:
    """Times of PyTorch's kernels; those that refuse are left out."""
    shape = (point.batch, point.kv_heads, point.context + 1, DIM)
    copies = max(1, math.ceil(COPIES_BYTES / (4 * math.prod(shape))))
    caches = [[torch.empty(shape, dtype=DTYPE, device=DEVICE).normal_() for _ in range(2)] for _ in range(copies)]
    together = point.query_heads // point.kv_heads
    query = torch.randn(point.batch, point.query_heads, 1, DIM, device=DEVICE).to(DTYPE)
    forms = {"": query} if together == 1 else {"": query, " as queries": query.view(shape[0], shape[1], together, DIM)}
    for form, q in forms.items():
        for name, backend in BACKENDS.items():
            shared = q.shape[1] != point.kv_heads
            calls = [lambda k=k, v=v, q=q, b=backend, s=shared: attend(b, q, k, v, s) for k, v in caches]
            try:
                yield name + form, microseconds(calls)
            except RuntimeError:
                torch.cuda.synchronize()


def splits_for(point: Point) -> list[int]:
    rows = point.batch * point.kv_heads
    most = min(cuts.MOST_SPLITS, math.ceil(point.context / 128))
    wanted = [math.ceil(programs * 132 / rows) for programs in (1, 2, 3, 4, 6, 8, 12)]
    return sorted({min(most, splits) for splits in wanted})


def candidates(point: Point, kernels: list[Cut]) -> Iterator[Cut]:
    for kernel in kernels:
        for splits in splits_for(point):
            yield replace(kernel, splits=splits)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def measure(point: Point, kernels: list[Cut] | None) -> Row | None:
    cases = [Case.of(point, seed) for seed in range(max(1, math.ceil(COPIES_BYTES / point.bytes)))]
    few = sorted({0, point.batch - 1})
    expected = cases[0].rows(few).expected()
    times: list[tuple[float, float, Cut]] = []
    chosen = cuts.choose(
        point.batch * point.kv_heads, point.context, processors(torch.device(DEVICE, 0)),
        point.query_heads // point.kv_heads, point.turned,
    )  # fmt: skip
    for cut in [chosen] if kernels is None else candidates(point, kernels):
        error = relative_error(cases[0].call(cut)()[few], expected)
        if not error < TOLERANCE:
            print(f"WRONG: {cut} at {point}: {error}", flush=True)
            continue
        times.append((microseconds([case.call(cut) for case in cases]), error, cut))
    if kernels is not None:
        print(
            "   ", "  ".join(f"{c.tokens}.{c.warps}.{c.stages}.{c.registers}/{c.splits}:{t:.1f}" for t, _, c in times)
        )
    if not times:
        return None
    del cases
    backends = dict(baselines(point))
    ours, error, cut = min(times, key=lambda found: found[0])
    backend = min(backends, key=lambda name: backends[name])
    bound = 1e6 * point.bytes / BYTES_PER_SECOND
    return Row(
        point, cut, ours, backends[backend], backend, backends, error, point.bytes / 1e6, point.bytes / ours / 1e3, bound,
        backends[backend] / ours,
    )  # fmt: skip


def write(batch: int, kv_heads: int, tokens: int) -> tuple[float, float]:
    """Microseconds to quantize new keys and values in place, and the bound."""
    g = torch.Generator(DEVICE).manual_seed(3)
    moved = 2 * batch * kv_heads * tokens * (DIM * 2 + DIM // 2 + 4)
    calls = []
    for seed in range(max(2, math.ceil(COPIES_BYTES / moved)) if tokens > 1 else 4):
        case = Case.of(Point(kv_heads, kv_heads, tokens + 64, batch), seed)
        key, value = (
            torch.randn(batch, tokens, kv_heads, DIM, device=DEVICE, generator=g).to(DTYPE).transpose(1, 2)
            for _ in range(2)
        )
        position = torch.full((batch,), 33, dtype=torch.int32, device=DEVICE)
        calls.append(partial(kv.write_tokens, case.keys, case.values, key, value, position))
        calls[-1]()
        decoded = reference.decoded(case.keys, DIM)[:, :, 33 : 33 + tokens]
        reach = key.double().amax(3, keepdim=True) - key.double().amin(3, keepdim=True)
        assert bool(((decoded - key.double()).abs() <= 0.53 * reach / 15).all()), (
            "what was written is not what was given"
        )
    return microseconds(calls), 1e6 * moved / BYTES_PER_SECOND


CHECKS = ((8, 2, 1, 4), (4, 4, 2, 4), (16, 1, 1, 4), (4, 2, 4, 3), (6, 2, 1, 8))  # heads, those of keys, groups, bits


def check(query_heads: int, kv_heads: int, groups: int, bits: int) -> str | None:
    """Uneven lengths, padding, sinks and a window, smoothing, against the reference. What went wrong, if anything."""
    g = torch.Generator(DEVICE).manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=DEVICE, generator=g)

    def packed() -> kv.PackedTokens:
        shape = (3, kv_heads, 1000)
        codes = torch.randint(0, 256, (*shape, DIM * bits // 8), dtype=torch.uint8, device=DEVICE, generator=g)
        steps = torch.rand((*shape, groups), device=DEVICE, generator=g) * 4 / 2**bits
        return kv.PackedTokens(codes, steps.half(), (normal(*shape, groups) - 1).half())

    seen = torch.rand(3, 20, device=DEVICE) > 0.3
    exact = kv.ExactTokens(normal(3, kv_heads, 20, DIM).to(DTYPE), normal(3, kv_heads, 20, DIM).to(DTYPE), seen)
    smoothing = kv.Smoothing(*(normal(kv_heads, DIM).abs() + 0.2 for _ in range(4)))
    last, first = torch.tensor([1000, 3, 517], device=DEVICE), torch.tensor([0, 3, 100], device=DEVICE)
    query, key, value = (normal(3, heads, DIM).to(DTYPE) for heads in (query_heads, kv_heads, kv_heads))
    arguments = (query, packed(), packed(), last, key, value, first, exact, smoothing)
    error = relative_error(kv.decode_attention(*arguments), reference.attention(*arguments))
    what = f"{query_heads} heads on {kv_heads}, {groups} groups, {bits} bits: relative error {error:.1e}"
    return None if error < TOLERANCE else f"WRONG: {what}"


def compile_one(job: tuple[Cut, int, bool]) -> str | None:
    """Fill Triton's cache, on a small cache of keys. What went wrong, if anything."""
    cut, kv_heads, turned = job
    case = Case.of(Point(32, kv_heads, 1024, 1, turned), 0)
    try:
        error = relative_error(case.call(replace(cut, splits=2))(), case.expected())
    except (triton.runtime.errors.OutOfResources, RuntimeError) as cause:
        return f"{cut}: {cause}"
    return None if error < TOLERANCE else f"WRONG: {cut}, {kv_heads} heads: {error}"


def compiled(kernels: tuple[Cut, ...], turned: bool) -> list[Cut]:
    """Those that work, all compiled at once, beside the checks."""
    jobs = [(cut, kv_heads, turned) for cut in kernels for _, kv_heads in HEADS]
    with ProcessPoolExecutor(COMPILERS, multiprocessing.get_context("spawn")) as pool:
        checks = [pool.submit(check, *case) for case in CHECKS]
        failures = list(pool.map(compile_one, jobs, chunksize=1))
        for failure in filter(None, [*failures, *(found.result() for found in checks)]):
            print(failure, flush=True)
    broken = {job[0] for job, failure in zip(jobs, failures, strict=True) if failure}
    return [cut for cut in kernels if cut not in broken]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--search", action="store_true", help="try several cuts at each point")
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    parser.add_argument("--before-rope", action="store_true", help="keys are stored before RoPE")
    options = parser.parse_args()

    warnings.filterwarnings("ignore", category=UserWarning)  # of backends that refuse
    began = time.perf_counter()
    known = TURNING if options.before_rope else KERNELS
    kernels = compiled(known if options.search else known[:1], options.before_rope)
    print(f"{time.perf_counter() - began:.0f} s to check and compile", flush=True)
    if not options.search:
        kernels = None
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, {DTYPE}, dim {DIM}")
    writes = {"x".join(map(str, shape)): write(*shape) for shape in WRITES}
    for shape, (time_taken, bound) in writes.items():
        print(f"writing {shape:>10} tokens: {time_taken:.1f} µs, bound {bound:.1f}", flush=True)
    print(
        f"{'heads':>6} {'context':>7} {'batch':>5} {'MB':>7} {'µs':>8} {'bf16':>9} {'by':>18} {'GB/s':>6} {'times':>6}"
    )
    rows = []
    for query_heads, kv_heads in HEADS:
        for context in CONTEXTS:
            for batch in BATCHES:
                row = measure(Point(query_heads, kv_heads, context, batch, options.before_rope), kernels)
                torch.cuda.empty_cache()
                if row is None:
                    continue
                rows.append(row)
                print(
                    f"{query_heads:>3}/{kv_heads:<2} {context:>7} {batch:>5} {row.megabytes:>7.1f} {row.ours:>8.1f} "
                    f"{row.baseline:>9.1f} {row.backend:>18} {row.gigabytes_per_second:>6.0f} {row.speedup:>6.2f}",
                    flush=True,
                )
                if options.json:
                    environment = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
                    record = environment | {
                        "triton": triton.__version__,
                        "writes": writes,
                        "rows": [asdict(row) for row in rows],
                    }
                    options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
