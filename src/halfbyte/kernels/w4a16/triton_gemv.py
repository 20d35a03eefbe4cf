"""Weight-only matmul for a few tokens, without tensor cores: a program computes BLOCK_N outputs of one token.

Every thread keeps partial sums of its own and the reduction is at the end, so that threads hardly wait for each other
and words arrive as fast as memory gives them:

    words [BLOCK_N, BLOCK_W] ─► (code - zero) · scale [BLOCK_N, BLOCK_K] ─► · x [BLOCK_K] ─► total, float32

BLOCK_K = BLOCK_W · 32 / bits. A word never straddles a group, since 16 divides the group size. Further tokens read the
words again, from the L2 cache.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false
# triton's decorators change signatures in ways that types do not tell

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Strip:
    """How a launch is cut up: outputs of a program, words of a step, loads in flight."""

    block_n: int
    block_w: int
    warps: int
    stages: int


def strip_for(words: int) -> Strip:
    """Few outputs for many programs; a step covers a whole row where rows are short."""
    return Strip(block_n=4, block_w=min(128, triton.next_power_of_2(words)), warps=4, stages=3)


@triton.jit
def _decode(words, scale, zero, BITS: tl.constexpr, FIRST: tl.constexpr, STEP: tl.constexpr):
    """(code - zero) · scale for codes FIRST, FIRST + STEP, ... of every word, side by side, in float32.

    A code at the top of the mantissa of 1.0 is 1 + code / 2**BITS, so a shift, a mask and one multiply-add decode it.
    """
    if STEP * BITS == 32:
        top: tl.constexpr = 23 - BITS  # the lowest bit of the code in the mantissa
        low: tl.constexpr = FIRST * BITS  # and in the word
        moved = words >> (low - top) if low > top else words << (top - low)
        one_to_two = (moved & ((2**BITS - 1) << top) | 0x3F800000).to(tl.float32, bitcast=True)
        return one_to_two * (scale * 2**BITS) - scale * (zero + 2**BITS)
    else:  # noqa: RET505 - triton compiles what follows a return, so this would recurse for ever
        even = _decode(words, scale, zero, BITS, FIRST, 2 * STEP)
        return tl.interleave(even, _decode(words, scale, zero, BITS, FIRST + STEP, 2 * STEP))


@triton.jit
def _wna16_gemv_kernel(
    x_ptr, packed_ptr, scales_ptr, zeros_ptr, bias_ptr, y_ptr,
    outs, ins,
    x_stride, words, scales_stride_n, scales_stride_g, zeros_stride_n, zeros_stride_g,
    BITS: tl.constexpr, GROUP_SIZE: tl.constexpr, HAS_ZEROS: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    CODES: tl.constexpr = 32 // BITS
    # int64: a weight may have more than 2**31 codes
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    token = tl.program_id(1).to(tl.int64)
    n_mask = n < outs

    total = tl.zeros((BLOCK_N, BLOCK_W * CODES), dtype=tl.float32)
    for start in tl.range(0, words, BLOCK_W, num_stages=STAGES):
        word = start + tl.arange(0, BLOCK_W)
        k = start * CODES + tl.arange(0, BLOCK_W * CODES)
        group = word * CODES // GROUP_SIZE
        mask = n_mask[:, None] & (word < words)[None, :]
        packed = tl.load(packed_ptr + n[:, None] * words + word[None, :], mask=mask, other=0)
        scales = scales_ptr + n[:, None] * scales_stride_n + group[None, :] * scales_stride_g
        scale = tl.load(scales, mask=mask, other=0.0).to(tl.float32)
        if HAS_ZEROS:
            zeros = zeros_ptr + n[:, None] * zeros_stride_n + group[None, :] * zeros_stride_g
            zero = tl.load(zeros, mask=mask, other=0).to(tl.float32)
        else:
            zero = 2.0 ** (BITS - 1)
        x = tl.load(x_ptr + token * x_stride + k, mask=k < ins, other=0.0).to(tl.float32)
        total += _decode(packed, scale, zero, BITS, 0, 1) * x[None, :]

    y = tl.sum(total, axis=1)
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=n_mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + token * outs + n, y.to(y_ptr.dtype.element_ty), mask=n_mask)


def wna16_matmul(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    bits: int,
    group_size: int,
    bias: Tensor | None = None,
    strip: Strip | None = None,
) -> Tensor:
    """x · Wᵀ + bias for 4 or 8 bits; groups are multiples of 16 inputs, or there is one. Arguments as the op's."""
    (tokens, ins), outs = x.shape, packed.shape[0]
    y = torch.empty(tokens, outs, dtype=x.dtype, device=x.device)
    if not tokens:
        return y
    if x.stride(1) != 1:
        x = x.contiguous()
    packed = packed.contiguous()
    strip = strip or strip_for(packed.shape[1])
    zeros = scales if zero_points is None else zero_points
    _wna16_gemv_kernel[(triton.cdiv(outs, strip.block_n), tokens)](
        x, packed, scales, zeros, y if bias is None else bias, y,
        outs, ins,
        x.stride(0), packed.shape[1], *scales.stride(), *zeros.stride(),
        bits, group_size, zero_points is not None, bias is not None,
        strip.block_n, strip.block_w, strip.stages,
        num_warps=strip.warps,
    )  # fmt: skip
    return y
