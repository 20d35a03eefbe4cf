"""Matrices of a row for each token of a vocabulary, a few rows at a time in float32: whole they would take gigabytes."""

import torch
from jaxtyping import Float
from torch import Tensor

from halfbyte.numerics.error import decibels
from halfbyte.numerics.grid import Grid, fit
from halfbyte.numerics.quantized import QuantizedWeight, round_to_grid, split_rows
from halfbyte.scheme import WeightFormat

ROWS = 8192


def round_rows(weight: Float[Tensor, "rows in"], format: WeightFormat) -> QuantizedWeight:
    """Each row, or group of it, to the nearest codes of its own range. For symmetric formats."""
    parts = []
    for some in weight.split(ROWS):
        rows = some.float()
        parts.append(round_to_grid(rows, fit(rows, format), format))
    codes, scales = torch.cat([part.codes for part in parts]), torch.cat([part.grid.scales for part in parts])
    return QuantizedWeight(codes, Grid(scales), format)


def rows_snr(weight: Float[Tensor, "rows in"], rounded: QuantizedWeight) -> float:
    """Signal-to-noise ratio of the elements, in dB, as `numerics.error.weight_snr` has it."""
    power = error = 0.0
    pieces = weight.split(ROWS)
    for some, part in zip(pieces, split_rows(rounded, [len(piece) for piece in pieces]), strict=True):
        rows = some.float()
        power += float(rows.double().square().sum())
        error += float((rows - part.decode()).double().square().sum())
    return decibels(power, error)
