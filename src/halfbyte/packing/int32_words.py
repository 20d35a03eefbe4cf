"""Unsigned codes of 1 to 8 bits, packed densely along the last axis into little-endian int32 words.

Element i of a row occupies bits i*bits .. i*bits + bits - 1 of the row's bit string; every row starts on a word of its
own, and the bits left over at its end are zero. This is `weight_packed` of compressed-tensors' `pack-quantized` format.

    bits = 4         31   28 27   24 23   20 19   16 15   12 11    8 7     4 3     0
            word    │   h   │   g   │   f   │   e   │   d   │   c   │   b   │   a   │     columns a b c d e f g h

    bits = 3         31                                                           0
            word 0  │ k k│ j j j│ i i i│ h h h│ g g g│ f f f│ e e e│ d d d│ c c c│ b b b│ a a a│
            word 1  │                            ...                        n n n│ m m m│ l l l│ k│

Whatever the width, 8 codes fill `bits` bytes. Both directions treat 8 codes as one int64 and close (or open) the gaps
between them in three steps, for pairs, fours and eights, on whatever device the tensor is:

    a byte each       │   h    g    f    e    d    c    b    a │
    pairs closed      │     hg        fe        dc        ba   │
    fours closed      │         hgfe                dcba       │
    eights closed     │                           hgfedcba     │   the low `bits` bytes are kept

Bytes are viewed as words in place, which is right on little-endian machines only.
"""

import torch
from jaxtyping import Int32, Int64, UInt8
from torch import Tensor

from halfbyte.errors import FormatError

WORD_BITS = 32
LANE_CODES = 8


def words_for(cols: int, bits: int) -> int:
    """How many int32 words a row of `cols` codes takes. Raises FormatError unless `bits` is 1..8."""
    if not 1 <= bits <= 8:
        raise FormatError(f"cannot pack codes of {bits} bits into int32 words: choose 1 to 8 bits")
    return -(-cols * bits // WORD_BITS)


def pack(codes: UInt8[Tensor, "*rows cols"], bits: int) -> Int32[Tensor, "*rows words"]:
    """Each row of codes as `words_for(cols, bits)` words.

    Raises FormatError if a code needs more than `bits` bits: its high bits would change its neighbour.
    """
    *rows, cols = codes.shape
    words, lanes = words_for(cols, bits), -(-cols // LANE_CODES)
    if codes.dtype != torch.uint8:
        raise FormatError(
            f"cannot pack {codes.dtype} codes: make them torch.uint8, adding 2**(bits - 1) to signed ones"
        )
    if codes.numel() and int(codes.max()) >> bits:
        raise FormatError(f"code {int(codes.max())} does not fit into {bits} bits: the largest there is {2**bits - 1}")
    spread = codes.new_zeros(*rows, lanes * LANE_CODES)
    spread[..., :cols] = codes
    _close_gaps_(spread.view(torch.int64), bits)
    closed = spread.unflatten(-1, (lanes, LANE_CODES))[..., :bits].flatten(-2)
    # the last lane may reach past the last word, or the last word past the last lane
    packed = codes.new_zeros(*rows, 4 * words)
    packed[..., : lanes * bits] = closed[..., : 4 * words]
    return packed.view(torch.int32)


def unpack(words: Int32[Tensor, "*rows words"], bits: int, cols: int) -> UInt8[Tensor, "*rows cols"]:
    """The first `cols` codes of each row, as they were packed.

    Raises FormatError if rows of `cols` codes would not take exactly this many words.
    """
    *rows, width = words.shape
    if words.dtype != torch.int32 or width != words_for(cols, bits):
        raise FormatError(
            f"rows of {width} {words.dtype} words cannot be {cols} codes of {bits} bits, which take "
            f"{words_for(cols, bits)} torch.int32 words: check the shape and the bits that the checkpoint states"
        )
    lanes = -(-cols // LANE_CODES)
    packed = words.contiguous().view(torch.uint8)[..., : lanes * bits]
    packed = torch.nn.functional.pad(packed, (0, lanes * bits - packed.shape[-1]))
    spread = packed.new_zeros(*rows, lanes, LANE_CODES)
    spread[..., :bits] = packed.unflatten(-1, (lanes, bits))
    _open_gaps_(spread.view(torch.int64), bits)
    return spread.flatten(-2)[..., :cols].contiguous()


def pack_zero_points(zero_points: UInt8[Tensor, "out groups"], bits: int) -> Int32[Tensor, "words groups"]:
    """`weight_zero_point` of compressed-tensors: the same words, packed along `out`. Raises as `pack` does."""
    return pack(zero_points.T, bits).T.contiguous()


def unpack_zero_points(words: Int32[Tensor, "words groups"], bits: int, outs: int) -> UInt8[Tensor, "out groups"]:
    """The inverse of `pack_zero_points`. Raises as `unpack` does."""
    return unpack(words.T, bits, outs).T.contiguous()


def _close_gaps_(lanes: Int64[Tensor, "*rows lanes"], bits: int) -> None:
    """Move eight codes, a byte each, together into the low 8*bits bits of their int64. Edits `lanes`."""
    moved = torch.empty_like(lanes)
    for span in (8, 16, 32) if bits < 8 else ():
        width = span * bits // 8
        low = _low_fields(span, width)
        torch.bitwise_right_shift(lanes, span - width, out=moved)
        lanes.bitwise_and_(low).bitwise_or_(moved.bitwise_and_(low << width))


def _open_gaps_(lanes: Int64[Tensor, "*rows lanes"], bits: int) -> None:
    """The inverse of `_close_gaps_`. Edits `lanes`."""
    moved = torch.empty_like(lanes)
    for span in (32, 16, 8) if bits < 8 else ():
        width = span * bits // 8
        low = _low_fields(span, width)
        torch.bitwise_and(lanes, low << width, out=moved)
        lanes.bitwise_and_(low).bitwise_or_(moved.bitwise_left_shift_(span - width))


def _low_fields(span: int, width: int) -> int:
    """A mask of `width` ones at the bottom of every 2*span bits of an int64."""
    return sum((2**width - 1) << start for start in range(0, 64, 2 * span))
