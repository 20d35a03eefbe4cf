"""What a fused layer's product has for one new token of each row: queries and keys after RoPE, values, and their codes.

    qkv [batch, (heads + 2 · kv_heads) · dim]  ─►  query [batch, heads, dim], key and value [batch, kv_heads, dim]
                                                   codes, steps and zeros in their places of the cache (triton_write.py)
                                                   exact copies in theirs, and which of them count (kept.py)

RoPE is computed in float32 and rounded once; codes are those of the rounded key, or of the key before RoPE. A program has
ROWS heads of rows: the first programs keys, the next values, then queries; the last one says what attention sees. All of
it is little, so it is the launch that takes time: it begins while the product is at work, and lets attention begin
(programmatic dependent launch).
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportOptionalMemberAccess=false
# triton's decorators change signatures in ways that types do not tell

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from halfbyte.kernels.kv_attention.tokens import ExactTokens, KeptTokens, PackedTokens, Smoothing
from halfbyte.kernels.kv_attention.triton_write import channels, write_codes

ROWS, WARPS = 2, 1


@triton.jit
def _heads(x_ptr, place, first, width, channel, counts, HEADS: tl.constexpr, DIM: tl.constexpr):
    """Head `place` % HEADS of row `place` // HEADS, where `first` is the row's first such head and `width` its length."""
    at = (place // HEADS).to(tl.int64) * width + (first + place % HEADS) * DIM
    return tl.load(x_ptr + at[:, None, None] + channel, mask=counts[:, None, None], other=0.0)


@triton.jit
def _rotated(
    x_ptr, cos_ptr, sin_ptr, place, first, width, cos_stride, channel, counts, HEADS: tl.constexpr, DIM: tl.constexpr
):
    """Such heads after RoPE, rounded."""
    x = _heads(x_ptr, place, first, width, channel, counts, HEADS, DIM)
    other = _heads(x_ptr, place, first, width, (channel + DIM // 2) % DIM, counts, HEADS, DIM).to(tl.float32)
    other = tl.where(channel < DIM // 2, -other, other)
    turn = (place // HEADS)[:, None, None] * cos_stride + channel
    cos = tl.load(cos_ptr + turn, mask=counts[:, None, None], other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + turn, mask=counts[:, None, None], other=0.0).to(tl.float32)
    return (x.to(tl.float32) * cos + other * sin).to(x.dtype)


@triton.jit(do_not_specialize=["batch"])
def new_token_kernel(
    qkv_ptr, cos_ptr, sin_ptr, position_ptr, key_shift_ptr, key_scale_ptr, value_shift_ptr, value_scale_ptr,
    key_words_ptr, key_steps_ptr, key_zeros_ptr, value_words_ptr, value_steps_ptr, value_zeros_ptr,
    query_ptr, key_ptr, value_ptr, kept_keys_ptr, kept_values_ptr, last_ptr, seen_ptr, batch, cos_stride,
    key_words_batch, key_words_head, key_grids_batch, key_grids_head,
    value_words_batch, value_words_head, value_grids_batch, value_grids_head, kept_batch, kept_head,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, KEY_GROUPS: tl.constexpr, VALUE_GROUPS: tl.constexpr,
    KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, KEY_SHIFT: tl.constexpr, KEY_SCALE: tl.constexpr,
    VALUE_SHIFT: tl.constexpr, VALUE_SCALE: tl.constexpr, KEY_SYMMETRIC: tl.constexpr, VALUE_SYMMETRIC: tl.constexpr,
    BEFORE: tl.constexpr, KEPT: tl.constexpr, SINKS: tl.constexpr, WINDOW: tl.constexpr, KEPT_ROWS: tl.constexpr,
    ROWS: tl.constexpr, FUSED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Strides in elements of what they are strides of; `cos_stride` is 0 where all rows turn alike.

    BEFORE: codes are of keys before RoPE. KEPT: there are sinks or a window, in rows of which KEPT_ROWS, a power of two,
    are enough.
    """
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    WIDTH: tl.constexpr = (HEADS + 2 * KV_HEADS) * DIM
    program, programs = tl.program_id(0), tl.cdiv(batch * KV_HEADS, ROWS)
    position = tl.load(position_ptr).to(tl.int64)
    kept_row = tl.where(position < SINKS, position, SINKS + position % (WINDOW + 1))
    if program < programs:
        place = program * ROWS + tl.arange(0, ROWS)
        counts = place < batch * KV_HEADS
        channel, row, head = channels(DIM, KEY_GROUPS), (place // KV_HEADS).to(tl.int64), place % KV_HEADS
        key = _rotated(
            qkv_ptr, cos_ptr, sin_ptr, place, HEADS, WIDTH, cos_stride, channel, counts, KV_HEADS, DIM
        )  # fmt: skip
        tl.store(key_ptr + place[:, None, None] * DIM + channel, key, mask=counts[:, None, None])
        if KEPT:
            at = row * kept_batch + head * kept_head + kept_row * DIM
            tl.store(kept_keys_ptr + at[:, None, None] + channel, key, mask=counts[:, None, None])
        if BEFORE:
            key = _heads(qkv_ptr, place, HEADS, WIDTH, channel, counts, KV_HEADS, DIM)
        write_codes(
            key.to(tl.float32), key_shift_ptr, key_scale_ptr, key_words_ptr, key_steps_ptr, key_zeros_ptr,
            row * key_words_batch + head * key_words_head + position * (DIM * KEY_BITS // 32),
            row * key_grids_batch + head * key_grids_head + position * KEY_GROUPS, head * DIM, counts,
            DIM, KEY_GROUPS, KEY_BITS, KEY_SHIFT, KEY_SCALE, KEY_SYMMETRIC, ROWS, FUSED,
        )  # fmt: skip
    elif program < 2 * programs:
        place = (program - programs) * ROWS + tl.arange(0, ROWS)
        counts = place < batch * KV_HEADS
        channel, row, head = channels(DIM, VALUE_GROUPS), (place // KV_HEADS).to(tl.int64), place % KV_HEADS
        value = _heads(qkv_ptr, place, HEADS + KV_HEADS, WIDTH, channel, counts, KV_HEADS, DIM)
        tl.store(value_ptr + place[:, None, None] * DIM + channel, value, mask=counts[:, None, None])
        if KEPT:
            at = row * kept_batch + head * kept_head + kept_row * DIM
            tl.store(kept_values_ptr + at[:, None, None] + channel, value, mask=counts[:, None, None])
        write_codes(
            value.to(tl.float32), value_shift_ptr, value_scale_ptr, value_words_ptr, value_steps_ptr, value_zeros_ptr,
            row * value_words_batch + head * value_words_head + position * (DIM * VALUE_BITS // 32),
            row * value_grids_batch + head * value_grids_head + position * VALUE_GROUPS, head * DIM, counts,
            DIM, VALUE_GROUPS, VALUE_BITS, VALUE_SHIFT, VALUE_SCALE, VALUE_SYMMETRIC, ROWS, FUSED,
        )  # fmt: skip
    elif program < 2 * programs + tl.cdiv(batch * HEADS, ROWS):
        place = (program - 2 * programs) * ROWS + tl.arange(0, ROWS)
        counts, channel = place < batch * HEADS, channels(DIM, 1)
        query = _rotated(qkv_ptr, cos_ptr, sin_ptr, place, 0, WIDTH, cos_stride, channel, counts, HEADS, DIM)
        tl.store(query_ptr + place[:, None, None] * DIM + channel, query, mask=counts[:, None, None])
    elif KEPT:
        kept = tl.arange(0, KEPT_ROWS)
        # a remainder of a negative number is of a row that holds nothing: one beyond `position` here, one below 0 in torch
        held = tl.where(kept < SINKS, kept, position - (position - kept + SINKS) % (WINDOW + 1))
        seen = (held < position) & ((kept < SINKS) | (held >= SINKS))
        tl.store(seen_ptr + kept, seen.to(tl.uint8), mask=kept < SINKS + WINDOW + 1)
        tl.store(last_ptr, tl.maximum(position - WINDOW, SINKS))


def new_token(
    qkv: Tensor, cos: Tensor, sin: Tensor, keys: PackedTokens, values: PackedTokens, position: Tensor,
    smoothing: Smoothing, early: bool, kept: KeptTokens | None = None, before_rope: bool = False, fused: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, ExactTokens | None]:  # fmt: skip
    """Query, key and value of the new token, contiguous; what of the past is codes and what is exact, for all rows.

    Edits caches that `triton_write.can_write`, and `kept`. `fused`: products and sums are rounded once, as on a GPU and
    not in the interpreter. Smoothing is float32.
    """
    batch, dim, kv_heads = len(qkv), cos.shape[1], keys.codes.shape[1]
    heads = qkv.shape[1] // dim - 2 * kv_heads
    query, key, value = (qkv.new_empty(batch, count, dim) for count in (heads, kv_heads, kv_heads))
    last, exact, rows = position.expand(batch), None, 0
    if kept is not None:
        rows = kept.keys.shape[2]
        last = torch.empty(1, dtype=torch.int64, device=qkv.device).expand(batch)
        seen = torch.empty(1, rows, dtype=torch.bool, device=qkv.device).expand(batch, -1)
        exact = ExactTokens(kept.keys, kept.values, seen)
    words = [tokens.codes.view(torch.int32) for tokens in (keys, values)]
    programs = 2 * triton.cdiv(batch * kv_heads, ROWS) + triton.cdiv(batch * heads, ROWS) + (kept is not None)
    new_token_kernel[(programs,)](
        qkv.contiguous(), cos.contiguous(), sin.contiguous(), position,
        *(qkv if part is None else part for part in smoothing),
        words[0], keys.scales, qkv if keys.zeros is None else keys.zeros,
        words[1], values.scales, qkv if values.zeros is None else values.zeros,
        query, key, value, *((qkv, qkv) if kept is None else kept[:2]), last,
        qkv if exact is None or exact.seen is None else exact.seen.view(torch.uint8),
        batch, dim if len(cos) > 1 else 0,
        *words[0].stride()[:2], *keys.scales.stride()[:2], *words[1].stride()[:2], *values.scales.stride()[:2],
        *((0, 0) if kept is None else kept.keys.stride()[:2]),
        heads, kv_heads, dim, keys.scales.shape[3], values.scales.shape[3],
        keys.codes.shape[3] * 8 // dim, values.codes.shape[3] * 8 // dim,
        *(part is not None for part in smoothing), keys.zeros is None, values.zeros is None,
        before_rope, kept is not None, 0 if kept is None else kept.sinks, 0 if kept is None else kept.window,
        triton.next_power_of_2(max(rows, 1)), ROWS, fused, early, num_warps=WARPS, **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
    return query, key, value, last, exact
