"""FPTQ: 8-bit inputs of 4-bit weights, with one static scale for every layer whose inputs allow it.

Li et al., 2023 — https://arxiv.org/abs/2308.15987: layer-wise choice, logarithmic activation equalisation

    here            paper    what it is
    largest         v        largest magnitude among a layer's inputs on the calibration text
    static_to       15       up to it one static scale for the whole tensor
    dynamic_from    150      from it on a scale per token, found at run time, and no equalisation
    equalising      s_j      above `static_to`: s_j = max|X_j| / log2(2 + max|X_j|) moves into the weights; v is taken again
    noise           –        mean squared step of the static scale over that of scales per token, on the sampled rows

After equalisation channel j reaches log2(2 + max|X_j|), so nearly every such layer could have a static scale. Linears that
read one tensor share its statistics and so the decision. Inputs that no scale can leave, and layers that saw no tokens,
keep a scale per token.

Two defaults differ from the paper, whose choice is `dynamic_from: 150, noise: null`. Magnitudes alone do not say whether
one scale can serve all tokens: a static scale is also refused where it makes more than 6 times the rounding noise, as it
does wherever few tokens spike (the inputs of a gated feed-forward part's last linear). And a norm's output is equalised
however large it is, since what is large there is a few channels, the same ones for every token.
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
from halfbyte.numerics.activations import grid_of
from halfbyte.scheme import ActivationFormat, Value, WeightFormat


def equalising(largest: Float[Tensor, "in"]) -> Float[Tensor, "in"]:
    """The logarithmic scale of each channel; 1 where it was never alive."""
    return torch.where(largest > 0, largest / torch.log2(2 + largest), 1.0)


def static_noise(seen: InputStatistics, format: ActivationFormat) -> float:
    """How many times the rounding noise of scales per token one static scale makes. Infinite where nothing was seen."""
    low, high = seen.rows.aminmax(dim=1)
    alive = (low != 0) | (high != 0)
    if not bool(alive.any()):
        return float("inf")
    static, _ = grid_of(seen.minimum.min(), seen.maximum.max(), format)
    dynamic, _ = grid_of(low[alive], high[alive], format)
    return float(static.square() / dynamic.square().mean())


class FPTQ(Value):
    """Logarithmic equalisation, and a choice between static and dynamic input scales for every layer."""

    method: Literal["fptq"] = "fptq"
    static_to: float = Field(default=15.0, ge=0)
    dynamic_from: float | None = Field(default=None, ge=0)  # None: equalise whatever can be
    noise: float | None = Field(default=6.0, ge=0)  # None: do not ask
    links: Links = "norms"

    def transform(
        self,
        links: Sequence[ResolvedLink],
        seen: Mapping[str, InputStatistics],
        formats: Mapping[str, WeightFormat],  # noqa: ARG002
        activations: Mapping[str, ActivationFormat],
    ) -> None:
        """Equalise the inputs between the limits. Edits the modules and the readers' statistics in place."""
        limit = float("inf") if self.dynamic_from is None else self.dynamic_from
        for link in links:
            if not moves(link, self.links) or not any(name in activations for name in link.readers):
                continue
            statistics = observed(link, seen)
            largest = largest_inputs(statistics)
            if self.static_to < float(largest.max()) < limit:
                scale = tie(equalising(largest), link)
                move_scale(link, scale)
                for each in statistics:
                    each.divide(scale)

    def choose(
        self, seen: Mapping[str, InputStatistics], activations: Mapping[str, ActivationFormat]
    ) -> Mapping[str, ActivationFormat]:
        """Static per tensor where the inputs, as they are now, allow it; else per token. Bits and symmetry stay.

        RecipeError where the recipe wants groups, or columns that are split off.
        """
        return {name: self._chosen(name, seen[name], format) for name, format in activations.items()}

    def _chosen(self, name: str, seen: InputStatistics, format: ActivationFormat) -> ActivationFormat:
        if format.granularity == "group" or format.outliers is not None:
            raise RecipeError(
                f"{name}: FPTQ chooses between one static scale and a scale per token, and the recipe asks for {format}: "
                "set granularity: token without outliers, or leave the fptq step out"
            )
        whole = format.model_copy(update={"granularity": "tensor", "dynamic": False})
        fits = seen.tokens > 0 and float(seen.absolute_max.max()) <= self.static_to
        if fits and (self.noise is None or static_noise(seen, format) <= self.noise):
            return whole
        return format.model_copy(update={"granularity": "token", "dynamic": True})
