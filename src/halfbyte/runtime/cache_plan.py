"""Which cache a model gets: formats by name, the coders of every layer, and how `generate` comes to use them.

    int4              4-bit keys and values, grids per token and group of 128 channels, the current token exact
    k8v4              8-bit keys, 4-bit values
    kivi, kivi2       keys per channel over 32 tokens, values per token in groups of 32, a window of 128 exact tokens

with any of these behind it:  -g64 groups of 64 channels · -w64 a window of 64 exact tokens · -s4 four exact sinks ·
-e2 8 bits in the first and last 2 layers · -sym symmetric · -present the current token is quantized too · -prerope keys
as they were before RoPE · -rot keys in rotated coordinates.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from halfbyte.errors import FormatError, ModelError
from halfbyte.layouts.cache import SUFFIXES, cache_format, read_smoothing
from halfbyte.models.heads import attentions, head_counts
from halfbyte.numerics.cache import NO_SMOOTHING, LayerCoders, Smoothing, layer_coders
from halfbyte.runtime.cache import QuantizedCache, QuantizedLayer
from halfbyte.runtime.cache_rows import Rotations
from halfbyte.runtime.one_layer import layer_of
from halfbyte.runtime.static_cache import StaticQuantizedLayer
from halfbyte.runtime.static_rotations import StaticRotations, near_turns
from halfbyte.scheme import CacheFormat

FLOAT_CACHE = "float"
PLAN = "halfbyte_cache_plan"  # the attribute of a model that has one
ATTENDS = {"full_attention", "sliding_attention", "chunked_attention"}
HALF_ROTATION = {
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "gpt_neox", "mixtral", "qwen2_moe",
    "qwen3_moe",
}  # fmt: skip
"""Families that rotate channel i with channel i + rotated/2, and hand cosines and sines to their attention."""

NUMBERS: dict[str, str] = {"g": "group_size", "w": "window", "s": "sinks", "e": "edge_layers"}
SWITCHES: dict[str, dict[str, Any]] = {
    "sym": {"symmetric": True},
    "present": {"past_only": False},
    "prerope": {"rope": "before"},
    "rot": {"rotate_keys": True},
}


class StoredTensors(Protocol):
    """The tensors of a checkpoint."""

    def __contains__(self, name: object, /) -> bool: ...

    def read(self, name: str) -> Tensor: ...


@dataclass(frozen=True, slots=True, eq=False)
class CachePlan:
    """The cache of one model."""

    format: CacheFormat
    layers: tuple[LayerCoders, ...]
    kinds: tuple[str, ...]  # per layer: those of one kind rotate alike


def named_format(name: str) -> CacheFormat:
    """The format that a name such as `int4-g64-w64` stands for. FormatError, with the grammar, for one that is none."""
    head, *options = name.split("-")
    if found := re.fullmatch(r"int([2-8])", head):
        fields: dict[str, Any] = {"key_bits": int(found[1]), "value_bits": int(found[1])}
    elif found := re.fullmatch(r"k([2-8])v([2-8])", head):
        fields = {"key_bits": int(found[1]), "value_bits": int(found[2])}
    elif found := re.fullmatch(r"kivi([2-8])?", head):
        bits = int(found[1] or 4)
        fields = {"key_bits": bits, "value_bits": bits, "keys": "channel", "block": 32, "group_size": 32, "window": 128}
    else:
        raise FormatError(f"no cache format {name!r}: write int2 .. int8, k8v4, kivi, or {FLOAT_CACHE} for none")
    for option in options:
        if option in SWITCHES:
            fields |= SWITCHES[option]
        elif (found := re.fullmatch(r"([gwse])(\d+)", option)) and (int(found[2]) or found[1] != "g"):
            fields[NUMBERS[found[1]]] = int(found[2])
        else:
            raise FormatError(
                f"cache format {name!r} has no option {option!r}: write -g64 (group), -w64 (window), -s4 (sinks), -e2 "
                "(edge layers), -sym, -present, -prerope or -rot"
            )
    return CacheFormat(**fields)


def cache_plan(model: Any, format: CacheFormat, smoothing: Mapping[int, Smoothing] | None = None) -> CachePlan:
    """The coders of every layer of a model. `smoothing`: by layer, what calibration found.

    FormatError where groups do not divide the heads; ModelError for layers that keep something else than keys and
    values, and for keys before RoPE of a family whose rotation is not known.
    """
    config = model.config.get_text_config()
    layers = int(config.num_hidden_layers)
    kinds = tuple(getattr(config, "layer_types", None) or ["full_attention"] * layers)
    if other := sorted(set(kinds) - ATTENDS):
        raise ModelError(f"{config.model_type} has layers of {', '.join(other)}, which keep no past keys to quantize")
    if format.rope == "before" and config.model_type not in HALF_ROTATION:
        raise ModelError(
            f"how {config.model_type} rotates its keys is not known here: store them after RoPE (`rope: after`, or a "
            "name without -prerope)"
        )
    found = smoothing or {}
    coders = tuple(layer_coders(format, layer, layers, found.get(layer, NO_SMOOTHING)) for layer in range(layers))
    for coder in {coder for layer in coders for coder in (layer.keys, layer.values)}:
        coder.groups(head_counts(config)[2])
    return CachePlan(format, coders, kinds)


def plan_of(model: Any) -> CachePlan | None:
    """The plan that a model carries, from its checkpoint or from `attach_cache`; None: its cache stays as it is."""
    return getattr(model, PLAN, None)


def stored_plan(
    model: Any, quantization: Mapping[str, Any], disk_path: Callable[[str], str], files: StoredTensors
) -> CachePlan | None:
    """The plan that a checkpoint's `quantization_config` and tensors say; None where they say nothing of a cache.

    CheckpointError where they do not fit the model; FormatError and ModelError as `cache_plan` raises them.
    """
    format = cache_format(quantization)
    if format is None:
        return None
    _, heads, dim = head_counts(model.config.get_text_config())
    device, found = next(model.parameters()).device, {}
    for path, module in attentions(model).items():
        names = {suffix: f"{disk_path(path)}.{suffix}" for suffix in SUFFIXES}
        tensors = {suffix: files.read(name).to(device) for suffix, name in names.items() if name in files}
        found[module.layer_idx] = read_smoothing(tensors, heads, dim)
    return cache_plan(model, format, found)


def chosen_plan(model: Any, kv_cache: str | CacheFormat | None) -> CachePlan | None:
    """The plan for a format, by value or name; `float`: none; None: the model's own.

    FormatError and ModelError as `named_format` and `cache_plan` raise them.
    """
    if kv_cache is None:
        return plan_of(model)
    if kv_cache == FLOAT_CACHE:
        return None
    return cache_plan(model, named_format(kv_cache) if isinstance(kv_cache, str) else kv_cache)


def attach_cache(model: Any, plan: CachePlan | None) -> None:
    """Let the model's `generate` use a quantized cache wherever the caller gives none. None: transformers' own again.

    Edits the model in place: its plan, and for keys before RoPE a hook at every attention.
    """
    for handle in model.__dict__.pop("_halfbyte_cache_hooks", []):
        handle.remove()
    model.__dict__.pop("_prepare_cache_for_generation", None)
    model.__dict__.pop(PLAN, None)
    if plan is None:
        return
    model.__dict__[PLAN] = plan
    model.__dict__["_prepare_cache_for_generation"] = _with_cache(model, model._prepare_cache_for_generation)
    if plan.format.rope == "before":
        model.__dict__["_halfbyte_cache_hooks"] = [
            module.register_forward_pre_hook(_hand_over, with_kwargs=True) for module in attentions(model).values()
        ]


@contextmanager
def using_cache(model: Any, plan: CachePlan | None) -> Iterator[None]:
    """Within it, the model generates by this plan, or by None with transformers' own cache; afterwards as before."""
    before = plan_of(model)
    attach_cache(model, plan)
    try:
        yield
    finally:
        attach_cache(model, before)


def new_cache(model: Any, capacity: int | None = None) -> QuantizedCache:
    """An empty cache by the model's plan. `capacity`: of fixed size, for torch.compile; None: it grows.

    FormatError where the plan has what a fixed size cannot hold; ModelError for a model without a plan.
    """
    plan = plan_of(model)
    if plan is None:
        raise ModelError("the model has no cache plan: attach_cache(model, cache_plan(model, named_format('int4')))")
    if capacity is not None:
        return _fixed(model, plan, capacity)
    shared: dict[str, Rotations] = {}
    if plan.format.rope == "before":
        shared = {kind: Rotations(near_turns(model, kind)) for kind in plan.kinds}
    layers = [
        QuantizedLayer(coders, plan.format, shared.get(kind))
        for coders, kind in zip(plan.layers, plan.kinds, strict=True)
    ]
    return QuantizedCache(layers, list(shared.values()))


def _fixed(model: Any, plan: CachePlan, capacity: int) -> QuantizedCache:
    shared: dict[str, StaticRotations] = {}
    if plan.format.rope == "before":
        shared = {kind: StaticRotations(capacity, near_turns(model, kind)) for kind in plan.kinds}
    layers = [
        StaticQuantizedLayer(coders, plan.format, capacity, shared.get(kind), leads=kind not in plan.kinds[:index])
        for index, (coders, kind) in enumerate(zip(plan.layers, plan.kinds, strict=True))
    ]
    return QuantizedCache(layers, list(shared.values()))


def _with_cache(model: Any, prepare: Callable[..., Any]) -> Callable[..., Any]:
    def prepared(generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        wanted = generation_config.use_cache is not False and generation_config.cache_implementation in (
            None,
            "dynamic",
        )
        if wanted and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = new_cache(model)
        return prepare(generation_config, model_kwargs, *args, **kwargs)

    return prepared


def _hand_over(module: Any, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Tell the layer of the cache how this call's keys are rotated."""
    for cache in (kwargs.get("past_key_values"), kwargs.get("layer_past")):
        layer = None if cache is None else layer_of(module, cache)
        if isinstance(layer, QuantizedLayer | StaticQuantizedLayer):
            layer.rotation = kwargs["position_embeddings"]
