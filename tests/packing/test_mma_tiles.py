"""Codes in the order of tensor cores: inverse pairs, the picture of the docstring, and the same words for the same codes."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from halfbyte.errors import FormatError
from halfbyte.packing import mma_tiles

SHAPES = st.tuples(st.integers(1, 200), st.integers(1, 200))


def random_codes(outs: int, ins: int, seed: int = 0) -> Tensor:
    codes = torch.randint(0, 16, (outs, ins), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    codes[0, 0], codes[-1, -1] = 0, 15
    return codes


@settings(max_examples=30, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 9))
def test_unpacking_gives_back_the_codes(shape: tuple[int, int], seed: int) -> None:
    codes = random_codes(*shape, seed)
    assert torch.equal(mma_tiles.unpack(mma_tiles.pack(codes), *shape), codes)


@settings(max_examples=30, deadline=None)
@given(shape=SHAPES)
def test_a_word_of_every_place_survives_the_way_back(shape: tuple[int, int]) -> None:
    """The other direction: no bit of a whole tile is lost or moved."""
    tiles = [mma_tiles.tiles_for(length) for length in shape]
    generator = torch.Generator().manual_seed(shape[0])
    words = torch.randint(-(2**31), 2**31, (*tiles, 512), generator=generator).to(torch.int32)
    codes = mma_tiles.unpack(words, tiles[0] * 64, tiles[1] * 64)
    assert torch.equal(mma_tiles.pack(codes), words)


@settings(max_examples=30, deadline=None)
@given(outs=st.integers(1, 200), groups=st.integers(1, 5))
def test_deinterleaving_gives_back_the_values(outs: int, groups: int) -> None:
    values = torch.arange(outs * groups).view(outs, groups)
    places = mma_tiles.interleave(values)
    assert places.shape == (groups, 64 * mma_tiles.tiles_for(outs))
    assert torch.equal(mma_tiles.deinterleave(places, outs), values)


def as_in_the_picture(words: Tensor, codes: Tensor, strip: int, lane: int, step: int) -> bool:
    """Whether this word of the second tile, both ways, holds what the docstring says."""
    word = int(words[1, 1].view(4, 32, 4)[strip, lane, step])
    r, c = 64 + 16 * strip + lane // 4, 64 + 16 * step + 2 * (lane % 4)
    places = [(r, c), (r + 8, c), (r, c + 8), (r + 8, c + 8), (r, c + 1), (r + 8, c + 1), (r, c + 9), (r + 8, c + 9)]
    return [word >> 4 * nibble & 15 for nibble in range(8)] == [int(codes[place]) for place in places]


PLACES = [(0, 0, 0), (2, 13, 3), (1, 31, 2), (3, 6, 1)]


def test_a_word_holds_the_codes_of_the_picture() -> None:
    codes = random_codes(128, 192)
    assert all(as_in_the_picture(mma_tiles.pack(codes), codes, *place) for place in PLACES)


@pytest.mark.parametrize(
    "bug",
    [
        lambda words: words.roll(4, dims=2),  # the next lane
        lambda words: words.view(*words.shape[:2], 4, 32, 4).mT.contiguous(),  # steps before lanes
        lambda words: words >> 16 & 0xFFFF | words << 16,  # neighbours the other way round
        lambda words: words.transpose(0, 1).reshape(words.shape),  # tiles along the outputs first
    ],
    ids=["lanes", "steps", "halves", "tiles"],
)
def test_the_picture_tells_other_orders_apart(bug: Any) -> None:
    codes = random_codes(128, 192)
    assert not all(as_in_the_picture(bug(mma_tiles.pack(codes)), codes, *place) for place in PLACES)


def test_a_place_holds_the_output_of_the_formula() -> None:
    places = mma_tiles.interleave(torch.arange(70)[:, None])[0]
    for out in (0, 7, 8, 37, 63):
        strip, half, row = out // 16, out % 16 // 8, out % 8
        assert places[8 * row + 2 * strip + half] == out
    assert places[64] == 64
    assert places[127] == 0  # filled up


def test_what_is_filled_up_is_zero() -> None:
    words = mma_tiles.pack(torch.full((3, 5), 15, dtype=torch.uint8))
    assert int(mma_tiles.unpack(words, 64, 64).count_nonzero()) == 15


def test_words_of_another_shape_are_refused() -> None:
    words = mma_tiles.pack(random_codes(64, 64))
    with pytest.raises(FormatError, match=r"65 outputs and 64 inputs take words \[2, 1, 512\], not \[1, 1, 512\]"):
        mma_tiles.unpack(words, 65, 64)


def test_codes_of_five_bits_are_refused() -> None:
    with pytest.raises(FormatError, match="does not fit into 4 bits"):
        mma_tiles.pack(torch.full((2, 2), 16, dtype=torch.uint8))
