"""y = x · Wᵀ from int8 codes, with the outlier columns in 16 bits: the second of the two launches.

A program computes a [BLOCK_M tokens, BLOCK_N outputs] tile of y:

    codes [BLOCK_M, BLOCK_K] · weight_codesᵀ [BLOCK_K, BLOCK_N] ─► total, int32 ─► · scale · weight_scale ─► y, float32
                                                        outlier columns, 16 at a time ─► + in 16 bits ───────┘

The codes hold 0 for each outlier entry, but the other tokens' entries of an outlier column as well. What is added
turns these from int8 to 16 bits:

    from codes   Σ over O   (x - code · scale) · weight_code · weight_scale
    kept         Σ over O   x · kept  -  code · scale · weight_code · weight_scale
    gathered     Σ over O   x · kept                      static columns have no codes at all

Integers up to 256 are exact in every 16-bit format, so nothing rounds that the 16-bit matmul would not.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportOptionalMemberAccess=false
# triton's decorators change signatures in ways that types do not tell

from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

Outliers = Literal["none", "from codes", "kept", "gathered"]
TMA_STEP = 16  # bytes: what addresses and strides must be multiples of
MANY_OUTS = 8192  # 64 outputs a tile, and each processor of a large GPU has one
OUTLIERS_AT_ONCE = tl.constexpr(16)  # the shortest inner product of a tensor core


@dataclass(frozen=True, slots=True)
class Tile:
    """How a launch is cut up. `swapped` computes yᵀ, so that a few tokens fill a tensor core's short side."""

    block_m: int
    block_n: int
    block_k: int
    super_m: int
    warps: int
    stages: int
    swapped: bool = False


def tile_for(tokens: int, outs: int, dtype: torch.dtype) -> Tile:
    """The fastest that was measured on an H200: narrow where there are few outputs, so that all processors have some."""
    if dtype == torch.float32 and tokens > 32:  # three passes through the tensor cores take registers
        return Tile(64, 64, 128, 8, 4, 3)
    if tokens <= 32:
        block_m = 16 if tokens <= 16 else 32
        if outs < MANY_OUTS:
            return Tile(block_m, 32, 256, 1, 2, 8)
        return Tile(block_m, 64, 128, 1, 4, 6, swapped=True)
    if tokens <= 64:
        return Tile(64, 32, 256, 1, 4, 6) if outs < MANY_OUTS else Tile(64, 128, 128, 1, 4, 4)
    if tokens * outs < 128 * MANY_OUTS:
        return Tile(64, 64, 256, 8, 4, 4)
    return Tile(128, 128, 128, 16, 4, 3)


@triton.jit
def _part(tile_ptr, row, stride, column, mask):
    """[rows, columns] of a matrix, counted from the tile's first row, so that offsets fit 32 bits."""
    return tl.load(tile_ptr + (row[:, None] * stride + column[None, :]), mask=mask, other=0)


@triton.jit
def _fetch(
    first, codes_ptr, left_ptr, right_ptr, columns_ptr, count, row, output, m_mask, n_mask,
    ins, left_stride, right_stride, TERM: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """Outlier columns first, first + 1, ... of what a term is made of: codes, left and right; 0 past the last."""
    column = first + tl.arange(0, OUTLIERS_AT_ONCE)
    here = column < count
    if LISTED:
        column = tl.load(columns_ptr + 1 + column, mask=here, other=0)
    m_part, n_part = m_mask[:, None] & here[None, :], n_mask[:, None] & here[None, :]
    left = _part(left_ptr, row, left_stride, column, m_part)
    codes = left
    if TERM == "rest":
        codes = _part(codes_ptr, row, ins, column, m_part)
    return codes, left, _part(right_ptr, output, right_stride, column, n_part), m_part


@triton.jit
def _added(y, codes, left, right, m_part, zero, scale, TERM: tl.constexpr, dtype: tl.constexpr):
    """y + left · rightᵀ in `dtype`, where left is meant as TERM says."""
    if TERM == "rest":
        left = left.to(tl.float32) - tl.where(m_part, codes.to(tl.int32) - zero, 0).to(tl.float32) * scale
    elif TERM == "codes":
        left = tl.where(m_part, zero - left.to(tl.int32), 0).to(tl.float32)
    # three passes keep float32 activations whole; it means nothing to the 16-bit ones
    return tl.dot(left.to(dtype), right.to(dtype).T, y, input_precision="tf32x3")


@triton.jit
def _all_added(
    y, fetched, codes_ptr, left_ptr, right_ptr, columns_ptr, count, row, output, m_mask, n_mask,
    ins, left_stride, right_stride, zero, scale, TERM: tl.constexpr, LISTED: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """y with a term of all outlier columns, the first of which have been fetched."""
    if count > 0:
        y = _added(y, *fetched, zero, scale, TERM, dtype)
        for first in tl.range(OUTLIERS_AT_ONCE, count, OUTLIERS_AT_ONCE, num_stages=1):
            more = _fetch(
                first, codes_ptr, left_ptr, right_ptr, columns_ptr, count, row, output, m_mask, n_mask,
                ins, left_stride, right_stride, TERM, LISTED,
            )  # fmt: skip
            y = _added(y, *more, zero, scale, TERM, dtype)
    return y


@triton.jit(do_not_specialize=["tokens"])
def _matmul_kernel(
    codes, weight, codes_ptr, weight_ptr, scales_ptr, zeros_ptr, weight_scales_ptr, weight_sums_ptr, bias_ptr, y_ptr,
    x_ptr, columns_ptr, kept_ptr,
    tokens, outs, ins, x_stride, kept_stride, gathered,
    HAS_ZEROS: tl.constexpr, HAS_BIAS: tl.constexpr, OUTLIERS: tl.constexpr, OVERLAPS: tl.constexpr,
    BY_TMA: tl.constexpr, EVEN_K: tl.constexpr, SWAPPED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SUPER_M: tl.constexpr,
):  # fmt: skip
    tiles_m = tl.cdiv(tokens, BLOCK_M)
    tiles_n = tl.cdiv(outs, BLOCK_N)
    # SUPER_M tiles of tokens run side by side on one tile of outputs, so that its codes come from the L2 cache
    first_tile = tl.program_id(0) // (SUPER_M * tiles_n) * SUPER_M
    within = tl.program_id(0) % (SUPER_M * tiles_n)
    beside = min(tiles_m - first_tile, SUPER_M)
    first_m = (first_tile + within % beside) * BLOCK_M
    first_n = within // beside * BLOCK_N
    row, output = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    m, n = first_m + row, first_n + output
    m_mask, n_mask = m < tokens, n < outs
    # int64 up to the tile: a weight may have more than 2**31 codes, and so may the activations
    codes_ptr += first_m.to(tl.int64) * ins
    weight_ptr += first_n.to(tl.int64) * ins
    x_ptr += first_m.to(tl.int64) * x_stride
    kept_ptr += first_n.to(tl.int64) * kept_stride
    y_ptr += first_m.to(tl.int64) * outs + first_n

    if OVERLAPS:
        tl.extra.cuda.gdc_wait()  # for what the launch before writes
    # the first outlier columns are asked for before the long loop and used after it
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    count = gathered
    if OUTLIERS == "from codes" or OUTLIERS == "kept":
        count = tl.load(columns_ptr)
    if OUTLIERS == "from codes":
        rest = _fetch(
            0, codes_ptr, x_ptr, weight_ptr, columns_ptr, count, row, output, m_mask, n_mask,
            ins, x_stride, ins, "rest", True,
        )  # fmt: skip
    if OUTLIERS == "kept":
        coded = _fetch(
            0, codes_ptr, codes_ptr, weight_ptr, columns_ptr, count, row, output, m_mask, n_mask,
            ins, ins, ins, "codes", True,
        )  # fmt: skip
    if OUTLIERS == "kept" or OUTLIERS == "gathered":
        whole = _fetch(
            0, codes_ptr, x_ptr, kept_ptr, columns_ptr, count, row, output, m_mask, n_mask,
            ins, x_stride, kept_stride, "whole", OUTLIERS == "kept",
        )  # fmt: skip

    if SWAPPED:
        total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32)
    else:
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for start in tl.range(0, ins, BLOCK_K):
        if BY_TMA:
            left = codes.load([first_m, start])
            right = weight.load([first_n, start])
        else:
            k = start + tl.arange(0, BLOCK_K)
            left_mask, right_mask = m_mask[:, None], n_mask[:, None]
            if not EVEN_K:
                left_mask, right_mask = left_mask & (k < ins)[None, :], right_mask & (k < ins)[None, :]
            left = _part(codes_ptr, row, ins, k, left_mask)
            right = _part(weight_ptr, output, ins, k, right_mask)
        if SWAPPED:
            total = tl.dot(right, left.T, total, out_dtype=tl.int32)
        else:
            total = tl.dot(left, right.T, total, out_dtype=tl.int32)
    if SWAPPED:
        total = total.T

    scale = tl.load(scales_ptr + m, mask=m_mask, other=0.0)[:, None]
    weight_scale = tl.load(weight_scales_ptr + n, mask=n_mask, other=0.0)[None, :]
    zero = tl.zeros((BLOCK_M, 1), dtype=tl.int32)
    if HAS_ZEROS:
        zero = tl.load(zeros_ptr + m, mask=m_mask, other=0)[:, None]
        total -= zero * tl.load(weight_sums_ptr + n, mask=n_mask, other=0)[None, :]
    y = total.to(tl.float32)
    if OUTLIERS == "from codes":
        y = _all_added(
            y * scale, rest, codes_ptr, x_ptr, weight_ptr, columns_ptr, count, row, output, m_mask, n_mask,
            ins, x_stride, ins, zero, scale, "rest", True, dtype,
        )  # fmt: skip
        y *= weight_scale
    else:
        if OUTLIERS == "kept":
            y = _all_added(
                y, coded, codes_ptr, codes_ptr, weight_ptr, columns_ptr, count, row, output, m_mask, n_mask,
                ins, ins, ins, zero, scale, "codes", True, dtype,
            )  # fmt: skip
        y = y * scale * weight_scale
        if OUTLIERS == "kept" or OUTLIERS == "gathered":
            y = _all_added(
                y, whole, codes_ptr, x_ptr, kept_ptr, columns_ptr, count, row, output, m_mask, n_mask,
                ins, x_stride, kept_stride, zero, scale, "whole", OUTLIERS == "kept", dtype,
            )  # fmt: skip
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=n_mask, other=0.0).to(tl.float32)[None, :]
    y_mask = m_mask[:, None] & n_mask[None, :]
    tl.store(y_ptr + (row[:, None] * outs + output[None, :]), y.to(y_ptr.dtype.element_ty), mask=y_mask)


def can_be_copied(weight_codes: Tensor) -> bool:
    """Whether the copy engine can read the codes: on Hopper and later, from rows at multiples of 16 bytes."""
    aligned = weight_codes.shape[1] % TMA_STEP == 0 and weight_codes.data_ptr() % TMA_STEP == 0
    return aligned and not (weight_codes.is_cuda and torch.cuda.get_device_capability(weight_codes.device) < (9, 0))


def matmul(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    weight_codes: Tensor,
    weight_scales: Tensor,
    weight_sums: Tensor | None,
    bias: Tensor | None,
    outliers: Outliers,
    x: Tensor,
    columns: Tensor | None = None,
    kept: Tensor | None = None,
    overlaps: bool = False,
    tile: Tile | None = None,
) -> Tensor:
    """y [tokens, out] in the dtype of x.

    The codes of the weight are contiguous. `x` holds the activations themselves, or the gathered ones [tokens, n] of
    "gathered"; `kept` is a 16-bit weight [out, in], or [out, n]. `columns` is what `triton_split.split` makes. Without
    `weight_sums` the zeros are not read.
    """
    (tokens, ins), outs = codes.shape, weight_codes.shape[0]
    y = torch.empty(tokens, outs, dtype=x.dtype, device=x.device)
    tile = tile or tile_for(tokens, outs, x.dtype)
    by_tma = can_be_copied(weight_codes)
    left, right = codes, weight_codes
    if by_tma:
        left = TensorDescriptor.from_tensor(codes, [tile.block_m, tile.block_k])
        right = TensorDescriptor.from_tensor(weight_codes, [tile.block_n, tile.block_k])
    kept = x if kept is None else kept.contiguous()
    _matmul_kernel[(triton.cdiv(tokens, tile.block_m) * triton.cdiv(outs, tile.block_n),)](
        left, right, codes, weight_codes, scales, zeros, weight_scales, weight_sums, bias, y, x, columns, kept,
        tokens, outs, ins, x.stride(0), kept.stride(0), x.shape[1],
        weight_sums is not None, bias is not None, outliers, overlaps,
        by_tma, ins % tile.block_k == 0, tile.swapped,
        tile.block_m, tile.block_n, tile.block_k, tile.super_m,
        num_warps=tile.warps, num_stages=tile.stages, **({"launch_pdl": True} if overlaps else {}),
    )  # fmt: skip
    return y
