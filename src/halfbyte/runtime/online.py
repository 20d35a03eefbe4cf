"""Rotations at run time: a linear whose weight expects its input rotated gets it so.

The rotation is a child of the linear, called by a hook before it: the linear keeps its class and its tensors their names.
"""

from collections.abc import Mapping
from math import sqrt
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from halfbyte.kernels.hadamard import hadamard, hadamard_quantize
from halfbyte.numerics.rotation import online_rotation
from halfbyte.runtime.codes import Codes
from halfbyte.scheme import OnlineHadamard

CHILD = "online_hadamard"


class OnlineRotation(nn.Module):
    """x ↦ x · diag(signs) · (H ⊗ core) / √n by the op `halfbyte::hadamard`. Nothing of it is in a state dict."""

    core: Tensor
    signs: Tensor | None

    def __init__(self, online: OnlineHadamard) -> None:
        super().__init__()
        self.online = online
        turn = online_rotation(online)
        core = turn.core * sqrt(len(turn.core))
        whole = bool((core.round().abs() == 1).all() and (core - core.round()).abs().max() < 1e-9)
        # 32 bits for an orthogonal matrix also where the model has 16: `to(dtype)` must not round it
        self.core = core.round().to(torch.int8) if whole else turn.core.float()
        self.signs = None if turn.signs is None else turn.signs.to(torch.int8)

    def _apply(self, fn: Any, recurse: bool = True) -> "OnlineRotation":  # noqa: ARG002 - torch names it
        """Move with the linear, and keep the dtypes."""
        device = fn(torch.empty(0, device=self.core.device)).device
        if device.type != "meta":
            self.core = self.core.to(device)
            self.signs = None if self.signs is None else self.signs.to(device)
        return self

    def forward(self, x: Float[Tensor, "*leading n"]) -> Float[Tensor, "*leading n"]:
        return hadamard(x, self.core, self.signs)

    def codes(self, x: Float[Tensor, "tokens n"]) -> Codes:
        """x rotated, each token as symmetric 8-bit codes, in one pass."""
        codes, scales = hadamard_quantize(x, self.core, self.signs)
        return Codes(codes, scales[:, None], None)


def add_rotations(model: nn.Module, online: Mapping[str, OnlineHadamard]) -> None:
    """Let these linears, by path, read their inputs rotated. Edits in place."""
    for path, each in online.items():
        linear = model.get_submodule(path)
        device = next((tensor.device for tensor in (*linear.parameters(), *linear.buffers())), torch.device("cpu"))
        linear.add_module(CHILD, OnlineRotation(each).to(device))
        linear.register_forward_pre_hook(_rotated)


def rotation_of(linear: nn.Module) -> OnlineRotation | None:
    """What rotates the linear's input at run time."""
    found = getattr(linear, CHILD, None)
    return found if isinstance(found, OnlineRotation) else None


def _rotated(linear: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return linear.get_submodule(CHILD)(args[0]), *args[1:]
