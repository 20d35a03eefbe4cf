"""The input of a linear as 8-bit codes: what `numerics.activations.simulate` says in reals, as integers."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int8, Int32
from torch import Tensor

from halfbyte.kernels.token_quantize import quantize_static, quantize_tokens
from halfbyte.numerics.activations import InputQuantizer, grid_of, outlier_columns


@dataclass(frozen=True, slots=True)
class Codes:
    """(code - zero) · scale; one row of scales and zeros for every token, or one for all."""

    codes: Int8[Tensor, "tokens in"]
    scales: Float[Tensor, "tokens groups"] | Float[Tensor, "1 1"]
    zeros: Int32[Tensor, "tokens groups"] | Int32[Tensor, "1 1"] | None


def encode(x: Float[Tensor, "tokens in"], quantizer: InputQuantizer) -> Codes:
    """Every token, group or the whole on its grid; the columns of an outlier split are for `encode_split`."""
    format = quantizer.format
    if format.bits != 8 or format.granularity == "tensor" or format.clip < 1:
        return _on_other_grids(x, quantizer)
    if format.group_size is not None:
        codes, scales, _ = quantize_tokens(x.reshape(-1, format.group_size), symmetric=True)
        return Codes(codes.view(x.shape), scales.view(len(x), -1), None)
    codes, scales, zeros = quantize_tokens(x, symmetric=format.symmetric)
    return Codes(codes, scales[:, None], None if zeros is None else zeros[:, None])


def _on_other_grids(x: Float[Tensor, "tokens in"], quantizer: InputQuantizer) -> Codes:
    """Fewer bits, and one grid for all tokens."""
    format = quantizer.format
    if not format.dynamic:
        assert quantizer.scale is not None
        if format.bits == 8 and format.symmetric:
            return Codes(quantize_static(x, quantizer.scale), quantizer.scale[None], None)
        zero_point = None if quantizer.zero_point is None else quantizer.zero_point[None]
        return _codes(x, quantizer.scale[None], zero_point, quantizer)
    width = x.numel() if format.granularity == "tensor" else format.group_size or x.shape[1]
    groups = x.float().reshape(-1, width)
    low, high = groups.aminmax(dim=1, keepdim=True)
    found = _codes(groups, *grid_of(low, high, format), quantizer)
    rows = 1 if format.granularity == "tensor" else len(x)
    zeros = None if found.zeros is None else found.zeros.view(rows, -1)
    return Codes(found.codes.view(x.shape), found.scales.view(rows, -1), zeros)


def encode_split(x: Float[Tensor, "tokens in"], quantizer: InputQuantizer) -> tuple[Codes, Int32[Tensor, "n"]]:
    """The tokens without their outlier columns, whose codes stand for zero, and those columns."""
    split = quantizer.format.outliers
    assert split is not None
    listed = quantizer.outlier_columns
    columns = outlier_columns(x, split) if listed is None else listed
    wide = x.float()
    inner = wide.index_fill(1, columns.long(), 0)
    # an entry below the threshold counts for its row's range even where its column is split off
    ranged = torch.where(wide.abs() >= split.threshold, 0.0, wide) if listed is None and split.threshold else inner
    low, high = ranged.aminmax(dim=1, keepdim=True)
    return _codes(inner, *grid_of(low, high, quantizer.format), quantizer), columns


def _codes(
    x: Float[Tensor, "rows in"],
    scales: Float[Tensor, "rows 1"],
    zeros: Float[Tensor, "rows 1"] | None,
    quantizer: InputQuantizer,
) -> Codes:
    steps = (x.float() / scales).round()
    if zeros is not None:
        steps = steps + zeros
    codes = steps.clamp(quantizer.format.lowest, quantizer.format.highest).to(torch.int8)
    return Codes(codes, scales, None if zeros is None else zeros.int())
