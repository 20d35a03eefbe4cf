"""How long LLM.int8() takes on the GPU of this machine, beside bf16 cuBLAS and bitsandbytes where that is installed.

    python benchmarks/llm_int8.py --json llm_int8.json

Each way of computing is first compared with the float64 reference, and nothing is timed that disagrees with it. Ours and
cuBLAS are timed by replaying a CUDA graph that goes through several copies of the weight, so many that together they
exceed the L2 cache; quantization of the activations is part of ours. bitsandbytes looks at its outliers on the host and
cannot be captured: its time is that of eager calls, one after the other.
"""

import argparse
import importlib.util
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
import triton
from torch import Tensor

from halfbyte.kernels import llm_int8
from halfbyte.kernels.llm_int8 import StaticOutliers, reference

DEVICE = "cuda"
DTYPE = torch.bfloat16
THRESHOLD = 6.0
OUTLIER_COLUMNS = 0.001
OUTLIER_TOKENS = 0.75  # of the tokens have an outlier in such a column, as the paper counts them
COPIES_BYTES = 250e6
REPLAYS = 15
EAGER_CALLS = 20
INT8_ERROR = 0.03  # of normal weights and activations, relative to exact ones


@dataclass(frozen=True)
class Weight:
    codes: Tensor
    scales: Tensor
    dense: Tensor
    outliers: StaticOutliers

    def copy(self) -> "Weight":
        outliers = StaticOutliers(self.outliers.columns, self.outliers.weight.clone(), self.outliers.is_outlier)
        return Weight(self.codes.clone(), self.scales, self.dense.clone(), outliers)


@dataclass(frozen=True)
class Row:
    """Times in microseconds."""

    outs: int
    ins: int
    tokens: int
    cublas: float
    vectorwise: float
    dynamic: float
    kept: float
    static: float
    bitsandbytes: float | None


def make_weight(outs: int, ins: int, columns: Tensor) -> Weight:
    g = torch.Generator(DEVICE).manual_seed(0)
    weight = torch.randn(outs, ins, device=DEVICE, generator=g) / math.sqrt(ins)
    scales = weight.abs().amax(dim=1) / 127
    codes = (weight / scales[:, None]).round_().to(torch.int8)
    dense = weight.to(DTYPE)
    return Weight(codes, scales, dense, llm_int8.static_outliers(columns, dense[:, columns], ins))


def make_tokens(tokens: int, ins: int, columns: Tensor) -> Tensor:
    g = torch.Generator(DEVICE).manual_seed(1)
    x = torch.randn(tokens, ins, device=DEVICE, generator=g).clamp_(-5, 5)
    hit = torch.rand(tokens, len(columns), device=DEVICE, generator=g) < OUTLIER_TOKENS
    hit[0] = True
    x[:, columns] = torch.where(hit, 20 * x[:, columns].sign() + x[:, columns], x[:, columns])
    return x.to(DTYPE)


Matmul = Callable[[Tensor, Weight], Tensor]


def cublas(x: Tensor, weight: Weight) -> Tensor:
    return torch.nn.functional.linear(x, weight.dense)


def vectorwise(x: Tensor, weight: Weight) -> Tensor:
    return llm_int8.llm_int8_matmul(x, weight.codes, weight.scales, 0.0)


def dynamic(scratch: Tensor, x: Tensor, weight: Weight) -> Tensor:
    return llm_int8.llm_int8_matmul(x, weight.codes, weight.scales, THRESHOLD, scratch=scratch)


def kept(scratch: Tensor, x: Tensor, weight: Weight) -> Tensor:
    return llm_int8.llm_int8_matmul(x, weight.codes, weight.scales, THRESHOLD, weight.dense, scratch=scratch)


def static(x: Tensor, weight: Weight) -> Tensor:
    return llm_int8.static_outlier_matmul(x, weight.codes, weight.scales, weight.outliers)


def check(name: str, y: Tensor, expected: Tensor, most: float = torch.finfo(DTYPE).eps) -> None:
    """SystemExit on an error above `most`: of ours, roundings to bf16 of the result and of the outliers' residuals."""
    error = float((y.double() - expected.double()).norm() / expected.double().norm())
    if not error <= most:
        raise SystemExit(f"{name} disagrees with the reference at {list(y.shape)}: relative error {error:.1e}")


def microseconds(matmul: Matmul, x: Tensor, copies: list[Weight]) -> float:
    """The median time of one call."""
    matmul(x, copies[0])
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


def bitsandbytes_microseconds(x: Tensor, weight: Weight) -> float | None:
    """The time of one of many eager calls of its layer, in float16, which it computes in; None where it is missing."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return None
    import bitsandbytes as bnb

    outs, ins = weight.codes.shape
    layer = bnb.nn.Linear8bitLt(ins, outs, bias=False, has_fp16_weights=False, threshold=THRESHOLD)
    layer.weight = bnb.nn.Int8Params(weight.dense.half().cpu(), has_fp16_weights=False, requires_grad=False)
    layer, x = layer.to(DEVICE), x.half()
    check("bitsandbytes", layer(x), torch.nn.functional.linear(x, weight.dense.half()), INT8_ERROR)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(EAGER_CALLS):
        layer(x)
    torch.cuda.synchronize()
    return 1e6 * (time.perf_counter() - start) / EAGER_CALLS


def measure(tokens: int, copies: list[Weight], columns: Tensor) -> Row:
    weight = copies[0]
    outs, ins = weight.codes.shape
    x = make_tokens(tokens, ins, columns)
    scratch = llm_int8.outlier_scratch(ins, DEVICE)
    ways: dict[str, Matmul] = {
        "vectorwise": vectorwise,
        "dynamic": partial(dynamic, scratch),
        "kept": partial(kept, scratch),
        "static": static,
    }
    arguments = (x, weight.codes, weight.scales)
    expected = {
        "vectorwise": reference.llm_int8_matmul(*arguments, 0.0),
        "dynamic": reference.llm_int8_matmul(*arguments, THRESHOLD),
        "kept": reference.llm_int8_matmul(*arguments, THRESHOLD, weight.dense),
        "static": reference.static_outlier_matmul(*arguments, columns, weight.dense[:, columns]),
    }
    for name, matmul in ways.items():
        check(name, matmul(x, weight), expected[name])
    times = {name: microseconds(matmul, x, copies) for name, matmul in ways.items()}
    return Row(
        outs, ins, tokens, microseconds(cublas, x, copies), **times, bitsandbytes=bitsandbytes_microseconds(x, weight)
    )


def line(row: Row) -> str:
    text = f"{f'{row.outs}x{row.ins}':>12} {row.tokens:>6} {row.cublas:>8.1f}"
    for ours in (row.vectorwise, row.dynamic, row.kept, row.static):
        text += f" {ours:>8.1f} {row.cublas / ours:>5.2f}x"
    return text + (f" {row.bitsandbytes:>8.0f}" if row.bitsandbytes else f" {'-':>8}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes", default="22016x4096,4096x11008,11008x4096,28672x8192", help="out x in of the weights"
    )
    parser.add_argument("--tokens", default="1,16,64,256,1024,4096,8192")
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    options = parser.parse_args()

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, {DTYPE}, µs")
    print(
        f"{'out x in':>12} {'tokens':>6} {'cuBLAS':>8} {'vectorwise':>15} {'dynamic':>15} {'kept':>15} {'static':>15} {'bnb':>8}"
    )
    rows = []
    for shape in options.shapes.split(","):
        outs, ins = map(int, shape.split("x"))
        g = torch.Generator(DEVICE).manual_seed(2)
        columns = torch.randperm(ins, device=DEVICE, generator=g)[: max(1, round(OUTLIER_COLUMNS * ins))].sort().values
        weight = make_weight(outs, ins, columns)
        copies = [weight, *(weight.copy() for _ in range(max(1, math.ceil(COPIES_BYTES / (outs * ins)) - 1)))]
        for tokens in map(int, options.tokens.split(",")):
            rows.append(measure(tokens, copies, columns))
            print(line(rows[-1]), flush=True)
        del weight, copies
    if options.json:
        environment = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
        options.json.write_text(json.dumps(environment | {"rows": [asdict(row) for row in rows]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
