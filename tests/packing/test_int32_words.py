"""int32 words: inverse pairs, hand-made words, and the compressed-tensors library as the oracle of the layout."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from halfbyte.errors import FormatError
from halfbyte.packing import int32_words

BITS = range(1, 9)


def random_codes(rows: int, cols: int, bits: int, seed: int = 0) -> Tensor:
    """Every width's first and last code included wherever there is room for both."""
    codes = torch.randint(0, 2**bits, (rows, cols), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    codes.view(-1)[0] = 0
    codes.view(-1)[-1] = 2**bits - 1
    return codes


def unsigned(word: int) -> int:
    return word & 0xFFFFFFFF


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 4), cols=st.integers(1, 70), bits=st.integers(1, 8), seed=st.integers(0, 2**16)
)  # fmt: skip
def test_unpacking_returns_the_packed_codes(rows: int, cols: int, bits: int, seed: int) -> None:
    codes = random_codes(rows, cols, bits, seed)
    words = int32_words.pack(codes, bits)
    assert words.dtype == torch.int32
    assert words.shape == (rows, int32_words.words_for(cols, bits))
    assert torch.equal(int32_words.unpack(words, bits, cols), codes)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 4), words=st.integers(1, 9), bits=st.sampled_from([1, 2, 4, 8]), seed=st.integers(0, 2**16)
)  # fmt: skip
def test_packing_returns_the_unpacked_words(rows: int, words: int, bits: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    packed = torch.randint(-(2**31), 2**31, (rows, words), generator=g).to(torch.int32)
    assert torch.equal(int32_words.pack(int32_words.unpack(packed, bits, words * 32 // bits), bits), packed)


@pytest.mark.parametrize("bits", BITS)
def test_every_pair_of_neighbours_has_its_own_word(bits: int) -> None:
    every = torch.arange(2**bits, dtype=torch.uint8)
    pairs = torch.cartesian_prod(every, every)
    words = int32_words.pack(pairs, bits)
    assert words[:, 0].unique().numel() == 4**bits
    assert torch.equal(int32_words.unpack(words, bits, 2), pairs)


@pytest.mark.parametrize(
    ("codes", "bits", "words"),
    [
        ([0, 1, 2, 3, 4, 5, 6, 7], 4, [0x76543210]),
        ([15, 0, 0, 0, 0, 0, 0, 15, 9], 4, [0xF000000F, 0x00000009]),
        ([0xAB, 0xCD, 0xEF, 0xFF], 8, [0xFFEFCDAB]),
        ([3, 0, 1, 2], 2, [0b10_01_00_11]),
        ([1, 0, 0, 1] + [0] * 27 + [1], 1, [0x80000009]),
        # the eleventh code of three bits has two of them in the first word and its highest in the second
        ([0] * 10 + [0b110], 3, [0b10 << 30, 0b1]),
        # the seventh code of five bits likewise
        ([0] * 6 + [0b10101], 5, [0b01 << 30, 0b101]),
        ([0] * 5 + [0b110110], 6, [0b10 << 30, 0b1101]),
        ([0] * 4 + [0b1100101], 7, [0b0101 << 28, 0b110]),
        ([1], 8, [1]),
    ],
)
def test_words_are_the_ones_made_by_hand(codes: list[int], bits: int, words: list[int]) -> None:
    packed = int32_words.pack(torch.tensor([codes], dtype=torch.uint8), bits)
    assert [unsigned(word) for word in packed[0].tolist()] == words


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 33), (2, 63), (7, 64), (4, 160)])
def test_compressed_tensors_packs_and_unpacks_the_same(shape: tuple[int, int], bits: int) -> None:
    codes = random_codes(*shape, bits)
    signed = (codes.short() - 2 ** (bits - 1)).to(torch.int8)
    words = int32_words.pack(codes, bits)
    assert torch.equal(words, pack_to_int32(signed, bits))
    assert torch.equal(unpack_from_int32(words, bits, signed.shape), signed)


@pytest.mark.parametrize("bits", BITS)
def test_zero_points_are_packed_as_compressed_tensors_packs_them(bits: int) -> None:
    zero_points = random_codes(37, 3, bits)
    signed = (zero_points.short() - 2 ** (bits - 1)).to(torch.int8)
    words = int32_words.pack_zero_points(zero_points, bits)
    assert torch.equal(words, pack_to_int32(signed, bits, packed_dim=0))
    assert torch.equal(int32_words.unpack_zero_points(words, bits, 37), zero_points)


def test_leading_axes_and_strides_do_not_matter() -> None:
    codes = random_codes(6, 20, 3)
    stacked = int32_words.pack(codes.view(2, 3, 20), 3)
    assert torch.equal(stacked.flatten(0, 1), int32_words.pack(codes, 3))
    assert torch.equal(int32_words.unpack(stacked, 3, 20), codes.view(2, 3, 20))
    assert torch.equal(int32_words.pack(codes.T, 3), int32_words.pack(codes.T.contiguous(), 3))
    assert torch.equal(int32_words.pack(codes[:, 1:17], 3), int32_words.pack(codes[:, 1:17].clone(), 3))


def test_arguments_are_left_as_they_were() -> None:
    codes = random_codes(2, 64, 4)
    before = codes.clone()
    words = int32_words.pack(codes, 4)
    words_before = words.clone()
    int32_words.unpack(words, 4, 64)
    assert torch.equal(codes, before)
    assert torch.equal(words, words_before)


def high_codes_first(codes: Tensor) -> Tensor:
    return int32_words.pack(codes.flip(1), 4)


def swapped_nibbles(codes: Tensor) -> Tensor:
    octets = int32_words.pack(codes, 4).view(torch.uint8)
    return (octets >> 4 | octets << 4).view(torch.int32)


def swapped_bytes(codes: Tensor) -> Tensor:
    return int32_words.pack(codes, 4).view(torch.uint8).unflatten(1, (-1, 4)).flip(2).flatten(1).view(torch.int32)


def wrong_axis(codes: Tensor) -> Tensor:
    return int32_words.pack(codes.T, 4).T


@pytest.mark.parametrize("bug", [high_codes_first, swapped_nibbles, swapped_bytes, wrong_axis])
def test_the_oracle_notices(bug) -> None:
    codes = random_codes(64, 64, 4)
    assert not torch.equal(bug(codes), pack_to_int32((codes.short() - 8).to(torch.int8), 4))


def test_a_code_that_does_not_fit_is_refused() -> None:
    with pytest.raises(FormatError, match="code 8 does not fit into 3 bits: the largest there is 7"):
        int32_words.pack(torch.tensor([[8]], dtype=torch.uint8), 3)


def test_signed_codes_are_refused() -> None:
    with pytest.raises(FormatError, match=r"torch\.uint8"):
        int32_words.pack(torch.tensor([[-1]], dtype=torch.int8), 4)


@pytest.mark.parametrize("bits", [0, 9])
def test_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(FormatError, match=f"{bits} bits"):
        int32_words.pack(torch.zeros(1, 1, dtype=torch.uint8), bits)


@pytest.mark.parametrize("cols", [16, 25])
def test_a_row_of_another_length_is_refused(cols: int) -> None:
    words = int32_words.pack(random_codes(2, 20, 4), 4)
    with pytest.raises(FormatError, match=f"cannot be {cols} codes of 4 bits"):
        int32_words.unpack(words, 4, cols)
