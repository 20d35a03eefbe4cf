"""How tests compare: relative Frobenius error against a bound derived from the dtype and the number of roundings."""

import torch
from torch import Tensor


def relative_error(result: Tensor, expected: Tensor) -> float:
    """Sees wrong signs, wrong order and wrong scale; NaN never passes a comparison with it."""
    return float((result.double() - expected.double()).norm() / expected.double().norm())


def assert_close(result: Tensor, expected: Tensor, rounding_steps: int = 4) -> None:
    """`rounding_steps`: roundings to `result.dtype` between input and output, a few units of slack included."""
    assert result.dtype == expected.dtype
    assert result.shape == expected.shape
    bound = rounding_steps * torch.finfo(result.dtype).eps
    error = relative_error(result, expected)
    assert error <= bound, f"relative error {error:.2e} exceeds {bound:.2e}"
