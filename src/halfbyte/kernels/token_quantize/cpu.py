"""Per-token quantization in plain torch, on any device; arithmetic in float32, one rounding to the dtype of x.

Shapes, dtypes and formulas are those of `reference`. Zeros are an empty tensor where the grid is symmetric, since an op
of torch cannot return None.
"""

import torch
from torch import Tensor

from halfbyte.kernels.token_quantize.reference import SMALLEST_SCALE


def scales_of(reach: Tensor, steps: int) -> Tensor:
    """The scale that lays `steps` steps over `reach` [tokens]."""
    return torch.where(reach > 0, (reach / steps).clamp(min=SMALLEST_SCALE), 1.0)


def quantize(y: Tensor, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and zeros of each token."""
    y = y.float()
    if symmetric:
        scales = scales_of(y.abs().amax(dim=1), 127)
        codes = (y / scales[:, None]).round_().clamp_(-127, 127)
        return codes.to(torch.int8), scales, torch.empty(0, dtype=torch.int32, device=y.device)
    low, high = y.amin(dim=1).clamp(max=0), y.amax(dim=1).clamp(min=0)
    scales = scales_of(high - low, 255)
    zeros = (-128 - low / scales).round().clamp(-128, 127)
    codes = (y / scales[:, None]).round_().add_(zeros[:, None]).clamp_(-128, 127)
    return codes.to(torch.int8), scales, zeros.int()


def static(x: Tensor, scale: Tensor) -> Tensor:
    """Codes on one grid for all tokens."""
    return (x.float() / scale).round_().clamp_(-127, 127).to(torch.int8)


def norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, epsilon: float, centred: bool,
    weight_offset: float, rounds_before_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The normalised tokens and the sum of x and the residual, both in the dtype of x."""
    hidden = x if residual is None else x + residual
    h = hidden.float()
    if centred:
        h = h - h.mean(dim=1, keepdim=True)
    y = h * torch.rsqrt(h.square().mean(dim=1, keepdim=True) + epsilon)
    if rounds_before_weight:
        y = y.to(x.dtype).float()
    y = y * (weight.float() + weight_offset)
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype), hidden


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, both steps rounded to the dtype of the gate, as the model rounds them."""
    return torch.nn.functional.silu(gate) * up


def gelu(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    """gelu(x + bias), both steps rounded to the dtype of x, as the model rounds them."""
    return torch.nn.functional.gelu(x if bias is None else x + bias.to(x.dtype), approximate=approximate)
