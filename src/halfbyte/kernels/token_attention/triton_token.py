"""One launch for a step on a float cache: RoPE, write, attention split over tokens, and the splits put together.

    program (row and head of keys, split)   past tokens of the split ─► sums, largest score, total, for each query head
    split 0                                 rotates and stores the new key, stores the new value, and sees them
    the last to be done                     puts the splits together ─► y

The past tokens were written long before, so a program loads its first ones before the product ahead of it ends.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportOptionalMemberAccess=false
# triton's decorators change signatures in ways that types do not tell
# ruff: noqa: RET505 - triton compiles what follows a return

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte.kernels.device import overlaps, processors

TOKENS, WARPS, STAGES = 64, 4, 2  # that a program has at once; its warps; how many such pieces are on their way
WARPS_OF_SPLITS = 8  # short runs: few instructions of a warp, one after the other, are what takes time
FEWEST_TOKENS = 32  # of a split
PROGRAMS = 2  # a multiprocessor's
MOST_SPLITS = 32
FEWEST_HEADS = 16  # of a product on tensor cores
NOTHING = tl.constexpr(-1.0e30)


@triton.jit
def _rotated(x_ptr, cos_ptr, sin_ptr, d, counts, DIM: tl.constexpr):
    """Heads after RoPE, in float32; zero where they do not count."""
    x = tl.load(x_ptr + d, mask=counts, other=0.0).to(tl.float32)
    other = tl.load(x_ptr + (d + DIM // 2) % DIM, mask=counts, other=0.0).to(tl.float32)
    other = tl.where(d < DIM // 2, -other, other)
    return x * tl.load(cos_ptr + d).to(tl.float32) + other * tl.load(sin_ptr + d).to(tl.float32)


@triton.jit
def _dot(x, y, WIDE: tl.constexpr):
    """In float32."""
    if WIDE:
        return tl.dot(x.to(tl.float32), y.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(x, y)


@triton.jit
def _seen(query, key, value, there, tops, totals, sums, score_scale, WIDE: tl.constexpr):
    """Largest scores, totals and sums of [HEADS, dim] queries, now with so many tokens more, those that are `there`."""
    scores = tl.where(there[None, :], _dot(query, tl.trans(key), WIDE) * score_scale, NOTHING)
    top = tl.maximum(tops, tl.max(scores, 1))
    shares = tl.where(there[None, :], tl.exp2(scores - top[:, None]), 0.0)
    fade = tl.exp2(tops - top)
    return top, totals * fade + tl.sum(shares, 1), sums * fade[:, None] + _dot(shares.to(value.dtype), value, WIDE)


@triton.jit
def _put_together(
    y_ptr, sums_ptr, tops_ptr, first_head, d, dtype: tl.constexpr, TOGETHER: tl.constexpr, TOGETHER_OR_MORE: tl.constexpr,
    DIM: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """The answers of TOGETHER query heads, of what their splits have left. A thread sums what it has of all splits itself."""
    h = tl.arange(0, TOGETHER_OR_MORE)
    parts = (first_head + h) * SPLITS
    # as another program wrote it: not from this multiprocessor's own cache
    tops, totals = (), ()
    for s in tl.static_range(SPLITS):
        at = tops_ptr + (parts + s) * 2
        tops += (tl.load(at, mask=h < TOGETHER, other=0.0, cache_modifier=".cg"),)
        totals += (tl.load(at + 1, mask=h < TOGETHER, other=1.0, cache_modifier=".cg"),)
    top = tops[0]
    for s in tl.static_range(1, SPLITS):
        top = tl.maximum(top, tops[s])
    total = tl.zeros_like(top)
    y = tl.zeros((TOGETHER_OR_MORE, DIM), tl.float32)
    real = (h < TOGETHER)[:, None] & (d < DIM)[None, :]
    for s in tl.static_range(SPLITS):
        fade = tl.exp2(tops[s] - top)
        total += totals[s] * fade
        places = (parts + s)[:, None] * DIM + d[None, :]
        y += tl.load(sums_ptr + places, mask=real, other=0.0, cache_modifier=".cg") * fade[:, None]
    tl.store(y_ptr + (first_head + h)[:, None] * DIM + d[None, :], (y / total[:, None]).to(dtype), mask=real)


@triton.jit(do_not_specialize=["capacity"])
def _token_attention_kernel(
    qkv_ptr, cos_ptr, sin_ptr, keys_ptr, values_ptr, position_ptr, y_ptr, sums_ptr, tops_ptr, counters_ptr,
    capacity, cos_stride, score_scale,
    KV_HEADS: tl.constexpr, TOGETHER: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, SPLITS: tl.constexpr,
    TOGETHER_OR_MORE: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr, WIDE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """TOGETHER query heads share a head of keys; HEADS: so many that tensor cores take them; TOGETHER_OR_MORE: the
    power of two from TOGETHER on. WIDE: products of float32."""
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
    all_heads: tl.constexpr = KV_HEADS * TOGETHER
    qkv_ptr += row * (all_heads + 2 * KV_HEADS) * DIM
    cos_ptr += row * cos_stride
    sin_ptr += row * cos_stride
    new_key = _rotated(qkv_ptr + (all_heads + head) * DIM, cos_ptr, sin_ptr, d, d < DIM, DIM).to(dtype)
    new_value = tl.load(qkv_ptr + (all_heads + KV_HEADS + head) * DIM + d)
    if split == 0:
        tl.store(keys_ptr + base + past.to(tl.int64) * DIM + d, new_key)
        tl.store(values_ptr + base + past.to(tl.int64) * DIM + d, new_value)
    h = tl.arange(0, HEADS)
    real = (h < TOGETHER)[:, None] & (d < DIM)[None, :]
    queries_ptr = qkv_ptr + (head * TOGETHER + h)[:, None] * DIM
    query = _rotated(queries_ptr, cos_ptr, sin_ptr, d[None, :], real, DIM).to(dtype)
    own = tl.sum(query.to(tl.float32) * new_key.to(tl.float32)[None, :], 1) * score_scale
    tops = tl.where(split == 0, own, NOTHING)
    totals = tl.where(split == 0, 1.0, 0.0) + tl.zeros_like(own)
    sums = tl.where(split == 0, new_value.to(tl.float32)[None, :], 0.0) + tl.zeros_like(query).to(tl.float32)
    tops, totals, sums = _seen(query, key, value, first + t < last, tops, totals, sums, score_scale, WIDE)
    for at in tl.range(first + TOKENS, last, TOKENS, num_stages=STAGES):
        there = at + t < last
        within = base + (at + t)[:, None].to(tl.int64) * DIM + d[None, :]
        key = tl.load(keys_ptr + within, mask=there[:, None], other=0.0)
        value = tl.load(values_ptr + within, mask=there[:, None], other=0.0)
        tops, totals, sums = _seen(query, key, value, there, tops, totals, sums, score_scale, WIDE)
    query_heads = row * all_heads + head * TOGETHER + h
    if SPLITS == 1:
        tl.store(y_ptr + query_heads[:, None] * DIM + d[None, :], (sums / totals[:, None]).to(dtype), mask=real)
    else:
        parts = query_heads.to(tl.int64) * SPLITS + split
        tl.store(sums_ptr + parts[:, None] * DIM + d[None, :], sums, mask=real)
        tl.store(tops_ptr + parts * 2, tops, mask=h < TOGETHER)
        tl.store(tops_ptr + parts * 2 + 1, totals, mask=h < TOGETHER)
        tl.debug_barrier()  # every thread's part is there before the program says that it is done
        if tl.atomic_add(counters_ptr + place, 1, sem="acq_rel") == SPLITS - 1:
            tl.store(counters_ptr + place, 0)
            first_head = (row * all_heads + head * TOGETHER).to(tl.int64)
            _put_together(y_ptr, sums_ptr, tops_ptr, first_head, d, dtype, TOGETHER, TOGETHER_OR_MORE, DIM, SPLITS)


def splits_for(places: int, capacity: int, multiprocessors: int) -> int:
    """Into how many runs the tokens of each row and head are cut: enough for the chip, none too short."""
    return max(1, min(-(-capacity // FEWEST_TOKENS), PROGRAMS * multiprocessors // places, MOST_SPLITS))


def attend_token(
    qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, position: Tensor, counters: Tensor,
    scaling: float, splits: int | None = None,
) -> Tensor:  # fmt: skip
    """y [batch, heads · dim]. `splits` in place of `splits_for`."""
    batch, kv_heads, capacity, dim = keys.shape
    heads = qkv.shape[1] // dim - 2 * kv_heads
    together = heads // kv_heads
    early, wide = overlaps(qkv), qkv.dtype == torch.float32 or not qkv.is_cuda  # interpreted, bfloat16 has no products
    splits = splits or splits_for(batch * kv_heads, capacity, processors(qkv.device))
    y = qkv.new_empty(batch, heads * dim)
    sums = torch.empty(batch * heads * splits * dim if splits > 1 else 1, dtype=torch.float32, device=qkv.device)
    tops = torch.empty(batch * heads * splits * 2 if splits > 1 else 1, dtype=torch.float32, device=qkv.device)
    _token_attention_kernel[(batch * kv_heads, splits)](
        qkv.contiguous(), cos.contiguous(), sin.contiguous(), keys, values, position, y, sums, tops, counters,
        capacity, dim if len(cos) > 1 else 0, scaling / math.log(2),
        kv_heads, together, max(FEWEST_HEADS, triton.next_power_of_2(together)), dim, splits,
        triton.next_power_of_2(together), TOKENS, STAGES, wide, early,
        num_warps=WARPS if splits == 1 else WARPS_OF_SPLITS, **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
    return y
