"""QuantizedWeight: what every method produces and everything after it consumes."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from halfbyte.numerics.grid import Grid, decode, encode
from halfbyte.scheme import WeightFormat


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """Codes on a grid, with the format that says what they mean."""

    codes: Integer[Tensor, "out in"]
    grid: Grid
    format: WeightFormat

    def decode(self) -> Float[Tensor, "out in"]:
        """The weight that is stored, in the grid's dtype."""
        return decode(self.codes, self.grid)

    def to(self, device: torch.device | str) -> "QuantizedWeight":
        """The same weight on another device."""
        zero_points = self.grid.zero_points
        grid = Grid(self.grid.scales.to(device), None if zero_points is None else zero_points.to(device))
        return QuantizedWeight(self.codes.to(device), grid, self.format)


def round_to_grid(weight: Float[Tensor, "out in"], grid: Grid, format: WeightFormat) -> QuantizedWeight:
    """Each element to its nearest code."""
    return QuantizedWeight(encode(weight, grid, format), grid, format)
