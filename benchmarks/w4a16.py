"""How long the weight-only matmul takes on the GPU of this machine, beside bf16 cuBLAS.

    python benchmarks/w4a16.py --json w4a16.json

Every kernel is first compared with the float64 reference, and nothing is timed that disagrees with it. A time is the
median over replays of a CUDA graph that calls the kernel once for each of several copies of the weight, so many that
together they exceed the L2 cache: each call finds its weight in memory, as in a model. `--search` times other tilings
than the built-in ones and prints the fastest of each kind, which is how the built-in ones are chosen.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median

import torch
import triton
from torch import Tensor

from halfbyte.kernels.w4a16 import reference, route, triton_gemv, triton_kernel
from halfbyte.kernels.w4a16.triton_gemv import Strip
from halfbyte.kernels.w4a16.triton_kernel import Tile
from halfbyte.packing import int32_words

DEVICE = "cuda"
DTYPE = torch.bfloat16
COPIES_BYTES = 200e6
REPLAYS = 20
GEMV_AT_MOST = 16
# what an H200 has been seen to sustain: the bound that times are compared with
BYTES_PER_SECOND = 4.4e12
OPERATIONS_PER_SECOND = 790e12

Matmul = Callable[[Tensor, "Weight"], Tensor]
Fastest = tuple[float, Tile | Strip | None]


@dataclass(frozen=True)
class Weight:
    packed: Tensor
    scales: Tensor
    zero_points: Tensor | None
    bits: int
    group_size: int
    dense: Tensor

    def copy(self) -> "Weight":
        zero_points = None if self.zero_points is None else self.zero_points.clone()
        return Weight(
            self.packed.clone(), self.scales.clone(), zero_points, self.bits, self.group_size, self.dense.clone()
        )

    def bytes(self) -> int:
        """What the quantized matmul has to read."""
        parts = (self.packed, self.scales, self.zero_points)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)


@dataclass(frozen=True)
class Row:
    """Times in microseconds."""

    outs: int
    ins: int
    tokens: int
    bits: int
    group_size: int
    asymmetric: bool
    cublas: float
    gemv: float | None
    tiles: float
    route: str
    speedup: float
    bound: float
    gigabytes_per_second: float
    teraflops: float
    searched: dict[str, Fastest]


def make_weight(outs: int, ins: int, bits: int, group_size: int, asymmetric: bool) -> Weight:
    g = torch.Generator(DEVICE).manual_seed(0)
    codes = torch.randint(0, 2**bits, (outs, ins), dtype=torch.uint8, device=DEVICE, generator=g)
    shape = (outs, ins // group_size)
    scales = torch.rand(shape, device=DEVICE, generator=g).add(0.1).div(16).to(DTYPE)
    zero_points = torch.randint(0, 2**bits, shape, dtype=torch.uint8, device=DEVICE, generator=g)
    dense = torch.randn(outs, ins, device=DEVICE, generator=g).to(DTYPE)
    packed = int32_words.pack(codes, bits)
    return Weight(packed, scales, zero_points if asymmetric else None, bits, group_size, dense)


def cublas(x: Tensor, weight: Weight) -> Tensor:
    return torch.nn.functional.linear(x, weight.dense)


def gemv(x: Tensor, weight: Weight, strip: Strip | None = None) -> Tensor:
    arguments = (weight.packed, weight.scales, weight.zero_points, weight.bits, weight.group_size)
    return triton_gemv.wna16_matmul(x, *arguments, strip=strip)


def tiles(x: Tensor, weight: Weight, tile: Tile | None = None) -> Tensor:
    arguments = (weight.packed, weight.scales, weight.zero_points, weight.bits, weight.group_size)
    return triton_kernel.wna16_matmul(x, *arguments, tile=tile)


def is_right(matmul: Matmul, x: Tensor, weight: Weight, expected: Tensor) -> bool:
    """The only rounding to bf16 is the result's."""
    error = (matmul(x, weight).double() - expected.double()).norm() / expected.double().norm()
    return float(error) <= torch.finfo(DTYPE).eps


def microseconds(matmul: Matmul, x: Tensor, copies: list[Weight]) -> float:
    """The median time of one call."""
    for weight in copies[:2]:
        matmul(x, weight)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for weight in copies:
            matmul(x, weight)
    times = []
    for _ in range(REPLAYS + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / len(copies))
    return median(times[2:])


def candidate_tiles(tokens: int, group_size: int) -> Iterator[Tile]:
    around = min(max(triton.next_power_of_2(tokens), 16), 128)
    rows = sorted({max(around // 2, 16), around, min(2 * around, 256)})
    few = tokens <= 32
    for block_m, block_n, block_k, warps, stages in product(
        rows, (16, 32, 64) if few else (64, 128, 256), (64, 128), (2, 4) if few else (4, 8), (4, 6) if few else (3, 4)
    ):
        if group_size % block_k == 0 and 2**9 <= block_m * block_n * 4 // warps <= 2**13:
            yield Tile(block_m, block_n, block_k, warps, stages)


def candidate_strips() -> Iterator[Strip]:
    for block_n, block_w, warps, stages in product((1, 2, 4, 8), (64, 128, 256), (1, 2, 4), (3, 5)):
        if 32 * warps <= block_n * block_w <= 256 * warps:
            yield Strip(block_n, block_w, warps, stages)


def fastest(kernel: Callable[..., Tensor], tilings: Iterator[Tile | Strip], x: Tensor, copies: list[Weight]) -> Fastest:
    """The fastest of the tilings that fit the chip and are right, with its time."""
    weight = copies[0]
    expected = expectation(x, weight)
    best: Fastest = (math.inf, None)
    for tiling in tilings:
        matmul = partial(call_with, kernel, tiling)
        try:
            if is_right(matmul, x, weight, expected):
                best = min(best, (microseconds(matmul, x, copies), tiling), key=lambda pair: pair[0])
            else:
                print(f"WRONG: {tiling}")
        except triton.runtime.errors.OutOfResources:
            continue
    return best


def call_with(kernel: Callable[..., Tensor], tiling: Tile | Strip, x: Tensor, weight: Weight) -> Tensor:
    return kernel(x, weight, tiling)


def expectation(x: Tensor, weight: Weight) -> Tensor:
    return reference.wna16_matmul(x, weight.packed, weight.scales, weight.zero_points, weight.bits, weight.group_size)


def measure(tokens: int, copies: list[Weight], dense_copies: list[Weight], search: bool) -> Row:
    weight = copies[0]
    outs, ins = weight.dense.shape
    x = torch.randn(tokens, ins, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(1)).to(DTYPE)
    expected = expectation(x, weight)
    for kernel in [tiles, gemv] if tokens <= GEMV_AT_MOST else [tiles]:
        if not is_right(kernel, x, weight, expected):
            raise SystemExit(f"{kernel.__name__} disagrees with the reference at {outs}x{ins}, {tokens} tokens")
    gemv_time = microseconds(gemv, x, copies) if tokens <= GEMV_AT_MOST else None
    tiles_time = microseconds(tiles, x, copies)
    cublas_time = microseconds(cublas, x, dense_copies)
    runs = route(DEVICE, tokens, weight.scales.shape[1], weight.bits, weight.group_size)
    ours = gemv_time if runs == "gemv" and gemv_time is not None else tiles_time
    moved, operations = weight.bytes() + 2 * tokens * (ins + outs), 2 * tokens * ins * outs
    searched: dict[str, Fastest] = {}
    if search:
        searched["tiles"] = fastest(tiles, candidate_tiles(tokens, weight.group_size), x, copies)
        if tokens <= GEMV_AT_MOST:
            searched["gemv"] = fastest(gemv, candidate_strips(), x, copies)
    return Row(
        outs, ins, tokens, weight.bits, weight.group_size, weight.zero_points is not None,
        cublas_time, gemv_time, tiles_time, runs, cublas_time / ours,
        1e6 * max(moved / BYTES_PER_SECOND, operations / OPERATIONS_PER_SECOND),
        moved / ours / 1e3, operations / ours / 1e6, searched,
    )  # fmt: skip


HEADER = (
    f"{'out x in':>12} {'tokens':>6} {'cuBLAS':>9} {'gemv':>9} {'tiles':>9} {'route':>6} {'speed-up':>8} {'bound':>9} "
    f"{'GB/s':>6} {'TFLOP/s':>7}   times in µs"
)


def line(row: Row) -> str:
    gemv_time = "-" if row.gemv is None else f"{row.gemv:.1f}"
    text = (
        f"{f'{row.outs}x{row.ins}':>12} {row.tokens:>6} {row.cublas:>9.1f} {gemv_time:>9} {row.tiles:>9.1f} "
        f"{row.route:>6} {row.speedup:>7.2f}x {row.bound:>9.1f} {row.gigabytes_per_second:>6.0f} {row.teraflops:>7.1f}"
    )
    for kernel, (time, tiling) in row.searched.items():
        text += f"\n{'':>12} best {kernel}: {time:.1f} µs with {tiling}"
    return text


def rotated(weight: Weight, size: float) -> list[Weight]:
    """The weight and copies of it, of `size` bytes each, that exceed the L2 cache together."""
    return [weight, *(weight.copy() for _ in range(max(1, math.ceil(COPIES_BYTES / size) - 1)))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="4096x4096,22016x4096,4096x11008", help="out x in of the weights")
    parser.add_argument("--tokens", default="1,16,64,256,1024,4096")
    parser.add_argument("--bits", type=int, default=4, choices=(4, 8))
    parser.add_argument("--group-size", type=int, default=128, help="0: one scale per output")
    parser.add_argument("--asymmetric", action="store_true", help="with zero points")
    parser.add_argument("--search", action="store_true", help="time other tilings too: minutes")
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    options = parser.parse_args()

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, {DTYPE}")
    print(f"{options.bits} bits, group size {options.group_size}, {'a' if options.asymmetric else ''}symmetric")
    print(HEADER)
    rows = []
    for shape in options.shapes.split(","):
        outs, ins = map(int, shape.split("x"))
        weight = make_weight(outs, ins, options.bits, options.group_size or ins, options.asymmetric)
        copies = rotated(weight, weight.bytes())
        dense_copies = copies[: max(2, math.ceil(COPIES_BYTES / (2 * outs * ins)))]
        for tokens in map(int, options.tokens.split(",")):
            rows.append(measure(tokens, copies, dense_copies, options.search))
            print(line(rows[-1]), flush=True)
        if options.json:
            environment = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
            environment["triton"] = triton.__version__
            record = environment | {"rows": [asdict(row) for row in rows]}
            options.json.write_text(json.dumps(record, indent=1, default=repr) + "\n")


if __name__ == "__main__":
    main()
