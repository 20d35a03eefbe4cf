"""y = x · Wᵀ + bias on 8-bit tokens and weights with integer group scales: one int32 sum over all groups of a row.

`w4a8_integer` is a `torch.library` op (`torch.ops.halfbyte.w4a8_integer`) with a fake implementation:

    value of x   (x[t, k] - x_zero[t]) · x_scale[t]
    value of W   (w[o, k] - w_zero[o, g]) · S[o, g] · factor[o]       g the group of k, factor 1/α

    y[t, o] = x_scale[t] · factor[o] · ( Σ_g S[o, g] · (Σ_{k∈g} x·w - w_zero·Σ_{k∈g} x)  -  x_zero[t] · sums[o] ) + bias[o]

Everything in the parentheses is int32, and becomes a float once: where float scales (kernels/w4a8) convert and multiply
for every group, here is one multiplication of integers. That it never leaves int32 is proved for a checkpoint, offline,
by the overflow certificate (numerics/certificate.py); nothing is checked here. `row_sums` gives `sums`.

    CPU     oneDNN's int8 product (AMX, VNNI) for each group; see `cpu`
    CUDA    Triton, int8 tensor cores; codes of 2, 4 and 8 bits are unpacked from words as they are read
"""

import torch
from jaxtyping import Float, Int8, Int16, Int32, UInt8
from torch import Tensor

from halfbyte.errors import WeightError
from halfbyte.kernels.w4a8 import RESULT_DTYPES, TRITON_BITS, runs_of, signed_codes
from halfbyte.kernels.w4a8_integer import cpu
from halfbyte.packing import int32_words

__all__ = ["TRITON_BITS", "row_sums", "runs_of", "signed_codes", "w4a8_integer"]

MULTIPLIERS = (torch.uint8, torch.int16)


def row_sums(
    codes: Int8[Tensor, "out in"],
    multipliers: UInt8[Tensor, "out groups"] | Int16[Tensor, "out groups"],
    weight_zeros: Int8[Tensor, "out groups"] | None = None,
) -> Int32[Tensor, "out"]:
    """Σ_g S · Σ_{k∈g} (w - w_zero) of each row: what a zero point of the input multiplies."""
    groups = multipliers.shape[1]
    sums = codes.unflatten(1, (groups, -1)).sum(dim=2)
    if weight_zeros is not None:
        sums = sums - codes.shape[1] // groups * weight_zeros.long()
    return (sums * multipliers.long()).sum(dim=1).to(torch.int32)


def w4a8_integer(
    x: Int8[Tensor, "tokens in"],
    x_scales: Float[Tensor, "tokens"],
    weight: Int8[Tensor, "out in"] | Int8[Tensor, "groups out size"] | Int32[Tensor, "out words"],
    multipliers: UInt8[Tensor, "out groups"] | Int16[Tensor, "out groups"],
    factors: Float[Tensor, "out"],
    bias: Float[Tensor, "out"] | None = None,
    *,
    bits: int = 4,
    x_zeros: Int32[Tensor, "tokens"] | None = None,
    sums: Int32[Tensor, "out"] | None = None,
    weight_zeros: Int8[Tensor, "out groups"] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "tokens out"]:
    """x · Wᵀ + bias in `dtype`, as in this module's docstring.

    `weight`: signed codes; or the same as `runs_of` gives them, group by group; or compressed-tensors' `weight_packed`
    of `bits` bits, of which 2**(bits - 1) is taken off, so that `weight_zeros` are signed too. `sums` belong to
    `x_zeros`. WeightError where the arguments disagree.
    """
    return _op(x, x_scales, weight, multipliers, factors, bias, bits, x_zeros, sums, weight_zeros, dtype)


@torch.library.custom_op("halfbyte::w4a8_integer", mutates_args=(), device_types="cpu")
def _op(
    x: Tensor, x_scales: Tensor, weight: Tensor, multipliers: Tensor, factors: Tensor, bias: Tensor | None, bits: int,
    x_zeros: Tensor | None, sums: Tensor | None, weight_zeros: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    _check(x, x_scales, weight, multipliers, factors, bias, bits, x_zeros, sums, weight_zeros, dtype)
    if weight.dtype == torch.int32:
        weight = signed_codes(weight, bits, x.shape[1])
    if weight.dim() == 2:
        weight = weight.unflatten(1, (multipliers.shape[1], -1)).transpose(0, 1)
    return cpu.w4a8_integer(x, x_scales, weight, multipliers, factors, bias, x_zeros, sums, weight_zeros, dtype)


@_op.register_kernel("cuda")
def _on_cuda(
    x: Tensor, x_scales: Tensor, weight: Tensor, multipliers: Tensor, factors: Tensor, bias: Tensor | None, bits: int,
    x_zeros: Tensor | None, sums: Tensor | None, weight_zeros: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    _check(x, x_scales, weight, multipliers, factors, bias, bits, x_zeros, sums, weight_zeros, dtype)
    if weight.dtype == torch.int32 and bits not in TRITON_BITS:
        weight = signed_codes(weight, bits, x.shape[1])
    if weight.dim() == 3:
        weight = weight.transpose(0, 1).flatten(1)
    # imported here: triton exists only where there is something to run it on
    from halfbyte.kernels.w4a8_integer import triton_kernel

    with torch.cuda.device_of(x):  # triton launches on the current device, which need not be where x is
        return triton_kernel.w4a8_integer(
            x, x_scales, weight, multipliers, factors, bias, bits, x_zeros, sums, weight_zeros, dtype
        )


@_op.register_fake
def _shape_of(
    x: Tensor, x_scales: Tensor, weight: Tensor, multipliers: Tensor, factors: Tensor, bias: Tensor | None, bits: int,
    x_zeros: Tensor | None, sums: Tensor | None, weight_zeros: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    _check(x, x_scales, weight, multipliers, factors, bias, bits, x_zeros, sums, weight_zeros, dtype)
    return x.new_empty(x.shape[0], multipliers.shape[0], dtype=dtype)


def _check(
    x: Tensor, x_scales: Tensor, weight: Tensor, multipliers: Tensor, factors: Tensor, bias: Tensor | None, bits: int,
    x_zeros: Tensor | None, sums: Tensor | None, weight_zeros: Tensor | None, dtype: torch.dtype,
) -> None:  # fmt: skip
    """Raise WeightError unless the arguments describe one product."""
    if x.dtype != torch.int8 or x.dim() != 2:
        raise WeightError(f"x is {x.dtype} of {x.dim()} axes: quantize the tokens to torch.int8, [tokens, in]")
    if dtype not in RESULT_DTYPES:
        raise WeightError(f"the result cannot be {dtype}: ask for one of {RESULT_DTYPES}")
    (tokens, ins), outs = x.shape, multipliers.shape[0]
    if multipliers.dtype not in MULTIPLIERS or multipliers.dim() != 2:
        raise WeightError(f"the multipliers are {multipliers.dtype}: give torch.uint8 or torch.int16, [out, groups]")
    groups = multipliers.shape[1]
    if not groups or ins % groups:
        raise WeightError(f"{groups} groups do not divide {ins} inputs: give one multiplier for every group of a row")
    shapes = [[outs, ins], [groups, outs, ins // groups]]
    if weight.dtype == torch.int32:
        shapes = [[outs, int32_words.words_for(ins, bits)]]
    if weight.dtype not in (torch.int8, torch.int32) or list(weight.shape) not in shapes:
        raise WeightError(
            f"the weight is {weight.dtype} {list(weight.shape)}, but {outs} rows of {ins} inputs of {bits} bits are "
            f"{' or '.join(map(str, shapes))}, torch.int8 codes or torch.int32 words: give x as many columns as the "
            "weight has"
        )
    if (x_zeros is None) != (sums is None):
        raise WeightError(
            "zero points of x and sums of the weight's rows go together: give both (row_sums), or neither"
        )
    for name, tensor, shape, kinds in (
        ("x_scales", x_scales, [tokens], (torch.float32,)),
        ("factors", factors, [outs], (torch.float32,)),
        ("bias", bias, [outs], RESULT_DTYPES),
        ("x_zeros", x_zeros, [tokens], (torch.int32,)),
        ("sums", sums, [outs], (torch.int32,)),
        ("weight_zeros", weight_zeros, [outs, groups], (torch.int8,)),
    ):
        if tensor is not None and (list(tensor.shape) != shape or tensor.dtype not in kinds):
            wanted = " or ".join(map(str, kinds))
            raise WeightError(f"{name} is {tensor.dtype} {list(tensor.shape)}: give {wanted} {shape}")
