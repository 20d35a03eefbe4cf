"""SmoothQuant: divide loud input channels and grow the weight columns that meet them, until both sides fit 8 bits.

Xiao et al., 2022 — https://arxiv.org/abs/2211.10438, section 4

    here          paper      what it is
    scale         s_j        [in] factor of the readers' columns; the writer before them is divided by it (equation 3)
    alpha         α          s_j = max|X_j|^α / max|W_j|^(1-α) (equation 4)
    inputs        max|X_j|   [in] largest magnitude of each input channel on the calibration text
    weights       max|W_j|   [in] largest magnitude of each column over all readers of the writer, a router included
    error         –          ‖Q(X/s)·Q(W·diag s)ᵀ - X·Wᵀ‖², the quantized product against the exact one on sampled rows

The paper has one α per model, set by hand. `alpha: search` takes for each link the α of least error, with the formats
that weights and inputs will have; s = 1 is a candidate, so a link that gains nothing stays as it is. The paper scales
norms alone (`links: norms`). Here every link of the table takes part, value → output projection and up → down too:
there the inputs of a gated feed-forward part have their spikes. Channels that were never alive keep s = 1.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from halfbyte.calibration.statistics import InputStatistics
from halfbyte.models.fold import ResolvedLink, move_scale, tie
from halfbyte.numerics.activations import calibrated, simulate
from halfbyte.numerics.integer_scales import nearest
from halfbyte.numerics.precision import float32_products
from halfbyte.numerics.ranges import Ranges
from halfbyte.scheme import ActivationFormat, Value, WeightFormat

SMALLEST = 1e-5  # of weights and of scales, as in the authors' code

Links = Literal["all", "norms"]
"""Where scales may move: along every link of the architecture's table, or out of norms only."""


def balanced(inputs: Float[Tensor, "in"], weights: Float[Tensor, "in"], alpha: float) -> Float[Tensor, "in"]:
    """Equation 4: at α = 1 every input channel reaches 1, at α = 0 every weight column does."""
    scale = inputs.clamp(min=SMALLEST).pow(alpha) / weights.clamp(min=SMALLEST).pow(1 - alpha)
    return torch.where(inputs > 0, scale, 1.0).clamp(min=SMALLEST)


def moves(link: ResolvedLink, links: Links) -> bool:
    """Whether this option lets a scale move along the link."""
    return links == "all" or not isinstance(link.writer, nn.Linear)


def observed(link: ResolvedLink, seen: Mapping[str, InputStatistics]) -> list[InputStatistics]:
    """The statistics of the link's readers, each object once. Routers have none of their own."""
    return list({id(seen[name]): seen[name] for name in link.readers if name in seen}.values())


def largest_inputs(statistics: Sequence[InputStatistics]) -> Float[Tensor, "in"]:
    """The largest magnitude of each channel over all readers: experts see tokens of their own."""
    return torch.stack([each.absolute_max for each in statistics]).amax(dim=0)


def largest_weights(link: ResolvedLink) -> Float[Tensor, "in"]:
    """The largest magnitude of each column over all readers."""
    return torch.stack([weight.float().abs().amax(dim=0) for weight in link.weights]).amax(dim=0)


class SmoothQuant(Value):
    """Balance inputs against weights, channel by channel."""

    method: Literal["smoothquant"] = "smoothquant"
    alpha: Literal["search"] | Annotated[float, Field(ge=0, le=1)] = "search"
    points: int = Field(default=20, ge=1)  # of the search: α = 0, 1/points, …, 1
    links: Links = "all"
    ranges: Ranges = "minmax"  # how the grid is set while candidates are compared

    def transform(
        self,
        links: Sequence[ResolvedLink],
        seen: Mapping[str, InputStatistics],
        formats: Mapping[str, WeightFormat],
        activations: Mapping[str, ActivationFormat],
    ) -> None:
        """Move the balancing scale of every link. Edits the modules and the readers' statistics in place."""
        for link in links:
            judged = [name for name in link.readers if name in formats or name in activations]
            if not judged or not moves(link, self.links):
                continue
            statistics = observed(link, seen)
            inputs, weights = largest_inputs(statistics), largest_weights(link)
            if self.alpha == "search":
                alphas = [point / self.points for point in range(self.points + 1)]
                candidates = [torch.ones_like(inputs)] + [balanced(inputs, weights, alpha) for alpha in alphas]
                scale = self.best_scale(link, judged, candidates, seen, formats, activations)
            else:
                scale = tie(balanced(inputs, weights, self.alpha), link)
            move_scale(link, scale)
            for each in statistics:
                each.divide(scale)

    def best_scale(
        self,
        link: ResolvedLink,
        judged: Sequence[str],
        candidates: Sequence[Float[Tensor, "in"]],
        seen: Mapping[str, InputStatistics],
        formats: Mapping[str, WeightFormat],
        activations: Mapping[str, ActivationFormat],
    ) -> Float[Tensor, "in"]:
        """The candidate, tied, of least error summed over the readers that will be quantized."""
        readers = dict(zip(link.readers, link.weights, strict=True))
        best, least = candidates[0], float("inf")
        for scale in (tie(candidate, link) for candidate in candidates):
            error = sum(
                self.error(readers[name].float(), scale, seen[name], formats.get(name), activations.get(name))
                for name in judged
            )
            if error < least:
                best, least = scale, error
        return best

    def error(
        self,
        weight: Float[Tensor, "out in"],
        scale: Float[Tensor, "in"],
        seen: InputStatistics,
        format: WeightFormat | None,
        activations: ActivationFormat | None,
    ) -> float:
        """The squared output error of the quantized product under this scale, on the sampled rows, for all tokens."""
        if not len(seen.rows):
            return 0.0
        wanted, inputs = weight * scale, seen.rows / scale
        rounded, read = wanted, inputs
        if format is not None:
            gram = seen.gram / (scale[:, None] * scale) if self.ranges == "output" else None
            rounded = nearest(wanted, format, self.ranges, gram).decode()
        if activations is not None:
            read = simulate(inputs, calibrated(activations, seen.minimum / scale, seen.maximum / scale))
        with float32_products(tf32=True):  # of differences: what TF32 rounds is small against them
            difference = (read - inputs) @ wanted.T + read @ (rounded - wanted).T
        return float(difference.square().sum()) / len(seen.rows) * seen.tokens
