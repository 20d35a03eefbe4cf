"""Decode steps that read the codes of a cache where they lie, instead of a decoded copy of it.

    update       hands on the current token alone
    attention    codes before the window, sinks and window as they came, the current token exact    kernels/kv_attention
    afterwards   the current token is quantized and written, and joins the window

transformers calls the attention by its name, `halfbyte_packed`, while `reading_codes` lasts. Prompts attend as before,
to all rows decoded, by scaled-dot-product attention. For caches of fixed size (static_cache.py).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from halfbyte.errors import ModelError
from halfbyte.kernels.kv_attention import ExactTokens, Smoothing, decode_attention
from halfbyte.models.heads import attentions
from halfbyte.runtime.cache_plan import plan_of
from halfbyte.runtime.static_cache import StaticQuantizedLayer

NAME = "halfbyte_packed"
LAYER = "_halfbyte_cache_layer"
UNKNOWN = ("softcap", "s_aux", "position_bias")  # what some architectures do to their scores


@contextmanager
def reading_codes(model: Any) -> Iterator[None]:
    """Within it, calls with one token on a `new_cache(model, capacity)` read its codes.

    Edits the model in place and undoes it. ModelError for an architecture that has attention code of its own, for a
    model without a plan, and for one that quantizes the current token or rotates keys.
    """
    plan = plan_of(model)
    if plan is None or not plan.format.past_only:
        raise ModelError(
            "reading codes takes a cache plan whose current token is exact: attach_cache(model, ...) first"
        )
    if not getattr(model, "_supports_attention_backend", False):
        raise ModelError(
            f"{type(model).__name__} has attention code of its own, which cannot read codes: decode without"
        )
    if plan.format.rotate_keys:
        raise ModelError("the keys' codes are in rotated coordinates, in which queries are not: decode without")
    before = model.config._attn_implementation
    modules = list(attentions(model).values())
    hooks = [module.register_forward_pre_hook(_note_layer, with_kwargs=True) for module in modules]
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
                layer.reads_codes = False


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
    layer: StaticQuantizedLayer | None = module.__dict__.get(LAYER)
    if layer is None or not layer.reads_codes or query.shape[2] != 1:
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
        return out, None
    if found := [name for name in UNKNOWN if options.get(name) is not None]:
        raise ModelError(
            f"{type(module).__name__} attends with {found}, which reading codes does not know: decode without"
        )
    out = _attend(layer, query[:, :, 0], key[:, :, 0], value[:, :, 0], attention_mask, scaling)
    layer.keep(key, value)
    return out[:, None], None


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def _attend(
    layer: StaticQuantizedLayer, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None
) -> Tensor:
    keys, values, sinks, window = layer.key_side, layer.value_side, layer.format.sinks, layer.format.window
    first = torch.zeros(len(query), dtype=torch.int64, device=query.device)
    if mask is not None:  # what a row does not see comes before all that it sees: padding, or what a window has left
        first = mask[:, 0, -1].to(torch.int8).argmax(dim=-1).expand(len(query))
    exact = None
    if sinks or window:
        place = torch.arange(sinks, device=query.device)
        held = layer.length - 1 - (layer.length - 1 - torch.arange(window, device=query.device)) % max(window, 1)
        counts = torch.cat([place < layer.length, held >= sinks])
        seen = counts & (torch.cat([place, held]) >= first[:, None])
        exact_keys, exact_values = (torch.cat([side.sinks, side.window], dim=2) for side in (keys, values))
        exact = ExactTokens(exact_keys, exact_values, seen)
    return decode_attention(
        query, keys.packed, values.packed, (layer.length - window).clamp(min=sinks).expand(len(query)), key, value,
        first.clamp(min=sinks), exact,
        Smoothing(*(
            None if part is None else part.to(query.device)
            for part in (keys.coder.shift, keys.coder.scale, values.coder.shift, values.coder.scale)
        )),
        scaling,
    )  # fmt: skip


def _note_layer(module: Any, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Tell the attention which layer of the cache is its own, and that layer that its codes will be read."""
    layer = None
    for cache in (kwargs.get("past_key_values"), kwargs.get("layer_past")):
        if cache is not None:
            layer = cache.layers[module.layer_idx]
    packed = isinstance(layer, StaticQuantizedLayer)
    module.__dict__[LAYER] = layer if packed else None
    if isinstance(layer, StaticQuantizedLayer):
        layer.reads_codes = True
