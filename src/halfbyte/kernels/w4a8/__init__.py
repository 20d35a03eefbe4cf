"""y = x · Wᵀ + bias on 8-bit codes: integer products within runs of inputs that share their scales, floats between them.

`grouped_int8_matmul` is a `torch.library` op (`torch.ops.halfbyte.grouped_int8_matmul`) with a fake implementation. It
takes scales per token or per group of a token's inputs, weights per channel or per group, zero points on either side:

    value of x   (x[t, k] - x_zero[t, group of k]) · x_scale[t, group of k]
    value of W   (w[o, k] - w_zero[o, group of k]) · w_scale[o, group of k]

A run is the longest stretch of inputs within one group of x and one of W. Its products are summed in int32, exactly;
runs are summed in float32, and the result is rounded once.

    CPU     oneDNN's int8 product (AMX, VNNI) for each run; see `cpu`
    CUDA    Triton, int8 tensor cores; codes of 2, 4 and 8 bits are unpacked from words as they are read
"""

from math import gcd

import torch
from jaxtyping import Float, Int8, Int32
from torch import Tensor

from halfbyte.errors import WeightError
from halfbyte.kernels.w4a8 import cpu
from halfbyte.packing import int32_words

__all__ = ["grouped_int8_matmul", "run_size", "runs_of", "signed_codes"]

RESULT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TRITON_BITS = (2, 4, 8)  # those that end where a word ends
LONGEST_RUN = 2**15  # products of 255 · 255 at most, so their sum fits into int32


def run_size(ins: int, x_groups: int, weight_groups: int) -> int:
    """Inputs whose products are summed as integers: they share both scales, and the sum fits into int32."""
    shared = gcd(ins // x_groups, ins // weight_groups)
    return next(
        shared // parts for parts in range(1, shared + 1) if shared % parts == 0 and shared <= LONGEST_RUN * parts
    )


def signed_codes(words: Int32[Tensor, "out words"], bits: int, ins: int) -> Int8[Tensor, "out in"]:
    """Packed codes with 2**(bits - 1) taken off, as integer products read them."""
    return (int32_words.unpack(words, bits, ins).short() - 2 ** (bits - 1)).to(torch.int8)


def runs_of(codes: Int8[Tensor, "out in"], size: int) -> Int8[Tensor, "runs out size"]:
    """A weight's codes run by run, contiguous: half the time of the CPU's product, for a copy of the weight."""
    return codes.unflatten(1, (-1, size)).transpose(0, 1).contiguous()


def grouped_int8_matmul(
    x: Int8[Tensor, "tokens in"],
    x_scales: Float[Tensor, "tokens x_groups"],
    weight: Int8[Tensor, "out in"] | Int8[Tensor, "runs out size"] | Int32[Tensor, "out words"],
    weight_scales: Float[Tensor, "out groups"],
    *,
    bits: int = 8,
    x_zeros: Int32[Tensor, "tokens x_groups"] | None = None,
    weight_zeros: Int8[Tensor, "out groups"] | None = None,
    bias: Float[Tensor, "out"] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "tokens out"]:
    """x · Wᵀ + bias in `dtype`, with the values of x and W as in this module's docstring.

    `weight`: signed codes; or the same as `runs_of` gives them; or compressed-tensors' `weight_packed` of `bits` bits,
    of which 2**(bits - 1) is taken off, so that `weight_zeros` are signed too. The numbers of groups divide `in`.
    WeightError where the arguments disagree.
    """
    return _op(x, x_scales, weight, weight_scales, bits, x_zeros, weight_zeros, bias, dtype)


@torch.library.custom_op("halfbyte::grouped_int8_matmul", mutates_args=(), device_types="cpu")
def _op(
    x: Tensor, x_scales: Tensor, weight: Tensor, weight_scales: Tensor, bits: int, x_zeros: Tensor | None,
    weight_zeros: Tensor | None, bias: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    _check(x, x_scales, weight, weight_scales, bits, x_zeros, weight_zeros, bias, dtype)
    ins = x.shape[1]
    if weight.dtype == torch.int32:
        weight = signed_codes(weight, bits, ins)
    if weight.dim() == 2:
        weight = weight.unflatten(1, (-1, run_size(ins, x_scales.shape[1], weight_scales.shape[1]))).transpose(0, 1)
    return cpu.grouped_int8_matmul(x, x_scales, weight, weight_scales, x_zeros, weight_zeros, bias, dtype)


@_op.register_kernel("cuda")
def _on_cuda(
    x: Tensor, x_scales: Tensor, weight: Tensor, weight_scales: Tensor, bits: int, x_zeros: Tensor | None,
    weight_zeros: Tensor | None, bias: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    _check(x, x_scales, weight, weight_scales, bits, x_zeros, weight_zeros, bias, dtype)
    ins = x.shape[1]
    if weight.dtype == torch.int32 and bits not in TRITON_BITS:
        weight = signed_codes(weight, bits, ins)
    if weight.dim() == 3:
        weight = weight.transpose(0, 1).flatten(1)
    # imported here: triton exists only where there is something to run it on
    from halfbyte.kernels.w4a8 import triton_kernel

    run = run_size(ins, x_scales.shape[1], weight_scales.shape[1])
    with torch.cuda.device_of(x):  # triton launches on the current device, which need not be where x is
        return triton_kernel.grouped_int8_matmul(
            x, x_scales, weight, weight_scales, bits, x_zeros, weight_zeros, bias, dtype, run
        )


@_op.register_fake
def _shape_of(
    x: Tensor, x_scales: Tensor, weight: Tensor, weight_scales: Tensor, bits: int, x_zeros: Tensor | None,
    weight_zeros: Tensor | None, bias: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    _check(x, x_scales, weight, weight_scales, bits, x_zeros, weight_zeros, bias, dtype)
    return x.new_empty(x.shape[0], weight_scales.shape[0], dtype=dtype)


def _check(
    x: Tensor, x_scales: Tensor, weight: Tensor, weight_scales: Tensor, bits: int, x_zeros: Tensor | None,
    weight_zeros: Tensor | None, bias: Tensor | None, dtype: torch.dtype,
) -> None:  # fmt: skip
    """Raise WeightError unless the arguments describe one matmul."""
    if x.dtype != torch.int8 or x.dim() != 2:
        raise WeightError(f"x is {x.dtype} of {x.dim()} axes: quantize the tokens to torch.int8, [tokens, in]")
    if dtype not in RESULT_DTYPES:
        raise WeightError(f"the result cannot be {dtype}: ask for one of {RESULT_DTYPES}")
    (tokens, ins), outs = x.shape, weight_scales.shape[0]
    for name, scales, rows in (("x_scales", x_scales, tokens), ("weight_scales", weight_scales, outs)):
        if scales.dim() != 2 or scales.shape[0] != rows or not scales.shape[1] or ins % scales.shape[1]:
            raise WeightError(
                f"{name} are {list(scales.shape)}, but there are {rows} rows of {ins} inputs: give [{rows}, groups] "
                "with a number of groups that divides the inputs"
            )
        if not scales.dtype.is_floating_point:
            raise WeightError(f"{name} are {scales.dtype}: convert them to torch.float32")
    if weight.dtype == torch.int32:
        shapes = [[outs, int32_words.words_for(ins, bits)]]
    else:
        run = run_size(ins, x_scales.shape[1], weight_scales.shape[1])
        shapes = [[outs, ins], [ins // run, outs, run]]
    if weight.dtype not in (torch.int8, torch.int32) or list(weight.shape) not in shapes:
        raise WeightError(
            f"the weight is {weight.dtype} {list(weight.shape)}, but {outs} rows of {ins} inputs of {bits} bits are "
            f"{' or '.join(map(str, shapes))}, torch.int8 codes or torch.int32 words: give x as many columns as the "
            "weight has"
        )
    for name, zeros, scales, kind in (
        ("x_zeros", x_zeros, x_scales, torch.int32),
        ("weight_zeros", weight_zeros, weight_scales, torch.int8),
    ):
        if zeros is not None and (zeros.dtype != kind or zeros.shape != scales.shape):
            raise WeightError(
                f"{name} are {zeros.dtype} {list(zeros.shape)}, but the scales {list(scales.shape)}: give {kind}, one "
                "for every scale"
            )
    if bias is not None and bias.shape != (outs,):
        raise WeightError(f"the bias is {list(bias.shape)}, but there are {outs} outputs: give one number for each")
