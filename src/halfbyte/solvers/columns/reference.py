"""The column solver in plain torch: any device, float32 or float64, plainly right.

Frantar et al., 2022 (GPTQ) — https://arxiv.org/abs/2210.17323, §3.3 and Algorithm 1

    here        paper            what it is
    weight      W                [out, width] the segment's columns, as updated by everything before them
    spread      Cholesky(H⁻¹)ᵀ   [width, width] upper triangular; row j says where column j's error goes
    rounded     Q                [out, width] the values on the grid
    errors      E                [out, width] (w_j - q_j) / [H⁻¹]ᶜ_jj, what the later segments still have to absorb
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from halfbyte.errors import RecipeError


class Segment(NamedTuple):
    """What rounding a segment gives: integers, the reals they stand for, and the scaled errors."""

    codes: Integer[Tensor, "out width"]
    rounded: Float[Tensor, "out width"]
    errors: Float[Tensor, "out width"]


def code_dtype(low: int, high: int) -> torch.dtype:
    """The integers that codes low..high are kept in: int8 where they fit, else uint8. RecipeError if neither holds."""
    if -128 <= low <= high <= 127:
        return torch.int8
    if 0 <= low <= high <= 255:
        return torch.uint8
    raise RecipeError(f"codes {low}..{high} fit neither int8 nor uint8: choose a range within -128..127 or 0..255")


def round_segment(
    weight: Float[Tensor, "out width"],
    spread: Float[Tensor, "width width"],
    scales: Float[Tensor, "out width"],
    zero_points: Float[Tensor, "out width"] | None,
    low: int,
    high: int,
) -> Segment:
    """Round one column after the other; the columns still to come absorb each error (Algorithm 1, inner loop).

    Codes are the nearest in low..high, ties to even. Only the upper triangle of `spread` is read, and no argument
    is changed. The Triton kernel does these very operations in this very order: keep the two in step.
    """
    remaining = weight.t().clone(memory_format=torch.contiguous_format)  # [width, out]: a column lies in one piece
    codes = torch.empty_like(remaining, dtype=code_dtype(low, high))
    rounded, errors = torch.empty_like(remaining), torch.empty_like(remaining)
    for column, current in enumerate(remaining):
        scale = scales[:, column]
        zero = 0.0 if zero_points is None else zero_points[:, column]
        code = torch.round(current / scale + zero).clamp(low, high)
        codes[column] = code
        rounded[column] = (code - zero) * scale
        errors[column] = (current - rounded[column]) / spread[column, column]
        # a product and a difference, not addcmul: one rounding less would part the codes from the kernel's
        remaining[column + 1 :] -= spread[column, column + 1 :, None] * errors[column]
    return Segment(codes.t(), rounded.t(), errors.t())
