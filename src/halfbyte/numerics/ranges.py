"""Which range a group's grid should span: all of it, or less, so that most values round better and a few saturate."""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from halfbyte.numerics.grid import Grid, decode, encode, fit, grid_between, scales_shape, to_groups
from halfbyte.scheme import PerChannel, PerGroup, WeightFormat

Ranges = Literal["minmax", "mse", "output"]
"""minmax: the group's own range. mse: the range of least error |w - q|^2.4 (the GPTQ code's search). output: the range
of least error in the layer's outputs (AWQ's clip search, arXiv 2306.00978 and its code), from the Gram matrix."""

MSE_NORM = 2.4
SMALLEST_SHRINK = 0.2
MSE_STEPS = 80
SMALLEST_CLIP = 0.5
CLIP_STEPS = 20

GroupError = Callable[[Float[Tensor, "out in"]], Float[Tensor, "rows groups"]]


def find_grid(
    weight: Float[Tensor, "out in"], format: WeightFormat, ranges: Ranges, gram: Float[Tensor, "in in"] | None = None
) -> Grid:
    """The grid of a weight under a range policy. `output` needs `gram`, the Gram matrix XᵀX of the layer's inputs."""
    match ranges:
        case "minmax":
            return fit(weight, format)
        case "mse":
            shape = scales_shape(*weight.shape, format.granularity)

            def element_error(delta: Float[Tensor, "out in"]) -> Float[Tensor, "rows groups"]:
                return to_groups(delta.abs().pow_(MSE_NORM), format.granularity).sum(dim=1).view(shape)

            return search(weight, format, element_error, SMALLEST_SHRINK, MSE_STEPS)
        case "output":
            if gram is None:
                raise ValueError("the range policy `output` needs the Gram matrix of the layer's inputs")
            return search(weight, format, output_error(gram, format), SMALLEST_CLIP, CLIP_STEPS)


def search(
    weight: Float[Tensor, "out in"], format: WeightFormat, error: GroupError, smallest: float, steps: int
) -> Grid:
    """The best grid per group among ranges clipped at 1, ..., `smallest` (left out) times the largest magnitude."""
    best = fit(weight, format)
    least = error(weight - decode(encode(weight, best, format), best))
    low, high = to_groups(weight, format.granularity).aminmax(dim=1)
    low, high = low.view(best.scales.shape), high.view(best.scales.shape)
    reach = torch.maximum(-low, high)
    for step in range(1, steps):
        clip = reach * (1 - (1 - smallest) * step / steps)
        grid = grid_between(torch.maximum(low, -clip), torch.minimum(high, clip), format)
        now = error(weight - decode(encode(weight, grid, format), grid))
        better = now < least
        least = torch.where(better, now, least)
        zero_points = None
        if grid.zero_points is not None and best.zero_points is not None:
            zero_points = torch.where(better, grid.zero_points, best.zero_points)
        best = Grid(torch.where(better, grid.scales, best.scales), zero_points)
    return best


def output_error(gram: Float[Tensor, "in in"], format: WeightFormat) -> GroupError:
    """The squared error that each group's deviation alone makes in the outputs: δ·G_gg·δᵀ with the group's block of G."""
    width = len(gram)
    match format.granularity:
        case PerGroup(size=size):
            groups = width // size
        case PerChannel():
            groups, size = 1, width
        case other:
            raise ValueError(f"groups that span several rows ({other.kind}) have no block of the Gram matrix")
    blocks = torch.stack([gram[g * size : (g + 1) * size, g * size : (g + 1) * size] for g in range(groups)])

    def error(delta: Float[Tensor, "out in"]) -> Float[Tensor, "out groups"]:
        members = delta.unflatten(1, (groups, size)).transpose(0, 1)  # [groups, out, size]
        return ((members @ blocks) * members).sum(dim=2).T

    return error
