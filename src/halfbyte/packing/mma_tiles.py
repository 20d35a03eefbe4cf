"""4-bit codes in the order in which tensor cores take them: a thread's 16-byte load is what it multiplies next.

The matrix is cut into tiles of 64 outputs and 64 inputs, a tile into four strips of 16 outputs, and a strip has 16 bytes
for each of the 32 threads ("lanes") of a warp. Tiles lie along the inputs first, so a strip of outputs is one stream:

    words [out / 64, in / 64, strip 4, lane 32, step 4]

A word holds what one lane contributes to one matrix instruction of 16 outputs and 16 inputs (`mma.m16n8k16`, and
`wgmma` with its left operand in registers): with row = lane // 4 and pair = 2 · (lane % 4), in nibbles, high to low,

    bits   31    28    24    20    16    12     8     4     0
          │ r+8   │ r    │ r+8  │ r    │ r+8  │ r    │ r+8  │ r    │    r = 16 · strip + row, of the tile's outputs
          │ c+9   │ c+9  │ c+1  │ c+1  │ c+8  │ c+8  │ c    │ c    │    c = 16 · step + pair, of the tile's inputs

Codes of neighbouring inputs are 16 bits apart, so `word >> 4 · i & 0x000F000F` is a pair of neighbours in the two halves
of a register, where the conversion to two 16-bit floats leaves them, without moving anything between lanes.

Scales and zero points have the same lanes in mind: `interleave` makes [groups, out / 64 · 64], in which a lane finds the
eight outputs of its row side by side:

    place in 64 outputs    8 · row + 2 · strip + half    for output 16 · strip + 8 · half + row

Both dimensions are filled up to whole tiles with zeros.
"""

from jaxtyping import Int32, Shaped, UInt8
from torch import Tensor

from halfbyte.errors import FormatError
from halfbyte.packing import int32_words

BITS = 4
TILE = 64  # outputs of a tile, and inputs
STRIPS = 4  # of 16 outputs each
TILE_WORDS = TILE * TILE * BITS // int32_words.WORD_BITS

# one tile of codes as it is and as its words hold it: names of axes, slowest first
CODES = ("out", "strip", "half", "row", "in", "step", "far", "pair", "next")
WORDS = ("out", "in", "strip", "row", "pair", "step", "next", "far", "half")
SIZES = {"strip": STRIPS, "half": 2, "row": 8, "step": 4, "far": 2, "pair": 4, "next": 2}


def tiles_for(length: int) -> int:
    """How many tiles cover so many outputs, or inputs."""
    return -(-length // TILE)


def pack(codes: UInt8[Tensor, "out in"]) -> Int32[Tensor, "out_tiles in_tiles 512"]:
    """The codes, filled up with zeros. FormatError for codes that are no uint8 or need more than 4 bits."""
    outs, ins = map(tiles_for, codes.shape)
    padded = codes.new_zeros(outs * TILE, ins * TILE)
    padded[: codes.shape[0], : codes.shape[1]] = codes
    named = padded.view(*_shape(CODES, outs, ins))
    lanes = named.permute([CODES.index(axis) for axis in WORDS]).reshape(outs, ins, -1)
    return int32_words.pack(lanes, BITS)


def unpack(words: Int32[Tensor, "out_tiles in_tiles 512"], outs: int, ins: int) -> UInt8[Tensor, "{outs} {ins}"]:
    """The inverse of `pack`. FormatError where so many outputs and inputs would take another number of tiles."""
    if words.shape != (tiles_for(outs), tiles_for(ins), TILE_WORDS):
        raise FormatError(
            f"{outs} outputs and {ins} inputs take words [{tiles_for(outs)}, {tiles_for(ins)}, {TILE_WORDS}], not "
            f"{list(words.shape)}: give the shape that was packed"
        )
    lanes = int32_words.unpack(words, BITS, TILE * TILE)
    named = lanes.view(*_shape(WORDS, *words.shape[:2])).permute([WORDS.index(axis) for axis in CODES])
    return named.reshape(words.shape[0] * TILE, -1)[:outs, :ins].contiguous()


def interleave(values: Shaped[Tensor, "out groups"]) -> Shaped[Tensor, "groups places"]:
    """One value for every output and group, in the order in which lanes read them."""
    outs, groups = values.shape
    padded = values.new_zeros(tiles_for(outs) * TILE, groups)
    padded[:outs] = values
    return padded.view(-1, STRIPS, 2, 8, groups).permute(4, 0, 3, 1, 2).reshape(groups, -1)


def deinterleave(places: Shaped[Tensor, "groups places"], outs: int) -> Shaped[Tensor, "{outs} groups"]:
    """The inverse of `interleave`."""
    groups = places.shape[0]
    rows = places.view(groups, -1, 8, STRIPS, 2).permute(1, 3, 4, 2, 0)
    return rows.reshape(-1, groups)[:outs].contiguous()


def _shape(axes: tuple[str, ...], outs: int, ins: int) -> list[int]:
    sizes = SIZES | {"out": outs, "in": ins}
    return [sizes[axis] for axis in axes]
