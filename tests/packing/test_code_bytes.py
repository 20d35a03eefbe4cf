"""Code bytes: inverse pair, the bit string read independently, and what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from halfbyte.errors import FormatError
from halfbyte.packing import code_bytes


def random_codes(rows: int, count: int, bits: int, seed: int = 0) -> Tensor:
    codes = torch.randint(0, 2**bits, (rows, count), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    codes[0, 0], codes[-1, -1] = 0, 2**bits - 1
    return codes


def read(packed: Tensor, bits: int, count: int) -> Tensor:
    """One code after the other, out of the row's bits as one long number."""
    rows = [int.from_bytes(bytes(row.tolist()), "little") for row in packed]
    codes = [[row >> bits * place & 2**bits - 1 for place in range(count)] for row in rows]
    return torch.tensor(codes, dtype=torch.uint8)


@settings(deadline=None, max_examples=80)
@given(rows=st.integers(1, 5), count=st.integers(1, 33), bits=st.integers(1, 8), seed=st.integers(0, 2**16))
def test_unpacking_returns_the_packed_codes(rows: int, count: int, bits: int, seed: int) -> None:
    codes = random_codes(rows, count, bits, seed)
    packed = code_bytes.pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, code_bytes.bytes_for(count, bits))
    assert torch.equal(code_bytes.unpack(packed, bits, count), codes)
    assert torch.equal(read(packed, bits, count), codes)


def test_the_even_channel_is_the_low_nibble():
    assert code_bytes.pack(torch.tensor([[0x1, 0xF]], dtype=torch.uint8), 4).tolist() == [[0xF1]]


def test_128_channels_of_4_bits_are_64_bytes():
    assert code_bytes.bytes_for(128, 4) == 64


def test_leading_axes_are_kept():
    codes = random_codes(6, 16, 3).view(2, 3, 16)
    assert torch.equal(code_bytes.unpack(code_bytes.pack(codes, 3), 3, 16), codes)


def swapped_nibbles(codes: Tensor) -> Tensor:
    packed = code_bytes.pack(codes, 4)
    return packed >> 4 | packed << 4


def reversed_bytes(codes: Tensor) -> Tensor:
    return code_bytes.pack(codes, 4).flip(-1)


@pytest.mark.parametrize("bug", [swapped_nibbles, reversed_bytes])
def test_the_comparison_notices(bug):
    codes = random_codes(3, 16, 4)
    assert not torch.equal(read(bug(codes), 4, 16), codes)


def test_what_is_no_packed_row_is_refused():
    with pytest.raises(FormatError, match="9 bits"):
        code_bytes.bytes_for(8, 9)
    with pytest.raises(FormatError, match=r"torch\.uint8"):
        code_bytes.pack(torch.zeros(1, 8, dtype=torch.int32), 4)
    with pytest.raises(FormatError, match="another head dimension"):
        code_bytes.unpack(torch.zeros(1, 5, dtype=torch.uint8), 4, 8)
