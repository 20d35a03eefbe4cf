"""Quantized activations: the grid of every token, the codes, and what a linear sees of its input.

    symmetric    scale = max|x| / (2^(b-1)-1)          codes in ±(2^(b-1)-1)
    asymmetric   scale = (max - min) / (2^b-1)         codes in -2^(b-1) .. 2^(b-1)-1; the range always contains zero

A format that clips takes its share of the range in place of the whole.
`simulate` computes on reals what the integer kernels compute on codes; calibration walks with it.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from halfbyte.scheme import ActivationFormat, OutlierSplit


@dataclass(frozen=True, slots=True)
class InputQuantizer:
    """How one linear's input is quantized: the format, and what calibration found for it."""

    format: ActivationFormat
    scale: Float[Tensor, "1"] | None = None  # of a static format
    zero_point: Float[Tensor, "1"] | None = None  # of a static asymmetric format; a whole number
    outlier_columns: Int32[Tensor, "n"] | None = None  # of a static outlier set, ascending


def calibrated(format: ActivationFormat, minimum: Float[Tensor, "in"], maximum: Float[Tensor, "in"]) -> InputQuantizer:
    """The quantizer of an input whose columns were seen between minimum and maximum."""
    scale = zero_point = columns = None
    if not format.dynamic:
        scale, zero_point = grid_of(minimum.min().view(1), maximum.max().view(1), format)
    if format.outliers is not None and format.outliers.columns == "static":
        columns = outlier_columns(torch.maximum(-minimum, maximum)[None], format.outliers)
    return InputQuantizer(format, scale, zero_point, columns)


def grid_of(
    low: Float[Tensor, "..."], high: Float[Tensor, "..."], format: ActivationFormat
) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."] | None]:
    """Scales and zero points (None: symmetric) of ranges low..high. A range of zero width gets scale 1."""
    low, high = (low * format.clip, high * format.clip) if format.clip < 1 else (low, high)
    if format.symmetric:
        reach, steps = torch.maximum(-low, high), format.highest
    else:
        low, high = low.clamp(max=0), high.clamp(min=0)
        reach, steps = high - low, format.highest - format.lowest
    scales = torch.where(reach > 0, reach / steps, torch.ones_like(reach))
    if format.symmetric:
        return scales, None
    return scales, (format.lowest - low / scales).round().clamp(format.lowest, format.highest)


def outlier_columns(x: Float[Tensor, "*leading in"], split: OutlierSplit) -> Int32[Tensor, "n"]:
    """The columns of which any entry reaches the threshold; none at threshold 0."""
    if not split.threshold:
        return torch.empty(0, dtype=torch.int32, device=x.device)
    reached = x.abs().flatten(0, -2).amax(dim=0) >= split.threshold
    return reached.nonzero().flatten().to(torch.int32)


def simulate(x: Float[Tensor, "*leading in"], quantizer: InputQuantizer) -> Float[Tensor, "*leading in"]:
    """What the linear computes with in place of x, in the dtype of x: rounded, outlier columns as they are."""
    format, wide = quantizer.format, x.to(torch.promote_types(x.dtype, torch.float32))
    split = format.outliers
    if split is None:
        return rounded(wide, quantizer).to(x.dtype)
    columns = quantizer.outlier_columns if quantizer.outlier_columns is not None else outlier_columns(x, split)
    columns = columns.long()
    inner = wide.clone()
    inner[..., columns] = 0
    if split.columns == "dynamic" and split.threshold:
        # an entry below the threshold counts for its row's range even where its column is split off
        ranged = torch.where(wide.abs() >= split.threshold, 0.0, wide)
    else:
        ranged = inner
    low, high = ranged.aminmax(dim=-1, keepdim=True)
    scales, zeros = grid_of(low, high, format)
    result = on_grid(inner, scales, zeros, format)
    result[..., columns] = wide[..., columns]
    return result.to(x.dtype)


def rounded(x: Float[Tensor, "*leading in"], quantizer: InputQuantizer) -> Float[Tensor, "*leading in"]:
    """x on the grid of its tokens, groups, or the static one."""
    format = quantizer.format
    if not format.dynamic:
        assert quantizer.scale is not None
        return on_grid(x, quantizer.scale, quantizer.zero_point, format)
    if format.granularity == "group":
        assert format.group_size is not None
        groups = x.unflatten(-1, (-1, format.group_size))
        low, high = groups.aminmax(dim=-1, keepdim=True)
        return on_grid(groups, *grid_of(low, high, format), format).flatten(-2)
    if format.granularity == "tensor":
        low, high = x.aminmax()
        return on_grid(x, *grid_of(low, high, format), format)
    low, high = x.aminmax(dim=-1, keepdim=True)
    return on_grid(x, *grid_of(low, high, format), format)


def on_grid(
    x: Float[Tensor, "..."], scales: Float[Tensor, "..."], zeros: Float[Tensor, "..."] | None, format: ActivationFormat
) -> Float[Tensor, "..."]:
    """Each entry's nearest point of its grid (ties to even)."""
    zeros = torch.zeros_like(scales) if zeros is None else zeros
    codes = ((x / scales).round() + zeros).clamp(format.lowest, format.highest)
    return (codes - zeros) * scales
