"""Statistics of a layer's inputs, as sums and extremes: they merge over batches, processes and interrupted runs.

The Gram matrix G = XᵀX gives the output error of any rounding of the layer without another pass over data:
tr(ΔW·G·ΔWᵀ).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(slots=True)
class InputStatistics:
    """What the methods need to know of the inputs that one or several linears share."""

    gram: Float[Tensor, "in in"]  # XᵀX, float32 or better
    absolute_max: Float[Tensor, "in"]
    absolute_sum: Float[Tensor, "in"]
    minimum: Float[Tensor, "in"]
    maximum: Float[Tensor, "in"]
    tokens: int = 0
    drift: Float[Tensor, "in in"] | None = None  # (F - X)ᵀX: F are the inputs the float model has in X's place

    @classmethod
    def empty(cls, width: int, device: torch.device | str = "cpu", drift: bool = False) -> "InputStatistics":
        def vector(value: float) -> Tensor:
            return torch.full((width,), value, dtype=torch.float32, device=device)

        return cls(
            gram=torch.zeros(width, width, device=device),
            absolute_max=vector(0),
            absolute_sum=vector(0),
            minimum=vector(torch.inf),
            maximum=vector(-torch.inf),
            drift=torch.zeros(width, width, device=device) if drift else None,
        )

    @property
    def mean_absolute(self) -> Float[Tensor, "in"]:
        return self.absolute_sum / max(self.tokens, 1)

    def absorb(self, inputs: Float[Tensor, "tokens in"], reference: Float[Tensor, "tokens in"] | None = None) -> None:
        """Add these tokens. Edits in place. `reference`: what the float model has for the same tokens."""
        if not len(inputs):
            return
        self.gram += product(inputs, inputs)
        if self.drift is not None and reference is not None:
            self.drift += product(reference - inputs, inputs)
        magnitude = inputs.abs()
        self.absolute_max = torch.maximum(self.absolute_max, magnitude.amax(dim=0).float())
        self.absolute_sum += magnitude.sum(dim=0, dtype=torch.float32)
        low, high = inputs.aminmax(dim=0)
        self.minimum = torch.minimum(self.minimum, low.float())
        self.maximum = torch.maximum(self.maximum, high.float())
        self.tokens += len(inputs)

    def merge(self, other: "InputStatistics") -> None:
        """Add what another walk has seen. Edits in place."""
        self.gram += other.gram
        if self.drift is not None and other.drift is not None:
            self.drift += other.drift
        self.absolute_max = torch.maximum(self.absolute_max, other.absolute_max)
        self.absolute_sum += other.absolute_sum
        self.minimum = torch.minimum(self.minimum, other.minimum)
        self.maximum = torch.maximum(self.maximum, other.maximum)
        self.tokens += other.tokens

    def divide(self, scale: Float[Tensor, "in"]) -> None:
        """The statistics of X/scale, for a positive scale: what the readers see once it has moved into them. In place."""
        scale = scale.to(self.gram.device, torch.float32)
        self.gram /= scale[:, None] * scale
        if self.drift is not None:
            self.drift /= scale[:, None] * scale
        for statistic in (self.absolute_max, self.absolute_sum, self.minimum, self.maximum):
            statistic /= scale


def product(left: Float[Tensor, "tokens a"], right: Float[Tensor, "tokens b"]) -> Float[Tensor, "a b"]:
    """leftᵀ·right, accumulated in float32 or better; the inputs' own dtype feeds the multipliers."""
    if left.is_cuda and left.dtype in (torch.float16, torch.bfloat16):
        return torch.mm(left.T, right, out_dtype=torch.float32)
    dtype = torch.promote_types(left.dtype, torch.float32)
    return left.to(dtype).T @ right.to(dtype)
