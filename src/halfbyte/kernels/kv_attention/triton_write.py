"""New tokens to codes, steps and zeros in their places of a cache: keys and values in one launch.

A program has TOKENS tokens of one row and head, of the keys or of the values. Divisions are rounded correctly, so that
codes are those of torch.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportOptionalMemberAccess=false
# triton's decorators change signatures in ways that types do not tell

import triton
import triton.language as tl
from torch import Tensor

from halfbyte.kernels.kv_attention.tokens import PackedTokens

LARGEST = tl.constexpr(65504.0)
ROUNDER = tl.constexpr(12582912.0)  # 1.5 · 2**23: adding it rounds to an integer, ties to even
TOKENS = 8
SLOTS = {2, 4, 8}  # widths of which bytes hold whole codes


@triton.jit
def _stored(x):
    return tl.minimum(tl.maximum(x, -LARGEST), LARGEST).to(tl.float16)


@triton.jit
def _write(
    x_ptr, shift_ptr, scale_ptr, codes_ptr, steps_ptr, zeros_ptr, x_at, codes_at, grids_at, channels_at, token, counts,
    x_token, DIM: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr, SHIFTED: tl.constexpr, SCALED: tl.constexpr,
    SYMMETRIC: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    EACH: tl.constexpr = DIM // GROUPS
    group, within = tl.arange(0, GROUPS), tl.arange(0, EACH)
    channel = (group[:, None] * EACH + within[None, :])[None]
    x = tl.load(x_ptr + x_at + token[:, None, None] * x_token + channel, mask=counts[:, None, None], other=0.0)
    x = x.to(tl.float32)
    if SHIFTED:
        x -= tl.load(shift_ptr + channels_at + channel)
    if SCALED:
        x = tl.div_rn(x, tl.load(scale_ptr + channels_at + channel) + tl.zeros_like(x))
    low, high = tl.min(x, 2), tl.max(x, 2)
    if SYMMETRIC:
        HALF: tl.constexpr = 2 ** (BITS - 1)
        step = _stored(tl.div_rn(tl.maximum(-low, high), tl.zeros_like(low) + (HALF - 1)))
        above, least = x, -HALF
    else:
        zero = _stored(low)
        step = _stored(tl.div_rn(high - zero.to(tl.float32), tl.zeros_like(low) + (2**BITS - 1)))
        above, least = x - zero.to(tl.float32)[:, :, None], 0
        tl.store(zeros_ptr + grids_at + token[:, None] * GROUPS + group[None, :], zero, mask=counts[:, None])
    tl.store(steps_ptr + grids_at + token[:, None] * GROUPS + group[None, :], step, mask=counts[:, None])
    wide = step.to(tl.float32)[:, :, None] + tl.zeros_like(x)
    ratio = tl.where(wide > 0, tl.div_rn(above, tl.where(wide > 0, wide, 1.0)), 0.0)
    ratio = tl.minimum(tl.maximum(ratio, least), least + (2**BITS - 1))
    codes = ((ratio + ROUNDER) - ROUNDER).to(tl.int32) - least
    SLOTS: tl.constexpr = 8 // BITS
    parts = tl.reshape(codes, (TOKENS, DIM // SLOTS, SLOTS)) << (tl.arange(0, SLOTS) * BITS)[None, None, :]
    byte = tl.arange(0, DIM // SLOTS)
    at = codes_at + token[:, None] * (DIM // SLOTS) + byte[None, :]
    tl.store(codes_ptr + at, tl.sum(parts, 2).to(tl.uint8), mask=counts[:, None])


@triton.jit(do_not_specialize=["tokens", "kv_heads"])
def write_kernel(
    key_ptr, value_ptr, position_ptr, key_shift_ptr, key_scale_ptr, value_shift_ptr, value_scale_ptr,
    key_codes_ptr, key_steps_ptr, key_zeros_ptr, value_codes_ptr, value_steps_ptr, value_zeros_ptr,
    tokens, kv_heads, key_batch, key_head, key_token, value_batch, value_head, value_token,
    key_codes_batch, key_codes_head, key_grids_batch, key_grids_head,
    value_codes_batch, value_codes_head, value_grids_batch, value_grids_head,
    DIM: tl.constexpr, KEY_GROUPS: tl.constexpr, VALUE_GROUPS: tl.constexpr, KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr, KEY_SHIFT: tl.constexpr, KEY_SCALE: tl.constexpr, VALUE_SHIFT: tl.constexpr,
    VALUE_SCALE: tl.constexpr, KEY_SYMMETRIC: tl.constexpr, VALUE_SYMMETRIC: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Strides in elements of what they are strides of."""
    row = tl.program_id(1)
    head, batch = row % kv_heads, (row // kv_heads).to(tl.int64)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    counts = token < tokens
    token = token.to(tl.int64)
    position = tl.load(position_ptr + batch).to(tl.int64)
    if tl.program_id(2) == 0:
        _write(
            key_ptr, key_shift_ptr, key_scale_ptr, key_codes_ptr, key_steps_ptr, key_zeros_ptr,
            batch * key_batch + head * key_head,
            batch * key_codes_batch + head * key_codes_head + position * (DIM * KEY_BITS // 8),
            batch * key_grids_batch + head * key_grids_head + position * KEY_GROUPS, head * DIM, token, counts, key_token,
            DIM, KEY_GROUPS, KEY_BITS, KEY_SHIFT, KEY_SCALE, KEY_SYMMETRIC, TOKENS,
        )  # fmt: skip
    else:
        _write(
            value_ptr, value_shift_ptr, value_scale_ptr, value_codes_ptr, value_steps_ptr, value_zeros_ptr,
            batch * value_batch + head * value_head,
            batch * value_codes_batch + head * value_codes_head + position * (DIM * VALUE_BITS // 8),
            batch * value_grids_batch + head * value_grids_head + position * VALUE_GROUPS, head * DIM, token, counts,
            value_token, DIM, VALUE_GROUPS, VALUE_BITS, VALUE_SHIFT, VALUE_SCALE, VALUE_SYMMETRIC, TOKENS,
        )  # fmt: skip


def can_write(dim: int, *sides: PackedTokens) -> bool:
    """Whether the kernel knows these widths: codes that fill bytes, and powers of two."""
    powers = [dim, *(dim // tokens.scales.shape[3] for tokens in sides)]
    return all(not n & (n - 1) for n in powers) and all(tokens.codes.shape[3] * 8 // dim in SLOTS for tokens in sides)


def write(
    keys: PackedTokens, values: PackedTokens, key: Tensor, value: Tensor, position: Tensor,
    smoothing: list[Tensor | None],
) -> None:  # fmt: skip
    """Edits the caches. Channels of key and value are contiguous, smoothing is float32."""
    batch, kv_heads, tokens, dim = key.shape
    write_kernel[(triton.cdiv(tokens, TOKENS if tokens > 1 else 1), batch * kv_heads, 2)](
        key, value, position, *(key if part is None else part for part in smoothing),
        *(keys.codes if part is None else part for part in keys),
        *(values.codes if part is None else part for part in values),
        tokens, kv_heads, *key.stride()[:3], *value.stride()[:3],
        *keys.codes.stride()[:2], *keys.scales.stride()[:2], *values.codes.stride()[:2], *values.scales.stride()[:2],
        dim, keys.scales.shape[3], values.scales.shape[3], keys.codes.shape[3] * 8 // dim, values.codes.shape[3] * 8 // dim,
        *(part is not None for part in smoothing), keys.zeros is None, values.zeros is None,
        TOKENS if tokens > 1 else 1,
        num_warps=4 if tokens > 1 else 1,
    )  # fmt: skip
