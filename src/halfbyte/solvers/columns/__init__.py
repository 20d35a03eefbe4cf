"""Round a weight column by column; the columns still to come absorb each rounding error.

Frantar et al., 2022 (GPTQ) — https://arxiv.org/abs/2210.17323, §3.3 and Algorithm 1

    here        paper            what it is
    weight      W                [out, in] real
    spread      Cholesky(H⁻¹)ᵀ   [in, in] upper triangular; row j says where column j's error goes
    segment     B                how many columns are rounded before the later ones hear of it
    errors      E                [out, in] (w_j - q_j) / [H⁻¹]ᶜ_jj, so that W - Q = E · Cholesky(H⁻¹)ᵀ

Two levels, as in the paper: inside a segment one column after the other (`round_segment`, one fused kernel on CUDA),
between segments matrix products. The products go first to the segments of the same batch, and to all columns behind
it once per batch: with segments of 32 columns that saves most of the traffic of updating everything each time.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from halfbyte.errors import CalibrationError, RecipeError, WeightError
from halfbyte.numerics.precision import float32_products
from halfbyte.solvers.columns import reference
from halfbyte.solvers.columns.reference import Segment

__all__ = ["ColumnRounding", "Grid", "Segment", "round_columns", "round_segment"]

MAX_SEGMENT = 128  # the kernel keeps a segment's rows in registers; wider ones would spill
BATCH = 512  # columns that hear of each segment at once; the ones behind wait for the whole batch

Grid = Callable[
    [int, int, Float[Tensor, "out width"]],
    tuple[Float[Tensor, "out width"], Float[Tensor, "out width"] | None],
]


class ColumnRounding(NamedTuple):
    """A rounded weight: integers, the reals they stand for, and what it costs: ½ ΔW·H·ΔWᵀ, row by row."""

    codes: Integer[Tensor, "out in"]
    rounded: Float[Tensor, "out in"]
    loss: Float[Tensor, "out"]


def round_segment(
    weight: Float[Tensor, "out width"],
    spread: Float[Tensor, "width width"],
    scales: Float[Tensor, "out width"],
    zero_points: Float[Tensor, "out width"] | None,
    low: int,
    high: int,
) -> Segment:
    """Round up to 128 neighbouring columns, each error being spread over the segment's later columns.

    A code is the nearest in low..high to w / scale + zero_point, ties to even; int8, or uint8 where `high` exceeds 127.
    `scales` must be positive, and so must the diagonal of `spread`; only its upper triangle is read. All of them
    float32 or all float64, on one device. Nothing is changed in place.

    Raises WeightError for shapes, dtypes or devices that do not fit together, RecipeError for a code range that
    neither int8 nor uint8 holds.
    """
    _check_segment(weight, spread, scales, zero_points)
    reference.code_dtype(low, high)
    if weight.is_cuda and weight.dtype == torch.float32:
        # Only here: Triton is not installed where there is no CUDA, and this package must be importable there
        from halfbyte.solvers.columns import triton_kernel

        return triton_kernel.round_segment(weight, spread, scales, zero_points, low, high)
    return reference.round_segment(weight, spread, scales, zero_points, low, high)


def round_columns(
    weight: Float[Tensor, "out in"],
    spread: Float[Tensor, "in in"],
    grid: Grid,
    segment: int,
    low: int,
    high: int,
    *,
    tf32: bool = False,
) -> ColumnRounding:
    """Round a whole weight from left to right (Algorithm 1).

    `grid(start, stop, current)` gives the scales and zero points of columns start:stop; it must not change `current`,
    which holds these columns with every earlier error absorbed, so that a group's range can be read from what will
    be rounded. It is asked once per segment: let a segment be no longer than a group. `tf32` allows the products
    between segments on CUDA to round their operands to TF32; they are true float32 otherwise, whatever the global
    setting. Codes may then differ from another device's only where the sums of these products fall beside a tie.

    Raises RecipeError for a segment outside 1..128 or an impossible code range, WeightError for NaN or Inf in the
    weight and for scales that are not positive, CalibrationError for a `spread` that is no Cholesky factor.
    """
    if not 1 <= segment <= MAX_SEGMENT:
        raise RecipeError(f"a segment of {segment} columns cannot be solved at once: choose 1 to {MAX_SEGMENT}")
    _check_whole(weight, spread)
    outs, ins = weight.shape
    remaining = weight.clone(memory_format=torch.contiguous_format)
    batch = max(1, BATCH // segment) * segment
    rounded, errors = torch.empty_like(remaining), remaining.new_empty(outs, min(ins, batch))
    codes = torch.empty_like(remaining, dtype=reference.code_dtype(low, high))
    loss = remaining.new_zeros(outs)
    positive = torch.ones((), dtype=torch.bool, device=weight.device)  # read once at the end: reading it waits for CUDA

    for batch_start in range(0, ins, batch):
        batch_stop = min(batch_start + batch, ins)
        for start in range(batch_start, batch_stop, segment):
            stop = min(start + segment, batch_stop)
            scales, zero_points = grid(start, stop, remaining[:, start:stop])
            positive &= (scales > 0).all()
            solved = round_segment(
                remaining[:, start:stop], spread[start:stop, start:stop], scales, zero_points, low, high
            )
            codes[:, start:stop], rounded[:, start:stop] = solved.codes, solved.rounded
            errors[:, start - batch_start : stop - batch_start] = solved.errors
            loss += solved.errors.square().sum(1) / 2
            _absorb(remaining[:, stop:batch_stop], solved.errors, spread[start:stop, stop:batch_stop], tf32)
        _absorb(
            remaining[:, batch_stop:],
            errors[:, : batch_stop - batch_start],
            spread[batch_start:batch_stop, batch_stop:],
            tf32,
        )
    if not positive:
        raise WeightError(
            "the grid gave a scale that is zero, negative or NaN: give an all-zero group any positive one"
        )
    return ColumnRounding(codes, rounded, loss)


def _absorb(
    later: Float[Tensor, "out later"],
    errors: Float[Tensor, "out width"],
    spread: Float[Tensor, "width later"],
    tf32: bool,
) -> None:
    """later -= errors · spread, in place."""
    with float32_products(tf32=tf32):
        later.addmm_(errors, spread, alpha=-1)


def _check_segment(weight: Tensor, spread: Tensor, scales: Tensor, zero_points: Tensor | None) -> None:
    outs, width = weight.shape
    if not 1 <= width <= MAX_SEGMENT:
        raise WeightError(f"a segment of {width} columns cannot be solved at once: cut it into 1 to {MAX_SEGMENT}")
    if spread.shape != (width, width):
        raise WeightError(f"a segment of {width} columns needs a spread of [{width}, {width}], not {[*spread.shape]}")
    for name, grid in (("scales", scales), ("zero_points", zero_points)):
        if grid is not None and grid.shape != weight.shape:
            raise WeightError(f"{name} {[*grid.shape]} must be expanded to the segment's [{outs}, {width}]")
    for name, other in (("spread", spread), ("scales", scales), ("zero_points", zero_points)):
        _check_kind(weight, name, other)


def _check_whole(weight: Tensor, spread: Tensor) -> None:
    outs, ins = weight.shape
    if spread.shape != (ins, ins):
        raise WeightError(f"a weight of [{outs}, {ins}] needs a spread of [{ins}, {ins}], not {[*spread.shape]}")
    _check_kind(weight, "spread", spread)
    if not torch.isfinite(weight).all():
        raise WeightError("the weight has NaN or Inf, which no grid holds: mend the checkpoint or leave this layer out")
    smallest = spread.diagonal().min().item() if ins else 1.0
    if not smallest > 0:
        raise CalibrationError(
            f"the spread's diagonal reaches {smallest:g} and must be positive: factor a Hessian with more damping"
        )


def _check_kind(weight: Tensor, name: str, other: Tensor | None) -> None:
    if weight.dtype not in (torch.float32, torch.float64):
        raise WeightError(f"columns are solved in float32 or float64, not {weight.dtype}: convert the weight first")
    if other is not None and (other.dtype != weight.dtype or other.device != weight.device):
        raise WeightError(
            f"{name} is {other.dtype} on {other.device}, the weight {weight.dtype} on {weight.device}: make them alike"
        )
