"""What attention on a cache is given, in the shapes and dtypes that a cache keeps it."""

from typing import NamedTuple

from jaxtyping import Bool, Float, Float16, Int, UInt8
from torch import Tensor


class PackedTokens(NamedTuple):
    """Past keys, or values: x ≈ code · scale + zero, each token and group of channels on a grid of its own."""

    codes: UInt8[Tensor, "batch kv_heads capacity bytes"]  # packing/code_bytes.py: dim · bits / 8 of them
    scales: Float16[Tensor, "batch kv_heads capacity groups"]
    zeros: Float16[Tensor, "batch kv_heads capacity groups"] | None  # None: the middle code stands for zero


class ExactTokens(NamedTuple):
    """Tokens that are kept as they came, sinks or a window, in any order."""

    keys: Float[Tensor, "batch kv_heads exact dim"]
    values: Float[Tensor, "batch kv_heads exact dim"]
    seen: Bool[Tensor, "batch exact"] | None = None  # None: all are


class KeptTokens(NamedTuple):
    """All that a cache of fixed size keeps as it came: the first tokens, and behind them the last ones (kept.py)."""

    keys: Float[Tensor, "batch kv_heads kept dim"]
    values: Float[Tensor, "batch kv_heads kept dim"]
    sinks: int
    first: Int[Tensor, "batch"] | None  # token that is codes alone: `sinks` for each row; None: 0

    @property
    def window(self) -> int:
        return self.keys.shape[2] - self.sinks - 1


class Smoothing(NamedTuple):
    """Static shift and scale of every channel of the packed tokens: x ≈ (code · scale + zero) · scale + shift."""

    key_shift: Float[Tensor, "kv_heads dim"] | None = None
    key_scale: Float[Tensor, "kv_heads dim"] | None = None
    value_shift: Float[Tensor, "kv_heads dim"] | None = None
    value_scale: Float[Tensor, "kv_heads dim"] | None = None


class KeyRotation(NamedTuple):
    """RoPE of packed keys that are stored before it, channel i with i + half; what is beyond 2 · half stays.

    Tokens that count follow each other: token t + j is turned as t is, and then by the j-th of `near`.
    """

    cos: Float[Tensor, "batch capacity half"]
    sin: Float[Tensor, "batch capacity half"]
    near: Float[Tensor, "2 near half"]  # cosines and sines of no scale, for 0, 1, ... tokens further


NO_SMOOTHING = Smoothing()
