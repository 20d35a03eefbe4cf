"""Grids: from a weight to steps and zero points, from values to codes and back.

Groups are rows of a [groups, size] view of the matrix, whatever the granularity; scales keep two axes,
[out, groups of a row] per channel and per group, [1, 1] per tensor, [count, 1] for a number of groups.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from halfbyte.errors import WeightError
from halfbyte.scheme import (
    FloatScale,
    Granularity,
    GroupCount,
    IntegerScale,
    PerChannel,
    PerGroup,
    PerTensor,
    Scale,
    WeightFormat,
)

SCALE_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Grid:
    """The reals that codes stand for: (code - zero_point) * scale. Zero points are None when all are zero.

    [rows, groups] for a matrix; a search also makes grids of its groups in a row. `amplifiers`: of each row, once they
    are chosen, where scales are S/amplifier (numerics/integer_scales.py).
    """

    scales: Float[Tensor, "*grid"]
    zero_points: Float[Tensor, "*grid"] | None = None
    amplifiers: Float[Tensor, "rows 1"] | None = None


def scales_shape(out: int, columns: int, granularity: Granularity) -> tuple[int, int]:
    """Shape of the scales of an [out, columns] matrix. WeightError where the granularity does not divide it."""
    match granularity:
        case PerTensor():
            return 1, 1
        case PerChannel():
            return out, 1
        case PerGroup(size=size):
            if columns % size:
                raise WeightError(
                    f"group size {size} does not divide the {columns} inputs of this weight: choose a divisor "
                    "of it, `granularity: {kind: channel}`, or put the module on the recipe's `ignore` list"
                )
            return out, columns // size
        case GroupCount(count=count):
            if (out * columns) % count:
                raise WeightError(
                    f"{count} groups do not divide the {out}x{columns} elements of this weight: choose another count"
                )
            return count, 1


def to_groups(weight: Float[Tensor, "out in"], granularity: Granularity) -> Float[Tensor, "groups size"]:
    """The members of each group as one row. A view where the weight is contiguous."""
    rows, groups = scales_shape(weight.shape[0], weight.shape[1], granularity)
    return weight.reshape(rows * groups, -1)


def expand(values: Float[Tensor, "rows groups"], out: int, columns: int) -> Float[Tensor, "out in"]:
    """One value per element of the [out, columns] matrix that the grid belongs to."""
    flat = values.reshape(-1, 1)
    return flat.expand(-1, out * columns // len(flat)).reshape(out, columns)


def round_scales(
    scales: Float[Tensor, "*grid"], kind: Scale, amplifiers: Float[Tensor, "rows 1"] | None = None
) -> Float[Tensor, "*grid"]:
    """The nearest scales that can be stored, as values of the same dtype; never zero.

    `amplifiers`: of each row, in place of the one that an integer kind names.
    """
    match kind:
        case FloatScale(dtype="model"):
            raise ValueError("resolve the scale's dtype against the model's first")
        case FloatScale(dtype=name):
            dtype = SCALE_DTYPES[name]
            return scales.clamp(min=torch.finfo(dtype).tiny).to(dtype).to(scales.dtype)
        case IntegerScale(amplifier=amplifier):
            chosen = _number(amplifier) if amplifiers is None else amplifiers
            return (scales * chosen).round().clamp(min=1) / chosen


def grid_between(low: Float[Tensor, "rows groups"], high: Float[Tensor, "rows groups"], format: WeightFormat) -> Grid:
    """The grid whose range is low..high (low <= high); symmetric formats take the larger magnitude of the two.

    A group without range gets scale 1, or the smallest integer scale, so that an all-zero group stays zero.
    """
    if format.symmetric:
        return Grid(_scales_of(torch.maximum(-low, high), format))
    low, high = low.clamp(max=0), high.clamp(min=0)
    scales = _scales_of(high - low, format)
    return Grid(scales, (-low / scales).round().clamp(format.lowest, format.highest))


def _scales_of(reach: Float[Tensor, "rows groups"], format: WeightFormat) -> Float[Tensor, "rows groups"]:
    blank = 1.0
    if isinstance(format.scale, IntegerScale):
        blank = 1 / _number(format.scale.amplifier)  # S = 1: it never stands in the way of a narrow type
    return round_scales(torch.where(reach > 0, reach / format.divisor, blank), format.scale)


def _number(amplifier: int | str) -> int:
    if isinstance(amplifier, str):
        raise ValueError(f"choose the amplifiers of `{amplifier}` first: numerics/integer_scales.py")
    return amplifier


def fit(weight: Float[Tensor, "out in"], format: WeightFormat) -> Grid:
    """The min-max grid of a weight. WeightError on NaN or Inf, or where the granularity does not divide it."""
    shape = scales_shape(weight.shape[0], weight.shape[1], format.granularity)
    groups = to_groups(weight, format.granularity)
    low, high = groups.aminmax(dim=1)
    if not (torch.isfinite(low).all() and torch.isfinite(high).all()):
        bad = int((~torch.isfinite(weight)).sum())
        raise WeightError(
            f"{bad} of {weight.numel()} elements of this weight are NaN or Inf: the source checkpoint is damaged or "
            "overflowed in its dtype; download it again, or convert it from float32"
        )
    return grid_between(low.view(shape), high.view(shape), format)


def encode(weight: Float[Tensor, "out in"], grid: Grid, format: WeightFormat) -> Integer[Tensor, "out in"]:
    """The nearest codes (ties to even): int8 for symmetric formats, uint8 for asymmetric ones."""
    steps = weight / expand(grid.scales, *weight.shape)
    if grid.zero_points is not None:
        steps = steps + expand(grid.zero_points, *weight.shape)
    return steps.round().clamp(format.lowest, format.highest).to(code_dtype(format))


def decode(codes: Integer[Tensor, "out in"], grid: Grid) -> Float[Tensor, "out in"]:
    """What the codes stand for, in the scales' dtype."""
    values = codes.to(grid.scales.dtype)
    if grid.zero_points is not None:
        values = values - expand(grid.zero_points.to(values.dtype), *codes.shape)
    return values * expand(grid.scales, *codes.shape)


def code_dtype(format: WeightFormat) -> torch.dtype:
    """int8 holds every symmetric code but OmniQuant's +128; uint8 every asymmetric one."""
    if format.highest > 127 and format.symmetric:
        return torch.int16
    return torch.int8 if format.symmetric else torch.uint8
