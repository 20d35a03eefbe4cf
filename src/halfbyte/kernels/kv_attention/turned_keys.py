"""Keys that are stored before RoPE: decoded to float16 and turned in registers; pieces of `hopper_decode`.

    score of token t + j  =  q · R(t + j) k  =  R(-t) q · R(j) k      t: the first token of a warp's step
    k                     =  (code · step + zero) · scale + shift     two channels of a pair come as `low` and `high`

So cosines and sines are read for t alone, and those of j, which are the same in every step, lie in shared memory.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportAssignmentType=false
# triton's decorators change signatures in ways that types do not tell
# ruff: noqa: RET505, RUF005 - triton compiles what follows a return, and has no stars

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2


@gluon.jit
def turn(cos_ptr, sin_ptr, at, token, end, HALF: tl.constexpr):
    """Cosines and sines of each warp's token."""
    at = at + token.to(gl.int64) * HALF
    mask = token < end
    cos = gl.load(cos_ptr + at, mask=mask, other=0.0).to(gl.float16)
    return cos, gl.load(sin_ptr + at, mask=mask, other=0.0).to(gl.float16)


@gluon.jit
def near_table(
    near_ptr, near_sines, at, WARPS: tl.constexpr, TOKENS: tl.constexpr, HALF: tl.constexpr, operand: tl.constexpr
):
    """Cosines and sines of 0 .. TOKENS - 1 tokens further, in shared memory, for each warp."""
    everywhere = gl.full((WARPS, TOKENS, HALF), 1.0, gl.float16, operand)
    table = gl.allocate_shared_memory(gl.float16, [2, WARPS, TOKENS, HALF], gl.SwizzledSharedLayout(8, 1, 8, [2, 1, 0]))
    table.index(0).store(gl.load(near_ptr + at).to(gl.float16) * everywhere)
    table.index(1).store(gl.load(near_ptr + near_sines + at).to(gl.float16) * everywhere)
    return table


@gluon.jit
def smoothing_of(
    scale_ptr, shift_ptr, at, HALF: tl.constexpr, SCALED: tl.constexpr, SHIFTED: tl.constexpr, operand: tl.constexpr
):
    """Scale and shift of the low channels, and of the high ones."""
    smoothing = ()
    for g in gl.static_range(2):
        scale = gl.full((1, 1, HALF), 1.0, gl.float16, operand)
        shift = gl.full((1, 1, HALF), 0.0, gl.float16, operand)
        if SCALED:
            scale = gl.load(scale_ptr + g * HALF + at).to(gl.float16)
        if SHIFTED:
            shift = gl.load(shift_ptr + g * HALF + at).to(gl.float16)
        smoothing = smoothing + ((scale, shift),)
    return smoothing


@gluon.jit
def turned_scores(
    low, high, minus_magic, grids, smoothing, near_cos, near_sin, queries, cos, sin, none, SMOOTHED: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """Scores of a step's tokens, of queries that are scaled already."""
    step = gl.expand_dims(grids[0], 2)
    zero = gl.expand_dims(grids[1], 2)
    low = raised(low, minus_magic, step, zero, PTX)
    high = raised(high, minus_magic, step, zero, PTX)
    if SMOOTHED:
        low = fused(low, smoothing[0][0], smoothing[0][1], PTX)
        high = fused(high, smoothing[1][0], smoothing[1][1], PTX)
    key = turned(low, high, near_cos, near_sin, PTX)
    back = turned(queries[1], queries[0], cos, sin, PTX)
    return mma_v2(key[1], back[0], mma_v2(key[0], back[1], none))


@gluon.jit
def fused(a, b, c, PTX: tl.constexpr):
    """a · b + c in float16, two numbers at a time."""
    if PTX:
        return gl.inline_asm_elementwise(
            "fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], gl.float16, is_pure=True, pack=2
        )
    else:
        return a * b + c


@gluon.jit
def raised(codes, minus_magic, step, zero, PTX: tl.constexpr):
    """What codes with a magic number on them stand for, in float16."""
    if PTX:
        codes = gl.inline_asm_elementwise(
            "add.rn.f16x2 $0, $1, $2;", "=r,r,r", [codes, minus_magic], gl.float16, is_pure=True, pack=2
        )
    else:
        codes = codes + minus_magic
    return fused(codes, step, zero, PTX)


@gluon.jit
def turned(low, high, cos, sin, PTX: tl.constexpr):
    """Pairs of channels, turned; in float16."""
    if PTX:
        first = gl.inline_asm_elementwise(
            "{.reg .b32 t; mul.rn.f16x2 t, $2, $4; neg.f16x2 t, t; fma.rn.f16x2 $0, $1, $3, t;}", "=r,r,r,r,r",
            [low, high, cos, sin], gl.float16, is_pure=True, pack=2,
        )  # fmt: skip
        second = gl.inline_asm_elementwise(
            "{.reg .b32 t; mul.rn.f16x2 t, $1, $4; fma.rn.f16x2 $0, $2, $3, t;}", "=r,r,r,r,r",
            [low, high, cos, sin], gl.float16, is_pure=True, pack=2,
        )  # fmt: skip
        return first, second
    else:
        return low * cos - high * sin, high * cos + low * sin
