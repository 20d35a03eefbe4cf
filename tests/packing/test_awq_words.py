"""AWQ words: inverse pair, the published order of the nibbles, and an independent reading of them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from halfbyte.errors import FormatError
from halfbyte.packing import awq_words

ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def random_codes(outs: int, ins: int, seed: int = 0) -> Tensor:
    codes = torch.randint(0, 16, (outs, ins), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    codes[0, 0], codes[-1, -1] = 0, 15
    return codes


def read(words: Tensor) -> Tensor:
    """One nibble after the other, in the order of the published packer."""
    ins, columns = words.shape
    codes = torch.empty(8 * columns, ins, dtype=torch.uint8)
    for nibble, column in enumerate(ORDER):
        codes[column::8] = (words.T >> 4 * nibble & 0xF).to(torch.uint8)
    return codes


@settings(deadline=None, max_examples=40)
@given(outs=st.integers(1, 9), ins=st.integers(1, 33), seed=st.integers(0, 2**16))
def test_unpacking_returns_the_packed_codes(outs: int, ins: int, seed: int) -> None:
    codes = random_codes(8 * outs, ins, seed)
    words = awq_words.pack(codes)
    assert words.dtype == torch.int32
    assert words.shape == (ins, outs)
    assert torch.equal(awq_words.unpack(words), codes)
    assert torch.equal(read(words), codes)


def test_even_outputs_come_first_in_a_word() -> None:
    word = awq_words.pack(torch.arange(8, dtype=torch.uint8)[:, None])
    assert int(word) & 0xFFFFFFFF == 0x75316420


def test_words_follow_the_inputs_then_the_outputs() -> None:
    codes = torch.zeros(16, 3, dtype=torch.uint8)
    codes[9, 2] = 15
    assert awq_words.pack(codes).tolist() == [[0, 0], [0, 0], [0, 15 << 16]]


def test_every_code_survives_in_every_place() -> None:
    codes = torch.arange(16, dtype=torch.uint8).expand(8, 16)
    assert torch.equal(awq_words.unpack(awq_words.pack(codes)), codes)


def nibbles_in_order(codes: Tensor) -> Tensor:
    return awq_words.pack(codes.unflatten(0, (-1, 8))[:, ORDER].flatten(0, 1))


def swapped_nibbles(codes: Tensor) -> Tensor:
    octets = awq_words.pack(codes).view(torch.uint8)
    return (octets >> 4 | octets << 4).view(torch.int32)


def packed_along_in(codes: Tensor) -> Tensor:
    return awq_words.pack(codes.T)


@pytest.mark.parametrize("bug", [nibbles_in_order, swapped_nibbles, packed_along_in])
def test_reading_notices(bug) -> None:
    codes = random_codes(64, 64)
    assert not torch.equal(read(bug(codes)), codes)


def test_outputs_that_words_do_not_divide_are_refused() -> None:
    with pytest.raises(FormatError, match="8, which does not divide 12"):
        awq_words.pack(torch.zeros(12, 4, dtype=torch.uint8))
