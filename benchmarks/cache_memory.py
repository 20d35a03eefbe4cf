"""The most sequences that a memory budget holds, and the tokens a second there: caches in bf16 and in 4 bits.

    python benchmarks/cache_memory.py --json cache_memory.json
    python benchmarks/cache_memory.py --device cpu --layers 2 --contexts 64 --budgets 0.2 --variants bf16 kv4

Weights are random, of a known shape. A budget is what PyTorch's allocator may hold in all: weights, cache, whatever a
step needs, and its CUDA graph. For each context the largest batch is found that decodes within it: caches are of fixed
size, filled with random tokens but for those that are decoded, and a step runs through `halfbyte.runtime.decoder`, as a
CUDA graph and without torch.compile, in all variants alike. One sequence tells what each costs; the batch that follows is
tried, and made larger or smaller until it no longer runs.

    bf16      transformers' StaticCache, attention to all its rows by the first of PyTorch's kernels that takes them, cuDNN
              here: without the mask that transformers makes, which would cost more
    kv4       4-bit keys and values, the current token exact, codes read by the decode-attention kernel
    kv4-pre   keys stored before RoPE, shifted and scaled, with 4 sinks and a window of 64: what wkvquant-kv4 keeps
    w4kv4     4-bit weights as well; w4kv4-pre keeps what wkvquant-w4kv4 keeps
    w4a8kv4   4-bit weights, 8-bit inputs, kv4's cache
"""

import argparse
import gc
import json
import statistics
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from halfbyte.errors import HalfbyteError
from halfbyte.numerics.cache import Smoothing
from halfbyte.runtime.bench import cache_bytes, opened_or_random, tensor_bytes
from halfbyte.runtime.cache_plan import attach_cache, cache_plan, named_format
from halfbyte.runtime.decoder import Decoder
from halfbyte.runtime.fused import fuse
from halfbyte.runtime.static_cache import StaticQuantizedLayer

STEPS = 12  # timed, after 3 that compile
SPARE = 16  # rows of each cache that stay free for the steps
STEP_OF_BATCH = 128  # batches are tried so finely
GIB = 2**30
BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True)
class Variant:
    recipe: str | None
    cache: str | None


VARIANTS = {
    "bf16": Variant(None, None),
    "kv4": Variant(None, "int4"),
    "kv4-pre": Variant(None, "int4-prerope-s4-w64"),
    "w4kv4": Variant("rtn-w4a16", "int4"),
    "w4kv4-pre": Variant("rtn-w4a16", "int4-prerope-s4-w64"),
    "w4a8kv4": Variant("integer-scale-w4a8", "int4"),
}


@dataclass(frozen=True)
class Row:
    """Bytes are the allocator's."""

    variant: str
    context: int
    budget: int
    batch: int
    step_seconds: float
    tokens_per_second: float
    cache_bytes: int  # of the cache
    peak_bytes: int  # the most that the allocator held


def opened(variant: Variant, options: argparse.Namespace) -> Any:
    """The model of a shape, as the variant has it, with room for long texts."""
    device = torch.device(options.device)
    model = opened_or_random(options.shape, variant.recipe, options.layers, device, options.dtype)
    model.config.max_position_embeddings = max(options.contexts) + 1
    if variant.recipe is not None:
        fuse(model)
    if variant.cache is None:
        model.set_attn_implementation("all_rows")
    else:
        format = named_format(variant.cache)
        attach_cache(model, cache_plan(model, format, smoothing(model) if format.rope == "before" else None))
    return model


def all_rows(
    _module: Any, query: Tensor, key: Tensor, value: Tensor, _mask: Any, scaling: float | None = None, **_: Any
) -> tuple[Tensor, None]:
    """transformers' interface of an attention function, without a mask."""
    shared = query.shape[1] != key.shape[1]
    out = scaled_dot_product_attention(query, key, value, scale=scaling, enable_gqa=shared)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("all_rows", all_rows)
AttentionMaskInterface.register("all_rows", lambda *_arguments, **_options: None)


def smoothing(model: Any) -> dict[int, Smoothing]:
    """What calibration would find, of no meaning."""
    config = model.config
    heads, dim = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.rand(heads, dim, generator=generator) + 0.5  # noqa: E731
    return {layer: Smoothing(*(draw().to(model.device) for _ in range(4))) for layer in range(config.num_hidden_layers)}


def filled(decoder: Decoder, context: int) -> None:
    """Random tokens in all rows but the last ones. Edits the decoder's cache."""
    model, config = decoder.model, decoder.model.config
    heads, dim = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    like = torch.empty(decoder.batch, heads, 1, dim, dtype=model.dtype, device=model.device)
    layers: list[Any] = decoder.cache.layers
    length = context - SPARE
    for layer in layers:
        if not layer.is_initialized:
            layer.lazy_initialization(like, like)
        if not isinstance(layer, StaticQuantizedLayer):
            layer.keys.normal_()
            layer.values.normal_()
            layer.cumulative_length.fill_(length)
            continue
        for side in (layer.key_side, layer.value_side):
            side.codes.random_(0, 256)
            side.scales.uniform_(0.1, 0.3)
            side.sinks.normal_()
            side.window.normal_()
            if side.zeros is not None:
                torch.mul(side.scales, -7.5, out=side.zeros)
        layer.length.fill_(length)
        layer.is_empty = False
        if layer.rotations is not None and layer.leads:
            positions = torch.arange(length, device=model.device)[None]
            turns = model.base_model.rotary_emb(like, positions)
            layer.rotations.write(turns, torch.zeros((), dtype=torch.long, device=model.device))
    decoder.start_at(length)


def seconds_of_a_step(decoder: Decoder) -> float:
    """The median of what steps take, which follow each other in threes."""
    cuda = decoder.model.device.type == "cuda"
    found = []
    for _ in range(STEPS // 3):
        start = time.perf_counter()
        for _ in range(3):
            decoder.step()
        if cuda:
            torch.cuda.synchronize()
        found.append((time.perf_counter() - start) / 3)
    return statistics.median(found)


def measure(model: Any, name: str, batch: int, context: int) -> Row | None:
    """A batch of full caches; None where memory does not hold it."""
    cuda, decoder, row = model.device.type == "cuda", None, None
    before = torch.cuda.memory_allocated() if cuda else 0
    try:
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        decoder = Decoder(model, batch, context, compiled=False)
        filled(decoder, context)
        held = torch.cuda.memory_allocated() - before if cuda else cache_bytes(decoder.cache)
        with sdpa_kernel(BACKENDS, set_priority=True) if VARIANTS[name].cache is None and cuda else nullcontext():
            decoder.record_step()
        step = seconds_of_a_step(decoder)
        peak = torch.cuda.max_memory_reserved() if cuda else tensor_bytes(model) + held
        row = Row(name, context, 0, batch, step, batch / step, held, peak)
    except RuntimeError as failure:  # handled outside: what it refers to keeps the tensors alive
        if not isinstance(failure, torch.OutOfMemoryError) and "capture" not in str(failure):
            raise
    del decoder
    gc.collect()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    return row


def largest(model: Any, name: str, context: int, budget: int) -> Row | None:
    """The row of the largest batch that runs; None where not even one sequence does."""
    cuda = model.device.type == "cuda"
    if cuda:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(budget / total)
    found = measure(model, name, 1, context)
    batch = 0 if found is None else 1 + int((budget - found.peak_bytes) / found.cache_bytes)
    tried: set[int] = {1}
    while found is not None and batch not in tried and batch > 0:
        tried.add(batch)
        row = measure(model, name, batch, context)
        fits = row is not None and row.peak_bytes <= budget
        found = row if fits and row is not None else found
        batch += max(1, batch // STEP_OF_BATCH) * (1 if fits else -1)
    return None if found is None else replace(found, budget=budget)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-2-7b")
    parser.add_argument("--layers", type=int, help="only so many")
    parser.add_argument("--contexts", nargs="+", type=int, default=[2048, 8192, 32768])
    parser.add_argument("--budgets", nargs="+", type=float, default=[40, 80], help="in GiB")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["bf16", "kv4", "kv4-pre", "w4kv4-pre"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default=torch.bfloat16, type=lambda name: getattr(torch, name))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows, began = [], time.perf_counter()
    for name in options.variants:
        model = opened(VARIANTS[name], options)
        if options.device == "cuda":
            torch.cuda.empty_cache()  # what making the weights took is not to count
        for budget in options.budgets:
            for context in options.contexts:
                try:
                    row = largest(model, name, context, int(budget * GIB))
                except (HalfbyteError, RuntimeError) as failure:
                    print(f"FAILED {name} {budget} {context}: {str(failure)[:400]}", flush=True)
                    continue
                if row is None:
                    print(f"{name:>10} {budget:>5.0f} GiB {context:>6}: not one sequence", flush=True)
                    continue
                rows.append(row)
                print(
                    f"{name:>10} {budget:>5.1f} GiB {context:>6} tokens: {row.batch:>5} sequences, "
                    f"{1e3 * row.step_seconds:>8.2f} ms a step, {row.tokens_per_second:>8.0f} tokens/s, cache "
                    f"{row.cache_bytes / GIB:.3f} GiB, peak {row.peak_bytes / GIB:.2f} GiB "
                    f"({time.perf_counter() - began:.0f} s)",
                    flush=True,
                )
                if options.json:
                    device = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
                    record = {"device": device, "torch": torch.__version__, "shape": options.shape}
                    record |= {"layers": options.layers, "rows": [asdict(each) for each in rows]}
                    options.json.write_text(json.dumps(record, indent=1) + "\n")
        del model
        gc.collect()
        if options.device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
