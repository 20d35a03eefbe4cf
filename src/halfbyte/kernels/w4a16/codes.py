"""4-bit codes to 16-bit floats in registers, by OR-ing them into the mantissa of a power of two (`prepared.magics`)."""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false
# triton's decorators change signatures in ways that types do not tell

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def plus_magic(words, magic, magic8, dtype: tl.constexpr):
    """Code + magic of rows r and of rows r + 8, from words of any shape: [..., next, far], see packing/mma_tiles.py."""
    if dtype == gl.bfloat16:
        near = words & 0x000F000F | magic
        near8 = words >> 4 & 0x000F000F | magic
        far = words >> 8 & 0x000F000F | magic
        far8 = words >> 12 & 0x000F000F | magic
    else:
        moved = words >> 8
        near = words & 0x000F000F | magic
        near8 = words & 0x00F000F0 | magic8
        far = moved & 0x000F000F | magic
        far8 = moved & 0x00F000F0 | magic8
    rows = gl.join(_neighbours(near, dtype), _neighbours(far, dtype))
    return rows, gl.join(_neighbours(near8, dtype), _neighbours(far8, dtype))


@gluon.jit
def _neighbours(pairs, dtype: tl.constexpr):
    """The two 16-bit floats of every word, side by side."""
    low = (pairs & 0xFFFF).to(gl.int16).to(dtype, bitcast=True)
    return gl.join(low, (pairs >> 16).to(gl.int16).to(dtype, bitcast=True))
