"""What the cache of a block would be given: extremes and sample tokens of its keys and values, head by head."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface

from halfbyte.calibration.attention import attending_by
from halfbyte.calibration.walk import Stream
from halfbyte.errors import ModelError
from halfbyte.numerics.cache import unrotate

NAME = "halfbyte_observing"
STATE = "_halfbyte_observer"
SEQUENCES, TOKENS = 4, 256  # that are kept as they are: so many sequences, the first tokens of each


@dataclass(slots=True, eq=False)
class Extremes:
    """Sums over tokens, per head and channel: they merge in any order."""

    tokens: int
    total: Float[Tensor, "heads dim"]
    squares: Float[Tensor, "heads dim"]
    minimum: Float[Tensor, "heads dim"]
    maximum: Float[Tensor, "heads dim"]

    @classmethod
    def of(cls, x: Float[Tensor, "batch heads tokens dim"]) -> "Extremes":
        """Of one batch."""
        wide = x.float()
        return cls(
            x.shape[0] * x.shape[2], wide.sum((0, 2)), wide.square().sum((0, 2)), wide.amin((0, 2)), wide.amax((0, 2))
        )

    def merge(self, other: "Extremes") -> "Extremes":
        """Of both."""
        return Extremes(
            self.tokens + other.tokens,
            self.total + other.total,
            self.squares + other.squares,
            torch.minimum(self.minimum, other.minimum),
            torch.maximum(self.maximum, other.maximum),
        )


@dataclass(slots=True, eq=False)
class CacheStatistics:
    """Of one attention: what its cache would hold, and whole sequences of queries, keys and values."""

    keys: Extremes | None = None  # after RoPE
    bare_keys: Extremes | None = None  # before it; None where the model does not say how it rotates
    values: Extremes | None = None
    samples: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    """Queries [1 query_heads tokens dim], keys and values [1 heads tokens dim] of some sequences."""
    rotations: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Cosines and sines [1 tokens rotated] of the same."""
    scaling: float = 1.0

    def absorb(self, query: Tensor, key: Tensor, value: Tensor, rotation: tuple[Tensor, Tensor] | None) -> None:
        """Add a batch."""
        self.keys = _merged(self.keys, Extremes.of(key))
        self.values = _merged(self.values, Extremes.of(value))
        if rotation is not None:
            self.bare_keys = _merged(self.bare_keys, Extremes.of(unrotate(key, *rotation)))
        for row in range(min(len(key), SEQUENCES - len(self.samples))):
            kept = [x[row : row + 1, :, :TOKENS].float() for x in (query, key, value)]
            self.samples.append((kept[0], kept[1], kept[2]))
            if rotation is not None:
                turns = [x[min(row, len(x) - 1)][None, :TOKENS].float() for x in rotation]
                self.rotations.append((turns[0], turns[1]))


@torch.no_grad()
def observe_cache(block: nn.Module, stream: Stream, index: int) -> CacheStatistics:
    """What the block's attention writes over the whole stream. ModelError where its attention cannot be watched."""
    found = CacheStatistics()
    with observing(block, found):
        for batch in range(len(stream.hidden)):
            stream.run(block, index, batch)
    if found.keys is None:
        raise ModelError(
            f"{type(block).__name__} has attention code of its own, so that its keys and values cannot be observed: "
            "give the cache no step (wkv), its formats alone need no calibration"
        )
    return found


@contextmanager
def observing(block: nn.Module, found: CacheStatistics) -> Iterator[None]:
    """Within it, the block's attention reports to `found`. Edits the block in place and undoes it."""
    with attending_by(block, NAME, STATE, lambda module, own: _Observer(found, _plain(module, own))):
        yield


@dataclass(slots=True, eq=False)
class _Observer:
    found: CacheStatistics
    attend: Callable[..., Any]
    rotation: tuple[Tensor, Tensor] | None = None


def _observed_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Any:
    observer: _Observer = module.__dict__[STATE]
    observer.found.scaling = options.get("scaling") or key.shape[-1] ** -0.5
    observer.found.absorb(query, key, value, observer.rotation)
    return observer.attend(module, query, key, value, *args, **options)


def _plain(module: Any, name: str) -> Callable[..., Any]:
    """The attention function that the module would call."""
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return AttentionInterface().get_interface(name, eager)


def _merged(before: Extremes | None, now: Extremes) -> Extremes:
    return now if before is None else before.merge(now)


AttentionInterface.register(NAME, _observed_attention)
