"""LLM.int8() on the CPU: the int8 part really in integers, the outlier columns in the dtype of x.

Arguments are those of the ops.
"""

import torch
from torch import Tensor

from halfbyte.kernels.llm_int8.reference import outlier_entries
from halfbyte.kernels.token_quantize import cpu as tokens_cpu
from halfbyte.kernels.w8a8.cpu import product


def llm_int8_matmul(
    x: Tensor, weight_codes: Tensor, weight_scales: Tensor, threshold: float, kept_weight: Tensor | None,
    bias: Tensor | None, weight_sums: Tensor | None,
) -> Tensor:  # fmt: skip
    """y [tokens, out] in the dtype of x."""
    outlier = outlier_entries(x, threshold)
    columns = outlier.any(dim=0).nonzero()[:, 0]
    if kept_weight is None:
        kept = (weight_codes[:, columns] * weight_scales[:, None]).to(x.dtype)
    else:
        kept = kept_weight[:, columns].to(x.dtype)
    inside = x.masked_fill(outlier, 0)
    return _combined(x, inside, columns, weight_codes, weight_scales, kept, bias, weight_sums)


def static_outlier_matmul(
    x: Tensor, weight_codes: Tensor, weight_scales: Tensor, columns: Tensor, outlier_weight: Tensor,
    bias: Tensor | None, weight_sums: Tensor | None,
) -> Tensor:  # fmt: skip
    """y [tokens, out] in the dtype of x; a column of -1 is none."""
    real = columns >= 0
    columns = columns[real].long()
    inside = x.index_fill(1, columns, 0)
    return _combined(
        x, inside, columns, weight_codes, weight_scales, outlier_weight[:, real].to(x.dtype), bias, weight_sums
    )


def _combined(
    x: Tensor, inside: Tensor, columns: Tensor, weight_codes: Tensor, weight_scales: Tensor, kept: Tensor,
    bias: Tensor | None, weight_sums: Tensor | None,
) -> Tensor:  # fmt: skip
    codes, scales, zeros = tokens_cpu.quantize(inside, symmetric=weight_sums is None)
    # the code of 0, so that these columns count for nothing
    codes[:, columns] = 0 if weight_sums is None else zeros[:, None].to(torch.int8)
    total = product(codes, weight_codes)
    if weight_sums is not None:
        total -= zeros[:, None] * weight_sums
    y = total.float().mul_(scales[:, None]).mul_(weight_scales)
    y += (x[:, columns] @ kept.T).float()
    return (y if bias is None else y + bias.float()).to(x.dtype)
