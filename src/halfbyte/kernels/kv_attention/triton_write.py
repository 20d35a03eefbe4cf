"""New tokens to codes, steps and zeros in their places of a cache: keys and values in one launch.

A program has tokens of one row and head, or the only new token of several, of the keys or of the values. Divisions are
rounded correctly, so that codes are those of torch.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportOptionalMemberAccess=false
# triton's decorators change signatures in ways that types do not tell
# ruff: noqa: RET505 - triton compiles what follows a return

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte.kernels.kv_attention.tokens import PackedTokens

LARGEST = tl.constexpr(65504.0)
ROUNDER = tl.constexpr(12582912.0)  # 1.5 · 2**23: adding it rounds to an integer, ties to even
ROUNDER_BITS = tl.constexpr(0x4B400000)
AT_ONCE, WARPS = 32, 2  # tokens of a program
SINGLE_AT_ONCE, SINGLE_WARPS = 8, 4
WIDTHS = {2, 4, 8}  # in bits, of which words hold whole codes


@triton.jit
def _stored(x):
    return tl.minimum(tl.maximum(x, -LARGEST), LARGEST).to(tl.float16)


@triton.jit
def _reciprocal(x, FUSED: tl.constexpr):
    """1 / x, rounded correctly; of a positive x."""
    if FUSED:  # a Newton step: fused products tell the error of the first guess exactly
        near = 1.0 / x
        return tl.fma(tl.fma(-near, x, tl.zeros_like(x) + 1.0), near, near)
    else:
        return tl.div_rn(tl.zeros_like(x) + 1.0, x)


@triton.jit
def _quotient(x, divisor, reciprocal, FUSED: tl.constexpr):
    """x / divisor, rounded correctly."""
    if FUSED:
        near = x * reciprocal
        return tl.fma(tl.fma(-near, divisor, x), reciprocal, near)
    else:
        return tl.div_rn(x, divisor)


@triton.jit
def channels(DIM: tl.constexpr, GROUPS: tl.constexpr):
    """[1, groups, channels of a group]."""
    EACH: tl.constexpr = DIM // GROUPS
    return (tl.arange(0, GROUPS)[:, None] * EACH + tl.arange(0, EACH)[None, :])[None]


@triton.jit
def _write(
    x_ptr, shift_ptr, scale_ptr, words_ptr, steps_ptr, zeros_ptr, x_at, words_at, grids_at, channels_at, counts,
    DIM: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr, SHIFTED: tl.constexpr, SCALED: tl.constexpr,
    SYMMETRIC: tl.constexpr, ROWS: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
    at = x_at[:, None, None] + channels(DIM, GROUPS)
    write_codes(
        tl.load(x_ptr + at, mask=counts[:, None, None], other=0.0).to(tl.float32), shift_ptr, scale_ptr, words_ptr,
        steps_ptr, zeros_ptr, words_at, grids_at, channels_at, counts, DIM, GROUPS, BITS, SHIFTED, SCALED, SYMMETRIC,
        ROWS, FUSED,
    )  # fmt: skip


@triton.jit
def write_codes(
    x, shift_ptr, scale_ptr, words_ptr, steps_ptr, zeros_ptr, words_at, grids_at, channels_at, counts,
    DIM: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr, SHIFTED: tl.constexpr, SCALED: tl.constexpr,
    SYMMETRIC: tl.constexpr, ROWS: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
    """x: float32, [ROWS, groups, channels of a group]; where each row goes, and whether it does."""
    group, channel = tl.arange(0, GROUPS), channels(DIM, GROUPS)
    if SHIFTED:
        x -= tl.load(shift_ptr + channels_at[:, None, None] + channel)
    if SCALED:
        x = tl.div_rn(x, tl.load(scale_ptr + channels_at[:, None, None] + channel) + tl.zeros_like(x))
    low, high = tl.min(x, 2), tl.max(x, 2)
    grid = grids_at[:, None] + group[None, :]
    if SYMMETRIC:
        HALF: tl.constexpr = 2 ** (BITS - 1)
        reach, widest = tl.maximum(-low, high), tl.zeros_like(low) + (HALF - 1)
        above, least = x, -HALF
    else:
        zero = _stored(low)
        reach, widest = high - zero.to(tl.float32), tl.zeros_like(low) + (2**BITS - 1)
        above, least = x - zero.to(tl.float32)[:, :, None], 0
        tl.store(zeros_ptr + grid, zero, mask=counts[:, None])
    step = _stored(_quotient(reach, widest, _reciprocal(widest, FUSED), FUSED))
    tl.store(steps_ptr + grid, step, mask=counts[:, None])
    wide = step.to(tl.float32)
    some = wide > 0
    wide = tl.where(some, wide, 1.0)
    above = tl.where(some[:, :, None], above, 0.0)
    ratio = _quotient(above, wide[:, :, None] + tl.zeros_like(x), _reciprocal(wide, FUSED)[:, :, None], FUSED)
    ratio = tl.minimum(tl.maximum(ratio, least), least + (2**BITS - 1))
    # adding it leaves the rounded number in the last bits
    codes = (ratio + ROUNDER).to(tl.int32, bitcast=True) - (ROUNDER_BITS + least)
    SLOTS: tl.constexpr = 32 // BITS
    parts = tl.reshape(codes, (ROWS, DIM // SLOTS, SLOTS)) << (tl.arange(0, SLOTS) * BITS)[None, None, :]
    word = tl.arange(0, DIM // SLOTS)
    tl.store(words_ptr + words_at[:, None] + word[None, :], tl.sum(parts, 2), mask=counts[:, None])


@triton.jit(do_not_specialize=["tokens", "kv_heads", "rows", "next_position"])
def write_kernel(
    key_ptr, value_ptr, position_ptr, key_shift_ptr, key_scale_ptr, value_shift_ptr, value_scale_ptr,
    key_words_ptr, key_steps_ptr, key_zeros_ptr, value_words_ptr, value_steps_ptr, value_zeros_ptr,
    tokens, kv_heads, rows, next_position, key_batch, key_head, key_token, value_batch, value_head, value_token,
    key_words_batch, key_words_head, key_grids_batch, key_grids_head,
    value_words_batch, value_words_head, value_grids_batch, value_grids_head,
    DIM: tl.constexpr, KEY_GROUPS: tl.constexpr, VALUE_GROUPS: tl.constexpr, KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr, KEY_SHIFT: tl.constexpr, KEY_SCALE: tl.constexpr, VALUE_SHIFT: tl.constexpr,
    VALUE_SCALE: tl.constexpr, KEY_SYMMETRIC: tl.constexpr, VALUE_SYMMETRIC: tl.constexpr, ROWS: tl.constexpr,
    SINGLE: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
    """Strides in elements of what they are strides of. SINGLE: one token for each row and head, ROWS of them here."""
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    if SINGLE:
        counts, token = place < rows, place * 0
        row = tl.minimum(place, rows - 1)
    else:
        counts, token = place < tokens, place
        row = tl.program_id(1) + place * 0
    head, batch = row % kv_heads, (row // kv_heads).to(tl.int64)
    token = token.to(tl.int64)
    position = tl.load(position_ptr + batch * next_position).to(tl.int64) + token
    if tl.program_id(2) == 0:
        _write(
            key_ptr, key_shift_ptr, key_scale_ptr, key_words_ptr, key_steps_ptr, key_zeros_ptr,
            batch * key_batch + head * key_head + token * key_token,
            batch * key_words_batch + head * key_words_head + position * (DIM * KEY_BITS // 32),
            batch * key_grids_batch + head * key_grids_head + position * KEY_GROUPS, head * DIM, counts,
            DIM, KEY_GROUPS, KEY_BITS, KEY_SHIFT, KEY_SCALE, KEY_SYMMETRIC, ROWS, FUSED,
        )  # fmt: skip
    else:
        _write(
            value_ptr, value_shift_ptr, value_scale_ptr, value_words_ptr, value_steps_ptr, value_zeros_ptr,
            batch * value_batch + head * value_head + token * value_token,
            batch * value_words_batch + head * value_words_head + position * (DIM * VALUE_BITS // 32),
            batch * value_grids_batch + head * value_grids_head + position * VALUE_GROUPS, head * DIM, counts,
            DIM, VALUE_GROUPS, VALUE_BITS, VALUE_SHIFT, VALUE_SCALE, VALUE_SYMMETRIC, ROWS, FUSED,
        )  # fmt: skip


def can_write(dim: int, *sides: PackedTokens) -> bool:
    """Whether the kernel knows these widths: codes that fill words, and powers of two."""
    powers = [dim, *(dim // tokens.scales.shape[3] for tokens in sides)]
    whole = all(not tokens.codes.shape[3] % 4 and tokens.codes.data_ptr() % 4 == 0 for tokens in sides)
    known = all(tokens.codes.shape[3] * 8 // dim in WIDTHS for tokens in sides)
    return whole and known and all(not n & (n - 1) for n in powers)


def write(
    keys: PackedTokens, values: PackedTokens, key: Tensor, value: Tensor, position: Tensor,
    smoothing: list[Tensor | None], fused: bool = True,
) -> None:  # fmt: skip
    """Edits the caches. Channels of key and value are contiguous, smoothing is float32.

    `fused`: products and sums are rounded once, as on a GPU and not in the interpreter.
    """
    batch, kv_heads, tokens, dim = key.shape
    single = tokens == 1
    rows = SINGLE_AT_ONCE if single else min(AT_ONCE, triton.next_power_of_2(tokens))
    grid = (triton.cdiv(batch * kv_heads, rows), 1, 2) if single else (triton.cdiv(tokens, rows), batch * kv_heads, 2)
    words = [tokens.codes.view(torch.int32) for tokens in (keys, values)]
    write_kernel[grid](
        key, value, position, *(key if part is None else part for part in smoothing),
        words[0], keys.scales, key if keys.zeros is None else keys.zeros,
        words[1], values.scales, key if values.zeros is None else values.zeros,
        tokens, kv_heads, batch * kv_heads, position.stride(0), *key.stride()[:3], *value.stride()[:3],
        *words[0].stride()[:2], *keys.scales.stride()[:2], *words[1].stride()[:2], *values.scales.stride()[:2],
        dim, keys.scales.shape[3], values.scales.shape[3], keys.codes.shape[3] * 8 // dim, values.codes.shape[3] * 8 // dim,
        *(part is not None for part in smoothing), keys.zeros is None, values.zeros is None,
        rows, single, fused, num_warps=SINGLE_WARPS if single else WARPS,
    )  # fmt: skip
