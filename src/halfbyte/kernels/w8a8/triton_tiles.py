"""The int8 matmul in plain Triton: a program computes [BLOCK_N outputs, BLOCK_M tokens] of yᵀ = W · xᵀ.

    W [BLOCK_N, BLOCK_K] ─┐
                         dot ─► total, int32 ─► · x_scales · weight_scales + bias + residual ─► y
    xᵀ [BLOCK_K, BLOCK_M] ─┘

It runs wherever Triton does and takes every size. On Hopper it is for a few tokens, with which reading the weight is all
the work: the weight is the left operand, since tensor cores want 16 or 64 rows there and are content with 8 tokens on
the right, and `stages` of its tiles are in flight.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false
# triton's decorators change signatures in ways that types do not tell

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte.kernels.w8a8.tiling import MULTIPROCESSORS

# this many tiles of tokens run side by side on one tile of outputs, so that it comes from the L2 cache
SUPER_M = tl.constexpr(8)
MANY_OUTS = 8192


@dataclass(frozen=True, slots=True)
class Tile:
    """How a launch is cut up."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


def tile_for(tokens: int, outs: int) -> Tile:
    """The fastest that were measured on an H200: narrow and deep while the weight's bytes are all the work.

    Where there are many tiles, smaller ones run side by side on a multiprocessor instead of one with deep buffers. How
    many do goes with the stages: as many as leave the least of the last round empty.
    """
    many = outs > MANY_OUTS
    if tokens <= 16:
        return Tile(16, 32, 256, 2, 3) if many else Tile(16, 32, 512, 4, _stages(outs, 32, {4: 2, 6: 1}))
    if tokens <= 32 and many:
        return Tile(32, 64, 256, 4, _stages(outs, 64, {4: 2, 3: 3}))
    if tokens <= 32:
        return Tile(32, 32, 512, 4, _stages(outs, 32, {3: 2, 4: 1}))
    if tokens <= 64:
        return Tile(64, 64, 128, 4, _stages(outs, 64, {5: 2, 4: 3}))
    return Tile(128, 128, 128, 8, 3)


def _stages(outs: int, block_n: int, beside: dict[int, int]) -> int:
    """The number of stages with the least to do for a multiprocessor, where `beside` tells how many tiles it takes."""
    tiles = triton.cdiv(outs, block_n)
    return min(beside, key=lambda stages: triton.cdiv(tiles, MULTIPROCESSORS * beside[stages]) * beside[stages])


@triton.jit(do_not_specialize=["tokens"])
def _int8_matmul_kernel(
    x_ptr, weight_ptr, x_scales_ptr, weight_scales_ptr, bias_ptr, residual_ptr, x_zeros_ptr, weight_sums_ptr, y_ptr,
    tokens, outs, ins, x_stride, weight_stride, residual_stride,
    STATIC: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_ZEROS: tl.constexpr,
    EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles_m = tl.cdiv(tokens, BLOCK_M)
    tiles_n = tl.cdiv(outs, BLOCK_N)
    first_m = tl.program_id(0) // (SUPER_M * tiles_n) * SUPER_M
    within = tl.program_id(0) % (SUPER_M * tiles_n)
    beside = min(tiles_m - first_m, SUPER_M)
    # int64: a weight may have more than 2**31 codes, and so may the activations
    m = ((first_m + within % beside) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    n = (within // beside * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    m_mask, n_mask = m < tokens, n < outs

    total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32)
    for start in range(0, ins, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        weight_mask, x_mask = n_mask[:, None], m_mask[None, :]
        if not EVEN_K:
            weight_mask = weight_mask & (k[None, :] < ins)
            x_mask = x_mask & (k[:, None] < ins)
        weight = tl.load(weight_ptr + n[:, None] * weight_stride + k[None, :], mask=weight_mask, other=0)
        x = tl.load(x_ptr + m[None, :] * x_stride + k[:, None], mask=x_mask, other=0)
        total = tl.dot(weight, x, total, out_dtype=tl.int32)

    if HAS_ZEROS:
        zeros = tl.load(x_zeros_ptr + m, mask=m_mask, other=0)
        sums = tl.load(weight_sums_ptr + n, mask=n_mask, other=0)
        total -= sums[:, None] * zeros[None, :]
    x_scales = tl.load(x_scales_ptr) if STATIC else tl.load(x_scales_ptr + m, mask=m_mask, other=0.0)[None, :]
    y = total.to(tl.float32) * x_scales * tl.load(weight_scales_ptr + n, mask=n_mask, other=0.0)[:, None]
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=n_mask, other=0.0).to(tl.float32)[:, None]
    y_mask = n_mask[:, None] & m_mask[None, :]
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + m[None, :] * residual_stride + n[:, None], mask=y_mask, other=0.0)
        y += residual.to(tl.float32)
    tl.store(y_ptr + m[None, :] * outs + n[:, None], y.to(y_ptr.dtype.element_ty), mask=y_mask)


def int8_matmul(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    x_zeros: Tensor | None = None,
    weight_sums: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    tile: Tile | None = None,
) -> Tensor:
    """The op for any size. Rows of x, weight and residual may lie apart; within a row elements are neighbours."""
    (tokens, ins), outs = x.shape, weight.shape[0]
    y = torch.empty(tokens, outs, dtype=dtype, device=x.device)
    if not tokens or not outs:
        return y
    tile = tile or tile_for(tokens, outs)
    grid = (triton.cdiv(tokens, tile.block_m) * triton.cdiv(outs, tile.block_n),)
    _int8_matmul_kernel[grid](
        x, weight, x_scales, weight_scales, *(y if part is None else part for part in (bias, residual)),
        *(x_scales if part is None else part for part in (x_zeros, weight_sums)), y,
        tokens, outs, ins, x.stride(0), weight.stride(0), 0 if residual is None else residual.stride(0),
        len(x_scales) == 1, bias is not None, residual is not None, x_zeros is not None,
        ins % tile.block_k == 0, tile.block_m, tile.block_n, tile.block_k,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return y
