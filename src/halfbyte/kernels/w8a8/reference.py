"""x · Wᵀ of 8-bit integers, scaled, in float64: slow, and plainly right.

    y[t, o] = (Σᵢ x[t, i] · W[o, i] - x_zeros[t] · weight_sums[o]) · x_scales[t] · weight_scales[o] + bias[o] + residual[t, o]

float64 holds every integer below 2**53, so the sums are exact; the result is rounded once, to `dtype`.
"""

import torch
from jaxtyping import Float, Float32, Int8, Int32
from torch import Tensor


def int8_matmul(
    x: Int8[Tensor, "tokens in"],
    x_scales: Float32[Tensor, "tokens"] | Float32[Tensor, "1"],
    weight: Int8[Tensor, "out in"],
    weight_scales: Float32[Tensor, "out"],
    bias: Float[Tensor, "out"] | None = None,
    residual: Float[Tensor, "tokens out"] | None = None,
    x_zeros: Int32[Tensor, "tokens"] | None = None,
    weight_sums: Int32[Tensor, "out"] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Float[Tensor, "tokens out"]:
    """The formula above, computed in float64 and returned in `dtype`."""
    total = x.double() @ weight.double().T
    if x_zeros is not None and weight_sums is not None:
        total -= torch.outer(x_zeros.double(), weight_sums.double())
    y = total * x_scales.double()[:, None] * weight_scales.double()
    if bias is not None:
        y += bias.double()
    if residual is not None:
        y += residual.double()
    return y.to(dtype)
