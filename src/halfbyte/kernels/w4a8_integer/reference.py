"""Products with integer group scales in int64: slow, and plainly right.

`accumulated` is the integer that an int32 kernel must arrive at; `w4a8_integer` scales it in float64.
"""

import torch
from jaxtyping import Float, Int8, Int16, Int32, Int64, Integer, UInt8
from torch import Tensor

from halfbyte.packing import int32_words


def accumulated(
    x: Int8[Tensor, "tokens in"],
    weight: Int8[Tensor, "out in"] | Int32[Tensor, "out words"],
    multipliers: UInt8[Tensor, "out groups"] | Int16[Tensor, "out groups"],
    *,
    bits: int = 4,
    x_zeros: Int32[Tensor, "tokens"] | None = None,
    weight_zeros: Int8[Tensor, "out groups"] | None = None,
) -> Int64[Tensor, "tokens out"]:
    """Σ_k (x - x_zero) · S · (w - w_zero), exact."""
    ins, groups = x.shape[1], multipliers.shape[1]
    codes: Integer[Tensor, "out in"] = weight.long()
    if weight.dtype == torch.int32:
        codes = int32_words.unpack(weight, bits, ins).long() - 2 ** (bits - 1)
    group = torch.arange(ins, device=x.device) // (ins // groups)
    centred = codes if weight_zeros is None else codes - weight_zeros.long()[:, group]
    inputs = x.long() if x_zeros is None else x.long() - x_zeros.long()[:, None]
    return inputs @ (centred * multipliers.long()[:, group]).T


def w4a8_integer(
    x: Int8[Tensor, "tokens in"],
    x_scales: Float[Tensor, "tokens"],
    weight: Int8[Tensor, "out in"] | Int32[Tensor, "out words"],
    multipliers: UInt8[Tensor, "out groups"] | Int16[Tensor, "out groups"],
    factors: Float[Tensor, "out"],
    bias: Float[Tensor, "out"] | None = None,
    *,
    bits: int = 4,
    x_zeros: Int32[Tensor, "tokens"] | None = None,
    sums: Int32[Tensor, "out"] | None = None,
    weight_zeros: Int8[Tensor, "out groups"] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "tokens out"]:
    """The op in float64, returned in `dtype`. `sums` are for kernels that sum x · w first; here they are not read."""
    del sums
    whole = accumulated(x, weight, multipliers, bits=bits, x_zeros=x_zeros, weight_zeros=weight_zeros)
    y = whole.double() * x_scales.double()[:, None] * factors.double()
    return (y if bias is None else y + bias.double()).to(dtype)
