"""Prepared 4-bit weight times many tokens: yᵀ = W · xᵀ with `wgmma`, W decoded in registers as its left operand.

A program has crews of warps that meet in a ring of STAGES slots in shared memory; a step is RUN tiles of 64 inputs:

    loader         1 warp     x [RUN, BLOCK_M, 64] and words [RUN, tiles, 512], by the copy engine ─► slot
    WORKERS crews  of 4       slot ─► code + magic ─► (· - offset) · scale, in registers ─► wgmma with xᵀ of the slot

Each of the WORKERS has EACH tiles of 64 outputs. They do not wait for each other, so that one decodes while the tensor
cores work for another. `code + magic` is exact and so is the difference; the product with the scale is
rounded once, as it is in a decoded weight.

With SHARED, work is dealt out by steps and not by blocks (Stream-K, https://arxiv.org/abs/2301.03598): of the steps of
all blocks in a row, every program has an equal run. A block that several programs share is added up in float32, in
`partial`, by the last of them to arrive, by `counters`; see `few_tokens`.

This is Gluon, Triton with layouts and crews by hand. Triton makes a similar kernel by itself, but its release 3.6 rewrites
registers from which `wgmma` is still to read.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportAssignmentType=false
# triton's decorators change signatures in ways that types do not tell
# ruff: noqa: RUF005 - triton compiles what follows a return, and has no stars

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from halfbyte.kernels.device import processors
from halfbyte.kernels.ring import barrier, fetch, flush
from halfbyte.kernels.turns import place, steps_each
from halfbyte.kernels.w4a16.codes import plus_magic
from halfbyte.kernels.w4a16.prepared import TensorCoreWeight, magics
from halfbyte.kernels.w4a16.tilings import EARLY, Block, run_of


@gluon.jit
def _of_rows(pairs, dtype: tl.constexpr):
    """Pairs [EACH, 4, 8] as the values of rows r and of rows r + 8, beside words [EACH, 4, 8, pair, step, next, far]."""
    pairs = gl.expand_dims(gl.expand_dims(gl.expand_dims(gl.expand_dims(pairs, 3), 4), 5), 6)
    low = (pairs & 0xFFFF).to(gl.int16).to(dtype, bitcast=True)
    return low, (pairs >> 16).to(gl.int16).to(dtype, bitcast=True)


@gluon.jit
def _load(
    loaded,
    BLOCK_M: tl.constexpr, WORKERS: tl.constexpr, EACH: tl.constexpr, RUN: tl.constexpr, STAGES: tl.constexpr,
    SHARED: tl.constexpr, BESIDE: tl.constexpr,
):  # fmt: skip
    (
        x_tiles, words_tiles, x_ring, words_ring, full, empty, tokens, out_tiles, in_tiles,
    ) = loaded  # fmt: skip
    steps = (in_tiles + RUN - 1) // RUN
    blocks_n = (out_tiles + WORKERS * EACH - 1) // (WORKERS * EACH)
    blocks_m = (tokens + BLOCK_M - 1) // BLOCK_M
    each = steps_each(blocks_m * blocks_n, steps, SHARED)
    begin = gl.program_id(0) * each
    end = blocks_m * blocks_n * steps
    if SHARED:
        end = gl.minimum(end, begin + each)
    turn = 0
    gdc_wait()
    while begin < end:
        block_m, block_n = place(begin // steps, blocks_m, blocks_n, BESIDE)
        first = begin % steps
        last = gl.minimum(first + end - begin, steps)
        for step in range(first, last):
            slot = turn % STAGES
            mbarrier.wait(empty.index(slot), (turn // STAGES & 1) ^ 1)
            mbarrier.expect(full.index(slot), RUN * (BLOCK_M * 128 + WORKERS * EACH * 2048))
            for part in gl.static_range(RUN):
                tile = step * RUN + part
                fetch(x_tiles, [block_m * BLOCK_M, tile * 64], full.index(slot), x_ring.index(slot * RUN + part))
                for worker in gl.static_range(WORKERS):
                    at = [(block_n * WORKERS + worker) * EACH, tile * 16, 0]
                    fetch(words_tiles, at, full.index(slot), words_ring.index((slot * RUN + part) * WORKERS + worker))
            turn += 1
        if SHARED:
            begin += last - first
        else:
            begin += gl.num_programs(0) * steps


@gluon.jit
def _pairs(pointer, at, step, ins, per_group, mask, GROUP_SIZE: tl.constexpr, RUN: tl.constexpr, GROUPS: tl.constexpr):
    """The pairs of scales, or of offsets, that a step needs: GROUPS of them."""
    pairs = ()
    for g in gl.static_range(GROUPS):
        k = step * (RUN * 64) + g * (RUN * 64 // GROUPS)
        group = 0 if GROUP_SIZE == 0 else k // GROUP_SIZE
        pairs = pairs + (gl.load(pointer + group * per_group + at, mask=mask & (k < ins), other=0),)
    return pairs


@gluon.jit
def _multiply(
    worker: tl.constexpr, given,
    GROUP_SIZE: tl.constexpr, HAS_ZEROS: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr,
    WORKERS: tl.constexpr, EACH: tl.constexpr, RUN: tl.constexpr, STAGES: tl.constexpr, SHARED: tl.constexpr,
    BESIDE: tl.constexpr,
):  # fmt: skip
    (
        x_ring, words_ring, y_stage, full, empty, y_tiles, scales_ptr, offsets_ptr, bias_ptr, partial_ptr,
        counters_ptr, tokens, outs, ins, out_tiles, in_tiles, magic, magic8,
    ) = given  # fmt: skip
    dtype: tl.constexpr = x_ring.dtype
    PARTS: tl.constexpr = 2 if GROUP_SIZE == 32 else 1  # groups of a tile
    GROUPS: tl.constexpr = RUN * PARTS if (GROUP_SIZE == 32 or GROUP_SIZE == 64) else 1  # of a step
    sums: tl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    left: tl.constexpr = gl.DotOperandLayout(0, sums, 2)
    of_words: tl.constexpr = gl.BlockedLayout([EACH, 1, 4], [1, 4, 8], [1, 4, 1], [2, 1, 0])
    # tile, strip, row, pair, step, next, far: a lane has all steps of its row and pair
    wide: tl.constexpr = gl.BlockedLayout(
        [EACH, 1, 1, 1, 4, 2, 2], [1, 1, 8, 4, 1, 1, 1], [1, 4, 1, 1, 1, 1, 1], [6, 5, 4, 3, 2, 1, 0]
    )
    narrow: tl.constexpr = gl.SliceLayout(5, gl.SliceLayout(6, wide))
    of_pairs: tl.constexpr = gl.SliceLayout(3, gl.SliceLayout(4, narrow))
    e = gl.expand_dims(gl.expand_dims(gl.arange(0, EACH, gl.SliceLayout(1, gl.SliceLayout(2, of_pairs))), 1), 2)
    strip = gl.expand_dims(gl.expand_dims(gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(2, of_pairs))), 0), 2)
    row = gl.expand_dims(gl.expand_dims(gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, of_pairs))), 0), 1)
    of_step: tl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, narrow))))
    in_step = gl.arange(0, 4, of_step)
    for axis in gl.static_range(4):
        in_step = gl.expand_dims(in_step, axis)
    in_step = gl.expand_dims(gl.expand_dims(in_step, 5), 6)
    n = gl.expand_dims(gl.arange(0, EACH * 64, gl.SliceLayout(1, sums)), 1)
    m = gl.expand_dims(gl.arange(0, BLOCK_M, gl.SliceLayout(0, sums)), 0)

    steps = (in_tiles + RUN - 1) // RUN
    blocks_n = (out_tiles + WORKERS * EACH - 1) // (WORKERS * EACH)
    blocks_m = (tokens + BLOCK_M - 1) // BLOCK_M
    each = steps_each(blocks_m * blocks_n, steps, SHARED)
    start = gl.program_id(0) * each
    begin = start
    end = blocks_m * blocks_n * steps
    if SHARED:
        end = gl.minimum(end, begin + each)
    turn = 0
    while begin < end:
        block = begin // steps
        block_m, block_n = place(block, blocks_m, blocks_n, BESIDE)
        first = begin % steps
        last = gl.minimum(first + end - begin, steps)
        tile = (block_n * WORKERS + worker) * EACH
        at = (tile + e) * 32 + row * 4 + strip
        there = tile + e + row * 0 + strip * 0 < out_tiles
        total = gl.full((EACH * 64, BLOCK_M), 0.0, gl.float32, sums)
        # two steps ahead: scales come from memory, and a step may be short
        scales = _pairs(scales_ptr, at, first, ins, out_tiles * 32, there, GROUP_SIZE, RUN, GROUPS)
        scales1 = _pairs(scales_ptr, at, first + 1, ins, out_tiles * 32, there, GROUP_SIZE, RUN, GROUPS)
        if HAS_ZEROS:
            offsets = _pairs(offsets_ptr, at, first, ins, out_tiles * 32, there, GROUP_SIZE, RUN, GROUPS)
            offsets1 = _pairs(offsets_ptr, at, first + 1, ins, out_tiles * 32, there, GROUP_SIZE, RUN, GROUPS)
        for step in range(first, last):
            slot = turn % STAGES
            scales2 = _pairs(scales_ptr, at, step + 2, ins, out_tiles * 32, there, GROUP_SIZE, RUN, GROUPS)
            if HAS_ZEROS:
                offsets2 = _pairs(offsets_ptr, at, step + 2, ins, out_tiles * 32, there, GROUP_SIZE, RUN, GROUPS)
            mbarrier.wait(full.index(slot), turn // STAGES & 1)
            for part in gl.static_range(RUN):
                words = words_ring.index((slot * RUN + part) * WORKERS + worker).load(of_words)
                words = gl.convert_layout(gl.reshape(words, (EACH, 4, 8, 4, 4)), narrow, assert_trivial=True)
                if HAS_ZEROS:
                    offset, offset8 = _of_rows(offsets[part * PARTS if GROUPS > 1 else 0], dtype)
                else:
                    offset = gl.full((1, 1, 1, 1, 1, 1, 1), 136.0 if dtype == gl.bfloat16 else 1032.0, dtype, wide)
                    offset8 = gl.full((1, 1, 1, 1, 1, 1, 1), 136.0 if dtype == gl.bfloat16 else 72.0, dtype, wide)
                scale, scale8 = _of_rows(scales[part * PARTS if GROUPS > 1 else 0], dtype)
                if PARTS == 2:
                    second, second8 = _of_rows(scales[part * PARTS + 1], dtype)
                    scale = gl.where(in_step < 2, scale, second)
                    scale8 = gl.where(in_step < 2, scale8, second8)
                    if HAS_ZEROS:
                        second, second8 = _of_rows(offsets[part * PARTS + 1], dtype)
                        offset = gl.where(in_step < 2, offset, second)
                        offset8 = gl.where(in_step < 2, offset8, second8)
                rows, rows8 = plus_magic(words, magic, magic8, dtype)
                rows = gl.convert_layout(rows, wide, assert_trivial=True) - offset
                rows8 = gl.convert_layout(rows8, wide, assert_trivial=True) - offset8
                #                                             tile strip half row step far pair next
                a = gl.permute(gl.join(rows * scale, rows8 * scale8), (0, 1, 7, 2, 4, 6, 3, 5))
                a = gl.convert_layout(gl.reshape(a, (EACH * 64, 64)), left, assert_trivial=True)
                total = warpgroup_mma(a, x_ring.index(slot * RUN + part).permute((1, 0)), total, is_async=True)
            # nothing is pending when the loop goes round: ptxas would give the operands' registers away
            total = warpgroup_mma_wait(0, deps=[total])
            mbarrier.arrive(empty.index(slot), count=1)
            scales = scales1
            scales1 = scales2
            if HAS_ZEROS:
                offsets = offsets1
                offsets1 = offsets2
            turn += 1

        whole = True
        if SHARED:
            # who else has steps of this block, and where their sums lie: a program has at most two blocks in part
            head = block * steps // each
            tail = ((block + 1) * steps - 1) // each
            size: tl.constexpr = WORKERS * EACH * 64 * BLOCK_M
            inside = worker * (EACH * 64 * BLOCK_M) + n * BLOCK_M + m
            if tail > head:
                mine = gl.program_id(0) * 2 + (1 if begin > start else 0)
                gl.store(partial_ptr + mine.to(gl.int64) * size + inside, total)
                barrier()
                whole = gl.atomic_add(counters_ptr + block * WORKERS + worker, 1) == tail - head
                if whole:
                    total = gl.full((EACH * 64, BLOCK_M), 0.0, gl.float32, sums)
                    for other in range(head, tail + 1):
                        theirs = other * 2 + (1 if other * each < block * steps else 0)
                        total += gl.load(partial_ptr + theirs.to(gl.int64) * size + inside, cache_modifier=".cg")
                    gl.atomic_xchg(counters_ptr + block * WORKERS + worker, 0)
        if whole:
            if HAS_BIAS:
                total += gl.load(bias_ptr + tile * 64 + n, mask=tile * 64 + n < outs, other=0.0).to(gl.float32)
            tma.store_wait(0)
            y_stage.index(worker).permute((1, 0)).store(total.to(dtype))
            fence_async_shared()
            barrier()
            flush(y_tiles, [block_m * BLOCK_M, tile * 64], y_stage.index(worker))
        if SHARED:
            begin += last - first
        else:
            begin += gl.num_programs(0) * steps
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["tokens", "out_tiles", "in_tiles"])
def _many_tokens_kernel(
    x_tiles, words_tiles, y_tiles, scales_ptr, offsets_ptr, bias_ptr, partial_ptr, counters_ptr,
    tokens, outs, ins, out_tiles, in_tiles, magic, magic8,
    GROUP_SIZE: tl.constexpr, HAS_ZEROS: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, WORKERS: tl.constexpr, EACH: tl.constexpr, RUN: tl.constexpr, STAGES: tl.constexpr,
    SHARED: tl.constexpr, BESIDE: tl.constexpr,
):  # fmt: skip
    """GROUP_SIZE is 0 for a single group, or 32, 64 or a multiple of a step."""
    gdc_launch_dependents()
    of_floats: tl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    x_ring = gl.allocate_shared_memory(x_tiles.dtype, [STAGES * RUN, BLOCK_M, 64], of_floats)
    words_ring = gl.allocate_shared_memory(
        gl.int32, [STAGES * RUN * WORKERS, EACH, 16, 32], gl.NVMMASharedLayout(128, 32, 3)
    )
    y_stage = gl.allocate_shared_memory(x_tiles.dtype, [WORKERS, BLOCK_M, EACH * 64], of_floats)
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
        x_ring, words_ring, y_stage, full, empty, y_tiles, scales_ptr, offsets_ptr, bias_ptr, partial_ptr,
        counters_ptr, tokens, outs, ins, out_tiles, in_tiles, magic, magic8,
    )  # fmt: skip
    loaded = (
        x_tiles, words_tiles, x_ring, words_ring, full, empty, tokens, out_tiles, in_tiles,
    )  # fmt: skip
    # what is constant is written out: in a variable it would be so no longer
    if WORKERS == 2:
        gl.warp_specialize([
        (_multiply, (W0, given, GROUP_SIZE, HAS_ZEROS, HAS_BIAS, BLOCK_M, WORKERS, EACH, RUN, STAGES, SHARED, BESIDE)),
        (_multiply, (W1, given, GROUP_SIZE, HAS_ZEROS, HAS_BIAS, BLOCK_M, WORKERS, EACH, RUN, STAGES, SHARED, BESIDE)),
        (_load, (loaded, BLOCK_M, WORKERS, EACH, RUN, STAGES, SHARED, BESIDE)),
        ], [4, 1], [240, 24])  # fmt: skip
    else:
        gl.warp_specialize([
        (_multiply, (W0, given, GROUP_SIZE, HAS_ZEROS, HAS_BIAS, BLOCK_M, WORKERS, EACH, RUN, STAGES, SHARED, BESIDE)),
        (_multiply, (W1, given, GROUP_SIZE, HAS_ZEROS, HAS_BIAS, BLOCK_M, WORKERS, EACH, RUN, STAGES, SHARED, BESIDE)),
        (_multiply, (W2, given, GROUP_SIZE, HAS_ZEROS, HAS_BIAS, BLOCK_M, WORKERS, EACH, RUN, STAGES, SHARED, BESIDE)),
        (_multiply, (W3, given, GROUP_SIZE, HAS_ZEROS, HAS_BIAS, BLOCK_M, WORKERS, EACH, RUN, STAGES, SHARED, BESIDE)),
        (_load, (loaded, BLOCK_M, WORKERS, EACH, RUN, STAGES, SHARED, BESIDE)),
        ], [4, 4, 4, 1], [120, 120, 120, 24])  # fmt: skip


def matmul(x: Tensor, weight: TensorCoreWeight, bias: Tensor | None, block: Block) -> Tensor:
    """x · Wᵀ + bias; rows of x start on 16 bytes."""
    (tokens, ins), (out_tiles, in_tiles, _) = x.shape, weight.words.shape
    y = torch.empty(tokens, weight.outs, dtype=x.dtype, device=x.device)
    run = run_of(block.run, weight.group_size, ins)
    blocks = triton.cdiv(tokens, block.block_m) * triton.cdiv(out_tiles, block.workers * block.each)
    # what is shared has a counter for each crew
    shared = block.shared and blocks * block.workers <= weight.counters.shape[0]
    programs = min(processors(x.device), blocks * triton.cdiv(in_tiles, run) if shared else blocks)
    partial = y
    if shared:
        size = block.workers * block.each * 64 * block.block_m
        partial = torch.empty(programs * 2 * size, dtype=torch.float32, device=x.device)
    pairs = weight.scales.view(torch.int32)
    of_floats, of_words = gl.NVMMASharedLayout(128, 16, 2), gl.NVMMASharedLayout(128, 32, 3)
    _many_tokens_kernel[(programs,)](
        TensorDescriptor(x, [tokens, ins], [x.stride(0), 1], [block.block_m, 64], of_floats),
        TensorDescriptor(
            weight.words, [out_tiles, in_tiles * 16, 32], [in_tiles * 512, 32, 1], [block.each, 16, 32], of_words
        ),
        TensorDescriptor(y, [tokens, weight.outs], [weight.outs, 1], [block.block_m, block.each * 64], of_floats),
        pairs, pairs if weight.offsets is None else weight.offsets.view(torch.int32),
        y if bias is None else bias, partial, weight.counters,
        tokens, weight.outs, ins, out_tiles, in_tiles, *magics(x.dtype),
        0 if weight.group_size == ins else weight.group_size, weight.offsets is not None, bias is not None,
        block.block_m, block.workers, block.each, run, block.stages, shared, block.beside,
        num_warps=4, launch_pdl=EARLY,
    )  # fmt: skip
    return y
