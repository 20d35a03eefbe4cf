"""Activation function and quantization in one pass: what stands before the last linear layer of a block.

ZeroQuant, §4 — https://arxiv.org/abs/2206.01861. Every step is rounded to the dtype of x, as the model rounds it, so
that the codes are those of the steps one by one.
"""

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from halfbyte.errors import WeightError
from halfbyte.kernels.token_quantize import checks, cpu
from halfbyte.kernels.token_quantize.tokens import QuantizedTokens, empty_like_quantized, quantized

Approximation = Literal["none", "tanh"]


def silu_mul_quantize(
    gate: Float[Tensor, "tokens in"], up: Float[Tensor, "tokens in"] | None = None, symmetric: bool = True
) -> QuantizedTokens:
    """Quantized silu(gate) · up. Without `up`, `gate` is both side by side: [tokens, 2 · in], the gate first.

    Raises WeightError where the arguments disagree.
    """
    if up is None:
        if gate.shape[-1] % 2:
            raise WeightError(
                f"gate and up side by side are {list(gate.shape)}, an odd number of columns: give one of each for each input"
            )
        gate, up = gate.chunk(2, dim=-1)
    return quantized(_silu_mul(gate, up, symmetric), symmetric)


def gelu_quantize(
    x: Float[Tensor, "tokens in"],
    bias: Float[Tensor, "in"] | None = None,
    approximate: Approximation = "none",
    symmetric: bool = True,
) -> QuantizedTokens:
    """Quantized gelu(x + bias), as torch's `gelu` approximates. Raises WeightError where the arguments disagree."""
    return quantized(_gelu(x, bias, approximate, symmetric), symmetric)


@torch.library.custom_op("halfbyte::silu_mul_quantize", mutates_args=(), device_types="cpu")
def _silu_mul(gate: Tensor, up: Tensor, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    _check_silu_mul(gate, up)
    return cpu.quantize(cpu.silu_mul(gate, up), symmetric)


@_silu_mul.register_kernel("cuda")
def _silu_mul_on_cuda(gate: Tensor, up: Tensor, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    _check_silu_mul(gate, up)
    # imported here: triton exists only where there is something to run it on
    from halfbyte.kernels.token_quantize.triton_pointwise import pointwise_quantize

    with torch.cuda.device_of(gate):  # triton launches on the current device, which need not be where x is
        return pointwise_quantize(gate, symmetric, "silu_mul", up)


@_silu_mul.register_fake
def _silu_mul_shape(gate: Tensor, up: Tensor, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    _check_silu_mul(gate, up)
    return empty_like_quantized(gate, gate.shape[1], symmetric)


@torch.library.custom_op("halfbyte::gelu_quantize", mutates_args=(), device_types="cpu")
def _gelu(x: Tensor, bias: Tensor | None, approximate: str, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    _check_gelu(x, bias, approximate)
    return cpu.quantize(cpu.gelu(x, bias, approximate), symmetric)


@_gelu.register_kernel("cuda")
def _gelu_on_cuda(x: Tensor, bias: Tensor | None, approximate: str, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    _check_gelu(x, bias, approximate)
    from halfbyte.kernels.token_quantize.triton_pointwise import pointwise_quantize

    with torch.cuda.device_of(x):
        return pointwise_quantize(x, symmetric, "gelu" if approximate == "none" else "gelu_tanh", bias=bias)


@_gelu.register_fake
def _gelu_shape(x: Tensor, bias: Tensor | None, approximate: str, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    _check_gelu(x, bias, approximate)
    return empty_like_quantized(x, x.shape[1], symmetric)


def _check_silu_mul(gate: Tensor, up: Tensor) -> None:
    checks.activations(gate)
    checks.beside(gate, up, "up")


def _check_gelu(x: Tensor, bias: Tensor | None, approximate: str) -> None:
    checks.activations(x)
    checks.for_each_input(x, bias, "bias")
    if approximate not in get_args(Approximation):
        raise WeightError(f"gelu has no approximation {approximate!r}: choose one of {get_args(Approximation)}")
