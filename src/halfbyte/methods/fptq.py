"""FPTQ: 8-bit inputs of 4-bit weights, with one static scale wherever a layer's inputs allow it.

Li et al., 2023 — https://arxiv.org/abs/2308.15987, section 3

    here            paper    what it is
    largest         v        largest magnitude among a layer's inputs on the calibration text
    static_to       v0 = 15  up to it one static scale for the whole tensor
    dynamic_from    v1 = 150 from it on a scale per token, found at run time
    equalising      s_j      between the two: s_j = max|X_j| / log2(2 + max|X_j|), moved into the weights; v is taken again

After equalisation channel j reaches log2(2 + max|X_j|) < 7.3, so the layer has a static scale. Where no link lets the
scale move, or a scale that query heads share leaves v above `static_to`, the layer is dynamic. Linears that read one
tensor share its statistics and so the decision. A layer that saw no tokens is dynamic.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from halfbyte.calibration.statistics import InputStatistics
from halfbyte.errors import RecipeError
from halfbyte.methods.smoothquant import Links, largest_inputs, moves, observed
from halfbyte.models.fold import ResolvedLink, move_scale, tie
from halfbyte.scheme import ActivationFormat, Value, WeightFormat


def equalising(largest: Float[Tensor, "in"]) -> Float[Tensor, "in"]:
    """The logarithmic scale of each channel; 1 where it was never alive."""
    return torch.where(largest > 0, largest / torch.log2(2 + largest), 1.0)


class FPTQ(Value):
    """Logarithmic equalisation, and a choice between static and dynamic input scales for every layer."""

    method: Literal["fptq"] = "fptq"
    static_to: float = Field(default=15.0, ge=0)
    dynamic_from: float = Field(default=150.0, ge=0)
    links: Links = "all"
    noise: float | None = None

    def transform(
        self,
        links: Sequence[ResolvedLink],
        seen: Mapping[str, InputStatistics],
        formats: Mapping[str, WeightFormat],  # noqa: ARG002
        activations: Mapping[str, ActivationFormat],
    ) -> None:
        """Equalise the inputs that lie between the limits. Edits the modules and the readers' statistics in place."""
        for link in links:
            if not moves(link, self.links) or not any(name in activations for name in link.readers):
                continue
            statistics = observed(link, seen)
            largest = largest_inputs(statistics)
            if self.static_to < float(largest.max()) < self.dynamic_from:
                scale = tie(equalising(largest), link)
                move_scale(link, scale)
                for each in statistics:
                    each.divide(scale)

    def choose(
        self, seen: Mapping[str, InputStatistics], activations: Mapping[str, ActivationFormat]
    ) -> Mapping[str, ActivationFormat]:
        """Static per tensor where the inputs, as they are now, stay within `static_to`; else per token.

        RecipeError where the recipe's inputs are in groups or split off outlier columns.
        """
        out = {}
        for n, f in activations.items():
            v = float(seen[n].absolute_max.max())
            static = 0 < v <= self.static_to
            if static and self.noise is not None:
                static = v * v <= self.noise * float(seen[n].rows.abs().amax(1).square().mean())
            out[n] = ActivationFormat(
                bits=f.bits, symmetric=f.symmetric, granularity="tensor" if static else "token", dynamic=not static
            )
        return out
