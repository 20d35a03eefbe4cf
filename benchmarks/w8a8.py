"""How long the int8 matmul takes on the GPU of this machine, beside what else multiplies there.

    python benchmarks/w8a8.py --json w8a8.json

    bf16      cuBLAS, through F.linear
    int_mm    cuBLAS on int8, through torch._int_mm: 32-bit sums without scales; below 17 tokens it is given 17
    fp8       cuBLAS on float8_e4m3fn with a scale per token and output, through torch._scaled_mm
    ours      the op's kernel, scales included: the route that the op takes

Ours is first compared with the float64 reference, and nothing is timed that disagrees with it. A time is the median over
replays of a CUDA graph that calls the kernel once for each of several copies of the weight, so many that together they
exceed the L2 cache: each call finds its weight in memory, as in a model. `--search` times other cuts than the built-in
ones and prints the fastest of each kind, which is how the built-in ones are chosen.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median

import torch
import triton
from torch import Tensor

from halfbyte.kernels.w8a8 import int8_matmul, reference, route, triton_gemv, triton_hopper, triton_tiles
from halfbyte.kernels.w8a8.tiling import Cut
from halfbyte.kernels.w8a8.triton_gemv import Strip
from halfbyte.kernels.w8a8.triton_tiles import Tile

DEVICE = "cuda"
DTYPE = torch.bfloat16
COPIES_BYTES = 200e6
REPLAYS = 20
WARM_UP = 0.03  # seconds of replays before: clocks rise with the load
CHECKED_TOKENS = 300  # in float64, more would take longer than what is timed
SHAPES = "4096x4096,4096x11008,11008x4096,22016x4096,4096x22016,28672x8192,8192x28672"
# what an H200 has been seen to sustain: the bound that times are compared with
BYTES_PER_SECOND = 4.4e12
OPERATIONS_PER_SECOND = 1500e12

Matmul = Callable[[Tensor], Tensor]  # of a copy of the weight
Fastest = tuple[float, Strip | Tile | Cut | None]


@dataclass(frozen=True)
class Row:
    """Times in microseconds; a speed-up is of `ours`."""

    outs: int
    ins: int
    tokens: int
    bf16: float
    int_mm: float
    fp8: float
    ours: float
    route: str
    over_bf16: float
    over_int_mm: float
    over_fp8: float
    bound: float
    gigabytes_per_second: float
    teraops: float
    searched: dict[str, Fastest]


@dataclass(frozen=True)
class Inputs:
    """Activations of one number of tokens, and what goes with every copy of the weight."""

    x: Tensor
    x_scales: Tensor
    weight_scales: Tensor


def codes(rows: int, columns: int, seed: int) -> Tensor:
    g = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randint(-128, 128, (rows, columns), dtype=torch.int8, device=DEVICE, generator=g)


def scales(count: int, seed: int) -> Tensor:
    return torch.rand(count, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(seed)).add(0.1).div(64)


def ours(inputs: Inputs, weight: Tensor) -> Tensor:
    return int8_matmul(inputs.x, inputs.x_scales, weight, inputs.weight_scales)


def with_strip(inputs: Inputs, strip: Strip, weight: Tensor) -> Tensor:
    return triton_gemv.int8_matmul(inputs.x, inputs.x_scales, weight, inputs.weight_scales, strip=strip)


def with_tile(inputs: Inputs, tile: Tile, weight: Tensor) -> Tensor:
    return triton_tiles.int8_matmul(inputs.x, inputs.x_scales, weight, inputs.weight_scales, tile=tile)


def with_cut(inputs: Inputs, cut: Cut, weight: Tensor) -> Tensor:
    return triton_hopper.int8_matmul(inputs.x, inputs.x_scales, weight, inputs.weight_scales, cut=cut)


def is_right(matmul: Matmul, inputs: Inputs, weight: Tensor) -> bool:
    """The only rounding to bf16 is the result's. Where there are many tokens, the first and the last are compared."""
    y = matmul(weight)
    tokens = len(inputs.x)
    for some in (slice(0, CHECKED_TOKENS), slice(max(0, tokens - CHECKED_TOKENS), tokens)):
        expected = reference.int8_matmul(inputs.x[some], inputs.x_scales[some], weight, inputs.weight_scales)
        if (
            not float((y[some].double() - expected.double()).norm() / expected.double().norm())
            <= torch.finfo(DTYPE).eps
        ):
            return False
    return True


def microseconds(matmul: Matmul, copies: list[Tensor]) -> float:
    """The median time of one call."""
    for weight in copies[:2]:
        matmul(weight)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for weight in copies:
            matmul(weight)
    warm = time.perf_counter() + WARM_UP
    while time.perf_counter() < warm:
        graph.replay()
        torch.cuda.synchronize()
    times = []
    for _ in range(REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / len(copies))
    return median(times)


def candidate_strips() -> Iterator[Strip]:
    for block_n, block_w, warps in product((1, 2, 4, 8), (128, 256, 512, 1024), (1, 2, 4, 8)):
        if 4 * 32 * warps <= block_n * block_w <= 16 * 32 * warps:
            yield Strip(block_n, block_w, warps)


def candidate_tiles(tokens: int) -> Iterator[Tile]:
    block_m = min(max(triton.next_power_of_2(tokens), 16), 64)
    for block_n, block_k, warps, stages in product((16, 32, 64, 128), (128, 256, 512), (2, 4, 8), (3, 4, 5, 6)):
        if (block_m + block_n) * block_k * stages <= 200_000 and 16 * warps <= block_m + block_n <= 64 * warps:
            yield Tile(block_m, block_n, block_k, warps, stages)


def candidate_cuts(tokens: int) -> Iterator[Cut]:
    """As deep as shared memory allows: 227 KiB, of which the results take 8 KiB for a warpgroup."""
    for warpgroups, block_n, block_k in product((1, 2, 3), (32, 64, 128, 256), (64, 128, 256)):
        stages = (232_000 - 8192 * warpgroups) // ((64 * warpgroups + block_n) * block_k)
        if stages >= 3 and 64 * (warpgroups - 1) < tokens:
            yield Cut(warpgroups, block_n, block_k, min(stages, 12))


def fastest(
    kernel: Callable[..., Tensor], cuts: Iterator[Strip | Tile | Cut], inputs: Inputs, copies: list[Tensor]
) -> Fastest:
    """The fastest of the cuts that fit the chip and are right, with its time."""
    best: Fastest = (math.inf, None)
    for cut in cuts:
        matmul = partial(kernel, inputs, cut)
        try:
            if is_right(matmul, inputs, copies[0]):
                best = min(best, (microseconds(matmul, copies), cut), key=lambda pair: pair[0])
            else:
                print(f"WRONG: {cut}")
        except triton.runtime.errors.OutOfResources:
            continue
    return best


def measure(x: Tensor, weight_scales: Tensor, copies: list[Tensor], dense_copies: list[Tensor], search: bool) -> Row:
    (tokens, ins), outs = x.shape, copies[0].shape[0]
    inputs = Inputs(x, scales(tokens, seed=3), weight_scales)
    if not is_right(partial(ours, inputs), inputs, copies[0]):
        raise SystemExit(f"ours disagrees with the reference at {outs}x{ins}, {tokens} tokens")
    own = microseconds(partial(ours, inputs), copies)

    enough = torch.nn.functional.pad(x, (0, 0, 0, max(0, 32 - tokens)))  # _int_mm wants more than 16
    int_mm = microseconds(lambda weight: torch._int_mm(enough, weight.T), copies)
    # without the bit of 4 no code is NaN
    x_fp8, fp8_copies = (x & -5).view(torch.float8_e4m3fn), [(w & -5).view(torch.float8_e4m3fn) for w in copies]
    a, b = inputs.x_scales[:, None], weight_scales[None, :]
    fp8 = microseconds(
        lambda weight: torch._scaled_mm(x_fp8, weight.T, a, b, out_dtype=DTYPE, use_fast_accum=True), fp8_copies
    )
    x_bf16 = torch.randn(tokens, ins, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(4)).to(DTYPE)
    bf16 = microseconds(lambda weight: torch.nn.functional.linear(x_bf16, weight), dense_copies)

    searched: dict[str, Fastest] = {}
    if search and tokens == 1:
        searched["gemv"] = fastest(with_strip, candidate_strips(), inputs, copies)
    if search and tokens <= 64:
        searched["tiles"] = fastest(with_tile, candidate_tiles(tokens), inputs, copies)
    if search and tokens > 16:
        searched["hopper"] = fastest(with_cut, candidate_cuts(tokens), inputs, copies)
    moved, operations = outs * ins + tokens * (ins + 2 * outs), 2 * tokens * ins * outs
    runs = route(DEVICE, x, copies[0], DTYPE, torch.cuda.get_device_capability())
    return Row(
        outs, ins, tokens, bf16, int_mm, fp8, own, runs, bf16 / own, int_mm / own, fp8 / own,
        1e6 * max(moved / BYTES_PER_SECOND, operations / OPERATIONS_PER_SECOND),
        moved / own / 1e3, operations / own / 1e6, searched,
    )  # fmt: skip


HEADER = (
    f"{'out x in':>12} {'tokens':>6} {'bf16':>8} {'int_mm':>8} {'fp8':>8} {'ours':>8} {'bound':>8} {'route':>6} "
    f"{'/bf16':>6} {'/int_mm':>7} {'/fp8':>6} {'GB/s':>6} {'TOP/s':>6}   times in µs"
)


def line(row: Row) -> str:
    text = (
        f"{f'{row.outs}x{row.ins}':>12} {row.tokens:>6} {row.bf16:>8.1f} {row.int_mm:>8.1f} {row.fp8:>8.1f} "
        f"{row.ours:>8.1f} {row.bound:>8.1f} {row.route:>6} {row.over_bf16:>5.2f}x {row.over_int_mm:>6.2f}x "
        f"{row.over_fp8:>5.2f}x {row.gigabytes_per_second:>6.0f} {row.teraops:>6.0f}"
    )
    for kernel, (best, cut) in row.searched.items():
        text += f"\n{'':>12} best {kernel}: {best:.1f} µs with {cut}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=SHAPES, help="out x in of the weights")
    parser.add_argument("--tokens", default="1,4,16,32,64,128,256,512,1024,2048,4096,8192")
    parser.add_argument("--search", action="store_true", help="time other cuts too: many minutes")
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    options = parser.parse_args()

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, to {DTYPE}")
    print(HEADER)
    rows = []
    for shape in options.shapes.split(","):
        outs, ins = map(int, shape.split("x"))
        weight, weight_scales = codes(outs, ins, seed=1), scales(outs, seed=2)
        copies = [weight, *(weight.clone() for _ in range(max(1, math.ceil(COPIES_BYTES / weight.numel()) - 1)))]
        g = torch.Generator(DEVICE).manual_seed(5)
        count = max(2, math.ceil(COPIES_BYTES / (2 * weight.numel())))
        dense_copies = [torch.randn(outs, ins, device=DEVICE, dtype=DTYPE, generator=g) for _ in range(count)]
        for tokens in map(int, options.tokens.split(",")):
            rows.append(measure(codes(tokens, ins, seed=6), weight_scales, copies, dense_copies, options.search))
            print(line(rows[-1]), flush=True)
        if options.json:
            environment = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
            environment["triton"] = triton.__version__
            record = environment | {"rows": [asdict(row) for row in rows]}
            options.json.write_text(json.dumps(record, indent=1, default=repr) + "\n")


if __name__ == "__main__":
    main()
