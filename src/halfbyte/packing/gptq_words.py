"""The tensors of a GPTQ checkpoint: int32 words packed along `in` for codes and along `out` for zero points.

Our axes are [out, in]; theirs are the transposes. In a column of `qweight` (and in a row of `qzeros`) the codes lie as
in `int32_words`, lowest bits first, 3-bit codes crossing the words:

    bits = 4               out 0     out 1                                  31                0
    qweight  word row 0  │ in 0..7 │ in 0..7 │ ...        one word is   in  │ 7 6 5 4 3 2 1 0 │
             word row 1  │ in 8..15│ in 8..15│ ...
    qzeros   group 0     │ out 0..7          │ out 8..15 │ ...
    scales   group 0     │ out 0 │ out 1 │ ...
    g_idx    the group of every `in`

`gptq` (version 1) stores zero - 1, `gptq_v2` the true zero. A zero point of 0 has no version 1: some writers let the
borrow run into the neighbouring field and some do not, and readers undo only what they themselves would have written.
"""

from typing import Literal

import torch
from jaxtyping import Int32, UInt8
from torch import Tensor

from halfbyte.errors import FormatError
from halfbyte.packing import int32_words

BITS = (2, 3, 4, 8)
MULTIPLE = 32  # readers want whole words for every width

Version = Literal[1, 2]


def pack_weight(codes: UInt8[Tensor, "out in"], bits: int) -> Int32[Tensor, "words out"]:
    """`qweight`. Raises FormatError for widths or shapes that the format lacks."""
    _check(bits, "in", codes.shape[1])
    _check(bits, "out", codes.shape[0])
    return int32_words.pack(codes, bits).T.contiguous()


def unpack_weight(words: Int32[Tensor, "words out"], bits: int) -> UInt8[Tensor, "out in"]:
    """The inverse of `pack_weight`."""
    ins = words.shape[0] * int32_words.WORD_BITS // bits
    _check(bits, "in", ins)
    return int32_words.unpack(words.T, bits, ins)


def pack_zero_points(
    zero_points: UInt8[Tensor, "out groups"], bits: int, version: Version
) -> Int32[Tensor, "groups words"]:
    """`qzeros`. Raises FormatError for a zero point of 0 in version 1, and as `pack_weight` does."""
    _check(bits, "out", zero_points.shape[0])
    if version == 1:
        if (zero_points == 0).any():
            raise FormatError(
                "version 1 of the GPTQ format stores zero - 1, and readers disagree about a zero point of 0: "
                "write version 2 (`gptq_v2`) or compressed-tensors, or quantize symmetrically"
            )
        zero_points = zero_points - 1
    return int32_words.pack(zero_points.T, bits)


def unpack_zero_points(
    words: Int32[Tensor, "groups words"], bits: int, version: Version
) -> UInt8[Tensor, "out groups"]:
    """The inverse of `pack_zero_points`. Raises FormatError where version 1 is ambiguous."""
    outs = words.shape[1] * int32_words.WORD_BITS // bits
    _check(bits, "out", outs)
    zero_points = int32_words.unpack(words, bits, outs).T.contiguous()
    if version == 2:
        return zero_points
    if (zero_points == 2**bits - 1).any():
        raise FormatError(
            "qzeros of version 1 hold 0 - 1, whose meaning depends on the writer: "
            "convert the checkpoint to version 2 (`gptq_v2`) with the tool that wrote it"
        )
    return zero_points + 1


def group_index(ins: int, group_size: int) -> Int32[Tensor, "in"]:
    """`g_idx` of groups of neighbouring inputs. Raises FormatError unless the size divides `ins`."""
    if group_size < 1 or ins % group_size:
        raise FormatError(f"group size {group_size} does not divide {ins} inputs: choose one that does")
    return torch.arange(ins, dtype=torch.int32) // group_size


def group_size_of(index: Int32[Tensor, "in"]) -> int:
    """The inverse of `group_index`. Raises FormatError for groups of inputs that are not neighbours (`desc_act`)."""
    ins, groups = len(index), int(index.max()) + 1
    if ins % groups or not torch.equal(index.cpu(), group_index(ins, ins // groups)):
        raise FormatError(
            f"g_idx scatters the {groups} groups over {ins} inputs (desc_act = true): "
            "quantize again with desc_act = false or static groups, where a group is a run of neighbours"
        )
    return ins // groups


def _check(bits: int, axis: str, length: int) -> None:
    if bits not in BITS:
        raise FormatError(f"the GPTQ format has no {bits} bits, only {BITS}: write compressed-tensors")
    if length % MULTIPLE:
        raise FormatError(
            f"the GPTQ format packs `{axis}` by {MULTIPLE}, which does not divide {length}: write compressed-tensors"
        )
