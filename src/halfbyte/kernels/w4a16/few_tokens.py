"""Prepared 4-bit weight times a few tokens: yᵀ = W · xᵀ on tensor cores, as fast as memory gives the words.

Warps share out the inputs, not the outputs: each computes all BLOCK_N outputs of the program over steps of its own, and
one reduction over the warps ends the program. Words and activations come through a ring of STAGES steps in shared memory
(`cp.async`); a lane reads back 16 bytes of words at a time, and they are its operands (packing/mma_tiles.py).

Nothing is subtracted or scaled weight by weight. OR-ing a code into the mantissa of a power of two makes `code + magic`,
and with `offset = zero + magic`, over the inputs k of a group,

    Σ scale · (code - zero) · x  =  scale · (Σ (code + magic) · x  -  offset · Σ x)

in float32; Σ x is one more product, with a matrix of ones. `magic` is 128 in bfloat16; in float16 it is 1024 for the
first eight outputs of a strip and 64 for the others, which spares shifts.

    steps of 128 inputs    0 1 2 3 │ 4 5 6 7 │ ...      program_id(1) has a run of them, a warp every WARPS-th of those

With SPLIT > 1 programs put float32 sums into `partial`, and the last one to arrive, by `counters`, adds them up. It
leaves `counters` at zero, so launches that share them have to be ordered, as those of one stream are.

This is Gluon, Triton with layouts by hand: Triton itself would carry every decoded weight through shared memory.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportOptionalOperand=false
# pyright: reportAssignmentType=false
# triton's decorators change signatures in ways that types do not tell
# ruff: noqa: RET505, RUF005 - triton compiles what follows a return, and has no stars

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from halfbyte.kernels.ring import barrier
from halfbyte.kernels.w4a16.codes import plus_magic
from halfbyte.kernels.w4a16.prepared import TensorCoreWeight, magics
from halfbyte.kernels.w4a16.tilings import EARLY, Stream, run_of

# a name that changed between triton 3.6 and 3.9
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
    elif axis == rank - 1:
        inner: tl.constexpr = gl.SliceLayout(0, layout)
        return gl.expand_dims(_along(axis - 1, length, inner, rank - 1), 0)
    else:
        outer: tl.constexpr = gl.SliceLayout(rank - 1, layout)
        return gl.expand_dims(_along(axis, length, outer, rank - 1), rank - 1)


@gluon.jit
def _decode(words, magic, magic8, WARPS: tl.constexpr, BLOCK_N: tl.constexpr, STEPS: tl.constexpr, operand: tl.constexpr,
            dtype: tl.constexpr):  # fmt: skip
    """Words [WARPS, strips, 32, STEPS] as code + magic, the left operand [WARPS, BLOCK_N, 16 · STEPS]."""
    rows, rows8 = plus_magic(words, magic, magic8, dtype)
    a = gl.join(rows, rows8)
    #                  warp   strip          row pair step next far half
    a = gl.reshape(a, (WARPS, BLOCK_N // 16, 8, 4, STEPS, 2, 2, 2))
    a = gl.reshape(gl.permute(a, (0, 1, 7, 2, 4, 6, 3, 5)), (WARPS, BLOCK_N, 16 * STEPS))
    return gl.convert_layout(a, operand, assert_trivial=True)


@gluon.jit
def _for_all_strips(first, STRIPS: tl.constexpr, WARPS: tl.constexpr, BLOCK_M: tl.constexpr, layout: tl.constexpr):
    """[WARPS, 16, BLOCK_M], repeated for every strip."""
    many = first
    for log in gl.static_range(6):
        if 2**log < STRIPS:
            many = gl.join(many, many)
    many = gl.permute(gl.reshape(many, (WARPS, 16, BLOCK_M, STRIPS)), (0, 3, 1, 2))
    return gl.convert_layout(gl.reshape(many, (WARPS, STRIPS * 16, BLOCK_M)), layout, assert_trivial=True)


@gluon.jit
def _of_rows(places, WARPS: tl.constexpr, TILES: tl.constexpr, STRIPS: tl.constexpr, layout: tl.constexpr):
    """Values [WARPS, TILES, 8, strips · 2] in lane order as float32 [WARPS, outputs]."""
    v = gl.reshape(places.to(gl.float32), (WARPS, TILES, 8, STRIPS // TILES, 2))
    v = gl.reshape(gl.permute(v, (0, 1, 3, 4, 2)), (WARPS, STRIPS * 16))
    return gl.convert_layout(v, layout, assert_trivial=True)


@gluon.jit(do_not_specialize=["tokens", "out_tiles", "in_tiles"])
def _few_tokens_kernel(
    x_ptr, words_ptr, scales_ptr, offsets_ptr, bias_ptr, y_ptr, partial_ptr, counters_ptr,
    tokens, outs, ins, x_stride, out_tiles, in_tiles, magic, magic8,
    GROUP_SIZE: tl.constexpr, HAS_ZEROS: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WARPS: tl.constexpr, RUN: tl.constexpr, STAGES: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """A step is RUN tiles of 64 inputs. GROUP_SIZE is 0 for a single group, or 32, 64 or a multiple of a step."""
    gdc_launch_dependents()
    STRIPS: tl.constexpr = BLOCK_N // 16
    TILES: tl.constexpr = STRIPS // 4 if STRIPS > 4 else 1
    EACH: tl.constexpr = STRIPS // TILES  # strips of a tile
    PARTS: tl.constexpr = 2 if GROUP_SIZE == 32 else 1  # groups of a tile
    GROUPS: tl.constexpr = RUN * PARTS if (GROUP_SIZE == 32 or GROUP_SIZE == 64) else 1  # of a step
    STEP_INS: tl.constexpr = RUN * 64
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    sums: tl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1, 1], [1, 16, 8])
    left: tl.constexpr = gl.DotOperandLayout(0, sums, 2)
    right: tl.constexpr = gl.DotOperandLayout(1, sums, 2)
    of_rows: tl.constexpr = gl.SliceLayout(2, sums)
    of_words: tl.constexpr = gl.BlockedLayout(
        [1, TILES, EACH, 1, 4], [1, 1, 1, 32, 1], [WARPS, 1, 1, 1, 1], [4, 3, 2, 1, 0]
    )
    of_x: tl.constexpr = gl.BlockedLayout([1, 1, 8], [1, 4, 8], [WARPS, 1, 1], [2, 1, 0])
    # a lane holds what its accumulators' rows need: the four lanes of a row hold the same
    of_places: tl.constexpr = gl.SliceLayout(
        4, gl.BlockedLayout([1, TILES, 1, EACH * 2, 1], [1, 1, 8, 1, 4], [WARPS, 1, 1, 1, 1], [3, 4, 2, 1, 0])
    )
    words_ring = gl.allocate_shared_memory(
        gl.int32, [STAGES * RUN, WARPS, TILES, EACH, 32, 4], gl.SwizzledSharedLayout(1, 1, 1, [4, 3, 2, 1, 0])
    )
    x_ring = gl.allocate_shared_memory(
        dtype, [STAGES * RUN, WARPS, BLOCK_M, 64], gl.SwizzledSharedLayout(8, 1, 8, [2, 1, 0])
    )

    program_n = gl.program_id(0)
    program_k = gl.program_id(1)
    steps = (in_tiles + RUN - 1) // RUN
    run_steps = (steps + SPLIT * WARPS - 1) // (SPLIT * WARPS) * WARPS
    first_step = program_k * run_steps
    tile = program_n * STRIPS // 4
    strip = 0 if STRIPS >= 4 else program_n * STRIPS % 4

    out_tile = tile + _along(1, TILES, of_words, 5)
    in_tile = (first_step + _along(0, WARPS, of_words, 5)) * RUN
    # int64: a weight may have more than 2**31 codes
    words = (
        words_ptr + (out_tile.to(gl.int64) * in_tiles + in_tile) * 512 + (strip + _along(2, EACH, of_words, 5)) * 128
    )
    words += _along(3, 32, of_words, 5) * 4 + _along(4, 4, of_words, 5)
    token = _along(1, BLOCK_M, of_x, 3)
    k = (first_step + _along(0, WARPS, of_x, 3)) * STEP_INS + _along(2, 64, of_x, 3)
    x = x_ptr + token.to(gl.int64) * x_stride + k
    step = first_step + _along(0, WARPS, of_places, 4)
    place_tile = tile + _along(1, TILES, of_places, 4)
    place = place_tile * 64 + _along(2, 8, of_places, 4) * 8 + (strip * 2 + _along(3, EACH * 2, of_places, 4))

    # the weight is there for good: only what is not may have to wait for the kernel before this one
    for stage in gl.static_range(STAGES - 1):
        for part in gl.static_range(RUN):
            ahead = stage * WARPS * RUN + part
            there = stage * WARPS < run_steps
            copy(words_ring.index(stage * RUN + part), words + ahead * 512,
                 mask=(out_tile < out_tiles) & (in_tile + ahead < in_tiles) & there)  # fmt: skip
    scales = ()
    offsets = ()
    for g in gl.static_range(GROUPS):
        group = step * 0 if GROUP_SIZE == 0 else (step * STEP_INS + g * (STEP_INS // GROUPS)) // GROUP_SIZE
        mask = (place_tile < out_tiles) & (step < steps) & (step * STEP_INS + g * (STEP_INS // GROUPS) < ins)
        scales = scales + (gl.load(scales_ptr + group * (out_tiles * 64) + place, mask=mask, other=0.0),)
        if HAS_ZEROS:
            offsets = offsets + (gl.load(offsets_ptr + group * (out_tiles * 64) + place, mask=mask, other=0.0),)

    gdc_wait()
    for stage in gl.static_range(STAGES - 1):
        for part in gl.static_range(RUN):
            ahead = stage * WARPS * RUN + part
            there = stage * WARPS < run_steps
            copy(
                x_ring.index(stage * RUN + part), x + ahead * 64, mask=(token < tokens) & (k + ahead * 64 < ins) & there
            )
        commit()

    if HAS_ZEROS or dtype == gl.bfloat16:
        offset = gl.full((WARPS, BLOCK_N), 136.0, gl.float32, of_rows)
    else:
        row = _along(1, BLOCK_N, of_rows, 2) + _along(0, WARPS, of_rows, 2) * 0
        offset = gl.where(row % 16 < 8, 1032.0, 72.0)
    ones = gl.full((WARPS, 16, 64 // PARTS), 1.0, dtype, left)
    total = gl.full((WARPS, BLOCK_N, BLOCK_M), 0.0, gl.float32, sums)
    empty = gl.full((WARPS, BLOCK_N, BLOCK_M), 0.0, gl.float32, sums)
    empty16 = gl.full((WARPS, 16, BLOCK_M), 0.0, gl.float32, sums)
    slot = 0
    for done in range(0, run_steps, WARPS):
        wait(STAGES - 2)
        step += WARPS
        next_scales = ()
        next_offsets = ()
        for g in gl.static_range(GROUPS):
            group = step * 0 if GROUP_SIZE == 0 else (step * STEP_INS + g * (STEP_INS // GROUPS)) // GROUP_SIZE
            mask = (place_tile < out_tiles) & (step < steps) & (step * STEP_INS + g * (STEP_INS // GROUPS) < ins)
            next_scales = next_scales + (gl.load(scales_ptr + group * (out_tiles * 64) + place, mask=mask, other=0.0),)
            if HAS_ZEROS:
                loaded = gl.load(offsets_ptr + group * (out_tiles * 64) + place, mask=mask, other=0.0)
                next_offsets = next_offsets + (loaded,)
        product = empty
        x_sum = empty16
        for part in gl.static_range(RUN):
            tile_words = gl.reshape(words_ring.index(slot * RUN + part).load(of_words), (WARPS, STRIPS, 32, 4))
            tile_x = x_ring.index(slot * RUN + part)
            for half in gl.static_range(PARTS):
                if PARTS == 1:
                    these = tile_words
                    xt = tile_x.permute((0, 2, 1)).load(right)
                else:
                    first, second = gl.split(
                        gl.permute(gl.reshape(tile_words, (WARPS, STRIPS, 32, 2, 2)), (0, 1, 2, 4, 3))
                    )
                    these = first if half == 0 else second
                    xt = tile_x.slice(half * 32, 32, 2).permute((0, 2, 1)).load(right)
                decoded = _decode(these, magic, magic8, WARPS, BLOCK_N, 4 // PARTS, left, dtype)
                product = mma_v2(decoded, xt, product)
                x_sum = mma_v2(ones, xt, x_sum)
                if GROUPS > 1:
                    if HAS_ZEROS:
                        offset = _of_rows(offsets[part * PARTS + half], WARPS, TILES, STRIPS, of_rows)
                    x_sums = _for_all_strips(x_sum, STRIPS, WARPS, BLOCK_M, sums)
                    scale = _of_rows(scales[part * PARTS + half], WARPS, TILES, STRIPS, of_rows)
                    total += (product - gl.expand_dims(offset, 2) * x_sums) * gl.expand_dims(scale, 2)
                    product = empty
                    x_sum = empty16
        if GROUPS == 1:
            if HAS_ZEROS:
                offset = _of_rows(offsets[0], WARPS, TILES, STRIPS, of_rows)
            x_sums = _for_all_strips(x_sum, STRIPS, WARPS, BLOCK_M, sums)
            scale = _of_rows(scales[0], WARPS, TILES, STRIPS, of_rows)
            total += (product - gl.expand_dims(offset, 2) * x_sums) * gl.expand_dims(scale, 2)
        # into the slot that was read a turn ago: `wait` has a barrier behind it
        for part in gl.static_range(RUN):
            ahead = (STAGES - 1) * WARPS * RUN + part
            there = done + (STAGES - 1) * WARPS < run_steps
            to = (slot + STAGES - 1) % STAGES * RUN + part
            copy(words_ring.index(to), words + ahead * 512,
                 mask=(out_tile < out_tiles) & (in_tile + ahead < in_tiles) & there)  # fmt: skip
            copy(x_ring.index(to), x + ahead * 64, mask=(token < tokens) & (k + ahead * 64 < ins) & there)
        commit()
        scales = next_scales
        offsets = next_offsets
        words += WARPS * RUN * 512
        x += WARPS * STEP_INS
        in_tile += WARPS * RUN
        k += WARPS * STEP_INS
        slot = (slot + 1) % STAGES
    wait(0)

    y = gl.sum(total, 0)
    of_y: tl.constexpr = gl.SliceLayout(0, sums)
    n = program_n * BLOCK_N + _along(0, BLOCK_N, of_y, 2)
    m = _along(1, BLOCK_M, of_y, 2)
    at = m.to(gl.int64) * outs + n
    mask = (m < tokens) & (n < outs)
    if SPLIT > 1:
        size = tokens.to(gl.int64) * outs
        gl.store(partial_ptr + program_k * size + at, y, mask=mask)
        barrier()
        last = gl.atomic_add(counters_ptr + program_n, 1) == SPLIT - 1
    else:
        last = True
    if last:
        if SPLIT > 1:
            y = gl.full((BLOCK_N, BLOCK_M), 0.0, gl.float32, of_y)
            for other in range(SPLIT):
                y += gl.load(partial_ptr + other * size + at, mask=mask, other=0.0, cache_modifier=".cg")
            gl.atomic_xchg(counters_ptr + program_n, 0)
        if HAS_BIAS:
            y += gl.load(bias_ptr + n, mask=n < outs, other=0.0).to(gl.float32)
        gl.store(y_ptr + at, y.to(dtype), mask=mask)


def matmul(x: Tensor, weight: TensorCoreWeight, bias: Tensor | None, stream: Stream) -> Tensor:
    """x · Wᵀ + bias for at most `stream.block_m` tokens; rows of x start on 16 bytes."""
    tokens, ins = x.shape
    y = torch.empty(tokens, weight.outs, dtype=x.dtype, device=x.device)
    partial = y
    if stream.split > 1:
        partial = torch.empty(stream.split, tokens, weight.outs, dtype=torch.float32, device=x.device)
    _few_tokens_kernel[(triton.cdiv(weight.outs, stream.block_n), stream.split)](
        x, weight.words, weight.scales, weight.scales if weight.offsets is None else weight.offsets,
        y if bias is None else bias, y, partial, weight.counters,
        tokens, weight.outs, ins, x.stride(0), weight.words.shape[0], weight.words.shape[1], *magics(x.dtype),
        0 if weight.group_size == ins else weight.group_size, weight.offsets is not None, bias is not None,
        stream.block_m, stream.block_n, stream.warps, run_of(stream.run, weight.group_size, ins), stream.stages,
        stream.split,
        num_warps=stream.warps, launch_pdl=EARLY,
    )  # fmt: skip
    return y
