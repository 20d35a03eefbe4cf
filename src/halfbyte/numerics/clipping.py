"""Learned weight clipping: the range of every group shrinks by two factors that learn.

OmniQuant, Shao et al., 2023 — https://arxiv.org/abs/2308.13137, section 3.2, equation 2

    here       paper    what it is
    upper      γ        [rows groups] logit: the group's largest weight counts σ(upper)/σ(whole) times
    lower      β        likewise of the smallest; symmetric formats take the larger magnitude of the two ends
    whole      –        the logit at which a range is whole; None: at infinity, as the paper has it (4.0 starts at 0.982)

The step is (γ·max - β·min)/(2^b - 1), or by the convention of a symmetric format; the zero point follows from it. What is
learned ends as an ordinary grid.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from halfbyte.numerics.grid import Grid, grid_between, round_scales, scales_shape, to_groups
from halfbyte.numerics.slopes import straight_through
from halfbyte.scheme import WeightFormat

START = 4.0  # of the logits, as in the authors' code
SMALLEST = 0.01  # factor: what is left of a range whatever the rate
LARGEST = 0.9999  # likewise; its logit is finite


@dataclass(frozen=True, slots=True, eq=False)
class Clipping:
    """The factors of one weight's groups. The tensors learn; `whole` does not."""

    upper: Float[Tensor, "rows groups"]
    lower: Float[Tensor, "rows groups"]
    whole: float | None = None
    amplifiers: Float[Tensor, "rows 1"] | None = None

    @property
    def learned(self) -> Sequence[Tensor]:
        return self.upper, self.lower

    def grid(self, weight: Float[Tensor, "out in"], format: WeightFormat) -> Grid:
        """The clipped grid of this weight, with slopes in weight and factors; as stored, scales and zero points rounded."""
        low, high = ends(weight, format)
        unit = 1.0 if self.whole is None else float(torch.tensor(self.whole).sigmoid())
        low, high = low * self._factor(self.lower) / unit, high * self._factor(self.upper) / unit
        reach = torch.maximum(-low, high) if format.symmetric else high - low
        stored = grid_between(low.detach(), high.detach(), format)
        exact = torch.where(reach > 0, reach / format.divisor, stored.scales)
        scales = round_scales(exact.detach(), format.scale, self.amplifiers)
        scales = straight_through(scales, exact)
        if stored.zero_points is None:
            return Grid(scales, None, self.amplifiers)
        position = -low / scales
        zeros = position.detach().round().clamp(format.lowest, format.highest)
        return Grid(scales, straight_through(zeros, position), self.amplifiers)

    @torch.no_grad()
    def times(self, ratio: float) -> Sequence[Tensor]:
        """What `learned` would be for ranges of `ratio` times these, whole ones at most where they started so."""
        return [torch.logit((each.sigmoid() * ratio).clamp(SMALLEST, LARGEST)) for each in self.learned]

    @staticmethod
    def _factor(logit: Tensor) -> Tensor:
        return logit.sigmoid().clamp(min=SMALLEST)


def ends(
    weight: Float[Tensor, "out in"], format: WeightFormat
) -> tuple[Float[Tensor, "rows groups"], Float[Tensor, "rows groups"]]:
    """Smallest and largest weight of each group, and zero where none is below or above it."""
    shape = scales_shape(weight.shape[0], weight.shape[1], format.granularity)
    members = to_groups(weight, format.granularity)
    return members.amin(dim=1).clamp(max=0).view(shape), members.amax(dim=1).clamp(min=0).view(shape)


def paper_clipping(weight: Float[Tensor, "out in"], format: WeightFormat) -> Clipping:
    """Where the paper starts: both factors σ(4) of the group's own range."""
    shape = scales_shape(weight.shape[0], weight.shape[1], format.granularity)
    upper, lower = (torch.full(shape, START, device=weight.device).requires_grad_() for _ in range(2))
    return Clipping(upper, lower)


def warm_clipping(weight: Float[Tensor, "out in"], grid: Grid, format: WeightFormat) -> Clipping:
    """Start from a grid that was found for this weight: exactly it, where each range is of its reach or below.

    Ranges can still grow by 1/σ(4) - 1 = 1.8 % of the weight's own.
    """
    low, high = ends(weight, format)
    unit = torch.tensor(START).sigmoid()
    if grid.zero_points is None:
        top = bottom = grid.scales * format.divisor
    else:  # the zero point was rounded, and the range is of its length all the same
        length = format.divisor * grid.scales
        top = torch.minimum((format.highest - grid.zero_points) * grid.scales, high)
        bottom = torch.minimum(length - top, -low)
        top = torch.minimum(length - bottom, high)
    upper, lower = (_logit(of, part, unit.item()) for of, part in ((high, top), (-low, bottom)))
    return Clipping(upper.requires_grad_(), lower.requires_grad_(), START, grid.amplifiers)


def _logit(reach: Tensor, wanted: Tensor, unit: float) -> Tensor:
    """The logit whose factor takes `reach` to `wanted`; the whole range where that would be more."""
    factor = torch.where(reach > 0, wanted / torch.where(reach > 0, reach, 1), 1.0).clamp(1e-3, 1.0)
    return torch.logit(factor * unit)
