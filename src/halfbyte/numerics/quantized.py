"""QuantizedWeight: what every method produces and everything after it consumes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from halfbyte.numerics.activations import InputQuantizer
from halfbyte.numerics.grid import Grid, decode, encode
from halfbyte.scheme import GroupCount, IntegerScale, PerChannel, PerGroup, WeightFormat


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
        zeros, amplifiers = (
            None if tensor is None else tensor.to(device) for tensor in (self.grid.zero_points, self.grid.amplifiers)
        )
        return QuantizedWeight(self.codes.to(device), Grid(self.grid.scales.to(device), zeros, amplifiers), self.format)


@dataclass(frozen=True, slots=True)
class QuantizedModule:
    """A quantized linear as it is stored: its weight, and how its input is quantized (None: not at all)."""

    weight: QuantizedWeight
    inputs: InputQuantizer | None = None
    kept: Float[Tensor, "out n"] | None = None
    """Columns of the weight as the model had them: of a static outlier set, or all where the set is dynamic."""

    def decode(self) -> Float[Tensor, "out in"]:
        """The weight that the module computes with: decoded, and the kept columns of a static outlier set."""
        weight = self.weight.decode()
        if self.kept is not None and self.inputs is not None and self.inputs.outlier_columns is not None:
            weight[:, self.inputs.outlier_columns.long()] = self.kept.to(weight.dtype)
        return weight


def stored_format(format: WeightFormat, out: int, columns: int) -> WeightFormat:
    """The format that `along_rows` gives an [out, columns] weight."""
    if not isinstance(format.granularity, GroupCount):
        return format
    size = gcd(out * columns // format.granularity.count, columns)
    return format.model_copy(update={"granularity": PerChannel() if size == columns else PerGroup(size=size)})


def along_rows(weight: QuantizedWeight) -> QuantizedWeight:
    """The same weight with its scales per channel or per group, where it had a number of groups over the whole matrix.

    A group that ends within a row leaves shorter runs of equal scales: their size is the greatest that divides both.
    """
    if not isinstance(weight.format.granularity, GroupCount):
        return weight
    out, columns = weight.codes.shape
    format = stored_format(weight.format, out, columns)
    size = format.granularity.size if isinstance(format.granularity, PerGroup) else columns
    runs = out * columns // size // weight.grid.scales.numel()

    def repeated(values: Float[Tensor, "count 1"]) -> Float[Tensor, "out groups"]:
        return values.repeat_interleave(runs).view(out, columns // size)

    zeros = weight.grid.zero_points
    grid = Grid(repeated(weight.grid.scales), None if zeros is None else repeated(zeros))
    return QuantizedWeight(weight.codes, grid, format)


def round_to_grid(weight: Float[Tensor, "out in"], grid: Grid, format: WeightFormat) -> QuantizedWeight:
    """Each element to its nearest code."""
    return QuantizedWeight(encode(weight, grid, format), grid, format)


def split_rows(whole: QuantizedWeight, rows: Sequence[int]) -> list[QuantizedWeight]:
    """The parts of a matrix that was quantized rows on rows."""
    if len(rows) == 1:
        return [whole]
    grid = whole.grid

    def parts(tensor: Tensor | None) -> list[Any]:
        return [None] * len(rows) if tensor is None else [part.contiguous() for part in tensor.split(list(rows))]

    grids = map(Grid, parts(grid.scales), parts(grid.zero_points), parts(grid.amplifiers))
    return [QuantizedWeight(c, g, whole.format) for c, g in zip(parts(whole.codes), grids, strict=True)]


def alike(names: Sequence[str], formats: Mapping[str, WeightFormat]) -> list[tuple[str, ...]]:
    """Names that can be rounded as one matrix: the same format, with grids and amplifiers that do not span rows."""
    together: dict[WeightFormat, list[str]] = {}
    alone = []
    for name in names:
        scale = formats[name].scale
        of_layer = isinstance(scale, IntegerScale) and scale.amplifier in ("heuristic", "layer")
        if isinstance(formats[name].granularity, PerChannel | PerGroup) and not of_layer:
            together.setdefault(formats[name], []).append(name)
        else:
            alone.append((name,))
    return [tuple(group) for group in together.values()] + alone
