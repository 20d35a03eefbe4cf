"""y = x · Wᵀ + bias with int8 tokens and a 4-bit weight in groups, laid out once for the tensor cores of a Hopper GPU.

`prepare` turns the words of a checkpoint into a `PreparedWeight` (packing/int8_tiles.py), which is for running and never
for storing; `checkpoint_words` turns it back. `matmul` is the `torch.library` op `torch.ops.halfbyte.w4a8_matmul`, with a
fake implementation for `torch.compile` and CUDA graphs; on a CPU it computes in float64. On a GPU `tilings.choose` says
what runs:

    folded    up to 8 tokens and few outputs     folded.py
    blocks    the rest                           blocks.py
"""

from typing import get_args

import torch
from jaxtyping import Float, Int8, Int32
from torch import Tensor

from halfbyte.errors import WeightError
from halfbyte.kernels.w4a8 import tilings
from halfbyte.kernels.w4a8.prepared import COUNTERS, Kind, PreparedWeight
from halfbyte.packing import int8_tiles, int32_words

BITS = 4
CAPABILITY = 9  # Hopper's: wgmma and the copy engine
OUT_STEP = 8  # rows of y start on 16 bytes
GROUP_STEP = tilings.GROUP
RESULT_DTYPES = (torch.float16, torch.bfloat16)
SCALE_DTYPES = {"float": (torch.bfloat16,), "integer": (torch.int16, torch.uint8), "weight": (torch.int16, torch.uint8)}
LARGEST_INPUT = 128


def obstacle(outs: int, ins: int, bits: int, group_size: int) -> str | None:
    """Why such a weight cannot be prepared, in words for the user; None where it can."""
    if bits != BITS:
        return f"the tensor-core layout has {BITS} bits, not {bits}"
    if outs % OUT_STEP:
        return f"the tensor-core kernels want outputs in steps of {OUT_STEP}, not {outs}"
    if group_size % GROUP_STEP or ins % group_size:
        return (
            f"the tensor-core kernels want groups of {GROUP_STEP}, or multiples of it, not {group_size} of {ins} inputs"
        )
    return None


def runs_on(device: torch.device) -> bool:
    """Whether the kernels are made for this device."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == CAPABILITY


def prepare(
    kind: Kind,
    packed: Int32[Tensor, "out words"],
    scales: Float[Tensor, "out groups"] | Int32[Tensor, "out groups"],
    row_scales: Float[Tensor, "out"],
    group_size: int,
) -> PreparedWeight:
    """The weight `code · scale · row scale` for running: `packed` holds codes plus 8, as compressed-tensors does.

    `scales` are bfloat16 for "float", int16 or uint8 for "integer" and, where code · scale is an int8, for "weight".
    Raises WeightError on an `obstacle`, for scales of another type or size, and for an "integer" row whose sum may leave
    int32.
    """
    outs, ins = scales.shape[0], scales.shape[1] * group_size
    if why := obstacle(outs, ins, BITS, group_size):
        raise WeightError(f"{why}: run this weight through `grouped_int8_matmul`")
    if scales.dtype not in SCALE_DTYPES[kind]:
        raise WeightError(
            f"scales are {scales.dtype}, but kind {kind!r} takes {SCALE_DTYPES[kind]}: convert them exactly"
        )
    codes = int32_words.unpack(packed, BITS, ins)
    sixteenfold = kind == "float"
    if kind == "weight":
        low, high = ((codes.unflatten(1, (-1, group_size)).int() - 8) * scales.int()[:, :, None]).aminmax()
        if low < -128 or high > 127:
            raise WeightError(
                f"code · scale is from {int(low)} to {int(high)}, but has to be an int8: quantize with `product: int8`"
            )
    if kind == "integer":
        reach = largest_sum(codes, scales, group_size)
        if reach >= 2**31:
            raise WeightError(f"a sum may reach {reach}, which int32 does not hold: quantize with a smaller amplifier")
        sixteenfold = 16 * reach < 2**31
    pairs = int8_tiles.pair(scales if kind == "float" else scales.to(torch.int16))
    words = int8_tiles.pack(codes)
    counters = torch.zeros(COUNTERS * words.shape[0], dtype=torch.int32, device=packed.device)
    rows = row_scales.float() / 16 if sixteenfold else row_scales.float()
    if packed.is_cuda:
        torch.cuda.synchronize(packed.device)  # launches read the weight without waiting for what wrote it
    return PreparedWeight(kind, words, pairs, rows.contiguous(), counters, group_size, sixteenfold)


def largest_sum(codes: Tensor, scales: Tensor, group_size: int) -> int:
    """The largest magnitude that Σ scale · Σ code · x can have in any row, over all int8 x, at any moment."""
    sizes = (codes.unflatten(1, (-1, group_size)).int() - 8).abs().sum(2)
    return int((sizes.long() * scales.long().abs()).sum(1).max()) * LARGEST_INPUT


def checkpoint_words(weight: PreparedWeight) -> Int32[Tensor, "out words"]:
    """The words that the weight was prepared from."""
    return int32_words.pack(int8_tiles.unpack(weight.words, weight.outs, weight.ins), BITS)


def matmul(
    x: Int8[Tensor, "tokens in"],
    x_scales: Float[Tensor, "tokens"],
    weight: PreparedWeight,
    bias: Float[Tensor, "out"] | Float[Tensor, "tokens out"] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Float[Tensor, "tokens out"]:
    """(x · x_scales) · Wᵀ + bias in `dtype`, float16 or bfloat16. Raises WeightError where x does not fit the weight.

    A bias with a row for each token is what skips the layer; for more than a few tokens it is added to the rounded product.
    """
    return _op(
        x, x_scales, weight.words, weight.pairs, weight.row_scales, weight.counters, weight.kind, weight.group_size,
        weight.sixteenfold, bias, dtype,
    )  # fmt: skip


@torch.library.custom_op("halfbyte::w4a8_matmul", mutates_args=(), device_types="cpu")
def _op(
    x: Tensor, x_scales: Tensor, words: Tensor, pairs: Tensor, row_scales: Tensor, counters: Tensor, kind: str,
    group_size: int, sixteenfold: bool, bias: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    weight = _checked(x, x_scales, words, pairs, row_scales, counters, kind, group_size, sixteenfold, bias, dtype)
    y = x.double() @ values(weight).T * x_scales.double()[:, None]
    return (y if bias is None else y + bias.double()).to(dtype)


@_op.register_kernel("cuda")
def _on_cuda(
    x: Tensor, x_scales: Tensor, words: Tensor, pairs: Tensor, row_scales: Tensor, counters: Tensor, kind: str,
    group_size: int, sixteenfold: bool, bias: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    weight = _checked(x, x_scales, words, pairs, row_scales, counters, kind, group_size, sixteenfold, bias, dtype)
    if not x.shape[0]:
        return x.new_empty(0, weight.outs, dtype=dtype)
    if x.stride(1) != 1 or x.stride(0) % 16 or x.data_ptr() % 16:
        x = x.clone(memory_format=torch.contiguous_format)
    with torch.cuda.device_of(x):  # triton launches on the current device, which need not be where x is
        tiling = tilings.choose(weight.kind, x.shape[0], weight.outs, weight.ins, group_size)
        return launch(x, x_scales, weight, bias, dtype, tiling)


def launch(
    x: Tensor, x_scales: Tensor, weight: PreparedWeight, bias: Tensor | None, dtype: torch.dtype,
    tiling: tilings.Tiling,
) -> Tensor:  # fmt: skip
    """`matmul` on the current GPU with a launch that is cut up so. Rows of x start on 16 bytes."""
    # imported here: triton exists only where there is something to run it on
    from halfbyte.kernels.w4a8 import blocks, folded

    if isinstance(tiling, tilings.Folded):
        return folded.matmul(x, x_scales, weight, bias, dtype, tiling)
    if bias is not None and bias.dim() == 2 and not blocks.adds_rows(tiling):
        return blocks.matmul(x, x_scales, weight, None, dtype, tiling) + bias
    return blocks.matmul(x, x_scales, weight, bias, dtype, tiling)


@_op.register_fake
def _shape_of(
    x: Tensor, x_scales: Tensor, words: Tensor, pairs: Tensor, row_scales: Tensor, counters: Tensor, kind: str,
    group_size: int, sixteenfold: bool, bias: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    weight = _checked(x, x_scales, words, pairs, row_scales, counters, kind, group_size, sixteenfold, bias, dtype)
    return x.new_empty(x.shape[0], weight.outs, dtype=dtype)


def values(weight: PreparedWeight) -> Float[Tensor, "out in"]:
    """The weight in float64."""
    codes = int8_tiles.unpack(weight.words, weight.outs, weight.ins).double() - 2 ** (BITS - 1)
    scales = int8_tiles.unpair(weight.pairs, weight.outs, torch.bfloat16 if weight.kind == "float" else torch.int16)
    grouped = codes.unflatten(1, (-1, weight.group_size)) * scales.double()[:, :, None]
    return grouped.flatten(1) * weight.row_scales.double()[:, None] * (16 if weight.sixteenfold else 1)


def _checked(
    x: Tensor, x_scales: Tensor, words: Tensor, pairs: Tensor, row_scales: Tensor, counters: Tensor, kind: str,
    group_size: int, sixteenfold: bool, bias: Tensor | None, dtype: torch.dtype,
) -> PreparedWeight:  # fmt: skip
    """The parts as one. Raise WeightError unless they are of one prepared weight, and x and the bias fit it."""
    if kind not in get_args(Kind):
        raise WeightError(f"no weight is of kind {kind!r}: take what `prepare` made")
    weight = PreparedWeight(kind, words, pairs, row_scales, counters, group_size, sixteenfold)  # type: ignore[arg-type]
    if x.dim() != 2 or x.dtype != torch.int8:
        raise WeightError(f"x is {x.dtype} of {x.dim()} axes: quantize the tokens to torch.int8, [tokens, in]")
    if x_scales.dtype != torch.float32 or x_scales.shape != (x.shape[0],):
        raise WeightError(
            f"x_scales are {x_scales.dtype} {list(x_scales.shape)}, but there are {x.shape[0]} tokens: give a "
            "torch.float32 for each"
        )
    if dtype not in RESULT_DTYPES:
        raise WeightError(f"the result cannot be {dtype}: ask for one of {RESULT_DTYPES}")
    if x.shape[1] != weight.ins:
        raise WeightError(
            f"x has {x.shape[1]} inputs and the weight {weight.ins}: give x as many columns as the weight"
        )
    out_tiles = int8_tiles.tiles_for(weight.outs)
    shapes = words.shape[:2], pairs.shape[1], counters.shape
    if shapes != ((out_tiles, int8_tiles.in_tiles_for(weight.ins)), out_tiles * 32, (COUNTERS * out_tiles,)):
        raise WeightError(f"the parts are not of one weight with {weight.outs} outputs: take what `prepare` made")
    if bias is not None and (bias.shape not in ((weight.outs,), (x.shape[0], weight.outs)) or bias.stride(-1) != 1):
        raise WeightError(
            f"the bias is {list(bias.shape)}, but there are {weight.outs} outputs: give one number for each, or a row of "
            "them for each token, side by side"
        )
    return weight
