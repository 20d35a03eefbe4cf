"""Products with integer group scales on the CPU: torch's int8 matmul group by group, summed in int32.

    weight group [outs, size] · xᵀ group [size, tokens] ─► int32 [outs, tokens] ─► · S ─► total, int32

The weight is the left operand, as in kernels/w4a8/cpu.py, from where the integer product comes. int32 arithmetic wraps
around, and the final integers fit: the certificate has proved it.
"""

import torch
from jaxtyping import Float, Int8, Int16, Int32, UInt8
from torch import Tensor

from halfbyte.kernels.w4a8.cpu import TILE_SUMS, TILE_TOKENS, multiply


def w4a8_integer(
    x: Int8[Tensor, "tokens in"],
    x_scales: Float[Tensor, "tokens"],
    codes: Int8[Tensor, "groups out size"],
    multipliers: UInt8[Tensor, "out groups"] | Int16[Tensor, "out groups"],
    factors: Float[Tensor, "out"],
    bias: Float[Tensor, "out"] | None,
    x_zeros: Int32[Tensor, "tokens"] | None,
    sums: Int32[Tensor, "out"] | None,
    weight_zeros: Int8[Tensor, "out groups"] | None,
    dtype: torch.dtype,
) -> Float[Tensor, "tokens out"]:
    """x · Wᵀ + bias as the op says it, of a weight whose codes are viewed group by group."""
    y = torch.empty(len(x), codes.shape[1], dtype=dtype)
    whole = multipliers.T.int().contiguous()  # [groups, out]
    shifts = None if weight_zeros is None else whole * weight_zeros.T.int()
    for first in range(0, len(x), TILE_TOKENS):
        tokens = slice(first, min(first + TILE_TOKENS, len(x)))
        count = len(x[tokens])
        step = max(1, TILE_SUMS // count)
        for start in range(0, codes.shape[1], step):
            rows = slice(start, min(start + step, codes.shape[1]))
            total = accumulated(x[tokens], codes[:, rows], whole[:, rows], None if shifts is None else shifts[:, rows])
            if x_zeros is not None and sums is not None:
                total.addcmul_(sums[rows, None], x_zeros[tokens], value=-1)
            real = total.float().mul_(factors[rows, None] * x_scales[tokens])
            y[tokens, rows] = (real if bias is None else real.add_(bias[rows, None])).T
    return y


def accumulated(
    x: Int8[Tensor, "tokens in"],
    codes: Int8[Tensor, "groups out size"],
    whole: Int32[Tensor, "groups out"],
    shifts: Int32[Tensor, "groups out"] | None,
) -> Int32[Tensor, "out tokens"]:
    """Σ_g S · (Σ w·x - w_zero · Σ x), modulo 2^32. `shifts`: S · w_zero."""
    outs, size = codes.shape[1:]
    total = torch.zeros(outs, len(x), dtype=torch.int32)
    products = torch.empty_like(total)
    for group, columns in enumerate(x.split(size, dim=1)):
        multiply(codes[group], columns.T, products)
        total.addcmul_(products, whole[group, :, None])
        if shifts is not None:
            total.addcmul_(shifts[group, :, None], columns.sum(dim=1, dtype=torch.int32), value=-1)
    return total
