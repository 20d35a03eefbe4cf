"""How far a rounded weight is from the original: in its elements, and in the outputs it produces."""

import math

from jaxtyping import Float
from torch import Tensor

from halfbyte.numerics.precision import float32_products


def decibels(power: float, error: float) -> float:
    """10·log10(power/error); infinite where nothing was lost."""
    if error <= 0:
        return math.inf
    return 10 * math.log10(power / error) if power > 0 else -math.inf


def weight_snr(weight: Float[Tensor, "out in"], rounded: Float[Tensor, "out in"]) -> float:
    """Signal-to-noise ratio of the elements, in dB."""
    return decibels(float(weight.double().square().sum()), float((weight - rounded).double().square().sum()))


def output_power(weight: Float[Tensor, "out in"], gram: Float[Tensor, "in in"]) -> float:
    """Squared norm of X·Wᵀ over the calibration tokens, from G = XᵀX alone: tr(W·G·Wᵀ). A figure: three digits suffice."""
    with float32_products(tf32=True):
        return float(((weight @ gram.to(weight.dtype)) * weight).sum())


def output_snr(
    weight: Float[Tensor, "out in"], rounded: Float[Tensor, "out in"], gram: Float[Tensor, "in in"]
) -> float:
    """Signal-to-noise ratio of the layer's outputs over the calibration tokens, in dB."""
    return decibels(output_power(weight, gram), output_power(weight - rounded, gram))
