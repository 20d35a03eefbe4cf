"""The last step of decode attention: the splits' sums, smoothing, exact tokens and the current one make the answer.

    splits    top m, total Σ 2^(score - m), sums Σ 2^(score - m) · v̂      of the codes, in units of log 2
    codes     score + scaling · q·δ_k                                     v = s_v · v̂ + δ_v
    exact     one token after the other, in float32

A program has one query head. With EARLY it starts while the splits are at work, and does all exact tokens before it
waits for them.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false
# triton's decorators change signatures in ways that types do not tell

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from halfbyte.kernels.kv_attention.cuts import Partial
from halfbyte.kernels.kv_attention.tokens import ExactTokens, Smoothing

EXACT_AT_ONCE = 16


@triton.jit(do_not_specialize=["exact", "splits", "query_heads", "next_seen"])
def combine_kernel(
    query_ptr, key_now_ptr, value_now_ptr, keys_ptr, values_ptr, seen_ptr, key_shift_ptr, value_shift_ptr,
    value_scale_ptr, sums_ptr, tops_ptr, totals_ptr, out_ptr,
    query_heads, splits, exact, key_batch, value_batch, exact_batch, exact_head, next_seen, score_scale,
    DIM: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr, SPLITS: tl.constexpr, EXACT: tl.constexpr,
    HAS_EXACT: tl.constexpr, HAS_SEEN: tl.constexpr, KEY_SHIFT: tl.constexpr, VALUE_SHIFT: tl.constexpr,
    VALUE_SCALE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """WIDTH and SPLITS: powers of two that hold DIM and `splits`; EXACT tokens at once."""
    row = tl.program_id(0).to(tl.int64)
    batch = row // query_heads
    kv_head = row % query_heads // HEADS
    d = tl.arange(0, WIDTH)
    real = d < DIM
    query = tl.load(query_ptr + row * DIM + d, mask=real, other=0.0).to(tl.float32) * score_scale
    key = tl.load(key_now_ptr + batch * key_batch + kv_head * DIM + d, mask=real, other=0.0).to(tl.float32)
    top = tl.sum(query * key, 0)
    total = 1.0
    out = tl.load(value_now_ptr + batch * value_batch + kv_head * DIM + d, mask=real, other=0.0).to(tl.float32)
    if HAS_EXACT:
        at = batch * exact_batch + kv_head * exact_head
        for begin in range(0, exact, EXACT):
            token = begin + tl.arange(0, EXACT)
            counts = token < exact
            if HAS_SEEN:
                counts = counts & (tl.load(seen_ptr + batch * next_seen + token, mask=counts, other=0) != 0)
            mask = counts[:, None] & real[None, :]
            place = at + token[:, None] * DIM + d[None, :]
            kept_key = tl.load(keys_ptr + place, mask=mask, other=0.0).to(tl.float32)
            score = tl.where(counts, tl.sum(kept_key * query[None, :], 1), float("-inf"))
            new_top = tl.maximum(top, tl.max(score, 0))
            fade = tl.exp2(top - new_top)
            share = tl.exp2(score - new_top)
            value = tl.load(values_ptr + place, mask=mask, other=0.0).to(tl.float32)
            out = out * fade + tl.sum(share[:, None] * value, 0)
            total = total * fade + tl.sum(share, 0)
            top = new_top
    shift = 0.0
    if KEY_SHIFT:
        shift = tl.sum(query * tl.load(key_shift_ptr + kv_head * DIM + d, mask=real, other=0.0), 0)

    if EARLY:
        gdc_wait()
    split = tl.arange(0, SPLITS)
    there = split < splits
    # nothing seen: a total of 0, whatever the shift
    tops = tl.load(tops_ptr + row * splits + split, mask=there, other=-1.0e30) + shift
    new_top = tl.maximum(top, tl.max(tops, 0))
    fades = tl.exp2(tops - new_top)
    packed_total = tl.sum(tl.load(totals_ptr + row * splits + split, mask=there, other=0.0) * fades, 0)
    places = (row * splits + split[:, None]) * DIM + d[None, :]
    sums = tl.load(sums_ptr + places, mask=there[:, None] & real[None, :], other=0.0)
    packed = tl.sum(sums * fades[:, None], 0)
    if VALUE_SCALE:
        packed *= tl.load(value_scale_ptr + kv_head * DIM + d, mask=real, other=0.0)
    if VALUE_SHIFT:
        packed += tl.load(value_shift_ptr + kv_head * DIM + d, mask=real, other=0.0) * packed_total
    fade = tl.exp2(top - new_top)
    out = (out * fade + packed) / (total * fade + packed_total)
    tl.store(out_ptr + row * DIM + d, out, mask=real)


def combine(
    query: Tensor, partial: Partial, key_now: Tensor, value_now: Tensor, exact: ExactTokens | None, smoothing: Smoothing,
    score_scale: float, early: bool,
) -> Tensor:  # fmt: skip
    """The answer [batch, query_heads, dim] in the dtype of the query. Each row's heads of key and value are contiguous."""
    batch, query_heads, dim = query.shape
    splits = partial.tops.shape[2]
    out = torch.empty_like(query)
    seen = None if exact is None else exact.seen
    some = (exact.keys, exact.values) if exact is not None else (key_now, value_now)
    combine_kernel[(batch * query_heads,)](
        query, key_now, value_now, *some, query if seen is None else seen,
        *(query if part is None else part for part in (smoothing.key_shift, smoothing.value_shift, smoothing.value_scale)),
        *partial, out,
        query_heads, splits, some[0].shape[2] if exact is not None else 0, key_now.stride(0), value_now.stride(0),
        *some[0].stride()[:2], 0 if seen is None else seen.stride(0), score_scale,
        dim, triton.next_power_of_2(dim), query_heads // key_now.shape[1], triton.next_power_of_2(splits), EXACT_AT_ONCE,
        exact is not None, seen is not None,
        smoothing.key_shift is not None, smoothing.value_shift is not None, smoothing.value_scale is not None, early,
        num_warps=4, launch_pdl=early,
    )  # fmt: skip
    return out
