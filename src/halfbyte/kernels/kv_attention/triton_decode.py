"""The splits of decode attention in plain Triton: any width of codes, any group, wherever Triton runs.

A program has one split of the tokens of one row and key head, and all query heads that share it. Codes are decoded in
float32. It writes what `hopper_decode` writes.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportOptionalMemberAccess=false
# triton's decorators change signatures in ways that types do not tell

import triton
import triton.language as tl
from torch import Tensor

from halfbyte.kernels.kv_attention.cuts import Cut, Partial, empty_partial
from halfbyte.kernels.kv_attention.tokens import KeyRotation, PackedTokens


@triton.jit
def _decoded(
    codes_ptr, steps_ptr, zeros_ptr, codes_at, grids_at, token, counts, d,
    DIM: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, HAS_ZEROS: tl.constexpr,
):  # fmt: skip
    """Tokens [tokens, width] in float32; 0 outside."""
    BYTES: tl.constexpr = (DIM * BITS + 7) // 8
    mask = counts[:, None] & (d < DIM)[None, :]
    byte = d * BITS // 8
    at = codes_at + token[:, None] * BYTES
    string = tl.load(codes_ptr + at + byte[None, :], mask=mask, other=0).to(tl.int32)
    if 8 % BITS != 0:
        next_mask = mask & (byte + 1 < BYTES)[None, :]
        string = string | (tl.load(codes_ptr + at + byte[None, :] + 1, mask=next_mask, other=0).to(tl.int32) << 8)
    code = string >> (d * BITS % 8)[None, :] & (2**BITS - 1)
    grid = grids_at + token[:, None] * (DIM // GROUP) + (d // GROUP)[None, :]
    step = tl.load(steps_ptr + grid, mask=mask, other=0.0).to(tl.float32)
    if HAS_ZEROS:
        zero = tl.load(zeros_ptr + grid, mask=mask, other=0.0).to(tl.float32)
    else:
        zero = -(2 ** (BITS - 1)) * step
    return code.to(tl.float32) * step + zero


@triton.jit(do_not_specialize=["kv_heads", "next_last"])
def decode_kernel(
    query_ptr, key_scale_ptr, key_ptr, key_steps_ptr, key_zeros_ptr, value_ptr, value_steps_ptr, value_zeros_ptr,
    first_ptr, last_ptr, sums_ptr, tops_ptr, totals_ptr, key_shift_ptr, cos_ptr, sin_ptr,
    kv_heads, next_last, key_batch, key_head, key_grids_batch, key_grids_head,
    value_batch, value_head, value_grids_batch, value_grids_head, turns_batch, score_scale,
    DIM: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr, WIDE: tl.constexpr, KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr, KEY_GROUP: tl.constexpr, VALUE_GROUP: tl.constexpr, HAS_KEY_ZEROS: tl.constexpr,
    HAS_VALUE_ZEROS: tl.constexpr, HAS_FIRST: tl.constexpr, SCALED: tl.constexpr, TOKENS: tl.constexpr,
    HALF: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    """Strides in bytes of codes and in grids; `score_scale` in units of log 2; WIDE and WIDTH: powers of two.

    HALF: so many pairs of channels are turned; 0: none, and shifts are left to `combine`.
    """
    split, splits = tl.program_id(0), tl.num_programs(0)
    row = tl.program_id(1)
    kv_head, batch = row % kv_heads, (row // kv_heads).to(tl.int64)
    first = 0
    if HAS_FIRST:
        first = tl.load(first_ptr + batch).to(tl.int32)
    last = tl.load(last_ptr + batch * next_last).to(tl.int32)
    each = tl.cdiv(tl.maximum(last - first, 0), splits * TOKENS) * TOKENS
    begin = first + split * each
    end = tl.minimum(last, begin + each)

    d, head = tl.arange(0, WIDTH), tl.arange(0, WIDE)
    query_at = (row.to(tl.int64) * HEADS + head[:, None]) * DIM + d[None, :]
    query_mask = (head < HEADS)[:, None] & (d < DIM)[None, :]
    query = tl.load(query_ptr + query_at, mask=query_mask, other=0.0).to(tl.float32) * score_scale
    other = tl.where(d < HALF, d + HALF, tl.where(d < 2 * HALF, d - HALF, d))
    scales = tl.full((WIDTH,), 1.0, tl.float32)
    other_scales = scales
    shifts = tl.zeros((WIDTH,), tl.float32)
    other_shifts = shifts
    if HALF and SCALED:
        scales = tl.load(key_scale_ptr + kv_head * DIM + d, mask=d < DIM, other=0.0)
        other_scales = tl.load(key_scale_ptr + kv_head * DIM + other, mask=d < DIM, other=0.0)
    elif SCALED:
        query *= tl.load(key_scale_ptr + kv_head * DIM + d, mask=d < DIM, other=0.0)[None, :]
    top = tl.full((WIDE,), -1.0e30, tl.float32)
    total = tl.zeros((WIDE,), tl.float32)
    sums = tl.zeros((WIDE, WIDTH), tl.float32)
    for start in range(begin, end, TOKENS):
        token = start + tl.arange(0, TOKENS)
        counts = token < end
        key = _decoded(
            key_ptr, key_steps_ptr, key_zeros_ptr, batch * key_batch + kv_head * key_head,
            batch * key_grids_batch + kv_head * key_grids_head, token, counts, d, DIM, KEY_BITS, KEY_GROUP, HAS_KEY_ZEROS,
        )  # fmt: skip
        if HALF:  # every channel beside the one it is turned with
            if SHIFTED:
                shifts = tl.load(key_shift_ptr + kv_head * DIM + d, mask=d < DIM, other=0.0)
                other_shifts = tl.load(key_shift_ptr + kv_head * DIM + other, mask=d < DIM, other=0.0)
            paired = _decoded(
                key_ptr, key_steps_ptr, key_zeros_ptr, batch * key_batch + kv_head * key_head,
                batch * key_grids_batch + kv_head * key_grids_head, token, counts, other, DIM, KEY_BITS, KEY_GROUP,
                HAS_KEY_ZEROS,
            )  # fmt: skip
            turn = batch * turns_batch + token[:, None] * HALF + (d % HALF)[None, :]
            turned = counts[:, None] & (d < 2 * HALF)[None, :]
            cos = tl.load(cos_ptr + turn, mask=turned, other=1.0).to(tl.float32)
            sin = tl.load(sin_ptr + turn, mask=turned, other=0.0).to(tl.float32)
            key = key * scales[None, :] + shifts[None, :]
            paired = paired * other_scales[None, :] + other_shifts[None, :]
            key = key * cos + tl.where(d < HALF, -1.0, 1.0)[None, :] * (paired * sin)
        score = tl.dot(query, tl.trans(key), input_precision="ieee")
        score = tl.where(counts[None, :], score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 1))
        fade = tl.exp2(top - new_top)
        share = tl.exp2(score - new_top[:, None])
        value = _decoded(
            value_ptr, value_steps_ptr, value_zeros_ptr, batch * value_batch + kv_head * value_head,
            batch * value_grids_batch + kv_head * value_grids_head, token, counts, d, DIM, VALUE_BITS, VALUE_GROUP,
            HAS_VALUE_ZEROS,
        )  # fmt: skip
        sums = tl.dot(share, value, sums * fade[:, None], input_precision="ieee")
        total = total * fade + tl.sum(share, 1)
        top = new_top
    at = (row.to(tl.int64) * HEADS + head) * splits + split
    tl.store(tops_ptr + at, top, mask=head < HEADS)
    tl.store(totals_ptr + at, total, mask=head < HEADS)
    tl.store(sums_ptr + at[:, None] * DIM + d[None, :], sums, mask=query_mask)


def decode(
    query: Tensor, keys: PackedTokens, values: PackedTokens, last: Tensor, first: Tensor | None,
    key_scale: Tensor | None, score_scale: float, cut: Cut, early: bool, key_shift: Tensor | None = None,
    rotation: KeyRotation | None = None,
) -> Partial:  # fmt: skip
    """All splits of any cache. It ends before another kernel begins, `early` or not."""
    del early
    (batch, query_heads, dim), kv_heads = query.shape, keys.codes.shape[1]
    heads = query_heads // kv_heads
    partial = empty_partial(query, cut.splits)
    grids = [tokens.scales if tokens.zeros is None else tokens.zeros for tokens in (keys, values)]
    decode_kernel[(cut.splits, batch * kv_heads)](
        query, query if key_scale is None else key_scale,
        keys.codes, keys.scales, grids[0], values.codes, values.scales, grids[1],
        last if first is None else first, last, *partial, query if key_shift is None else key_shift,
        *((query, query) if rotation is None else rotation[:2]),
        kv_heads, last.stride(0), *keys.codes.stride()[:2], *keys.scales.stride()[:2],
        *values.codes.stride()[:2], *values.scales.stride()[:2],
        0 if rotation is None else rotation.cos.stride(0), score_scale,
        dim, triton.next_power_of_2(max(dim, 16)), heads, triton.next_power_of_2(max(heads, 16)),
        keys.codes.shape[3] * 8 // dim, values.codes.shape[3] * 8 // dim,
        dim // keys.scales.shape[3], dim // values.scales.shape[3],
        keys.zeros is not None, values.zeros is not None, first is not None, key_scale is not None, cut.tokens,
        0 if rotation is None else rotation.cos.shape[2], rotation is not None and key_shift is not None,
        num_warps=cut.warps,
    )  # fmt: skip
    return partial
