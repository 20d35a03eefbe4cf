"""Codes in the order of int8 tensor cores: inverse pairs, and the picture of the docstring."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from halfbyte.errors import FormatError
from halfbyte.packing import int8_tiles
from halfbyte.packing.mma_tiles import tiles_for

SHAPES = st.tuples(st.integers(1, 200), st.integers(1, 300))


def random_codes(outs: int, ins: int, seed: int = 0) -> Tensor:
    codes = torch.randint(0, 16, (outs, ins), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    codes[0, 0], codes[-1, -1] = 0, 15
    return codes


@settings(max_examples=30, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 9))
def test_unpacking_gives_back_the_codes(shape: tuple[int, int], seed: int) -> None:
    codes = random_codes(*shape, seed)
    assert torch.equal(int8_tiles.unpack(int8_tiles.pack(codes), *shape), codes)


@settings(max_examples=30, deadline=None)
@given(shape=SHAPES)
def test_a_word_of_every_place_survives_the_way_back(shape: tuple[int, int]) -> None:
    """The other direction: no bit of a whole tile is lost or moved."""
    tiles = tiles_for(shape[0]), int8_tiles.in_tiles_for(shape[1])
    generator = torch.Generator().manual_seed(shape[0])
    words = torch.randint(-(2**31), 2**31, (*tiles, 512), generator=generator).to(torch.int32)
    codes = int8_tiles.unpack(words, tiles[0] * 64, tiles[1] * 64)
    assert torch.equal(int8_tiles.pack(codes), words)


@settings(max_examples=30, deadline=None)
@given(outs=st.integers(1, 200), groups=st.integers(1, 5), kind=st.sampled_from([torch.int16, torch.bfloat16]))
def test_unpairing_gives_back_the_values(outs: int, groups: int, kind: torch.dtype) -> None:
    values = (torch.arange(outs * groups) - 77).view(outs, groups).to(kind)
    places = int8_tiles.pair(values)
    assert places.shape == (groups, 32 * tiles_for(outs))
    assert torch.equal(int8_tiles.unpair(places, outs, kind), values)


def test_a_pair_holds_an_output_and_the_eighth_after_it() -> None:
    places = int8_tiles.pair(torch.arange(128, dtype=torch.int16)[:, None])
    for strip, row in ((0, 0), (2, 5), (3, 7)):
        low = 64 + 16 * strip + row
        assert int(places[0, 32 + 8 * strip + row]) == low | low + 8 << 16


def as_in_the_picture(words: Tensor, codes: Tensor, strip: int, lane: int, step: int, far: int) -> bool:
    """Whether this word of the second tile, both ways, holds what the docstring says."""
    word = int(words[1, 1].view(4, 32, 2, 2)[strip, lane, step, far])
    r, c = 64 + 16 * strip + lane // 4, 64 + 32 * step + 16 * far + 4 * (lane % 4)
    places = [(r + 8 * half, c + next_) for next_ in range(4) for half in range(2)]
    return [word >> 4 * nibble & 15 for nibble in range(8)] == [int(codes[place]) for place in places]


PLACES = [(0, 0, 0, 0), (2, 13, 1, 0), (1, 31, 0, 1), (3, 6, 1, 1)]


def test_a_word_holds_the_codes_of_the_picture() -> None:
    codes = random_codes(128, 256)
    assert all(as_in_the_picture(int8_tiles.pack(codes), codes, *place) for place in PLACES)


@pytest.mark.parametrize(
    "bug",
    [
        lambda words: words.roll(4, dims=2),  # the next lane
        lambda words: words.view(*words.shape[:2], 4, 32, 4).mT.contiguous(),  # steps before lanes
        lambda words: words.view(*words.shape[:2], 128, 2, 2).mT.contiguous(),  # far before step
        lambda words: words >> 4 & 0x0F0F0F0F | words << 4 & -0x0F0F0F10,  # halves the other way round
        lambda words: words.transpose(0, 1).reshape(words.shape),  # tiles along the outputs first
    ],
    ids=["lanes", "steps", "far", "halves", "tiles"],
)
def test_the_picture_tells_other_orders_apart(bug: Any) -> None:
    codes = random_codes(128, 256)
    assert not all(as_in_the_picture(bug(int8_tiles.pack(codes)), codes, *place) for place in PLACES)


def test_what_cannot_be_packed_is_refused() -> None:
    with pytest.raises(FormatError):
        int8_tiles.pack(torch.full((64, 128), 16, dtype=torch.uint8))
    with pytest.raises(FormatError, match="64 outputs and 300 inputs take words"):
        int8_tiles.unpack(torch.zeros(1, 2, 512, dtype=torch.int32), 64, 300)
    with pytest.raises(FormatError, match="has 32 bits"):
        int8_tiles.pair(torch.zeros(8, 1))
