"""Decode steps that read the codes of a cache where they lie, instead of a decoded copy of it.

    update       hands on the current token alone
    attention    codes before the window, sinks and window as they came, the current token exact    kernels/kv_attention
    and          the current token is quantized and written, and joins the window

transformers calls the attention by its name, `halfbyte_packed`, while `reading_codes` lasts. Prompts attend as before,
to all rows decoded, by scaled-dot-product attention.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from halfbyte.errors import ModelError
from halfbyte.kernels.kv_attention import ExactTokens, KeyRotation, PackedTokens, decode_attention
from halfbyte.kernels.kv_attention.kept import held_before
from halfbyte.models.heads import attentions
from halfbyte.runtime.cache import QuantizedCache, QuantizedLayer
from halfbyte.runtime.cache_plan import CachePlan, plan_of, using_cache
from halfbyte.runtime.static_cache import StaticQuantizedLayer
from halfbyte.runtime.static_rotations import turns_evenly

NAME = "halfbyte_packed"
LAYER = "_halfbyte_cache_layer"
UNKNOWN = ("softcap", "s_aux", "position_bias")  # what some architectures do to their scores
Layer = StaticQuantizedLayer | QuantizedLayer


def why_not(model: Any) -> str | None:
    """Why a model's attention cannot read codes; None where it can."""
    plan, config = plan_of(model), model.config.get_text_config()
    if plan is None or not plan.format.past_only:
        return "reading codes takes a cache plan whose current token is exact: attach_cache(model, ...) first"
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    if capped or not getattr(model, "_supports_attention_backend", False):
        return f"{type(model).__name__} attends in a way of its own, which cannot read codes: decode without"
    if model.dtype == torch.float64:
        return "the kernel computes in float32, and the model is float64: decode without"
    if plan.format.keys == "channel":
        return "keys have grids for each channel, which the kernel does not read: decode without"
    if plan.format.rope == "before" and plan.format.rotate_keys:
        return "keys before RoPE are in rotated coordinates, in which RoPE is not: decode without"
    if plan.format.rope == "before" and not all(turns_evenly(model, kind) for kind in set(plan.kinds)):
        return "how far keys are turned depends on the length of the text, which codes do not tell: decode without"
    return None


@contextmanager
def reading_codes(model: Any, cache: QuantizedCache | None = None) -> Iterator[None]:
    """Within it, calls with one token on a cache of the model's plan read its codes.

    `cache`: the only one that will be used, so that nothing is looked up in a call. Edits the model in place and undoes
    it. ModelError, with what `why_not` says, for a model that cannot.
    """
    if (reason := why_not(model)) is not None:
        raise ModelError(reason)
    before = model.config._attn_implementation
    modules = list(attentions(model).values())
    hooks = []
    if cache is None:
        hooks = [module.register_forward_pre_hook(_note_layer, with_kwargs=True) for module in modules]
    else:
        for module in modules:
            _attend_to(module, cache.layers[module.layer_idx])
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        for hook in hooks:
            hook.remove()
        for module in modules:
            layer = module.__dict__.pop(LAYER, None)
            if layer is not None:
                layer.reads_codes = layer.hands_on = False


@contextmanager
def generating(model: Any, plan: CachePlan | None) -> Iterator[None]:
    """Within it, the model's `generate` keeps its past by this plan, and on a GPU reads the codes where it can."""
    with using_cache(model, plan):
        reads = model.device.type == "cuda" and why_not(model) is None
        with reading_codes(model) if reads else nullcontext():
            yield


def packed_attention(
    module: Any,
    query: Float[Tensor, "batch query_heads tokens dim"],
    key: Float[Tensor, "batch heads rows dim"],
    value: Float[Tensor, "batch heads rows dim"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Float[Tensor, "batch tokens query_heads dim"], None]:
    """transformers' interface of an attention function."""
    layer: Layer | None = module.__dict__.get(LAYER)
    if layer is None or not layer.hands_on:
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
        return out, None
    if found := [name for name in UNKNOWN if options.get(name) is not None]:
        raise ModelError(
            f"{type(module).__name__} attends with {found}, which reading codes does not know: decode without"
        )
    now = query[:, :, 0], key[:, :, 0], value[:, :, 0]
    if isinstance(layer, StaticQuantizedLayer):
        layer.keep(key, value)  # before attention reads them: a compiler then writes in place
        out = _attend(layer, *now, None if layer.sees_all else attention_mask, scaling)
        layer.count(1)
    else:
        out = _attend(layer, *now, attention_mask, scaling)
        layer.keep(key, value)
    return out[:, None], None


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


class Past(NamedTuple):
    """What a layer of a cache has of the tokens before the current one."""

    keys: PackedTokens
    values: PackedTokens
    begins: int  # the position of the token in row 0
    first: Tensor | None  # of the rows that hold what is not exact, for each row of the batch; None: 0
    last: Tensor  # one behind them; no axes
    exact: tuple[Tensor, Tensor, Tensor] | None  # keys, values, and the places of these tokens; negative: there is none
    rotation: KeyRotation | None


def _fixed(layer: StaticQuantizedLayer) -> Past:
    keys, values, kept = layer.key_side, layer.value_side, layer.kept
    last, exact = layer.length, None
    if kept is not None:
        last = (layer.length - kept.window).clamp(min=kept.sinks)
        exact = kept.keys, kept.values, held_before(layer.length, kept.sinks, kept.window)
    rotation = None if layer.rotations is None else layer.rotations.of_packed
    return Past(keys.packed, values.packed, 0, layer.first, last, exact, rotation)


def _growing(layer: QuantizedLayer) -> Past:
    keys, values, sinks, count = layer.key_side, layer.value_side, layer.format.sinks, layer.key_side.codes.length
    place = torch.arange(layer.get_seq_length(), device=layer.device)
    places = torch.cat([place[:sinks], place[sinks + count :]])
    exact = (keys.exact, values.exact, places) if len(places) else None
    last = torch.tensor(count, device=layer.device)
    rotation = None
    if layer.rotations is not None:
        rotation = layer.rotations.of_packed(sinks, sinks + count, len(keys.codes.taken))
    return Past(keys.packed, values.packed, sinks, None, last, exact, rotation)


def _attend(
    layer: Layer, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None
) -> Tensor:
    past = _fixed(layer) if isinstance(layer, StaticQuantizedLayer) else _growing(layer)
    first, seen_from = past.first, None
    if mask is not None:  # what a row does not see comes before all that it sees: padding, or what a window has left
        seen_from = mask[:, 0, -1].to(torch.int8).argmax(dim=-1).expand(len(query))
        first = (seen_from - past.begins).clamp(min=0 if first is None else first)
    exact = None
    if past.exact is not None:
        keys, values, places = past.exact
        seen = places >= 0 if seen_from is None else (places >= 0) & (places >= seen_from[:, None])
        exact = ExactTokens(keys, values, seen.expand(len(query), -1))
    turned, smoothing = None, layer.smoothing
    if layer.turn is not None:  # the query in the coordinates in which keys are stored
        scale, together = smoothing.key_scale, query.shape[1] // key.shape[1]
        scaled = query if scale is None else query * scale.repeat_interleave(together, dim=0).to(query.dtype)
        turned, smoothing = layer.turn(scaled), smoothing._replace(key_scale=None)
    return decode_attention(
        query, past.keys, past.values, past.last.expand(len(query)), key, value,
        first, exact, smoothing, scaling, past.rotation, turned,
    )  # fmt: skip


def _note_layer(module: Any, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Tell the attention which layer of the cache is its own, and that layer that its codes will be read."""
    for cache in (kwargs.get("past_key_values"), kwargs.get("layer_past")):
        if cache is not None:
            _attend_to(module, cache.layers[module.layer_idx])
            return
    _attend_to(module, None)


def _attend_to(module: Any, layer: Any) -> None:
    packed = isinstance(layer, Layer)
    module.__dict__[LAYER] = layer if packed else None
    if packed:
        layer.reads_codes = True
