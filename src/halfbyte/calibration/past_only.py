"""A block that attends, in calibration, as it will when it decodes through a quantized cache, with slopes.

Every token sees its past as the cache stores it and itself as it is: scores with stored keys below the diagonal and exact
ones on it, likewise the values (past-only quantization, WKVQuant, https://arxiv.org/abs/2402.12065, section 3.1). What the
cache format keeps exact, sinks and a window, is exact here too. Gradients pass straight through the cache's rounding, and
reach its shifts and scales, which may learn.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface

from halfbyte.calibration.attention import attending_by, attention_modules
from halfbyte.errors import ModelError
from halfbyte.numerics.cache import (
    NO_SMOOTHING,
    Coder,
    LayerCoders,
    Smoothing,
    exact_tokens,
    layer_coders,
    rotate,
    unrotate,
)
from halfbyte.numerics.slopes import store_through
from halfbyte.scheme import CacheFormat

NAME = "halfbyte_learning_past_only"
STATE = "_halfbyte_learning_view"
UNKNOWN = ("s_aux", "position_bias")  # what some architectures add to their scores


@dataclass(slots=True, eq=False)
class _View:
    coders: LayerCoders
    format: CacheFormat
    rotation: tuple[Tensor, Tensor] | None = None

    def keys(self, keys: Float[Tensor, "batch heads tokens dim"]) -> Float[Tensor, "batch heads tokens dim"]:
        if self.format.rope == "after":
            return self._stored(keys, self.coders.keys)
        assert self.rotation is not None
        stored = self._stored(unrotate(keys, *self.rotation), self.coders.keys)
        return rotate(stored, *self.rotation).to(keys.dtype)

    def values(self, values: Float[Tensor, "batch heads tokens dim"]) -> Float[Tensor, "batch heads tokens dim"]:
        return self._stored(values, self.coders.values)

    def _stored(
        self, x: Float[Tensor, "batch heads tokens dim"], coder: Coder
    ) -> Float[Tensor, "batch heads tokens dim"]:
        sinks = self.format.sinks
        return torch.cat([x[:, :, :sinks], store_through(x[:, :, sinks:], coder)], dim=2)


@dataclass(slots=True, eq=False)
class BlockCache:
    """The cache of one block while it is calibrated. What learns its shifts and scales leaves them here."""

    format: CacheFormat
    layer: int
    layers: int
    smoothing: Smoothing = NO_SMOOTHING
    learned: bool = False

    def attending(self, block: nn.Module, smoothing: Smoothing | None = None) -> AbstractContextManager[None]:
        """Within it, the block attends through this cache, or through one with another smoothing."""
        coders = layer_coders(self.format, self.layer, self.layers, smoothing or self.smoothing)
        return attending_past_only(block, coders, self.format)


@dataclass(frozen=True, slots=True, eq=False)
class LearnedSmoothing:
    """Shifts and scales that learn, from those that were found; what was not shifted stays so.

    A scale learns as the logarithm of a factor, a shift in parts of the scale, so that one rate suits quiet and loud channels.
    """

    start: Smoothing
    factors: Mapping[str, Float[Tensor, "heads dim"]]  # by side, "key" or "value"
    moves: Mapping[str, Float[Tensor, "heads dim"]]

    @classmethod
    def of(cls, start: Smoothing) -> "LearnedSmoothing":
        """That begins with these. Keys that are scaled and not shifted are tied in pairs, and stay as they are."""
        sides = [side for side in ("key", "value") if getattr(start, f"{side}_shift") is not None]
        factors, moves = (
            {side: torch.zeros_like(getattr(start, f"{side}_scale")).requires_grad_() for side in sides}
            for _ in range(2)
        )
        return cls(start, factors, moves)

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.factors.values(), *self.moves.values()]

    def smoothing(self) -> Smoothing:
        """As it stands, with slopes."""
        found = {}
        for side, factor in self.factors.items():
            scale, shift = getattr(self.start, f"{side}_scale"), getattr(self.start, f"{side}_shift")
            found[f"{side}_scale"] = scale * factor.exp()
            found[f"{side}_shift"] = shift + scale * self.moves[side]
        return replace(self.start, **found)

    @torch.no_grad()
    def settled(self) -> Smoothing:
        """As it stands, without slopes."""
        return self.smoothing()


@contextmanager
def attending_past_only(block: nn.Module, coders: LayerCoders, format: CacheFormat) -> Iterator[None]:
    """Within it, the block attends through the cache. Edits the block in place and undoes it.

    ModelError for attention code that does not go through transformers' interface.
    """
    if not attention_modules(block):
        raise ModelError(
            f"{type(block).__name__} has attention code of its own: learn without the cache, or leave it out"
        )
    with attending_by(block, NAME, STATE, lambda _module, _own: _View(coders, format)):
        yield


def _attend(
    module: Any,
    query: Float[Tensor, "batch query_heads tokens dim"],
    key: Float[Tensor, "batch heads tokens dim"],
    value: Float[Tensor, "batch heads tokens dim"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **options: Any,
) -> tuple[Float[Tensor, "batch tokens query_heads dim"], None]:
    """transformers' interface of an attention function; softmax in float32."""
    view: _View = module.__dict__[STATE]
    if key.shape[2] != query.shape[2] or any(options.get(name) is not None for name in UNKNOWN):
        raise ModelError(f"{type(module).__name__} attends in a way that past-only calibration does not know")
    tokens, heads = key.shape[2], key.shape[1]
    places = torch.arange(tokens, device=key.device)
    grouped = query.unflatten(1, (heads, -1)) * (key.shape[-1] ** -0.5 if scaling is None else scaling)

    def exact(coder: Coder) -> Tensor:
        return exact_tokens(places, places, view.format, coder.block)

    pairs = [x[:, :, None].transpose(-1, -2) for x in (key, view.keys(key))]
    scores = torch.where(exact(view.coders.keys), grouped @ pairs[0], grouped @ pairs[1])
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    scores = _masked(scores, attention_mask, places)
    shares = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    own = exact(view.coders.values)
    summed = (
        torch.where(own, shares, 0) @ value[:, :, None] + torch.where(own, 0, shares) @ view.values(value)[:, :, None]
    )
    return summed.flatten(1, 2).transpose(1, 2).contiguous(), None


def _masked(scores: Tensor, mask: Tensor | None, places: Tensor) -> Tensor:
    """Scores [batch heads group queries tokens] without what a query may not see; no mask means causal."""
    if mask is None:
        return scores.masked_fill(places > places[:, None], -torch.inf)
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask[:, :, None], -torch.inf)
    return scores + mask[:, :, None]


AttentionInterface.register(NAME, _attend)
