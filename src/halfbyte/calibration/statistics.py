"""Statistics of a layer's inputs, as sums and extremes: they merge over batches, processes and interrupted runs.

The Gram matrix G = XᵀX gives the output error of any rounding of the layer without another pass over data:
tr(ΔW·G·ΔWᵀ).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from halfbyte.numerics.precision import exact_bfloat16_products

ROWS_PER_PASS = 64


@dataclass(slots=True)
class InputStatistics:
    """What the methods need to know of the inputs that one or several linears share."""

    gram: Float[Tensor, "in in"]  # XᵀX, float32 or better
    absolute_max: Float[Tensor, "in"]
    absolute_sum: Float[Tensor, "in"]
    minimum: Float[Tensor, "in"]
    maximum: Float[Tensor, "in"]
    rows: Float[Tensor, "rows in"]  # some of the inputs themselves, evenly drawn, float32
    tokens: int = 0
    drift: Float[Tensor, "in in"] | None = None  # (F - X)ᵀX: F are the inputs the float model has in X's place
    magnitudes: bool = True  # whether vectors and rows are gathered: on a CPU they cost half of a Gram matrix

    @classmethod
    def empty(
        cls, width: int, device: torch.device | str = "cpu", *, drift: bool = False, magnitudes: bool = True
    ) -> "InputStatistics":
        def vector(value: float) -> Tensor:
            return torch.full((width,), value, dtype=torch.float32, device=device)

        return cls(
            gram=torch.zeros(width, width, device=device),
            absolute_max=vector(0),
            absolute_sum=vector(0),
            minimum=vector(torch.inf),
            maximum=vector(-torch.inf),
            rows=torch.empty(0, width, device=device),
            drift=torch.zeros(width, width, device=device) if drift else None,
            magnitudes=magnitudes,
        )

    @property
    def mean_absolute(self) -> Float[Tensor, "in"]:
        return self.absolute_sum / max(self.tokens, 1)

    def absorb(self, inputs: Float[Tensor, "tokens in"], reference: Float[Tensor, "tokens in"] | None = None) -> None:
        """Add these tokens. Edits in place. `reference`: what the float model has for the same tokens."""
        if not len(inputs):
            return
        add_gram(self.gram, inputs)
        if self.drift is not None and reference is not None:
            self.drift += product(reference - inputs, inputs)
        self.tokens += len(inputs)
        if not self.magnitudes:
            return
        low, high = inputs.amin(dim=0).float(), inputs.amax(dim=0).float()
        self.absolute_max = torch.maximum(self.absolute_max, torch.maximum(-low, high))
        self.absolute_sum += inputs.abs().sum(dim=0, dtype=torch.float32)
        self.minimum = torch.minimum(self.minimum, low)
        self.maximum = torch.maximum(self.maximum, high)
        self.rows = torch.cat([self.rows, inputs[:: max(1, len(inputs) // ROWS_PER_PASS)].float()])

    def merge(self, other: "InputStatistics") -> None:
        """Add what another walk has seen. Edits in place."""
        self.gram += other.gram
        if self.drift is not None and other.drift is not None:
            self.drift += other.drift
        self.absolute_max = torch.maximum(self.absolute_max, other.absolute_max)
        self.absolute_sum += other.absolute_sum
        self.minimum = torch.minimum(self.minimum, other.minimum)
        self.maximum = torch.maximum(self.maximum, other.maximum)
        self.rows = torch.cat([self.rows, other.rows])
        self.tokens += other.tokens

    def divide(self, scale: Float[Tensor, "in"]) -> None:
        """The statistics of X/scale, for a positive scale: what the readers see once it has moved into them. In place."""
        scale = scale.to(self.gram.device, torch.float32)
        self.gram /= scale[:, None] * scale
        if self.drift is not None:
            self.drift /= scale[:, None] * scale
        for statistic in (self.absolute_max, self.absolute_sum, self.minimum, self.maximum, self.rows):
            statistic /= scale


GRAM_BLOCK = 512


def add_gram(gram: Float[Tensor, "in in"], inputs: Float[Tensor, "tokens in"]) -> None:
    """gram += XᵀX, in place. On a CPU only the blocks on and above the diagonal are multiplied, then mirrored."""
    if inputs.is_cuda:
        gram += product(inputs, inputs)
        return
    width, wide = inputs.shape[1], widened(inputs)
    with exact_bfloat16_products(inputs.dtype == torch.bfloat16):
        for start in range(0, width, GRAM_BLOCK):
            stop = min(start + GRAM_BLOCK, width)
            strip = wide[:, start:stop].T @ wide[:, start:]
            gram[start:stop, start:] += strip
            gram[stop:, start:stop] += strip[:, stop - start :].T


def product(left: Float[Tensor, "tokens a"], right: Float[Tensor, "tokens b"]) -> Float[Tensor, "a b"]:
    """leftᵀ·right, accumulated in float32 or better; the inputs' own dtype feeds the multipliers."""
    if left.is_cuda and left.dtype in (torch.float16, torch.bfloat16):
        return torch.mm(left.T, right, out_dtype=torch.float32)
    with exact_bfloat16_products(left.dtype == torch.bfloat16):
        return widened(left).T @ widened(right)


def widened(inputs: Float[Tensor, "tokens in"]) -> Float[Tensor, "tokens in"]:
    return inputs.to(torch.promote_types(inputs.dtype, torch.float32))
