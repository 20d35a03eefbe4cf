"""The int8 matmul for one token, without tensor cores: a program computes BLOCK_N outputs.

Four codes lie in a 32-bit word, and one instruction (dp4a) multiplies four pairs of them and adds the products:

    words of W [BLOCK_N, BLOCK_W] ─┐
                                 dp4a ─► total [BLOCK_N, BLOCK_W], int32 ─► sums ─► · scales + bias + residual ─► y
    words of x [BLOCK_W] ──────────┘

Every thread keeps partial sums of its own and the reduction is at the end, so that threads hardly wait for each other
and words arrive as fast as memory gives them.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false
# triton's decorators change signatures in ways that types do not tell

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

CODES = 4  # of a word


@dataclass(frozen=True, slots=True)
class Strip:
    """How a launch is cut up: outputs of a program, words of a step."""

    block_n: int
    block_w: int
    warps: int


STRIP = Strip(block_n=2, block_w=256, warps=2)  # the fastest of those that were measured on an H200


@triton.jit
def _dot4(weight, x, total, DP4A: tl.constexpr):
    """total + the products of the four signed bytes of two words."""
    if DP4A:
        total = tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [weight, x, total], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        for i in tl.static_range(4):
            total += ((weight << (24 - 8 * i)) >> 24) * ((x << (24 - 8 * i)) >> 24)
    return total


@triton.jit
def _int8_gemv_kernel(
    x_ptr, weight_ptr, x_scales_ptr, weight_scales_ptr, bias_ptr, residual_ptr, x_zeros_ptr, weight_sums_ptr, y_ptr,
    outs, words, weight_stride,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_ZEROS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, DP4A: tl.constexpr,
):  # fmt: skip
    # int64: a weight may have more than 2**31 words
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    n_mask = n < outs

    total = tl.zeros((BLOCK_N, BLOCK_W), dtype=tl.int32)
    for start in tl.range(0, words, BLOCK_W, num_stages=1):
        word = start + tl.arange(0, BLOCK_W)
        mask = n_mask[:, None] & (word < words)[None, :]
        weight = tl.load(weight_ptr + n[:, None] * weight_stride + word[None, :], mask=mask, other=0)
        x = tl.load(x_ptr + word, mask=word < words, other=0)
        weight, x = tl.broadcast(weight, x[None, :])
        total = _dot4(weight, x, total, DP4A)

    sums = tl.sum(total, axis=1)
    if HAS_ZEROS:
        sums -= tl.load(x_zeros_ptr) * tl.load(weight_sums_ptr + n, mask=n_mask, other=0)
    y = sums.to(tl.float32) * tl.load(x_scales_ptr) * tl.load(weight_scales_ptr + n, mask=n_mask, other=0.0)
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=n_mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + n, mask=n_mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + n, y.to(y_ptr.dtype.element_ty), mask=n_mask)


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
    strip: Strip = STRIP,
    dp4a: bool = True,
) -> Tensor:
    """The op for one token, where x and the rows of the weight are whole words that begin at words.

    Without `dp4a` bytes are multiplied one by one, as Triton's interpreter can.
    """
    outs = weight.shape[0]
    y = torch.empty(1, outs, dtype=dtype, device=x.device)
    if not outs:
        return y
    words = x.reshape(-1).view(torch.int32)
    _int8_gemv_kernel[(triton.cdiv(outs, strip.block_n),)](
        words, weight.view(torch.int32), x_scales, weight_scales,
        *(y if part is None else part for part in (bias, residual)),
        *(x_scales if part is None else part for part in (x_zeros, weight_sums)), y,
        outs, len(words), weight.stride(0) // CODES,
        bias is not None, residual is not None, x_zeros is not None,
        strip.block_n, strip.block_w, dp4a,
        num_warps=strip.warps,
    )  # fmt: skip
    return y
