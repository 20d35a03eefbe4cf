"""y = x · Wᵀ + bias with 16- or 32-bit activations and a weight of 2 to 8 bits, read as it lies in the checkpoint.

`wna16_matmul` is a `torch.library` op (`torch.ops.halfbyte.wna16_matmul`): it has a fake implementation, so it works
under `torch.compile` and in CUDA graphs. `route` says what runs:

    CPU     decode   a few rows of W at a time are decoded, then torch's matmul; see `cpu` for prepared weights
    CUDA    gemv     one to four tokens: no tensor cores, every weight read once
            tiles    more tokens: tensor cores
            decode   what the Triton kernels lack: 2, 3, 5, 6, 7 bits, and group sizes that 16 does not divide

`tensor_cores` has the same product for 4-bit weights that were put into an order for a Hopper GPU: several times as fast.
"""

from typing import Literal

import torch
from jaxtyping import Float, Int32, UInt8
from torch import Tensor

from halfbyte.errors import WeightError
from halfbyte.kernels.w4a16 import cpu
from halfbyte.kernels.w4a16.dense import decode
from halfbyte.packing import int32_words

__all__ = ["Route", "decode", "route", "wna16_matmul"]

Route = Literal["decode", "gemv", "tiles"]

ACTIVATION_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TRITON_BITS = (4, 8)
TRITON_GROUP_STEP = 16  # the shortest inner product of a tensor core
GEMV_TOKENS = 4


def route(device: str, tokens: int, groups: int, bits: int, group_size: int) -> Route:
    """What runs for such arguments on a device of this type ("cpu", "cuda")."""
    if device != "cuda" or bits not in TRITON_BITS or (groups > 1 and group_size % TRITON_GROUP_STEP):
        return "decode"
    return "gemv" if tokens <= GEMV_TOKENS else "tiles"


def wna16_matmul(
    x: Float[Tensor, "tokens in"],
    packed: Int32[Tensor, "out words"],
    scales: Float[Tensor, "out groups"],
    zero_points: UInt8[Tensor, "out groups"] | None,
    bits: int,
    group_size: int,
    bias: Float[Tensor, "out"] | None = None,
) -> Float[Tensor, "tokens out"]:
    """x · Wᵀ + bias in the dtype of x, with W[o, i] = (code[o, i] - zero[o, group of i]) · scale[o, group of i].

    `packed` is compressed-tensors' `weight_packed`; without zero points every zero is 2**(bits - 1). `group_size`
    divides `in`, and equals it where there is one scale per output. Raises WeightError where the arguments disagree.
    """
    return _op(x, packed, scales, zero_points, bits, group_size, bias)


@torch.library.custom_op("halfbyte::wna16_matmul", mutates_args=(), device_types="cpu")
def _op(
    x: Tensor, packed: Tensor, scales: Tensor, zero_points: Tensor | None, bits: int, group_size: int,
    bias: Tensor | None,
) -> Tensor:  # fmt: skip
    _check(x, packed, scales, zero_points, bits, group_size, bias)
    return cpu.wna16_matmul(x, packed, scales, zero_points, bits, group_size, bias)


@_op.register_kernel("cuda")
def _on_cuda(
    x: Tensor, packed: Tensor, scales: Tensor, zero_points: Tensor | None, bits: int, group_size: int,
    bias: Tensor | None,
) -> Tensor:  # fmt: skip
    _check(x, packed, scales, zero_points, bits, group_size, bias)
    runs = route("cuda", x.shape[0], scales.shape[1], bits, group_size)
    if runs == "decode":
        weight = decode(packed, scales, zero_points, bits, group_size, x.dtype)
        return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
    # imported here: triton exists only where there is something to run it on
    from halfbyte.kernels.w4a16 import triton_gemv, triton_kernel

    kernel = triton_gemv if runs == "gemv" else triton_kernel
    with torch.cuda.device_of(x):  # triton launches on the current device, which need not be where x is
        return kernel.wna16_matmul(x, packed, scales, zero_points, bits, group_size, bias)


@_op.register_fake
def _shape_of(
    x: Tensor, packed: Tensor, scales: Tensor, zero_points: Tensor | None, bits: int, group_size: int,
    bias: Tensor | None,
) -> Tensor:  # fmt: skip
    _check(x, packed, scales, zero_points, bits, group_size, bias)
    return x.new_empty(x.shape[0], packed.shape[0])


def _check(
    x: Tensor, packed: Tensor, scales: Tensor, zero_points: Tensor | None, bits: int, group_size: int,
    bias: Tensor | None,
) -> None:  # fmt: skip
    """Raise WeightError unless the arguments describe one matmul."""
    if x.dtype not in ACTIVATION_DTYPES or x.dim() != 2:
        raise WeightError(f"x is {x.dtype} of {x.dim()} axes: give [tokens, in] in one of {ACTIVATION_DTYPES}")
    if not 2 <= bits <= 8:
        raise WeightError(f"no weight-only matmul for {bits} bits: quantize to 2 to 8 bits")
    ins, outs = x.shape[1], packed.shape[0]
    expected = (outs, int32_words.words_for(ins, bits))
    if packed.dtype != torch.int32 or packed.shape != expected:
        raise WeightError(
            f"packed is {packed.dtype} {list(packed.shape)}, but {ins} inputs of {bits} bits take torch.int32 "
            f"{list(expected)}: pack with packing.int32_words, and give x as many columns as the weight"
        )
    if scales.dim() != 2 or scales.shape[0] != outs or scales.shape[1] * group_size != ins:
        raise WeightError(
            f"scales are {list(scales.shape)}, but {outs} outputs of {ins} inputs in groups of {group_size} need "
            f"[{outs}, {ins} / {group_size}]: choose a group size that divides the inputs"
        )
    if not scales.dtype.is_floating_point:
        raise WeightError(f"scales are {scales.dtype}: convert them to the dtype of x")
    if zero_points is not None and (zero_points.dtype != torch.uint8 or zero_points.shape != scales.shape):
        raise WeightError(
            f"zero points are {zero_points.dtype} {list(zero_points.shape)}, but the scales {list(scales.shape)}: "
            "unpack them to torch.uint8, one for every scale"
        )
    if bias is not None and bias.shape != (outs,):
        raise WeightError(f"the bias is {list(bias.shape)}, but there are {outs} outputs: give one number for each")
