"""What a step on a float cache computes, in plain torch: exact in float64, and what a CPU runs."""

import torch
from jaxtyping import Float
from torch import Tensor


def attend_token(
    qkv: Float[Tensor, "batch all"],
    cos: Float[Tensor, "rows dim"],
    sin: Float[Tensor, "rows dim"],
    keys: Float[Tensor, "batch kv_heads capacity dim"],
    values: Float[Tensor, "batch kv_heads capacity dim"],
    position: int,
    scaling: float,
) -> Float[Tensor, "batch heads_times_dim"]:
    """See `token_attention.attend_token`. Writes into `keys` and `values`."""
    batch, kv_heads, _, dim = keys.shape
    wide = torch.promote_types(qkv.dtype, torch.float32)
    split = qkv.to(wide).unflatten(1, (-1, dim))
    cos, sin = cos.to(wide)[:, None], sin.to(wide)[:, None]
    rotated = (split * cos + _turned(split) * sin).to(qkv.dtype)
    keys[:, :, position] = rotated[:, -2 * kv_heads : -kv_heads]
    values[:, :, position] = split[:, -kv_heads:].to(values.dtype)
    query = rotated[:, : -2 * kv_heads].to(wide).unflatten(1, (kv_heads, -1))
    past = slice(0, position + 1)
    shares = (query @ keys[:, :, past].to(wide).transpose(2, 3) * scaling).softmax(dim=-1)
    return (shares @ values[:, :, past].to(wide)).view(batch, -1).to(qkv.dtype)


def _turned(x: Float[Tensor, "*leading dim"]) -> Float[Tensor, "*leading dim"]:
    """The second half of each head, negated, before the first."""
    low, high = x.chunk(2, dim=-1)
    return torch.cat([-high, low], dim=-1)
