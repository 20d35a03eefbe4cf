"""Tokens as they are: `quantize_tokens` on a grid of each token's own, `quantize_static` on one for all."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Float32, Int8, Int32
from torch import Tensor

from halfbyte.errors import WeightError
from halfbyte.kernels.token_quantize import checks, cpu


class QuantizedTokens(NamedTuple):
    """value = code · scale, or (code - zero) · scale where there are zeros."""

    codes: Int8[Tensor, "tokens in"]
    scales: Float32[Tensor, "tokens"]
    zeros: Int32[Tensor, "tokens"] | None = None


def quantized(found: Sequence[Tensor], symmetric: bool) -> QuantizedTokens:
    """What an op returns, as a value: an op cannot return None, so zeros that do not exist are empty there."""
    codes, scales, zeros = found
    return QuantizedTokens(codes, scales, None if symmetric else zeros)


def quantize_tokens(x: Float[Tensor, "tokens in"], symmetric: bool = True) -> QuantizedTokens:
    """Each token on the grid of its own range: -127..127, or -128..127 of a range that holds 0. Finite x only."""
    return quantized(_tokens(x, symmetric), symmetric)


def quantize_static(x: Float[Tensor, "tokens in"], scale: Float32[Tensor, "1"]) -> Int8[Tensor, "tokens in"]:
    """round(x / scale) within ±127, ties to even. Finite x, and a scale above 2**-126, only."""
    return _static(x, scale)


def empty_like_quantized(x: Tensor, ins: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and zeros to be filled, or for their shapes alone."""
    tokens = x.shape[0]
    zeros = x.new_empty(0 if symmetric else tokens, dtype=torch.int32)
    return x.new_empty(tokens, ins, dtype=torch.int8), x.new_empty(tokens, dtype=torch.float32), zeros


@torch.library.custom_op("halfbyte::quantize_tokens", mutates_args=(), device_types="cpu")
def _tokens(x: Tensor, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    checks.activations(x)
    return cpu.quantize(x, symmetric)


@_tokens.register_kernel("cuda")
def _tokens_on_cuda(x: Tensor, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    checks.activations(x)
    # imported here: triton exists only where there is something to run it on
    from halfbyte.kernels.token_quantize.triton_pointwise import pointwise_quantize

    with torch.cuda.device_of(x):  # triton launches on the current device, which need not be where x is
        return pointwise_quantize(x, symmetric)


@_tokens.register_fake
def _tokens_shape(x: Tensor, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    checks.activations(x)
    return empty_like_quantized(x, x.shape[1], symmetric)


@torch.library.custom_op("halfbyte::quantize_static", mutates_args=(), device_types="cpu")
def _static(x: Tensor, scale: Tensor) -> Tensor:
    _check_static(x, scale)
    return cpu.static(x, scale)


@_static.register_kernel("cuda")
def _static_on_cuda(x: Tensor, scale: Tensor) -> Tensor:
    _check_static(x, scale)
    from halfbyte.kernels.token_quantize.triton_static import static_quantize

    with torch.cuda.device_of(x):
        return static_quantize(x, scale)


@_static.register_fake
def _static_shape(x: Tensor, scale: Tensor) -> Tensor:
    _check_static(x, scale)
    return x.new_empty(x.shape, dtype=torch.int8)


def _check_static(x: Tensor, scale: Tensor) -> None:
    checks.activations(x)
    if scale.shape != (1,) or scale.dtype != torch.float32:
        raise WeightError(
            f"the static scale is {scale.dtype} {list(scale.shape)}: give one number in torch.float32, [1]"
        )
