"""Products with integer group scales on tensor cores: a program computes [BLOCK_M tokens, BLOCK_N outputs].

Groups are walked one by one, each in steps of BLOCK_K inputs; what reaches past a group's end is masked to zero, so
groups of any size will do. All of it is int32; the only float is the result:

    x [BLOCK_M, BLOCK_K] ───────────────────────────┐
                                                   dot ─► products ─► - zero points ─► · S ─► total, int32 ─► y
    words ─► codes - 2^(bits-1) [BLOCK_K, BLOCK_N] ─┘

A plain form, the definition of what faster ones must compute.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte.kernels.w4a8.triton_kernel import Tile, tile_for


@triton.jit(do_not_specialize=["tokens"])
def _w4a8_integer_kernel(
    x_ptr, x_scales_ptr, x_zeros_ptr, weight_ptr, multipliers_ptr, factors_ptr, zeros_ptr, sums_ptr, bias_ptr, y_ptr,
    tokens, outs, ins,
    x_stride, weight_stride, multipliers_stride, zeros_stride,
    BITS: tl.constexpr, PACKED: tl.constexpr, GROUP: tl.constexpr,
    HAS_X_ZEROS: tl.constexpr, HAS_ZEROS: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(outs, BLOCK_N)
    # int64: a weight may have more than 2**31 codes, and so may the activations
    m = (tl.program_id(0) // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    n = (tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    m_mask, n_mask = m < tokens, n < outs

    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for first in range(0, ins, GROUP):
        products = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
        x_sums = tl.zeros((BLOCK_M,), dtype=tl.int32)
        for start in range(0, GROUP, BLOCK_K):
            inner = start + tl.arange(0, BLOCK_K)
            k, k_mask = first + inner, inner < GROUP
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
        group = first // GROUP
        if HAS_ZEROS:
            zero = tl.load(zeros_ptr + n * zeros_stride + group, mask=n_mask, other=0).to(tl.int32)
            products -= x_sums[:, None] * zero[None, :]
        multiplier = tl.load(multipliers_ptr + n * multipliers_stride + group, mask=n_mask, other=0).to(tl.int32)
        total += products * multiplier[None, :]

    if HAS_X_ZEROS:
        x_zero = tl.load(x_zeros_ptr + m, mask=m_mask, other=0)
        total -= x_zero[:, None] * tl.load(sums_ptr + n, mask=n_mask, other=0)[None, :]
    x_scale = tl.load(x_scales_ptr + m, mask=m_mask, other=0.0)
    factor = tl.load(factors_ptr + n, mask=n_mask, other=0.0)
    real = total.to(tl.float32) * (x_scale[:, None] * factor[None, :])
    if HAS_BIAS:
        real += tl.load(bias_ptr + n, mask=n_mask, other=0.0).to(tl.float32)[None, :]
    y = real.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + m[:, None] * outs + n[None, :], y, mask=m_mask[:, None] & n_mask[None, :])


def w4a8_integer(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    multipliers: Tensor,
    factors: Tensor,
    bias: Tensor | None,
    bits: int,
    x_zeros: Tensor | None,
    sums: Tensor | None,
    weight_zeros: Tensor | None,
    dtype: torch.dtype,
    tile: Tile | None = None,
) -> Tensor:
    """x · Wᵀ + bias for codes [out, in], or words of 2, 4 or 8 bits. Arguments as the op's."""
    (tokens, ins), (outs, groups) = x.shape, multipliers.shape
    y = torch.empty(tokens, outs, dtype=dtype, device=x.device)
    if not tokens:
        return y
    x, weight, multipliers = (t if t.stride(1) == 1 else t.contiguous() for t in (x, weight, multipliers))
    points = multipliers if weight_zeros is None else weight_zeros.contiguous()
    tile = tile or tile_for(tokens, ins // groups)
    _w4a8_integer_kernel[(triton.cdiv(tokens, tile.block_m) * triton.cdiv(outs, tile.block_n),)](
        x, x_scales.contiguous(), x_scales if x_zeros is None else x_zeros.contiguous(), weight, multipliers,
        factors.contiguous(), points, factors if sums is None else sums.contiguous(), y if bias is None else bias, y,
        tokens, outs, ins,
        x.stride(0), weight.stride(0), multipliers.stride(0), points.stride(0),
        bits, weight.dtype == torch.int32, ins // groups,
        x_zeros is not None, weight_zeros is not None, bias is not None,
        tile.block_m, tile.block_n, tile.block_k,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return y
