"""Prepared 4-bit weight times int8 tokens: yᵀ = W · xᵀ with `wgmma`, W unpacked in registers as its left operand.

A program has crews of warps that meet in a ring of STAGES slots in shared memory; a step is UNITS times 128 inputs:

    loader         1 warp     x [UNITS, BLOCK_M, 128], words, group scales, by the copy engine ─► slot
    WORKERS crews  of 4       slot ─► int8 lanes, in registers ─► wgmma with xᵀ of the slot ─► sums

Each of the WORKERS has EACH tiles of 64 outputs. They do not wait for each other, so that one unpacks while the tensor
cores work for another. What a group's scale is applied to is the difference between the three kinds:

    FLOAT      total += float(sum over the group) · scale         float32
    INTEGER    total += sum over the group · scale                int32
    WEIGHT     total += sum over the group of (code · scale) · x  int32: code · scale is the operand, nothing follows

With SHARED, work is dealt out by steps and not by blocks (Stream-K, https://arxiv.org/abs/2301.03598): of the steps of
all blocks in a row, every program has an equal run. With SPLIT > 1, so many programs share each block instead, and the one
with its first steps has some more than the others. Whoever has the first steps of a block owns it: the others leave their
sums in `partial` and count themselves in `counters`; the owner adds them up some steps before it is done itself, while its
ring goes on filling, so it seldom waits. That may not stall: programs start in their order, and owners come after those for
whom they wait. Counters are left at zero, so launches that share them have to be ordered, as those of one stream are.

A launch starts to fetch its weight while the kernel before it ends: what waits is what reads x.
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
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from halfbyte.kernels.device import processors
from halfbyte.kernels.ring import after, barrier, fetch, fetch_weight, flush
from halfbyte.kernels.turns import place, run_of, share_of, steps_each
from halfbyte.kernels.w4a8.prepared import PreparedWeight
from halfbyte.kernels.w4a8.sums import FLOAT, add_steps, by_lanes, by_rows
from halfbyte.kernels.w4a8.tilings import EARLY, GROUP, Block, units_of

SIGNS = -0x7F7F7F80  # 0x80808080 as int32
KINDS = {"float": 0, "integer": 1, "weight": 2}


@gluon.jit
def _fetch_x(x_tiles, x_ring, ready, slot, block_m, step, BLOCK_M: tl.constexpr, UNITS: tl.constexpr):
    for unit in gl.static_range(UNITS):
        at = [block_m * BLOCK_M, (step * UNITS + unit) * 128]
        fetch(x_tiles, at, ready, x_ring.index(slot * UNITS + unit))


@gluon.jit
def _load(
    loaded,
    BLOCK_M: tl.constexpr, WORKERS: tl.constexpr, EACH: tl.constexpr, UNITS: tl.constexpr, PARTS: tl.constexpr,
    STAGES: tl.constexpr, SHARED: tl.constexpr, SPLIT: tl.constexpr, BESIDE: tl.constexpr,
):  # fmt: skip
    (
        x_tiles, words_tiles, scales_tiles, x_ring, words_ring, scales_ring, full, empty, blocks_m, blocks_n, steps,
        steps_of_group,
    ) = loaded  # fmt: skip
    TILES: tl.constexpr = WORKERS * EACH
    BYTES: tl.constexpr = UNITS * BLOCK_M * 128 + TILES * (UNITS * 4096 + PARTS * 128)
    each = steps_each(blocks_m * blocks_n, steps, SHARED)
    share = share_of(blocks_m * blocks_n, SHARED, SPLIT)
    begin, end = run_of(share, blocks_m * blocks_n, steps, each, SHARED, SPLIT)
    # the weight is there for good: only x may have to wait for the kernel before this one
    block_m, block_n = place(begin // steps, blocks_m, blocks_n, BESIDE)
    first = begin % steps
    early = gl.minimum(gl.minimum(steps - first, end - begin), STAGES)
    for i in range(early):
        fetch_weight(words_tiles, scales_tiles, words_ring, scales_ring, full.index(i), i, block_n * TILES, first + i,
                     steps_of_group, BYTES, WORKERS, EACH, UNITS, PARTS)  # fmt: skip
    gdc_wait()
    for i in range(early):
        _fetch_x(x_tiles, x_ring, full.index(i), i, block_m, first + i, BLOCK_M, UNITS)
    slot = gl.where(early == STAGES, 0, early)
    phase = gl.where(early == STAGES, 0, 1)  # slots begin empty
    skip = early
    while begin < end:
        block_m, block_n = place(begin // steps, blocks_m, blocks_n, BESIDE)
        first = begin % steps
        last = gl.minimum(first + end - begin, steps)
        for step in range(first + skip, last):
            ready = full.index(slot)
            mbarrier.wait(empty.index(slot), phase)
            fetch_weight(words_tiles, scales_tiles, words_ring, scales_ring, ready, slot, block_n * TILES, step,
                         steps_of_group, BYTES, WORKERS, EACH, UNITS, PARTS)  # fmt: skip
            _fetch_x(x_tiles, x_ring, ready, slot, block_m, step, BLOCK_M, UNITS)
            slot, phase = after(slot, phase, 1, STAGES)
        skip = 0
        if SHARED or SPLIT > 1:
            begin += last - first
        else:
            begin += gl.num_programs(0) * steps


@gluon.jit
def _multiply(
    worker: tl.constexpr, given,
    KIND: tl.constexpr, HIGH: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr,
    WORKERS: tl.constexpr, EACH: tl.constexpr, UNITS: tl.constexpr, STAGES: tl.constexpr, SHARED: tl.constexpr,
    SPLIT: tl.constexpr, BESIDE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    (
        x_ring, words_ring, scales_ring, y_stage, full, empty, y_tiles, y_ptr, x_scales_ptr, row_scales_ptr, bias_ptr,
        bias_stride, partial_ptr, counters_ptr, tokens, outs, blocks_m, blocks_n, steps, signs,
    ) = given  # fmt: skip
    COLUMNS: tl.constexpr = BLOCK_M if BLOCK_M < 128 else 128  # the most that triton multiplies at once in int8
    FEW: tl.constexpr = BLOCK_M <= 16  # then scales wait in registers, and results go to memory from there
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    real: tl.constexpr = gl.float32 if KIND == FLOAT else gl.int32
    sums: tl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 32])
    n = gl.expand_dims(gl.arange(0, EACH * 64, gl.SliceLayout(1, sums)), 1)
    m = gl.expand_dims(gl.arange(0, BLOCK_M, gl.SliceLayout(0, sums)), 0)
    none = gl.full((EACH * 64, BLOCK_M), 0, gl.int32, sums)
    size: tl.constexpr = WORKERS * EACH * 64 * BLOCK_M
    AHEAD: tl.constexpr = 1 if SPLIT > 1 else STAGES // 2  # steps
    lanes: tl.constexpr = gl.BlockedLayout([EACH * BLOCK_M // 4, 1, 2], [1, 32, 1], [1, 4, 1], [2, 1, 0])
    of_threads: tl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, lanes))
    registers = gl.arange(0, EACH * BLOCK_M // 4, gl.SliceLayout(1, gl.SliceLayout(2, lanes)))
    inside = gl.expand_dims(gl.expand_dims(gl.arange(0, 128, of_threads), 0), 2) * 2
    inside += gl.expand_dims(gl.expand_dims(gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, lanes))), 0), 1)
    inside += gl.expand_dims(gl.expand_dims(registers, 1), 2) * 256
    partial_ptr += worker * (EACH * 64 * BLOCK_M)

    blocks = blocks_m * blocks_n
    each = steps_each(blocks, steps, SHARED)
    share = share_of(blocks, SHARED, SPLIT)
    begin, end = run_of(share, blocks, steps, each, SHARED, SPLIT)
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    while begin < end:
        block = begin // steps
        block_m, block_n = place(block, blocks_m, blocks_n, BESIDE)
        first = begin % steps
        count = gl.minimum(end - begin, steps - first)
        if SHARED or SPLIT > 1:
            begin += count
        else:
            begin += gl.num_programs(0) * steps
        tile = (block_n * WORKERS + worker) * EACH
        token = block_m * BLOCK_M + m
        if FEW:
            gdc_wait()
            x_scales = gl.load(x_scales_ptr + token, mask=token < tokens, other=0.0)
            row_scales = gl.load(row_scales_ptr + tile * 64 + n, mask=tile * 64 + n < outs, other=0.0)
        counter = counters_ptr + block * WORKERS + worker
        total = gl.full((EACH * 64, BLOCK_M), 0, real, sums)
        if SHARED or SPLIT > 1:
            others = SPLIT - 1
            if SHARED:
                others = ((block + 1) * steps - 1) // each - share
            ahead = gl.where(first > 0, 0, gl.where(others > 0, gl.minimum(count, AHEAD), 0))
            total, slot, phase = add_steps(
                total, none, slot, phase, count - ahead, worker, x_ring, words_ring, scales_ring, full, empty, signs,
                KIND, HIGH, BLOCK_M, WORKERS, EACH, UNITS, PARTS, STAGES, sums,
            )  # fmt: skip
            if ahead > 0:
                while gl.atomic_add(counter, 0) < others:
                    pass
                if SPLIT > 1:
                    left = ()
                    for other in gl.static_range(SPLIT - 1):
                        theirs = (block * (SPLIT - 1) + other).to(gl.int64) * size
                        left = left + (gl.load(partial_ptr + theirs + inside, cache_modifier=".cg"),)
                    for other in gl.static_range(SPLIT - 1):
                        total += by_rows(left[other], EACH, BLOCK_M, sums)
                else:
                    for other in range(others):
                        theirs = (share + 1 + other).to(gl.int64) * size
                        left = gl.load(partial_ptr + theirs + inside, cache_modifier=".cg")
                        total += by_rows(left, EACH, BLOCK_M, sums)
                gl.atomic_xchg(counter, 0)
            count = ahead
        total, slot, phase = add_steps(
            total, none, slot, phase, count, worker, x_ring, words_ring, scales_ring, full, empty, signs,
            KIND, HIGH, BLOCK_M, WORKERS, EACH, UNITS, PARTS, STAGES, sums,
        )  # fmt: skip
        if first > 0:
            mine = share if SHARED else block * (SPLIT - 1) + share - 1
            gl.store(partial_ptr + mine.to(gl.int64) * size + inside, by_lanes(total, EACH, BLOCK_M, lanes))
            barrier()
            gl.atomic_add(counter, 1)
        else:
            if not FEW:
                gdc_wait()
                x_scales = gl.load(x_scales_ptr + token, mask=token < tokens, other=0.0)
                row_scales = gl.load(row_scales_ptr + tile * 64 + n, mask=tile * 64 + n < outs, other=0.0)
            y = total.to(gl.float32) * x_scales * row_scales
            if FEW:
                inside_y = (token < tokens) & (tile * 64 + n < outs)
                if HAS_BIAS:
                    added = gl.load(
                        bias_ptr + token.to(gl.int64) * bias_stride + tile * 64 + n, mask=inside_y, other=0.0
                    )
                    y += added.to(gl.float32)
                gl.store(y_ptr + token.to(gl.int64) * outs + tile * 64 + n, y.to(dtype), mask=inside_y)
            else:
                if HAS_BIAS:
                    y += gl.load(bias_ptr + tile * 64 + n, mask=tile * 64 + n < outs, other=0.0).to(gl.float32)
                tma.store_wait(0)
                barrier()
                y_stage.index(worker).permute((1, 0)).store(y.to(dtype))
                fence_async_shared()
                barrier()
                flush(y_tiles, [block_m * BLOCK_M, tile * 64], y_stage.index(worker))
    if not FEW:
        tma.store_wait(0)


@gluon.jit(do_not_specialize=["bias_stride", "tokens", "outs", "blocks_m", "blocks_n", "steps", "steps_of_group"])
def _blocks_kernel(
    x_tiles, words_tiles, scales_tiles, y_tiles, y_ptr, x_scales_ptr, row_scales_ptr, bias_ptr, bias_stride, partial_ptr,
    counters_ptr, tokens, outs, blocks_m, blocks_n, steps, steps_of_group, signs,
    KIND: tl.constexpr, HIGH: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, WORKERS: tl.constexpr, EACH: tl.constexpr, UNITS: tl.constexpr, PARTS: tl.constexpr,
    STAGES: tl.constexpr, SHARED: tl.constexpr, SPLIT: tl.constexpr, BESIDE: tl.constexpr, REGISTERS: tl.constexpr,
):  # fmt: skip
    """PARTS are the groups of a step: UNITS, or 1 where groups are longer than that."""
    gdc_launch_dependents()
    x_ring = gl.allocate_shared_memory(gl.int8, [STAGES * UNITS, BLOCK_M, 128], gl.NVMMASharedLayout(128, 8, 2))
    words_ring = gl.allocate_shared_memory(
        gl.int32, [STAGES * WORKERS, EACH, UNITS * 32, 32], gl.NVMMASharedLayout(128, 32, 3)
    )
    scales_ring = gl.allocate_shared_memory(
        gl.int32, [STAGES * WORKERS, PARTS, EACH * 32], gl.NVMMASharedLayout(0, 32, 2)
    )
    # few results go to memory as they are
    STAGED: tl.constexpr = BLOCK_M if BLOCK_M > 16 else 8
    y_stage = gl.allocate_shared_memory(
        y_ptr.dtype.element_ty, [WORKERS, STAGED, EACH * 64], gl.NVMMASharedLayout(128, 16, 2)
    )
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=WORKERS)
    fence_async_shared()
    W0: tl.constexpr = 0
    W1: tl.constexpr = 1
    W2: tl.constexpr = 2
    W3: tl.constexpr = 3
    given = (
        x_ring, words_ring, scales_ring, y_stage, full, empty, y_tiles, y_ptr, x_scales_ptr, row_scales_ptr, bias_ptr,
        bias_stride, partial_ptr, counters_ptr, tokens, outs, blocks_m, blocks_n, steps, signs,
    )  # fmt: skip
    loaded = (
        x_tiles, words_tiles, scales_tiles, x_ring, words_ring, scales_ring, full, empty, blocks_m, blocks_n, steps,
        steps_of_group,
    )  # fmt: skip
    # what is constant is written out: in a variable it would be so no longer
    if WORKERS == 1:
        gl.warp_specialize([
        (_multiply, (W0, given, KIND, HIGH, HAS_BIAS, BLOCK_M, WORKERS, EACH, UNITS, STAGES, SHARED, SPLIT, BESIDE, PARTS)),
        (_load, (loaded, BLOCK_M, WORKERS, EACH, UNITS, PARTS, STAGES, SHARED, SPLIT, BESIDE)),
        ], [1], [24])  # fmt: skip
    elif WORKERS == 2:
        gl.warp_specialize([
        (_multiply, (W0, given, KIND, HIGH, HAS_BIAS, BLOCK_M, WORKERS, EACH, UNITS, STAGES, SHARED, SPLIT, BESIDE, PARTS)),
        (_multiply, (W1, given, KIND, HIGH, HAS_BIAS, BLOCK_M, WORKERS, EACH, UNITS, STAGES, SHARED, SPLIT, BESIDE, PARTS)),
        (_load, (loaded, BLOCK_M, WORKERS, EACH, UNITS, PARTS, STAGES, SHARED, SPLIT, BESIDE)),
        ], [4, 1], [REGISTERS, 24])  # fmt: skip
    elif WORKERS == 3:
        gl.warp_specialize([
        (_multiply, (W0, given, KIND, HIGH, HAS_BIAS, BLOCK_M, WORKERS, EACH, UNITS, STAGES, SHARED, SPLIT, BESIDE, PARTS)),
        (_multiply, (W1, given, KIND, HIGH, HAS_BIAS, BLOCK_M, WORKERS, EACH, UNITS, STAGES, SHARED, SPLIT, BESIDE, PARTS)),
        (_multiply, (W2, given, KIND, HIGH, HAS_BIAS, BLOCK_M, WORKERS, EACH, UNITS, STAGES, SHARED, SPLIT, BESIDE, PARTS)),
        (_load, (loaded, BLOCK_M, WORKERS, EACH, UNITS, PARTS, STAGES, SHARED, SPLIT, BESIDE)),
        ], [4, 4, 1], [REGISTERS, REGISTERS, 24])  # fmt: skip
    else:
        gl.warp_specialize([
        (_multiply, (W0, given, KIND, HIGH, HAS_BIAS, BLOCK_M, WORKERS, EACH, UNITS, STAGES, SHARED, SPLIT, BESIDE, PARTS)),
        (_multiply, (W1, given, KIND, HIGH, HAS_BIAS, BLOCK_M, WORKERS, EACH, UNITS, STAGES, SHARED, SPLIT, BESIDE, PARTS)),
        (_multiply, (W2, given, KIND, HIGH, HAS_BIAS, BLOCK_M, WORKERS, EACH, UNITS, STAGES, SHARED, SPLIT, BESIDE, PARTS)),
        (_multiply, (W3, given, KIND, HIGH, HAS_BIAS, BLOCK_M, WORKERS, EACH, UNITS, STAGES, SHARED, SPLIT, BESIDE, PARTS)),
        (_load, (loaded, BLOCK_M, WORKERS, EACH, UNITS, PARTS, STAGES, SHARED, SPLIT, BESIDE)),
        ], [4, 4, 4, 1], [REGISTERS, REGISTERS, REGISTERS, 24])  # fmt: skip


def adds_rows(block: Block) -> bool:
    """Whether results go to memory from registers, so that rows may be added to them."""
    return block.block_m <= 16


def added(y: Tensor, bias: Tensor | None) -> tuple[Tensor, int]:
    """What a kernel is told of the bias: where it is, and how far it is from token to token."""
    return (y, 0) if bias is None else (bias, bias.stride(0) if bias.dim() == 2 else 0)


def matmul(
    x: Tensor, x_scales: Tensor, weight: PreparedWeight, bias: Tensor | None, dtype: torch.dtype, block: Block
) -> Tensor:
    """x · Wᵀ + bias in float16 or bfloat16; rows of x start on 16 bytes. `adds_rows` says where bias may be [tokens, out]."""
    (tokens, ins), (out_tiles, in_tiles, _) = x.shape, weight.words.shape
    y = torch.empty(tokens, weight.outs, dtype=dtype, device=x.device)
    units = units_of(block.units, weight.group_size, ins)
    parts = units if weight.group_size == GROUP else 1
    tiles = block.workers * block.each
    steps = ins // (units * GROUP)
    blocks_m, blocks_n = triton.cdiv(tokens, block.block_m), triton.cdiv(out_tiles, tiles)
    blocks = blocks_m * blocks_n
    split = min(block.split, steps)  # each has a step at least: an owner waits for all
    shared = block.shared
    if blocks * block.workers > weight.counters.shape[0]:  # what is shared has a counter for each crew
        split, shared = 1, False
    programs = min(block.programs * processors(x.device), blocks * steps if shared else blocks)
    if split > 1:
        programs, shared = blocks * split, False
    partial = y
    if shared or split > 1:
        kind = torch.float32 if weight.kind == "float" else torch.int32
        sums = (programs if shared else programs - blocks) * tiles * 64 * block.block_m
        partial = torch.empty(sums, dtype=kind, device=x.device)
    of_x, of_words = gl.NVMMASharedLayout(128, 8, 2), gl.NVMMASharedLayout(128, 32, 3)
    of_scales, of_y = gl.NVMMASharedLayout(0, 32, 2), gl.NVMMASharedLayout(128, 16, 2)
    _blocks_kernel[(programs,)](
        TensorDescriptor(x, [tokens, ins], [x.stride(0), 1], [block.block_m, GROUP], of_x),
        TensorDescriptor(
            weight.words, [out_tiles, in_tiles * 16, 32], [in_tiles * 512, 32, 1], [block.each, units * 32, 32],
            of_words,
        ),
        TensorDescriptor(
            weight.pairs, list(weight.pairs.shape), [weight.pairs.shape[1], 1], [parts, block.each * 32], of_scales
        ),
        TensorDescriptor(y, [tokens, weight.outs], [weight.outs, 1], [block.block_m, block.each * 64], of_y),
        y, x_scales, weight.row_scales, *added(y, bias), partial, weight.counters,
        tokens, weight.outs, blocks_m, blocks_n, steps, max(weight.group_size // (units * GROUP), 1), SIGNS,
        KINDS[weight.kind], weight.sixteenfold, bias is not None,
        block.block_m, block.workers, block.each, units, parts, block.stages, shared, split, block.beside,
        block.worker_registers,
        num_warps=4, launch_pdl=EARLY,
        **({} if block.launch_registers is None else {"maxnreg": block.launch_registers}),
    )  # fmt: skip
    return y
