"""Rows of tokens, sorted by expert, times the weight of each one's expert: kernels/w4a8/blocks.py with a schedule.

What there is to do is known on the GPU alone: `schedule` says how many blocks of tokens there are and, of each, its expert
and its rows (`triton_rows.py` writes it). A program reads it, and the rest is as there: a loader and WORKERS crews of warps meet
in a ring, steps are UNITS times 128 inputs.

    loader         1 warp     x [UNITS, BLOCK_M, 128], words, group scales, by the copy engine ─► slot
    WORKERS crews  of 4       slot ─► int8 or 16-bit lanes, in registers ─► wgmma with xᵀ of the slot ─► sums

A block may begin at any row and reach into the next expert's: those products are computed and not stored.

With SHARED, of the steps of all blocks in a row every program has an equal run. Whoever has the first steps of a block owns
it: the others leave their sums in `partial` and count themselves in `counters`, at the owner's place. An owner shares its
last block at most, so programs have one place each, however many blocks there are.

A launch starts to fetch its weight while the kernel before it ends, and reads the schedule for that: whoever launches with
`early` sees to it that the schedule was complete before the kernel before it began.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportAssignmentType=false
# triton's decorators change signatures in ways that types do not tell
# ruff: noqa: RET505 - triton compiles what follows a return

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from halfbyte.kernels.device import processors
from halfbyte.kernels.experts.halves import add_halves
from halfbyte.kernels.experts.prepared import KINDS, ExpertWeight
from halfbyte.kernels.ring import after, barrier, fetch, fetch_weight
from halfbyte.kernels.w4a8.sums import FLOAT, add_steps, by_lanes, by_rows
from halfbyte.kernels.w4a8.tilings import GROUP, Block, units_of
from halfbyte.kernels.w4a16.prepared import magics

SIGNS = -0x7F7F7F80  # 0x80808080 as int32
HALF = tl.constexpr(3)


@gluon.jit
def _run(blocks, steps, SHARED: tl.constexpr):
    """Of the steps of all blocks in a row: a program's share, how many steps a share has, its first, and where it ends."""
    if SHARED:
        each = (blocks * steps + gl.num_programs(0) - 1) // gl.num_programs(0)
        # programs start in their order: those for whom others wait come first
        share = gl.num_programs(0) - 1 - gl.program_id(0)
        return share, each, share * each, gl.minimum(blocks * steps, (share + 1) * each)
    else:
        return gl.program_id(0), steps, gl.program_id(0) * steps, blocks * steps


@gluon.jit
def _place(schedule_ptr, block, blocks_m, blocks_n, BESIDE: tl.constexpr):
    """A block's expert, its first row and where its expert's rows end, and which outputs it has.

    BESIDE blocks of tokens go side by side over those of outputs, so that words come from the L2 cache.
    """
    first_m = block // (BESIDE * blocks_n) * BESIDE
    within = block % (BESIDE * blocks_n)
    beside = gl.minimum(blocks_m - first_m, BESIDE)
    entry = schedule_ptr + (first_m + within % beside + 1) * 4
    return gl.load(entry), gl.load(entry + 1), gl.load(entry + 2), within // beside


@gluon.jit
def _fetch_x(x_tiles, x_ring, ready, slot, row, step, PIECES: tl.constexpr, WIDTH: tl.constexpr):
    for piece in gl.static_range(PIECES):
        fetch(x_tiles, [row, (step * PIECES + piece) * WIDTH], ready, x_ring.index(slot * PIECES + piece))


@gluon.jit
def _load(
    loaded,
    WORKERS: tl.constexpr, EACH: tl.constexpr, UNITS: tl.constexpr, PARTS: tl.constexpr, PIECES: tl.constexpr,
    WIDTH: tl.constexpr, BYTES: tl.constexpr, STAGES: tl.constexpr, SHARED: tl.constexpr, BESIDE: tl.constexpr,
):  # fmt: skip
    (
        x_tiles, words_tiles, scales_tiles, x_ring, words_ring, scales_ring, full, empty, schedule_ptr, out_tiles,
        blocks_n, steps, steps_of_group,
    ) = loaded  # fmt: skip
    blocks_m = gl.load(schedule_ptr)
    _share, _each, begin, end = _run(blocks_m * blocks_n, steps, SHARED)
    # the weight is there for good: only x may have to wait for the kernel before this one
    early = gl.maximum(gl.minimum(gl.minimum(steps - begin % steps, end - begin), STAGES), 0)
    if early > 0:
        expert, row, _end_row, block_n = _place(schedule_ptr, begin // steps, blocks_m, blocks_n, BESIDE)
        tile = expert * out_tiles + block_n * (WORKERS * EACH)
        for i in range(early):
            fetch_weight(words_tiles, scales_tiles, words_ring, scales_ring, full.index(i), i, tile, begin % steps + i,
                         steps_of_group, BYTES, WORKERS, EACH, UNITS, PARTS)  # fmt: skip
        gdc_wait()
        for i in range(early):
            _fetch_x(x_tiles, x_ring, full.index(i), i, row, begin % steps + i, PIECES, WIDTH)
    slot = gl.where(early == STAGES, 0, early)
    phase = gl.where(early == STAGES, 0, 1)  # slots begin empty
    skip = early
    while begin < end:
        expert, row, _end_row, block_n = _place(schedule_ptr, begin // steps, blocks_m, blocks_n, BESIDE)
        tile = expert * out_tiles + block_n * (WORKERS * EACH)
        first = begin % steps
        last = gl.minimum(first + end - begin, steps)
        for step in range(first + skip, last):
            ready = full.index(slot)
            mbarrier.wait(empty.index(slot), phase)
            fetch_weight(words_tiles, scales_tiles, words_ring, scales_ring, ready, slot, tile, step, steps_of_group,
                         BYTES, WORKERS, EACH, UNITS, PARTS)  # fmt: skip
            _fetch_x(x_tiles, x_ring, ready, slot, row, step, PIECES, WIDTH)
            slot, phase = after(slot, phase, 1, STAGES)
        skip = 0
        if SHARED:
            begin += last - first
        else:
            begin += gl.num_programs(0) * steps


@gluon.jit
def _add(
    total, none, slot, phase, count, worker: tl.constexpr, x_ring, words_ring, scales_ring, full, empty, bits, bits8,
    KIND: tl.constexpr, HIGH: tl.constexpr, BLOCK_M: tl.constexpr, WORKERS: tl.constexpr, EACH: tl.constexpr,
    UNITS: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr, sums: tl.constexpr,
):  # fmt: skip
    """Add so many steps to `total`. `bits`: the signs of bytes, or the magic of halves."""
    if KIND == HALF:
        return add_halves(
            total, slot, phase, count, worker, x_ring, words_ring, scales_ring, full, empty, bits, bits8,
            BLOCK_M, WORKERS, EACH, UNITS, PARTS, STAGES, sums,
        )  # fmt: skip
    else:
        return add_steps(
            total, none, slot, phase, count, worker, x_ring, words_ring, scales_ring, full, empty, bits,
            KIND, HIGH, BLOCK_M, WORKERS, EACH, UNITS, PARTS, STAGES, sums,
        )  # fmt: skip


@gluon.jit
def _multiply(
    worker: tl.constexpr, given,
    KIND: tl.constexpr, HIGH: tl.constexpr, BLOCK_M: tl.constexpr, WORKERS: tl.constexpr, EACH: tl.constexpr,
    UNITS: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr, SHARED: tl.constexpr, BESIDE: tl.constexpr,
):  # fmt: skip
    (
        x_ring, words_ring, scales_ring, y_stage, full, empty, y_ptr, x_scales_ptr, row_scales_ptr, partial_ptr,
        counters_ptr, schedule_ptr, out_tiles, blocks_n, steps, bits, bits8,
    ) = given  # fmt: skip
    # the most that triton multiplies at once: 128 in int8
    COLUMNS: tl.constexpr = BLOCK_M if (BLOCK_M < 128 or KIND == HALF) else 128
    FEW: tl.constexpr = BLOCK_M <= 16  # then scales wait in registers, and results go to memory from there
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    real: tl.constexpr = gl.int32 if (KIND != FLOAT and KIND != HALF) else gl.float32
    sums: tl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16 if KIND == HALF else 32])
    n = gl.expand_dims(gl.arange(0, EACH * 64, gl.SliceLayout(1, sums)), 1)
    m = gl.expand_dims(gl.arange(0, BLOCK_M, gl.SliceLayout(0, sums)), 0)
    none = gl.full((EACH * 64, BLOCK_M), 0, gl.int32, sums)
    size: tl.constexpr = WORKERS * EACH * 64 * BLOCK_M
    lanes: tl.constexpr = gl.BlockedLayout([EACH * BLOCK_M // 4, 1, 2], [1, 32, 1], [1, 4, 1], [2, 1, 0])
    of_threads: tl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, lanes))
    registers = gl.arange(0, EACH * BLOCK_M // 4, gl.SliceLayout(1, gl.SliceLayout(2, lanes)))
    inside = gl.expand_dims(gl.expand_dims(gl.arange(0, 128, of_threads), 0), 2) * 2
    inside += gl.expand_dims(gl.expand_dims(gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, lanes))), 0), 1)
    inside += gl.expand_dims(gl.expand_dims(registers, 1), 2) * 256
    partial_ptr += worker * (EACH * 64 * BLOCK_M)
    # as results leave: 16 bytes a lane, rows of a crew's outputs
    leaving: tl.constexpr = gl.BlockedLayout([1, 8], [4 // EACH, 8 * EACH], [4, 1], [1, 0])
    leaving_n = gl.expand_dims(gl.arange(0, EACH * 64, gl.SliceLayout(0, leaving)), 0)
    leaving_m = gl.expand_dims(gl.arange(0, BLOCK_M, gl.SliceLayout(1, leaving)), 1)

    blocks_m = gl.load(schedule_ptr)
    outs = out_tiles * 64
    share, each, begin, end = _run(blocks_m * blocks_n, steps, SHARED)
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    gdc_wait()
    while begin < end:
        block = begin // steps
        expert, row, end_row, block_n = _place(schedule_ptr, block, blocks_m, blocks_n, BESIDE)
        first = begin % steps
        count = gl.minimum(end - begin, steps - first)
        if SHARED:
            begin += count
        else:
            begin += gl.num_programs(0) * steps
        out = (block_n * WORKERS + worker) * EACH * 64
        if KIND != HALF and FEW:
            x_scales = gl.load(x_scales_ptr + row + m, mask=row + m < end_row, other=0.0)
            row_scales = gl.load(row_scales_ptr + expert * outs + out + n, mask=out + n < outs, other=0.0)
        total = gl.full((EACH * 64, BLOCK_M), 0, real, sums)
        if SHARED:
            others = ((block + 1) * steps - 1) // each - share
            counter = counters_ptr + share * WORKERS + worker
            ahead = gl.where(first > 0, 0, gl.where(others > 0, gl.minimum(count, STAGES // 2), 0))
            total, slot, phase = _add(
                total, none, slot, phase, count - ahead, worker, x_ring, words_ring, scales_ring, full, empty, bits,
                bits8, KIND, HIGH, BLOCK_M, WORKERS, EACH, UNITS, PARTS, STAGES, sums,
            )  # fmt: skip
            if ahead > 0:
                while gl.atomic_add(counter, 0) < others:
                    pass
                for other in range(others):
                    theirs = share + 1 + other
                    left = gl.load(partial_ptr + theirs.to(gl.int64) * size + inside, cache_modifier=".cg")
                    total += by_rows(left, EACH, BLOCK_M, sums)
                gl.atomic_xchg(counter, 0)
            count = ahead
        total, slot, phase = _add(
            total, none, slot, phase, count, worker, x_ring, words_ring, scales_ring, full, empty, bits,
            bits8, KIND, HIGH, BLOCK_M, WORKERS, EACH, UNITS, PARTS, STAGES, sums,
        )  # fmt: skip
        if first > 0:
            owner = block * steps // each
            gl.store(partial_ptr + share.to(gl.int64) * size + inside, by_lanes(total, EACH, BLOCK_M, lanes))
            barrier()
            gl.atomic_add(counters_ptr + owner * WORKERS + worker, 1)
        else:
            if KIND == HALF:
                y = total.to(dtype)
            else:
                if not FEW:
                    x_scales = gl.load(x_scales_ptr + row + m, mask=row + m < end_row, other=0.0)
                    row_scales = gl.load(row_scales_ptr + expert * outs + out + n, mask=out + n < outs, other=0.0)
                y = (total.to(gl.float32) * x_scales * row_scales).to(dtype)
            if FEW:
                at = (row + m).to(gl.int64) * outs + out + n
                gl.store(y_ptr + at, y, mask=(row + m < end_row) & (out + n < outs))
            else:
                barrier()  # behind the reads of the block before
                y_stage.index(worker).permute((1, 0)).store(y)
                barrier()
                y = y_stage.index(worker).load(leaving)
                at = (row + leaving_m).to(gl.int64) * outs + out + leaving_n
                gl.store(y_ptr + at, y, mask=(row + leaving_m < end_row) & (out + leaving_n < outs))


@gluon.jit(do_not_specialize=["out_tiles", "blocks_n", "steps", "steps_of_group"])
def _experts_kernel(
    x_tiles, words_tiles, scales_tiles, y_ptr, x_scales_ptr, row_scales_ptr, partial_ptr, counters_ptr, schedule_ptr,
    out_tiles, blocks_n, steps, steps_of_group, bits, bits8,
    KIND: tl.constexpr, HIGH: tl.constexpr, BLOCK_M: tl.constexpr, WORKERS: tl.constexpr, EACH: tl.constexpr,
    UNITS: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr, SHARED: tl.constexpr, BESIDE: tl.constexpr,
    REGISTERS: tl.constexpr,
):  # fmt: skip
    """PARTS are the groups of a step: UNITS, or 1 where groups are longer than that."""
    gdc_launch_dependents()
    SIZE: tl.constexpr = 2 if KIND == HALF else 1  # bytes of an element of x, of which 128 bytes are a piece
    PIECES: tl.constexpr = UNITS * SIZE
    WIDTH: tl.constexpr = 128 // SIZE
    BYTES: tl.constexpr = PIECES * BLOCK_M * 128 + WORKERS * EACH * (UNITS * 4096 + PARTS * 128)
    x_ring = gl.allocate_shared_memory(
        x_tiles.dtype, [STAGES * PIECES, BLOCK_M, WIDTH], gl.NVMMASharedLayout(128, SIZE * 8, 2)
    )
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
        x_ring, words_ring, scales_ring, y_stage, full, empty, y_ptr, x_scales_ptr, row_scales_ptr, partial_ptr,
        counters_ptr, schedule_ptr, out_tiles, blocks_n, steps, bits, bits8,
    )  # fmt: skip
    loaded = (
        x_tiles, words_tiles, scales_tiles, x_ring, words_ring, scales_ring, full, empty, schedule_ptr, out_tiles,
        blocks_n, steps, steps_of_group,
    )  # fmt: skip
    # what is constant is written out: in a variable it would be so no longer
    if WORKERS == 1:
        gl.warp_specialize([
        (_multiply, (W0, given, KIND, HIGH, BLOCK_M, WORKERS, EACH, UNITS, PARTS, STAGES, SHARED, BESIDE)),
        (_load, (loaded, WORKERS, EACH, UNITS, PARTS, PIECES, WIDTH, BYTES, STAGES, SHARED, BESIDE)),
        ], [1], [24])  # fmt: skip
    elif WORKERS == 2:
        gl.warp_specialize([
        (_multiply, (W0, given, KIND, HIGH, BLOCK_M, WORKERS, EACH, UNITS, PARTS, STAGES, SHARED, BESIDE)),
        (_multiply, (W1, given, KIND, HIGH, BLOCK_M, WORKERS, EACH, UNITS, PARTS, STAGES, SHARED, BESIDE)),
        (_load, (loaded, WORKERS, EACH, UNITS, PARTS, PIECES, WIDTH, BYTES, STAGES, SHARED, BESIDE)),
        ], [4, 1], [REGISTERS, 24])  # fmt: skip
    else:
        gl.warp_specialize([
        (_multiply, (W0, given, KIND, HIGH, BLOCK_M, WORKERS, EACH, UNITS, PARTS, STAGES, SHARED, BESIDE)),
        (_multiply, (W1, given, KIND, HIGH, BLOCK_M, WORKERS, EACH, UNITS, PARTS, STAGES, SHARED, BESIDE)),
        (_multiply, (W2, given, KIND, HIGH, BLOCK_M, WORKERS, EACH, UNITS, PARTS, STAGES, SHARED, BESIDE)),
        (_multiply, (W3, given, KIND, HIGH, BLOCK_M, WORKERS, EACH, UNITS, PARTS, STAGES, SHARED, BESIDE)),
        (_load, (loaded, WORKERS, EACH, UNITS, PARTS, PIECES, WIDTH, BYTES, STAGES, SHARED, BESIDE)),
        ], [4, 4, 4, 1], [REGISTERS, REGISTERS, REGISTERS, 24])  # fmt: skip


def matmul(
    x: Tensor, x_scales: Tensor | None, weight: ExpertWeight, schedule: Tensor, dtype: torch.dtype, block: Block, *,
    early: bool,
) -> Tensor:  # fmt: skip
    """Row r of the result is row r of x times the weight of the expert that `schedule` says; rows start on 16 bytes.

    `schedule` is for blocks of `block.block_m` tokens. `early` may stand only where the docstring of this file allows it.
    """
    (rows, ins), (all_tiles, in_tiles, _) = x.shape, weight.words.shape
    out_tiles = all_tiles // weight.experts
    y = torch.empty(rows, weight.outs, dtype=dtype, device=x.device)
    units = units_of(block.units, weight.group_size, ins)
    parts = units if weight.group_size == GROUP else 1
    tiles, steps = block.workers * block.each, ins // (units * GROUP)
    blocks_n = triton.cdiv(out_tiles, tiles)
    most = (schedule.shape[0] - 1) * blocks_n
    programs = min(block.programs * processors(x.device), most * steps if block.shared else most)
    shared = block.shared and programs * block.workers <= weight.counters.shape[0]
    half, partial = weight.kind == "half", y
    if shared:
        kind = torch.float32 if half or weight.kind == "float" else torch.int32
        partial = torch.empty(programs * tiles * 64 * block.block_m, dtype=kind, device=x.device)
    of_x, of_words = gl.NVMMASharedLayout(128, 8 * x.element_size(), 2), gl.NVMMASharedLayout(128, 32, 3)
    bits, bits8 = magics(x.dtype) if half else (SIGNS, SIGNS)
    _experts_kernel[(programs,)](
        TensorDescriptor(x, [rows, ins], [x.stride(0), 1], [block.block_m, GROUP // x.element_size()], of_x),
        TensorDescriptor(
            weight.words, [all_tiles, in_tiles * 16, 32], [in_tiles * 512, 32, 1],
            [block.each, units * 32, 32], of_words,
        ),
        TensorDescriptor(
            weight.pairs, list(weight.pairs.shape), [weight.pairs.shape[1], 1], [parts, block.each * 32],
            gl.NVMMASharedLayout(0, 32, 2),
        ),
        y, y if x_scales is None else x_scales, y if half else weight.row_scales, partial, weight.counters, schedule,
        out_tiles, blocks_n, steps, max(weight.group_size // (units * GROUP), 1), bits, bits8,
        KINDS.index(weight.kind), weight.sixteenfold, block.block_m, block.workers, block.each, units, parts,
        block.stages, shared, block.beside, block.worker_registers,
        num_warps=4, launch_pdl=early,
        **({} if block.launch_registers is None else {"maxnreg": block.launch_registers}),
    )  # fmt: skip
    return y
