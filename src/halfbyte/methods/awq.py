"""AWQ: grow the weight columns that meet large inputs, so that they round better; the inputs shrink by as much.

Lin et al., 2023 — https://arxiv.org/abs/2306.00978, section 3.2

    here          paper   what it is
    scale         s       [in] factor of the readers' columns; the writer before them is divided by it
    exponent      α       s = mean|x|^α (`duo`: s = mean|x|^α / mean|w|^(1-α), as SmoothQuant balances the two sides)
    error         L(s)    ‖Q(W·diag s)·diag(s)⁻¹·X - W·X‖², here tr(Δ·G·Δᵀ) from the Gram matrix G = XᵀX

The authors run the block once for every grid point; with the Gram matrix a grid point is one product on weights, and
nothing is run. Exponents on a grid of `points` in [0, 1); scales normalised by √(max·min) as in their code.
AWQ only moves scales. Clipping is the rounding method's range search: `rtn` with `ranges: output` makes the paper's AWQ.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from halfbyte.calibration.statistics import InputStatistics
from halfbyte.models.fold import ResolvedLink, move_scale, tie
from halfbyte.numerics.integer_scales import nearest
from halfbyte.numerics.precision import float32_products
from halfbyte.numerics.ranges import Ranges
from halfbyte.scheme import ActivationFormat, Value, WeightFormat

SMALLEST_SCALE = 1e-4


def candidate(inputs: Float[Tensor, "in"], weights: Float[Tensor, "in"] | None, exponent: float) -> Float[Tensor, "in"]:
    """The scale at one grid point, normalised so that its largest and smallest entries are reciprocal."""
    scale = inputs.pow(exponent)
    if weights is not None:
        scale = scale / weights.pow(1 - exponent)
    scale = torch.where(torch.isfinite(scale) & (inputs > 0), scale, 1.0).clamp(min=SMALLEST_SCALE)
    return scale / (scale.max() * scale.min()).sqrt()


class AWQ(Value):
    """Scale search on the Gram matrix."""

    method: Literal["awq"] = "awq"
    points: int = Field(default=20, ge=1)
    duo: bool = False
    ranges: Ranges = "minmax"  # how the grid is set while candidates are compared

    @property
    def needs_drift(self) -> bool:
        return False

    def transform(
        self,
        links: Sequence[ResolvedLink],
        seen: Mapping[str, InputStatistics],
        formats: Mapping[str, WeightFormat],
        activations: Mapping[str, ActivationFormat],  # noqa: ARG002
    ) -> None:
        """Move the best scale of every link. Edits the modules and the readers' statistics in place."""
        for link in links:
            rounded = {name: w for name, w in zip(link.readers, link.weights, strict=True) if name in formats}
            if not rounded:
                continue
            scale = self.best_scale(link, rounded, seen, formats)
            move_scale(link, scale)
            for statistics in {id(seen[name]): seen[name] for name in rounded}.values():
                statistics.divide(scale)

    def best_scale(
        self,
        link: ResolvedLink,
        weights: Mapping[str, Float[Tensor, "out in"]],
        seen: Mapping[str, InputStatistics],
        formats: Mapping[str, WeightFormat],
    ) -> Float[Tensor, "in"]:
        """The scale of least summed output error over the link's readers that will be rounded."""
        inputs = torch.stack([seen[name].mean_absolute for name in weights]).mean(dim=0)
        magnitudes = None
        if self.duo:
            magnitudes = torch.cat([weight.float().abs() for weight in weights.values()]).mean(dim=0)
        best, least = torch.ones_like(inputs), float("inf")
        exponents = [point / self.points for point in range(self.points)]
        candidates = [torch.ones_like(inputs)] + [candidate(inputs, magnitudes, exponent) for exponent in exponents]
        for scale in (tie(scale, link) for scale in candidates):
            error = sum(
                self.error(weight.float(), scale, seen[name].gram, formats[name]) for name, weight in weights.items()
            )
            if error < least:
                best, least = scale, error
        return best

    def error(
        self,
        weight: Float[Tensor, "out in"],
        scale: Float[Tensor, "in"],
        gram: Float[Tensor, "in in"],
        format: WeightFormat,
    ) -> float:
        """The squared output error of rounding this weight under this scale."""
        scaled = weight * scale
        gram_then = gram / (scale[:, None] * scale) if self.ranges == "output" else None
        delta = nearest(scaled, format, self.ranges, gram_then).decode() / scale - weight
        with float32_products(tf32=True):  # candidates differ by far more than TF32 rounds
            return float(((delta @ gram) * delta).sum())
