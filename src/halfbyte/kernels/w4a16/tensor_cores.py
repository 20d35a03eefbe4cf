"""y = x · Wᵀ + bias with 16-bit activations and a 4-bit weight laid out once for the tensor cores of a Hopper GPU.

`prepare` turns the words of a checkpoint into a `TensorCoreWeight` (packing/mma_tiles.py), which is for running and never
for storing; `checkpoint_words` turns it back. `matmul` is the `torch.library` op `torch.ops.halfbyte.w4a16_matmul`, with
a fake implementation for `torch.compile` and CUDA graphs, and decodes on a CPU. On a GPU `tilings.choose` says what runs:

    stream   a few tokens: as fast as memory gives the weight        few_tokens, or streamed for symmetric groups of 128
    blocks   more: each weight is decoded where it is multiplied     many_tokens
"""

import torch
from jaxtyping import Float, Int32, UInt8
from torch import Tensor

from halfbyte.errors import WeightError
from halfbyte.kernels.w4a16 import tilings
from halfbyte.kernels.w4a16.prepared import COUNTERS, TensorCoreWeight, magic_values
from halfbyte.packing import int32_words, mma_tiles

BITS = 4
DTYPES = (torch.float16, torch.bfloat16)
CAPABILITY = 9  # Hopper's: wgmma and the copy engine
OUT_STEP, IN_STEP = 8, 16  # rows of y, and of x, start on 16 bytes


def obstacle(outs: int, ins: int, bits: int, group_size: int, dtype: torch.dtype) -> str | None:
    """Why such a weight cannot be prepared, in words for the user; None where it can."""
    if bits != BITS:
        return f"the tensor-core layout has {BITS} bits, not {bits}"
    if dtype not in DTYPES:
        return f"tensor cores take {DTYPES}, not {dtype}"
    if outs % OUT_STEP or ins % IN_STEP:
        return f"the tensor-core kernels want outputs in steps of {OUT_STEP} and inputs of {IN_STEP}, not {outs}x{ins}"
    if group_size != ins and group_size not in (32, 64) and group_size % 128:
        return f"the tensor-core kernels want groups of 32, 64, multiples of 128, or one group, not {group_size}"
    return None


def runs_on(device: torch.device) -> bool:
    """Whether the kernels are made for this device."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == CAPABILITY


def prepare(
    packed: Int32[Tensor, "out words"],
    scales: Float[Tensor, "out groups"],
    zero_points: UInt8[Tensor, "out groups"] | None,
    bits: int,
    group_size: int,
    dtype: torch.dtype,
) -> TensorCoreWeight:
    """The weight for activations of `dtype`, in which scales are kept. Raises WeightError on an `obstacle`."""
    outs, ins = packed.shape[0], scales.shape[1] * group_size
    if why := obstacle(outs, ins, bits, group_size, dtype):
        raise WeightError(f"{why}: run this weight through `wna16_matmul`")
    words = mma_tiles.pack(int32_words.unpack(packed, BITS, ins))
    offsets = None
    if zero_points is not None:
        offsets = (mma_tiles.interleave(zero_points) + _magic_places(words, dtype)).to(dtype)
    counters = torch.zeros(COUNTERS * words.shape[0], dtype=torch.int32, device=packed.device)
    if packed.is_cuda:
        torch.cuda.synchronize(packed.device)  # launches read the weight without waiting for what wrote it
    return TensorCoreWeight(words, mma_tiles.interleave(scales.to(dtype)), offsets, counters, outs, ins, group_size)


def checkpoint_words(weight: TensorCoreWeight) -> Int32[Tensor, "out words"]:
    """The words that the weight was prepared from."""
    return int32_words.pack(mma_tiles.unpack(weight.words, weight.outs, weight.ins), BITS)


def matmul(
    x: Float[Tensor, "tokens in"], weight: TensorCoreWeight, bias: Float[Tensor, "out"] | None = None
) -> Float[Tensor, "tokens out"]:
    """x · Wᵀ + bias in the dtype of x. Raises WeightError where x does not fit the weight."""
    return _op(
        x, weight.words, weight.scales, weight.offsets, weight.counters, weight.outs, weight.group_size, bias
    )  # fmt: skip


@torch.library.custom_op("halfbyte::w4a16_matmul", mutates_args=(), device_types="cpu")
def _op(
    x: Tensor, words: Tensor, scales: Tensor, offsets: Tensor | None, counters: Tensor, outs: int, group_size: int,
    bias: Tensor | None,
) -> Tensor:  # fmt: skip
    _check(x, words, scales, offsets, counters, outs, group_size, bias)
    weight = _decode(words, scales, offsets, outs, x.shape[1], group_size)
    return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


@_op.register_kernel("cuda")
def _on_cuda(
    x: Tensor, words: Tensor, scales: Tensor, offsets: Tensor | None, counters: Tensor, outs: int, group_size: int,
    bias: Tensor | None,
) -> Tensor:  # fmt: skip
    _check(x, words, scales, offsets, counters, outs, group_size, bias)
    if not x.shape[0]:
        return x.new_empty(0, outs)
    if x.stride(1) != 1 or x.stride(0) % IN_STEP or x.data_ptr() % 16:
        x = x.clone(memory_format=torch.contiguous_format)
    weight = TensorCoreWeight(words, scales, offsets, counters, outs, x.shape[1], group_size)
    with torch.cuda.device_of(x):  # triton launches on the current device, which need not be where x is
        tiling = tilings.choose(x.shape[0], outs, x.shape[1], group_size, symmetric=offsets is None)
        return launch(x, weight, bias, tiling)


def launch(x: Tensor, weight: TensorCoreWeight, bias: Tensor | None, tiling: tilings.Tiling) -> Tensor:
    """`matmul` on the current GPU with a launch that is cut up so. Rows of x start on 16 bytes."""
    # imported here: triton exists only where there is something to run it on
    from halfbyte.kernels.w4a16 import few_tokens, many_tokens, streamed

    if isinstance(tiling, tilings.Streamed):
        return streamed.matmul(x, weight, bias, tiling)
    if isinstance(tiling, tilings.Stream):
        return few_tokens.matmul(x, weight, bias, tiling)
    return many_tokens.matmul(x, weight, bias, tiling)


@_op.register_fake
def _shape_of(
    x: Tensor, words: Tensor, scales: Tensor, offsets: Tensor | None, counters: Tensor, outs: int, group_size: int,
    bias: Tensor | None,
) -> Tensor:  # fmt: skip
    _check(x, words, scales, offsets, counters, outs, group_size, bias)
    return x.new_empty(x.shape[0], outs)


def _decode(
    words: Tensor, scales: Tensor, offsets: Tensor | None, outs: int, ins: int, group_size: int
) -> Float[Tensor, "out in"]:
    """(code - zero) · scale in the dtype of the scales, each element rounded once."""
    zeros = (
        torch.full_like(scales, 2 ** (BITS - 1)) if offsets is None else offsets - _magic_places(words, scales.dtype)
    )
    codes = mma_tiles.unpack(words, outs, ins).unflatten(1, (-1, group_size)).to(scales.dtype)
    codes -= mma_tiles.deinterleave(zeros, outs)[:, :, None]
    codes *= mma_tiles.deinterleave(scales, outs)[:, :, None]
    return codes.flatten(1)


def _magic_places(words: Int32[Tensor, "out_tiles in_tiles 512"], dtype: torch.dtype) -> Float[Tensor, "1 places"]:
    """What OR-ing a code into the mantissa adds to it, for every output in the order of the scales, in float32."""
    outs = torch.arange(words.shape[0] * mma_tiles.TILE, device=words.device)
    low, high = magic_values(dtype)
    return mma_tiles.interleave(torch.where(outs % 16 < 8, low, high)[:, None])


def _check(
    x: Tensor, words: Tensor, scales: Tensor, offsets: Tensor | None, counters: Tensor, outs: int, group_size: int,
    bias: Tensor | None,
) -> None:  # fmt: skip
    """Raise WeightError unless the parts are of one prepared weight, and x and the bias fit it."""
    if x.dim() != 2 or x.dtype != scales.dtype:
        raise WeightError(
            f"x is {x.dtype} of {x.dim()} axes: give [tokens, in] in {scales.dtype}, for which the weight was prepared"
        )
    ins, groups = x.shape[1], scales.shape[0]
    if ins != groups * group_size or mma_tiles.tiles_for(ins) != words.shape[1]:
        raise WeightError(
            f"x has {ins} inputs and the weight {groups * group_size}: give x as many columns as the weight"
        )
    places = groups, mma_tiles.tiles_for(outs) * mma_tiles.TILE
    parts = scales.shape, words.shape[0] * mma_tiles.TILE, places if offsets is None else offsets.shape
    if parts != (places, places[1], places) or counters.shape != (COUNTERS * words.shape[0],):
        raise WeightError(
            f"the parts are not of one weight with {outs} outputs in {groups} groups: take what `prepare` made"
        )
    if bias is not None and bias.shape != (outs,):
        raise WeightError(f"the bias is {list(bias.shape)}, but there are {outs} outputs: give one number for each")
