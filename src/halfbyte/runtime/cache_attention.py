"""Attention of a whole window in which every token sees the past as a quantized cache would show it.

    scores = q·k where the cache is exact, q·k̃ elsewhere
    output = Σ p·v where the cache is exact, Σ p·ṽ elsewhere

Equal to decoding token by token through the cache (tests/runtime/test_cache_attention.py), at the cost of two more
products. transformers calls it by its name, `halfbyte_past_only`, in every model that attends by its AttentionInterface.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from halfbyte.errors import ModelError
from halfbyte.models.heads import attentions
from halfbyte.numerics.cache import Coder, LayerCoders, exact_tokens, rotate, through_cache, unrotate
from halfbyte.runtime.cache_plan import CachePlan
from halfbyte.runtime.cache_rows import Rotation
from halfbyte.scheme import CacheFormat

NAME = "halfbyte_past_only"
STATE = "_halfbyte_cache_view"
QUERIES_AT_ONCE = 256  # scores of so many queries are in memory at a time
UNKNOWN = ("s_aux", "position_bias")  # what some architectures add to their scores


@dataclass(slots=True, eq=False)
class View:
    """What an attention module is told while `seen_through_cache` lasts."""

    coders: LayerCoders
    format: CacheFormat
    compare: bool = False
    rotation: Rotation | None = None
    error: Float[Tensor, "query_heads"] | None = None  # of the last call, relative, head by head

    def keys(self, keys: Float[Tensor, "batch heads tokens dim"]) -> Float[Tensor, "batch heads tokens dim"]:
        """Keys as they come back from the cache."""
        if self.format.rope == "after":
            return through_cache(keys, self.coders.keys, self.format)
        assert self.rotation is not None
        before = unrotate(keys, *self.rotation)
        return rotate(through_cache(before, self.coders.keys, self.format), *self.rotation).to(keys.dtype)

    def values(self, values: Float[Tensor, "batch heads tokens dim"]) -> Float[Tensor, "batch heads tokens dim"]:
        """Values as they come back from the cache."""
        return through_cache(values, self.coders.values, self.format)


@contextmanager
def seen_through_cache(model: Any, plan: CachePlan, *, compare: bool = False) -> Iterator[None]:
    """Within it, the model's forward pass without a cache answers as decoding through the planned cache would.

    `compare`: also without the cache, for `head_errors`.
    Edits the model in place and undoes it. ModelError for an architecture that has attention code of its own.
    """
    if not getattr(model, "_supports_attention_backend", False):
        raise ModelError(
            f"{type(model).__name__} has attention code of its own, so that its tokens cannot be scored through a cache "
            "in one pass: evaluate with --kv-cache float, or measure what it generates"
        )
    modules = list(attentions(model).values())
    before = model.config._attn_implementation
    hooks = [module.register_forward_pre_hook(_note_rotation, with_kwargs=True) for module in modules]
    for module in modules:
        module.__dict__[STATE] = View(plan.layers[module.layer_idx], plan.format, compare)
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        for hook in hooks:
            hook.remove()
        for module in modules:
            del module.__dict__[STATE]


def past_only_attention(
    module: Any,
    query: Float[Tensor, "batch query_heads tokens dim"],
    key: Float[Tensor, "batch heads tokens dim"],
    value: Float[Tensor, "batch heads tokens dim"],
    attention_mask: Float[Tensor, "batch 1 tokens tokens"] | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **options: Any,
) -> tuple[Float[Tensor, "batch tokens query_heads dim"], None]:
    """transformers' interface of an attention function; softmax in float32."""
    view: View | None = module.__dict__.get(STATE)
    if view is None:
        raise ModelError(f"{NAME} serves within seen_through_cache(model, plan) alone")
    if (
        key.shape[2] != query.shape[2]
        or attention_mask is None
        or any(options.get(name) is not None for name in UNKNOWN)
    ):
        raise ModelError(
            f"{type(module).__name__} attends in a way that {NAME} does not know: give it no cache, and no learned "
            "sinks or biases of scores"
        )
    exact, seen = (key, value), (view.keys(key), view.values(value))
    output = _attended(view, query, exact, seen, attention_mask, scaling, softcap)
    if view.compare:
        plain = _attended(view, query, exact, exact, attention_mask, scaling, softcap)
        wrong, right = ((x.float().square().sum(dim=(0, 1, 3))) for x in (output - plain, plain))
        view.error = (wrong / right).sqrt()
    return output, None


def head_errors(model: Any) -> Float[Tensor, "layers query_heads"]:
    """What the cache did to each head's output in the last forward pass within `seen_through_cache(..., compare=True)`.

    The norm of the difference over that of the output, on the same queries, keys and values.
    """
    return torch.stack([module.__dict__[STATE].error.cpu() for module in attentions(model).values()])


def _attended(
    view: View,
    query: Float[Tensor, "batch query_heads tokens dim"],
    exact: tuple[Tensor, Tensor],
    seen: tuple[Tensor, Tensor],
    attention_mask: Tensor,
    scaling: float | None,
    softcap: float | None,
) -> Float[Tensor, "batch tokens query_heads dim"]:
    """Exact keys and values where a query sees them so, and those seen through the cache elsewhere."""
    heads, tokens, dim = exact[0].shape[1:]
    grouped = query.unflatten(1, (heads, -1)) * (dim**-0.5 if scaling is None else scaling)
    pairs = [tuple(x[:, :, None] for x in pair) for pair in zip(exact, seen, strict=True)]
    outputs = []
    for start in range(0, tokens, QUERIES_AT_ONCE):
        end = min(start + QUERIES_AT_ONCE, tokens)
        masks = [
            _exact(start, end, view.format, coder, query.device) for coder in (view.coders.keys, view.coders.values)
        ]
        part, until = grouped[..., start:end, :], slice(0, end)  # causal: later tokens cannot be seen
        exact_keys, stored_keys = (x[..., until, :].transpose(-1, -2) for x in pairs[0])
        scores = torch.where(masks[0], part @ exact_keys, part @ stored_keys)
        if softcap is not None:
            scores = (scores / softcap).tanh() * softcap
        scores = scores + attention_mask[:, :, None, start:end, until]
        wide = torch.promote_types(scores.dtype, torch.float32)
        shares = scores.softmax(dim=-1, dtype=wide).to(query.dtype)
        exact_values, stored_values = (x[..., until, :] for x in pairs[1])
        outputs.append(
            torch.where(masks[1], shares, 0) @ exact_values + torch.where(masks[1], 0, shares) @ stored_values
        )
    return torch.cat(outputs, dim=3).flatten(1, 2).transpose(1, 2).contiguous()


AttentionInterface.register(NAME, past_only_attention)
AttentionMaskInterface.register(NAME, eager_mask)


def _exact(
    start: int, end: int, format: CacheFormat, coder: Coder, device: torch.device
) -> Bool[Tensor, "queries tokens"]:
    queries, tokens = torch.arange(start, end, device=device), torch.arange(end, device=device)
    return exact_tokens(queries, tokens, format, coder.block)


def _note_rotation(module: Any, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    module.__dict__[STATE].rotation = kwargs.get("position_embeddings")
