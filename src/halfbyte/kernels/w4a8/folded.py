"""Prepared 4-bit weight times a few int8 tokens where outputs are few: nobody shares a sum with another program.

A block of 64 outputs is too much where there are 4096: half of the multiprocessors would idle, and to share blocks, as
`blocks` can, costs microseconds at the end of a launch. Here a program has 32 outputs and all of their inputs. Tensor cores
want 64 rows for a crew, so a row takes the inputs in turns of 128 with the row 32 below it, and the operand on the other
side has the tokens twice, once for each turn:

    rows  0 - 31   outputs 0 - 31, inputs   0 - 127 of 256   ┐    columns 0 .. T - 1     tokens, inputs   0 - 127
    rows 32 - 63   outputs 0 - 31, inputs 128 - 255          ┘  × columns T .. 2T - 1    tokens, inputs 128 - 255

Two of the four quarters of what comes out are the sums, the others are left alone. WORKERS crews take the steps of
UNITS · 256 inputs in turns; what they have is added up in shared memory. STAGES is a multiple of WORKERS: a slot belongs to
one crew, which so sees all of its phases; one that had missed two of them would take a slot for full that is not.

For the rest see `blocks`: ring, kinds, and that a launch fetches its weight while the kernel before it ends. There have to be
places for the programs of the next launch.
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
from halfbyte.kernels.w4a8.blocks import KINDS, SIGNS, added
from halfbyte.kernels.w4a8.prepared import PreparedWeight
from halfbyte.kernels.w4a8.sums import FLOAT, WEIGHT, of_rows, operand
from halfbyte.kernels.w4a8.tilings import EARLY, GROUP, Folded


@gluon.jit
def _fetch_weight(
    words_tiles, scales_tiles, words_ring, scales_ring, ready, slot, step, TOKENS: tl.constexpr, UNITS: tl.constexpr
):
    tile = gl.program_id(0) // 2
    half = gl.program_id(0) % 2
    mbarrier.expect(ready, UNITS * (TOKENS * 256 + 4096 + 128))
    fetch(words_tiles, [tile, step * (UNITS * 4), half * 8, 0], ready, words_ring.index(slot))
    fetch(scales_tiles, [step * (UNITS * 2), tile * 32 + half * 16], ready, scales_ring.index(slot))


@gluon.jit
def _fetch_x(x_tiles, x_ring, ready, slot, step, UNITS: tl.constexpr):
    for unit in gl.static_range(UNITS):
        fetch(x_tiles, [(step * UNITS + unit) * 2, 0, 0], ready, x_ring.index(slot * UNITS + unit))


@gluon.jit
def _load(
    loaded,
    TOKENS: tl.constexpr, UNITS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    (
        x_tiles, words_tiles, scales_tiles, x_ring, words_ring, scales_ring, full, empty, steps,
    ) = loaded  # fmt: skip
    early = gl.minimum(steps, STAGES)
    # the weight is there for good: only x may have to wait for the kernel before this one
    for step in range(early):
        ready = full.index(step)
        _fetch_weight(words_tiles, scales_tiles, words_ring, scales_ring, ready, step, step, TOKENS, UNITS)
    gdc_wait()
    for step in range(early):
        _fetch_x(x_tiles, x_ring, full.index(step), step, step, UNITS)
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    for step in range(early, steps):
        ready = full.index(slot)
        mbarrier.wait(empty.index(slot), phase)
        _fetch_weight(words_tiles, scales_tiles, words_ring, scales_ring, ready, slot, step, TOKENS, UNITS)
        _fetch_x(x_tiles, x_ring, ready, slot, step, UNITS)
        slot, phase = after(slot, phase, 1, STAGES)


@gluon.jit
def _add_turns(
    worker: tl.constexpr, x_ring, words_ring, scales_ring, full, empty, steps, signs,
    KIND: tl.constexpr, HIGH: tl.constexpr, TOKENS: tl.constexpr, WORKERS: tl.constexpr, UNITS: tl.constexpr,
    STAGES: tl.constexpr, sums: tl.constexpr,
):  # fmt: skip
    """The sums of every WORKERS-th step, [64, 2 · TOKENS]; see the module's docstring for which of them count."""
    real: tl.constexpr = gl.float32 if KIND == FLOAT else gl.int32
    left: tl.constexpr = gl.DotOperandLayout(0, sums, 4)
    rows: tl.constexpr = gl.SliceLayout(1, sums)
    #                                                turn and tile, strip and row, words
    of_words: tl.constexpr = gl.BlockedLayout([1, 2, 1, 4], [1, 1, 4, 8], [1, 2, 2, 1], [3, 2, 1, 0])
    # the four lanes of a row hold the same
    of_turns: tl.constexpr = gl.SliceLayout(0, gl.BlockedLayout([1, 1, 1], [4, 1, 8], [1, 2, 2], [0, 2, 1]))
    of_pairs: tl.constexpr = gl.BlockedLayout([1, 1], [4, 8], [1, 4], [0, 1])
    none = gl.full((64, 2 * TOKENS), 0, gl.int32, sums)
    total = gl.full((64, 2 * TOKENS), 0, real, sums)
    slot = gl.to_tensor(worker % STAGES)
    phase = gl.to_tensor(worker // STAGES % 2)
    for _ in range(worker, steps, WORKERS):
        mbarrier.wait(full.index(slot), phase)
        products = ()
        scales = ()
        for unit in gl.static_range(UNITS):
            pairs = gl.reshape(scales_ring.index(slot).slice(unit * 2, 2, 0).load(of_turns), (1, 32))
            pairs = gl.convert_layout(pairs, of_pairs, assert_trivial=True)
            words = words_ring.index(slot).slice(unit * 4, 4, 1).load(of_words)
            #                            turn tile strip row pair step and far
            words = gl.permute(gl.reshape(words, (2, 2, 2, 8, 4, 4)), (1, 0, 2, 3, 4, 5))
            a = operand(gl.reshape(words, (1, 32, 32)), pairs, signs, 1, KIND, HIGH, left)
            xt = x_ring.index(slot * UNITS + unit).reshape((2 * TOKENS, 128)).permute((1, 0))
            if KIND == WEIGHT:
                total = warpgroup_mma(a, xt, total, is_async=True)
            else:
                products = products + (warpgroup_mma(a, xt, none, use_acc=False, is_async=True),)
                scales = scales + (of_rows(pairs, 1, KIND, rows),)
        # nothing is pending when the loop goes round: ptxas would give the operands' registers away
        if KIND == WEIGHT:
            total = warpgroup_mma_wait(0, deps=[total])
        elif UNITS == 1:
            products = (warpgroup_mma_wait(0, deps=products),)
        else:
            products = warpgroup_mma_wait(0, deps=products)
        mbarrier.arrive(empty.index(slot), count=1)
        for i in gl.static_range(len(products)):
            total += products[i].to(real) * scales[i]
        slot, phase = after(slot, phase, WORKERS, STAGES)
    return total


@gluon.jit
def _multiply(
    worker: tl.constexpr, given,
    KIND: tl.constexpr, HIGH: tl.constexpr, HAS_BIAS: tl.constexpr, TOKENS: tl.constexpr, WORKERS: tl.constexpr,
    UNITS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    (
        x_ring, words_ring, scales_ring, left, full, empty, done, y_ptr, x_scales_ptr, row_scales_ptr, bias_ptr,
        bias_stride, tokens, outs, steps, signs,
    ) = given  # fmt: skip
    sums: tl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * TOKENS, 32])
    of_y: tl.constexpr = gl.BlockedLayout([1, 1], [32, 1], [1, 4], [0, 1])
    n = gl.program_id(0) * 32 + gl.expand_dims(gl.arange(0, 32, gl.SliceLayout(1, of_y)), 1)
    m = gl.expand_dims(gl.arange(0, TOKENS, gl.SliceLayout(0, of_y)), 0)
    if worker == 0:
        gdc_wait()
        x_scales = gl.load(x_scales_ptr + m, mask=m < tokens, other=0.0)
        row_scales = gl.load(row_scales_ptr + n, mask=n < outs, other=0.0)
    total = _add_turns(
        worker, x_ring, words_ring, scales_ring, full, empty, steps, signs, KIND, HIGH, TOKENS, WORKERS, UNITS, STAGES,
        sums,
    )  # fmt: skip
    left.index(worker).store(total)
    if worker > 0:
        mbarrier.arrive(done.index(0), count=1)
    else:
        if WORKERS > 1:
            mbarrier.wait(done.index(0), 0)
        else:
            barrier()
        total = left.index(0).slice(0, 32, 0).slice(0, TOKENS, 1).load(of_y)
        total += left.index(0).slice(32, 32, 0).slice(TOKENS, TOKENS, 1).load(of_y)
        for other in gl.static_range(WORKERS - 1):
            total += left.index(other + 1).slice(0, 32, 0).slice(0, TOKENS, 1).load(of_y)
            total += left.index(other + 1).slice(32, 32, 0).slice(TOKENS, TOKENS, 1).load(of_y)
        y = total.to(gl.float32) * x_scales * row_scales
        inside = (m < tokens) & (n < outs)
        if HAS_BIAS:
            y += gl.load(bias_ptr + m.to(gl.int64) * bias_stride + n, mask=inside, other=0.0).to(gl.float32)
        gl.store(y_ptr + m.to(gl.int64) * outs + n, y.to(y_ptr.dtype.element_ty), mask=inside)


@gluon.jit(do_not_specialize=["bias_stride", "tokens", "outs", "steps"])
def _folded_kernel(
    x_tiles, words_tiles, scales_tiles, y_ptr, x_scales_ptr, row_scales_ptr, bias_ptr, bias_stride, tokens, outs, steps,
    signs,
    KIND: tl.constexpr, HIGH: tl.constexpr, HAS_BIAS: tl.constexpr, TOKENS: tl.constexpr, WORKERS: tl.constexpr,
    UNITS: tl.constexpr, STAGES: tl.constexpr, REGISTERS: tl.constexpr,
):  # fmt: skip
    gdc_launch_dependents()
    x_ring = gl.allocate_shared_memory(gl.int8, [STAGES * UNITS, 2, TOKENS, 128], gl.NVMMASharedLayout(128, 8, 3))
    words_ring = gl.allocate_shared_memory(gl.int32, [STAGES, 1, UNITS * 4, 8, 32], gl.NVMMASharedLayout(128, 32, 4))
    scales_ring = gl.allocate_shared_memory(gl.int32, [STAGES, UNITS * 2, 16], gl.NVMMASharedLayout(0, 32, 2))
    real: tl.constexpr = gl.float32 if KIND == FLOAT else gl.int32
    left = gl.allocate_shared_memory(real, [WORKERS, 64, 2 * TOKENS], gl.SwizzledSharedLayout(1, 1, 1, [0, 1]))
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    done = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=1)
    mbarrier.init(done.index(0), count=WORKERS - 1 if WORKERS > 1 else 1)
    fence_async_shared()
    W0: tl.constexpr = 0
    W1: tl.constexpr = 1
    given = (
        x_ring, words_ring, scales_ring, left, full, empty, done, y_ptr, x_scales_ptr, row_scales_ptr, bias_ptr,
        bias_stride, tokens, outs, steps, signs,
    )  # fmt: skip
    loaded = (
        x_tiles, words_tiles, scales_tiles, x_ring, words_ring, scales_ring, full, empty, steps,
    )  # fmt: skip
    # what is constant is written out: in a variable it would be so no longer
    if WORKERS == 1:
        gl.warp_specialize([
        (_multiply, (W0, given, KIND, HIGH, HAS_BIAS, TOKENS, WORKERS, UNITS, STAGES)),
        (_load, (loaded, TOKENS, UNITS, STAGES)),
        ], [1], [24])  # fmt: skip
    else:
        gl.warp_specialize([
        (_multiply, (W0, given, KIND, HIGH, HAS_BIAS, TOKENS, WORKERS, UNITS, STAGES)),
        (_multiply, (W1, given, KIND, HIGH, HAS_BIAS, TOKENS, WORKERS, UNITS, STAGES)),
        (_load, (loaded, TOKENS, UNITS, STAGES)),
        ], [4, 1], [REGISTERS, 24])  # fmt: skip


def matmul(
    x: Tensor, x_scales: Tensor, weight: PreparedWeight, bias: Tensor | None, dtype: torch.dtype, folded: Folded
) -> Tensor:
    """x · Wᵀ + bias ([out] or [tokens, out]) for at most `folded.tokens` tokens, groups of 128; rows of x start on 16 bytes."""
    (tokens, ins), (out_tiles, in_tiles, _) = x.shape, weight.words.shape
    y = torch.empty(tokens, weight.outs, dtype=dtype, device=x.device)
    units = folded.units
    _folded_kernel[(out_tiles * 2,)](
        TensorDescriptor(
            x, [ins // GROUP, tokens, GROUP], [GROUP, x.stride(0), 1], [2, folded.tokens, GROUP],
            gl.NVMMASharedLayout(128, 8, 3),
        ),
        TensorDescriptor(
            weight.words, [out_tiles, in_tiles, 16, 32], [in_tiles * 512, 512, 32, 1], [1, units * 4, 8, 32],
            gl.NVMMASharedLayout(128, 32, 4),
        ),
        TensorDescriptor(
            weight.pairs, list(weight.pairs.shape), [weight.pairs.shape[1], 1], [units * 2, 16],
            gl.NVMMASharedLayout(0, 32, 2),
        ),
        y, x_scales, weight.row_scales, *added(y, bias),
        tokens, weight.outs, triton.cdiv(ins, units * 2 * GROUP), SIGNS,
        KINDS[weight.kind], weight.sixteenfold, bias is not None,
        folded.tokens, folded.workers, units, folded.stages, folded.worker_registers,
        num_warps=4, launch_pdl=EARLY, maxnreg=folded.launch_registers,
    )  # fmt: skip
    return y
