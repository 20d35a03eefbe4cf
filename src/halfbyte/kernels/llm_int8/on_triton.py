"""LLM.int8() as two launches: which kernels, in which mode. Arguments are those of the ops."""

from collections.abc import Callable

import torch
from torch import Tensor

from halfbyte.kernels.device import overlaps as may_overlap
from halfbyte.kernels.llm_int8 import triton_matmul, triton_split
from halfbyte.kernels.token_quantize.triton_pointwise import pointwise_quantize


def llm_int8_matmul(
    x: Tensor,
    weight_codes: Tensor,
    weight_scales: Tensor,
    threshold: float,
    kept_weight: Tensor | None = None,
    bias: Tensor | None = None,
    weight_sums: Tensor | None = None,
    scratch: Tensor | None = None,
) -> Tensor:
    """y [tokens, out] in the dtype of x."""
    x = x if x.stride(1) == 1 else x.contiguous()
    if not x.shape[0] or not weight_codes.shape[0]:
        return x.new_empty(x.shape[0], weight_codes.shape[0])
    weight_codes, symmetric, overlaps = weight_codes.contiguous(), weight_sums is None, may_overlap(x)
    matmul = _second_launch(x, weight_codes)
    if threshold == 0:
        codes, scales, zeros = pointwise_quantize(x, symmetric)
        return matmul(codes, scales, zeros, weight_codes, weight_scales, weight_sums, bias, "none", x)
    if scratch is None:
        scratch = torch.zeros(-(-x.shape[1] // 4) + 1, dtype=torch.int32, device=x.device)
    codes, scales, zeros, columns = triton_split.split(x, threshold, symmetric, scratch, overlaps)
    mode = "from codes" if kept_weight is None else "kept"
    return matmul(
        codes, scales, zeros, weight_codes, weight_scales, weight_sums, bias, mode, x, columns, kept_weight, overlaps
    )  # fmt: skip


def static_outlier_matmul(
    x: Tensor,
    weight_codes: Tensor,
    weight_scales: Tensor,
    columns: Tensor,
    outlier_weight: Tensor,
    is_outlier: Tensor,
    bias: Tensor | None = None,
    weight_sums: Tensor | None = None,
) -> Tensor:
    """y [tokens, out] in the dtype of x."""
    x = x if x.stride(1) == 1 else x.contiguous()
    if not x.shape[0] or not weight_codes.shape[0]:
        return x.new_empty(x.shape[0], weight_codes.shape[0])
    weight_codes, symmetric, overlaps = weight_codes.contiguous(), weight_sums is None, may_overlap(x)
    matmul = _second_launch(x, weight_codes)
    if not columns.shape[0]:
        codes, scales, zeros = pointwise_quantize(x, symmetric)
        return matmul(codes, scales, zeros, weight_codes, weight_scales, weight_sums, bias, "none", x)
    codes, scales, zeros, outliers = triton_split.split_static(x, columns, is_outlier, symmetric, overlaps)
    return matmul(
        codes, scales, zeros, weight_codes, weight_scales, weight_sums, bias, "gathered", outliers, None, outlier_weight,
        overlaps,
    )  # fmt: skip


def _second_launch(x: Tensor, weight_codes: Tensor) -> Callable[..., Tensor]:
    """The kernel for Hopper where it runs and there are tokens enough for it to pay; else the one in plain Triton."""
    tokens, outs = x.shape[0], weight_codes.shape[0]
    pays = tokens > 64 or (tokens > 32 and outs >= triton_matmul.MANY_OUTS)
    on_hopper = x.is_cuda and torch.cuda.get_device_capability(x.device) == (9, 0)
    if pays and on_hopper and x.itemsize == 2 and triton_matmul.can_be_copied(weight_codes):
        # imported here: it is written for one kind of chip, in a language of its own
        from halfbyte.kernels.llm_int8 import hopper_matmul

        return hopper_matmul.matmul
    return triton_matmul.matmul
