"""Rounding with a slope: the value of what is stored, the gradient of what would be without rounding.

The gradient passes straight through a rounding and stops where a value saturates; scales and zero points take what is
left of it, so that a grid can learn too (the straight-through estimator of OmniQuant's and LSQ's code). A rounding error is so
many steps of its group: what moves the group's range moves the error.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from halfbyte.numerics.activations import InputQuantizer, grid_of, simulate
from halfbyte.numerics.cache import Coder
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

    Where it has one the answer is x + step·(error in steps).
    """
    seen = simulate(x.detach(), quantizer)
    format = quantizer.format
    if not format.dynamic or format.granularity != "token" or format.outliers is not None:
        return straight_through(seen, x)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    low, high = (
        wide.amin(dim=-1, keepdim=True),
        wide.amax(dim=-1, keepdim=True),
    )  # aminmax has no slope before torch 2.12
    steps, _ = grid_of(low, high, format)
    error = (seen - x.detach()) / steps.detach()
    return (wide + steps * error).to(x.dtype)


def store_through(x: Float[Tensor, "batch heads tokens dim"], coder: Coder) -> Float[Tensor, "batch heads tokens dim"]:
    """`Coder.simulate` with slopes in the tokens and in the coder's shift δ and scale s.

    With u = (x - δ)/s it is s·(u + step(u)·(error in steps)) + δ: straight through the rounding, and through the step.
    """
    whole = x.shape[2] // coder.block * coder.block
    smooth = coder.smooth(x[:, :, :whole].to(torch.promote_types(x.dtype, torch.float32)))
    with torch.no_grad():
        error = coder.smooth(coder.simulate(x[:, :, :whole].to(smooth.dtype))) - smooth
    grouped, axis = coder.grouped(smooth)
    low, high = grouped.amin(dim=axis, keepdim=True), grouped.amax(dim=axis, keepdim=True)
    steps = torch.maximum(-low, high) if coder.symmetric else high - low  # in a unit that cancels
    grown = steps / steps.detach().where(steps > 0, torch.ones_like(steps))
    rounded = coder.restore(smooth + (coder.grouped(error)[0] * grown).reshape(smooth.shape)).to(x.dtype)
    return rounded if whole == x.shape[2] else torch.cat([rounded, x[:, :, whole:]], dim=2)
