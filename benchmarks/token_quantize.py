"""How long per-token quantization takes on the GPU of this machine, alone and fused, beside copying as many bytes.

    python benchmarks/token_quantize.py --json token_quantize.json

Every kernel is first compared with the float64 reference: no code may be more than one step off, and hardly any may be
off at all. A time is the median over replays of a CUDA graph that calls the kernel on inputs and outputs which exceed
the L2 cache together. Only necessary bytes are counted: inputs read once, codes, scales and sums written once.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
import triton
from torch import Tensor

from halfbyte.kernels import token_quantize as tq
from halfbyte.kernels.token_quantize import reference

DEVICE = "cuda"
DTYPE = torch.bfloat16
SETS_BYTES = 250e6
REPLAYS = 15
EPSILON = 1e-5
CHECKED_TOKENS = 256
# where the operator before it rounds to bf16, its own error in float32 moves some values over to the next bf16, and
# such a step is up to half a code
MOST_CODES_OFF = 1e-3


@dataclass(frozen=True)
class Case:
    """`inputs` and `outputs` are bytes for each element of the codes."""

    name: str
    run: Callable[[Tensor, Tensor, Tensor], object]
    expected: Callable[[Tensor, Tensor, Tensor], Tensor]
    inputs: int = 2
    outputs: int = 1
    symmetric: bool = True
    wide: int = 1


@dataclass(frozen=True)
class Row:
    name: str
    tokens: int
    ins: int
    microseconds: float
    gigabytes_per_second: float
    share_of_copy: float


def rounded(y: Tensor) -> Tensor:
    return y.to(DTYPE)


def silu_mul(x: Tensor, _: Tensor, __: Tensor) -> Tensor:
    gate, up = x.double().chunk(2, dim=1)
    return rounded(rounded(gate * gate.sigmoid()).double() * up)


SCALE = 0.03
CASES = (
    Case("quantize_tokens", lambda x, _, __: tq.quantize_tokens(x), lambda x, _, __: x),
    Case(
        "quantize_tokens, asymmetric",
        lambda x, _, __: tq.quantize_tokens(x, False),
        lambda x, _, __: x,
        symmetric=False,
    ),
    Case(
        "rms_norm_quantize",
        lambda x, _, w: tq.rms_norm_quantize(x, w, EPSILON)[0],
        lambda x, _, w: rounded(reference.norm(x, w, None, EPSILON, False)),
    ),
    Case(
        "rms_norm_quantize, residual",
        lambda x, r, w: tq.rms_norm_quantize(x, w, EPSILON, r)[0],
        lambda x, r, w: rounded(reference.norm(x + r, w, None, EPSILON, False)),
        inputs=4,
        outputs=3,
    ),
    Case(
        "layer_norm_quantize",
        lambda x, _, w: tq.layer_norm_quantize(x, w, w, EPSILON)[0],
        lambda x, _, w: rounded(reference.norm(x, w, w, EPSILON, True)),
    ),
    Case(
        "layer_norm_quantize, residual",
        lambda x, r, w: tq.layer_norm_quantize(x, w, w, EPSILON, r)[0],
        lambda x, r, w: rounded(reference.norm(x + r, w, w, EPSILON, True)),
        inputs=4,
        outputs=3,
    ),
    Case("gelu_quantize", lambda x, _, __: tq.gelu_quantize(x), lambda x, _, __: rounded(reference.gelu(x, "none"))),
    Case(
        "gelu_quantize, tanh",
        lambda x, _, __: tq.gelu_quantize(x, approximate="tanh"),
        lambda x, _, __: rounded(reference.gelu(x, "tanh")),
    ),
    Case("silu_mul_quantize", lambda x, _, __: tq.silu_mul_quantize(x), silu_mul, inputs=4, wide=2),
)


def check(case: Case, x: Tensor, residual: Tensor, weight: Tensor) -> None:
    """SystemExit unless codes and scales are those of the reference."""
    x, residual = x[:CHECKED_TOKENS], residual[:CHECKED_TOKENS]
    found = case.run(x, residual, weight)
    assert isinstance(found, tq.QuantizedTokens)
    codes, scales, _ = reference.quantize(case.expected(x, residual, weight), case.symmetric)
    off = (found.codes.int() - codes.int()).abs()
    if (
        off.max() > 1
        or (off > 0).double().mean() > MOST_CODES_OFF
        or not torch.allclose(found.scales, scales, rtol=5e-3)
    ):
        raise SystemExit(
            f"{case.name} disagrees with the reference at {list(x.shape)}: codes off by {int(off.max())}, "
            f"{float((off > 0).double().mean()):.1e} of them"
        )


def microseconds(calls: list[Callable[[], object]]) -> float:
    """The median time of one call. Outputs are kept, so that no call writes where another has."""
    calls[0]()
    torch.cuda.synchronize()
    graph, kept = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        kept.extend(call() for call in calls)
    times = []
    for _ in range(REPLAYS + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / len(calls))
    return median(times[2:])


def copy_bandwidth() -> float:
    """Bytes a second, read and written."""
    source, target = (torch.empty(2**29, dtype=DTYPE, device=DEVICE).normal_() for _ in range(2))
    times = []
    for _ in range(REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return 2e3 * source.nbytes / median(times)


def measure(case: Case, tokens: int, ins: int, bandwidth: float) -> Row:
    moved = tokens * ins * (case.inputs + case.outputs)
    sets = max(2, round(SETS_BYTES / moved))
    g = torch.Generator(DEVICE).manual_seed(0)
    xs, residuals = (
        [torch.randn(tokens, case.wide * ins, device=DEVICE, generator=g).to(DTYPE) for _ in range(sets)]
        for _ in range(2)
    )
    weight = torch.randn(ins, device=DEVICE, generator=g).to(DTYPE)
    check(case, xs[0], residuals[0], weight)
    time = microseconds([partial(case.run, x, residual, weight) for x, residual in zip(xs, residuals, strict=True)])
    return Row(case.name, tokens, ins, time, moved / time / 1e3, 1e6 * moved / time / bandwidth)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="8192x4096,8192x8192,16384x4096,8192x11008", help="tokens x in")
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    options = parser.parse_args()

    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, {DTYPE}")
    print(f"a copy moves {bandwidth / 1e9:.0f} GB/s, read and written")
    print(f"{'':>30} {'tokens x in':>12} {'µs':>8} {'GB/s':>6} {'of a copy':>9}")
    rows = []
    for shape in options.shapes.split(","):
        tokens, ins = map(int, shape.split("x"))
        for case in CASES:
            row = measure(case, tokens, ins, bandwidth)
            rows.append(row)
            print(
                f"{row.name:>30} {shape:>12} {row.microseconds:>8.1f} {row.gigabytes_per_second:>6.0f} "
                f"{row.share_of_copy:>8.0%}",
                flush=True,
            )
    if options.json:
        environment = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
        record = environment | {"copy": bandwidth, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
