"""The second launch for Hopper and many tokens, in Gluon: what `triton_matmul` does, with products that overlap.

A program computes a [block_m tokens, block_n outputs] tile of y. Of the usual size two share a processor, so that one
multiplies while the other writes.

    copy engine    codes, weight_codes ─► one of `stages` buffers ─► total, int32
    meanwhile      the first 16 outlier columns ─► left [block_m, 16], right [block_n, 16], shared memory
    at the end     total · scale · weight_scale + left · rightᵀ ─► y
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false
# gluon's decorators change signatures in ways that types do not tell

from dataclasses import dataclass
from functools import cache

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_wait

from halfbyte.kernels.llm_int8.triton_matmul import Outliers

OUTLIERS_AT_ONCE = gl.constexpr(16)  # the shortest inner product of a tensor core
LONG_INS = 8192
WGMMA_COLUMNS = 128  # the most that triton multiplies at once in int8

# triton 3.9 has new names for what 3.6 has
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
_load_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


@dataclass(frozen=True)
class Cut:
    """How a launch is cut up. `super_m` tiles of tokens run side by side on one tile of outputs."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    super_m: int = 16


@dataclass(frozen=True)
class Layouts:
    """Who holds what: sums in int32 and float32, elements of outlier columns, elements of y on their way to memory."""

    total: gl.NVMMADistributedLayout
    y: gl.NVMMADistributedLayout
    part: gl.BlockedLayout
    stored: gl.BlockedLayout
    part_tile: gl.NVMMASharedLayout


@gluon.jit
def _issue(codes, weight, codes_tiles, weight_tiles, copied, first_m, first_n, step, stage, wanted):
    """Have the copy engine fill a buffer."""
    mbarrier.expect(copied.index(stage), codes.block_type.nbytes + weight.block_type.nbytes, pred=wanted)
    k = step * codes.block_type.shape[1]
    _load_tile(codes, [first_m, k], copied.index(stage), codes_tiles.index(stage), pred=wanted)
    _load_tile(weight, [first_n, k], copied.index(stage), weight_tiles.index(stage), pred=wanted)


@gluon.jit
def _lay_out(
    first, left_tile, right_tile, codes_ptr, left_ptr, right_ptr, scales_ptr, zeros_ptr, columns_ptr, count,
    rows_left, outputs_left, ins, left_stride, right_stride,
    TERM: gl.constexpr, LISTED: gl.constexpr, HAS_ZEROS: gl.constexpr, PART: gl.constexpr,
):  # fmt: skip
    """Outlier columns first, first + 1, ... of a term, as its operands in shared memory; 0 past the last."""
    row = gl.arange(0, left_tile.shape[0], gl.SliceLayout(1, PART))
    output = gl.arange(0, right_tile.shape[0], gl.SliceLayout(1, PART))
    column = first + gl.arange(0, OUTLIERS_AT_ONCE, gl.SliceLayout(0, PART))
    here = column < count
    if LISTED:
        column = gl.load(columns_ptr + 1 + column, mask=here, other=0)
    m_part = (row < rows_left)[:, None] & here[None, :]
    n_part = (output < outputs_left)[:, None] & here[None, :]
    left = gl.load(left_ptr + (row[:, None] * left_stride + column[None, :]), mask=m_part, other=0)
    right = gl.load(right_ptr + (output[:, None] * right_stride + column[None, :]), mask=n_part, other=0)
    if TERM == "rest" or TERM == "codes":
        coded = left
        if TERM == "rest":
            coded = gl.load(codes_ptr + (row[:, None] * ins + column[None, :]), mask=m_part, other=0)
        coded = coded.to(gl.int32)
        if HAS_ZEROS:
            coded -= gl.load(zeros_ptr + row, mask=row < rows_left, other=0)[:, None]
            coded = gl.where(m_part, coded, 0)
        if TERM == "rest":
            scale = gl.load(scales_ptr + row, mask=row < rows_left, other=0.0)[:, None]
            left = left.to(gl.float32) - coded.to(gl.float32) * scale
        else:
            left = -coded.to(gl.float32)
    left_tile.store(left.to(left_tile.dtype))
    right_tile.store(right.to(right_tile.dtype))


@gluon.jit
def _all_added(
    y, left_tile, right_tile, codes_ptr, left_ptr, right_ptr, scales_ptr, zeros_ptr, columns_ptr, count,
    rows_left, outputs_left, ins, left_stride, right_stride,
    TERM: gl.constexpr, LISTED: gl.constexpr, HAS_ZEROS: gl.constexpr, PART: gl.constexpr,
):  # fmt: skip
    """y with a term of all outlier columns, the first of which have been laid out."""
    for first in range(0, count, OUTLIERS_AT_ONCE):
        if first > 0:
            _lay_out(
                first, left_tile, right_tile, codes_ptr, left_ptr, right_ptr, scales_ptr, zeros_ptr, columns_ptr, count,
                rows_left, outputs_left, ins, left_stride, right_stride, TERM, LISTED, HAS_ZEROS, PART,
            )  # fmt: skip
        fence_async_shared()
        _barrier()
        y = warpgroup_mma(left_tile, right_tile.permute((1, 0)), y, is_async=True)
        y = warpgroup_mma_wait(0, deps=(y,))
        _barrier()
    return y


@gluon.jit(do_not_specialize=["tokens"])
def _matmul_kernel(
    codes, weight, codes_ptr, weight_ptr, scales_ptr, zeros_ptr, weight_scales_ptr, weight_sums_ptr, bias_ptr, y_ptr,
    x_ptr, columns_ptr, kept_ptr,
    tokens, outs, ins, x_stride, kept_stride, gathered,
    HAS_ZEROS: gl.constexpr, HAS_BIAS: gl.constexpr, OUTLIERS: gl.constexpr, OVERLAPS: gl.constexpr,
    cut: gl.constexpr, layouts: gl.constexpr,
):  # fmt: skip
    BLOCK_M: gl.constexpr = cut.block_m
    BLOCK_N: gl.constexpr = cut.block_n
    STAGES: gl.constexpr = cut.stages
    PART: gl.constexpr = layouts.part
    Y: gl.constexpr = layouts.y
    STORED: gl.constexpr = layouts.stored
    TOTAL: gl.constexpr = layouts.total
    PART_TILE: gl.constexpr = layouts.part_tile
    tiles_m, tiles_n = gl.cdiv(tokens, BLOCK_M), gl.cdiv(outs, BLOCK_N)
    first_tile = gl.program_id(0) // (cut.super_m * tiles_n) * cut.super_m
    within = gl.program_id(0) % (cut.super_m * tiles_n)
    beside = min(tiles_m - first_tile, cut.super_m)
    first_m = (first_tile + within % beside) * BLOCK_M
    first_n = within // beside * BLOCK_N

    codes_tiles = gl.allocate_shared_memory(gl.int8, [STAGES, BLOCK_M, cut.block_k], codes.layout)
    weight_tiles = gl.allocate_shared_memory(gl.int8, [STAGES, BLOCK_N, cut.block_k], weight.layout)
    copied = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(copied.index(i), count=1)
    fence_async_shared()
    _barrier()
    if OVERLAPS:
        gdc_wait()  # for what the launch before writes
    steps = gl.cdiv(ins, cut.block_k)
    for i in gl.static_range(STAGES - 1):
        _issue(codes, weight, codes_tiles, weight_tiles, copied, first_m, first_n, i, i, i < steps)

    # int64 up to the tile: a weight may have more than 2**31 codes, and so may the activations
    codes_ptr += first_m.to(gl.int64) * ins
    weight_ptr += first_n.to(gl.int64) * ins
    x_ptr += first_m.to(gl.int64) * x_stride
    kept_ptr += first_n.to(gl.int64) * kept_stride
    y_ptr += first_m.to(gl.int64) * outs + first_n
    scales_ptr += first_m
    zeros_ptr += first_m
    dtype: gl.constexpr = x_ptr.dtype.element_ty
    left_tile = gl.allocate_shared_memory(dtype, [BLOCK_M, OUTLIERS_AT_ONCE], PART_TILE)
    right_tile = gl.allocate_shared_memory(dtype, [BLOCK_N, OUTLIERS_AT_ONCE], PART_TILE)
    count = gathered
    if OUTLIERS == "from codes" or OUTLIERS == "kept":
        count = gl.load(columns_ptr)
    if OUTLIERS == "from codes":
        _lay_out(
            0, left_tile, right_tile, codes_ptr, x_ptr, weight_ptr, scales_ptr, zeros_ptr, columns_ptr, count,
            tokens - first_m, outs - first_n, ins, x_stride, ins, "rest", True, HAS_ZEROS, PART,
        )  # fmt: skip
    if OUTLIERS == "kept":
        coded_left = gl.allocate_shared_memory(dtype, [BLOCK_M, OUTLIERS_AT_ONCE], PART_TILE)
        coded_right = gl.allocate_shared_memory(dtype, [BLOCK_N, OUTLIERS_AT_ONCE], PART_TILE)
        _lay_out(
            0, coded_left, coded_right, codes_ptr, codes_ptr, weight_ptr, scales_ptr, zeros_ptr, columns_ptr, count,
            tokens - first_m, outs - first_n, ins, ins, ins, "codes", True, HAS_ZEROS, PART,
        )  # fmt: skip
    if OUTLIERS == "kept" or OUTLIERS == "gathered":
        _lay_out(
            0, left_tile, right_tile, codes_ptr, x_ptr, kept_ptr, scales_ptr, zeros_ptr, columns_ptr, count,
            tokens - first_m, outs - first_n, ins, x_stride, kept_stride, "whole", OUTLIERS == "kept", HAS_ZEROS, PART,
        )  # fmt: skip

    total = gl.zeros((BLOCK_M, BLOCK_N), gl.int32, TOTAL)
    for step in range(steps):
        mbarrier.wait(copied.index(step % STAGES), step // STAGES & 1)
        right = weight_tiles.index(step % STAGES).permute((1, 0))
        total = warpgroup_mma(codes_tiles.index(step % STAGES), right, total, is_async=True)
        # the products of the step before are done, so its buffer is free
        total = warpgroup_mma_wait(1, deps=(total,))
        _barrier()
        ahead = step + STAGES - 1
        _issue(codes, weight, codes_tiles, weight_tiles, copied, first_m, first_n, ahead, ahead % STAGES, ahead < steps)
    total = warpgroup_mma_wait(0, deps=(total,))

    total = gl.convert_layout(total, Y, assert_trivial=True)
    m = gl.arange(0, BLOCK_M, gl.SliceLayout(1, Y))
    n = first_n + gl.arange(0, BLOCK_N, gl.SliceLayout(0, Y))
    m_mask, n_mask = m < tokens - first_m, n < outs
    scale = gl.load(scales_ptr + m, mask=m_mask, other=0.0)[:, None]
    weight_scale = gl.load(weight_scales_ptr + n, mask=n_mask, other=0.0)[None, :]
    if HAS_ZEROS:
        zero = gl.load(zeros_ptr + m, mask=m_mask, other=0)[:, None]
        total -= zero * gl.load(weight_sums_ptr + n, mask=n_mask, other=0)[None, :]
    y = total.to(gl.float32)
    if OUTLIERS == "from codes":
        y = _all_added(
            y * scale, left_tile, right_tile, codes_ptr, x_ptr, weight_ptr, scales_ptr, zeros_ptr, columns_ptr, count,
            tokens - first_m, outs - first_n, ins, x_stride, ins, "rest", True, HAS_ZEROS, PART,
        )  # fmt: skip
        y *= weight_scale
    else:
        if OUTLIERS == "kept":
            y = _all_added(
                y, coded_left, coded_right, codes_ptr, codes_ptr, weight_ptr, scales_ptr, zeros_ptr, columns_ptr, count,
                tokens - first_m, outs - first_n, ins, ins, ins, "codes", True, HAS_ZEROS, PART,
            )  # fmt: skip
        y = y * scale * weight_scale
        if OUTLIERS == "kept" or OUTLIERS == "gathered":
            y = _all_added(
                y, left_tile, right_tile, codes_ptr, x_ptr, kept_ptr, scales_ptr, zeros_ptr, columns_ptr, count,
                tokens - first_m, outs - first_n, ins, x_stride, kept_stride, "whole", OUTLIERS == "kept", HAS_ZEROS, PART,
            )  # fmt: skip
    if HAS_BIAS:
        y += gl.load(bias_ptr + n, mask=n_mask, other=0.0).to(gl.float32)[None, :]
    y = gl.convert_layout(y.to(y_ptr.dtype.element_ty), STORED)
    m = gl.arange(0, BLOCK_M, gl.SliceLayout(1, STORED))
    n = gl.arange(0, BLOCK_N, gl.SliceLayout(0, STORED))
    y_mask = (m < tokens - first_m)[:, None] & (n < outs - first_n)[None, :]
    gl.store(y_ptr + (m[:, None] * outs + n[None, :]), y, mask=y_mask)


def cut_for(tokens: int, outs: int, ins: int, processors: int) -> Cut:
    """The fastest that was measured on an H200: the largest tiles of which every processor gets its share."""
    squares = triton.cdiv(tokens, 128) * triton.cdiv(outs, 128)
    if tokens > 64 and 5 * squares >= 6 * processors:
        if ins >= LONG_INS and squares >= 2 * processors:
            return Cut(128, 256, 128, warps=8, stages=4)  # one to a processor, with a long way to its epilogue
        return Cut(128, 128, 128, warps=4, stages=3)
    halves = triton.cdiv(tokens, 64) * triton.cdiv(outs, 128)
    if halves > processors:
        return Cut(64, 128, 128, warps=4, stages=4)
    if 5 * halves >= 4 * processors:
        return Cut(64, 128, 256, warps=4, stages=3)
    return Cut(64, 64, 256, warps=4, stages=4)


@cache
def _layouts(cut: Cut) -> Layouts:
    columns = min(cut.block_n, WGMMA_COLUMNS)
    across = min(32, cut.block_n // 8)  # threads side by side on a row of y, 16 bytes each
    return Layouts(
        gl.NVMMADistributedLayout([3, 0], [cut.warps, 1], [16, columns, 32]),
        gl.NVMMADistributedLayout([3, 0], [cut.warps, 1], [16, columns, 16]),
        gl.BlockedLayout([1, 1], [2, 16], [cut.warps, 1], [1, 0]),
        gl.BlockedLayout([1, 8], [32 // across, across], [cut.warps, 1], [1, 0]),
        gl.NVMMASharedLayout(swizzle_byte_width=32, element_bitwidth=16, rank=2),
    )


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
    cut: Cut | None = None,
) -> Tensor:
    """y [tokens, out] in the dtype of x, one of 16 bits; arguments as those of `triton_matmul.matmul`."""
    (tokens, ins), outs = codes.shape, weight_codes.shape[0]
    y = torch.empty(tokens, outs, dtype=x.dtype, device=x.device)
    cut = cut or cut_for(tokens, outs, ins, torch.cuda.get_device_properties(x.device).multi_processor_count)
    tile = gl.NVMMASharedLayout(swizzle_byte_width=min(cut.block_k, 128), element_bitwidth=8, rank=2)
    kept = x if kept is None else kept.contiguous()
    _matmul_kernel[(triton.cdiv(tokens, cut.block_m) * triton.cdiv(outs, cut.block_n),)](
        TensorDescriptor.from_tensor(codes, [cut.block_m, cut.block_k], tile),
        TensorDescriptor.from_tensor(weight_codes, [cut.block_n, cut.block_k], tile),
        codes, weight_codes, scales, zeros, weight_scales, weight_sums, bias, y, x, columns, kept,
        tokens, outs, ins, x.stride(0), kept.stride(0), x.shape[1],
        weight_sums is not None, bias is not None, outliers, overlaps, cut, _layouts(cut),
        num_warps=cut.warps, **({"launch_pdl": True} if overlaps else {}),
    )  # fmt: skip
    return y
