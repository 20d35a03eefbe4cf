"""How fast a model reads and writes on this machine: prefill and decoding, with the bytes that bound them.

Weights may be random: of a shape that people know (models/random_weights.py), in the formats of a recipe, rounded to
nearest, since time does not depend on what they say.
"""

import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from halfbyte.errors import ModelError
from halfbyte.machine import pick_device
from halfbyte.models.load import locate, skeleton
from halfbyte.models.random_weights import SHAPES, RandomWeights, write_shape
from halfbyte.recipe import Recipe
from halfbyte.runtime.cache import QuantizedCache
from halfbyte.runtime.cache_plan import attach_cache, chosen_plan
from halfbyte.runtime.decoder import Decoder
from halfbyte.runtime.embedding import replace_tables
from halfbyte.runtime.experts import JoinedExperts
from halfbyte.runtime.fused import fuse
from halfbyte.runtime.load import AnyRecipe, completed, load_model
from halfbyte.runtime.on_the_fly import quantize_linears, rounded_tables
from halfbyte.scheme import CacheFormat

REPEATS = 5


@dataclass(frozen=True, slots=True)
class Speed:
    """What was measured. Rates are tokens of the whole batch per second; bytes are those that PyTorch allocated."""

    model: str
    recipe: str | None
    device: str
    dtype: str
    batch: int
    context: int  # tokens of each prompt
    new_tokens: int
    prefill_seconds: float
    prefill_rate: float
    step_seconds: float  # the mean over steps that follow each other without waiting
    decode_rate: float
    weight_bytes: int  # all that the loaded model holds
    step_bytes: int  # the weights that one step reads: all but the table of input embeddings
    cache_bytes: int
    peak_bytes: int  # 0 on a CPU
    copy_rate: float  # bytes a second that a copy moves on this device, read and written
    kernels: dict[str, int]  # what runs, and in how many linears

    @property
    def bound_seconds(self) -> float:
        """What reading the weights and the filled part of the cache once takes, at the rate of a copy."""
        filled = (self.context + self.new_tokens / 2) / (self.context + self.new_tokens)
        return (self.step_bytes + filled * self.cache_bytes) / self.copy_rate


@torch.no_grad()
def bench(
    model: str | Path,
    *,
    recipe: AnyRecipe | None = None,
    batch: int = 1,
    context: int = 512,
    new_tokens: int = 128,
    layers: int | None = None,
    fused: bool = False,
    compiled: bool = True,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    kv_cache: str | CacheFormat | None = None,
    turn: AbstractContextManager[Any] | None = None,
) -> Speed:
    """Time the prefill of `batch` random prompts of `context` tokens, and the decoding of `new_tokens` after them.

    `model`: a folder, a hub name, or a shape such as "llama-2-7b", whose weights are then random; `layers` shortens a
    shape. `recipe`: quantize while loading; for a shape any recipe's formats. Decoding runs through `Decoder`: on a GPU
    a CUDA graph, `compiled` with what torch.compile fuses. `kv_cache`: as in `evaluate`.
    `turn` is held while the clock runs, where several processes share a device. ModelError for counts that the model
    has no room for.
    """
    if min(batch, context) < 1 or new_tokens < 2:
        raise ModelError(f"batch {batch}, context {context}, new tokens {new_tokens}: give at least 1, 1 and 2")
    place = pick_device(device)
    before = torch.cuda.memory_allocated() if place.type == "cuda" else 0
    network = opened_or_random(model, recipe, layers, place, dtype)
    if fused:
        fuse(network)
    attach_cache(network, chosen_plan(network, kv_cache))
    held = torch.cuda.memory_allocated() - before if place.type == "cuda" else tensor_bytes(network)
    prompts = torch.randint(0, network.config.get_text_config().vocab_size, (batch, context), device=place)
    decoder = Decoder(network, batch, context + new_tokens, compiled=compiled)
    decoder.record(context)
    with turn or nullcontext():
        if place.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        prefill = median(seconds(lambda: decoder.prefill(prompts), place) for _ in range(REPEATS))
        steps = seconds(lambda: [decoder.step() for _ in range(new_tokens - 1)], place) / (new_tokens - 1)
        copied = copy_rate(place)
    table, head = network.get_input_embeddings(), network.get_output_embeddings()
    shared = head is not None and getattr(head, "weight", None) is table.weight
    return Speed(
        model=str(model),
        recipe=None if recipe is None else Recipe.load(recipe).name,
        device=torch.cuda.get_device_name() if place.type == "cuda" else "CPU",
        dtype=str(network.dtype).removeprefix("torch."),
        batch=batch,
        context=context,
        new_tokens=new_tokens,
        prefill_seconds=prefill,
        prefill_rate=batch * context / prefill,
        step_seconds=steps,
        decode_rate=batch / steps,
        weight_bytes=held,
        step_bytes=held - (0 if shared else table.weight.nbytes),
        cache_bytes=cache_bytes(decoder.cache),
        peak_bytes=torch.cuda.max_memory_allocated() if place.type == "cuda" else 0,
        copy_rate=copied,
        kernels=dict(Counter(kernel_of(part) for part in network.modules() if kernel_of(part))),
    )


def opened_or_random(
    model: str | Path, recipe: AnyRecipe | None, layers: int | None, device: torch.device, dtype: torch.dtype | None
) -> Any:
    """The model of a folder or name as `load` opens it, or one of a shape with random weights."""
    if str(model) not in SHAPES or Path(model).is_dir():
        if layers is not None:
            raise ModelError(f"{model} is no shape, and only shapes are shortened: leave `layers` out")
        return load_model(locate(model), recipe=recipe, device=device.type, dtype=dtype)
    with tempfile.TemporaryDirectory() as folder:
        bones = skeleton(write_shape(str(model), Path(folder), layers))
        kind = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        files = RandomWeights(bones, device, kind)
        if recipe is None:
            return completed(bones, files, (), device, kind)
        formats = formats_alone(Recipe.load(recipe))
        made = completed(bones, files, quantize_linears(bones, files, formats, device, kind), device, kind)
        replace_tables(made, rounded_tables(bones, formats), kind)
        return made


def formats_alone(recipe: Recipe) -> Recipe:
    """A recipe with the same formats that rounds to nearest."""
    kept = recipe.model_dump(include={"name", "scheme", "overrides", "ignore"})
    return Recipe.load(kept | {"steps": [{"method": "rtn"}]})


def kernel_of(module: nn.Module) -> str:
    """What a linear, or a mixture's experts together, run; empty for what is neither."""
    if isinstance(module, nn.Linear):
        return f"{str(module.weight.dtype).removeprefix('torch.')} torch"
    runs = hasattr(module, "in_features") or isinstance(module, JoinedExperts)
    return str(getattr(module, "kernel", "")) if runs else ""


def tensor_bytes(model: nn.Module) -> int:
    """Parameters and buffers, each counted once."""
    parts = {part.data_ptr(): part for part in (*model.parameters(), *model.buffers())}
    return sum(part.nbytes for part in parts.values())


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """One run on the host's clock, its end waited for."""
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def cache_bytes(cache: Any) -> int:
    """What a cache of fixed size holds."""
    if isinstance(cache, QuantizedCache):
        return cache.nbytes
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def copy_rate(device: torch.device) -> float:
    """Bytes a second, read and written, that copying a tensor far larger than any cache moves."""
    source = torch.empty(2**30 if device.type == "cuda" else 2**27, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median(seconds(lambda: target.copy_(source), device) for _ in range(REPEATS))
