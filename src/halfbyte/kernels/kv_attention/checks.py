"""What attention on a packed cache refuses."""

import torch
from torch import Tensor

from halfbyte.errors import FormatError
from halfbyte.kernels.kv_attention.tokens import ExactTokens, KeyRotation, PackedTokens
from halfbyte.packing.code_bytes import bytes_for

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def check_step(
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


def check_keys(
    query: Tensor, keys: PackedTokens, cos: Tensor | None, sin: Tensor | None, near: Tensor | None,
    key_scale: Tensor | None, packed_query: Tensor | None,
) -> KeyRotation | None:  # fmt: skip
    """What turns the packed keys, if anything. FormatError where it does not fit them, or their query does not."""
    if packed_query is not None and (
        packed_query.shape != query.shape
        or packed_query.dtype != query.dtype
        or cos is not None
        or key_scale is not None
    ):
        raise FormatError(
            f"the packed query is {packed_query.dtype} {list(packed_query.shape)}: give {list(query.shape)} in "
            f"{query.dtype}, the keys' scale in it, and no rotation beside it"
        )
    if cos is None or sin is None or near is None:
        return None
    half = cos.shape[-1]
    shape = (query.shape[0], keys.codes.shape[2], half)
    if cos.shape != shape or sin.shape != shape or not 0 < 2 * half <= query.shape[2] or sin.stride() != cos.stride():
        raise FormatError(
            f"cosines are {list(cos.shape)}, sines {list(sin.shape)}: give two that lie alike, {list(shape[:2])} by at "
            f"most {query.shape[2] // 2}"
        )
    if near.dim() != 3 or near.shape[0] != 2 or near.shape[2] != half or not near.is_contiguous():
        raise FormatError(f"near rotations are {list(near.shape)}: give contiguous [2, tokens, {half}]")
    if not cos[0].is_contiguous():
        raise FormatError("cosines of a row's tokens lie apart: give them contiguous")
    return KeyRotation(cos, sin, near)
