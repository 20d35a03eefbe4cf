"""Codes as operands of the tensor cores, by relabelling registers; pieces of `hopper_decode`.

    a word of a token     bits 31-28 27-24 23-20 19-16 15-12 11-8 7-4 3-0      packing/code_bytes.py
                       channel  7     6     5     4     3     2    1   0

The inner axis of a product may be in any order that both operands share, and rows of a result in any order that whoever
reads it knows. So a lane's words become its operands where they are: the order is the one that comes of it.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportAssignmentType=false
# triton's decorators change signatures in ways that types do not tell
# ruff: noqa: RET505 - triton compiles what follows a return

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def along(axis: tl.constexpr, length: tl.constexpr, layout: tl.constexpr):
    """0 .. length - 1 along one axis of three, one wide along the others."""
    if axis == 0:
        return gl.expand_dims(gl.expand_dims(gl.arange(0, length, gl.SliceLayout(1, gl.SliceLayout(2, layout))), 1), 2)
    elif axis == 1:
        return gl.expand_dims(gl.expand_dims(gl.arange(0, length, gl.SliceLayout(0, gl.SliceLayout(2, layout))), 0), 2)
    else:
        return gl.expand_dims(gl.expand_dims(gl.arange(0, length, gl.SliceLayout(0, gl.SliceLayout(1, layout))), 0), 1)


@gluon.jit
def _neighbours(pairs):
    """The two float16 of every word, side by side."""
    low = (pairs & 0xFFFF).to(gl.int16).to(gl.float16, bitcast=True)
    return gl.join(low, (pairs >> 16).to(gl.int16).to(gl.float16, bitcast=True))


@gluon.jit
def _plus_magic(words, magic):
    """Nibbles 0 and 4, 1 and 5, ... of each word as float16, [..., half, far, next]: 1024 more, or 64 where next is 1."""
    moved = words >> 8
    near = _neighbours(words & 0x000F000F | magic[0])
    near_next = _neighbours(words & 0x00F000F0 | magic[1])
    far = _neighbours(moved & 0x000F000F | magic[0])
    far_next = _neighbours(moved & 0x00F000F0 | magic[1])
    return gl.join(gl.join(near, far), gl.join(near_next, far_next))


@gluon.jit
def of_group(x, g: tl.constexpr, GROUPS: tl.constexpr):
    """The g-th part of the last axis, of one or two."""
    if GROUPS == 1:
        return x
    else:
        SHAPE: tl.constexpr = x.shape
        first, second = gl.split(gl.permute(gl.reshape(x, (SHAPE[0], SHAPE[1], 2, SHAPE[2] // 2)), (0, 1, 3, 2)))
        if g == 0:
            return first
        else:
            return second


@gluon.jit
def keys_operand(words, magic, WARPS: tl.constexpr, TOKENS: tl.constexpr, WORDS: tl.constexpr, operand: tl.constexpr):
    """Words [WARPS, TOKENS, WORDS] as the left operand [WARPS, TOKENS, 8 · WORDS]; `channel_of_key` tells the order."""
    a = gl.reshape(_plus_magic(words, magic), (WARPS, TOKENS, 4, WORDS // 4, 2, 2, 2))
    a = gl.reshape(gl.permute(a, (0, 1, 3, 5, 6, 2, 4)), (WARPS, TOKENS, 8 * WORDS))
    return gl.convert_layout(a, operand, assert_trivial=True)


@gluon.jit
def as_channels(x, WARPS: tl.constexpr, WORDS: tl.constexpr, operand: tl.constexpr):
    """[WARPS, 8 · WORDS] for each channel as [WARPS, 8 · WORDS, 1] of the right operand, in the order of its inner axis."""
    x = gl.reshape(x, (WARPS, 4, WORDS // 4, 2, 2, 2))  # lane, lane's words, half, far, next
    x = gl.reshape(gl.permute(x, (0, 2, 4, 5, 1, 3)), (WARPS, 8 * WORDS))
    return gl.expand_dims(gl.convert_layout(x, gl.SliceLayout(2, operand), assert_trivial=True), 2)


@gluon.jit
def channel_of_key(k, WORDS: tl.constexpr):
    """The channel, within its group, at place k of the product's inner axis."""
    word = (k >> 1 & 3) * (WORDS // 4) + (k >> 5)
    return word * 8 + (k & 1) * 4 + (k >> 4 & 1) * 2 + (k >> 3 & 1)


@gluon.jit
def values_operand(
    words, magic, WARPS: tl.constexpr, TOKENS: tl.constexpr, WORDS: tl.constexpr, operand: tl.constexpr
):  # fmt: skip
    """Words [WARPS, TOKENS, WORDS] as the left operand [WARPS, 8 · WORDS, TOKENS]; `channel_of_value` tells the order."""
    pairs = gl.permute(gl.reshape(words, (WARPS, TOKENS // 2, 2, WORDS)), (0, 1, 3, 2))
    even, odd = gl.split(pairs)
    low = even & 0xFFFF | odd << 16
    high = even >> 16 & 0xFFFF | odd & -65536
    # warp pairs of tokens, lane's words, token of the pair, far, next, half
    a = gl.join(_plus_magic(low, magic), _plus_magic(high, magic))
    a = gl.reshape(a, (WARPS, TOKENS // 2, 8, WORDS // 8, 2, 2, 2, 2))
    a = gl.reshape(gl.permute(a, (0, 3, 7, 5, 6, 2, 1, 4)), (WARPS, 8 * WORDS, TOKENS))
    return gl.convert_layout(a, operand, assert_trivial=True)


@gluon.jit
def channel_of_value(m, WORDS: tl.constexpr):
    """The channel, within its group, of row m of the product."""
    word = (m & 7) * (WORDS // 8) + (m >> 6)
    return word * 8 + (m >> 5 & 1) * 4 + (m >> 4 & 1) * 2 + (m >> 3 & 1)


@gluon.jit
def repeated(tile, TIMES: tl.constexpr, WARPS: tl.constexpr, HEADS: tl.constexpr, layout: tl.constexpr):
    """[WARPS, 16, HEADS], TIMES times over each other."""
    many = tile
    for log in gl.static_range(4):
        if 2**log < TIMES:
            many = gl.join(many, many)
    many = gl.permute(gl.reshape(many, (WARPS, 16, HEADS, TIMES)), (0, 3, 1, 2))
    return gl.convert_layout(gl.reshape(many, (WARPS, TIMES * 16, HEADS)), layout, assert_trivial=True)


@gluon.jit
def over_registers(x, WARPS: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, layout: tl.constexpr):
    """Sums over every 16th token, [WARPS, 16, HEADS]: no lane asks another."""
    sums = gl.sum(gl.reshape(x, (WARPS, TOKENS // 16, 16, HEADS)), 1)
    return gl.convert_layout(sums, layout, assert_trivial=True)


@gluon.jit
def power_of_2(x, PTX: tl.constexpr):
    """2**x; in PTX without the instructions that make subnormal results."""
    if PTX:
        return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], gl.float32, is_pure=True, pack=1)
    else:
        return gl.exp2(x)


@gluon.jit
def log_2(x, PTX: tl.constexpr):
    """log2 x of a normal x, within 2**-20."""
    if PTX:
        return gl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], gl.float32, is_pure=True, pack=1)
    else:
        return gl.log2(x)
