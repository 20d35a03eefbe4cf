"""x · Wᵀ with W decoded in float64: slow, and plainly right.

    W[o, i] = (code[o, i] - zero[o, i // group_size]) · scale[o, i // group_size]

`packed` holds the codes as `packing.int32_words` does. Without zero points the grid is symmetric: every zero is
2**(bits - 1).
"""

import torch
from jaxtyping import Float, Int32, UInt8
from torch import Tensor

from halfbyte.packing import int32_words


def dequantize(
    packed: Int32[Tensor, "out words"],
    scales: Float[Tensor, "out groups"],
    zero_points: UInt8[Tensor, "out groups"] | None,
    bits: int,
    group_size: int,
) -> Float[Tensor, "out in"]:
    """W in float64."""
    group = torch.arange(scales.shape[1] * group_size, device=packed.device) // group_size
    codes = int32_words.unpack(packed, bits, len(group)).double()
    zeros = torch.full_like(scales, 2 ** (bits - 1)) if zero_points is None else zero_points
    return (codes - zeros[:, group].double()) * scales[:, group].double()


def wna16_matmul(
    x: Float[Tensor, "tokens in"],
    packed: Int32[Tensor, "out words"],
    scales: Float[Tensor, "out groups"],
    zero_points: UInt8[Tensor, "out groups"] | None,
    bits: int,
    group_size: int,
    bias: Float[Tensor, "out"] | None = None,
) -> Float[Tensor, "tokens out"]:
    """x · Wᵀ + bias, computed in float64 and returned in the dtype of x."""
    y = x.double() @ dequantize(packed, scales, zero_points, bits, group_size).T
    return (y if bias is None else y + bias.double()).to(x.dtype)
