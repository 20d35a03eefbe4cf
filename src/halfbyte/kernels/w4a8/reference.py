"""x · Wᵀ with both sides decoded in float64: slow, and plainly right.

X[t, k] = (x[t, k] - x_zero[t, group of k]) · x_scale[t, group of k]        W[o, k] likewise
"""

import torch
from jaxtyping import Float, Int8, Int32, Integer
from torch import Tensor

from halfbyte.packing import int32_words


def grouped_int8_matmul(
    x: Int8[Tensor, "tokens in"],
    x_scales: Float[Tensor, "tokens x_groups"],
    weight: Int8[Tensor, "out in"] | Int32[Tensor, "out words"],
    weight_scales: Float[Tensor, "out groups"],
    *,
    bits: int = 8,
    x_zeros: Int32[Tensor, "tokens x_groups"] | None = None,
    weight_zeros: Int8[Tensor, "out groups"] | None = None,
    bias: Float[Tensor, "out"] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "tokens out"]:
    """x · Wᵀ + bias, computed in float64 and returned in `dtype`."""
    codes = weight
    if weight.dtype == torch.int32:
        codes = int32_words.unpack(weight, bits, x.shape[1]).long() - 2 ** (bits - 1)
    y = values(x, x_scales, x_zeros) @ values(codes, weight_scales, weight_zeros).T
    return (y if bias is None else y + bias.double()).to(dtype)


def values(
    codes: Integer[Tensor, "rows in"],
    scales: Float[Tensor, "rows groups"],
    zeros: Integer[Tensor, "rows groups"] | None,
) -> Float[Tensor, "rows in"]:
    """What the codes stand for, in float64."""
    group = torch.arange(codes.shape[1], device=codes.device) // (codes.shape[1] // scales.shape[1])
    centred = codes.double() if zeros is None else codes.double() - zeros[:, group].double()
    return centred * scales[:, group].double()
