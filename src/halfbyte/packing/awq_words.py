"""The tensors of an AWQ checkpoint (`gemm` version): 4-bit codes, eight neighbours along `out` in an int32 word.

Our axes are [out, in]; theirs are the transposes. Inside a word the even outputs come first, then the odd ones:

    bits of the word   31                                                              0
    out - 8 * word    │   7   │   5   │   3   │   1   │   6   │   4   │   2   │   0   │

`qweight` is [in, out / 8], `qzeros` [groups, out / 8] with true zero points (no - 1), `scales` [groups, out].
"""

from jaxtyping import Int32, UInt8
from torch import Tensor

from halfbyte.errors import FormatError
from halfbyte.packing import int32_words

BITS = 4
WORD_CODES = 8


def pack(codes: UInt8[Tensor, "out in"]) -> Int32[Tensor, "in words"]:
    """`qweight` of the codes [out, in], or `qzeros` of the zero points [out, groups].

    Raises FormatError unless 8 divides `out` and every code fits into 4 bits.
    """
    if codes.shape[0] % WORD_CODES:
        raise FormatError(
            f"the AWQ format packs `out` by {WORD_CODES}, which does not divide {codes.shape[0]}: "
            "write compressed-tensors"
        )
    evens_first = codes.T.unflatten(-1, (-1, WORD_CODES // 2, 2)).mT.flatten(-3)
    return int32_words.pack(evens_first, BITS)


def unpack(words: Int32[Tensor, "in words"]) -> UInt8[Tensor, "out in"]:
    """The inverse of `pack`."""
    evens_first = int32_words.unpack(words, BITS, words.shape[-1] * WORD_CODES)
    return evens_first.unflatten(-1, (-1, 2, WORD_CODES // 2)).mT.flatten(-3).T.contiguous()
