"""Grouped integer products on tensor cores: a program computes [BLOCK_M tokens, BLOCK_N outputs].

Runs are walked one by one, each in steps of BLOCK_K inputs; what reaches past a run's end is masked to zero, so runs of
any length will do. Within a run all is int32:

    x [BLOCK_M, BLOCK_K] ──────────────────────┐
                                              dot ─► products ─► - zero points ─► · both scales ─► total, float32
    words ─► codes - 2^(bits-1) [BLOCK_K, BLOCK_N] ─┘
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

SHORTEST_STEP = 32  # inputs of one int8 tensor core instruction


@dataclass(frozen=True, slots=True)
class Tile:
    """How a launch is cut up."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


def tile_for(tokens: int, run: int) -> Tile:
    """Small tiles for few tokens; steps no longer than a run needs."""
    block_m = min(128, max(16, triton.next_power_of_2(tokens)))
    block_k = min(128, max(SHORTEST_STEP, triton.next_power_of_2(run)))
    return Tile(block_m, 64, block_k, warps=4 if block_m < 128 else 8, stages=3)


@triton.jit(do_not_specialize=["tokens"])
def _grouped_int8_matmul_kernel(
    x_ptr, x_scales_ptr, x_zeros_ptr, weight_ptr, scales_ptr, zeros_ptr, bias_ptr, y_ptr,
    tokens, outs, ins,
    x_stride, weight_stride, x_scales_stride_m, x_scales_stride_g, x_zeros_stride_m, x_zeros_stride_g,
    scales_stride_n, scales_stride_g, zeros_stride_n, zeros_stride_g,
    BITS: tl.constexpr, PACKED: tl.constexpr, RUN: tl.constexpr, X_GROUP: tl.constexpr, GROUP: tl.constexpr,
    HAS_X_ZEROS: tl.constexpr, HAS_ZEROS: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(outs, BLOCK_N)
    # int64: a weight may have more than 2**31 codes, and so may the activations
    m = (tl.program_id(0) // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    n = (tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    m_mask, n_mask = m < tokens, n < outs

    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(0, ins, RUN):
        products = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
        x_sums = tl.zeros((BLOCK_M,), dtype=tl.int32)
        sums = tl.zeros((BLOCK_N,), dtype=tl.int32)
        for start in range(0, RUN, BLOCK_K):
            inner = start + tl.arange(0, BLOCK_K)
            k, k_mask = first + inner, inner < RUN
            x = tl.load(x_ptr + m[:, None] * x_stride + k[None, :], mask=m_mask[:, None] & k_mask[None, :], other=0)
            mask = k_mask[:, None] & n_mask[None, :]
            if PACKED:
                words = weight_ptr + n[None, :] * weight_stride + (k * BITS // 32)[:, None]
                stored = tl.load(words, mask=mask, other=0) >> (k * BITS % 32)[:, None]
                codes = tl.where(mask, (stored & (2**BITS - 1)) - 2 ** (BITS - 1), 0).to(tl.int8)
            else:
                codes = tl.load(weight_ptr + n[None, :] * weight_stride + k[:, None], mask=mask, other=0)
            products = tl.dot(x, codes, products, out_dtype=tl.int32)
            if HAS_ZEROS:
                x_sums += tl.sum(x.to(tl.int32), axis=1)
            if HAS_X_ZEROS:
                sums += tl.sum(codes.to(tl.int32), axis=0)
        x_group, group = first // X_GROUP, first // GROUP
        if HAS_X_ZEROS:
            x_zeros = x_zeros_ptr + m * x_zeros_stride_m + x_group * x_zeros_stride_g
            x_zero = tl.load(x_zeros, mask=m_mask, other=0)
            products -= x_zero[:, None] * sums[None, :]
            x_sums -= RUN * x_zero
        if HAS_ZEROS:
            zeros = zeros_ptr + n * zeros_stride_n + group * zeros_stride_g
            products -= x_sums[:, None] * tl.load(zeros, mask=n_mask, other=0).to(tl.int32)[None, :]
        x_scales = x_scales_ptr + m * x_scales_stride_m + x_group * x_scales_stride_g
        scales = scales_ptr + n * scales_stride_n + group * scales_stride_g
        x_scale = tl.load(x_scales, mask=m_mask, other=0.0).to(tl.float32)
        scale = tl.load(scales, mask=n_mask, other=0.0).to(tl.float32)
        total += products.to(tl.float32) * (x_scale[:, None] * scale[None, :])

    if HAS_BIAS:
        total += tl.load(bias_ptr + n, mask=n_mask, other=0.0).to(tl.float32)[None, :]
    y = total.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + m[:, None] * outs + n[None, :], y, mask=m_mask[:, None] & n_mask[None, :])


def grouped_int8_matmul(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    bits: int,
    x_zeros: Tensor | None,
    weight_zeros: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    run: int,
    tile: Tile | None = None,
) -> Tensor:
    """x · Wᵀ + bias for codes [out, in], or words of 2, 4 or 8 bits; `run` as `run_size` says. Arguments as the op's."""
    (tokens, ins), outs = x.shape, weight.shape[0]
    y = torch.empty(tokens, outs, dtype=dtype, device=x.device)
    if not tokens:
        return y
    x = x if x.stride(1) == 1 else x.contiguous()
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    tile = tile or tile_for(tokens, run)
    x_points = x_scales if x_zeros is None else x_zeros
    points = weight_scales if weight_zeros is None else weight_zeros
    _grouped_int8_matmul_kernel[(triton.cdiv(tokens, tile.block_m) * triton.cdiv(outs, tile.block_n),)](
        x, x_scales, x_points, weight, weight_scales, points, y if bias is None else bias, y,
        tokens, outs, ins,
        x.stride(0), weight.stride(0), *x_scales.stride(), *x_points.stride(), *weight_scales.stride(), *points.stride(),
        bits, weight.dtype == torch.int32, run, ins // x_scales.shape[1], ins // weight_scales.shape[1],
        x_zeros is not None, weight_zeros is not None, bias is not None,
        tile.block_m, tile.block_n, tile.block_k,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return y
