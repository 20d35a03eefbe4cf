"""Attention of the current token on packed keys and values, one token per row of the batch: a step of decoding.

`write_tokens` is how tokens get into such a cache (write.py).

`decode_attention` is the `torch.library` op `torch.ops.halfbyte.kv_attention`, with a fake implementation, so it works
under `torch.compile` and in CUDA graphs: lengths are read where they are, on the GPU. On the CPU it is plain torch. On
CUDA every row's tokens are split among programs, and a second kernel puts the splits together:

    4 bits, heads of 64 or 128       hopper_decode     codes go from memory to tensor cores without leaving registers
    other widths, groups and heads   triton_decode     decoded in float32
    both                             triton_combine    smoothing, sinks and window, the current token

`reference` says what is computed.
"""

import math
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from halfbyte.kernels.device import overlaps, processors
from halfbyte.kernels.kv_attention import cuts
from halfbyte.kernels.kv_attention.checks import check_keys, check_step
from halfbyte.kernels.kv_attention.tokens import (
    NO_SMOOTHING,
    ExactTokens,
    KeptTokens,
    KeyRotation,
    PackedTokens,
    Smoothing,
)
from halfbyte.kernels.kv_attention.write import write_tokens
from halfbyte.packing.code_bytes import unpack

__all__ = [
    "NO_SMOOTHING", "ExactTokens", "KeptTokens", "KeyRotation", "PackedTokens", "Smoothing", "decode_attention",
    "write_tokens",
]  # fmt: skip


def decode_attention(
    query: Float[Tensor, "batch query_heads dim"],
    keys: PackedTokens,
    values: PackedTokens,
    last: Int[Tensor, "batch"],
    key_now: Float[Tensor, "batch kv_heads dim"],
    value_now: Float[Tensor, "batch kv_heads dim"],
    first: Int[Tensor, "batch"] | None = None,
    exact: ExactTokens | None = None,
    smoothing: Smoothing = NO_SMOOTHING,
    scaling: float | None = None,
    rotation: KeyRotation | None = None,
    packed_query: Float[Tensor, "batch query_heads dim"] | None = None,
) -> Float[Tensor, "batch query_heads dim"]:
    """Attention on the packed tokens first .. last - 1 of each row, on exact ones, and on the current token as it is.

    Softmax in float32; the answer has the dtype of the query. `first`: 0 where it is None. `scaling`: 1 / √dim where it
    is None. `rotation`: of packed keys that are stored before RoPE. `packed_query`: the query as what keys' codes stand
    for is to be multiplied by, where those are in other coordinates (QuaRot's R3); times their scale. On 4-bit codes a
    query times its keys' scale must fit float16, and so must keys before RoPE. Raises FormatError where the arguments
    disagree.
    """
    return _op(
        query, *keys, *values, last, key_now, value_now, first, *(exact or (None, None, None)), *smoothing,
        query.shape[-1] ** -0.5 if scaling is None else scaling, *(rotation or (None, None, None)), packed_query,
    )  # fmt: skip


@torch.library.custom_op("halfbyte::kv_attention", mutates_args=(), device_types="cpu")
def _op(
    query: Tensor, key_codes: Tensor, key_scales: Tensor, key_zeros: Tensor | None, value_codes: Tensor,
    value_scales: Tensor, value_zeros: Tensor | None, last: Tensor, key_now: Tensor, value_now: Tensor,
    first: Tensor | None, exact_keys: Tensor | None, exact_values: Tensor | None, exact_seen: Tensor | None,
    key_shift: Tensor | None, key_scale: Tensor | None, value_shift: Tensor | None, value_scale: Tensor | None,
    scaling: float, cos: Tensor | None, sin: Tensor | None, near: Tensor | None, packed_query: Tensor | None,
) -> Tensor:  # fmt: skip
    keys, values = PackedTokens(key_codes, key_scales, key_zeros), PackedTokens(value_codes, value_scales, value_zeros)
    exact = _exact(exact_keys, exact_values, exact_seen)
    check_step(query, keys, values, last, key_now, value_now, first, exact)
    check_keys(query, keys, cos, sin, near, key_scale, packed_query)
    dim = query.shape[2]
    place = torch.arange(key_codes.shape[2], device=query.device)
    seen = place < last[:, None]
    if first is not None:
        seen &= place >= first[:, None]
    past = _decoded(keys, dim, key_scale, None if packed_query is not None else key_shift)
    if cos is not None and sin is not None:
        past = _rotated(past, cos.float()[:, None], sin.float()[:, None])
    parts = [
        (past, _decoded(values, dim, value_scale, value_shift), seen),
        (key_now[:, :, None], value_now[:, :, None], seen.new_ones(len(query), 1)),
    ]
    if exact is not None:
        parts.append((exact.keys, exact.values, _seen(exact)))
    counts = torch.cat([counts for _, _, counts in parts], dim=1)[:, None]
    all_keys = torch.cat([part.float() for part, _, _ in parts], dim=2)
    all_values = torch.cat([part.float() for _, part, _ in parts], dim=2).masked_fill(~counts[..., None], 0)
    grouped = query.float().unflatten(1, (key_now.shape[1], -1))
    scores = (grouped * scaling) @ all_keys.transpose(2, 3)
    if packed_query is not None:
        capacity = key_codes.shape[2]
        own = packed_query.float().unflatten(1, (key_now.shape[1], -1)) @ past.transpose(2, 3)
        if key_shift is not None:
            own = own + grouped @ key_shift.float()[:, :, None]
        scores = torch.cat([own * scaling, scores[..., capacity:]], dim=3)
    shares = scores.masked_fill(~counts[:, :, None], -math.inf).softmax(dim=-1)
    return (shares @ all_values).flatten(1, 2).to(query.dtype)


@_op.register_kernel("cuda")
def _on_cuda(
    query: Tensor, key_codes: Tensor, key_scales: Tensor, key_zeros: Tensor | None, value_codes: Tensor,
    value_scales: Tensor, value_zeros: Tensor | None, last: Tensor, key_now: Tensor, value_now: Tensor,
    first: Tensor | None, exact_keys: Tensor | None, exact_values: Tensor | None, exact_seen: Tensor | None,
    key_shift: Tensor | None, key_scale: Tensor | None, value_shift: Tensor | None, value_scale: Tensor | None,
    scaling: float, cos: Tensor | None, sin: Tensor | None, near: Tensor | None, packed_query: Tensor | None,
) -> Tensor:  # fmt: skip
    keys, values = PackedTokens(key_codes, key_scales, key_zeros), PackedTokens(value_codes, value_scales, value_zeros)
    exact = _exact(exact_keys, exact_values, exact_seen)
    check_step(query, keys, values, last, key_now, value_now, first, exact)
    smoothing = Smoothing(*(
        None if part is None else part.float().contiguous()
        for part in (key_shift, key_scale, value_shift, value_scale)
    ))  # fmt: skip
    rotation = check_keys(query, keys, cos, sin, near, smoothing.key_scale, packed_query)
    query = query.contiguous()
    key_now, value_now = (part if part[0].is_contiguous() else part.contiguous() for part in (key_now, value_now))
    packed_query = None if packed_query is None else packed_query.contiguous()
    first = None if first is None else first.contiguous()
    if exact is not None and exact.seen is not None and exact.seen.stride(1) != 1:
        exact = exact._replace(seen=exact.seen.contiguous())
    with torch.cuda.device_of(query):  # triton launches on the current device, which need not be where the query is
        return launch(
            query, keys, values, last, key_now, value_now, first, exact, smoothing, scaling, None, rotation, packed_query
        )  # fmt: skip


def launch(
    query: Tensor, keys: PackedTokens, values: PackedTokens, last: Tensor, key_now: Tensor, value_now: Tensor,
    first: Tensor | None, exact: ExactTokens | None, smoothing: Smoothing, scaling: float, cut: cuts.Cut | None = None,
    rotation: KeyRotation | None = None, packed_query: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`decode_attention` on the current GPU, cut up so, or as is best. What is no cache is contiguous, but rows of `last`,
    `seen` and the current tokens may be apart, or the same; smoothing is float32."""
    # imported here: triton exists only where there is something to run it on
    from halfbyte.kernels.kv_attention import hopper_decode, triton_combine, triton_decode

    (rows, query_heads, _), (_, kv_heads, capacity, _) = query.shape, keys.codes.shape
    cut = cut or cuts.choose(
        rows * kv_heads, capacity, processors(query.device), query_heads // kv_heads, rotation is not None
    )
    decode = hopper_decode.decode
    if cuts.obstacle(query_heads, query.shape[2], keys, values, rotation) or not cuts.has_async_copies(query.device):
        decode, cut = triton_decode.decode, replace(cut, tokens=32, warps=4)
    score_scale = scaling / math.log(2)
    early = overlaps(query)
    asking = query if packed_query is None else packed_query
    partial = decode(
        asking, keys, values, last, first, smoothing.key_scale, score_scale, cut, early, smoothing.key_shift, rotation
    )
    if rotation is not None:
        smoothing = smoothing._replace(key_shift=None)  # turns with the keys: it is in their scores
    return triton_combine.combine(query, partial, key_now, value_now, exact, smoothing, score_scale, early)


@_op.register_fake
def _shape_of(
    query: Tensor, key_codes: Tensor, key_scales: Tensor, key_zeros: Tensor | None, value_codes: Tensor,
    value_scales: Tensor, value_zeros: Tensor | None, last: Tensor, key_now: Tensor, value_now: Tensor,
    first: Tensor | None, exact_keys: Tensor | None, exact_values: Tensor | None, exact_seen: Tensor | None,
    key_shift: Tensor | None, key_scale: Tensor | None, value_shift: Tensor | None, value_scale: Tensor | None,
    scaling: float, cos: Tensor | None, sin: Tensor | None, near: Tensor | None, packed_query: Tensor | None,
) -> Tensor:  # fmt: skip
    del key_shift, value_shift, value_scale, scaling  # a fake has its op's signature
    keys, values = PackedTokens(key_codes, key_scales, key_zeros), PackedTokens(value_codes, value_scales, value_zeros)
    check_step(query, keys, values, last, key_now, value_now, first, _exact(exact_keys, exact_values, exact_seen))
    check_keys(query, keys, cos, sin, near, key_scale, packed_query)
    return torch.empty_like(query, memory_format=torch.contiguous_format)


def _exact(keys: Tensor | None, values: Tensor | None, seen: Tensor | None) -> ExactTokens | None:
    return None if keys is None or values is None else ExactTokens(keys, values, seen)


def _seen(exact: ExactTokens) -> Tensor:
    """Which exact tokens count, [batch, exact]."""
    if exact.seen is not None:
        return exact.seen
    return torch.ones(exact.keys.shape[0], exact.keys.shape[2], dtype=torch.bool, device=exact.keys.device)


def _decoded(tokens: PackedTokens, dim: int, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """What the codes stand for, in float32."""
    bits = tokens.codes.shape[3] * 8 // dim
    codes = unpack(tokens.codes, bits, dim).float().unflatten(3, (tokens.scales.shape[3], -1))
    steps = tokens.scales.float()
    zeros = -(2 ** (bits - 1)) * steps if tokens.zeros is None else tokens.zeros.float()
    values = (codes * steps[..., None] + zeros[..., None]).flatten(3)
    if scale is not None:
        values = values * scale.float()[:, None]
    return values if shift is None else values + shift.float()[:, None]


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    low, high = x[..., :half], x[..., half : 2 * half]
    return torch.cat([low * cos - high * sin, high * cos + low * sin, x[..., 2 * half :]], dim=-1)
