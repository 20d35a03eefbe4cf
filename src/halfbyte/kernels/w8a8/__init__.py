"""y = x · Wᵀ of 8-bit integers, then scales, bias and residual, in one pass: activations and weights of 8 bits.

`int8_matmul` is a `torch.library` op (`torch.ops.halfbyte.int8_matmul`): it has a fake implementation, so it works under
`torch.compile` and in CUDA graphs. The sums are exact 32-bit integers everywhere. `route` says what runs:

    CPU     torch     torch's integer product, then the scales
    CUDA    gemv      one token: no tensor cores, every weight read once
            hopper    more than a few tokens on an H100 or H200, and rows that its copy engine can move
            tiles     everything else
"""

from typing import Literal

import torch
from jaxtyping import Float, Float32, Int8, Int32
from torch import Tensor

from halfbyte.errors import WeightError
from halfbyte.kernels.w8a8 import cpu

__all__ = ["MAX_INS", "MAX_INS_WITH_ZEROS", "Route", "int8_matmul", "route"]

Route = Literal["torch", "gemv", "hopper", "tiles"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HOPPER = (9, 0)
COPIED_BYTES = 16  # what Hopper's copy engine moves at least
WORD_BYTES = 4
# up to so many tokens, twice as many where there are many outputs, plain Triton is ahead on Hopper too
FEW_TOKENS = 32
MANY_OUTS = 8192
# sums must stay below 2**31: a product is at most 128 · 128, and (x - zero) · w at most 255 · 128
MAX_INS = (2**31 - 1) // (128 * 128)
MAX_INS_WITH_ZEROS = (2**31 - 1) // (255 * 128)


def route(device: str, x: Tensor, weight: Tensor, dtype: torch.dtype, capability: tuple[int, int] = (0, 0)) -> Route:
    """What runs for such arguments on a device of this type ("cpu", "cuda") and compute capability."""
    tokens, outs = x.shape[0], weight.shape[0]
    if device != "cuda":
        return "torch"
    if tokens == 1 and not _apart(x, weight, WORD_BYTES):
        return "gemv"
    few = tokens <= (FEW_TOKENS if outs <= MANY_OUTS else 2 * FEW_TOKENS)
    if few or capability != HOPPER or _apart(x, weight, COPIED_BYTES) or outs * dtype.itemsize % COPIED_BYTES:
        return "tiles"
    return "hopper"


def _apart(x: Tensor, weight: Tensor, size: int) -> bool:
    """Whether rows of x or the weight overlap, or do not begin and end at multiples of `size` bytes."""
    ins = x.shape[1]
    strides = weight.stride(0), x.stride(0) if len(x) > 1 else ins
    places = ins, *strides, x.data_ptr(), weight.data_ptr()
    return min(strides) < ins or any(place % size for place in places)


def int8_matmul(
    x: Int8[Tensor, "tokens in"],
    x_scales: Float32[Tensor, "tokens"] | Float32[Tensor, "1"],
    weight: Int8[Tensor, "out in"],
    weight_scales: Float32[Tensor, "out"],
    bias: Float[Tensor, "out"] | None = None,
    residual: Float[Tensor, "tokens out"] | None = None,
    x_zeros: Int32[Tensor, "tokens"] | None = None,
    weight_sums: Int32[Tensor, "out"] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Float[Tensor, "tokens out"]:
    """(x · Wᵀ - x_zeros · weight_sumsᵀ) · x_scales · weight_scales + bias + residual.

    The parenthesis is an exact integer; the rest is float32, rounded once to `dtype` (bfloat16, float16 or float32). One
    scale for all tokens makes `x_scales` of one element. `x_zeros`, in -128..127, are the codes that stand for zero in
    asymmetric activations; `weight_sums` is then `weight.sum(1, dtype=torch.int32)`.

    Raises WeightError where arguments disagree, and where sums could pass 2**31: beyond 131071 inputs, 65793 with zeros.
    """
    return _op(x, x_scales, weight, weight_scales, bias, residual, x_zeros, weight_sums, dtype)


@torch.library.custom_op("halfbyte::int8_matmul", mutates_args=(), device_types="cpu")
def _op(
    x: Tensor, x_scales: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor | None, residual: Tensor | None,
    x_zeros: Tensor | None, weight_sums: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    _check(x, x_scales, weight, weight_scales, bias, residual, x_zeros, weight_sums, dtype)
    return cpu.int8_matmul(x, x_scales, weight, weight_scales, bias, residual, x_zeros, weight_sums, dtype)


@_op.register_kernel("cuda")
def _on_cuda(
    x: Tensor, x_scales: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor | None, residual: Tensor | None,
    x_zeros: Tensor | None, weight_sums: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    _check(x, x_scales, weight, weight_scales, bias, residual, x_zeros, weight_sums, dtype)
    x, weight = _with_rows(x), _with_rows(weight)
    arguments = (
        x, x_scales.contiguous(), weight, weight_scales.contiguous(), None if bias is None else bias.contiguous(),
        None if residual is None else _with_rows(residual), None if x_zeros is None else x_zeros.contiguous(),
        None if weight_sums is None else weight_sums.contiguous(), dtype,
    )  # fmt: skip
    # imported here: triton exists only where there is something to run it on, and gluon changes faster than triton
    match route("cuda", x, weight, dtype, torch.cuda.get_device_capability(x.device)):
        case "gemv":
            from halfbyte.kernels.w8a8 import triton_gemv as kernel
        case "hopper":
            from halfbyte.kernels.w8a8 import triton_hopper as kernel
        case _:
            from halfbyte.kernels.w8a8 import triton_tiles as kernel
    with torch.cuda.device_of(x):  # triton launches on the current device, which need not be where x is
        return kernel.int8_matmul(*arguments)


@_op.register_fake
def _shape_of(
    x: Tensor, x_scales: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor | None, residual: Tensor | None,
    x_zeros: Tensor | None, weight_sums: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    _check(x, x_scales, weight, weight_scales, bias, residual, x_zeros, weight_sums, dtype)
    return x.new_empty(x.shape[0], weight.shape[0], dtype=dtype)


def _with_rows(matrix: Tensor) -> Tensor:
    """The matrix with neighbours in a row next to each other."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _check(
    x: Tensor, x_scales: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor | None, residual: Tensor | None,
    x_zeros: Tensor | None, weight_sums: Tensor | None, dtype: torch.dtype,
) -> None:  # fmt: skip
    """Raise WeightError unless the arguments describe one matmul."""
    if dtype not in DTYPES:
        raise WeightError(f"no int8 matmul gives {dtype}: ask for one of {DTYPES}")
    if x.dtype != torch.int8 or x.dim() != 2:
        raise WeightError(f"x is {x.dtype} of {x.dim()} axes: quantize it to torch.int8, as [tokens, in]")
    (tokens, ins), outs = x.shape, weight.shape[0]
    if weight.dtype != torch.int8 or weight.dim() != 2 or weight.shape[1] != ins:
        raise WeightError(
            f"the weight is {weight.dtype} {list(weight.shape)}, but x has {ins} columns: give torch.int8 [out, {ins}]"
        )
    most = MAX_INS if x_zeros is None else MAX_INS_WITH_ZEROS
    if not 1 <= ins <= most:
        raise WeightError(f"{ins} inputs, but 32-bit sums hold {most} at most: split the weight along its inputs")
    if x_scales.dtype != torch.float32 or tuple(x_scales.shape) not in ((tokens,), (1,)):
        raise WeightError(
            f"the scales of x are {x_scales.dtype} {list(x_scales.shape)}: give torch.float32, one for each of {tokens} "
            "tokens or one for all"
        )
    if weight_scales.dtype != torch.float32 or weight_scales.shape != (outs,):
        raise WeightError(
            f"the scales of the weight are {weight_scales.dtype} {list(weight_scales.shape)}: give torch.float32, one for "
            f"each of {outs} outputs"
        )
    if bias is not None and (not bias.dtype.is_floating_point or bias.shape != (outs,)):
        raise WeightError(
            f"the bias is {bias.dtype} {list(bias.shape)}: give one floating-point number for each of {outs} outputs"
        )
    if residual is not None and (not residual.dtype.is_floating_point or residual.shape != (tokens, outs)):
        raise WeightError(
            f"the residual is {residual.dtype} {list(residual.shape)}: give floating-point [{tokens}, {outs}]"
        )
    if (x_zeros is None) != (weight_sums is None):
        missing = "x_zeros" if x_zeros is None else "weight_sums"
        raise WeightError(f"{missing} is missing: give the zeros of x and the sums of the weight's rows, or neither")
    if x_zeros is not None and (x_zeros.dtype != torch.int32 or x_zeros.shape != (tokens,)):
        raise WeightError(
            f"x_zeros are {x_zeros.dtype} {list(x_zeros.shape)}: give torch.int32, one for each of {tokens} tokens"
        )
    if weight_sums is not None and (weight_sums.dtype != torch.int32 or weight_sums.shape != (outs,)):
        raise WeightError(
            f"weight_sums are {weight_sums.dtype} {list(weight_sums.shape)}: give weight.sum(1, dtype=torch.int32), one for "
            f"each of {outs} outputs"
        )
