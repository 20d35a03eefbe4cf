"""LLM.int8() in float64: slow, and plainly right.

Dettmers et al., 2022 — https://arxiv.org/abs/2208.07339, §3; symbols of the paper in brackets

    outlier columns [O]     columns in which any token has an entry |x| ≥ threshold [α]
    token scale [c_x/127]   from the entries below the threshold, those in outlier columns too
    y = codes · weight_codesᵀ · scale · weight_scale over the other columns  +  x · weightᵀ over O

In O the weight is what its codes stand for, as the authors' library has it, or one that was kept, as the paper has it.
"""

import torch
from jaxtyping import Bool, Float, Float32, Float64, Int8, Integer
from torch import Tensor

from halfbyte.kernels.token_quantize import reference as tokens_reference


def outlier_entries(x: Float[Tensor, "tokens in"], threshold: float) -> Bool[Tensor, "tokens in"]:
    """Which entries are outliers; none at threshold 0, which turns the decomposition off."""
    return x.abs() >= threshold if threshold > 0 else torch.zeros_like(x, dtype=torch.bool)


def llm_int8_matmul(
    x: Float[Tensor, "tokens in"],
    weight_codes: Int8[Tensor, "out in"],
    weight_scales: Float32[Tensor, "out"],
    threshold: float,
    kept_weight: Float[Tensor, "out in"] | None = None,
    bias: Float[Tensor, "out"] | None = None,
    symmetric: bool = True,
) -> Float[Tensor, "tokens out"]:
    """y in the dtype of x, rounded once."""
    outlier = outlier_entries(x, threshold)
    weight = weight_codes.double() * weight_scales[:, None].double()
    kept = weight if kept_weight is None else kept_weight.double()
    return _combined(x, outlier, outlier.any(dim=0), weight, kept, bias, symmetric)


def static_outlier_matmul(
    x: Float[Tensor, "tokens in"],
    weight_codes: Int8[Tensor, "out in"],
    weight_scales: Float32[Tensor, "out"],
    outlier_columns: Integer[Tensor, "n"],
    outlier_weight: Float[Tensor, "out n"],
    bias: Float[Tensor, "out"] | None = None,
    symmetric: bool = True,
) -> Float[Tensor, "tokens out"]:
    """The same with columns known beforehand, whatever their entries: they are left out of the token scales too."""
    is_column = torch.zeros(x.shape[1], dtype=torch.bool, device=x.device)
    is_column[outlier_columns.long()] = True
    weight = weight_codes.double() * weight_scales[:, None].double()
    kept = torch.zeros_like(weight)
    kept[:, outlier_columns.long()] = outlier_weight.double()
    return _combined(x, is_column.expand_as(x), is_column, weight, kept, bias, symmetric)


def _combined(
    x: Tensor, outlier: Tensor, is_column: Tensor, weight: Float64[Tensor, "out in"], kept: Float64[Tensor, "out in"],
    bias: Tensor | None, symmetric: bool,
) -> Tensor:  # fmt: skip
    rest = tokens_reference.dequantize(*tokens_reference.quantize(x.masked_fill(outlier, 0), symmetric))
    y = rest.masked_fill(is_column, 0) @ weight.T + x.double().masked_fill(~is_column, 0) @ kept.T
    return (y if bias is None else y + bias.double()).to(x.dtype)
