"""Weight-only matmul for a few tokens, without tensor cores: a program computes BLOCK_N outputs of one token.

Every thread keeps partial sums of its own and the only reduction is at the end, so that nothing waits inside the loop
and the words arrive as fast as memory gives them:

    words [BLOCK_N, BLOCK_W] ─► code - zero, one code of each word at a time ─► · x ─► partial [BLOCK_N, BLOCK_W]
                                                                   · scale of the word's group ─► total, float32

A word never straddles a group, since 16 divides the group size. Further tokens read the words again, from the L2 cache.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Strip:
    """How a launch is cut up: outputs and words of a step."""

    block_n: int
    block_w: int
    warps: int
    stages: int


def strip_for(words: int) -> Strip:
    """A step covers a whole row where rows are short."""
    return Strip(8, min(128, triton.next_power_of_2(words)), 4, 3)


@triton.jit
def _wna16_gemv_kernel(
    x_ptr, packed_ptr, scales_ptr, zeros_ptr, bias_ptr, y_ptr,
    outs, ins,
    x_stride, words, scales_stride_n, scales_stride_g, zeros_stride_n, zeros_stride_g,
    BITS: tl.constexpr, GROUP_SIZE: tl.constexpr, HAS_ZEROS: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    CODES: tl.constexpr = 32 // BITS
    # int64: a weight may have more than 2**31 codes
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    token = tl.program_id(1).to(tl.int64)
    n_mask = n < outs

    total = tl.zeros((BLOCK_N, BLOCK_W), dtype=tl.float32)
    for start in range(0, words, BLOCK_W):
        word = start + tl.arange(0, BLOCK_W)
        group = word * CODES // GROUP_SIZE
        mask = n_mask[:, None] & (word < words)[None, :]
        packed = tl.load(packed_ptr + n[:, None] * words + word[None, :], mask=mask, other=0)
        scale = tl.load(
            scales_ptr + n[:, None] * scales_stride_n + group[None, :] * scales_stride_g, mask=mask, other=0.0
        )
        if HAS_ZEROS:
            zero = tl.load(
                zeros_ptr + n[:, None] * zeros_stride_n + group[None, :] * zeros_stride_g, mask=mask, other=0
            ).to(tl.float32)
        else:
            zero = 2.0 ** (BITS - 1)
        partial = tl.zeros((BLOCK_N, BLOCK_W), dtype=tl.float32)
        for i in tl.static_range(CODES):
            k = word * CODES + i
            x = tl.load(x_ptr + token * x_stride + k, mask=k < ins, other=0.0).to(tl.float32)
            # the mantissa of 2**23 holds the code, which saves a slow conversion; both differences are exact
            code = ((packed >> (i * BITS)) & (2**BITS - 1) | 0x4B000000).to(tl.float32, bitcast=True)
            partial += (code - (8388608.0 + zero)) * x[None, :]
        total += partial * scale.to(tl.float32)

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
        strip.block_n, strip.block_w,
        num_warps=strip.warps, num_stages=strip.stages,
    )  # fmt: skip
    return y
