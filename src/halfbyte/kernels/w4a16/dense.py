"""A packed weight as a dense one, in the dtype of the activations, on any device."""

import torch
from jaxtyping import Float, Int32, UInt8
from torch import Tensor

from halfbyte.packing import int32_words


def decode(
    packed: Int32[Tensor, "out words"],
    scales: Float[Tensor, "out groups"],
    zero_points: UInt8[Tensor, "out groups"] | None,
    bits: int,
    group_size: int,
    dtype: torch.dtype,
) -> Float[Tensor, "out in"]:
    """(code - zero) · scale in `dtype`, each element rounded once."""
    groups = scales.shape[1]
    weight = int32_words.unpack(packed, bits, groups * group_size).unflatten(1, (groups, group_size)).to(dtype)
    # integers below 256 are exact in every float format, so only the product rounds
    weight -= 2 ** (bits - 1) if zero_points is None else zero_points[:, :, None].to(dtype)
    weight *= scales[:, :, None]
    return weight.flatten(1)
