"""LLM.int8(): y = x · Wᵀ + bias with 8-bit activations and weights, and the outlier columns of x in 16 bits.

Dettmers et al., 2022 — https://arxiv.org/abs/2208.07339; `reference` says what is computed. Both functions are
`torch.library` ops with a fake implementation, so they work under `torch.compile` and in CUDA graphs; nothing waits for
the GPU. On CUDA there are two launches, whatever the outliers:

    1  quantize each token without its outliers; find which columns have any (or gather those that are known)
    2  the int8 matmul, and in its tiles the outlier columns in 16 bits

With `weight_sums` the activations are quantized asymmetrically (the paper's zero-point variant).
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Int8, Int32, Integer, UInt8
from torch import Tensor

from halfbyte.errors import WeightError
from halfbyte.kernels.llm_int8 import cpu

__all__ = ["StaticOutliers", "llm_int8_matmul", "outlier_scratch", "static_outlier_matmul", "static_outliers"]

ACTIVATION_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MOST_INPUTS = 2**16  # 255 · 128 · inputs fits 32 bits
OUTLIER_STEP = 16  # the shortest inner product of a tensor core


@dataclass(frozen=True, slots=True)
class StaticOutliers:
    """Outlier columns that are known beforehand, in the layout that the kernels read; made by `static_outliers`."""

    columns: Int32[Tensor, "padded"]  # ascending, then -1
    weight: Float[Tensor, "out padded"]
    is_outlier: UInt8[Tensor, "in"]


def static_outliers(columns: Integer[Tensor, "n"], weight: Float[Tensor, "out n"], ins: int) -> StaticOutliers:
    """Columns `columns` of a weight with `ins` inputs, kept as `weight`. WeightError unless they are distinct columns."""
    if columns.dim() != 1 or weight.shape[1:] != columns.shape:
        raise WeightError(
            f"{list(columns.shape)} outlier columns, but a weight {list(weight.shape)}: give one of its columns for each"
        )
    if len(columns.unique()) != len(columns) or not bool(((columns >= 0) & (columns < ins)).all()):
        raise WeightError(f"outlier columns {columns.tolist()} are not distinct columns of {ins}: drop what is not")
    order = columns.argsort()
    padding = -len(columns) % OUTLIER_STEP
    is_outlier = torch.zeros(ins, dtype=torch.uint8, device=columns.device)
    is_outlier[columns.long()] = 1
    return StaticOutliers(
        torch.nn.functional.pad(columns[order].int(), (0, padding), value=-1),
        torch.nn.functional.pad(weight[:, order], (0, padding)),
        is_outlier,
    )


def outlier_scratch(ins: int, device: torch.device | str) -> Int32[Tensor, "words"]:
    """What `llm_int8_matmul` needs to find outliers in two launches; one for each stream that calls it at a time."""
    return torch.zeros(-(-ins // 4) + 1, dtype=torch.int32, device=device)


def llm_int8_matmul(
    x: Float[Tensor, "tokens in"],
    weight_codes: Int8[Tensor, "out in"],
    weight_scales: Float32[Tensor, "out"],
    threshold: float,
    kept_weight: Float[Tensor, "out in"] | None = None,
    bias: Float[Tensor, "out"] | None = None,
    *,
    weight_sums: Int32[Tensor, "out"] | None = None,
    scratch: Int32[Tensor, "words"] | None = None,
) -> Float[Tensor, "tokens out"]:
    """x · Wᵀ + bias in the dtype of x; columns with an entry |x| >= threshold in 16 bits, no column at threshold 0.

    W is weight_codes · weight_scales; `kept_weight` is the one of the outlier columns, else W. `weight_sums` are the sums
    of the rows of `weight_codes`. `scratch` is written to and left as it was: see `outlier_scratch`; without it there is
    a third launch, which makes one. Raises WeightError where the arguments disagree.
    """
    return _dynamic(x, weight_codes, weight_scales, threshold, kept_weight, bias, weight_sums, scratch)


def static_outlier_matmul(
    x: Float[Tensor, "tokens in"],
    weight_codes: Int8[Tensor, "out in"],
    weight_scales: Float32[Tensor, "out"],
    outliers: StaticOutliers,
    bias: Float[Tensor, "out"] | None = None,
    *,
    weight_sums: Int32[Tensor, "out"] | None = None,
) -> Float[Tensor, "tokens out"]:
    """x · Wᵀ + bias in the dtype of x, with the columns of `outliers` in 16 bits, whatever their entries.

    Raises WeightError where the arguments disagree.
    """
    return _static(
        x, weight_codes, weight_scales, outliers.columns, outliers.weight, outliers.is_outlier, bias, weight_sums
    )


@torch.library.custom_op("halfbyte::llm_int8_matmul", mutates_args=("scratch",), device_types="cpu")
def _dynamic(
    x: Tensor, weight_codes: Tensor, weight_scales: Tensor, threshold: float, kept_weight: Tensor | None,
    bias: Tensor | None, weight_sums: Tensor | None, scratch: Tensor | None,
) -> Tensor:  # fmt: skip
    _check_dynamic(x, weight_codes, weight_scales, threshold, kept_weight, bias, weight_sums, scratch)
    return cpu.llm_int8_matmul(x, weight_codes, weight_scales, threshold, kept_weight, bias, weight_sums)


@_dynamic.register_kernel("cuda")
def _dynamic_on_cuda(
    x: Tensor, weight_codes: Tensor, weight_scales: Tensor, threshold: float, kept_weight: Tensor | None,
    bias: Tensor | None, weight_sums: Tensor | None, scratch: Tensor | None,
) -> Tensor:  # fmt: skip
    _check_dynamic(x, weight_codes, weight_scales, threshold, kept_weight, bias, weight_sums, scratch)
    # imported here: triton exists only where there is something to run it on
    from halfbyte.kernels.llm_int8 import on_triton

    with torch.cuda.device_of(x):  # triton launches on the current device, which need not be where x is
        return on_triton.llm_int8_matmul(
            x, weight_codes, weight_scales, threshold, kept_weight, bias, weight_sums, scratch
        )


@_dynamic.register_fake
def _dynamic_shape(
    x: Tensor, weight_codes: Tensor, weight_scales: Tensor, threshold: float, kept_weight: Tensor | None,
    bias: Tensor | None, weight_sums: Tensor | None, scratch: Tensor | None,
) -> Tensor:  # fmt: skip
    _check_dynamic(x, weight_codes, weight_scales, threshold, kept_weight, bias, weight_sums, scratch)
    return x.new_empty(x.shape[0], weight_codes.shape[0])


@torch.library.custom_op("halfbyte::static_outlier_matmul", mutates_args=(), device_types="cpu")
def _static(
    x: Tensor, weight_codes: Tensor, weight_scales: Tensor, columns: Tensor, outlier_weight: Tensor,
    is_outlier: Tensor, bias: Tensor | None, weight_sums: Tensor | None,
) -> Tensor:  # fmt: skip
    _check_static(x, weight_codes, weight_scales, columns, outlier_weight, is_outlier, bias, weight_sums)
    return cpu.static_outlier_matmul(x, weight_codes, weight_scales, columns, outlier_weight, bias, weight_sums)


@_static.register_kernel("cuda")
def _static_on_cuda(
    x: Tensor, weight_codes: Tensor, weight_scales: Tensor, columns: Tensor, outlier_weight: Tensor,
    is_outlier: Tensor, bias: Tensor | None, weight_sums: Tensor | None,
) -> Tensor:  # fmt: skip
    _check_static(x, weight_codes, weight_scales, columns, outlier_weight, is_outlier, bias, weight_sums)
    from halfbyte.kernels.llm_int8 import on_triton

    with torch.cuda.device_of(x):
        return on_triton.static_outlier_matmul(
            x, weight_codes, weight_scales, columns, outlier_weight, is_outlier, bias, weight_sums
        )


@_static.register_fake
def _static_shape(
    x: Tensor, weight_codes: Tensor, weight_scales: Tensor, columns: Tensor, outlier_weight: Tensor,
    is_outlier: Tensor, bias: Tensor | None, weight_sums: Tensor | None,
) -> Tensor:  # fmt: skip
    _check_static(x, weight_codes, weight_scales, columns, outlier_weight, is_outlier, bias, weight_sums)
    return x.new_empty(x.shape[0], weight_codes.shape[0])


def _check_dynamic(
    x: Tensor, weight_codes: Tensor, weight_scales: Tensor, threshold: float, kept_weight: Tensor | None,
    bias: Tensor | None, weight_sums: Tensor | None, scratch: Tensor | None,
) -> None:  # fmt: skip
    """Raise WeightError unless the arguments describe one matmul."""
    _check(x, weight_codes, weight_scales, bias, weight_sums)
    if math.isnan(threshold) or threshold < 0:
        raise WeightError(f"the outlier threshold is {threshold}: give 6.0 as the paper does, or 0 for no outliers")
    if kept_weight is not None and kept_weight.shape != weight_codes.shape:
        raise WeightError(
            f"the kept weight is {list(kept_weight.shape)}, but the codes {list(weight_codes.shape)}: keep all of its "
            "columns, or use `static_outlier_matmul`"
        )
    expected = -(-x.shape[1] // 4) + 1
    if scratch is not None and (scratch.dtype != torch.int32 or scratch.shape != (expected,)):
        raise WeightError(
            f"scratch is {scratch.dtype} {list(scratch.shape)}, but {x.shape[1]} inputs take torch.int32 [{expected}]: "
            "make it with `outlier_scratch`"
        )


def _check_static(
    x: Tensor, weight_codes: Tensor, weight_scales: Tensor, columns: Tensor, outlier_weight: Tensor,
    is_outlier: Tensor, bias: Tensor | None, weight_sums: Tensor | None,
) -> None:  # fmt: skip
    """Raise WeightError unless the arguments describe one matmul."""
    _check(x, weight_codes, weight_scales, bias, weight_sums)
    expected = (weight_codes.shape[0], columns.shape[0])
    if outlier_weight.shape != expected or is_outlier.shape != x.shape[1:] or columns.shape[0] % OUTLIER_STEP:
        raise WeightError(
            f"outlier columns {list(columns.shape)}, their weight {list(outlier_weight.shape)} and their mask "
            f"{list(is_outlier.shape)} do not belong to codes {list(weight_codes.shape)}: make them with `static_outliers`"
        )


def _check(
    x: Tensor, weight_codes: Tensor, weight_scales: Tensor, bias: Tensor | None, weight_sums: Tensor | None
) -> None:
    if x.dtype not in ACTIVATION_DTYPES or x.dim() != 2 or not 0 < x.shape[1] <= MOST_INPUTS:
        raise WeightError(
            f"x is {x.dtype} {list(x.shape)}: give [tokens, in], 1 to {MOST_INPUTS} inputs, in one of {ACTIVATION_DTYPES}"
        )
    if weight_codes.dtype != torch.int8 or weight_codes.dim() != 2 or weight_codes.shape[1] != x.shape[1]:
        raise WeightError(
            f"the weight is {weight_codes.dtype} {list(weight_codes.shape)}, but x has {x.shape[1]} inputs: give "
            "torch.int8 codes [out, in]"
        )
    outs = weight_codes.shape[0]
    if weight_scales.dtype != torch.float32 or weight_scales.shape != (outs,):
        raise WeightError(
            f"weight scales are {weight_scales.dtype} {list(weight_scales.shape)}, but there are {outs} outputs: give one "
            "torch.float32 for each"
        )
    if bias is not None and bias.shape != (outs,):
        raise WeightError(f"the bias is {list(bias.shape)}, but there are {outs} outputs: give one number for each")
    if weight_sums is not None and (weight_sums.dtype != torch.int32 or weight_sums.shape != (outs,)):
        raise WeightError(
            f"weight sums are {weight_sums.dtype} {list(weight_sums.shape)}, but there are {outs} outputs: give "
            "weight_codes.sum(1, dtype=torch.int32)"
        )
