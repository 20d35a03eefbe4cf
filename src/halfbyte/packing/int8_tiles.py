"""4-bit codes in the order in which int8 tensor cores take them: a thread's 16-byte load is what it multiplies next.

As in mma_tiles.py, tiles have 64 outputs and 64 inputs, a tile four strips of 16 outputs, a strip 16 bytes for each of the 32
threads ("lanes") of a warp; but the instructions have twice as many inputs, 32 (`mma.m16n8k32`, and `wgmma` with its left
operand in registers), and a register of theirs holds four neighbours of a row:

    words [out / 64, in / 64, strip 4, lane 32, step 2, far 2]

    bits   31    28    24    20    16    12     8     4     0
          │ r+8   │ r    │ r+8  │ r    │ r+8  │ r    │ r+8  │ r    │    r = 16 · strip + lane // 4, of the tile's outputs
          │ c+3   │ c+3  │ c+2  │ c+2  │ c+1  │ c+1  │ c    │ c    │    c = 32 · step + 16 · far + 4 · (lane % 4), of its inputs

so `word << 4 & 0xF0F0F0F0` has the codes of row r in its four bytes, each 16-fold, and `word & 0xF0F0F0F0` those of r + 8.

Scales have the lanes in mind, too: `pair` makes [groups, out / 64 · 32] words, each with the 16 bits of two outputs:

    word in 64 outputs    8 · strip + row    output 16 · strip + row in the lower half, 16 · strip + row + 8 in the upper

Both dimensions are filled up to whole tiles with zeros; inputs to whole pairs of tiles.
"""

import torch
from jaxtyping import Int32, Shaped, UInt8
from torch import Tensor

from halfbyte.errors import FormatError
from halfbyte.packing import int32_words
from halfbyte.packing.mma_tiles import BITS, STRIPS, TILE, TILE_WORDS, tiles_for

UNIT = 2 * TILE  # inputs that kernels take at once

# one tile of codes as it is and as its words hold it: names of axes, slowest first
CODES = ("out", "strip", "half", "row", "in", "step", "far", "quad", "next")
WORDS = ("out", "in", "strip", "row", "quad", "step", "far", "next", "half")
SIZES = {"strip": STRIPS, "half": 2, "row": 8, "step": 2, "far": 2, "quad": 4, "next": 4}


def in_tiles_for(ins: int) -> int:
    """How many tiles cover so many inputs, in whole pairs."""
    return -(-ins // UNIT) * 2


def pack(codes: UInt8[Tensor, "out in"]) -> Int32[Tensor, "out_tiles in_tiles 512"]:
    """The codes, filled up with zeros. FormatError for codes that are no uint8 or need more than 4 bits."""
    outs, ins = tiles_for(codes.shape[0]), in_tiles_for(codes.shape[1])
    padded = codes.new_zeros(outs * TILE, ins * TILE)
    padded[: codes.shape[0], : codes.shape[1]] = codes
    named = padded.view(*_shape(CODES, outs, ins))
    return int32_words.pack(named.permute([CODES.index(axis) for axis in WORDS]).reshape(outs, ins, -1), BITS)


def unpack(words: Int32[Tensor, "out_tiles in_tiles 512"], outs: int, ins: int) -> UInt8[Tensor, "{outs} {ins}"]:
    """The inverse of `pack`. FormatError where so many outputs and inputs would take another number of tiles."""
    if words.shape != (tiles_for(outs), in_tiles_for(ins), TILE_WORDS):
        raise FormatError(
            f"{outs} outputs and {ins} inputs take words [{tiles_for(outs)}, {in_tiles_for(ins)}, {TILE_WORDS}], not "
            f"{list(words.shape)}: give the shape that was packed"
        )
    lanes = int32_words.unpack(words, BITS, TILE * TILE)
    named = lanes.view(*_shape(WORDS, *words.shape[:2])).permute([WORDS.index(axis) for axis in CODES])
    return named.reshape(words.shape[0] * TILE, -1)[:outs, :ins].contiguous()


def pair(values: Shaped[Tensor, "out groups"]) -> Int32[Tensor, "groups places"]:
    """Values of 16 bits, one for every output and group, two to a word. FormatError for values of another size."""
    if values.element_size() != 2:
        raise FormatError(
            f"{values.dtype} has {8 * values.element_size()} bits: convert to 16, of which a word holds two"
        )
    outs, groups = values.shape
    padded = values.new_zeros(tiles_for(outs) * TILE, groups)
    padded[:outs] = values
    lanes = padded.view(-1, STRIPS, 2, 8, groups).permute(4, 0, 1, 3, 2).contiguous()
    return lanes.view(torch.int32).view(groups, -1)


def unpair(places: Int32[Tensor, "groups places"], outs: int, dtype: torch.dtype) -> Shaped[Tensor, "{outs} groups"]:
    """The inverse of `pair`."""
    groups = places.shape[0]
    lanes = places.contiguous().view(dtype).view(groups, -1, STRIPS, 8, 2)
    return lanes.permute(1, 2, 4, 3, 0).reshape(-1, groups)[:outs].contiguous()


def _shape(axes: tuple[str, ...], outs: int, ins: int) -> list[int]:
    sizes = SIZES | {"out": outs, "in": ins}
    return [sizes[axis] for axis in axes]
