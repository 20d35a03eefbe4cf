"""The inner loops of `blocks` for 16-bit tokens: 4-bit words become 16-bit floats in registers, as in kernels/w4a16.

many tokens    (code + magic - offset) · scale is the operand, as in w4a16/many_tokens.py: rounded once, like a decoded weight
few            code + magic - offset = code - 8, exactly, is the operand, and a group's sum is scaled in float32

What few spare is 32 multiplications for each 128 inputs of a lane, for one of each of its sums.
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
from halfbyte.kernels.w4a16.codes import plus_magic


@gluon.jit
def _plus_magic(words_piece, at, magic, magic8, dtype: tl.constexpr, EACH: tl.constexpr, wide: tl.constexpr):
    """Code + magic of rows r and of rows r + 8, for 64 inputs, whose words are the piece's rows from `at` on."""
    of_words: tl.constexpr = gl.BlockedLayout([EACH, 1, 4], [1, 4, 8], [1, 4, 1], [2, 1, 0])
    narrow: tl.constexpr = gl.SliceLayout(5, gl.SliceLayout(6, wide))
    words = gl.reshape(words_piece.slice(at, 16, 1).load(of_words), (EACH, 4, 8, 4, 4))
    words = gl.convert_layout(words, narrow, assert_trivial=True)
    rows, rows8 = plus_magic(words, magic, magic8, dtype)
    rows = gl.convert_layout(rows, wide, assert_trivial=True)
    return rows, gl.convert_layout(rows8, wide, assert_trivial=True)


@gluon.jit
def _operand(rows, rows8, EACH: tl.constexpr, left: tl.constexpr):
    #                                  tile strip half row step far pair next
    a = gl.permute(gl.join(rows, rows8), (0, 1, 7, 2, 4, 6, 3, 5))
    return gl.convert_layout(gl.reshape(a, (EACH * 64, 64)), left, assert_trivial=True)


@gluon.jit
def _of_rows(pairs, dtype: tl.constexpr, EACH: tl.constexpr, layout: tl.constexpr):
    """Pairs of scales [1, 32 · EACH] as float32 for every output, [64 · EACH, 1]."""
    low = (pairs & 0xFFFF).to(gl.int16).to(dtype, bitcast=True).to(gl.float32)
    high = (pairs >> 16).to(gl.int16).to(dtype, bitcast=True).to(gl.float32)
    both = gl.permute(gl.reshape(gl.join(low, high), (EACH, 4, 8, 2)), (0, 1, 3, 2))
    return gl.expand_dims(gl.convert_layout(gl.reshape(both, (EACH * 64,)), layout, assert_trivial=True), 1)


@gluon.jit
def add_halves(
    total, slot, phase, count, worker: tl.constexpr, x_ring, words_ring, scales_ring, full, empty, magic, magic8,
    BLOCK_M: tl.constexpr, WORKERS: tl.constexpr, EACH: tl.constexpr, UNITS: tl.constexpr, PARTS: tl.constexpr,
    STAGES: tl.constexpr, sums: tl.constexpr,
):  # fmt: skip
    """Add so many steps to `total`; arguments as those of kernels/w4a8/sums.py. x has two tiles of 64 inputs to a unit."""
    FEW: tl.constexpr = BLOCK_M <= 32
    TOGETHER: tl.constexpr = UNITS > 1 and BLOCK_M <= 16  # registers hold the sums of all units
    dtype: tl.constexpr = x_ring.dtype
    left: tl.constexpr = gl.DotOperandLayout(0, sums, 2)
    of_rows: tl.constexpr = gl.SliceLayout(1, sums)
    # the four lanes of a row hold the same
    of_pairs: tl.constexpr = gl.BlockedLayout([1, 1], [4, 8], [1, 4], [0, 1])
    # tile, strip, row, pair, step, next, far: a lane has all steps of its row and pair
    wide: tl.constexpr = gl.BlockedLayout(
        [EACH, 1, 1, 1, 4, 2, 2], [1, 1, 8, 4, 1, 1, 1], [1, 4, 1, 1, 1, 1, 1], [6, 5, 4, 3, 2, 1, 0]
    )
    offset = gl.full((1, 1, 1, 1, 1, 1, 1), 136.0 if dtype == gl.bfloat16 else 1032.0, dtype, wide)
    offset8 = gl.full((1, 1, 1, 1, 1, 1, 1), 136.0 if dtype == gl.bfloat16 else 72.0, dtype, wide)
    none = gl.full((EACH * 64, BLOCK_M), 0.0, gl.float32, sums)
    for _ in range(count):
        mbarrier.wait(full.index(slot), phase)
        products = ()
        scales = ()
        for unit in gl.static_range(UNITS):
            pairs = scales_ring.index(slot * WORKERS + worker).slice(unit % PARTS, 1, 0).load(of_pairs)
            product = none if FEW else total
            if not FEW:
                pairs = gl.reshape(pairs, (EACH, 4, 8, 1, 1, 1, 1))
                pairs = gl.convert_layout(pairs, wide, assert_trivial=True)
                scale = (pairs & 0xFFFF).to(gl.int16).to(dtype, bitcast=True)
                scale8 = (pairs >> 16).to(gl.int16).to(dtype, bitcast=True)
            piece = words_ring.index(slot * WORKERS + worker)
            for half in gl.static_range(2):
                rows, rows8 = _plus_magic(piece, unit * 32 + half * 16, magic, magic8, dtype, EACH, wide)
                rows -= offset
                rows8 -= offset8
                if not FEW:
                    rows *= scale
                    rows8 *= scale8
                xt = x_ring.index((slot * UNITS + unit) * 2 + half).permute((1, 0))
                product = warpgroup_mma(_operand(rows, rows8, EACH, left), xt, product, is_async=True)
            if TOGETHER:
                products = products + (product,)
                scales = scales + (_of_rows(pairs, dtype, EACH, of_rows),)
            elif FEW:
                total += warpgroup_mma_wait(0, deps=[product]) * _of_rows(pairs, dtype, EACH, of_rows)
            else:
                total = product
        # nothing is pending when the loop goes round: ptxas would give the operands' registers away
        if TOGETHER:
            products = warpgroup_mma_wait(0, deps=products)
        elif not FEW:
            total = warpgroup_mma_wait(0, deps=[total])
        mbarrier.arrive(empty.index(slot), count=1)
        if TOGETHER:
            for unit in gl.static_range(UNITS):
                total += products[unit] * scales[unit]
        slot, phase = after(slot, phase, 1, STAGES)
    return total, slot, phase
