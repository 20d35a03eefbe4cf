"""Unsigned codes of 1 to 8 bits, packed densely along the last axis into bytes: the codes of a cached token.

Code i of a row occupies bits i*bits .. i*bits + bits - 1 of the row's bit string, lowest bit first; every row starts on
a byte of its own, and the bits left over at its end are zero.

    bits = 4         7      4 3      0
            byte 0  │    b   │    a   │      channels a b
    bits = 2         7  6 5  4 3  2 1  0
            byte 0  │ d  │ c  │ b  │ a  │    channels a b c d
    bits = 3         7     6 5       3 2       0
            byte 0  │ c c   │ b  b  b │ a  a  a │
            byte 1  │ f │ e  e  e │ d  d  d │ c │
            byte 2  │ h  h  h │ g  g  g │ f  f  │    8 codes are `bits` bytes, whatever the width

No check looks at the codes themselves, which would make a GPU wait at every token: a code that does not fit spoils its
neighbour, and is the caller's to prevent.
"""

import torch
from jaxtyping import UInt8
from torch import Tensor

from halfbyte.errors import FormatError

LANE = 8  # codes that fill whole bytes at any width


def bytes_for(codes: int, bits: int) -> int:
    """How many bytes a row of `codes` codes takes. FormatError unless `bits` is 1..8."""
    if not 1 <= bits <= 8:
        raise FormatError(f"cannot pack codes of {bits} bits into bytes: choose 1 to 8 bits")
    return -(-codes * bits // 8)


def pack(codes: UInt8[Tensor, "*rows codes"], bits: int) -> UInt8[Tensor, "*rows bytes"]:
    """Each row of codes as `bytes_for(codes, bits)` bytes. FormatError for codes that are not uint8."""
    if codes.dtype != torch.uint8:
        raise FormatError(f"cannot pack {codes.dtype} codes: make them torch.uint8")
    count = codes.shape[-1]
    size = bytes_for(count, bits)
    if bits == 8:
        return codes
    if 8 % bits == 0 and count * bits % 8 == 0:
        parts = codes.unflatten(-1, (-1, 8 // bits)).unbind(-1)
        packed = parts[0]
        for place, part in enumerate(parts[1:], start=1):
            packed = packed | part << place * bits
        return packed
    lanes = torch.nn.functional.pad(codes, (0, -count % LANE)).unflatten(-1, (-1, LANE)).to(torch.int64)
    word = sum(lanes[..., place] << place * bits for place in range(LANE))
    assert isinstance(word, Tensor)
    spread = torch.stack([(word >> 8 * place & 0xFF).to(torch.uint8) for place in range(bits)], dim=-1)
    return spread.flatten(-2)[..., :size]


def unpack(packed: UInt8[Tensor, "*rows bytes"], bits: int, count: int) -> UInt8[Tensor, "*rows count"]:
    """The inverse of `pack`: the first `count` codes of each row. FormatError where the bytes are not so many."""
    if packed.shape[-1] != bytes_for(count, bits):
        raise FormatError(
            f"{count} codes of {bits} bits are {bytes_for(count, bits)} bytes, and a row has {packed.shape[-1]}: the "
            "bytes belong to another head dimension or another width"
        )
    if bits == 8:
        return packed
    if 8 % bits == 0 and count * bits % 8 == 0:
        mask = 2**bits - 1
        return torch.stack([packed >> place & mask for place in range(0, 8, bits)], dim=-1).flatten(-2)
    lanes = torch.nn.functional.pad(packed, (0, -packed.shape[-1] % bits)).unflatten(-1, (-1, bits)).to(torch.int64)
    word = sum(lanes[..., place] << 8 * place for place in range(bits))
    assert isinstance(word, Tensor)
    codes = torch.stack([(word >> place * bits & 2**bits - 1).to(torch.uint8) for place in range(LANE)], dim=-1)
    return codes.flatten(-2)[..., :count]
