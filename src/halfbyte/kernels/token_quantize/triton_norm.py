"""Residual addition, RMS or layer normalisation, and per-token quantization in one pass over memory.

    x, residual [ROWS, BLOCK] ─► hidden = x + residual, stored ─► y = normalised · weight + bias, in the dtype of x
                                                                  ─► range ─► scale, zero ─► codes [ROWS, BLOCK]

Rows stay in registers, in CHUNKS chunks of BLOCK elements, from the first load to the codes. Rows too wide for that have
no CHUNKS: they are read again in every step, from the L2 cache.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportOptionalMemberAccess=false
# triton's decorators change signatures in ways that types do not tell

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte.kernels.device import overlaps
from halfbyte.kernels.token_quantize.strip import Strip, at_once, in_turns
from halfbyte.kernels.token_quantize.triton_codes import as_float32, encode, grid_of, rounded, widened


@triton.jit
def _hidden(
    x_ptr, residual_ptr, token, k, x_stride, residual_stride, mask, HAS_RESIDUAL: tl.constexpr, PTX: tl.constexpr
):  # fmt: skip
    """x + residual in the dtype of x; 0 where masked."""
    hidden = tl.load(x_ptr + token * x_stride + k, mask=mask, other=0.0)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + token * residual_stride + k, mask=mask, other=0.0)
        hidden = rounded(as_float32(hidden, PTX) + as_float32(residual, PTX), x_ptr.dtype.element_ty, PTX)
    return hidden


@triton.jit
def _normalised(
    hidden, mean, inverse, weight, bias,
    WEIGHT_OFFSET: tl.constexpr, HAS_BIAS: tl.constexpr, ROUNDS_BEFORE_WEIGHT: tl.constexpr, dtype: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """(hidden - mean) · inverse · weight + bias in dtype."""
    y = (hidden - mean) * inverse
    if ROUNDS_BEFORE_WEIGHT:
        y = as_float32(rounded(y, dtype, PTX), PTX)
    weight = as_float32(weight, PTX)
    if WEIGHT_OFFSET != 0:
        weight += WEIGHT_OFFSET
    y *= weight
    if HAS_BIAS:
        y += as_float32(bias, PTX)
    return rounded(y, dtype, PTX)


@triton.jit
def _affine(weight_ptr, bias_ptr, k, mask, HAS_BIAS: tl.constexpr):
    """Weight and bias; 0 where masked, so that what is masked of the tokens comes out as 0."""
    weight = tl.load(weight_ptr + k, mask=mask, other=0.0)
    bias = weight
    if HAS_BIAS:
        bias = tl.load(bias_ptr + k, mask=mask, other=0.0)
    return weight, bias


@triton.jit(do_not_specialize=["tokens", "epsilon"])
def _norm_quantize_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, hidden_ptr, codes_ptr, scales_ptr, zeros_ptr,
    tokens, ins, x_stride, residual_stride, epsilon,
    WEIGHT_OFFSET: tl.constexpr, CENTRED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    ROUNDS_BEFORE_WEIGHT: tl.constexpr, SYMMETRIC: tl.constexpr, PTX: tl.constexpr, EVEN: tl.constexpr,
    OVERLAPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    if OVERLAPS:
        tl.extra.cuda.gdc_launch_dependents()  # the product behind may fetch its weight
    lane = tl.arange(0, BLOCK)[None, :]
    weights, biases = (), ()
    for chunk in tl.static_range(CHUNKS):
        k = chunk * BLOCK + lane
        weight, bias = _affine(weight_ptr, bias_ptr, k, (k < ins) | EVEN, HAS_BIAS)
        weights, biases = weights + (weight,), biases + (bias,)  # noqa: RUF005 - triton knows no unpacking
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()  # this launch began before what it reads was there
    for start in tl.range(tl.program_id(0) * ROWS, tokens, tl.num_programs(0) * ROWS, num_stages=STAGES):
        # int64: activations may have more than 2**31 elements
        row = (start + tl.arange(0, ROWS)).to(tl.int64)
        row_mask = row < tokens
        token, token_mask = row[:, None], row_mask[:, None]
        total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
        lows = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
        highs = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
        squares = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
        mean = tl.zeros((ROWS, 1), dtype=tl.float32)
        if CHUNKS:
            hiddens, ys = (), ()
            for chunk in tl.static_range(CHUNKS):
                k = chunk * BLOCK + lane
                mask = token_mask & ((k < ins) | EVEN)
                hidden = _hidden(x_ptr, residual_ptr, token, k, x_stride, residual_stride, mask, HAS_RESIDUAL, PTX)
                if HAS_RESIDUAL:
                    tl.store(hidden_ptr + token * ins + k, hidden, mask=mask)
                hiddens = hiddens + (hidden,)  # noqa: RUF005
                if CENTRED:
                    total += as_float32(hidden, PTX)
                else:
                    squares += as_float32(hidden, PTX) * as_float32(hidden, PTX)
            if CENTRED:
                mean = (tl.sum(total, axis=1) / ins)[:, None]
                for chunk in tl.static_range(CHUNKS):
                    centred = as_float32(hiddens[chunk], PTX) - mean
                    if not EVEN:
                        centred = tl.where(chunk * BLOCK + lane < ins, centred, 0.0)
                    squares += centred * centred
            inverse = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(squares, axis=1) / ins + epsilon))[:, None]
            for chunk in tl.static_range(CHUNKS):
                y = _normalised(
                    as_float32(hiddens[chunk], PTX), mean, inverse, weights[chunk], biases[chunk],
                    WEIGHT_OFFSET, HAS_BIAS, ROUNDS_BEFORE_WEIGHT, dtype, PTX,
                )  # fmt: skip
                if not EVEN:
                    y = tl.where(chunk * BLOCK + lane < ins, y, 0.0)
                lows, highs = widened(lows, highs, as_float32(y, PTX), SYMMETRIC)
                ys = ys + (y,)  # noqa: RUF005
            scale, zero = grid_of(lows, highs, SYMMETRIC)
            for chunk in tl.static_range(CHUNKS):
                k = chunk * BLOCK + lane
                codes = encode(as_float32(ys[chunk], PTX), scale, zero, SYMMETRIC)
                tl.store(codes_ptr + token * ins + k, codes, mask=token_mask & ((k < ins) | EVEN))
        else:
            if CENTRED:
                for first in tl.range(0, ins, BLOCK):
                    k = first + lane
                    mask = token_mask & (k < ins)
                    hidden = _hidden(x_ptr, residual_ptr, token, k, x_stride, residual_stride, mask, HAS_RESIDUAL, PTX)
                    total += as_float32(hidden, PTX)
                mean = (tl.sum(total, axis=1) / ins)[:, None]
            for first in tl.range(0, ins, BLOCK):
                k = first + lane
                mask = token_mask & (k < ins)
                hidden = _hidden(x_ptr, residual_ptr, token, k, x_stride, residual_stride, mask, HAS_RESIDUAL, PTX)
                if HAS_RESIDUAL:
                    tl.store(hidden_ptr + token * ins + k, hidden, mask=mask)
                centred = tl.where(mask, as_float32(hidden, PTX) - mean, 0.0)
                squares += centred * centred
            inverse = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(squares, axis=1) / ins + epsilon))[:, None]
            for first in tl.range(0, ins, BLOCK):
                k = first + lane
                mask = token_mask & (k < ins)
                hidden = _hidden(x_ptr, residual_ptr, token, k, x_stride, residual_stride, mask, HAS_RESIDUAL, PTX)
                weight, bias = _affine(weight_ptr, bias_ptr, k, k < ins, HAS_BIAS)
                y = _normalised(
                    as_float32(hidden, PTX), mean, inverse, weight, bias,
                    WEIGHT_OFFSET, HAS_BIAS, ROUNDS_BEFORE_WEIGHT, dtype, PTX,
                )  # fmt: skip
                lows, highs = widened(lows, highs, as_float32(tl.where(mask, y, 0.0), PTX), SYMMETRIC)
            scale, zero = grid_of(lows, highs, SYMMETRIC)
            for first in tl.range(0, ins, BLOCK):
                k = first + lane
                mask = token_mask & (k < ins)
                hidden = _hidden(x_ptr, residual_ptr, token, k, x_stride, residual_stride, mask, HAS_RESIDUAL, PTX)
                weight, bias = _affine(weight_ptr, bias_ptr, k, k < ins, HAS_BIAS)
                y = _normalised(
                    as_float32(hidden, PTX), mean, inverse, weight, bias,
                    WEIGHT_OFFSET, HAS_BIAS, ROUNDS_BEFORE_WEIGHT, dtype, PTX,
                )  # fmt: skip
                tl.store(codes_ptr + token * ins + k, encode(as_float32(y, PTX), scale, zero, SYMMETRIC), mask=mask)
        tl.store(scales_ptr + row, scale, mask=row_mask)
        if not SYMMETRIC:
            tl.store(zeros_ptr + row, zero, mask=row_mask)


def norm_quantize(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    epsilon: float,
    centred: bool,
    weight_offset: float = 0.0,
    rounds_before_weight: bool = False,
    symmetric: bool = True,
    strip: Strip | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes, scales, zeros (empty if symmetric) and hidden (empty without a residual)."""
    tokens, ins = x.shape
    codes = torch.empty(tokens, ins, dtype=torch.int8, device=x.device)
    scales = torch.empty(tokens, dtype=torch.float32, device=x.device)
    zeros = torch.empty(0 if symmetric else tokens, dtype=torch.int32, device=x.device)
    hidden = torch.empty(0 if residual is None else tokens, ins, dtype=x.dtype, device=x.device)
    if not tokens:
        return codes, scales, zeros, hidden
    x = x if x.stride(1) == 1 else x.contiguous()
    if residual is None:
        strip = strip or at_once(tokens, ins)
        residual = x
    else:
        strip = strip or in_turns(tokens, ins, 2 * x.itemsize * ins, x.device)
        residual = residual if residual.stride(1) == 1 else residual.contiguous()
    weight, early = weight.contiguous(), overlaps(x)
    _norm_quantize_kernel[(strip.programs,)](
        x, residual, weight, weight if bias is None else bias.contiguous(), hidden, codes, scales, zeros,
        tokens, ins, x.stride(0), residual.stride(0), epsilon,
        weight_offset, centred, bias is not None, hidden.numel() > 0, rounds_before_weight, symmetric, x.is_cuda,
        ins == strip.block * strip.chunks, early,
        strip.rows, strip.block, strip.chunks, strip.stages,
        num_warps=strip.warps, **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
    return codes, scales, zeros, hidden
