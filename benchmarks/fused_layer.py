"""How long one transformer layer takes on the GPU of this machine: in fp16, and in int8 with and without fusing.

    python benchmarks/fused_layer.py --json fused_layer.json

    fp16 eager       the layer of transformers, scaled-dot-product attention
    fp16 compiled    the same through torch.compile, replayed from a CUDA graph
    int8 apart       its linears as IntegerLinear, from a CUDA graph
    int8 eager       fused (halfbyte.runtime.fused)
    int8 graph       fused, from a CUDA graph
    int8 compiled    fused, through torch.compile, from a CUDA graph: what torch leaves between the kernels is compiled

Weights are random. Fused is first compared with apart, and nothing is timed that disagrees. A time is the median over
runs through several layers in a row, which together exceed the L2 cache, divided by their number. A decode step is one
token after 127 others in a static cache. Several processes compile side by side; each waits for the others before it
measures, one at a time.
"""

import argparse
import json
import multiprocessing as mp
import queue
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch._dynamo.config as dynamo
import torch._inductor.config as inductor
from torch import Tensor, nn
from transformers import BertConfig, GPTNeoXConfig, LlamaConfig
from transformers.models.bert.modeling_bert import BertLayer
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXLayer, GPTNeoXRotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from halfbyte.runtime.fused import fuse
from halfbyte.runtime.integer_linear import IntegerLinear
from halfbyte.scheme import ActivationFormat, Convention, FloatScale, PerChannel, WeightFormat

DTYPE = torch.float16
BYTES = WeightFormat(
    bits=8, convention=Convention.ODYSSEY, granularity=PerChannel(), scale=FloatScale(dtype="float32"), stored="bytes"
)
SHAPES = (
    "bert:32x128,bert:128x128,bert:1x128,bert:8x128,bert:64x128,"
    "gpt_neox:2x2048,gpt_neox:1x128,gpt_neox:1x2048,gpt_neox:8x128,"
    "llama:8x512,llama:2x2048,llama:1x512,llama:16x512,llama:8x2048,"
    "decode:16x1,decode:1x1,decode:64x1,decode:128x1"
)
PAST = 127  # tokens before the one that is decoded
# what an H200 has been seen to sustain: the bound that times are compared with
BYTES_PER_SECOND = 4.4e12
INT8_PER_SECOND = 1500e12
FP16_PER_SECOND = 790e12
# both round sums to fp16, and a code that tips over a tie moves by a step of 1/127 of its token's range
TOLERANCE = 1e-2
GRACE = 10  # seconds after the deadline for what has begun

Layer = Callable[..., Tensor]


@dataclass(frozen=True)
class Family:
    """A layer of transformers, and how many in a row exceed the cache."""

    hidden: int
    inner: int
    heads: int
    count: int
    causal: bool
    weights: int  # of a layer, in numbers


FAMILIES = {
    "bert": Family(768, 3072, 12, 12, False, 12 * 768**2),
    "gpt_neox": Family(6144, 24576, 64, 2, True, 12 * 6144**2),
    "llama": Family(4096, 11008, 32, 2, True, 4 * 4096**2 + 3 * 4096 * 11008),
    "decode": Family(4096, 11008, 32, 2, True, 4 * 4096**2 + 3 * 4096 * 11008),
}


@dataclass
class Row:
    """Times in microseconds."""

    family: str
    batch: int
    length: int
    bound: float
    error_to_apart: float = 0.0
    error_to_fp16: float = 0.0
    times: dict[str, float] = field(default_factory=dict)
    failed: str = ""


class Past:
    """Keys and values of a static cache with room for one more token."""

    def __init__(self, batch: int, family: Family) -> None:
        shape = (batch, family.heads, PAST + 1, family.hidden // family.heads)
        self.keys, self.values = (torch.randn(shape, device="cuda", dtype=DTYPE) for _ in range(2))
        self.position = torch.tensor([PAST], device="cuda")

    def update(self, keys: Tensor, values: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        return self.keys.index_copy_(2, self.position, keys), self.values.index_copy_(2, self.position, values)


def layers_of(name: str) -> list[nn.Module]:
    """Random layers in fp16, with inputs and outputs of about the same size."""
    family = FAMILIES[name]
    sizes: dict[str, Any] = {
        "hidden_size": family.hidden, "intermediate_size": family.inner, "num_attention_heads": family.heads,
        "attn_implementation": "sdpa",
    }  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda"):
        match name:
            case "bert":
                layers: list[nn.Module] = [BertLayer(BertConfig(**sizes), layer_idx=0) for _ in range(family.count)]
            case "gpt_neox":
                layers = [GPTNeoXLayer(GPTNeoXConfig(**sizes), layer_idx=0) for _ in range(family.count)]
            case _:
                layers = [LlamaDecoderLayer(LlamaConfig(**sizes), layer_idx=0) for _ in range(family.count)]
    return [layer.to(DTYPE).eval().requires_grad_(False) for layer in layers]


def inputs_of(name: str, batch: int, length: int) -> tuple[Tensor, list[dict[str, Any]]]:
    """What enters the first layer, and what every layer is given beside it."""
    family = FAMILIES[name]
    x = torch.randn(batch, length, family.hidden, device="cuda", dtype=DTYPE)
    if name == "bert":
        return x, [{} for _ in range(family.count)]
    past = PAST if name == "decode" else 0
    positions = torch.arange(past, past + length, device="cuda")[None]
    sizes: dict[str, Any] = {"hidden_size": family.hidden, "num_attention_heads": family.heads}
    if name == "gpt_neox":
        rotary: nn.Module = GPTNeoXRotaryEmbedding(GPTNeoXConfig(**sizes)).cuda()
    else:
        rotary = LlamaRotaryEmbedding(LlamaConfig(**sizes)).cuda()
    given: list[dict[str, Any]] = [{"position_embeddings": rotary(x, positions)} for _ in range(family.count)]
    if name == "decode":
        for one in given:
            one["past_key_values"] = Past(batch, family)
    return x, given


def integer_linear(linear: nn.Linear) -> IntegerLinear:
    scale = linear.weight.float().abs().amax(dim=1, keepdim=True) / 127
    tensors = {"weight": (linear.weight.float() / scale).round().to(torch.int8), "weight_scale": scale}
    room = IntegerLinear(
        linear.in_features, linear.out_features, BYTES, ActivationFormat(), bias=linear.bias is not None, device="meta"
    )
    return room.fill(tensors, linear.bias).prepare(DTYPE)


def in_int8(layers: Sequence[nn.Module], name: str) -> list[nn.Module]:
    """The same layers with linears that multiply integers."""
    twins = layers_of(name)
    for layer, twin in zip(layers, twins, strict=True):
        twin.load_state_dict(layer.state_dict())
        for path, linear in list(twin.named_modules()):
            if isinstance(linear, nn.Linear):
                twin.set_submodule(path, integer_linear(linear))
    return twins


def run(layers: Sequence[Layer], x: Tensor, given: Sequence[dict[str, Any]]) -> Tensor:
    for layer, one in zip(layers, given, strict=True):
        x = layer(x, **one)
    return x


def graph_of(work: Callable[[], Tensor]) -> Callable[[], None]:
    """Replays what `work` does."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def microseconds(work: Callable[[], Any], seconds: float = 0.08) -> float:
    """The median time of one call, over as many as fit."""
    times: list[float] = []
    work()
    torch.cuda.synchronize()
    end = time.perf_counter() + seconds
    while len(times) < 8 or (time.perf_counter() < end and len(times) < 200):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        stop.record()
        stop.synchronize()
        times.append(1e3 * start.elapsed_time(stop))
    return median(times[1:])


def bound_of(name: str, batch: int, length: int) -> float:
    """Operations of products and attention, or the bytes of weights, input, output and cache: the larger, µs."""
    family, tokens = FAMILIES[name], batch * length
    keys = PAST + 1 if name == "decode" else length
    attention = 4 * tokens * keys * family.hidden * (0.5 if family.causal and length > 1 else 1)
    arithmetic = 2 * tokens * family.weights / INT8_PER_SECOND + attention / FP16_PER_SECOND
    moved = family.weights + 4 * tokens * family.hidden
    if name == "decode":
        moved += 4 * batch * keys * family.hidden
    return 1e6 * max(arithmetic, moved / BYTES_PER_SECOND)


def relative(result: Tensor, expected: Tensor) -> float:
    return float((result.double() - expected.double()).norm() / expected.double().norm())


@dataclass
class Layers:
    """The same layers in three forms."""

    plain: list[nn.Module]
    apart: list[nn.Module]
    fused: list[nn.Module]

    @classmethod
    def make(cls, name: str) -> "Layers":
        plain = layers_of(name)
        apart, fused = in_int8(plain, name), in_int8(plain, name)
        if fuse(nn.ModuleList(fused)) != len(plain):
            raise SystemExit(f"not every layer of {name} was fused")
        return cls(plain, apart, fused)


def prepare(layers: Layers, name: str, batch: int, length: int) -> tuple[Row, dict[str, Callable[[], Any]]]:
    """What is to be timed, compiled and recorded; compared first."""
    x, given = inputs_of(name, batch, length)
    row = Row(name, batch, length, bound_of(name, batch, length))
    first = [run(some[:1], x, given[:1]) for some in (layers.fused, layers.apart, layers.plain)]
    row.error_to_apart, row.error_to_fp16 = relative(first[0], first[1]), relative(first[0], first[2])
    if not row.error_to_apart <= TOLERANCE:
        raise ValueError(f"fused disagrees with apart by {row.error_to_apart:.1e}")
    compiled = [[torch.compile(layer, dynamic=False) for layer in some] for some in (layers.plain, layers.fused)]
    work: dict[str, Callable[[], Any]] = {
        "fp16 eager": lambda: run(layers.plain, x, given),
        "fp16 compiled": graph_of(lambda: run(compiled[0], x, given)),
        "int8 apart": graph_of(lambda: run(layers.apart, x, given)),
        "int8 eager": lambda: run(layers.fused, x, given),
        "int8 graph": graph_of(lambda: run(layers.fused, x, given)),
        "int8 compiled": graph_of(lambda: run(compiled[1], x, given)),
    }
    error = relative(run(compiled[1][:1], x, given[:1]), first[0])
    if not error <= TOLERANCE:
        raise ValueError(f"compiled and fused disagree by {error:.1e}")
    return row, work


@torch.no_grad()
def work_on(name: str, shapes: Sequence[tuple[int, int]], deadline: float, ready: Any, turn: Any, rows: Any) -> None:
    """Shapes of a family, in their own process. What is not begun at the deadline is left out."""
    inductor.compile_threads = 1
    dynamo.recompile_limit = 64
    layers, prepared = Layers.make(name), []
    for batch, length in shapes:
        if time.time() > deadline:
            break
        try:
            prepared.append(prepare(layers, name, batch, length))
        except Exception:  # noqa: BLE001 - what fails is a row of the table, not the end of the others
            rows.put(Row(name, batch, length, 0.0, failed=traceback.format_exc()[-1200:]))
    torch.cuda.synchronize()
    with suppress(threading.BrokenBarrierError):  # another takes much longer, or has died
        ready.wait(timeout=max(1.0, deadline + GRACE - time.time()))
    for row, work in prepared:
        with turn:
            for variant, call in work.items():
                row.times[variant] = microseconds(call) / FAMILIES[name].count
        rows.put(row)


HEADER = ("shape", "bound", "fp16 eager", "fp16 compiled", "int8 apart", "int8 eager", "int8 graph", "int8 compiled")


def line(row: Row) -> str:
    shape = f"{row.family} {row.batch}x{row.length}"
    if row.failed:
        return f"{shape:>18} {row.failed}"
    best = min(row.times["int8 graph"], row.times["int8 compiled"])
    return (
        f"{shape:>18} {row.bound:>8.1f} "
        + " ".join(f"{row.times[name]:>13.1f}" for name in HEADER[2:])
        + f"   /compiled {row.times['fp16 compiled'] / best:.2f}x /eager {row.times['fp16 eager'] / best:.2f}x"
        + f"   err {row.error_to_apart:.0e} {row.error_to_fp16:.0e}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=SHAPES, help="family:batch x length, the most wanted first")
    parser.add_argument("--seconds", type=float, default=1e6, help="for compiling; later shapes may be left out")
    parser.add_argument("--each", type=int, default=3, help="shapes of a process, at most")
    parser.add_argument("--start", default="spawn", choices=("spawn", "fork"), help="how processes begin")
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    options = parser.parse_args()
    start = time.time()
    wanted: dict[str, list[tuple[int, int]]] = {}
    for shape in options.shapes.split(","):
        name, _, size = shape.partition(":")
        batch, _, length = size.partition("x")
        wanted.setdefault(name, []).append((int(batch), int(length)))

    context: Any = mp.get_context(options.start)
    parts = [
        (name, shapes[first :: -(-len(shapes) // options.each)])
        for name, shapes in wanted.items()
        for first in range(-(-len(shapes) // options.each))
    ]
    ready, turn, rows = context.Barrier(len(parts)), context.Lock(), context.Queue()
    workers = [
        context.Process(target=work_on, args=(name, shapes, start + options.seconds, ready, turn, rows))
        for name, shapes in parts
    ]
    for worker in workers:
        worker.start()
    print(f"{HEADER[0]:>18} {HEADER[1]:>8} " + " ".join(f"{name:>13}" for name in HEADER[2:]) + "   µs")
    found: list[Row] = []
    while any(worker.is_alive() for worker in workers) or not rows.empty():
        try:
            found.append(rows.get(timeout=0.5))
        except queue.Empty:
            continue
        print(f"{line(found[-1])}   at {time.time() - start:.0f} s", flush=True)
        if options.json:
            environment = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "dtype": str(DTYPE)}
            options.json.write_text(json.dumps(environment | {"rows": [asdict(row) for row in found]}, indent=1) + "\n")
    for worker in workers:
        worker.join()


if __name__ == "__main__":
    main()
