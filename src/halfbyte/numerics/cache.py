"""Keys and values as codes: dynamic token-wise grids after a static shift and scale of every channel.

WKVQuant, Yue et al., 2024 — https://arxiv.org/abs/2402.12065; KIVI, Liu et al., 2024 — https://arxiv.org/abs/2402.02750

    here      paper       what it is
    shift     δ           [heads dim] subtracted from every token; centres channels, which key biases push away from zero
    scale     s           [heads dim] positive; what is left is divided by it, so that no channel owns its group's range
    zeros     -z·h        the real that code 0 stands for: the lowest of its group
    scales    h           the step, (max - min) / (2^b - 1)
    turn      R3          each head's Hadamard rotation of keys, after shift and scale (QuaRot, arXiv 2404.00456)
    exact     –           [queries tokens] which tokens a query sees as they were: itself, a window, the first ones

    x ≈ scale·(code·h + zero) + shift

A group is `group_size` neighbouring channels of one token and head, and never spans heads. With `block` above 1 it is
one channel over so many tokens (KIVI's keys). Steps and zeros are float16: 4.25 bits a channel at 4 bits and 128
channels. Codes are chosen for the stored float16 numbers, so that a code's value is the same wherever it is decoded.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float16, UInt8
from torch import Tensor

from halfbyte.errors import FormatError, WeightError
from halfbyte.numerics.rotation import rotation
from halfbyte.scheme import CacheFormat

STORED = torch.float16  # of steps and zeros
LARGEST = torch.finfo(STORED).max


@dataclass(frozen=True, slots=True, eq=False)
class TokenCodes:
    """Tokens as they are stored, before codes are packed."""

    codes: UInt8[Tensor, "batch heads tokens dim"]
    scales: Float16[Tensor, "batch heads blocks groups"]
    zeros: Float16[Tensor, "batch heads blocks groups"] | None  # None: the middle code stands for zero


@dataclass(frozen=True, slots=True, eq=False)
class Coder:
    """How the keys, or the values, of one layer become codes and back."""

    bits: int
    group_size: int  # channels; heads narrower than that are one group
    symmetric: bool = False
    block: int = 1  # tokens that share a channel's grid; 1: every token has grids of its own, group by group
    shift: Float[Tensor, "heads dim"] | None = None
    scale: Float[Tensor, "heads dim"] | None = None
    turned: bool = False  # a head's channels are rotated together before grids are found

    def groups(self, dim: int) -> int:
        """Grids of one token, or of one block. FormatError where groups do not divide the head, or nothing rotates it."""
        if self.turned:
            try:
                rotation(dim, None)
            except WeightError as cause:
                raise FormatError(
                    f"heads of {dim} channels cannot be rotated ({cause}): set rotate_keys: false"
                ) from cause
        if self.block > 1:
            return dim
        size = min(self.group_size, dim)
        if dim % size:
            raise FormatError(
                f"cache groups of {self.group_size} channels do not divide heads of {dim}: choose a group_size that does"
            )
        return dim // size

    def encode(self, x: Float[Tensor, "batch heads tokens dim"]) -> TokenCodes:
        """The nearest codes of every token. With blocks, `tokens` is a multiple of `block`.

        Steps and zeros beyond float16 take its largest number. Computed in float32, or float64 for float64.
        """
        wide = self.smooth(x.to(torch.promote_types(x.dtype, torch.float32)))
        grouped, axis = self.grouped(wide)
        low, high = grouped.aminmax(dim=axis, keepdim=True)
        top = 2**self.bits - 1
        if self.symmetric:
            middle = 2 ** (self.bits - 1)
            steps = _stored(torch.maximum(-low, high) / (middle - 1))
            codes = _ratio(grouped, steps).round().clamp(-middle, middle - 1) + middle
            zeros = None
        else:
            lows = _stored(low)
            steps = _stored((high - lows.to(wide)) / top)
            codes = _ratio(grouped - lows.to(wide), steps).round().clamp(0, top)
            zeros = lows.squeeze(axis)
        return TokenCodes(codes.to(torch.uint8).reshape(x.shape), steps.squeeze(axis), zeros)

    def decode(self, stored: TokenCodes, dtype: torch.dtype) -> Float[Tensor, "batch heads tokens dim"]:
        """What the codes stand for, computed in float32 (float64 for float64) and rounded once to `dtype`."""
        compute = torch.promote_types(dtype, torch.float32)
        grouped, axis = self.grouped(stored.codes.to(compute))
        steps = stored.scales.to(compute).unsqueeze(axis)
        if stored.zeros is None:
            wide = (grouped - 2 ** (self.bits - 1)) * steps
        else:
            wide = grouped * steps + stored.zeros.to(compute).unsqueeze(axis)
        return self.restore(wide.reshape(stored.codes.shape)).to(dtype)

    def simulate(self, x: Float[Tensor, "batch heads tokens dim"]) -> Float[Tensor, "batch heads tokens dim"]:
        """What attention reads of the tokens once they are stored. Tokens of an unfinished block stay exact."""
        whole = x.shape[2] // self.block * self.block
        rounded = self.decode(self.encode(x[:, :, :whole]), x.dtype)
        return rounded if whole == x.shape[2] else torch.cat([rounded, x[:, :, whole:]], dim=2)

    def smooth(self, x: Float[Tensor, "batch heads tokens dim"]) -> Float[Tensor, "batch heads tokens dim"]:
        """Tokens in the coordinates in which grids are found, in their own dtype."""
        if self.shift is not None:
            x = x - self.shift[:, None].to(x)
        if self.scale is not None:
            x = x / self.scale[:, None].to(x)
        return rotation(x.shape[-1], None).apply(x) if self.turned else x

    def restore(self, x: Float[Tensor, "batch heads tokens dim"]) -> Float[Tensor, "batch heads tokens dim"]:
        """The inverse of `smooth`."""
        if self.turned:
            x = rotation(x.shape[-1], None).inverse(x)
        if self.scale is not None:
            x = x * self.scale[:, None].to(x)
        return x if self.shift is None else x + self.shift[:, None].to(x)

    def grouped(self, x: Tensor) -> tuple[Tensor, int]:
        """The same numbers with an axis that runs over what shares a grid, and that axis."""
        if self.block > 1:
            return x.unflatten(2, (-1, self.block)), 3
        return x.unflatten(3, (self.groups(x.shape[3]), -1)), 4


@dataclass(frozen=True, slots=True, eq=False)
class LayerCoders:
    """The keys' and the values' coder of one layer."""

    keys: Coder
    values: Coder


@dataclass(frozen=True, slots=True, eq=False)
class Smoothing:
    """Static shifts and scales of one layer, found by calibration; None: nothing is moved."""

    key_shift: Float[Tensor, "heads dim"] | None = None
    key_scale: Float[Tensor, "heads dim"] | None = None
    value_shift: Float[Tensor, "heads dim"] | None = None
    value_scale: Float[Tensor, "heads dim"] | None = None


NO_SMOOTHING = Smoothing()


def layer_coders(format: CacheFormat, layer: int, layers: int, smoothing: Smoothing = NO_SMOOTHING) -> LayerCoders:
    """The coders of layer `layer` of `layers`: the first and last ones may have more bits."""
    edge = min(layer, layers - 1 - layer) < format.edge_layers
    bits = [max(bits, format.edge_bits) if edge else bits for bits in (format.key_bits, format.value_bits)]
    common = {"group_size": format.group_size, "symmetric": format.symmetric}
    block = format.block if format.keys == "channel" else 1
    return LayerCoders(
        Coder(
            bits[0],
            **common,
            block=block,
            shift=smoothing.key_shift,
            scale=smoothing.key_scale,
            turned=format.rotate_keys,
        ),
        Coder(bits[1], **common, shift=smoothing.value_shift, scale=smoothing.value_scale),
    )


def tokens_to_store(seen: int, format: CacheFormat, block: int) -> int:
    """Of `seen` tokens, how many after the sinks are codes: those before the window, in whole blocks."""
    return max(seen - format.window - format.sinks, 0) // block * block


def exact_tokens(queries: Tensor, tokens: Tensor, format: CacheFormat, block: int) -> Bool[Tensor, "queries tokens"]:
    """Which tokens each query sees as they were, by position, in decoding one token at a time.

    The past of a query at t is 0 .. t-1, or with `past_only: false` 0 .. t.
    """
    seen = queries[:, None] + (0 if format.past_only else 1)
    until = format.sinks + (seen - format.window - format.sinks).clamp(min=0) // block * block
    return (tokens[None] < format.sinks) | (tokens[None] >= until)


def through_cache(
    x: Float[Tensor, "batch heads tokens dim"], coder: Coder, format: CacheFormat
) -> Float[Tensor, "batch heads tokens dim"]:
    """Tokens as they come back from the cache: sinks exact, the blocks counted from there."""
    return torch.cat([x[:, :, : format.sinks], coder.simulate(x[:, :, format.sinks :])], dim=2)


def rotate(
    x: Float[Tensor, "batch heads tokens dim"], cos: Float[Tensor, "batch tokens rotated"],
    sin: Float[Tensor, "batch tokens rotated"],
) -> Float[Tensor, "batch heads tokens dim"]:  # fmt: skip
    """RoPE on the first `rotated` channels, channel i with channel i + rotated/2, as Llama and GPT-NeoX have it."""
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turned.chunk(2, dim=-1)
    half = torch.cat([-second, first], dim=-1)
    return torch.cat([turned * cos[:, None] + half * sin[:, None], rest], dim=-1)


def unrotate(
    x: Float[Tensor, "batch heads tokens dim"], cos: Float[Tensor, "batch tokens rotated"],
    sin: Float[Tensor, "batch tokens rotated"],
) -> Float[Tensor, "batch heads tokens dim"]:  # fmt: skip
    """The inverse of `rotate`; cos² + sin² need not be 1 (YaRN scales both)."""
    norm = cos.square() + sin.square()
    return rotate(x, cos / norm, -sin / norm)


def _stored(x: Tensor) -> Float16[Tensor, "..."]:
    return x.clamp(-LARGEST, LARGEST).to(STORED)


def _ratio(x: Tensor, steps: Float16[Tensor, "..."]) -> Tensor:
    """x in steps; 0 where the step is 0, as in a group of equal numbers."""
    wide = steps.to(x)
    return torch.where(wide > 0, x / torch.where(wide > 0, wide, 1), 0)
