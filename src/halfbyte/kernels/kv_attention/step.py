"""A step of decoding on a packed cache from what a fused layer's product gives: RoPE, the new token's codes, attention.

`attend_new_token` is the `torch.library` op `torch.ops.halfbyte.kv_step`, with a fake implementation for `torch.compile`
and CUDA graphs. It is for batches whose rows are equally long, and heads that are rotated whole. On CUDA it is three
launches, each of which begins before the one ahead of it ends: triton_new_token, and those of `decode_attention`.
Elsewhere, and for codes that `triton_write` does not know, it is `write_tokens` and `decode_attention`.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from halfbyte.errors import FormatError
from halfbyte.kernels.device import overlaps
from halfbyte.kernels.kv_attention import decode_attention, launch
from halfbyte.kernels.kv_attention.checks import DTYPES, check_keys, check_step
from halfbyte.kernels.kv_attention.kept import held_before, row_of
from halfbyte.kernels.kv_attention.tokens import (
    NO_SMOOTHING,
    ExactTokens,
    KeptTokens,
    KeyRotation,
    PackedTokens,
    Smoothing,
)
from halfbyte.kernels.kv_attention.write import write_tokens


def attend_new_token(
    qkv: Float[Tensor, "batch heads_and_twice_kv_heads_times_dim"],
    cos: Float[Tensor, "rows dim"],
    sin: Float[Tensor, "rows dim"],
    keys: PackedTokens,
    values: PackedTokens,
    position: Int[Tensor, "1"],
    smoothing: Smoothing = NO_SMOOTHING,
    scaling: float | None = None,
    kept: KeptTokens | None = None,
    rotation: KeyRotation | None = None,
) -> Float[Tensor, "batch heads_times_dim"]:
    """What the new token of each row sees: itself as it is, and the `position` tokens before it, as `kept` or as codes.

    `qkv`: a row's queries, keys and values before RoPE, head after head; `cos` and `sin` of the new position, a row for
    each or one for all. The rotated key, rounded to the dtype of `qkv`, and the value become codes at `position`, which
    must be less than the capacity, and join `kept`. `rotation`: of packed keys that are stored before RoPE, as the new one
    then is. `scaling`: 1 / √dim where it is None. Edits both caches and `kept`. Raises FormatError where the arguments
    disagree.
    """
    return torch.ops.halfbyte.kv_step(
        qkv, cos, sin, *keys, *values, *(kept[:2] if kept else (None, None)), position, *smoothing,
        cos.shape[-1] ** -0.5 if scaling is None else scaling,
        kept.sinks if kept else 0, kept.first if kept else None, *(rotation or (None, None, None)),
    )  # fmt: skip


@torch.library.custom_op(
    "halfbyte::kv_step",
    mutates_args=(
        "key_codes",
        "key_scales",
        "key_zeros",
        "value_codes",
        "value_scales",
        "value_zeros",
        "kept_keys",
        "kept_values",
    ),
    device_types="cpu",
)
def _op(
    qkv: Tensor, cos: Tensor, sin: Tensor, key_codes: Tensor, key_scales: Tensor, key_zeros: Tensor | None,
    value_codes: Tensor, value_scales: Tensor, value_zeros: Tensor | None, kept_keys: Tensor | None,
    kept_values: Tensor | None, position: Tensor, key_shift: Tensor | None, key_scale: Tensor | None,
    value_shift: Tensor | None, value_scale: Tensor | None, scaling: float, sinks: int, first: Tensor | None,
    old_cos: Tensor | None, old_sin: Tensor | None, near: Tensor | None,
) -> Tensor:  # fmt: skip
    keys, values = PackedTokens(key_codes, key_scales, key_zeros), PackedTokens(value_codes, value_scales, value_zeros)
    kept = _kept(kept_keys, kept_values, sinks, first)
    _, rotation = _check(qkv, cos, sin, keys, values, position, kept, old_cos, old_sin, near)
    smoothing = Smoothing(key_shift, key_scale, value_shift, value_scale)
    return in_parts(qkv, cos, sin, keys, values, position, smoothing, scaling, kept, rotation)


@_op.register_kernel("cuda")
def _on_cuda(
    qkv: Tensor, cos: Tensor, sin: Tensor, key_codes: Tensor, key_scales: Tensor, key_zeros: Tensor | None,
    value_codes: Tensor, value_scales: Tensor, value_zeros: Tensor | None, kept_keys: Tensor | None,
    kept_values: Tensor | None, position: Tensor, key_shift: Tensor | None, key_scale: Tensor | None,
    value_shift: Tensor | None, value_scale: Tensor | None, scaling: float, sinks: int, first: Tensor | None,
    old_cos: Tensor | None, old_sin: Tensor | None, near: Tensor | None,
) -> Tensor:  # fmt: skip
    keys, values = PackedTokens(key_codes, key_scales, key_zeros), PackedTokens(value_codes, value_scales, value_zeros)
    kept = _kept(kept_keys, kept_values, sinks, first)
    _, rotation = _check(qkv, cos, sin, keys, values, position, kept, old_cos, old_sin, near)
    # imported here: triton exists only where there is something to run it on
    from halfbyte.kernels.kv_attention import triton_new_token, triton_write

    smoothing = Smoothing(*(
        None if part is None else part.float().contiguous()
        for part in (key_shift, key_scale, value_shift, value_scale)
    ))  # fmt: skip
    if not triton_write.can_write(cos.shape[1], keys, values):
        return in_parts(qkv, cos, sin, keys, values, position, smoothing, scaling, kept, rotation)
    with torch.cuda.device_of(qkv):  # triton launches on the current device, which need not be where the tokens are
        query, key, value, last, exact = triton_new_token.new_token(
            qkv, cos, sin, keys, values, position, smoothing, overlaps(qkv), kept, rotation is not None
        )
        return launch(
            query, keys, values, last, key, value, first, exact, smoothing, scaling, None, rotation
        ).flatten(1)  # fmt: skip


@_op.register_fake
def _fake(
    qkv: Tensor, cos: Tensor, sin: Tensor, key_codes: Tensor, key_scales: Tensor, key_zeros: Tensor | None,
    value_codes: Tensor, value_scales: Tensor, value_zeros: Tensor | None, kept_keys: Tensor | None,
    kept_values: Tensor | None, position: Tensor, key_shift: Tensor | None, key_scale: Tensor | None,
    value_shift: Tensor | None, value_scale: Tensor | None, scaling: float, sinks: int, first: Tensor | None,
    old_cos: Tensor | None, old_sin: Tensor | None, near: Tensor | None,
) -> Tensor:  # fmt: skip
    del key_shift, key_scale, value_shift, value_scale, scaling  # a fake has its op's signature
    keys, values = PackedTokens(key_codes, key_scales, key_zeros), PackedTokens(value_codes, value_scales, value_zeros)
    kept = _kept(kept_keys, kept_values, sinks, first)
    heads, _ = _check(qkv, cos, sin, keys, values, position, kept, old_cos, old_sin, near)
    return qkv.new_empty(len(qkv), heads * cos.shape[1])


def in_parts(
    qkv: Tensor, cos: Tensor, sin: Tensor, keys: PackedTokens, values: PackedTokens, position: Tensor,
    smoothing: Smoothing, scaling: float, kept: KeptTokens | None, rotation: KeyRotation | None,
) -> Tensor:  # fmt: skip
    batch, dim, kv_heads = len(qkv), cos.shape[1], keys.codes.shape[1]
    split = qkv.unflatten(1, (-1, dim))
    rotated = _rotated(split[:, :-kv_heads].float(), cos.float()[:, None], sin.float()[:, None]).to(qkv.dtype)
    query, key, value = rotated[:, :-kv_heads], rotated[:, -kv_heads:], split[:, -kv_heads:]
    stored = key if rotation is None else split[:, -2 * kv_heads : -kv_heads]
    write_tokens(keys, values, stored[:, :, None], value[:, :, None], position.repeat(batch), smoothing)
    first, last, exact = None, position, None
    if kept is not None:
        row = row_of(position, kept.sinks, kept.window)
        kept.keys.index_copy_(2, row, key[:, :, None])
        kept.values.index_copy_(2, row, value[:, :, None])
        seen = held_before(position, kept.sinks, kept.window) >= 0
        exact = ExactTokens(kept.keys, kept.values, seen.expand(batch, -1))
        first, last = kept.first, (position - kept.window).clamp(min=kept.sinks)
    return decode_attention(
        query, keys, values, last.expand(batch), key, value, first, exact, smoothing, scaling, rotation
    ).flatten(1)  # fmt: skip


def _kept(keys: Tensor | None, values: Tensor | None, sinks: int, first: Tensor | None) -> KeptTokens | None:
    return None if keys is None or values is None else KeptTokens(keys, values, sinks, first)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-high, low], dim=-1) * sin


def _check(
    qkv: Tensor, cos: Tensor, sin: Tensor, keys: PackedTokens, values: PackedTokens, position: Tensor,
    kept: KeptTokens | None, old_cos: Tensor | None, old_sin: Tensor | None, near: Tensor | None,
) -> tuple[int, KeyRotation | None]:  # fmt: skip
    """The number of query heads, and what turns packed keys. FormatError unless all parts are of one step."""
    if qkv.dim() != 2 or qkv.dtype not in DTYPES or keys.codes.dim() != 4:
        raise FormatError(
            f"queries, keys and values are {qkv.dtype} {list(qkv.shape)}, and codes {list(keys.codes.shape)}: give a row "
            f"for each row of the batch in one of {DTYPES}, and codes [batch, kv_heads, capacity, bytes]"
        )
    batch, kv_heads, dim = len(qkv), keys.codes.shape[1], cos.shape[-1]
    if cos.shape != sin.shape or cos.dim() != 2 or cos.shape[0] not in (1, batch) or not dim or dim & 1:
        raise FormatError(
            f"cosines are {list(cos.shape)}, sines {list(sin.shape)}: give [1 or {batch}, dim], RoPE over whole heads"
        )
    heads = qkv.shape[1] // dim - 2 * kv_heads
    if qkv.shape[1] % dim or heads < 1:
        raise FormatError(
            f"{qkv.shape[1]} numbers are no queries, keys and values of heads of {dim} with {kv_heads} heads of keys: "
            "give heads + 2 · kv_heads of them for each row"
        )
    if position.shape != (1,) or position.dtype not in (torch.int32, torch.int64):
        raise FormatError(f"the position is {position.dtype} {list(position.shape)}: give one integer, for all rows")
    now = qkv.new_empty(1, device="meta").expand(batch, kv_heads, dim)
    query = now[:, :1].expand(batch, heads, dim)
    exact = None if kept is None else ExactTokens(kept.keys, kept.values)
    check_step(query, keys, values, position.expand(batch), now, now, None if kept is None else kept.first, exact)
    if kept is not None and (
        {kept.keys.dtype, kept.values.dtype} != {qkv.dtype}
        or kept.window < 0
        or bool(kept.sinks) != (kept.first is not None)
    ):
        raise FormatError(
            f"{list(kept.keys.shape)} {kept.keys.dtype} tokens are kept, of which {kept.sinks} are sinks, in a model of "
            f"{qkv.dtype}: give sinks and a row more than the window has tokens, and `first` for sinks alone"
        )
    return heads, check_keys(query, keys, old_cos, old_sin, near, None, None)
