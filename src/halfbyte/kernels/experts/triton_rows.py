"""Tokens to rows that are sorted by expert and back, without the host knowing how many rows an expert has.

    pairs      a token and one of its experts: pair = token · k + choice
    rows       the pairs, those of the first expert first, in their order
    order      row ─► pair            places     pair ─► row
    schedule   [0, 0]: how many blocks of tokens there are; [1 + block]: its expert, its first row, where its expert ends

Blocks have BLOCK_M rows, the last of an expert fewer; there are at most pairs // BLOCK_M + experts.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false
# triton's decorators change signatures in ways that types do not tell

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from halfbyte.kernels.token_quantize.triton_codes import as_float32, encode, grid_of, rounded, sigmoid, widened

EARLY = True  # all but the first launch may start while the one before it ends
COMPARED = 8192  # pairs times experts that one program compares at once
CHUNK = 2048  # pairs, where every expert has a program
BLOCK = 1024  # columns of a program that sums rows


@triton.jit(do_not_specialize=["pairs", "slots"])
def _route_kernel(
    index_ptr, order_ptr, places_ptr, schedule_ptr, pairs, slots,
    BLOCK_M: tl.constexpr, EXPERTS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """One program that sees all pairs. EXPERTS and PAIRS are powers of two."""
    expert = tl.arange(0, EXPERTS)
    pair = tl.arange(0, PAIRS)
    index = tl.load(index_ptr + pair, mask=pair < pairs, other=-1).to(tl.int32)
    own = (index[:, None] == expert[None, :]).to(tl.int32)
    counts = tl.sum(own, 0)
    ends = tl.cumsum(counts, 0)
    begins = ends - counts
    place = tl.sum(own * (begins[None, :] + tl.cumsum(own, 0) - 1), 1)
    tl.store(places_ptr + pair, place, mask=pair < pairs)
    tl.store(order_ptr + place, pair, mask=pair < pairs)
    blocks = (counts + BLOCK_M - 1) // BLOCK_M
    block_ends = tl.cumsum(blocks, 0)
    tl.store(schedule_ptr, tl.sum(blocks, 0))
    for first in range(0, slots, PAIRS):
        slot = first + tl.arange(0, PAIRS)
        within = slot[:, None] - (block_ends - blocks)[None, :]
        here = (within >= 0) & (within < blocks[None, :])
        entry = schedule_ptr + 4 + slot * 4
        tl.store(entry, tl.sum(tl.where(here, expert[None, :], 0), 1), mask=slot < slots)
        row = begins[None, :] + within * BLOCK_M
        tl.store(entry + 1, tl.sum(tl.where(here, row, 0), 1), mask=slot < slots)
        tl.store(entry + 2, tl.sum(tl.where(here, ends[None, :], 0), 1), mask=slot < slots)


@triton.jit(do_not_specialize=["pairs"])
def _count_kernel(index_ptr, counts_ptr, pairs, CHUNK: tl.constexpr):
    """A program for each expert: how many pairs it has."""
    expert = tl.program_id(0)
    own = tl.zeros((CHUNK,), tl.int32)
    for first in range(0, pairs, CHUNK):
        pair = first + tl.arange(0, CHUNK)
        own += (tl.load(index_ptr + pair, mask=pair < pairs, other=-1).to(tl.int32) == expert).to(tl.int32)
    tl.store(counts_ptr + expert, tl.sum(own, 0))


@triton.jit(do_not_specialize=["pairs", "experts"])
def _place_kernel(
    index_ptr, counts_ptr, order_ptr, places_ptr, schedule_ptr, pairs, experts,
    BLOCK_M: tl.constexpr, EXPERTS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """A program for each expert: its rows and its blocks."""
    expert = tl.program_id(0)
    other = tl.arange(0, EXPERTS)
    counts = tl.load(counts_ptr + other, mask=other < experts, other=0)
    blocks = (counts + BLOCK_M - 1) // BLOCK_M
    row = tl.sum(tl.where(other < expert, counts, 0), 0)
    end = tl.sum(tl.where(other <= expert, counts, 0), 0)
    slot = tl.sum(tl.where(other < expert, blocks, 0), 0)
    tl.store(schedule_ptr, tl.sum(blocks, 0))  # by all: they agree
    for first in range(row, end, BLOCK_M):
        entry = schedule_ptr + 4 + slot * 4
        tl.store(entry, expert)
        tl.store(entry + 1, first)
        tl.store(entry + 2, end)
        slot += 1
    for first in range(0, pairs, CHUNK):
        pair = first + tl.arange(0, CHUNK)
        index = tl.load(index_ptr + pair, mask=pair < pairs, other=-1).to(tl.int32)
        own = (index == expert).to(tl.int32)
        place = row + tl.cumsum(own, 0) - 1
        tl.store(places_ptr + pair, place, mask=own > 0)
        tl.store(order_ptr + place, pair, mask=own > 0)
        row += tl.sum(own, 0)


def route(index: Tensor, experts: int, block_m: int) -> tuple[Tensor, Tensor, Tensor]:
    """`order`, `places` and `schedule` of experts `index` [tokens, k], all below `experts`."""
    index = index.contiguous()
    pairs, slots, padded = index.numel(), index.numel() // block_m + experts, triton.next_power_of_2(experts)
    order = torch.empty(pairs, dtype=torch.int32, device=index.device)
    places = torch.empty_like(order)
    schedule = torch.empty(slots + 1, 4, dtype=torch.int32, device=index.device)
    at_once = COMPARED // padded
    if pairs <= at_once:
        seen = min(64, at_once) if pairs <= 64 else at_once
        _route_kernel[(1,)](index, order, places, schedule, pairs, slots, block_m, padded, seen, num_warps=8)
    else:
        counts = torch.empty(experts, dtype=torch.int32, device=index.device)
        _count_kernel[(experts,)](index, counts, pairs, CHUNK, num_warps=8)
        _place_kernel[(experts,)](
            index, counts, order, places, schedule, pairs, experts, block_m, padded, CHUNK, num_warps=8
        )  # fmt: skip
    return order, places, schedule


@triton.jit
def _spread_kernel(
    x_ptr, order_ptr, rows_ptr, scales_ptr, ins, x_stride,
    K: tl.constexpr, ENCODED: tl.constexpr, BLOCK: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """A program for each row: its token, as int8 codes with a scale if ENCODED."""
    if PTX:
        gdc_wait()  # for `order`: and so the schedule is there as well when a product begins
        gdc_launch_dependents()
    row = tl.program_id(0)
    token = tl.load(order_ptr + row) // K
    lane = tl.arange(0, BLOCK)[None, :]
    # int64: activations may have more than 2**31 elements
    x = tl.load(x_ptr + token.to(tl.int64) * x_stride + lane, mask=lane < ins, other=0.0)
    to = rows_ptr + row.to(tl.int64) * ins + lane
    if ENCODED:
        none = tl.zeros((1, BLOCK), dtype=tl.float32)
        lows, highs = widened(none, none, as_float32(x, PTX), True)
        scale, zero = grid_of(lows, highs, True)
        tl.store(to, encode(as_float32(x, PTX), scale, zero, True), mask=lane < ins)
        tl.store(scales_ptr + row + tl.arange(0, 1), scale)
    else:
        tl.store(to, x, mask=lane < ins)


def spread(x: Tensor, order: Tensor, k: int, encoded: bool) -> tuple[Tensor, Tensor | None]:
    """The tokens row by row, [tokens · k, in]: as they are, or as int8 codes, with their scales."""
    x = x if x.stride(1) == 1 else x.contiguous()
    ins, pairs = x.shape[1], order.shape[0]
    rows = torch.empty(pairs, ins, dtype=torch.int8 if encoded else x.dtype, device=x.device)
    scales = torch.empty(pairs, dtype=torch.float32, device=x.device) if encoded else None
    block = triton.next_power_of_2(ins)
    _spread_kernel[(pairs,)](
        x, order, rows, rows if scales is None else scales, ins, x.stride(0), k, encoded, block, x.is_cuda,
        num_warps=min(max(block // 512, 1), 16), launch_pdl=EARLY,
    )  # fmt: skip
    return rows, scales


@triton.jit
def _gate_kernel(both_ptr, y_ptr, inner, BLOCK: tl.constexpr, PTX: tl.constexpr):
    if PTX:
        gdc_wait()
        gdc_launch_dependents()
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = as_float32(tl.load(both_ptr + row * (2 * inner) + k, mask=k < inner, other=0.0), PTX)
    up = tl.load(both_ptr + row * (2 * inner) + inner + k, mask=k < inner, other=0.0)
    gate = rounded(gate * sigmoid(gate, PTX), dtype, PTX)
    y = as_float32(gate, PTX) * as_float32(up, PTX)
    tl.store(y_ptr + row * inner + k, rounded(y, dtype, PTX), mask=k < inner)


def silu_mul(both: Tensor) -> Tensor:
    """silu(gate) · up of rows with both side by side, each step rounded to their dtype."""
    rows, inner = both.shape[0], both.shape[1] // 2
    y = torch.empty(rows, inner, dtype=both.dtype, device=both.device)
    _gate_kernel[(rows, triton.cdiv(inner, 2 * BLOCK))](
        both, y, inner, 2 * BLOCK, both.is_cuda, num_warps=8, launch_pdl=EARLY
    )
    return y


@triton.jit
def _combine_kernel(
    rows_ptr, places_ptr, weights_ptr, y_ptr, outs, K: tl.constexpr, BLOCK: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    if PTX:
        gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for choice in tl.static_range(K):
        row = tl.load(places_ptr + token * K + choice).to(tl.int64)
        weight = tl.load(weights_ptr + token * K + choice).to(tl.float32)
        total += as_float32(tl.load(rows_ptr + row * outs + n, mask=n < outs, other=0.0), PTX) * weight
    tl.store(y_ptr + token * outs + n, rounded(total, y_ptr.dtype.element_ty, PTX), mask=n < outs)


def combine(rows: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """Each token's rows times their weights [tokens, k], summed in float32 and rounded once."""
    (tokens, k), outs, weights = weights.shape, rows.shape[1], weights.contiguous()
    y = torch.empty(tokens, outs, dtype=rows.dtype, device=rows.device)
    _combine_kernel[(tokens, triton.cdiv(outs, BLOCK))](
        rows, places, weights, y, outs, k, BLOCK, rows.is_cuda, launch_pdl=EARLY
    )
    return y
