"""Attention of one token on 4-bit keys and values, as fast as memory gives the codes; in Gluon, for tensor cores.

A warp has tokens of its own, TOKENS of them a step, which come through a ring of STAGES steps in shared memory
(`cp.async`). Codes become float16 by OR-ing them into the mantissa of 1024 or of 64, never leave the registers, and are
the left operand of both products; what OR-ing adds is in the sums that the products start from:

    scores [tokens, heads] = step · (codes · queryᵀ) + zero · Σ query        channels in the order that words give
    sums   [dim, heads]    = codesᵀ · (share · step)                         tokens in pairs, two words of two tokens
    zeros  [heads]         = Σ share · zero

A share is 2^(score - m). So that it fits float16 times its token's step, m is the greatest of score + log2 step.

A split's sums go to `sums`, its m and Σ shares to `tops` and `totals`; `combine` makes the answer of them. All heads that
share keys are columns of one product.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportOptionalOperand=false
# pyright: reportAssignmentType=false
# triton's decorators change signatures in ways that types do not tell
# ruff: noqa: RUF005 - triton compiles what follows a return, and has no stars

import torch
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from halfbyte.kernels.kv_attention.cuts import Cut, Partial, empty_partial
from halfbyte.kernels.kv_attention.operands import (
    along,
    as_channels,
    channel_of_key,
    channel_of_value,
    keys_operand,
    log_2,
    of_group,
    over_registers,
    power_of_2,
    repeated,
    values_operand,
)
from halfbyte.kernels.kv_attention.tokens import KeyRotation, PackedTokens
from halfbyte.kernels.kv_attention.turned_keys import near_table, smoothing_of, turn, turned_scores

# a name that changed between triton 3.6 and 3.9
copy = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared
commit, wait = async_copy.commit_group, async_copy.wait_group

NOTHING = tl.constexpr(-1.0e30)  # a top below all scores


@gluon.jit
def _fetch(key_ring, value_ring, slot, key_words, value_words, token, end, ahead, WORDS: tl.constexpr):
    """Let the words of the step that begins `ahead` tokens further come into a slot; those past the end are zeros."""
    mask = token + ahead < end
    copy(key_ring.index(slot), key_words + ahead * WORDS, mask=mask)
    copy(value_ring.index(slot), value_words + ahead * WORDS, mask=mask)
    commit()


@gluon.jit
def _grids(steps_ptr, zeros_ptr, at, mask, GROUPS: tl.constexpr, HAS_ZEROS: tl.constexpr):
    """Steps and zeros of tokens, a pair for each group, as they are stored."""
    grids = ()
    for g in gl.static_range(GROUPS):
        steps = gl.load(steps_ptr + at * GROUPS + g, mask=mask, other=0.0)
        if HAS_ZEROS:
            grids = grids + ((steps, gl.load(zeros_ptr + at * GROUPS + g, mask=mask, other=0.0)),)
        else:
            grids = grids + ((steps, steps * -8.0),)
    return grids


@gluon.jit
def _query(
    query_ptr, key_scale_ptr, kv_head, g: tl.constexpr, WORDS: tl.constexpr, HEADS: tl.constexpr, WIDE: tl.constexpr,
    DIM: tl.constexpr, SCALED: tl.constexpr, operand: tl.constexpr,
):  # fmt: skip
    """The heads' queries as the right operand [1, channels of the group, WIDE], heads that are none 0."""
    channel = g * (8 * WORDS) + channel_of_key(along(1, 8 * WORDS, operand), WORDS)
    head = along(2, WIDE, operand) + along(0, 1, operand)
    query = gl.load(query_ptr + head * DIM + channel, mask=head < HEADS, other=0.0).to(gl.float32)
    if SCALED:
        query *= gl.load(key_scale_ptr + kv_head * DIM + channel)
    return query


@gluon.jit(do_not_specialize=["kv_heads", "next_last"])
def decode_kernel(
    query_ptr, key_scale_ptr, key_ptr, key_steps_ptr, key_zeros_ptr, value_ptr, value_steps_ptr, value_zeros_ptr,
    first_ptr, last_ptr, sums_ptr, tops_ptr, totals_ptr, key_shift_ptr, cos_ptr, sin_ptr, near_ptr,
    kv_heads, next_last, codes_batch, codes_head, grids_batch, grids_head, turns_batch, near_sines, score_scale,
    magic, magic_next,
    DIM: tl.constexpr, HEADS: tl.constexpr, WIDE: tl.constexpr, KEY_GROUPS: tl.constexpr, VALUE_GROUPS: tl.constexpr,
    HAS_ZEROS: tl.constexpr, HAS_FIRST: tl.constexpr, SCALED: tl.constexpr, SHIFTED: tl.constexpr, TURNED: tl.constexpr,
    PTX: tl.constexpr, EARLY: tl.constexpr, TOKENS: tl.constexpr, WARPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Strides in words and in grids; `score_scale` in units of log 2.

    The magic numbers are arguments, as a constant would cost an instruction more wherever it is used.
    """
    if EARLY:
        gdc_wait()
        # not before: what comes next reads what was written before this kernel, and does not wait for that alone
        gdc_launch_dependents()
    magics = (magic, magic_next)
    WORDS: tl.constexpr = DIM // 8
    # keys that are turned come in two parts, channels and those that they are turned with
    KEY_PARTS: tl.constexpr = 2 if TURNED else KEY_GROUPS
    KEY_WORDS: tl.constexpr = WORDS // KEY_PARTS
    VALUE_WORDS: tl.constexpr = WORDS // VALUE_GROUPS
    STEP: tl.constexpr = WARPS * TOKENS
    sums_in: tl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1, 1], [1, 16, 8])
    left: tl.constexpr = gl.DotOperandLayout(0, sums_in, 2)
    right: tl.constexpr = gl.DotOperandLayout(1, sums_in, 2)
    copied: tl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 32 * 4 // WORDS, WORDS // 4], [WARPS, 1, 1], [2, 1, 0])
    of_keys: tl.constexpr = gl.BlockedLayout([1, 1, KEY_WORDS // 4], [1, 8, 4], [WARPS, 1, 1], [2, 1, 0])
    of_values: tl.constexpr = gl.BlockedLayout([1, 2, VALUE_WORDS // 8], [1, 4, 8], [WARPS, 1, 1], [1, 2, 0])
    key_ring = gl.allocate_shared_memory(
        gl.int32, [STAGES, WARPS, TOKENS, WORDS], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    )
    value_ring = gl.allocate_shared_memory(
        gl.int32, [STAGES, WARPS, TOKENS, WORDS], gl.SwizzledSharedLayout(4, 2, 4, [2, 1, 0])
    )

    split = gl.program_id(0)
    splits = gl.num_programs(0)
    row = gl.program_id(1)
    kv_head = row % kv_heads
    batch = row // kv_heads
    first = 0
    if HAS_FIRST:
        first = gl.load(first_ptr + batch).to(gl.int32)
    last = gl.load(last_ptr + batch * next_last).to(gl.int32)
    # every split has its share of this row's tokens, however many there are
    each = (gl.maximum(last - first, 0) + splits * STEP - 1) // (splits * STEP) * STEP
    begin = first + split * each
    end = gl.minimum(last, begin + each)
    steps = (gl.maximum(end - begin, 0) + STEP - 1) // STEP

    # int64: a cache may have more than 2**31 codes
    codes_at = batch.to(gl.int64) * codes_batch + kv_head.to(gl.int64) * codes_head
    grids_at = batch.to(gl.int64) * grids_batch + kv_head.to(gl.int64) * grids_head
    token = begin + along(0, WARPS, copied) * TOKENS + along(1, TOKENS, copied)
    word = codes_at + token * WORDS + along(2, WORDS, copied)
    key_words = key_ptr + word
    value_words = value_ptr + word
    for stage in gl.static_range(STAGES - 1):
        _fetch(key_ring, value_ring, stage, key_words, value_words, token, end, stage * STEP, WORDS)

    of_tokens: tl.constexpr = gl.SliceLayout(2, sums_in)
    place = gl.expand_dims(gl.arange(0, TOKENS, gl.SliceLayout(0, of_tokens)), 0) + begin
    place += gl.expand_dims(gl.arange(0, WARPS, gl.SliceLayout(1, of_tokens)), 1) * TOKENS
    key_steps = key_steps_ptr + grids_at * KEY_GROUPS
    key_zeros = key_zeros_ptr + grids_at * KEY_GROUPS
    value_steps = value_steps_ptr + grids_at * VALUE_GROUPS
    value_zeros = value_zeros_ptr + grids_at * VALUE_GROUPS
    key_place = place
    if TURNED:
        key_place = gl.expand_dims(gl.arange(0, TOKENS, gl.SliceLayout(0, gl.SliceLayout(2, left))), 0) + begin
        key_place += gl.expand_dims(gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, left))), 1) * TOKENS
    key_grids = _grids(key_steps, key_zeros, key_place, key_place < end, KEY_GROUPS, HAS_ZEROS)
    value_grids = _grids(value_steps, value_zeros, place, place < end, VALUE_GROUPS, HAS_ZEROS)

    # query operands, what the scores start from, and what a zero is worth
    empty16 = gl.full((WARPS, 16, WIDE), 0.0, gl.float32, sums_in)
    ones = gl.full((WARPS, 16, 8 * KEY_WORDS), 1.0, gl.float16, left)
    key_magic = gl.where((along(2, 8 * KEY_WORDS, left) >> 3 & 1) == 0, -1024.0, -64.0).to(gl.float16)
    key_magic = key_magic * ones
    value_magic = gl.where((along(1, 16, left) & 8) == 0, -1024.0, -64.0).to(gl.float16)
    value_magic = value_magic * gl.full((WARPS, 16, TOKENS), 1.0, gl.float16, left)
    queries = ()
    starts = ()
    worths = ()
    query_at = query_ptr + row.to(gl.int64) * (HEADS * DIM)
    for g in gl.static_range(KEY_PARTS):
        query = _query(query_at, key_scale_ptr, kv_head, g, KEY_WORDS, HEADS, WIDE, DIM, SCALED and not TURNED, right)
        if TURNED:
            query = query * score_scale
        query = query.to(gl.float16) * gl.full((WARPS, 8 * KEY_WORDS, WIDE), 1.0, gl.float16, right)
        queries = queries + (query,)
        starts = starts + (repeated(mma_v2(key_magic, query, empty16), TOKENS // 16, WARPS, WIDE, sums_in),)
        worths = worths + (repeated(mma_v2(ones, query, empty16) * score_scale, TOKENS // 16, WARPS, WIDE, sums_in),)

    if TURNED:
        HALF: tl.constexpr = DIM // 2
        none = gl.full((WARPS, TOKENS, WIDE), 0.0, gl.float32, sums_in)
        channel = channel_of_key(along(2, HALF, left), KEY_WORDS)
        near = along(1, TOKENS, left) * HALF + channel
        near_turns = near_table(near_ptr, near_sines, near, WARPS, TOKENS, HALF, left)
        minus_magic = gl.where((along(2, HALF, left) >> 3 & 1) == 0, -1024.0, -64.0).to(gl.float16)
        smoothing = smoothing_of(key_scale_ptr, key_shift_ptr, kv_head * DIM + channel, HALF, SCALED, SHIFTED, left)
        # as words lie: a lane has neighbouring channels, of a token for each warp
        as_words: tl.constexpr = gl.SliceLayout(
            1, gl.BlockedLayout([1, 1, 2 * KEY_WORDS], [1, 8, 4], [WARPS, 1, 1], [2, 1, 0])
        )
        turn_at = batch.to(gl.int64) * turns_batch
        turn_at += gl.expand_dims(gl.arange(0, HALF, gl.SliceLayout(0, as_words)), 0)
        turn_token = begin + gl.expand_dims(gl.arange(0, WARPS, gl.SliceLayout(1, as_words)), 1) * TOKENS
        turns = turn(cos_ptr, sin_ptr, turn_at, turn_token, end, HALF)

    top = gl.full((WARPS, WIDE), NOTHING, gl.float32, gl.SliceLayout(1, sums_in))
    total = empty16
    zeros = ()
    sums = ()
    for _g in gl.static_range(VALUE_GROUPS):
        zeros = zeros + (total,)
        sums = sums + (gl.full((WARPS, 8 * VALUE_WORDS, WIDE), 0.0, gl.float32, sums_in),)

    slot = 0
    for _step in range(0, steps):
        wait(STAGES - 2)
        # into the slot that was read a turn ago: `wait` has a barrier behind it
        ahead = (STAGES - 1) * STEP
        to = gl.where(slot == 0, STAGES, slot) - 1
        _fetch(key_ring, value_ring, to, key_words, value_words, token, end, ahead, WORDS)
        key_words += STEP * WORDS
        value_words += STEP * WORDS
        token += STEP
        seen = place < end
        place += STEP
        if TURNED:
            key_place += STEP
        else:
            key_place = place
        next_key_grids = _grids(key_steps, key_zeros, key_place, key_place < end, KEY_GROUPS, HAS_ZEROS)
        next_value_grids = _grids(value_steps, value_zeros, place, place < end, VALUE_GROUPS, HAS_ZEROS)

        key_tile = key_ring.index(slot).load(of_keys)
        if TURNED:
            turn_token += STEP
            next_turns = turn(cos_ptr, sin_ptr, turn_at, turn_token, end, HALF)
            cos = as_channels(turns[0], WARPS, KEY_WORDS, right)
            sin = as_channels(turns[1], WARPS, KEY_WORDS, right)
            low = keys_operand(of_group(key_tile, 0, 2), magics, WARPS, TOKENS, KEY_WORDS, left)
            high = keys_operand(of_group(key_tile, 1, 2), magics, WARPS, TOKENS, KEY_WORDS, left)
            # the query turned back by the first token of each warp, its keys by what they are further
            scores = turned_scores(
                low, high, minus_magic, key_grids[0], smoothing, near_turns.index(0).load(left),
                near_turns.index(1).load(left), queries, cos, sin, none, SCALED or SHIFTED, PTX,
            )  # fmt: skip
            turns = next_turns
        for g in gl.static_range(0 if TURNED else KEY_GROUPS):
            key_codes = keys_operand(of_group(key_tile, g, KEY_GROUPS), magics, WARPS, TOKENS, KEY_WORDS, left)
            products = mma_v2(key_codes, queries[g], starts[g])
            key_step = key_grids[g][0].to(gl.float32) * score_scale
            key_zero = key_grids[g][1].to(gl.float32)
            part = gl.expand_dims(key_step, 2) * products + gl.expand_dims(key_zero, 2) * worths[g]
            scores = part if g == 0 else scores + part
        scores = gl.where(gl.expand_dims(seen, 2), scores, float("-inf"))

        largest = value_grids[0][0].to(gl.float32)
        for g in gl.static_range(1, VALUE_GROUPS):
            largest = gl.maximum(largest, value_grids[g][0].to(gl.float32))
        weight = log_2(gl.maximum(largest, 2.0**-24), PTX)
        new_top = gl.maximum(top, gl.max(scores + gl.expand_dims(weight, 2), 1))
        fade = power_of_2(top - new_top, PTX)
        top = new_top
        shares = power_of_2(scores - gl.expand_dims(new_top, 1), PTX)
        fades = gl.expand_dims(fade, 1)
        total = total * fades + over_registers(shares, WARPS, TOKENS, WIDE, sums_in)
        value_tile = value_ring.index(slot).load(of_values)
        new_zeros = ()
        new_sums = ()
        for g in gl.static_range(VALUE_GROUPS):
            value_zero = gl.expand_dims(value_grids[g][1].to(gl.float32), 2)
            worth = over_registers(shares * value_zero, WARPS, TOKENS, WIDE, sums_in)
            new_zeros = new_zeros + (zeros[g] * fades + worth,)
            weighted = (shares * gl.expand_dims(value_grids[g][0].to(gl.float32), 2)).to(gl.float16)
            weighted = gl.convert_layout(weighted, right)
            value_starts = repeated(mma_v2(value_magic, weighted, empty16), VALUE_WORDS // 2, WARPS, WIDE, sums_in)
            value_codes = values_operand(
                of_group(value_tile, g, VALUE_GROUPS), magics, WARPS, TOKENS, VALUE_WORDS, left
            )
            new_sums = new_sums + (sums[g] * fades + mma_v2(value_codes, weighted, value_starts),)
        zeros = new_zeros
        sums = new_sums
        key_grids = next_key_grids
        value_grids = next_value_grids
        slot = gl.where(slot == STAGES - 1, 0, slot + 1)
    wait(0)

    # warps meet: one top for all
    highest = gl.max(top, 0)
    fades = gl.exp2(top - gl.expand_dims(highest, 0))
    faded = gl.expand_dims(fades, 1)
    of_heads: tl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, sums_in))
    head = gl.arange(0, WIDE, of_heads)
    at = (row.to(gl.int64) * HEADS + head) * splits + split
    gl.store(tops_ptr + at, highest, mask=head < HEADS)
    totals = gl.sum(gl.sum(total * faded, 1), 0)
    gl.store(totals_ptr + at, gl.convert_layout(totals, of_heads), mask=head < HEADS)
    of_sums: tl.constexpr = gl.SliceLayout(0, sums_in)
    head = gl.expand_dims(gl.arange(0, WIDE, gl.SliceLayout(0, of_sums)), 0)
    at = ((row.to(gl.int64) * HEADS + head) * splits + split) * DIM
    for g in gl.static_range(VALUE_GROUPS):
        zero = gl.convert_layout(gl.sum(gl.sum(zeros[g] * faded, 1), 0), gl.SliceLayout(0, of_sums))
        merged = gl.sum(sums[g] * faded, 0) + gl.expand_dims(zero, 0)
        m = gl.expand_dims(gl.arange(0, 8 * VALUE_WORDS, gl.SliceLayout(1, of_sums)), 1)
        channel = g * (8 * VALUE_WORDS) + channel_of_value(m, VALUE_WORDS)
        gl.store(sums_ptr + at + channel, merged, mask=head < HEADS)


MAGIC, MAGIC_NEXT = 0x64006400, 0x54005400  # pairs of 1024 and of 64 in float16


def decode(
    query: Tensor, keys: PackedTokens, values: PackedTokens, last: Tensor, first: Tensor | None,
    key_scale: Tensor | None, score_scale: float, cut: Cut, early: bool, key_shift: Tensor | None = None,
    rotation: KeyRotation | None = None, ptx: bool = True,
) -> Partial:  # fmt: skip
    """All splits of a cache without `cuts.obstacle`."""
    batch, kv_heads = keys.codes.shape[:2]
    dim = query.shape[2]
    heads = query.shape[1] // kv_heads
    partial = empty_partial(query, cut.splits)
    options = {"maxnreg": cut.registers} if cut.registers else {}
    decode_kernel[(cut.splits, batch * kv_heads)](
        query, query if key_scale is None else key_scale,
        keys.codes.view(torch.int32), keys.scales, keys.scales if keys.zeros is None else keys.zeros,
        values.codes.view(torch.int32), values.scales, values.scales if values.zeros is None else values.zeros,
        last if first is None else first, last, *partial, query if key_shift is None else key_shift,
        *((query, query, query) if rotation is None else rotation),
        kv_heads, last.stride(0), keys.codes.stride(0) // 4, keys.codes.stride(1) // 4,
        keys.scales.stride(0) // keys.scales.shape[3], keys.scales.stride(1) // keys.scales.shape[3],
        0 if rotation is None else rotation.cos.stride(0), 0 if rotation is None else rotation.near.stride(0),
        score_scale, MAGIC, MAGIC_NEXT,
        dim, heads, 8 if heads <= 8 else 16, keys.scales.shape[3], values.scales.shape[3],
        keys.zeros is not None, first is not None, key_scale is not None, key_shift is not None,
        rotation is not None, ptx, early, cut.tokens, cut.warps, cut.stages,
        num_warps=cut.warps, launch_pdl=early, **options,
    )  # fmt: skip
    return partial
