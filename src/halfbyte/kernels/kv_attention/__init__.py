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

from halfbyte.errors import FormatError
from halfbyte.kernels.kv_attention import cuts
from halfbyte.kernels.kv_attention.tokens import NO_SMOOTHING, ExactTokens, PackedTokens, Smoothing
from halfbyte.kernels.kv_attention.write import write_tokens
from halfbyte.packing.code_bytes import bytes_for, unpack

__all__ = ["NO_SMOOTHING", "ExactTokens", "PackedTokens", "Smoothing", "decode_attention", "write_tokens"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


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
) -> Float[Tensor, "batch query_heads dim"]:
    """Attention on the packed tokens first .. last - 1 of each row, on exact ones, and on the current token as it is.

    Softmax in float32; the answer has the dtype of the query. `first`: 0 where it is None. `scaling`: 1 / √dim where it
    is None. On 4-bit codes a query times its keys' scale must fit float16. Raises FormatError where the arguments
    disagree.
    """
    return _op(
        query, *keys, *values, last, key_now, value_now, first, *(exact or (None, None, None)), *smoothing,
        query.shape[-1] ** -0.5 if scaling is None else scaling,
    )  # fmt: skip


@torch.library.custom_op("halfbyte::kv_attention", mutates_args=(), device_types="cpu")
def _op(
    query: Tensor, key_codes: Tensor, key_scales: Tensor, key_zeros: Tensor | None, value_codes: Tensor,
    value_scales: Tensor, value_zeros: Tensor | None, last: Tensor, key_now: Tensor, value_now: Tensor,
    first: Tensor | None, exact_keys: Tensor | None, exact_values: Tensor | None, exact_seen: Tensor | None,
    key_shift: Tensor | None, key_scale: Tensor | None, value_shift: Tensor | None, value_scale: Tensor | None,
    scaling: float,
) -> Tensor:  # fmt: skip
    keys, values = PackedTokens(key_codes, key_scales, key_zeros), PackedTokens(value_codes, value_scales, value_zeros)
    exact = _exact(exact_keys, exact_values, exact_seen)
    _check(query, keys, values, last, key_now, value_now, first, exact)
    dim = query.shape[2]
    place = torch.arange(key_codes.shape[2], device=query.device)
    seen = place < last[:, None]
    if first is not None:
        seen &= place >= first[:, None]
    parts = [
        (_decoded(keys, dim, key_scale, key_shift), _decoded(values, dim, value_scale, value_shift), seen),
        (key_now[:, :, None], value_now[:, :, None], seen.new_ones(len(query), 1)),
    ]
    if exact is not None:
        parts.append((exact.keys, exact.values, _seen(exact)))
    counts = torch.cat([counts for _, _, counts in parts], dim=1)[:, None]
    all_keys = torch.cat([part.float() for part, _, _ in parts], dim=2)
    all_values = torch.cat([part.float() for _, part, _ in parts], dim=2).masked_fill(~counts[..., None], 0)
    grouped = query.float().unflatten(1, (key_now.shape[1], -1))
    scores = (grouped * scaling) @ all_keys.transpose(2, 3)
    shares = scores.masked_fill(~counts[:, :, None], -math.inf).softmax(dim=-1)
    return (shares @ all_values).flatten(1, 2).to(query.dtype)


@_op.register_kernel("cuda")
def _on_cuda(
    query: Tensor, key_codes: Tensor, key_scales: Tensor, key_zeros: Tensor | None, value_codes: Tensor,
    value_scales: Tensor, value_zeros: Tensor | None, last: Tensor, key_now: Tensor, value_now: Tensor,
    first: Tensor | None, exact_keys: Tensor | None, exact_values: Tensor | None, exact_seen: Tensor | None,
    key_shift: Tensor | None, key_scale: Tensor | None, value_shift: Tensor | None, value_scale: Tensor | None,
    scaling: float,
) -> Tensor:  # fmt: skip
    keys, values = PackedTokens(key_codes, key_scales, key_zeros), PackedTokens(value_codes, value_scales, value_zeros)
    exact = _exact(exact_keys, exact_values, exact_seen)
    _check(query, keys, values, last, key_now, value_now, first, exact)
    smoothing = Smoothing(*(
        None if part is None else part.float().contiguous()
        for part in (key_shift, key_scale, value_shift, value_scale)
    ))  # fmt: skip
    query, key_now, value_now, last = (part.contiguous() for part in (query, key_now, value_now, last))
    first = None if first is None else first.contiguous()
    if exact is not None and exact.seen is not None:
        exact = exact._replace(seen=exact.seen.contiguous())
    with torch.cuda.device_of(query):  # triton launches on the current device, which need not be where the query is
        (rows, query_heads, _), (_, kv_heads, capacity, _) = query.shape, keys.codes.shape
        cut = cuts.choose(rows * kv_heads, capacity, cuts.processors(query.device), query_heads // kv_heads)
        return launch(query, keys, values, last, key_now, value_now, first, exact, smoothing, scaling, cut)


def launch(
    query: Tensor, keys: PackedTokens, values: PackedTokens, last: Tensor, key_now: Tensor, value_now: Tensor,
    first: Tensor | None, exact: ExactTokens | None, smoothing: Smoothing, scaling: float, cut: cuts.Cut,
) -> Tensor:  # fmt: skip
    """`decode_attention` on the current GPU, cut up so. What is no cache is contiguous, and smoothing float32."""
    # imported here: triton exists only where there is something to run it on
    from halfbyte.kernels.kv_attention import hopper_decode, triton_combine, triton_decode

    decode = hopper_decode.decode
    if cuts.obstacle(query.shape[1], query.shape[2], keys, values) or not cuts.has_async_copies(query.device):
        decode, cut = triton_decode.decode, replace(cut, tokens=32, warps=4)
    score_scale = scaling / math.log(2)
    early = cuts.has_early_launches(query.device)
    partial = decode(query, keys, values, last, first, smoothing.key_scale, score_scale, cut, early)
    return triton_combine.combine(query, partial, key_now, value_now, exact, smoothing, score_scale, early)


@_op.register_fake
def _shape_of(
    query: Tensor, key_codes: Tensor, key_scales: Tensor, key_zeros: Tensor | None, value_codes: Tensor,
    value_scales: Tensor, value_zeros: Tensor | None, last: Tensor, key_now: Tensor, value_now: Tensor,
    first: Tensor | None, exact_keys: Tensor | None, exact_values: Tensor | None, exact_seen: Tensor | None,
    key_shift: Tensor | None, key_scale: Tensor | None, value_shift: Tensor | None, value_scale: Tensor | None,
    scaling: float,
) -> Tensor:  # fmt: skip
    del key_shift, key_scale, value_shift, value_scale, scaling  # a fake has its op's signature
    keys, values = PackedTokens(key_codes, key_scales, key_zeros), PackedTokens(value_codes, value_scales, value_zeros)
    _check(query, keys, values, last, key_now, value_now, first, _exact(exact_keys, exact_values, exact_seen))
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


def _check(
    query: Tensor, keys: PackedTokens, values: PackedTokens, last: Tensor, key_now: Tensor, value_now: Tensor,
    first: Tensor | None, exact: ExactTokens | None,
) -> None:  # fmt: skip
    """Raise FormatError unless all parts are of one step."""
    if query.dim() != 3 or query.dtype not in DTYPES:
        raise FormatError(
            f"the query is {query.dtype} {list(query.shape)}: give [batch, query_heads, dim] in one of {DTYPES}"
        )
    batch, query_heads, dim = query.shape
    for name, tokens in (("keys", keys), ("values", values)):
        _check_packed(name, tokens, batch, dim)
    kv_heads = keys.codes.shape[1]
    if keys.codes.shape[:3] != values.codes.shape[:3] or query_heads % kv_heads:
        raise FormatError(
            f"keys are {list(keys.codes.shape)}, values {list(values.codes.shape)}, and the query has {query_heads} heads: "
            "give caches of one shape, and a multiple of their heads"
        )
    for name, now in (("key", key_now), ("value", value_now)):
        if now.shape != (batch, kv_heads, dim) or now.dtype != query.dtype:
            raise FormatError(
                f"the current {name} is {now.dtype} {list(now.shape)}: give {[batch, kv_heads, dim]} in {query.dtype}"
            )
    for name, places in (("last", last), ("first", first)):
        if places is not None and (places.shape != (batch,) or places.dtype not in (torch.int32, torch.int64)):
            raise FormatError(f"{name} is {places.dtype} {list(places.shape)}: give {batch} integers, one for each row")
    if exact is not None:
        shape = (batch, kv_heads, exact.keys.shape[2] if exact.keys.dim() == 4 else -1, dim)
        strides = exact.keys.stride() == exact.values.stride() and exact.keys[0, 0].is_contiguous()
        if exact.keys.shape != shape or exact.values.shape != shape or not strides:
            raise FormatError(
                f"exact keys are {list(exact.keys.shape)}, values {list(exact.values.shape)}: give two that lie alike, "
                f"[{batch}, {kv_heads}, tokens, {dim}], each head's tokens contiguous"
            )
        if exact.seen is not None and (exact.seen.shape != (batch, shape[2]) or exact.seen.dtype != torch.bool):
            raise FormatError(
                f"`seen` is {exact.seen.dtype} {list(exact.seen.shape)}: give booleans {[batch, shape[2]]}"
            )


def _check_packed(name: str, tokens: PackedTokens, batch: int, dim: int) -> None:
    codes, scales, zeros = tokens
    if codes.dim() != 4 or codes.dtype != torch.uint8 or codes.shape[0] != batch:
        raise FormatError(
            f"the codes of the {name} are {codes.dtype} {list(codes.shape)}: give uint8 [{batch}, kv_heads, capacity, bytes]"
        )
    bits = codes.shape[3] * 8 // dim
    if not 1 <= bits <= 8 or bytes_for(dim, bits) != codes.shape[3]:
        raise FormatError(
            f"{codes.shape[3]} bytes a token are no codes of {dim} channels: pack them by code_bytes.pack"
        )
    groups = scales.shape[3] if scales.dim() == 4 else 0
    if scales.shape != (*codes.shape[:3], groups) or not groups or dim % groups or scales.dtype != torch.float16:
        raise FormatError(
            f"the scales of the {name} are {scales.dtype} {list(scales.shape)}: give float16 {list(codes.shape[:3])} and "
            f"as many groups as divide {dim}"
        )
    if zeros is not None and (
        zeros.shape != scales.shape or zeros.dtype != scales.dtype or zeros.stride() != scales.stride()
    ):
        raise FormatError(f"the zeros of the {name} are {zeros.dtype} {list(zeros.shape)}: give them as the scales")
    if any(part.numel() and not part[0, 0].is_contiguous() for part in (codes, scales)):
        raise FormatError(f"tokens of the {name} lie apart: give codes and scales with each head's tokens contiguous")
