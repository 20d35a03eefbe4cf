"""What the kernels here promise, in float64: slow, and plainly right.

WKVQuant, Yue et al., 2024 — https://arxiv.org/abs/2402.12065, past-only quantization

    past      first .. last - 1 of the packed tokens      k̃ = (code · h + zero) · s + δ, per token and group; then RoPE,
                                                          where keys are stored before it
    output    softmax(scaling · q·[k̃ of the past, exact keys, key now]) · [ṽ of the past, exact values, value now]
"""

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from halfbyte.kernels.kv_attention.tokens import NO_SMOOTHING, ExactTokens, KeyRotation, PackedTokens, Smoothing


def decoded(
    tokens: PackedTokens, dim: int, scale: Tensor | None = None, shift: Tensor | None = None
) -> Float64[Tensor, "batch kv_heads capacity dim"]:
    """What the codes stand for."""
    bits = tokens.codes.shape[-1] * 8 // dim
    string = torch.stack([tokens.codes >> place & 1 for place in range(8)], dim=-1).flatten(-2)[..., : dim * bits]
    codes = sum(string.unflatten(-1, (dim, bits))[..., place].double() * 2**place for place in range(bits))
    assert isinstance(codes, Tensor)
    each = dim // tokens.scales.shape[-1]
    steps = tokens.scales.double().repeat_interleave(each, dim=-1)
    zeros = -(2.0 ** (bits - 1)) * steps
    if tokens.zeros is not None:
        zeros = tokens.zeros.double().repeat_interleave(each, dim=-1)
    values = codes * steps + zeros
    if scale is not None:
        values = values * scale.double()[:, None]
    if shift is not None:
        values = values + shift.double()[:, None]
    return values


def rotated(
    x: Float64[Tensor, "batch kv_heads capacity dim"], rotation: KeyRotation
) -> Float64[Tensor, "batch kv_heads capacity dim"]:
    """Keys before RoPE as they are after it."""
    cos, sin = (part.double()[:, None] for part in rotation[:2])
    half = cos.shape[-1]
    low, high, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([low * cos - high * sin, high * cos + low * sin, rest], dim=-1)


def attention(
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
) -> Float64[Tensor, "batch query_heads dim"]:
    """Decode attention of one token per row."""
    batch, query_heads, dim = query.shape
    together = query_heads // key_now.shape[1]
    place = torch.arange(keys.codes.shape[2], device=query.device)
    seen = place < last[:, None]
    if first is not None:
        seen &= place >= first[:, None]
    past = decoded(keys, dim, smoothing.key_scale, smoothing.key_shift)
    parts = [
        (
            past if rotation is None else rotated(past, rotation),
            decoded(values, dim, smoothing.value_scale, smoothing.value_shift),
            seen,
        ),
        (key_now.double()[:, :, None], value_now.double()[:, :, None], seen.new_ones(batch, 1)),
    ]
    if exact is not None:
        count = exact.keys.shape[2]
        all_seen = seen.new_ones(batch, count) if exact.seen is None else exact.seen
        parts.append((exact.keys.double(), exact.values.double(), all_seen))
    scores = torch.cat(
        [
            torch.einsum("bhgd,bhtd->bhgt", query.double().unflatten(1, (-1, together)), part).masked_fill(
                ~counts[:, None, None], -torch.inf
            )
            for part, _, counts in parts
        ],
        dim=-1,
    )
    if packed_query is not None:  # keys in other coordinates, which their shift is not
        codes = decoded(keys, dim)
        own = torch.einsum("bhgd,bhtd->bhgt", packed_query.double().unflatten(1, (-1, together)), codes)
        if smoothing.key_shift is not None:
            shifts = torch.einsum(
                "bhgd,hd->bhg", query.double().unflatten(1, (-1, together)), smoothing.key_shift.double()
            )
            own = own + shifts[..., None]
        scores[..., : codes.shape[2]] = own.masked_fill(~seen[:, None, None], -torch.inf)
    shares = (scores * (dim**-0.5 if scaling is None else scaling)).softmax(dim=-1)
    # a token that is not seen may hold anything, infinities too
    found = torch.cat([part.masked_fill(~counts[:, None, :, None], 0) for _, part, counts in parts], dim=2)
    return torch.einsum("bhgt,bhtd->bhgd", shares, found).flatten(1, 2)
