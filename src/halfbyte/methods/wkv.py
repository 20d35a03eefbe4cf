"""WKVQuant's two dimensions for the cache: a static shift and scale of every channel, then dynamic grids of every token.

Yue et al., 2024 — https://arxiv.org/abs/2402.12065, two-dimensional quantization

    here      paper      what it is
    shift     δ          [heads dim] the middle that a channel of keys or values varies around
    scale     s          [heads dim] how far it varies, over the geometric mean of its head's channels
    strength  –          exponent of the scale: 0 leaves it at 1, 1 makes all channels of a head equally wide
    error     –          ‖attention through the cache - exact attention‖² over sampled sequences, past-only

The paper trains δ and s from an unstated start and folds them into the producing linear, so before RoPE. Here they are
what calibration sees, and the cache applies them: weights stay as they are, and so do models with norms or rotations
between the projection and the cache. Which of the designs for RoPE it is, the format and `tied` say:

    scheme.cache.rope: before   keys are stored before RoPE, and the past is rotated anew at every step
    scheme.cache.rope: after    keys are stored after RoPE; a kernel scales the query by s and drops q·δ, the same for all
    tied: true                  s is one number for each pair of channels that RoPE turns together and keys are not shifted:
                                so s could stand in the q and k projections, as in QoQ (https://arxiv.org/abs/2405.04532)

`search` tries each kind of middle and of width, keys and then values, and keeps what errs least.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from halfbyte.calibration.cache import CacheStatistics, Extremes
from halfbyte.errors import CalibrationError
from halfbyte.numerics.cache import (
    NO_SMOOTHING,
    LayerCoders,
    Smoothing,
    exact_tokens,
    layer_coders,
    rotate,
    through_cache,
    unrotate,
)
from halfbyte.numerics.precision import float32_products
from halfbyte.scheme import CacheFormat, Value

SMALLEST = 1e-5  # of widths

Middle = Literal["none", "mean", "midrange"]
Width = Literal["none", "deviation", "reach"]

MIDDLES: tuple[Middle, ...] = ("none", "mean", "midrange")
WIDTHS: tuple[tuple[Width, float], ...] = (
    ("none", 1.0), ("deviation", 0.5), ("deviation", 1.0), ("reach", 0.5), ("reach", 1.0),
)  # fmt: skip


def shift_of(seen: Extremes, middle: Middle) -> Float[Tensor, "heads dim"]:
    """δ: zero, the mean, or halfway between the extremes."""
    match middle:
        case "none":
            return torch.zeros_like(seen.total)
        case "mean":
            return seen.total / seen.tokens
        case "midrange":
            return (seen.minimum + seen.maximum) / 2


def scale_of(
    seen: Extremes, shift: Float[Tensor, "heads dim"], width: Width, strength: float
) -> Float[Tensor, "heads dim"]:
    """s: how far each channel goes from the shift, typically (deviation) or at most (reach); geometric mean 1 a head."""
    match width:
        case "none":
            return torch.ones_like(shift)
        case "deviation":
            square = seen.squares / seen.tokens - 2 * shift * seen.total / seen.tokens + shift.square()
            wide = square.clamp(min=0).sqrt()
        case "reach":
            wide = torch.maximum(seen.maximum - shift, shift - seen.minimum)
    wide = wide.clamp(min=SMALLEST)
    return (wide / wide.log().mean(dim=-1, keepdim=True).exp()).pow(strength)


def tie_pairs(scale: Float[Tensor, "heads dim"], rotated: int) -> Float[Tensor, "heads dim"]:
    """The geometric mean over channels i and i + rotated/2, which RoPE turns together; channels beyond are their own."""
    turned = scale[:, :rotated].unflatten(1, (2, -1)).log().mean(dim=1, keepdim=True).exp()
    return torch.cat([turned.expand(-1, 2, -1).flatten(1), scale[:, rotated:]], dim=1)


@torch.no_grad()
def exact_attention(seen: CacheStatistics) -> list[Float[Tensor, "1 heads group tokens dim"]]:
    """What attention computes of the sampled sequences as they are."""
    plain = CacheFormat()
    coders = layer_coders(plain, 0, 1)
    return [attend(q, (k, k), (v, v), seen.scaling, plain, coders) for q, k, v in seen.samples]


@torch.no_grad()
def attention_error(
    seen: CacheStatistics,
    exact: Sequence[Float[Tensor, "1 heads group tokens dim"]],
    format: CacheFormat,
    coders: LayerCoders,
) -> float:
    """The squared error of attention whose past goes through the cache, summed over the sampled sequences."""
    error = 0.0
    for place, (query, key, value) in enumerate(seen.samples):
        if format.rope == "before":
            turns = seen.rotations[place]
            stored = rotate(through_cache(unrotate(key, *turns), coders.keys, format), *turns)
        else:
            stored = through_cache(key, coders.keys, format)
        rounded = through_cache(value, coders.values, format)
        found = attend(query, (key, stored), (value, rounded), seen.scaling, format, coders)
        error += float((found - exact[place]).square().sum())
    return error


def attend(
    query: Float[Tensor, "batch query_heads tokens dim"],
    keys: tuple[Float[Tensor, "batch heads tokens dim"], Float[Tensor, "batch heads tokens dim"]],
    values: tuple[Float[Tensor, "batch heads tokens dim"], Float[Tensor, "batch heads tokens dim"]],
    scaling: float,
    format: CacheFormat,
    coders: LayerCoders,
) -> Float[Tensor, "batch heads group tokens dim"]:
    """Causal attention over exact and stored keys and values, each where a query sees it so."""
    tokens, heads = query.shape[2], keys[0].shape[1]
    places = torch.arange(tokens, device=query.device)
    exact = [exact_tokens(places, places, format, coder.block) for coder in (coders.keys, coders.values)]
    grouped = query.unflatten(1, (heads, -1)) * scaling
    with float32_products(tf32=True):
        scores = [grouped @ each[:, :, None].transpose(-1, -2) for each in keys]
        later = places > places[:, None]
        shares = torch.where(exact[0], *scores).masked_fill(later, -torch.inf).softmax(dim=-1)
        split = torch.where(exact[1], shares, 0), torch.where(exact[1], 0, shares)
        return split[0] @ values[0][:, :, None] + split[1] @ values[1][:, :, None]


class WKV(Value):
    """Find the shifts and scales of every layer's cache."""

    method: Literal["wkv"] = "wkv"
    search: bool = True
    middle: Middle = "midrange"  # where nothing is searched
    width: Width = "reach"
    strength: float = Field(default=1.0, ge=0, le=1)
    tied: bool = False

    def smooth(self, seen: CacheStatistics, format: CacheFormat, layer: int, layers: int) -> Smoothing:
        """The shifts and scales of layer `layer`. CalibrationError where keys before RoPE were not seen."""
        keys = seen.bare_keys if format.rope == "before" else seen.keys
        if keys is None or seen.values is None:
            raise CalibrationError(
                "keys before RoPE could not be observed, because the model hands its attention no cosines and sines: "
                "store them after RoPE (`rope: after`)"
            )
        best, kept = NO_SMOOTHING, NO_SMOOTHING
        exact = exact_attention(seen) if self.search else []
        for side, extremes in (("key", keys), ("value", seen.values)):
            least = float("inf")
            rotated = seen.rotations[0][0].shape[-1] if self.tied and side == "key" and seen.rotations else 0
            for shift, scale in self.candidates(extremes, rotated):
                trial = replace(best, **{f"{side}_shift": shift, f"{side}_scale": scale})
                error = 0.0
                if self.search:
                    error = attention_error(seen, exact, format, layer_coders(format, layer, layers, trial))
                if error < least:
                    least, kept = error, trial
            best = kept
        return best

    def candidates(self, seen: Extremes, rotated: int) -> Iterator[tuple[Tensor | None, Tensor]]:
        """Shifts and scales to choose from; without a search the one that the options say.

        `rotated`: so many channels are tied in pairs, and nothing is shifted; 0: none are.
        """
        middles: tuple[Middle, ...] = MIDDLES if self.search else (self.middle,)
        widths: tuple[tuple[Width, float], ...] = WIDTHS if self.search else ((self.width, self.strength),)
        for middle in ("none",) if rotated else middles:
            for width, strength in widths:
                shift = shift_of(seen, middle)
                scale = scale_of(seen, shift, width, strength)
                yield (None, tie_pairs(scale, rotated)) if rotated else (shift, scale)
