"""y = x · diag(signs) · (H ⊗ core) / √n, token by token: the rotation of a linear's input at run time, alone or to codes.

`hadamard` and `hadamard_quantize` are `torch.library` ops (`torch.ops.halfbyte.hadamard`, ...) with fake implementations.
n is 2^k · m; H is Sylvester's matrix of order 2^k, and `core` of order m either ±1 as int8 (a Hadamard matrix, applied
divided by √m) or real numbers (an orthogonal matrix, applied as it is). Coordinate i of a token is row i // m of a grid
[2^k, m], so y = H · grid · core.

    CPU     products with small Sylvester matrices, in float32; see `cpu`
    CUDA    one Triton kernel, which reads every token once and writes it, or its codes and scale, once
"""

import torch
from jaxtyping import Float, Float32, Int8
from torch import Tensor

from halfbyte.errors import WeightError
from halfbyte.kernels.hadamard import cpu

__all__ = ["hadamard", "hadamard_quantize"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def hadamard(
    x: Float[Tensor, "*leading n"], core: Tensor, signs: Int8[Tensor, "n"] | None = None
) -> Float[Tensor, "*leading n"]:
    """x rotated, computed in float32 and rounded once to the dtype of x. WeightError where the arguments disagree."""
    return _op(x.reshape(-1, x.shape[-1]), core, signs).view(x.shape)


def hadamard_quantize(
    x: Float[Tensor, "tokens n"], core: Tensor, signs: Int8[Tensor, "n"] | None = None, bits: int = 8, clip: float = 1.0
) -> tuple[Int8[Tensor, "tokens n"], Float32[Tensor, "tokens"]]:
    """x rotated, and each token on a symmetric grid of `bits` bits over `clip` of its range: codes and scales.

    value = code · scale, codes within ±(2^(bits-1) - 1), ties to even; what is rotated is not rounded in between. Finite
    x only.
    """
    codes, scales = _quantize_op(x, core, signs, bits, clip)
    return codes, scales


@torch.library.custom_op("halfbyte::hadamard", mutates_args=(), device_types="cpu")
def _op(x: Tensor, core: Tensor, signs: Tensor | None) -> Tensor:
    _check(x, core, signs)
    return cpu.hadamard(x, core, signs).to(x.dtype)


@_op.register_kernel("cuda")
def _on_cuda(x: Tensor, core: Tensor, signs: Tensor | None) -> Tensor:
    _check(x, core, signs)
    # imported here: triton exists only where there is something to run it on
    from halfbyte.kernels.hadamard import triton_kernel

    with torch.cuda.device_of(x):  # triton launches on the current device, which need not be where x is
        return triton_kernel.hadamard(x, core, signs)


@_op.register_fake
def _shape_of(x: Tensor, core: Tensor, signs: Tensor | None) -> Tensor:
    _check(x, core, signs)
    return x.new_empty(x.shape)


@torch.library.custom_op("halfbyte::hadamard_quantize", mutates_args=(), device_types="cpu")
def _quantize_op(x: Tensor, core: Tensor, signs: Tensor | None, bits: int, clip: float) -> tuple[Tensor, Tensor]:
    _check(x, core, signs)
    _check_grid(bits, clip)
    return cpu.quantize(cpu.hadamard(x, core, signs), bits, clip)


@_quantize_op.register_kernel("cuda")
def _quantize_on_cuda(x: Tensor, core: Tensor, signs: Tensor | None, bits: int, clip: float) -> tuple[Tensor, Tensor]:
    _check(x, core, signs)
    _check_grid(bits, clip)
    from halfbyte.kernels.hadamard import triton_kernel

    with torch.cuda.device_of(x):
        return triton_kernel.hadamard_quantize(x, core, signs, bits, clip)


@_quantize_op.register_fake
def _quantized_shapes(x: Tensor, core: Tensor, signs: Tensor | None, bits: int, clip: float) -> tuple[Tensor, Tensor]:
    _check(x, core, signs)
    _check_grid(bits, clip)
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[0], dtype=torch.float32)


def _check(x: Tensor, core: Tensor, signs: Tensor | None) -> None:
    """WeightError unless the core and the signs fit the tokens."""
    if x.dtype not in DTYPES or x.dim() != 2:
        raise WeightError(f"x is {x.dtype} {list(x.shape)}: give [tokens, n] in one of {DTYPES}")
    ins, order = x.shape[1], core.shape[0]
    power = ins // order if order else 0
    square = core.dim() == 2 and core.shape[0] == core.shape[1]
    if not square or not (core.dtype == torch.int8 or core.dtype.is_floating_point):
        raise WeightError(f"the core is {core.dtype} {list(core.shape)}: give [m, m], int8 signs or real numbers")
    if not power or power * order != ins or power & (power - 1):
        raise WeightError(
            f"x has {ins} columns and the core {order}: the first must be the second times a power of two; build both "
            "from one size"
        )
    if signs is not None and (signs.dtype != torch.int8 or signs.shape != (ins,)):
        raise WeightError(f"the signs are {signs.dtype} {list(signs.shape)}: give torch.int8, one for each of {ins}")


def _check_grid(bits: int, clip: float) -> None:
    if not 2 <= bits <= 8 or not 0 < clip <= 1:
        raise WeightError(f"{bits} bits over {clip:g} of the range: give 2 to 8 bits and a clip in (0, 1]")
