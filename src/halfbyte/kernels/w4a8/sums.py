"""The inner loop of `blocks`: 4-bit words become int8 lanes in registers, and these are multiplied and summed.

`signs` are 0x80808080, the sign bits of four bytes: an argument, since as a constant the compiler would take bytes apart.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportAssignmentType=false
# triton's decorators change signatures in ways that types do not tell
# ruff: noqa: RUF005 - triton has no stars in tuples

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from halfbyte.kernels.ring import after

FLOAT = tl.constexpr(0)
WEIGHT = tl.constexpr(2)  # 1 is INTEGER, see `blocks`
UPPER_HALVES = tl.constexpr(-0x0F0F0F10)  # 0xF0F0F0F0 as int32


@gluon.jit
def _sixteenfold(words, signs):
    """16 · code of rows r and of rows r + 8, [..., 4]: the code stays in the upper half of its byte."""
    return _lanes(words << 4 & UPPER_HALVES ^ signs), _lanes(words & UPPER_HALVES ^ signs)


@gluon.jit
def _plain(words, signs):
    """The codes of rows r and of rows r + 8, [..., 4]. With a bit set above it, no byte borrows from the next."""
    low = (words & 0x0F0F0F0F | signs) - 0x08080808
    high = (words >> 4 & 0x0F0F0F0F | signs) - 0x08080808
    return _lanes(low ^ signs), _lanes(high ^ signs)


@gluon.jit
def _scaled(words, scale, scale8, signs):
    """Code · scale of rows r and of rows r + 8, [..., 4], where they are int8: four products by one multiplication.

    A byte of `(code + 8) · scale + (128 - 8 · scale)` is code · scale + 128, from 0 to 255: what carries, carries back.
    """
    low = (words & 0x0F0F0F0F) * scale + (signs - scale * 0x08080808)
    high = (words >> 4 & 0x0F0F0F0F) * scale8 + (signs - scale8 * 0x08080808)
    return _lanes(low ^ signs), _lanes(high ^ signs)


@gluon.jit
def _lanes(words):
    """The four bytes of every word, side by side."""
    even = gl.join(words.to(gl.int8), (words >> 16).to(gl.int8))
    odd = gl.join((words >> 8).to(gl.int8), (words >> 24).to(gl.int8))
    return gl.join(even, odd)


@gluon.jit
def operand(words, pairs, signs, EACH: tl.constexpr, KIND: tl.constexpr, HIGH: tl.constexpr, left: tl.constexpr):
    """Words [EACH, 32, 32], with their pairs of scales [1, 32 · EACH], as int8 lanes [64 · EACH, 128]."""
    #                         tile half strip row pair step far
    words = gl.reshape(words, (EACH, 2, 4, 8, 4, 2, 2))
    if KIND == WEIGHT:
        pairs = gl.reshape(pairs, (EACH, 1, 4, 8, 1, 1, 1))
        pairs = gl.convert_layout(pairs, words.type.layout, assert_trivial=True)
        rows, rows8 = _scaled(words, pairs & 0xFFFF, pairs >> 16, signs)
    elif HIGH:
        rows, rows8 = _sixteenfold(words, signs)
    else:
        rows, rows8 = _plain(words, signs)
    #                                  tile strip eight row half step far pair lane
    a = gl.permute(gl.join(rows, rows8), (0, 2, 9, 3, 1, 5, 6, 4, 7, 8))
    return gl.convert_layout(gl.reshape(a, (EACH * 64, 128)), left, assert_trivial=True)


@gluon.jit
def of_rows(pairs, EACH: tl.constexpr, KIND: tl.constexpr, layout: tl.constexpr):
    """Pairs of scales [1, 32 · EACH] as float32, or int32, for every output, [64 · EACH, 1]."""
    if KIND == FLOAT:
        low = (pairs << 16).to(gl.float32, bitcast=True)
        high = (pairs & -0x10000).to(gl.float32, bitcast=True)
    else:
        low = pairs << 16 >> 16
        high = pairs >> 16
    both = gl.permute(gl.reshape(gl.join(low, high), (EACH, 4, 8, 2)), (0, 1, 3, 2))
    return gl.expand_dims(gl.convert_layout(gl.reshape(both, (EACH * 64,)), layout, assert_trivial=True), 1)


@gluon.jit
def add_steps(
    total, none, slot, phase, count, worker: tl.constexpr, x_ring, words_ring, scales_ring, full, empty, signs,
    KIND: tl.constexpr, HIGH: tl.constexpr, BLOCK_M: tl.constexpr, WORKERS: tl.constexpr, EACH: tl.constexpr,
    UNITS: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr, sums: tl.constexpr,
):  # fmt: skip
    """Add so many steps to `total`."""
    TOGETHER: tl.constexpr = UNITS > 1 and BLOCK_M * EACH * UNITS <= 128  # registers hold the sums of all units
    left: tl.constexpr = gl.DotOperandLayout(0, sums, 4)
    rows: tl.constexpr = gl.SliceLayout(1, sums)
    of_words: tl.constexpr = gl.BlockedLayout([EACH, 1, 4], [1, 4, 8], [1, 4, 1], [2, 1, 0])
    # the four lanes of a row hold the same
    of_pairs: tl.constexpr = gl.BlockedLayout([1, 1], [4, 8], [1, 4], [0, 1])
    for _ in range(count):
        mbarrier.wait(full.index(slot), phase)
        products = ()
        scales = ()
        for unit in gl.static_range(UNITS):
            pairs = scales_ring.index(slot * WORKERS + worker).slice(unit % PARTS, 1, 0).load(of_pairs)
            words = words_ring.index(slot * WORKERS + worker).slice(unit * 32, 32, 1).load(of_words)
            a = operand(words, pairs, signs, EACH, KIND, HIGH, left)
            xt = x_ring.index(slot * UNITS + unit).permute((1, 0))
            if KIND == WEIGHT:
                total = warpgroup_mma(a, xt, total, is_async=True)
            else:
                scale = of_rows(pairs, EACH, KIND, rows)
                product = warpgroup_mma(a, xt, none, use_acc=False, is_async=True)
                if not TOGETHER and unit > 0:
                    # while the tensor cores multiply this unit, the one before it is scaled
                    before, product = warpgroup_mma_wait(1, deps=(products[0], product))
                    total += before.to(total.dtype) * scales[0]
                    products = ()
                    scales = ()
                products = products + (product,)
                scales = scales + (scale,)
        # nothing is pending when the loop goes round: ptxas would give the operands' registers away
        if KIND == WEIGHT:
            total = warpgroup_mma_wait(0, deps=[total])
        elif len(products) == 1:
            products = (warpgroup_mma_wait(0, deps=products),)
        else:
            products = warpgroup_mma_wait(0, deps=products)
        mbarrier.arrive(empty.index(slot), count=1)
        for i in gl.static_range(len(products)):
            total += products[i].to(total.dtype) * scales[i]
        slot, phase = after(slot, phase, 1, STAGES)
    return total, slot, phase


@gluon.jit
def by_lanes(total, EACH: tl.constexpr, BLOCK_M: tl.constexpr, lanes: tl.constexpr):
    """Sums [64 · EACH, BLOCK_M] as [registers, threads, 2]: what one instruction of a crew stores lies side by side."""
    #                         tile  strip half row columns pair next
    both = gl.reshape(total, (EACH, 4, 2, 8, BLOCK_M // 8, 4, 2))
    both = gl.reshape(gl.permute(both, (0, 2, 4, 1, 3, 5, 6)), (EACH * BLOCK_M // 4, 128, 2))
    return gl.convert_layout(both, lanes, assert_trivial=True)


@gluon.jit
def by_rows(both, EACH: tl.constexpr, BLOCK_M: tl.constexpr, sums: tl.constexpr):
    """The inverse of `by_lanes`."""
    total = gl.permute(gl.reshape(both, (EACH, 2, BLOCK_M // 8, 4, 8, 4, 2)), (0, 3, 1, 4, 2, 5, 6))
    return gl.convert_layout(gl.reshape(total, (EACH * 64, BLOCK_M)), sums, assert_trivial=True)
