"""RoPE of the tokens in a cache of fixed size whose keys are stored before it.

cos, sin   [batch, capacity, half]   of every token, as the model had them when it came; channel i with i + half
near       [2, near, half]           of 0, 1, ... tokens further, for kernels that turn neighbours together
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from halfbyte.kernels.kv_attention import KeyRotation
from halfbyte.kernels.kv_attention.cuts import NEAR
from halfbyte.numerics.cache import rotate, unrotate

CHANGING = {"dynamic", "longrope"}  # kinds of RoPE whose frequencies depend on the length of the text


class StaticRotations:
    """Cosines and sines of every cached token, shared by the layers that rotate alike."""

    def __init__(self, capacity: int, near: Float32[Tensor, "2 near half"]) -> None:
        self.capacity, self.near = capacity, near
        self.cos: Tensor | None = None
        self.sin: Tensor | None = None

    def prepare(self, batch: int, dtype: torch.dtype, device: torch.device) -> None:
        """Make the rows, unless they are there: in float16 for models of 16 bits, which loses nothing."""
        if self.cos is None or self.sin is None:
            kind = torch.float16 if dtype == torch.bfloat16 else dtype
            shape = (batch, self.capacity, self.near.shape[2])
            self.cos, self.sin = (torch.zeros(shape, dtype=kind, device=device) for _ in range(2))

    def write(self, rotation: tuple[Tensor, Tensor], length: Int64[Tensor, ""]) -> None:
        """Keep the rotation of a call's tokens, which come after the first `length`, in rows that are there."""
        places = torch.arange(rotation[0].shape[1], device=length.device) + length
        for kept, new in zip((self.cos, self.sin), rotation, strict=True):
            assert kept is not None
            half = new[..., : kept.shape[2]].to(kept.dtype)
            kept.index_copy_(1, places, half.expand(len(kept), -1, -1))

    def of_rows(self, first: int, last: int) -> "StaticRotations":
        """These rows of the batch, in the same memory. They are there already."""
        assert self.cos is not None
        assert self.sin is not None
        part = StaticRotations(self.capacity, self.near)
        part.cos, part.sin = self.cos[first:last], self.sin[first:last]
        return part

    def after(self, keys: Float[Tensor, "batch heads capacity dim"]) -> Float[Tensor, "batch heads capacity dim"]:
        """All rows of keys, rotated."""
        assert self.cos is not None
        assert self.sin is not None
        return rotate(keys, *(torch.cat([part, part], dim=-1) for part in (self.cos, self.sin))).to(keys.dtype)

    @property
    def of_packed(self) -> KeyRotation:
        """As kernels read it."""
        assert self.cos is not None
        assert self.sin is not None
        return KeyRotation(self.cos, self.sin, self.near)

    def crop(self, _length: int) -> None:
        """Rows beyond the length are not read."""

    def change(self, change: Callable[[Tensor], Tensor]) -> None:
        """Let the batch be in another order. Edits the rows in place."""
        for kept in (self.cos, self.sin):
            if kept is not None:
                kept.copy_(change(kept))

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.cos, self.sin) if part is not None)


def before(keys: Float[Tensor, "batch heads new dim"], rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Keys as they were before RoPE, in float32 at least."""
    wide = torch.promote_types(keys.dtype, torch.float32)
    return unrotate(keys.to(wide), *(part.to(wide) for part in rotation))


def near_turns(model: Any, kind: str) -> Float32[Tensor, "2 near half"]:
    """Cosines and sines of 0, 1, ... tokens' distance in layers of this kind."""
    rotary, device = model.base_model.rotary_emb, next(model.parameters()).device
    kinds = [kind] if isinstance(rotary.rope_type, dict) else []
    found = rotary(torch.zeros(1, device=device), torch.arange(NEAR, device=device)[None], *kinds)
    turns = torch.stack([part[0, :, : part.shape[-1] // 2] for part in found]).float()
    return turns / turns.square().sum(dim=0).sqrt()  # YaRN scales both


def turns_evenly(model: Any, kind: str) -> bool:
    """Whether what a token turns is the same in texts of all lengths."""
    known = model.base_model.rotary_emb.rope_type
    return (known[kind] if isinstance(known, dict) else known) not in CHANGING
