"""Activations to int8, one grid for each token, alone or as the last step of the operator that makes them.

Every function is a `torch.library` op (`torch.ops.halfbyte.quantize_tokens`, ...) with a fake implementation, so it
works under `torch.compile` and in CUDA graphs. On the CPU it is plain torch; on CUDA one Triton kernel, which reads its
inputs once and writes codes and scales once. `reference` says what is computed.
"""

from halfbyte.kernels.token_quantize.activations import Approximation, gelu_quantize, silu_mul_quantize
from halfbyte.kernels.token_quantize.norms import layer_norm_quantize, rms_norm_quantize
from halfbyte.kernels.token_quantize.tokens import QuantizedTokens, quantize_static, quantize_tokens

__all__ = [
    "Approximation",
    "QuantizedTokens",
    "gelu_quantize",
    "layer_norm_quantize",
    "quantize_static",
    "quantize_tokens",
    "rms_norm_quantize",
    "silu_mul_quantize",
]
