"""Weight-only matmul on tensor cores: a program computes [BLOCK_N outputs, BLOCK_M tokens] of yᵀ = W · xᵀ.

Each step takes BLOCK_K inputs of one group, so that one scale per output applies to all of them:

    words [BLOCK_N, BLOCK_K · bits / 32] ─► code - zero [BLOCK_N, BLOCK_K] ─┐
                                                                           dot ─► · scale [BLOCK_N] ─► total, float32
                                            xᵀ [BLOCK_K, BLOCK_M] ─────────┘

code - zero is an integer below 256 in magnitude, exact in every dtype of x: nothing rounds before the products. The
weight is the left operand because tensor cores can read that one from registers, where it was decoded.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

# this many tiles of tokens run side by side on one tile of outputs, so that its words come from the L2 cache
SUPER_M = tl.constexpr(8)


@dataclass(frozen=True, slots=True)
class Tile:
    """How a launch is cut up. `block_k` divides the group size unless there is a single group."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


def tile_for(tokens: int, groups: int, group_size: int, dtype: torch.dtype) -> Tile:
    """The tile for so many tokens: wide in outputs while the weight's bytes dominate, square where arithmetic does."""
    if dtype == torch.float32:  # no tensor cores at full precision
        block_m, block_n, block_k, warps, stages = 32, 32, 32, 4, 3
    elif tokens <= 16:
        block_m, block_n, block_k, warps, stages = 16, 32, 128, 4, 6
    elif tokens <= 32:
        block_m, block_n, block_k, warps, stages = 32, 64, 128, 4, 4
    elif tokens <= 64:
        block_m, block_n, block_k, warps, stages = 64, 64, 128, 4, 4
    elif tokens <= 256:
        block_m, block_n, block_k, warps, stages = 128, 64, 64, 4, 4
    else:
        block_m, block_n, block_k, warps, stages = 128, 128, 64, 8, 4
    if groups > 1:
        block_k = min(block_k, group_size & -group_size)  # the largest power of two that divides the group
    return Tile(block_m, block_n, block_k, warps, stages)


@triton.jit
def _spread(words, BITS: tl.constexpr, FIRST: tl.constexpr, STEP: tl.constexpr):
    """Codes FIRST, FIRST + STEP, ... of every word side by side: [N, W] words give [N, W · 32 / BITS / STEP] codes."""
    if STEP * BITS == 32:
        return (words >> (FIRST * BITS)) & (2**BITS - 1)
    else:  # noqa: RET505 - triton compiles what follows a return, so this would recurse for ever
        return tl.interleave(_spread(words, BITS, FIRST, 2 * STEP), _spread(words, BITS, FIRST + STEP, 2 * STEP))


@triton.jit
def _centred(codes, zero, BITS: tl.constexpr, dtype: tl.constexpr):
    """code - zero in `dtype`. Where the code fits the mantissa, putting it there replaces a conversion, a slow step."""
    if dtype == tl.float16:
        centred = (codes | 0x6400).to(tl.int16).to(tl.float16, bitcast=True) - (zero + 1024).to(tl.float16)
    elif dtype == tl.bfloat16 and BITS < 8:
        centred = (codes | 0x4300).to(tl.int16).to(tl.bfloat16, bitcast=True) - (zero + 128).to(tl.bfloat16)
    else:
        centred = (codes - zero).to(dtype)
    return centred


@triton.jit(do_not_specialize=["tokens"])
def _wna16_matmul_kernel(
    x_ptr, packed_ptr, scales_ptr, zeros_ptr, bias_ptr, y_ptr,
    tokens, outs, ins,
    x_stride, words, scales_stride_n, scales_stride_g, zeros_stride_n, zeros_stride_g,
    BITS: tl.constexpr, GROUP_SIZE: tl.constexpr, HAS_ZEROS: tl.constexpr, HAS_BIAS: tl.constexpr,
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

    total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for start in range(0, ins, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        word = start * BITS // 32 + tl.arange(0, BLOCK_K * BITS // 32)
        group = start // GROUP_SIZE
        packed_mask, x_mask = n_mask[:, None], m_mask[None, :]
        if not EVEN_K:
            packed_mask = packed_mask & (word[None, :] < words)
            x_mask = x_mask & (k[:, None] < ins)  # zeros, so codes past the end count for nothing
        packed = tl.load(packed_ptr + n[:, None] * words + word[None, :], mask=packed_mask, other=0)
        x = tl.load(x_ptr + m[None, :] * x_stride + k[:, None], mask=x_mask, other=0.0)
        scale = tl.load(scales_ptr + n * scales_stride_n + group * scales_stride_g, mask=n_mask, other=0.0)
        if HAS_ZEROS:
            zero = tl.load(zeros_ptr + n * zeros_stride_n + group * zeros_stride_g, mask=n_mask, other=0).to(tl.int32)
        else:
            zero = tl.full((BLOCK_N,), 2 ** (BITS - 1), dtype=tl.int32)
        centred = _centred(_spread(packed, BITS, 0, 1), zero[:, None], BITS, x.dtype)
        # "ieee" keeps float32 activations whole; it means nothing to the 16-bit ones
        total += tl.dot(centred, x, input_precision="ieee") * scale.to(tl.float32)[:, None]

    if HAS_BIAS:
        total += tl.load(bias_ptr + n, mask=n_mask, other=0.0).to(tl.float32)[:, None]
    y = total.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + m[None, :] * outs + n[:, None], y, mask=n_mask[:, None] & m_mask[None, :])


def wna16_matmul(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    bits: int,
    group_size: int,
    bias: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """x · Wᵀ + bias for 4 or 8 bits; groups are multiples of 16 inputs, or there is one. Arguments as the op's."""
    (tokens, ins), outs, groups = x.shape, packed.shape[0], scales.shape[1]
    y = torch.empty(tokens, outs, dtype=x.dtype, device=x.device)
    if not tokens:
        return y
    if x.stride(1) != 1:
        x = x.contiguous()
    packed = packed.contiguous()
    tile = tile or tile_for(tokens, groups, group_size, x.dtype)
    grid = (triton.cdiv(tokens, tile.block_m) * triton.cdiv(outs, tile.block_n),)
    zeros = scales if zero_points is None else zero_points
    _wna16_matmul_kernel[grid](
        x, packed, scales, zeros, y if bias is None else bias, y,
        tokens, outs, ins,
        x.stride(0), packed.shape[1], *scales.stride(), *zeros.stride(),
        bits, group_size, zero_points is not None, bias is not None,
        ins % tile.block_k == 0, tile.block_m, tile.block_n, tile.block_k,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return y
