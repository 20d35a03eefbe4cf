"""Residual addition, normalisation and quantization in one pass: what stands before the linear layers of a block.

ZeroQuant, §4 — https://arxiv.org/abs/2206.01861: token-wise quantization costs nothing where it is part of the operator
that makes the tokens.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from halfbyte.kernels.token_quantize import checks, cpu
from halfbyte.kernels.token_quantize.tokens import QuantizedTokens, empty_like_quantized, quantized

Normed = tuple[
    Tensor, Tensor, Tensor, Tensor
]  # codes, scales, zeros, hidden: the latter two empty where there are none


def rms_norm_quantize(
    x: Float[Tensor, "tokens in"],
    weight: Float[Tensor, "in"],
    epsilon: float,
    residual: Float[Tensor, "tokens in"] | None = None,
    *,
    weight_offset: float = 0.0,
    rounds_before_weight: bool = False,
    symmetric: bool = True,
) -> tuple[QuantizedTokens, Float[Tensor, "tokens in"]]:
    """Quantized h / √(mean h² + ε) · (weight + offset), and h = x + residual in the dtype of x, or x itself.

    The normalised value is rounded to the dtype of x and then quantized, as if in two steps. `rounds_before_weight`
    rounds it before the weight is applied too, as transformers' Llama does; Gemma has a weight offset of 1. Raises
    WeightError where the arguments disagree.
    """
    *tokens, hidden = _rms(x, weight, epsilon, residual, weight_offset, rounds_before_weight, symmetric)
    return quantized(tokens, symmetric), x if residual is None else hidden


def layer_norm_quantize(
    x: Float[Tensor, "tokens in"],
    weight: Float[Tensor, "in"],
    bias: Float[Tensor, "in"] | None,
    epsilon: float,
    residual: Float[Tensor, "tokens in"] | None = None,
    *,
    symmetric: bool = True,
) -> tuple[QuantizedTokens, Float[Tensor, "tokens in"]]:
    """Quantized (h - mean h) / √(var h + ε) · weight + bias, and h = x + residual in the dtype of x, or x itself.

    The normalised value is rounded to the dtype of x and then quantized, as if in two steps. Raises WeightError where
    the arguments disagree.
    """
    *tokens, hidden = _layer(x, weight, bias, epsilon, residual, symmetric)
    return quantized(tokens, symmetric), x if residual is None else hidden


def _in_torch(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, epsilon: float, centred: bool,
    weight_offset: float, rounds_before_weight: bool, symmetric: bool,
) -> Normed:  # fmt: skip
    y, hidden = cpu.norm(x, weight, bias, residual, epsilon, centred, weight_offset, rounds_before_weight)
    return *cpu.quantize(y, symmetric), x.new_empty(0, x.shape[1]) if residual is None else hidden


def _shapes(x: Tensor, residual: Tensor | None, symmetric: bool) -> Normed:
    hidden = x.new_empty(0 if residual is None else x.shape[0], x.shape[1])
    return *empty_like_quantized(x, x.shape[1], symmetric), hidden


@torch.library.custom_op("halfbyte::rms_norm_quantize", mutates_args=(), device_types="cpu")
def _rms(
    x: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None, weight_offset: float,
    rounds_before_weight: bool, symmetric: bool,
) -> Normed:  # fmt: skip
    _check(x, weight, None, residual)
    return _in_torch(x, weight, None, residual, epsilon, False, weight_offset, rounds_before_weight, symmetric)


@_rms.register_kernel("cuda")
def _rms_on_cuda(
    x: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None, weight_offset: float,
    rounds_before_weight: bool, symmetric: bool,
) -> Normed:  # fmt: skip
    _check(x, weight, None, residual)
    # imported here: triton exists only where there is something to run it on
    from halfbyte.kernels.token_quantize.triton_norm import norm_quantize

    with torch.cuda.device_of(x):  # triton launches on the current device, which need not be where x is
        return norm_quantize(
            x, weight, None, residual, epsilon, False, weight_offset, rounds_before_weight, symmetric
        )  # fmt: skip


@_rms.register_fake
def _rms_shape(
    x: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None, weight_offset: float,
    rounds_before_weight: bool, symmetric: bool,
) -> Normed:  # fmt: skip
    del epsilon, weight_offset, rounds_before_weight  # a fake has its op's signature
    _check(x, weight, None, residual)
    return _shapes(x, residual, symmetric)


@torch.library.custom_op("halfbyte::layer_norm_quantize", mutates_args=(), device_types="cpu")
def _layer(
    x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float, residual: Tensor | None, symmetric: bool
) -> Normed:
    _check(x, weight, bias, residual)
    return _in_torch(x, weight, bias, residual, epsilon, True, 0.0, False, symmetric)


@_layer.register_kernel("cuda")
def _layer_on_cuda(
    x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float, residual: Tensor | None, symmetric: bool
) -> Normed:
    _check(x, weight, bias, residual)
    from halfbyte.kernels.token_quantize.triton_norm import norm_quantize

    with torch.cuda.device_of(x):
        return norm_quantize(x, weight, bias, residual, epsilon, True, symmetric=symmetric)


@_layer.register_fake
def _layer_shape(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    epsilon: float,
    residual: Tensor | None,
    symmetric: bool,
) -> Normed:
    del epsilon
    _check(x, weight, bias, residual)
    return _shapes(x, residual, symmetric)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
    checks.activations(x)
    checks.for_each_input(x, weight, "weight")
    checks.for_each_input(x, bias, "bias")
    if residual is not None:
        checks.beside(x, residual, "residual")
