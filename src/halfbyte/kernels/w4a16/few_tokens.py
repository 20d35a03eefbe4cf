"""Prepared 4-bit weight times a few tokens: yᵀ = W · xᵀ on tensor cores, as fast as memory gives the words.

A step is all BLOCK_N outputs of a block and WARPS_K · RUN tiles of 64 inputs; each warp has some of both:

                 inputs of a step
               │ warps 0, 1 │ warps 2, 3 │           WARPS_K = 2 by WARPS_N = 2: sums over inputs meet when a block ends
    outputs    │ warps 0, 1 │ warps 2, 3 │

Words and activations come through a ring of STAGES steps in shared memory (`cp.async`); a lane reads back 16 bytes of
words at a time, and they are its operands (packing/mma_tiles.py).

Nothing is subtracted or scaled weight by weight. OR-ing a code into the mantissa of a power of two makes `code + magic`,
and with `offset = zero + magic`, over the inputs k of a group,

    Σ scale · (code - zero) · x  =  scale · (Σ (code + magic) · x  -  offset · Σ x)

in float32; Σ x is one more product, with a matrix of ones. `magic` is 128 in bfloat16; in float16 it is 1024 for the
first eight outputs of a strip and 64 for the others, which spares shifts.

Work is dealt out by steps and not by blocks (Stream-K, https://arxiv.org/abs/2301.03598): of the steps of all blocks in
a row, every program has an equal share. Who has the first step of a block writes its outputs; the others leave float32
sums in `partial` and count themselves in `counters`, for which the first waits. That may not stall: programs start in
their order, and the first has the last share, so a program only ever waits for earlier ones.

    steps       │ block 0           │ block 1           │ block 2           │
    programs    │     3       │     2       │     1       │     0           │     1 waits for 0, 2 for 1, 3 for 2

Counters are left at zero, so launches that share them have to be ordered, as those of one stream are.

This is Gluon, Triton with layouts by hand: Triton itself would carry every decoded weight through shared memory.
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
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from halfbyte.kernels.w4a16.prepared import TensorCoreWeight, magics
from halfbyte.kernels.w4a16.tilings import EARLY, Stream, processors, run_of

# two names changed between triton 3.6 and 3.9
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
if hasattr(async_copy, "async_load"):
    copy = async_copy.async_load
else:
    copy = async_copy.async_copy_global_to_shared
commit, wait = async_copy.commit_group, async_copy.wait_group


@gluon.jit
def _along(axis: tl.constexpr, length: tl.constexpr, layout: tl.constexpr, rank: tl.constexpr):
    """0 .. length - 1 along one axis of `layout`, one wide along the others."""
    if rank == 1:
        return gl.arange(0, length, layout)
    elif axis == rank - 1:  # noqa: RET505 - triton compiles what follows a return
        inner: tl.constexpr = gl.SliceLayout(0, layout)
        return gl.expand_dims(_along(axis - 1, length, inner, rank - 1), 0)
    else:
        outer: tl.constexpr = gl.SliceLayout(rank - 1, layout)
        return gl.expand_dims(_along(axis, length, outer, rank - 1), rank - 1)


@gluon.jit
def _neighbours(pairs, dtype: tl.constexpr):
    """The two 16-bit floats of every word, side by side."""
    low = (pairs & 0xFFFF).to(gl.int16).to(dtype, bitcast=True)
    return gl.join(low, (pairs >> 16).to(gl.int16).to(dtype, bitcast=True))


@gluon.jit
def _decode(words, magic, magic8, WARPS_K: tl.constexpr, BLOCK_N: tl.constexpr, STEPS: tl.constexpr, left: tl.constexpr,
            dtype: tl.constexpr):  # fmt: skip
    """Words [WARPS_K, strips, 32, STEPS] as code + magic, the left operand [WARPS_K, BLOCK_N, 16 · STEPS]."""
    if dtype == gl.bfloat16:
        near = words & 0x000F000F | magic
        near8 = words >> 4 & 0x000F000F | magic
        far = words >> 8 & 0x000F000F | magic
        far8 = words >> 12 & 0x000F000F | magic
    else:
        moved = words >> 8
        near = words & 0x000F000F | magic
        near8 = words & 0x00F000F0 | magic8
        far = moved & 0x000F000F | magic
        far8 = moved & 0x00F000F0 | magic8
    a = gl.join(_neighbours(near, dtype), _neighbours(far, dtype))
    a = gl.join(a, gl.join(_neighbours(near8, dtype), _neighbours(far8, dtype)))
    #                  warp     strip          row pair step next far half
    a = gl.reshape(a, (WARPS_K, BLOCK_N // 16, 8, 4, STEPS, 2, 2, 2))
    a = gl.reshape(gl.permute(a, (0, 1, 7, 2, 4, 6, 3, 5)), (WARPS_K, BLOCK_N, 16 * STEPS))
    return gl.convert_layout(a, left, assert_trivial=True)


@gluon.jit
def _for_all_strips(first, STRIPS: tl.constexpr, WARPS_N: tl.constexpr, layout: tl.constexpr):
    """[WARPS_K, 16 · WARPS_N, BLOCK_M], of which all rows are the same, as [WARPS_K, 16 · STRIPS, BLOCK_M]."""
    WARPS_K: tl.constexpr = first.shape[0]
    BLOCK_M: tl.constexpr = first.shape[2]
    many = first
    for log in gl.static_range(6):
        if 2**log * WARPS_N < STRIPS:
            many = gl.join(many, many)
    many = gl.permute(gl.reshape(many, (WARPS_K, 16 * WARPS_N, BLOCK_M, STRIPS // WARPS_N)), (0, 3, 1, 2))
    return gl.convert_layout(gl.reshape(many, (WARPS_K, STRIPS * 16, BLOCK_M)), layout, assert_trivial=True)


@gluon.jit
def _of_rows(places, layout: tl.constexpr):
    """Values [WARPS_K, tiles, 8, 4, 2] in lane order as float32 [WARPS_K, outputs]."""
    WARPS_K: tl.constexpr = places.shape[0]
    TILES: tl.constexpr = places.shape[1]
    v = gl.reshape(gl.permute(places.to(gl.float32), (0, 1, 3, 4, 2)), (WARPS_K, TILES * 64))
    return gl.convert_layout(v, layout, assert_trivial=True)


@gluon.jit
def _after(block, step, steps):
    """The step after this one, and its block. A division would be slow."""
    over = (step + 1 == steps).to(gl.int32)
    return block + over, (step + 1) * (1 - over)


@gluon.jit
def _places(pointer, block, step, at, tile, warp, ins, out_tiles, there, GROUP_SIZE: tl.constexpr, RUN: tl.constexpr,
            GROUPS: tl.constexpr, WARPS_K: tl.constexpr, TILES: tl.constexpr):  # fmt: skip
    """The scales, or the offsets, that each warp needs in a step of a block: those of GROUPS groups."""
    loaded = ()
    for g in gl.static_range(GROUPS):
        k = (step * WARPS_K + warp) * (RUN * 64) + g * (RUN * 64 // GROUPS)
        group = k * 0 if GROUP_SIZE == 0 else k // GROUP_SIZE
        mask = (block * TILES + tile < out_tiles) & (k < ins) & there
        loaded = loaded + (gl.load(pointer + (group * out_tiles + block * TILES) * 64 + at, mask=mask, other=0.0),)
    return loaded


@gluon.jit(do_not_specialize=["tokens", "out_tiles", "in_tiles"])
def _few_tokens_kernel(
    x_ptr, words_ptr, scales_ptr, offsets_ptr, bias_ptr, y_ptr, partial_ptr, counters_ptr,
    tokens, outs, ins, x_stride, out_tiles, in_tiles, magic, magic8,
    GROUP_SIZE: tl.constexpr, HAS_ZEROS: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WARPS_K: tl.constexpr, WARPS_N: tl.constexpr, RUN: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """GROUP_SIZE is 0 for a single group, or divides RUN · 64, or is a multiple of it."""
    gdc_launch_dependents()
    STRIPS: tl.constexpr = BLOCK_N // 16
    TILES: tl.constexpr = BLOCK_N // 64
    PARTS: tl.constexpr = 2 if GROUP_SIZE == 32 else 1  # groups of a tile
    GROUPS: tl.constexpr = RUN * 64 // GROUP_SIZE if GROUP_SIZE > 0 and GROUP_SIZE < RUN * 64 else 1  # of a step
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    sums: tl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS_K, WARPS_N, 1], [1, 16, 8])
    left: tl.constexpr = gl.DotOperandLayout(0, sums, 2)
    right: tl.constexpr = gl.DotOperandLayout(1, sums, 2)
    of_rows: tl.constexpr = gl.SliceLayout(2, sums)
    of_words: tl.constexpr = gl.BlockedLayout(
        [1, TILES, 1, 1, 4], [1, 1, 1, 32, 1], [WARPS_K, 1, WARPS_N, 1, 1], [4, 3, 2, 1, 0]
    )
    of_x: tl.constexpr = gl.BlockedLayout([1, 1, 8], [1, 4, 8], [WARPS_K, WARPS_N, 1], [2, 1, 0])
    # a lane holds what its accumulators' rows need: the four lanes of a row hold the same
    of_places: tl.constexpr = gl.SliceLayout(
        5,
        gl.BlockedLayout(
            [1, TILES, 1, 1, 2, 1], [1, 1, 8, 1, 1, 4], [WARPS_K, 1, 1, WARPS_N, 1, 1], [4, 5, 3, 2, 1, 0]
        ),
    )
    words_ring = gl.allocate_shared_memory(
        gl.int32, [STAGES * RUN, WARPS_K, TILES, 4, 32, 4], gl.SwizzledSharedLayout(1, 1, 1, [4, 3, 2, 1, 0])
    )
    x_ring = gl.allocate_shared_memory(
        dtype, [STAGES * RUN, WARPS_K, BLOCK_M, 64], gl.SwizzledSharedLayout(8, 1, 8, [2, 1, 0])
    )

    steps = (in_tiles + WARPS_K * RUN - 1) // (WARPS_K * RUN)
    total_steps = (out_tiles + TILES - 1) // TILES * steps
    each = (total_steps + gl.num_programs(0) - 1) // gl.num_programs(0)
    # the last shares first: a program may wait for earlier ones only
    share = gl.num_programs(0) - 1 - gl.program_id(0)
    begin = share * each
    end = gl.minimum(begin + each, total_steps)

    tile = _along(1, TILES, of_words, 5)
    in_tile = _along(0, WARPS_K, of_words, 5) * RUN
    word = (tile * in_tiles + in_tile) * 512 + _along(2, 4, of_words, 5) * 128
    word += _along(3, 32, of_words, 5) * 4 + _along(4, 4, of_words, 5)
    token = _along(1, BLOCK_M, of_x, 3)
    k = _along(0, WARPS_K, of_x, 3) * (RUN * 64) + _along(2, 64, of_x, 3)
    x = x_ptr + token.to(gl.int64) * x_stride + k
    warp = _along(0, WARPS_K, of_places, 5)
    place_tile = _along(1, TILES, of_places, 5)
    place = (
        place_tile * 64 + _along(2, 8, of_places, 5) * 8 + _along(3, 4, of_places, 5) * 2 + _along(4, 2, of_places, 5)
    )

    # the weight is there for good: only what is not may have to wait for the kernel before this one
    block = begin // steps
    step = begin % steps
    ahead_block = block
    ahead_step = step
    for stage in gl.static_range(STAGES - 1):
        first_in = ahead_step * (WARPS_K * RUN)
        from_words = words_ptr + (ahead_block.to(gl.int64) * TILES * in_tiles + first_in) * 512
        for part in gl.static_range(RUN):
            there = (ahead_block * TILES + tile < out_tiles) & (first_in + in_tile + part < in_tiles)
            copy(
                words_ring.index(stage * RUN + part), from_words + part * 512 + word, mask=there & (begin + stage < end)
            )
        ahead_block, ahead_step = _after(ahead_block, ahead_step, steps)
    scales = _places(scales_ptr, block, step, place, place_tile, warp, ins, out_tiles, begin < end, GROUP_SIZE, RUN,
                     GROUPS, WARPS_K, TILES)  # fmt: skip
    if HAS_ZEROS:
        offsets = _places(offsets_ptr, block, step, place, place_tile, warp, ins, out_tiles, begin < end, GROUP_SIZE,
                          RUN, GROUPS, WARPS_K, TILES)  # fmt: skip
    gdc_wait()
    x_step = step
    for stage in gl.static_range(STAGES - 1):
        first_k = x_step * (WARPS_K * RUN * 64)
        for part in gl.static_range(RUN):
            there = (token < tokens) & (first_k + k + part * 64 < ins) & (begin + stage < end)
            copy(x_ring.index(stage * RUN + part), x + first_k + part * 64, mask=there, cache_modifier=".ca")
        commit()
        _, x_step = _after(block, x_step, steps)

    if HAS_ZEROS or dtype == gl.bfloat16:
        offset = gl.full((WARPS_K, BLOCK_N), 136.0, gl.float32, of_rows)
    else:
        row = _along(1, BLOCK_N, of_rows, 2) + _along(0, WARPS_K, of_rows, 2) * 0
        offset = gl.where(row % 16 < 8, 1032.0, 72.0)
    ones = gl.full((WARPS_K, 16 * WARPS_N, 64 // PARTS), 1.0, dtype, left)
    none = gl.full((WARPS_K, BLOCK_N, BLOCK_M), 0.0, gl.float32, sums)
    none16 = gl.full((WARPS_K, 16 * WARPS_N, BLOCK_M), 0.0, gl.float32, sums)
    of_y: tl.constexpr = gl.SliceLayout(0, sums)
    m = _along(1, BLOCK_M, of_y, 2)
    total = none
    slot = 0
    for turn in range(begin, end):
        wait(STAGES - 2)
        next_block, next_step = _after(block, step, steps)
        next_scales = _places(scales_ptr, next_block, next_step, place, place_tile, warp, ins, out_tiles, turn + 1 < end,
                              GROUP_SIZE, RUN, GROUPS, WARPS_K, TILES)  # fmt: skip
        if HAS_ZEROS:
            next_offsets = _places(offsets_ptr, next_block, next_step, place, place_tile, warp, ins, out_tiles,
                                   turn + 1 < end, GROUP_SIZE, RUN, GROUPS, WARPS_K, TILES)  # fmt: skip
        product = none
        x_sum = none16
        for part in gl.static_range(RUN):
            tile_words = gl.reshape(words_ring.index(slot * RUN + part).load(of_words), (WARPS_K, STRIPS, 32, 4))
            tile_x = x_ring.index(slot * RUN + part)
            for half in gl.static_range(PARTS):
                if PARTS == 1:
                    these = tile_words
                    xt = tile_x.permute((0, 2, 1)).load(right)
                else:
                    both = gl.permute(gl.reshape(tile_words, (WARPS_K, STRIPS, 32, 2, 2)), (0, 1, 2, 4, 3))
                    first, second = gl.split(both)
                    these = first if half == 0 else second
                    xt = tile_x.slice(half * 32, 32, 2).permute((0, 2, 1)).load(right)
                decoded = _decode(these, magic, magic8, WARPS_K, BLOCK_N, 4 // PARTS, left, dtype)
                product = mma_v2(decoded, xt, product)
                x_sum = mma_v2(ones, xt, x_sum)
                # where a group ends
                if (part * PARTS + half + 1) % (RUN * PARTS // GROUPS) == 0:
                    if HAS_ZEROS:
                        offset = _of_rows(offsets[(part * PARTS + half) * GROUPS // (RUN * PARTS)], of_rows)
                    scale = _of_rows(scales[(part * PARTS + half) * GROUPS // (RUN * PARTS)], of_rows)
                    x_sums = _for_all_strips(x_sum, STRIPS, WARPS_N, sums)
                    total += (product - gl.expand_dims(offset, 2) * x_sums) * gl.expand_dims(scale, 2)
                    product = none
                    x_sum = none16
        # into the slot that was read a turn ago: `wait` has a barrier behind it
        first_in = ahead_step * (WARPS_K * RUN)
        from_words = words_ptr + (ahead_block.to(gl.int64) * TILES * in_tiles + first_in) * 512
        ahead = turn + STAGES - 1 < end
        for part in gl.static_range(RUN):
            to = (slot + STAGES - 1) % STAGES * RUN + part
            there = (ahead_block * TILES + tile < out_tiles) & (first_in + in_tile + part < in_tiles) & ahead
            copy(words_ring.index(to), from_words + part * 512 + word, mask=there)
            there = (token < tokens) & (first_in * 64 + k + part * 64 < ins) & ahead
            copy(x_ring.index(to), x + first_in * 64 + part * 64, mask=there, cache_modifier=".ca")
        commit()
        scales = next_scales
        if HAS_ZEROS:
            offsets = next_offsets
        slot = (slot + 1) % STAGES
        ahead_block, ahead_step = _after(ahead_block, ahead_step, steps)

        if (next_step == 0) | (turn + 1 == end):
            y = gl.sum(total, 0)
            n = _along(0, BLOCK_N, of_y, 2)
            inside = m * BLOCK_N + n
            last_share = ((block + 1) * steps - 1) // each
            if block * steps < begin:
                gl.store(partial_ptr + share * (BLOCK_N * BLOCK_M) + inside, y, mask=(m < tokens) & (n >= 0))
                barrier()
                gl.atomic_add(counters_ptr + block, 1)
            else:
                if last_share > share:
                    while gl.atomic_add(counters_ptr + block, 0) < last_share - share:
                        pass
                    for other in range(share + 1, last_share + 1, 4):
                        for more in gl.static_range(4):
                            at = partial_ptr + (other + more) * (BLOCK_N * BLOCK_M) + inside
                            mask = (m < tokens) & (n >= 0) & (other + more <= last_share)
                            y += gl.load(at, mask=mask, other=0.0, cache_modifier=".cg")
                    gl.atomic_xchg(counters_ptr + block, 0)
                n += block * BLOCK_N
                if HAS_BIAS:
                    y += gl.load(bias_ptr + n, mask=n < outs, other=0.0).to(gl.float32)
                gl.store(y_ptr + m.to(gl.int64) * outs + n, y.to(dtype), mask=(m < tokens) & (n < outs))
            total = none
        block = next_block
        step = next_step
    wait(0)


def matmul(x: Tensor, weight: TensorCoreWeight, bias: Tensor | None, stream: Stream) -> Tensor:
    """x · Wᵀ + bias for at most `stream.block_m` tokens; rows of x start on 16 bytes."""
    tokens, ins = x.shape
    out_tiles, in_tiles, _ = weight.words.shape
    run = run_of(stream.run, weight.group_size, ins)
    steps = triton.cdiv(in_tiles, stream.warps_k * run) * triton.cdiv(out_tiles * 64, stream.block_n)
    programs = min(stream.programs * processors(x.device), steps)
    y = torch.empty(tokens, weight.outs, dtype=x.dtype, device=x.device)
    partial = torch.empty(programs * stream.block_n * stream.block_m, dtype=torch.float32, device=x.device)
    _few_tokens_kernel[(programs,)](
        x, weight.words, weight.scales, weight.scales if weight.offsets is None else weight.offsets,
        y if bias is None else bias, y, partial, weight.counters,
        tokens, weight.outs, ins, x.stride(0), out_tiles, in_tiles, *magics(x.dtype),
        0 if weight.group_size == ins else weight.group_size, weight.offsets is not None, bias is not None,
        stream.block_m, stream.block_n, stream.warps_k, stream.warps_n, run, stream.stages,
        num_warps=stream.warps_k * stream.warps_n, launch_pdl=EARLY,
    )  # fmt: skip
    return y
