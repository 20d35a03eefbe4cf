"""How fast columns are solved on CUDA: one segment by the kernel, and whole weights with their Cholesky factor.

    python benchmarks/columns.py --json columns.json

Segments are timed inside a CUDA graph (what the GPU does) and as calls (what a loop in Python sees). The kernel must
agree with the reference first: a red kernel is not timed.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from halfbyte.methods.gptq import damped, error_spread
from halfbyte.solvers import columns
from halfbyte.solvers.columns import Segment, reference, round_columns, triton_kernel

LAUNCHES = 10  # in a CUDA graph, so that starting it weighs little
NEAR_TIE = 1e-4  # in steps of the grid: where the two sides of a tie are both right
SEGMENT_SHAPES = [(4096, 128), (11008, 128), (4096, 64), (4096, 32)]
LAUNCH_SHAPES = [(8, 1), (16, 2), (32, 4), (64, 8), (16, 1), (32, 2), (8, 2), (16, 4), (32, 8)]
WEIGHT_SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008)]
WHOLE_OPTIONS = [
    (128, 128, False),
    (128, 512, False),
    (128, 1024, False),
    (128, 512, True),
    (32, 32, False),
    (32, 512, False),
]


class Case(NamedTuple):
    """The arguments of one segment."""

    weight: Tensor
    spread: Tensor
    scales: Tensor
    zero_points: Tensor
    low: int
    high: int


def hessian(width: int) -> Tensor:
    """Of correlated inputs, damped as GPTQ damps it."""
    inputs = torch.randn(2 * width, width, device="cuda")
    inputs += 2 * inputs[:, :1]
    return damped(inputs.T @ inputs, 0.01)


def segment_case(outs: int, width: int) -> Case:
    """A 4-bit asymmetric segment, with a scale and a zero point of its own for every element."""
    weight = torch.randn(outs, width, device="cuda")
    scales = torch.rand(outs, width, device="cuda") * 0.2 + 0.2
    zero_points = torch.randint(5, 11, (outs, width), device="cuda").float()
    return Case(weight, error_spread(hessian(width)), scales, zero_points, 0, 15)


def refuse_if_wrong(result: Segment, expected: Segment, case: Case) -> int:
    """The number of codes that differ; exits if a row departs from the reference anywhere but beside a tie."""
    differing = result.codes != expected.codes
    first = differing & (differing.cumsum(1) == 1)
    current = expected.rounded + expected.errors * case.spread.diagonal()
    position = current / case.scales + case.zero_points
    from_tie = (position - position.floor() - 0.5).abs()[first]
    if from_tie.numel() and from_tie.max() >= NEAR_TIE:
        sys.exit(f"the kernel is wrong: {int(differing.sum())} codes differ, {float(from_tie.max()):.3g} from a tie")
    return int(differing.sum())


def event_times(run: Callable[[], Any], rounds: int) -> list[float]:
    """Microseconds by CUDA events, one at a time, after two runs that warm up."""
    times = []
    for _ in range(rounds + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return times[2:]


def on_the_gpu(run: Callable[[], Any], rounds: int) -> float:
    """Median microseconds of one run, without the time that Python needs to start it."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(LAUNCHES):
            run()
    return statistics.median(event_times(graph.replay, rounds)) / LAUNCHES


def as_called(run: Callable[[], Any], rounds: int) -> float:
    """Microseconds of one run in a loop of `rounds`, as the host's clock sees it."""
    run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(rounds):
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / rounds * 1e6


def time_segments(rounds: int) -> list[dict[str, Any]]:
    """Every shape with every launch shape, the scales as large as the weight; then with one scale a row."""
    rows = []
    for outs, width in SEGMENT_SHAPES:
        case = segment_case(outs, width)
        one_scale = case._replace(
            scales=case.scales[:, :1].expand_as(case.weight), zero_points=case.zero_points[:, :1].expand_as(case.weight)
        )
        expected, expected_one = reference.round_segment(*case), reference.round_segment(*one_scale)
        eager = statistics.median(event_times(lambda case=case: reference.round_segment(*case), 3))
        megabytes = (6 * 4 + 1) * outs * width / 1e6  # weight, scales, zeros, rounded, errors, and the codes' byte
        for block_rows, warps in LAUNCH_SHAPES:

            def run(case=case, block_rows=block_rows, warps=warps) -> Segment:
                return triton_kernel.round_segment(*case, block_rows=block_rows, warps=warps)

            differing = refuse_if_wrong(run(), expected, case)
            differing += refuse_if_wrong(run(one_scale), expected_one, one_scale)
            gpu = on_the_gpu(run, rounds)
            row = {
                "outs": outs, "width": width, "block_rows": block_rows, "warps": warps,
                "gpu_us": gpu, "one_scale_a_row_gpu_us": on_the_gpu(lambda run=run, case=one_scale: run(case), rounds),
                "call_us": as_called(run, rounds), "ns_per_column": gpu / width * 1e3,
                "gigabytes_per_s": megabytes / gpu * 1e3, "eager_reference_us": eager, "codes_that_differ": differing,
            }  # fmt: skip
            rows.append(row)
            print_row(row)
    return rows


def min_max_grid(_start: int, _stop: int, current: Tensor) -> tuple[Tensor, Tensor | None]:
    """4 bits, asymmetric, one group a segment."""
    least, most = current.amin(1, keepdim=True).clamp(max=0), current.amax(1, keepdim=True).clamp(min=0)
    scales = ((most - least) / 15).clamp(min=1e-8)
    return scales.expand_as(current), torch.round(-least / scales).expand_as(current)


def time_weights(rounds: int) -> list[dict[str, Any]]:
    """Whole weights: the Cholesky factor, the columns, and both."""
    rows = []
    for outs, ins in WEIGHT_SHAPES:
        weight, matrix = torch.randn(outs, ins, device="cuda"), hessian(ins)
        spread = error_spread(matrix)
        cholesky = statistics.median(event_times(lambda matrix=matrix: error_spread(matrix), rounds))
        for segment, batch, tf32 in WHOLE_OPTIONS:
            columns.BATCH = batch

            def run(weight=weight, spread=spread, segment=segment, tf32=tf32) -> Tensor:
                return round_columns(weight, spread, min_max_grid, segment, 0, 15, tf32=tf32).loss

            solve = statistics.median(event_times(run, rounds))
            # the products alone: a column's error reaches each later column once
            teraflops = outs * ins * (ins - segment) / solve / 1e6
            row = {
                "outs": outs, "ins": ins, "segment": segment, "batch": batch, "tf32": tf32,
                "cholesky_ms": cholesky / 1e3, "columns_ms": solve / 1e3, "total_ms": (cholesky + solve) / 1e3,
                "teraflops": teraflops, "loss": float(run().sum()),
            }  # fmt: skip
            rows.append(row)
            print_row(row)
    return rows


def print_row(row: dict[str, Any]) -> None:
    print(
        "  ".join(
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the numbers are written to")
    parser.add_argument("--rounds", type=int, default=20, help="timings that a median is taken of")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("these timings need a CUDA device, and torch sees none")
    torch.manual_seed(0)
    record = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        "dtype": "float32", "median_of": options.rounds,
        "segments": time_segments(options.rounds), "weights": time_weights(max(3, options.rounds // 4)),
    }  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
