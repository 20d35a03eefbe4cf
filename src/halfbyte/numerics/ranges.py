"""Which range a group's grid should span: all of it, or less, so that most values round better and a few saturate."""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from halfbyte.errors import RecipeError
from halfbyte.numerics.grid import Grid, fit, grid_between, to_groups
from halfbyte.scheme import PerChannel, PerGroup, WeightFormat

Ranges = Literal["minmax", "mse", "output"]
"""minmax: the group's own range. mse: the range of least error |w - q|^2.4 (the GPTQ code's search). output: the range
of least error in the layer's outputs (AWQ's clip search, arXiv 2306.00978 and its code), from the Gram matrix."""

MSE_NORM = 2.4
SMALLEST_SHRINK, MSE_STEPS = 0.2, 80
SMALLEST_CLIP, CLIP_STEPS = 0.5, 20
PATIENCE = 10  # steps without an improvement in any group after which a search ends

GroupError = Callable[[Float[Tensor, "groups size"]], Float[Tensor, "groups"]]
"""What each group's deviation costs. It may overwrite its argument."""


def find_grid(
    weight: Float[Tensor, "out in"], format: WeightFormat, ranges: Ranges, gram: Float[Tensor, "in in"] | None = None
) -> Grid:
    """The grid of a weight under a range policy. `output` needs `gram`, the Gram matrix XᵀX of the layer's inputs."""
    match ranges:
        case "minmax":
            return fit(weight, format)
        case "mse":
            return search(weight, format, element_error, SMALLEST_SHRINK, MSE_STEPS)
        case "output":
            if gram is None:
                raise ValueError("the range policy `output` needs the Gram matrix of the layer's inputs")
            return search(weight, format, output_error(gram, format), SMALLEST_CLIP, CLIP_STEPS)


def search(
    weight: Float[Tensor, "out in"], format: WeightFormat, error: GroupError, smallest: float, steps: int
) -> Grid:
    """The best grid per group among ranges clipped at 1, ..., `smallest` (left out) times the largest magnitude."""
    best = fit(weight, format)  # refuses what is not finite
    shape, members = best.scales.shape, to_groups(weight, format.granularity)
    low, high = members.aminmax(dim=1)
    reach = torch.maximum(-low, high)
    scales, zeros = best.scales.flatten(), None if best.zero_points is None else best.zero_points.flatten()
    least, last = error(deviation(members, scales, zeros, format)), 0
    for step in range(1, steps):
        if step - last > PATIENCE:
            break
        clip = reach * (1 - (1 - smallest) * step / steps)
        grid = grid_between(torch.maximum(low, -clip), torch.minimum(high, clip), format)
        now = error(deviation(members, grid.scales, grid.zero_points, format))
        better = now < least
        if bool(better.any()):
            last = step
        least = torch.where(better, now, least)
        scales = torch.where(better, grid.scales, scales)
        if zeros is not None and grid.zero_points is not None:
            zeros = torch.where(better, grid.zero_points, zeros)
    return Grid(scales.view(shape), None if zeros is None else zeros.view(shape))


def deviation(
    members: Float[Tensor, "groups size"],
    scales: Float[Tensor, "groups"],
    zero_points: Float[Tensor, "groups"] | None,
    format: WeightFormat,
) -> Float[Tensor, "groups size"]:
    """Rounded minus original, as encoding and decoding would give it; in one buffer, since this is the search's cost."""
    steps = members / scales[:, None]
    if zero_points is not None:
        steps.add_(zero_points[:, None])
    steps.round_().clamp_(format.lowest, format.highest)
    if zero_points is not None:
        steps.sub_(zero_points[:, None])
    return steps.mul_(scales[:, None]).sub_(members)


def element_error(delta: Float[Tensor, "groups size"]) -> Float[Tensor, "groups"]:
    """Σ|δ|^2.4 of each group, as 2^(1.2·log₂ δ²), which costs half of a power."""
    return delta.square_().log2_().mul_(MSE_NORM / 2).exp2_().sum(dim=1)


def output_error(gram: Float[Tensor, "in in"], format: WeightFormat) -> GroupError:
    """The squared error that each group's deviation alone makes in the outputs: δ·G_gg·δᵀ with the group's block of G."""
    width = len(gram)
    match format.granularity:
        case PerGroup(size=size):
            groups = width // size
        case PerChannel():
            groups, size = 1, width
        case other:
            raise RecipeError(
                f"`ranges: output` needs groups inside a row, and `granularity: {other.kind}` spans several: choose "
                "`ranges: mse`, or a granularity of kind group or channel"
            )
    blocks = torch.stack([gram[g * size : (g + 1) * size, g * size : (g + 1) * size] for g in range(groups)])

    def error(delta: Float[Tensor, "all size"]) -> Float[Tensor, "all"]:
        members = delta.unflatten(0, (-1, groups)).transpose(0, 1)  # [groups of a row, out, size]
        return ((members @ blocks) * members).sum(dim=2).T.flatten()

    return error
