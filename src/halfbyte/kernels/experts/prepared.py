"""The 4-bit weights of all experts of a mixture, one after the other, as the grouped tensor-core kernels read them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from halfbyte.errors import WeightError
from halfbyte.kernels.w4a8 import tensor_cores
from halfbyte.kernels.w4a8.prepared import PreparedWeight
from halfbyte.kernels.w4a16.prepared import TensorCoreWeight
from halfbyte.packing import int8_tiles, mma_tiles

Kind = Literal["float", "integer", "weight", "half"]
KINDS: tuple[Kind, ...] = ("float", "integer", "weight", "half")
HALVES = (torch.float16, torch.bfloat16)
BITS = 4
GROUP_STEP = tensor_cores.GROUP_STEP
COUNTERS = 2048  # a launch has fewer crews


@dataclass(frozen=True, slots=True)
class ExpertWeight:
    """W[expert, o, i], `experts` matrices of equal size along the outputs.

    kind                       tokens       words                   group scales, two to a word (int8_tiles.pair)
    float, integer, weight     int8         packing/int8_tiles.py   as kernels/w4a8/prepared.py says
    half                       16 bits      packing/mma_tiles.py    of the tokens' dtype, applied to the code

    `row_scales` are float32; of kind "half" there are none, and the empty tensor has the tokens' dtype. `counters` are zero
    before and after every launch: launches that share them must not overlap, so use one stream at a time.
    """

    kind: Kind
    experts: int
    words: Int32[Tensor, "all_tiles in_tiles 512"]
    pairs: Int32[Tensor, "groups all_places"]
    row_scales: Float[Tensor, "all_outs"]
    counters: Int32[Tensor, "counts"]
    group_size: int
    sixteenfold: bool

    @property
    def outs(self) -> int:
        """Of one expert."""
        return self.words.shape[0] * mma_tiles.TILE // self.experts

    @property
    def ins(self) -> int:
        return self.pairs.shape[0] * self.group_size


def obstacle(outs: int) -> str | None:
    """Why experts of so many outputs cannot be joined, in words for the user; None where they can."""
    if outs % mma_tiles.TILE:
        return f"the kernels for experts want outputs in steps of {mma_tiles.TILE}, not {outs}"
    return None


def join(experts: Sequence[Sequence[PreparedWeight]]) -> ExpertWeight:
    """The weights of all experts, each that of one or more linears whose outputs lie side by side (gate, then up).

    WeightError on an `obstacle`, and unless they are of one kind and group size.
    """
    _check_alike(experts)
    parts = [part for expert in experts for part in expert]
    if len({(part.kind, part.group_size) for part in parts}) > 1:
        raise WeightError(
            "experts are of several kinds or group sizes: quantize all of them alike, or run them one by one"
        )
    # 16 · code is a choice that the sum of a row may forbid: then none of the others makes it
    high = all(part.sixteenfold for part in parts)
    rows = torch.cat([part.row_scales * 16 if part.sixteenfold and not high else part.row_scales for part in parts])
    words, pairs = torch.cat([part.words for part in parts]), torch.cat([part.pairs for part in parts], dim=1)
    first = parts[0]
    return ExpertWeight(first.kind, len(experts), words, pairs, rows, _counters(words), first.group_size, high)


def join_halves(experts: Sequence[Sequence[TensorCoreWeight]]) -> ExpertWeight:
    """As `join`, of kind "half". WeightError for zero points, too."""
    _check_alike(experts)
    parts = [part for expert in experts for part in expert]
    if len({(part.scales.dtype, part.group_size) for part in parts}) > 1:
        raise WeightError(
            "experts are of several types or group sizes: quantize all of them alike, or run them one by one"
        )
    if any(part.offsets is not None for part in parts):
        raise WeightError("experts have zero points: choose a symmetric convention, or run them one by one")
    if parts[0].group_size % GROUP_STEP:
        raise WeightError(
            f"the kernels for experts want groups of {GROUP_STEP}, or multiples of it, not {parts[0].group_size}: run these "
            "one by one"
        )
    words = torch.cat([part.words for part in parts])
    scales = [int8_tiles.pair(mma_tiles.deinterleave(part.scales, part.outs)) for part in parts]
    none = torch.empty(0, dtype=parts[0].scales.dtype, device=words.device)
    pairs = torch.cat(scales, dim=1)
    return ExpertWeight("half", len(experts), words, pairs, none, _counters(words), parts[0].group_size, False)


def _check_alike(experts: Sequence[Sequence[PreparedWeight]] | Sequence[Sequence[TensorCoreWeight]]) -> None:
    if len({tuple((part.outs, part.ins) for part in expert) for expert in experts}) != 1:
        raise WeightError("experts are of several sizes: run them one by one")
    for part in experts[0]:
        if why := obstacle(part.outs):
            raise WeightError(f"{why}: run these experts one by one")


def _counters(words: Tensor) -> Int32[Tensor, "counts"]:
    return torch.zeros(COUNTERS, dtype=torch.int32, device=words.device)


def values(weight: ExpertWeight, expert: int) -> Float[Tensor, "out in"]:
    """One expert's weight in float64."""
    tiles = weight.words.shape[0] // weight.experts
    words = weight.words.narrow(0, expert * tiles, tiles)
    pairs = weight.pairs.narrow(1, expert * tiles * 32, tiles * 32)
    if weight.kind == "half":
        scales = int8_tiles.unpair(pairs, weight.outs, weight.row_scales.dtype)
        codes = mma_tiles.unpack(words, weight.outs, weight.ins).to(scales.dtype) - 2 ** (BITS - 1)
        return (codes.unflatten(1, (-1, weight.group_size)) * scales[:, :, None]).flatten(1).double()
    rows = weight.row_scales.narrow(0, expert * weight.outs, weight.outs)
    one = PreparedWeight(weight.kind, words, pairs, rows, weight.counters, weight.group_size, weight.sixteenfold)
    return tensor_cores.values(one)
