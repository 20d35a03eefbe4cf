"""From values to int8 codes inside a kernel: the pieces that the kernels of this room and its neighbours share.

Division and rounding are exact at the cost of five multiply-adds an element. With the correctly rounded reciprocal, one
step of correction makes a quotient correctly rounded (Markstein 1990); adding 1.5 · 2**23 rounds it to an integer, ties
to even, and leaves that in the low bits, where a conversion would take several times as long.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportOptionalMemberAccess=false
# triton's decorators change signatures in ways that types do not tell

import triton
import triton.language as tl

SMALLEST_SCALE = tl.constexpr(2.0**-126)
ROUNDER = tl.constexpr(12582912.0)
ROUNDER_BITS = tl.constexpr(0x4B400000)


@triton.jit
def rounded(y, dtype: tl.constexpr, PTX: tl.constexpr):
    """float32 as dtype; in PTX two at a time, since one conversion takes eight times as long as such a pair."""
    if PTX and dtype == tl.bfloat16:
        y = tl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [y], tl.bfloat16, is_pure=True, pack=2)
    elif PTX and dtype == tl.float16:
        y = tl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [y], tl.float16, is_pure=True, pack=2)
    return y.to(dtype)


@triton.jit
def as_float32(y, PTX: tl.constexpr):
    """y in float32; in PTX without the third instruction that compilers spend on a pair of bfloat16."""
    if PTX and y.dtype == tl.bfloat16:
        y = tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [y], tl.float32, is_pure=True, pack=2
        )
    return y.to(tl.float32)


@triton.jit
def power_of_2(x, PTX: tl.constexpr):
    """2**x; in PTX with subnormal results as 0, which spares three instructions of scaling."""
    if PTX:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:  # noqa: RET505 - triton compiles what follows a return
        return tl.exp2(tl.minimum(x, 127.0))  # 2**128 is no float32


@triton.jit
def reciprocal(x, PTX: tl.constexpr):
    """1 / x of 1 <= x, within 1 ulp; in PTX without the instructions that scale extremes."""
    if PTX:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:  # noqa: RET505 - triton compiles what follows a return
        return 1.0 / x


@triton.jit
def sigmoid(x, PTX: tl.constexpr):
    """1 / (1 + exp(-x))."""
    return reciprocal(1.0 + power_of_2(x * -1.4426950408889634, PTX), PTX)


@triton.jit
def widened(lows, highs, y, SYMMETRIC: tl.constexpr):
    """The running extremes after y; of magnitudes, and `highs` alone, if symmetric. Both start at 0."""
    if SYMMETRIC:
        highs = tl.maximum(highs, tl.abs(y))
    else:
        lows = tl.minimum(lows, y)
        highs = tl.maximum(highs, y)
    return lows, highs


@triton.jit
def grid_of(lows, highs, SYMMETRIC: tl.constexpr):
    """Scale and zero of rows with such extremes, [rows, block] each."""
    high = tl.max(highs, axis=1)
    if SYMMETRIC:
        scale = tl.where(high > 0, tl.maximum(tl.div_rn(high, 127.0), SMALLEST_SCALE), 1.0)
        zero = tl.zeros_like(high).to(tl.int32)
    else:
        low = tl.min(lows, axis=1)
        scale = tl.where(high > low, tl.maximum(tl.div_rn(high - low, 255.0), SMALLEST_SCALE), 1.0)
        zero = nearest(-128.0 - tl.div_rn(low, scale))
        zero = tl.minimum(tl.maximum(zero, -128), 127)
    return scale, zero


@triton.jit
def nearest(y):
    """The nearest integer of |y| < 2**22, ties to even, as int32."""
    return (y + ROUNDER).to(tl.int32, bitcast=True) - ROUNDER_BITS


@triton.jit
def divide(y, scale, inverse):
    """y / scale, correctly rounded where nothing over- or underflows; `inverse` is the rounded 1 / scale."""
    quotient = y * inverse
    return tl.fma(tl.fma(-quotient, scale, y), inverse, quotient)


@triton.jit
def encode(y, scale, zero, SYMMETRIC: tl.constexpr):
    """The int8 codes of rows y [rows, block] on grids scale, zero [rows]."""
    codes = nearest(divide(y, scale[:, None], tl.div_rn(1.0, scale)[:, None]))
    if not SYMMETRIC:
        codes = tl.minimum(tl.maximum(codes + zero[:, None], -128), 127)
    return codes.to(tl.int8)
