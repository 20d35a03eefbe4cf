"""A step of decoding on a packed cache from what a fused layer's product gives: RoPE, the new token's codes, attention.

`attend_new_token` is the `torch.library` op `torch.ops.halfbyte.kv_step`, with a fake implementation for `torch.compile`
and CUDA graphs. It is for batches whose rows are equally long, caches of keys after RoPE, and heads that are rotated
whole. On CUDA it is three launches, each of which begins before the one ahead of it ends: triton_new_token, and those of
`decode_attention`. Elsewhere, and for codes that `triton_write` does not know, it is `write_tokens` and `decode_attention`.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from halfbyte.errors import FormatError
from halfbyte.kernels.device import overlaps
from halfbyte.kernels.kv_attention import decode_attention, launch
from halfbyte.kernels.kv_attention.checks import DTYPES, check_step
from halfbyte.kernels.kv_attention.tokens import NO_SMOOTHING, PackedTokens, Smoothing
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
) -> Float[Tensor, "batch heads_times_dim"]:
    """What the new token of each row sees: itself as it is, and the `position` packed tokens before it.

    `qkv`: a row's queries, keys and values before RoPE, head after head; `cos` and `sin` of the new position, a row for
    each or one for all. The rotated key, rounded to the dtype of `qkv`, and the value become codes at `position`, which
    must be less than the capacity. `scaling`: 1 / √dim where it is None. Edits both caches. Raises FormatError where the
    arguments disagree.
    """
    scaling = cos.shape[-1] ** -0.5 if scaling is None else scaling
    return torch.ops.halfbyte.kv_step(qkv, cos, sin, *keys, *values, position, *smoothing, scaling)


@torch.library.custom_op(
    "halfbyte::kv_step",
    mutates_args=("key_codes", "key_scales", "key_zeros", "value_codes", "value_scales", "value_zeros"),
    device_types="cpu",
)
def _op(
    qkv: Tensor, cos: Tensor, sin: Tensor, key_codes: Tensor, key_scales: Tensor, key_zeros: Tensor | None,
    value_codes: Tensor, value_scales: Tensor, value_zeros: Tensor | None, position: Tensor, key_shift: Tensor | None,
    key_scale: Tensor | None, value_shift: Tensor | None, value_scale: Tensor | None, scaling: float,
) -> Tensor:  # fmt: skip
    keys, values = PackedTokens(key_codes, key_scales, key_zeros), PackedTokens(value_codes, value_scales, value_zeros)
    _check(qkv, cos, sin, keys, values, position)
    smoothing = Smoothing(key_shift, key_scale, value_shift, value_scale)
    return _in_parts(qkv, cos, sin, keys, values, position, smoothing, scaling)


@_op.register_kernel("cuda")
def _on_cuda(
    qkv: Tensor, cos: Tensor, sin: Tensor, key_codes: Tensor, key_scales: Tensor, key_zeros: Tensor | None,
    value_codes: Tensor, value_scales: Tensor, value_zeros: Tensor | None, position: Tensor, key_shift: Tensor | None,
    key_scale: Tensor | None, value_shift: Tensor | None, value_scale: Tensor | None, scaling: float,
) -> Tensor:  # fmt: skip
    keys, values = PackedTokens(key_codes, key_scales, key_zeros), PackedTokens(value_codes, value_scales, value_zeros)
    _check(qkv, cos, sin, keys, values, position)
    # imported here: triton exists only where there is something to run it on
    from halfbyte.kernels.kv_attention import triton_new_token, triton_write

    smoothing = Smoothing(*(
        None if part is None else part.float().contiguous()
        for part in (key_shift, key_scale, value_shift, value_scale)
    ))  # fmt: skip
    if not triton_write.can_write(cos.shape[1], keys, values):
        return _in_parts(qkv, cos, sin, keys, values, position, smoothing, scaling)
    with torch.cuda.device_of(qkv):  # triton launches on the current device, which need not be where the tokens are
        query, key, value = triton_new_token.new_token(
            qkv, cos, sin, keys, values, position, smoothing, overlaps(qkv)
        )  # fmt: skip
        last = position.expand(len(qkv))
        return launch(query, keys, values, last, key, value, None, None, smoothing, scaling).flatten(1)


@_op.register_fake
def _fake(
    qkv: Tensor, cos: Tensor, sin: Tensor, key_codes: Tensor, key_scales: Tensor, key_zeros: Tensor | None,
    value_codes: Tensor, value_scales: Tensor, value_zeros: Tensor | None, position: Tensor, key_shift: Tensor | None,
    key_scale: Tensor | None, value_shift: Tensor | None, value_scale: Tensor | None, scaling: float,
) -> Tensor:  # fmt: skip
    del key_shift, key_scale, value_shift, value_scale, scaling  # a fake has its op's signature
    keys, values = PackedTokens(key_codes, key_scales, key_zeros), PackedTokens(value_codes, value_scales, value_zeros)
    heads = _check(qkv, cos, sin, keys, values, position)
    return qkv.new_empty(len(qkv), heads * cos.shape[1])


def _in_parts(
    qkv: Tensor, cos: Tensor, sin: Tensor, keys: PackedTokens, values: PackedTokens, position: Tensor,
    smoothing: Smoothing, scaling: float,
) -> Tensor:  # fmt: skip
    batch, dim, kv_heads = len(qkv), cos.shape[1], keys.codes.shape[1]
    split = qkv.unflatten(1, (-1, dim))
    rotated = _rotated(split[:, :-kv_heads].float(), cos.float()[:, None], sin.float()[:, None]).to(qkv.dtype)
    query, key, value = rotated[:, :-kv_heads], rotated[:, -kv_heads:], split[:, -kv_heads:]
    places = position.repeat(batch)
    write_tokens(keys, values, key[:, :, None], value[:, :, None], places, smoothing)
    return decode_attention(query, keys, values, places, key, value, smoothing=smoothing, scaling=scaling).flatten(1)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-high, low], dim=-1) * sin


def _check(qkv: Tensor, cos: Tensor, sin: Tensor, keys: PackedTokens, values: PackedTokens, position: Tensor) -> int:
    """The number of query heads. FormatError unless all parts are of one step."""
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
    check_step(query, keys, values, position.expand(batch), now, now, None, None)
    return heads
