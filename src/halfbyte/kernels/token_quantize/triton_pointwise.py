"""Quantize tokens as they are, or right after the activation function that makes them: one pass over memory.

A program takes ROWS tokens at a time, in CHUNKS chunks of BLOCK elements that stay in registers between finding their
range and encoding them. Rows too wide for that have no CHUNKS: they are read twice, the second time from the L2 cache.

    x [ROWS, BLOCK] (gate and up, for silu_mul) ─► y, in the dtype of x ─► range ─► scale, zero ─► codes [ROWS, BLOCK]
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportOptionalMemberAccess=false
# triton's decorators change signatures in ways that types do not tell

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte.kernels.device import overlaps
from halfbyte.kernels.token_quantize.strip import Strip, at_once
from halfbyte.kernels.token_quantize.triton_codes import (
    as_float32,
    encode,
    grid_of,
    power_of_2,
    reciprocal,
    rounded,
    sigmoid,
    widened,
)

Function = Literal["identity", "silu_mul", "gelu", "gelu_tanh"]


@triton.jit
def _gelu(x, PTX: tl.constexpr):
    """x · Φ(x), with Φ(-|x|) = poly(t) · exp(-x² / 2), t = 1 / (1 + 0.23164189 |x|), within 1e-7.

    Abramowitz and Stegun 7.1.26: a third of the instructions of erf, and no cancellation below zero.
    """
    magnitude = tl.abs(x)
    t = reciprocal(1.0 + 0.23164188926571245 * magnitude, PTX)
    poly = 0.5307027145 * t - 0.7265760135
    poly = poly * t + 0.7107068705
    poly = poly * t - 0.142248368
    poly = poly * t + 0.127414796
    below = magnitude * (poly * t) * power_of_2(x * x * -0.7213475204444817, PTX)
    return tl.maximum(x, 0.0) - below


@triton.jit
def _values(
    x_ptr, up_ptr, bias_ptr, token, k, x_stride, up_stride, mask, bias_mask,
    FUNCTION: tl.constexpr, HAS_BIAS: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """What is to be quantized, [rows, block] in the dtype of x: 0 where masked."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    y = tl.load(x_ptr + token * x_stride + k, mask=mask, other=0.0)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + k, mask=bias_mask, other=0.0)
        y = rounded(as_float32(y, PTX) + as_float32(bias, PTX), dtype, PTX)
    if FUNCTION == "silu_mul":
        up = tl.load(up_ptr + token * up_stride + k, mask=mask, other=0.0)
        gate = as_float32(y, PTX)
        gate = rounded(gate * sigmoid(gate, PTX), dtype, PTX)
        if PTX:
            y = gate * up  # in their own dtype, where a multiplication takes two pairs at a time
        else:
            y = (gate.to(tl.float32) * up.to(tl.float32)).to(dtype)
    elif FUNCTION == "gelu":
        y = rounded(_gelu(as_float32(y, PTX), PTX), dtype, PTX)
    elif FUNCTION == "gelu_tanh":
        x = as_float32(y, PTX)
        # 0.5 (1 + tanh u) is the sigmoid of 2u, with u = sqrt(2 / pi) (x + 0.044715 x^3)
        y = rounded(x * sigmoid(x * (1.5957691216057308 + 0.07135481627260025 * (x * x)), PTX), dtype, PTX)
    return y


@triton.jit(do_not_specialize=["tokens"])
def _pointwise_quantize_kernel(
    x_ptr, up_ptr, bias_ptr, codes_ptr, scales_ptr, zeros_ptr,
    tokens, ins, x_stride, up_stride,
    FUNCTION: tl.constexpr, HAS_BIAS: tl.constexpr, SYMMETRIC: tl.constexpr, PTX: tl.constexpr, EVEN: tl.constexpr,
    OVERLAPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    if OVERLAPS:
        # the product behind may fetch its weight; this launch itself began before what it reads was there
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    lane = tl.arange(0, BLOCK)[None, :]
    for start in tl.range(tl.program_id(0) * ROWS, tokens, tl.num_programs(0) * ROWS, num_stages=STAGES):
        # int64: activations may have more than 2**31 elements
        row = (start + tl.arange(0, ROWS)).to(tl.int64)
        row_mask = row < tokens
        token, token_mask = row[:, None], row_mask[:, None]
        lows = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
        highs = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
        if CHUNKS:
            ys = ()
            for chunk in tl.static_range(CHUNKS):
                k = chunk * BLOCK + lane
                k_mask = (k < ins) | EVEN
                mask = token_mask & k_mask
                y = _values(
                    x_ptr, up_ptr, bias_ptr, token, k, x_stride, up_stride, mask, k_mask, FUNCTION, HAS_BIAS, PTX
                )  # fmt: skip
                lows, highs = widened(lows, highs, as_float32(y, PTX), SYMMETRIC)
                ys = ys + (y,)  # noqa: RUF005 - triton knows no unpacking
            scale, zero = grid_of(lows, highs, SYMMETRIC)
            for chunk in tl.static_range(CHUNKS):
                k = chunk * BLOCK + lane
                codes = encode(as_float32(ys[chunk], PTX), scale, zero, SYMMETRIC)
                tl.store(codes_ptr + token * ins + k, codes, mask=token_mask & ((k < ins) | EVEN))
        else:
            for first in tl.range(0, ins, BLOCK):
                k = first + lane
                mask = token_mask & (k < ins)
                y = _values(
                    x_ptr, up_ptr, bias_ptr, token, k, x_stride, up_stride, mask, k < ins, FUNCTION, HAS_BIAS, PTX
                )  # fmt: skip
                lows, highs = widened(lows, highs, as_float32(y, PTX), SYMMETRIC)
            scale, zero = grid_of(lows, highs, SYMMETRIC)
            for first in tl.range(0, ins, BLOCK):
                k = first + lane
                mask = token_mask & (k < ins)
                y = _values(
                    x_ptr, up_ptr, bias_ptr, token, k, x_stride, up_stride, mask, k < ins, FUNCTION, HAS_BIAS, PTX
                )  # fmt: skip
                tl.store(codes_ptr + token * ins + k, encode(as_float32(y, PTX), scale, zero, SYMMETRIC), mask=mask)
        tl.store(scales_ptr + row, scale, mask=row_mask)
        if not SYMMETRIC:
            tl.store(zeros_ptr + row, zero, mask=row_mask)


def pointwise_quantize(
    x: Tensor,
    symmetric: bool,
    function: Function = "identity",
    up: Tensor | None = None,
    bias: Tensor | None = None,
    strip: Strip | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and zeros of function(x + bias), or silu(x) · up; zeros are empty if symmetric."""
    tokens, ins = x.shape
    codes = torch.empty(tokens, ins, dtype=torch.int8, device=x.device)
    scales = torch.empty(tokens, dtype=torch.float32, device=x.device)
    zeros = torch.empty(0 if symmetric else tokens, dtype=torch.int32, device=x.device)
    if not tokens:
        return codes, scales, zeros
    x = x if x.stride(1) == 1 else x.contiguous()
    up = x if up is None else up if up.stride(1) == 1 else up.contiguous()
    strip, early = strip or at_once(tokens, ins), overlaps(x)
    _pointwise_quantize_kernel[(strip.programs,)](
        x, up, x if bias is None else bias, codes, scales, zeros,
        tokens, ins, x.stride(0), up.stride(0),
        function, bias is not None, symmetric, x.is_cuda, ins == strip.block * strip.chunks, early,
        strip.rows, strip.block, strip.chunks, strip.stages,
        num_warps=strip.warps, **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
    return codes, scales, zeros
