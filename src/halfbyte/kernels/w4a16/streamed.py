"""Prepared 4-bit weight times a few tokens, symmetric groups of 128: yᵀ = W · xᵀ with `wgmma`, the weight a stream.

A program has 64 / FOLD outputs and all of their inputs, so that nobody shares a sum with another program, and its warps
meet in a ring of STAGES slots in shared memory; a step is UNITS · FOLD · 128 inputs:

    loader         1 warp     words and scales, by the copy engine ─► slot
    loader         1 warp     x ─► slot, once the kernel before this one has ended
    crews          of 4       slot ─► code + magic - offset, exact ─► wgmma with xᵀ of the slot ─► · scale, added up in float32

TURNS crews take the steps in turns; what they have is added up in shared memory. STAGES is a multiple of TURNS: a slot
belongs to one crew, which so sees all of its phases. Or TILES crews stand side by side over 64 outputs each, for the same x.
A launch fetches its weight while the kernel before it ends: where there are places for the programs of the next launch,
memory never idles.

Where outputs are few, FOLD is 2: a row of the operand takes the inputs in turns of 128 with the row 32 below it, and x is
there twice, once for each turn. Two of the four quarters of what comes out are the sums; see kernels/w4a8/folded.py.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportAssignmentType=false
# triton's decorators change signatures in ways that types do not tell
# ruff: noqa: RUF005 - triton has no stars in tuples

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from halfbyte.kernels.ring import after, barrier, fetch
from halfbyte.kernels.w4a16.codes import plus_magic
from halfbyte.kernels.w4a16.prepared import TensorCoreWeight, magics
from halfbyte.kernels.w4a16.tilings import EARLY, GROUP, Streamed


@gluon.jit
def _load_weight(
    words_tiles, scales_tiles, words_ring, scales_ring, full, empty, steps,
    BLOCK_M: tl.constexpr, FOLD: tl.constexpr, TILES: tl.constexpr, UNITS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The weight is there for good, and so it does not wait for the kernel before this one."""
    IN_TILES: tl.constexpr = UNITS * FOLD * 2  # of a step
    first = gl.program_id(0) * TILES // FOLD
    half = gl.program_id(0) % FOLD
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(1)  # slots begin empty
    for step in range(steps):
        ready = full.index(slot)
        mbarrier.wait(empty.index(slot), phase)
        mbarrier.expect(ready, UNITS * (FOLD * BLOCK_M * 256 + TILES * (4096 + FOLD * 128)))
        for tile in gl.static_range(TILES):
            at = first + tile
            fetch(words_tiles, [at, step * IN_TILES, half * 8, 0], ready, words_ring.index(slot * TILES + tile))
            fetch(scales_tiles, [step * (UNITS * FOLD), at * 8, 0], ready, scales_ring.index(slot * TILES + tile))
        slot, phase = after(slot, phase, 1, STAGES)


@gluon.jit
def _load_x(x_tiles, x_ring, full, empty, steps, FOLD: tl.constexpr, UNITS: tl.constexpr, STAGES: tl.constexpr):
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(1)
    gdc_wait()
    for step in range(steps):
        mbarrier.wait(empty.index(slot), phase)
        for part in gl.static_range(UNITS * 2):
            at = [(step * UNITS + part // 2) * FOLD, part % 2, 0, 0]
            fetch(x_tiles, at, full.index(slot), x_ring.index(slot * (UNITS * 2) + part))
        slot, phase = after(slot, phase, 1, STAGES)


@gluon.jit
def _scales(pairs, half, dtype: tl.constexpr, FOLD: tl.constexpr, layout: tl.constexpr):
    """Pairs of scales [FOLD, 8, 4] as float32 for the rows of a crew, [64, 1]."""
    #                          turn row half strip
    pairs = gl.permute(gl.reshape(pairs, (FOLD, 8, FOLD, 4 // FOLD)), (0, 3, 1, 2))
    if FOLD == 2:
        first, second = gl.split(pairs)
        pairs = gl.where(half == 0, first, second)
    pairs = gl.reshape(pairs, (4, 8))
    if dtype == gl.bfloat16:
        low = (pairs << 16).to(gl.float32, bitcast=True)
        high = (pairs & -0x10000).to(gl.float32, bitcast=True)
    else:
        low = (pairs & 0xFFFF).to(gl.int16).to(dtype, bitcast=True).to(gl.float32)
        high = (pairs >> 16).to(gl.int16).to(dtype, bitcast=True).to(gl.float32)
    both = gl.reshape(gl.permute(gl.join(low, high), (0, 2, 1)), (64,))
    return gl.expand_dims(gl.convert_layout(both, layout, assert_trivial=True), 1)


@gluon.jit
def _operand(words, tile: tl.constexpr, magic, magic8, dtype: tl.constexpr, FOLD: tl.constexpr, left: tl.constexpr):
    """Codes less 8 of one tile of 64 inputs, of two, [64, 64]; words [1, 2 · FOLD, 16 / FOLD, 32]."""
    #                          turn tile strip row pair step
    words = gl.permute(gl.reshape(words, (FOLD, 2, 4 // FOLD, 8, 4, 4)), (0, 2, 3, 4, 5, 1))
    first, second = gl.split(gl.reshape(words, (4, 8, 4, 4, 2)))
    rows, rows8 = plus_magic(first if tile == 0 else second, magic, magic8, dtype)
    rows -= 136.0 if dtype == gl.bfloat16 else 1032.0
    rows8 -= 136.0 if dtype == gl.bfloat16 else 72.0
    # strip row pair step next far half                strip half row step far pair next
    a = gl.permute(gl.join(rows, rows8), (0, 6, 1, 3, 5, 2, 4))
    return gl.convert_layout(gl.reshape(a, (64, 64)), left, assert_trivial=True)


@gluon.jit
def _add_steps(
    worker: tl.constexpr, x_ring, words_ring, scales_ring, full, empty, steps, magic, magic8,
    BLOCK_M: tl.constexpr, FOLD: tl.constexpr, TURNS: tl.constexpr, TILES: tl.constexpr, UNITS: tl.constexpr,
    STAGES: tl.constexpr, sums: tl.constexpr,
):  # fmt: skip
    """The sums of every TURNS-th step, [64, FOLD · BLOCK_M]."""
    BEGIN: tl.constexpr = worker % TURNS
    dtype: tl.constexpr = x_ring.dtype
    left: tl.constexpr = gl.DotOperandLayout(0, sums, 2)
    rows: tl.constexpr = gl.SliceLayout(1, sums)
    #                                                 turn and tile, strip and row, words
    of_words: tl.constexpr = gl.BlockedLayout([1, 2, 1, 4], [1, 1, 4, 8], [1, FOLD, 4 // FOLD, 1], [3, 2, 1, 0])
    # the four lanes of a row hold the same                     turn row strip
    of_pairs: tl.constexpr = gl.SliceLayout(
        0, gl.BlockedLayout([1, 1, 1, 1], [4, 1, 8, 1], [1, FOLD, 1, 4 // FOLD], [0, 2, 3, 1])
    )
    half = gl.program_id(0) % FOLD
    none = gl.full((64, FOLD * BLOCK_M), 0.0, gl.float32, sums)
    total = none
    slot = gl.to_tensor(BEGIN % STAGES)
    phase = gl.to_tensor(BEGIN // STAGES % 2)
    for _ in range(BEGIN, steps, TURNS):
        mbarrier.wait(full.index(slot), phase)
        products = ()
        scales = ()
        for unit in gl.static_range(UNITS):
            piece = slot * TILES + worker % TILES
            pairs = scales_ring.index(piece).slice(unit * FOLD, FOLD, 0).load(of_pairs)
            scales = scales + (_scales(pairs, half, dtype, FOLD, rows),)
            words = words_ring.index(piece).slice(unit * FOLD * 2, FOLD * 2, 1).load(of_words)
            product = none
            for tile in gl.static_range(2):
                a = _operand(words, tile, magic, magic8, dtype, FOLD, left)
                xt = x_ring.index((slot * UNITS + unit) * 2 + tile).reshape((FOLD * BLOCK_M, 64)).permute((1, 0))
                product = warpgroup_mma(a, xt, product, use_acc=tile > 0, is_async=True)
            products = products + (product,)
        # nothing is pending when the loop goes round: ptxas would give the operands' registers away
        if UNITS == 1:
            products = (warpgroup_mma_wait(0, deps=products),)
        else:
            products = warpgroup_mma_wait(0, deps=products)
        mbarrier.arrive(empty.index(slot), count=1)
        for unit in gl.static_range(UNITS):
            total += products[unit] * scales[unit]
        slot, phase = after(slot, phase, TURNS, STAGES)
    return total


@gluon.jit
def _multiply(
    worker: tl.constexpr, given,
    HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, FOLD: tl.constexpr, TURNS: tl.constexpr, TILES: tl.constexpr,
    UNITS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    (
        x_ring, words_ring, scales_ring, left, full, empty, done, y_ptr, bias_ptr, tokens, outs, steps, magic, magic8,
    ) = given  # fmt: skip
    sums: tl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, FOLD * BLOCK_M, 16])
    OUTS: tl.constexpr = 64 // FOLD
    of_y: tl.constexpr = gl.BlockedLayout([1, 1], [32, 1], [1, 4], [0, 1])
    total = _add_steps(
        worker, x_ring, words_ring, scales_ring, full, empty, steps, magic, magic8, BLOCK_M, FOLD, TURNS, TILES, UNITS,
        STAGES, sums,
    )  # fmt: skip
    left.index(worker).store(total)
    if worker % TURNS > 0:
        mbarrier.arrive(done.index(0), count=1)
    else:
        if TURNS > 1:
            mbarrier.wait(done.index(0), 0)
        else:
            barrier()
        n = (gl.program_id(0) * TILES + worker // TURNS) * OUTS + gl.expand_dims(
            gl.arange(0, OUTS, gl.SliceLayout(1, of_y)), 1
        )
        m = gl.expand_dims(gl.arange(0, BLOCK_M, gl.SliceLayout(0, of_y)), 0)
        y = gl.full((OUTS, BLOCK_M), 0.0, gl.float32, of_y)
        for part in gl.static_range(TURNS * FOLD):
            quarter = left.index(worker + part // FOLD).slice(part % FOLD * OUTS, OUTS, 0)
            y += quarter.slice(part % FOLD * BLOCK_M, BLOCK_M, 1).load(of_y)
        if HAS_BIAS:
            y += gl.load(bias_ptr + n, mask=n < outs, other=0.0).to(gl.float32)
        gdc_wait()
        gl.store(y_ptr + m.to(gl.int64) * outs + n, y.to(y_ptr.dtype.element_ty), mask=(m < tokens) & (n < outs))


@gluon.jit(do_not_specialize=["tokens", "outs", "steps"])
def _streamed_kernel(
    x_tiles, words_tiles, scales_tiles, y_ptr, bias_ptr, tokens, outs, steps, magic, magic8,
    HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, FOLD: tl.constexpr, TURNS: tl.constexpr, TILES: tl.constexpr,
    UNITS: tl.constexpr, STAGES: tl.constexpr, REGISTERS: tl.constexpr,
):  # fmt: skip
    """A crew for each of TURNS in turns, or for each of TILES tiles side by side."""
    WORKERS: tl.constexpr = TURNS * TILES
    gdc_launch_dependents()
    x_ring = gl.allocate_shared_memory(
        x_tiles.dtype, [STAGES * UNITS * 2, FOLD, 1, BLOCK_M, 64], gl.NVMMASharedLayout(128, 16, 4)
    )
    words_ring = gl.allocate_shared_memory(
        gl.int32, [STAGES * TILES, 1, UNITS * FOLD * 2, 16 // FOLD, 32], gl.NVMMASharedLayout(128, 32, 4)
    )
    scales_ring = gl.allocate_shared_memory(
        gl.int32, [STAGES * TILES, UNITS * FOLD, 8, 4], gl.NVMMASharedLayout(0, 32, 3)
    )
    left = gl.allocate_shared_memory(
        gl.float32, [WORKERS, 64, FOLD * BLOCK_M], gl.SwizzledSharedLayout(1, 1, 1, [0, 1])
    )
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    done = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=TILES)
    mbarrier.init(done.index(0), count=TURNS - 1 if TURNS > 1 else 1)
    fence_async_shared()
    W0: tl.constexpr = 0
    W1: tl.constexpr = 1
    given = (
        x_ring, words_ring, scales_ring, left, full, empty, done, y_ptr, bias_ptr, tokens, outs, steps, magic, magic8,
    )  # fmt: skip
    # what is constant is written out: in a variable it would be so no longer
    if WORKERS == 1:
        gl.warp_specialize([
        (_multiply, (W0, given, HAS_BIAS, BLOCK_M, FOLD, TURNS, TILES, UNITS, STAGES)),
        (_load_weight, (
            words_tiles, scales_tiles, words_ring, scales_ring, full, empty, steps, BLOCK_M, FOLD, TILES, UNITS, STAGES,
        )),
        (_load_x, (x_tiles, x_ring, full, empty, steps, FOLD, UNITS, STAGES)),
        ], [1, 1], [24, 24])  # fmt: skip
    else:
        gl.warp_specialize([
        (_multiply, (W0, given, HAS_BIAS, BLOCK_M, FOLD, TURNS, TILES, UNITS, STAGES)),
        (_multiply, (W1, given, HAS_BIAS, BLOCK_M, FOLD, TURNS, TILES, UNITS, STAGES)),
        (_load_weight, (
            words_tiles, scales_tiles, words_ring, scales_ring, full, empty, steps, BLOCK_M, FOLD, TILES, UNITS, STAGES,
        )),
        (_load_x, (x_tiles, x_ring, full, empty, steps, FOLD, UNITS, STAGES)),
        ], [4, 1, 1], [REGISTERS, 24, 24])  # fmt: skip


def matmul(x: Tensor, weight: TensorCoreWeight, bias: Tensor | None, streamed: Streamed) -> Tensor:
    """x · Wᵀ + bias for at most `streamed.block_m` tokens and symmetric groups of 128; rows of x start on 16 bytes."""
    (tokens, ins), (out_tiles, in_tiles, _) = x.shape, weight.words.shape
    y = torch.empty(tokens, weight.outs, dtype=x.dtype, device=x.device)
    fold, units = streamed.fold, streamed.units
    pairs = weight.scales.view(torch.int32)
    _streamed_kernel[(triton.cdiv(out_tiles * fold, streamed.tiles),)](
        TensorDescriptor(
            x, [ins // GROUP, 2, tokens, 64], [GROUP, 64, x.stride(0), 1], [fold, 1, streamed.block_m, 64],
            gl.NVMMASharedLayout(128, 16, 4),
        ),
        TensorDescriptor(
            weight.words, [out_tiles, in_tiles, 16, 32], [in_tiles * 512, 512, 32, 1],
            [1, units * fold * 2, 16 // fold, 32], gl.NVMMASharedLayout(128, 32, 4),
        ),
        TensorDescriptor(
            pairs, [pairs.shape[0], out_tiles * 8, 4], [out_tiles * 32, 4, 1], [units * fold, 8, 4],
            gl.NVMMASharedLayout(0, 32, 3),
        ),
        y, y if bias is None else bias,
        tokens, weight.outs, triton.cdiv(ins, units * fold * GROUP), *magics(x.dtype),
        bias is not None, streamed.block_m, fold, streamed.turns, streamed.tiles, units, streamed.stages,
        streamed.worker_registers,
        num_warps=4, launch_pdl=EARLY, maxnreg=streamed.launch_registers,
    )  # fmt: skip
    return y
