"""One launch for a step on a float cache: RoPE, write, attention split over tokens, and the splits put together.

    program (row and head of keys, split)   past tokens of the split ─► sums, largest score, total, for each query head
    split 0                                 rotates and stores the new key, stores the new value, and sees them
    the last to be done                     puts the splits together ─► y

The past tokens were written long before, so a program loads its first ones before the product ahead of it ends.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportOptionalMemberAccess=false
# triton's decorators change signatures in ways that types do not tell

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte.kernels.device import overlaps, processors

TOKENS = 64  # that a program has at once where each head of keys has its own query
PROGRAMS = 4  # a multiprocessor's
MOST_SPLITS = 32
NOTHING = -1.0e30


@triton.jit
def _rotated(x_ptr, cos_ptr, sin_ptr, d, DIM: tl.constexpr):
    """A head after RoPE, in float32."""
    x = tl.load(x_ptr + d).to(tl.float32)
    other = tl.load(x_ptr + (d + DIM // 2) % DIM).to(tl.float32)
    other = tl.where(d < DIM // 2, -other, other)
    return x * tl.load(cos_ptr + d).to(tl.float32) + other * tl.load(sin_ptr + d).to(tl.float32)


@triton.jit(do_not_specialize=["capacity"])
def _token_attention_kernel(
    qkv_ptr, cos_ptr, sin_ptr, keys_ptr, values_ptr, position_ptr, y_ptr, sums_ptr, tops_ptr, counters_ptr,
    capacity, cos_stride, score_scale,
    KV_HEADS: tl.constexpr, TOGETHER: tl.constexpr, DIM: tl.constexpr, SPLITS: tl.constexpr, ALL_SPLITS: tl.constexpr,
    TOKENS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """TOGETHER query heads share a head of keys; ALL_SPLITS is the power of two from SPLITS on."""
    dtype: tl.constexpr = keys_ptr.dtype.element_ty
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    place, split = tl.program_id(0), tl.program_id(1)
    row, head = place // KV_HEADS, place % KV_HEADS
    past = tl.load(position_ptr).to(tl.int32)
    each = (past + SPLITS - 1) // SPLITS
    first = split * each
    last = tl.minimum(first + each, past)
    d = tl.arange(0, DIM)
    t = tl.arange(0, TOKENS)
    base = place.to(tl.int64) * capacity * DIM
    within = base + (first + t)[:, None].to(tl.int64) * DIM + d[None, :]
    key = tl.load(keys_ptr + within, mask=(first + t < last)[:, None], other=0.0)
    value = tl.load(values_ptr + within, mask=(first + t < last)[:, None], other=0.0)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    heads: tl.constexpr = KV_HEADS * TOGETHER
    qkv_ptr += row * (heads + 2 * KV_HEADS) * DIM
    cos_ptr += row * cos_stride
    sin_ptr += row * cos_stride
    queries, sums, tops, totals = (), (), (), ()
    new_key = _rotated(qkv_ptr + (heads + head) * DIM, cos_ptr, sin_ptr, d, DIM).to(dtype)
    new_value = tl.load(qkv_ptr + (heads + KV_HEADS + head) * DIM + d)
    if split == 0:
        tl.store(keys_ptr + base + past.to(tl.int64) * DIM + d, new_key)
        tl.store(values_ptr + base + past.to(tl.int64) * DIM + d, new_value)
    for i in tl.static_range(TOGETHER):
        query = _rotated(qkv_ptr + (head * TOGETHER + i) * DIM, cos_ptr, sin_ptr, d, DIM).to(dtype).to(tl.float32)
        query *= score_scale
        own = tl.sum(query * new_key.to(tl.float32), 0)
        queries += (query,)
        tops += (tl.where(split == 0, own, -1.0e30),)
        totals += (tl.where(split == 0, 1.0, 0.0),)
        sums += (tl.where(split == 0, new_value.to(tl.float32), 0.0),)
    for at in range(first, last, TOKENS):
        there = at + t < last
        if at > first:
            within = base + (at + t)[:, None].to(tl.int64) * DIM + d[None, :]
            key = tl.load(keys_ptr + within, mask=there[:, None], other=0.0)
            value = tl.load(values_ptr + within, mask=there[:, None], other=0.0)
        new_sums, new_tops, new_totals = (), (), ()
        for i in tl.static_range(TOGETHER):
            scores = tl.sum(key.to(tl.float32) * queries[i][None, :], 1)
            scores = tl.where(there, scores, -1.0e30)
            top = tl.maximum(tops[i], tl.max(scores, 0))
            shares = tl.where(there, tl.exp2(scores - top), 0.0)
            fade = tl.exp2(tops[i] - top)
            new_tops += (top,)
            new_totals += (totals[i] * fade + tl.sum(shares, 0),)
            new_sums += (sums[i] * fade + tl.sum(shares[:, None] * value.to(tl.float32), 0),)
        sums, tops, totals = new_sums, new_tops, new_totals
    for i in tl.static_range(TOGETHER):
        query_head = row * heads + head * TOGETHER + i
        if SPLITS == 1:
            tl.store(y_ptr + query_head * DIM + d, (sums[i] / totals[i]).to(dtype))
        else:
            part = query_head.to(tl.int64) * SPLITS + split
            tl.store(sums_ptr + part * DIM + d, sums[i])
            tl.store(tops_ptr + part * 2, tops[i])
            tl.store(tops_ptr + part * 2 + 1, totals[i])
    if SPLITS > 1:
        tl.debug_barrier()  # every thread's part is there before the program says that it is done
        if tl.atomic_add(counters_ptr + place, 1, sem="acq_rel") == SPLITS - 1:
            tl.store(counters_ptr + place, 0)
            s = tl.arange(0, ALL_SPLITS)
            for i in tl.static_range(TOGETHER):
                all_parts = (row * heads + head * TOGETHER + i).to(tl.int64) * SPLITS + s
                # as another program wrote it: not from this multiprocessor's own cache
                all_tops = tl.load(tops_ptr + all_parts * 2, mask=s < SPLITS, other=-1.0e30, cache_modifier=".cg")
                all_totals = tl.load(tops_ptr + all_parts * 2 + 1, mask=s < SPLITS, other=0.0, cache_modifier=".cg")
                fades = tl.exp2(all_tops - tl.max(all_tops, 0))
                places = all_parts[:, None] * DIM + d[None, :]
                all_sums = tl.load(sums_ptr + places, mask=(s < SPLITS)[:, None], other=0.0, cache_modifier=".cg")
                y = tl.sum(all_sums * fades[:, None], 0) / tl.sum(all_totals * fades, 0)
                tl.store(y_ptr + (row * heads + head * TOGETHER + i) * DIM + d, y.to(dtype))


def splits_for(places: int, capacity: int, multiprocessors: int) -> int:
    """Into how many runs the tokens of each row and head are cut: enough for the chip, none shorter than TOKENS."""
    return max(1, min(-(-capacity // TOKENS), PROGRAMS * multiprocessors // places, MOST_SPLITS))


def attend_token(
    qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, position: Tensor, counters: Tensor,
    scaling: float, splits: int | None = None,
) -> Tensor:  # fmt: skip
    """y [batch, heads · dim]. `splits` in place of `splits_for`."""
    batch, kv_heads, capacity, dim = keys.shape
    heads = qkv.shape[1] // dim - 2 * kv_heads
    early = overlaps(qkv)
    splits = splits or splits_for(batch * kv_heads, capacity, processors(qkv.device))
    y = qkv.new_empty(batch, heads * dim)
    sums = torch.empty(batch * heads * splits * dim if splits > 1 else 1, dtype=torch.float32, device=qkv.device)
    tops = torch.empty(batch * heads * splits * 2 if splits > 1 else 1, dtype=torch.float32, device=qkv.device)
    _token_attention_kernel[(batch * kv_heads, splits)](
        qkv.contiguous(), cos.contiguous(), sin.contiguous(), keys, values, position, y, sums, tops, counters,
        capacity, dim if len(cos) > 1 else 0, scaling / math.log(2),
        kv_heads, heads // kv_heads, dim, splits, triton.next_power_of_2(splits),
        TOKENS if heads == kv_heads else TOKENS // 2 if heads <= 4 * kv_heads else TOKENS // 4, early,
        num_warps=4, **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
    return y
