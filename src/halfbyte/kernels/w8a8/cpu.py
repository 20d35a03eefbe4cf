"""The int8 matmul on the CPU: torch's integer product, then the scales on the 32-bit sums."""

from functools import cache

import torch
from jaxtyping import Float, Float32, Int8, Int32
from torch import Tensor


@cache
def product_is_exact() -> bool:
    """Whether torch's int8 product keeps the sums of the largest codes.

    Processors without dot products of bytes add pairs of products in 16 bits, and where these saturate sums come out
    too small.
    """
    signs = torch.tensor([[1], [-1]], dtype=torch.int8)
    largest = torch.full((2, 256), 127, dtype=torch.int8) * signs
    smallest = torch.full((32, 256), -128, dtype=torch.int8)
    return torch.equal(
        torch.ops.aten._int_mm(largest, smallest.T), signs.int() * (127 * -128 * 256) + torch.zeros(1, 32).int()
    )


def product(x: Int8[Tensor, "tokens in"], weight: Int8[Tensor, "out in"]) -> Int32[Tensor, "tokens out"]:
    """x · Wᵀ, exact below 2**17 inputs."""
    if x.shape[1] == 1:  # torch 2.13 returns what was in memory
        return x.int() * weight.int().T
    if product_is_exact():
        return torch.ops.aten._int_mm(x, weight.T)
    return (x.double() @ weight.double().T).int()  # float64 holds all integers below 2**53


def int8_matmul(
    x: Int8[Tensor, "tokens in"],
    x_scales: Float32[Tensor, "tokens"] | Float32[Tensor, "1"],
    weight: Int8[Tensor, "out in"],
    weight_scales: Float32[Tensor, "out"],
    bias: Float[Tensor, "out"] | None,
    residual: Float[Tensor, "tokens out"] | None,
    x_zeros: Int32[Tensor, "tokens"] | None,
    weight_sums: Int32[Tensor, "out"] | None,
    dtype: torch.dtype,
) -> Float[Tensor, "tokens out"]:
    """The op, for any number of tokens, inputs and outputs."""
    total = product(x, weight)
    if x_zeros is not None and weight_sums is not None:
        total -= x_zeros[:, None] * weight_sums
    y = total.float().mul_(x_scales[:, None]).mul_(weight_scales)
    if bias is not None:
        y += bias.float()
    if residual is not None:
        y += residual.float()
    return y.to(dtype)
