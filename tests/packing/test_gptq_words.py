"""GPTQ words: the layout of its checkpoints, made by hand and derived from compressed-tensors' packer."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from halfbyte.errors import FormatError
from halfbyte.packing import gptq_words
from halfbyte.packing.gptq_words import Version

BITS = [2, 3, 4, 8]


def random_codes(outs: int, ins: int, bits: int, seed: int = 0) -> Tensor:
    codes = torch.randint(0, 2**bits, (outs, ins), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    codes[0, 0], codes[-1, -1] = 0, 2**bits - 1
    return codes


@settings(deadline=None, max_examples=40)
@given(
    outs=st.integers(1, 3), ins=st.integers(1, 4), bits=st.sampled_from(BITS), seed=st.integers(0, 2**16)
)  # fmt: skip
def test_unpacking_returns_the_packed_codes(outs: int, ins: int, bits: int, seed: int) -> None:
    codes = random_codes(32 * outs, 32 * ins, bits, seed)
    words = gptq_words.pack_weight(codes, bits)
    assert words.shape == (ins * bits, 32 * outs)
    assert words.is_contiguous()
    assert torch.equal(gptq_words.unpack_weight(words, bits), codes)


@settings(deadline=None, max_examples=40)
@given(
    outs=st.integers(1, 3), groups=st.integers(1, 5), bits=st.sampled_from(BITS), version=st.sampled_from([1, 2]),
    seed=st.integers(0, 2**16),
)  # fmt: skip
def test_unpacking_returns_the_packed_zero_points(
    outs: int, groups: int, bits: int, version: Version, seed: int
) -> None:
    zero_points = random_codes(32 * outs, groups, bits, seed)
    if version == 1:
        zero_points = zero_points.clamp(min=1)
    words = gptq_words.pack_zero_points(zero_points, bits, version)
    assert words.shape == (groups, outs * bits)
    assert torch.equal(gptq_words.unpack_zero_points(words, bits, version), zero_points)


@pytest.mark.parametrize("bits", BITS)
def test_the_weight_is_the_transpose_of_what_compressed_tensors_stores(bits: int) -> None:
    codes = random_codes(64, 96, bits)
    signed = (codes.short() - 2 ** (bits - 1)).to(torch.int8)
    assert torch.equal(gptq_words.pack_weight(codes, bits), pack_to_int32(signed, bits).T)


def test_the_lowest_nibble_is_the_lowest_input() -> None:
    codes = torch.zeros(32, 32, dtype=torch.uint8)
    codes[5, 8:16] = torch.arange(1, 9)
    words = gptq_words.pack_weight(codes, 4)
    assert words[1, 5] & 0xFFFFFFFF == 0x87654321
    assert words.count_nonzero() == 1


def test_three_bit_codes_cross_the_words_as_the_published_packer_has_them() -> None:
    codes = torch.zeros(32, 32, dtype=torch.uint8)
    codes[0, 10], codes[0, 21] = 0b110, 0b101
    first, second, third = (int(word) & 0xFFFFFFFF for word in gptq_words.pack_weight(codes, 3)[:, 0])
    assert first == 0b10 << 30
    assert second == 0b1 | 0b1 << 31
    assert third == 0b10


@pytest.mark.parametrize(
    ("bits", "version", "word"),
    [
        (4, 1, 0x77777777),
        (4, 2, 0x88888888),
        (8, 1, 0x7F7F7F7F),
        (8, 2, 0x80808080),
        (2, 1, 0x55555555),
        (2, 2, 0xAAAAAAAA),
    ],
)
def test_symmetric_zero_points_are_the_words_that_checkpoints_hold(bits: int, version: Version, word: int) -> None:
    words = gptq_words.pack_zero_points(torch.full((32, 3), 2 ** (bits - 1), dtype=torch.uint8), bits, version)
    assert {value & 0xFFFFFFFF for value in words.flatten().tolist()} == {word}


def test_a_zero_point_of_zero_has_no_version_one() -> None:
    zero_points = torch.zeros(32, 1, dtype=torch.uint8)
    with pytest.raises(FormatError, match="gptq_v2"):
        gptq_words.pack_zero_points(zero_points, 4, 1)
    borrowed = gptq_words.pack_zero_points(zero_points + 15, 4, 2)
    with pytest.raises(FormatError, match="version 2"):
        gptq_words.unpack_zero_points(borrowed, 4, 1)
    assert torch.equal(gptq_words.unpack_zero_points(borrowed, 4, 2), zero_points + 15)


def packed_along_out(codes: Tensor) -> Tensor:
    return gptq_words.pack_weight(codes.T.contiguous(), 4)


def not_transposed(codes: Tensor) -> Tensor:
    return gptq_words.pack_weight(codes, 4).T.reshape(8, 64)


def swapped_nibbles(codes: Tensor) -> Tensor:
    octets = gptq_words.pack_weight(codes, 4).view(torch.uint8)
    return (octets >> 4 | octets << 4).view(torch.int32)


@pytest.mark.parametrize("bug", [packed_along_out, not_transposed, swapped_nibbles])
def test_unpacking_notices(bug) -> None:
    codes = random_codes(64, 64, 4)
    assert not torch.equal(gptq_words.unpack_weight(bug(codes), 4), codes)


def test_groups_of_neighbours_have_a_rising_index() -> None:
    assert gptq_words.group_index(6, 2).tolist() == [0, 0, 1, 1, 2, 2]
    assert gptq_words.group_size_of(gptq_words.group_index(96, 32)) == 32
    assert gptq_words.group_size_of(gptq_words.group_index(96, 96)) == 96


def test_scattered_groups_are_refused() -> None:
    with pytest.raises(FormatError, match="desc_act"):
        gptq_words.group_size_of(torch.tensor([0, 1, 0, 1], dtype=torch.int32))


def test_a_group_size_that_does_not_divide_is_refused() -> None:
    with pytest.raises(FormatError, match="group size 5 does not divide 32"):
        gptq_words.group_index(32, 5)


@pytest.mark.parametrize("bits", [1, 5, 6, 7])
def test_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(FormatError, match=f"no {bits} bits"):
        gptq_words.pack_weight(torch.zeros(32, 32, dtype=torch.uint8), bits)


@pytest.mark.parametrize("shape", [(32, 33), (33, 32)])
def test_shapes_that_words_do_not_divide_are_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(FormatError, match="33"):
        gptq_words.pack_weight(torch.zeros(shape, dtype=torch.uint8), 4)
