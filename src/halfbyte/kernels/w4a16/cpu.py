"""Weight-only matmul on the CPU: torch's kernels for packed weights where they fit and pay, decoding elsewhere.

torch has two kernels that read packed weights, each with a layout of its own, made once by `prepare`:

    Int4Weight   w = (code - 8) · scale + offset     group sizes 32, 64, 128, 256; `out` a multiple of 16
                 scales_and_offsets [groups, out, 2] in the dtype of x; offset = (8 - zero) · scale
    Int8Weight   w = code · scale                    one scale per output, no zero points; `in` a multiple of 16

The layouts depend on the instructions of the machine, so a prepared weight is for running and never for storing.

`PAYS_UP_TO` says how long they pay. Milliseconds of processor time, one core of an x86 server with AMX, 4096 x 4096,
group size 128 with 4 bits and one scale per output with 8, bfloat16:

    tokens                        1     4    16    64   128   512
    4 bits, torch's kernel      1.2   2.3    11    44    87   299
    4 bits, decode and matmul    57    61    73    89    89    82
    8 bits, torch's kernel      1.9   2.9    13    56   109   365
    8 bits, decode and matmul    34    43    44    52    58    58
    a dense weight, for scale   5.1   3.6   4.8    10    17    31

In float32 and float16 both kernels are scalar loops: ahead of decoding for one token (float32: 43 against 56 ms with 4
bits, 17 against 29 with 8), level or behind with two.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int8, Int32, UInt8
from torch import Tensor

from halfbyte.errors import WeightError
from halfbyte.kernels.w4a16.dense import decode
from halfbyte.packing import int32_words

DECODED_ELEMENTS = 2**20  # at a time: what is decoded should still be in the cache when it is multiplied
INT4_GROUP_SIZES = (256, 128, 64, 32)
INT4_OUT_STEP = 16
# _weight_int8pack_mm reads bfloat16 rows in steps of 16 and past their end: wrong results, or a crash
INT8_IN_STEP = 16


@dataclass(frozen=True, slots=True)
class Int4Weight:
    """A 4-bit weight as torch's `_weight_int4pack_mm_for_cpu` reads it."""

    tiles: UInt8[Tensor, "out half_in"]
    scales_and_offsets: Float[Tensor, "groups out 2"]
    group_size: int


@dataclass(frozen=True, slots=True)
class Int8Weight:
    """A signed 8-bit weight with one scale per output, as torch's `_weight_int8pack_mm` reads it."""

    codes: Int8[Tensor, "out in"]
    scales: Float[Tensor, "out"]


PreparedWeight = Int4Weight | Int8Weight

# up to so many tokens the kernel beats decoding the weight and multiplying
PAYS_UP_TO = {
    (Int4Weight, torch.bfloat16): 64,
    (Int8Weight, torch.bfloat16): 32,
    (Int4Weight, torch.float32): 1,
    (Int8Weight, torch.float32): 1,
    (Int4Weight, torch.float16): 1,
    (Int8Weight, torch.float16): 1,
}


def obstacle(outs: int, ins: int, bits: int, group_size: int, symmetric: bool) -> str | None:
    """Why torch's kernels cannot run such a weight, in words for the user; None where one of them can."""
    if bits == 4:
        if outs % INT4_OUT_STEP:
            return f"torch's 4-bit CPU kernel wants outputs in multiples of {INT4_OUT_STEP}, not {outs}"
        if all(group_size % size for size in INT4_GROUP_SIZES):
            return f"torch's 4-bit CPU kernel wants group sizes of {INT4_GROUP_SIZES} or multiples, not {group_size}"
        return None
    if bits == 8:
        if not symmetric:
            return "torch's 8-bit CPU kernel has no zero points"
        if group_size != ins:
            return f"torch's 8-bit CPU kernel wants one scale per output, not one per {group_size} of {ins} inputs"
        if ins % INT8_IN_STEP:
            return f"torch's 8-bit CPU kernel wants inputs in multiples of {INT8_IN_STEP}, not {ins}"
        return None
    return f"torch's CPU kernels have 4 and 8 bits, not {bits}"


def prepare(
    packed: Int32[Tensor, "out words"],
    scales: Float[Tensor, "out groups"],
    zero_points: UInt8[Tensor, "out groups"] | None,
    bits: int,
    group_size: int,
    dtype: torch.dtype,
) -> PreparedWeight:
    """The weight in the layout of torch's kernel, for activations of `dtype`. Raises WeightError on an `obstacle`."""
    outs, groups = scales.shape
    ins = groups * group_size
    if why := obstacle(outs, ins, bits, group_size, zero_points is None):
        raise WeightError(f"{why}: run this weight through `wna16_matmul`")
    codes = int32_words.unpack(packed, bits, ins)
    if bits == 8:
        return Int8Weight((codes.short() - 128).to(torch.int8), scales[:, 0].to(dtype).contiguous())
    size = next(size for size in INT4_GROUP_SIZES if group_size % size == 0)
    scales = scales.float()
    offsets = torch.zeros_like(scales) if zero_points is None else (8 - zero_points.float()) * scales
    both = torch.stack((scales, offsets), dim=-1).repeat_interleave(group_size // size, dim=1)
    tiles = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    return Int4Weight(tiles, both.transpose(0, 1).to(dtype).contiguous(), size)


def matmul(
    x: Float[Tensor, "tokens in"], weight: PreparedWeight, bias: Float[Tensor, "out"] | None = None
) -> Float[Tensor, "tokens out"]:
    """x · Wᵀ + bias; x has the dtype that the weight was prepared for."""
    match weight:
        case Int4Weight(tiles, scales_and_offsets, group_size):
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(x.contiguous(), tiles, group_size, scales_and_offsets)
        case Int8Weight(codes, scales):
            y = torch.ops.aten._weight_int8pack_mm(x.contiguous(), codes, scales)
    return y if bias is None else y + bias.to(y.dtype)


def pays(weight: PreparedWeight, dtype: torch.dtype, tokens: int) -> bool:
    """Whether `matmul` is expected to beat `wna16_matmul` for so many tokens."""
    return tokens <= PAYS_UP_TO[type(weight), dtype]


def wna16_matmul(
    x: Float[Tensor, "tokens in"],
    packed: Int32[Tensor, "out words"],
    scales: Float[Tensor, "out groups"],
    zero_points: UInt8[Tensor, "out groups"] | None,
    bits: int,
    group_size: int,
    bias: Float[Tensor, "out"] | None,
) -> Float[Tensor, "tokens out"]:
    """x · Wᵀ + bias, a few decoded rows of W at a time, so that the dense weight never exists as a whole."""
    outs = packed.shape[0]
    y = x.new_empty(x.shape[0], outs)
    step = max(1, DECODED_ELEMENTS // x.shape[1])
    for first in range(0, outs, step):
        rows = slice(first, first + step)
        zeros = None if zero_points is None else zero_points[rows]
        y[:, rows] = x @ decode(packed[rows], scales[rows], zeros, bits, group_size, x.dtype).T
    return y if bias is None else y + bias.to(y.dtype)
