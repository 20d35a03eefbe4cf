"""Integer scales: S/α instead of floating-point numbers, so that one int32 sum runs over all groups of a row.

Li et al., 2024, Integer Scale — https://arxiv.org/abs/2405.14597, section 4

    here          paper   what it is
    multipliers   s_int   [out, groups] integers S >= 1; the scale of a group is S/α
    amplifiers    α       [out, 1]; the paper has one for all, 1024, or one for each layer, by its heuristic

The paper rounds the scales of codes that were found for float scales (`plug_in`). Here a method finds its codes for the
integer scales: range searches compare ranges that integer scales can give, and GPTQ's error feedback sees the rounding
of the scales. No method knows of amplifiers: a row with amplifier 2^k·α is that row times 2^k on the grid S/α, and
multiplying by a power of two is exact. What comes out must pass the overflow certificate (numerics/certificate.py).
"""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from halfbyte.errors import WeightError
from halfbyte.numerics.certificate import TOKEN_INPUTS, largest_reach, middle, reach, violation
from halfbyte.numerics.grid import Grid, fit, round_scales
from halfbyte.numerics.quantized import QuantizedWeight, round_to_grid
from halfbyte.numerics.ranges import Ranges, find_grid
from halfbyte.scheme import ActivationFormat, FloatScale, IntegerScale, WeightFormat

BASE = 1024  # the amplifier that methods see where the format names none
LARGEST_EXPONENT = 24  # amplifiers up to 2^24 are float32 numbers, and so is S/α
INT8 = 127
PROTECTED = 119  # of a row's largest value in int8 steps: the most from which rounding S cannot lead beyond 127 (QoQ)
FLOATS = FloatScale(dtype="float32")

Quantize = Callable[[Float[Tensor, "out in"], WeightFormat], QuantizedWeight]
"""A method with its statistics: codes on a grid of the format."""


def on_integer_grid(
    quantize: Quantize, weight: Float[Tensor, "out in"], format: WeightFormat, inputs: ActivationFormat
) -> QuantizedWeight:
    """What `quantize` makes of a weight, its amplifiers chosen and its rows certified for such inputs.

    Formats with float scales pass through. WeightError, with row, value, limit and remedy, where a row cannot be
    certified or its scales cannot be stored.
    """
    scale = format.scale
    if not isinstance(scale, IntegerScale):
        return quantize(weight, format)
    found = quantize(weight, format.model_copy(update={"scale": FLOATS})) if scale.plug_in else None
    alphas = first_amplifiers(weight, format, inputs, found)
    if found is None:
        result = with_amplifiers(quantize, weight, format, alphas)
    else:
        result = replugged(found, format, alphas)
    while bool((failing := unsafe_rows(result, inputs)).any()):
        refuse_unless_shrinking(result, format, inputs)
        if scale.amplifier in ("heuristic", "layer"):
            failing = torch.ones_like(failing)
        alphas = torch.where(failing[:, None], alphas * (0.96 if scale.product == "int8" else 0.5), alphas)
        if found is not None:
            result = replugged(found, format, alphas)
        else:
            again = with_amplifiers(quantize, weight[failing], format, alphas[failing])
            result = with_rows(result, failing, again)
    return result


def multipliers(grid: Grid) -> Int64[Tensor, "out groups"]:
    """S of every group. ValueError where the grid has no amplifiers."""
    if grid.amplifiers is None:
        raise ValueError("this grid has no amplifiers: quantize with on_integer_grid")
    return (grid.scales.double() * grid.amplifiers.double()).round().to(torch.int64)


def row_reach(weight: QuantizedWeight) -> Int64[Tensor, "out"]:
    """The certificate of a weight with integer scales: each row's reach."""
    return reach(weight.codes, multipliers(weight.grid), weight.grid.zero_points, middle(weight.format))


def heuristic(scales: Float[Tensor, "*grid"]) -> int:
    """The paper's amplifier: the least power of two, 1 at least, that lifts the smallest scale to 1.

    The paper's loop gives one half where every scale is at least 1, and never ends where one is zero: both are guarded.
    Scales are those of groups that are not all zero; none at all gives 1.
    """
    alive = scales[scales > 0]
    if not alive.numel():
        return 1
    return 2 ** min(max(0, math.ceil(-math.log2(float(alive.min())))), LARGEST_EXPONENT)


def first_amplifiers(
    weight: Float[Tensor, "out in"], format: WeightFormat, inputs: ActivationFormat, found: QuantizedWeight | None
) -> Float[Tensor, "out 1"]:
    """The amplifiers to begin with. `found`: codes on float scales, if there are any; plain rounding is judged by else."""
    assert isinstance(format.scale, IntegerScale)
    amplifier = format.scale.amplifier
    if isinstance(amplifier, int):
        return weight.new_full((len(weight), 1), amplifier)
    if format.scale.product == "int8":
        largest = weight.abs().amax(dim=1, keepdim=True)
        return torch.where(largest > 0, PROTECTED / largest, float(BASE))
    found = found or nearest_float(weight, format)
    scales = found.grid.scales.double() * alive_groups(found)
    if amplifier == "heuristic":
        return weight.new_full((len(weight), 1), heuristic(scales))
    room = largest_reach(inputs) / reach(found.codes, scales, found.grid.zero_points, middle(format)).clamp(min=1e-30)
    stored = format.scale.largest / scales.amax(dim=1).clamp(min=1e-30)
    exponents = torch.minimum(room, stored).log2().floor().clamp(0, LARGEST_EXPONENT)
    if amplifier == "layer":
        exponents = exponents.min().expand_as(exponents)
    return exponents.exp2().to(weight.dtype)[:, None]


def alive_groups(weight: QuantizedWeight) -> Bool[Tensor, "out groups"]:
    """Groups that do not stand for zeros alone: the scale of such a group means nothing."""
    grouped = weight.codes.unflatten(1, (weight.grid.scales.shape[1], -1))
    zeros = weight.grid.zero_points
    return (grouped != (0 if zeros is None else zeros[:, :, None])).any(dim=2)


def nearest_float(weight: Float[Tensor, "out in"], format: WeightFormat) -> QuantizedWeight:
    """Plain rounding on float scales."""
    format = format.model_copy(update={"scale": FLOATS})
    return round_to_grid(weight, fit(weight, format), format)


def nearest(
    weight: Float[Tensor, "out in"],
    format: WeightFormat,
    ranges: Ranges,
    gram: Float[Tensor, "in in"] | None = None,
    inputs: ActivationFormat | None = None,
) -> QuantizedWeight:
    """Plain rounding under a range policy, whatever the kind of scale, for comparing candidates: nothing is certified."""

    def plainly(weight: Tensor, format: WeightFormat) -> QuantizedWeight:
        return round_to_grid(weight, find_grid(weight, format, ranges, gram), format)

    if not isinstance(format.scale, IntegerScale):
        return plainly(weight, format)
    alphas = first_amplifiers(weight, format, inputs or TOKEN_INPUTS, None)
    return with_amplifiers(plainly, weight, format, alphas)


def with_amplifiers(
    quantize: Quantize, weight: Float[Tensor, "out in"], format: WeightFormat, amplifiers: Float[Tensor, "out 1"]
) -> QuantizedWeight:
    """The method's codes for scales S/amplifier, one amplifier a row.

    Powers of two times the format's own or BASE, but for products in int8, where a row is rounded by its factor.
    """
    assert isinstance(format.scale, IntegerScale)
    base = format.scale.amplifier if isinstance(format.scale.amplifier, int) else BASE
    numbered = format.model_copy(update={"scale": IntegerScale(amplifier=base)})
    factors = amplifiers.to(weight) / base
    found = quantize(weight * factors, numbered)
    # the multipliers are whole, and are divided once: S/α is the nearest number to it, as a reader computes it
    whole = (found.grid.scales * base).round()
    amplifiers = amplifiers.to(whole)
    return QuantizedWeight(found.codes, Grid(whole / amplifiers, found.grid.zero_points, amplifiers), format)


def replugged(found: QuantizedWeight, format: WeightFormat, amplifiers: Float[Tensor, "out 1"]) -> QuantizedWeight:
    """The paper's form: the codes as they are, their scales rounded to S/amplifier."""
    amplifiers = amplifiers.to(found.grid.scales)
    scales = round_scales(found.grid.scales, format.scale, amplifiers)
    scales = torch.where(alive_groups(found), scales, 1 / amplifiers)  # a group of zeros had scale 1
    return QuantizedWeight(found.codes, Grid(scales, found.grid.zero_points, amplifiers), format)


def unsafe_rows(weight: QuantizedWeight, inputs: ActivationFormat) -> Bool[Tensor, "out"]:
    """Rows whose accumulator may overflow, or whose multipliers cannot be stored."""
    assert isinstance(weight.format.scale, IntegerScale)
    whole = multipliers(weight.grid)
    beyond = (whole.amax(dim=1) > weight.format.scale.largest) | (row_reach(weight) > largest_reach(inputs))
    if weight.format.scale.product == "int8":
        beyond |= (largest_steps(weight) * whole).amax(dim=1) > INT8
    return beyond


def require_safe(weight: QuantizedWeight, inputs: ActivationFormat) -> None:
    """WeightError where a weight with integer scales, changed since it was certified, no longer is safe."""
    if isinstance(weight.format.scale, IntegerScale) and bool((rows := unsafe_rows(weight, inputs)).any()):
        raise WeightError(
            f"rows {rows.nonzero().flatten().tolist()[:3]} no longer pass the overflow certificate of {weight.format} after "
            "a refinement changed them: choose a smaller `amplifier`, or let it learn weights alone (`learn: weights`)"
        )


def largest_steps(weight: QuantizedWeight) -> Int64[Tensor, "out groups"]:
    """The largest |code - zero point| in each group."""
    grouped = weight.codes.long().unflatten(1, (weight.grid.scales.shape[1], -1))
    zeros = weight.grid.zero_points
    return (grouped - (0 if zeros is None else zeros.long()[:, :, None])).abs().amax(dim=2)


def refuse_unless_shrinking(weight: QuantizedWeight, format: WeightFormat, inputs: ActivationFormat) -> None:
    """WeightError where the format does not allow smaller amplifiers, or there are none."""
    assert isinstance(format.scale, IntegerScale)
    assert weight.grid.amplifiers is not None
    scale = format.scale
    if scale.product == "int8":
        return  # with S = 1 everywhere every code fits, so shrinking ends
    failing = unsafe_rows(weight, inputs)
    smallest = float(weight.grid.amplifiers[failing].min())
    if (scale.overflow == "shrink" or scale.amplifier in ("layer", "row")) and smallest >= 2:
        return
    whole = multipliers(weight.grid)
    reason = violation(row_reach(weight), inputs)
    if reason is None:
        row = int(whole.amax(dim=1).argmax())
        reason = f"row {row} has a scale of {int(whole[row].max())}/{smallest:g}, and S is stored up to {scale.largest}"
    remedy = (
        "these weights are too large for integer scales, so choose `scale: {kind: float}`"
        if smallest < 2
        else "choose a smaller `amplifier`, `amplifier: row`, or `overflow: shrink`"
    )
    raise WeightError(f"{reason}: {remedy}")


def with_rows(weight: QuantizedWeight, rows: Bool[Tensor, "out"], other: QuantizedWeight) -> QuantizedWeight:
    """The weight with `other` in the place of the chosen rows."""

    def put(mine: Tensor, theirs: Tensor) -> Tensor:
        result = mine.clone()
        result[rows] = theirs
        return result

    grid, new = weight.grid, other.grid
    assert grid.amplifiers is not None
    assert new.amplifiers is not None
    zeros = None
    if grid.zero_points is not None and new.zero_points is not None:
        zeros = put(grid.zero_points, new.zero_points)
    merged = replace(grid, scales=put(grid.scales, new.scales), zero_points=zeros,
                     amplifiers=put(grid.amplifiers, new.amplifiers))  # fmt: skip
    return QuantizedWeight(put(weight.codes, other.codes), merged, weight.format)
