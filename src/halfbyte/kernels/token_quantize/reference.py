"""What the kernels here promise, in float64: slow, and plainly right.

    symmetric    scale = max |y| / 127                 code = round(y / scale)            value = code · scale
    asymmetric   scale = (max - min) / 255             code = round(y / scale) + zero     value = (code - zero) · scale
                 zero = round(-128 - min / scale)      the range is first widened to hold 0

Ties go to even. A token without range has scale 1; no other scale is below the smallest normal float32.
"""

import math

import torch
from jaxtyping import Float, Float32, Float64, Int8, Int32
from torch import Tensor

SMALLEST_SCALE = torch.finfo(torch.float32).tiny


def scales_of(reach: Float64[Tensor, "tokens"], steps: int) -> Float32[Tensor, "tokens"]:
    """The scale that lays `steps` steps over `reach`."""
    return torch.where(reach > 0, (reach / steps).clamp(min=SMALLEST_SCALE), 1.0).float()


def quotient(y: Float64[Tensor, "..."], scales: Float32[Tensor, "..."]) -> Float32[Tensor, "..."]:
    """y / scales as float32 division gives it: y is often just half way between two codes."""
    return (y / scales.double()).float()


def quantize(
    y: Float[Tensor, "tokens in"], symmetric: bool = True
) -> tuple[Int8[Tensor, "tokens in"], Float32[Tensor, "tokens"], Int32[Tensor, "tokens"] | None]:
    """Codes, scales and zeros of each token."""
    y = y.double()
    if symmetric:
        scales = scales_of(y.abs().amax(dim=1), 127)
        return quotient(y, scales[:, None]).round().clamp(-127, 127).to(torch.int8), scales, None
    low, high = y.amin(dim=1).clamp(max=0), y.amax(dim=1).clamp(min=0)
    scales = scales_of(high - low, 255)
    zeros = (-128 - quotient(low, scales)).round().clamp(-128, 127)
    codes = (quotient(y, scales[:, None]).round() + zeros[:, None]).clamp(-128, 127)
    return codes.to(torch.int8), scales, zeros.int()


def dequantize(
    codes: Int8[Tensor, "tokens in"], scales: Float32[Tensor, "tokens"], zeros: Int32[Tensor, "tokens"] | None = None
) -> Float64[Tensor, "tokens in"]:
    """The values that codes stand for."""
    centred = codes.double() if zeros is None else codes.double() - zeros[:, None].double()
    return centred * scales[:, None].double()


def static(x: Float[Tensor, "tokens in"], scale: Float32[Tensor, "1"]) -> Int8[Tensor, "tokens in"]:
    """Codes on one grid for all tokens."""
    return quotient(x.double(), scale).round().clamp(-127, 127).to(torch.int8)


def norm(
    x: Float[Tensor, "tokens in"],
    weight: Float[Tensor, "in"],
    bias: Float[Tensor, "in"] | None,
    epsilon: float,
    centred: bool,
    weight_offset: float = 0.0,
) -> Float64[Tensor, "tokens in"]:
    """x / √(mean x² + ε) · (weight + offset), plus a bias where there is one; `centred` takes the mean away first."""
    x = x.double()
    if centred:
        x = x - x.mean(dim=1, keepdim=True)
    y = x / (x.square().mean(dim=1, keepdim=True) + epsilon).sqrt() * (weight.double() + weight_offset)
    return y if bias is None else y + bias.double()


def silu_mul(gate: Float[Tensor, "tokens in"], up: Float[Tensor, "tokens in"]) -> Float64[Tensor, "tokens in"]:
    """gate · sigmoid(gate) · up."""
    return gate.double() * gate.double().sigmoid() * up.double()


def gelu(x: Float[Tensor, "tokens in"], approximate: str) -> Float64[Tensor, "tokens in"]:
    """x · Φ(x), with the normal distribution's Φ itself ("none") or its approximation by tanh ("tanh")."""
    x = x.double()
    if approximate == "none":
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    return x * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
