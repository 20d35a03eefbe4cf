"""Rounding with a slope: the value of what is stored, the gradient of what would be without rounding.

The gradient passes straight through a rounding and stops where a value saturates; scales and zero points take what is
left of it, so that a grid can learn too (the straight-through estimator of OmniQuant's and LSQ's code).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from halfbyte.numerics.activations import InputQuantizer, grid_of, simulate
from halfbyte.numerics.grid import Grid, expand
from halfbyte.scheme import WeightFormat


def straight_through(rounded: Tensor, exact: Tensor) -> Tensor:
    """The value of `rounded` with the slope of `exact`."""
    return exact + (rounded - exact).detach()


def round_through(weight: Float[Tensor, "out in"], grid: Grid, format: WeightFormat) -> Float[Tensor, "out in"]:
    """The weight at its nearest codes, as encoding and decoding give it; slopes in the weight and in the grid."""
    scales = expand(grid.scales, *weight.shape)
    position = weight / scales
    if grid.zero_points is None:
        return straight_through(position.round(), position).clamp(format.lowest, format.highest) * scales
    zeros = expand(grid.zero_points, *weight.shape)
    position = position + zeros
    return (straight_through(position.round(), position).clamp(format.lowest, format.highest) - zeros) * scales


def simulate_through(x: Float[Tensor, "*leading in"], quantizer: InputQuantizer) -> Float[Tensor, "*leading in"]:
    """`simulate` with slopes: straight through the rounding, and through a dynamic token's scale where it has one.

    A rounding error is so many steps of its token, so it shrinks with the largest magnitude: x + step·(error in steps).
    """
    seen = simulate(x.detach(), quantizer)
    format = quantizer.format
    if not format.dynamic or format.granularity != "token" or format.outliers is not None:
        return straight_through(seen, x)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    low, high = wide.aminmax(dim=-1, keepdim=True)
    steps, _ = grid_of(low, high, format)
    error = (seen - x.detach()) / steps.detach()
    return (wide + steps * error).to(x.dtype)
