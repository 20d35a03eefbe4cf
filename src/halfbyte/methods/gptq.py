"""GPTQ: round a weight one column at a time; the columns still to come absorb each rounding error.

Frantar et al., 2022 — https://arxiv.org/abs/2210.17323

    here        paper            what it is
    weight      W                [out, in] real
    gram        XXᵀ = H/2        [in, in] sum over the layer's calibration inputs (the factor 2 cancels everywhere)
    spread      Cholesky(H⁻¹)ᵀ   [in, in] upper triangular; row j says where column j's error goes (section 3.3, step 3)
    damping     λ / mean diag H  ridge, as a fraction of the mean diagonal

Three choices go beyond the paper's text. `order: activation` rounds the columns with the largest inputs first, while
the groups stay where they are in the matrix ("static" act-order), so that no kernel pays for it. `ranges` may search
each group's grid. `drift` corrects the target for what the blocks before have already lost: the float model's inputs F
are not the inputs X that this layer will have, and the best weight for X is W* = W + W·(F-X)ᵀX·(XᵀX)⁻¹; GPTQ on W*
minimises ‖F·Wᵀ - X·Qᵀ‖² (the aim of GPTAQ, arXiv 2504.02692, in closed form). `drift` is the fraction of the
correction that is applied.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from halfbyte.calibration.statistics import InputStatistics
from halfbyte.errors import CalibrationError
from halfbyte.numerics.grid import Grid, expand
from halfbyte.numerics.quantized import QuantizedWeight
from halfbyte.numerics.ranges import Ranges, find_grid
from halfbyte.scheme import PerChannel, PerGroup, Value, WeightFormat
from halfbyte.solvers.columns import round_columns

SEGMENT = 128  # columns that are rounded before their errors reach the rest of the matrix in one product


def damped(gram: Float[Tensor, "in in"], damping: float) -> Float[Tensor, "in in"]:
    """The Gram matrix with its ridge; inputs that were never alive get a one on the diagonal."""
    diagonal = gram.diagonal()
    ridge = damping * diagonal.mean()
    result = gram.clone()
    result.diagonal().copy_(torch.where(diagonal > 0, diagonal + ridge, torch.ones_like(diagonal)))
    return result


def error_spread(hessian: Float[Tensor, "in in"]) -> Float[Tensor, "in in"]:
    """The upper Cholesky factor U of H⁻¹ = UᵀU, from one factorisation: U is the flipped inverse of flipped H's factor.

    CalibrationError where H is not positive definite.
    """
    factor, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
    if failed:
        raise CalibrationError(
            f"the Hessian of this layer ({len(hessian)} inputs) is not positive definite: use more calibration tokens "
            "than the layer has inputs, or raise the method's `damping` (0.01 is usual, 0.1 is strong)"
        )
    identity = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    return torch.linalg.solve_triangular(factor, identity, upper=False).flip(0, 1)


def correction(
    weight: Float[Tensor, "out in"], drift: Float[Tensor, "in in"], spread: Float[Tensor, "in in"]
) -> Float[Tensor, "out in"]:
    """W·D·H⁻¹ with H⁻¹ = UᵀU: what to add to W so that it does on the drifted inputs what it did on the float ones."""
    return (weight @ drift @ spread.T) @ spread


def round_on_grid(
    weight: Float[Tensor, "out in"],
    grid: Grid,
    format: WeightFormat,
    spread: Float[Tensor, "in in"],
    order: Int[Tensor, "in"],
) -> QuantizedWeight:
    """Columns in `order`, on a grid that stays. `spread` is in that order."""
    scales = expand(grid.scales, *weight.shape)[:, order]
    zeros = None if grid.zero_points is None else expand(grid.zero_points, *weight.shape)[:, order]

    def slices(start: int, stop: int, _current: Tensor) -> tuple[Tensor, Tensor | None]:
        return scales[:, start:stop], None if zeros is None else zeros[:, start:stop]

    codes, _, _ = round_columns(weight[:, order], spread, slices, SEGMENT, format.lowest, format.highest)
    return QuantizedWeight(codes[:, torch.argsort(order)].contiguous(), grid, format)


class GPTQ(Value):
    """Column by column with error feedback."""

    method: Literal["gptq"] = "gptq"
    damping: float = Field(default=0.01, gt=0)
    order: Literal["activation", "given"] = "activation"
    ranges: Ranges = "minmax"
    drift: float = Field(default=0.0, ge=0, le=1)

    @property
    def needs_data(self) -> bool:
        return True

    @property
    def needs_drift(self) -> bool:
        return self.drift > 0

    def quantize(
        self, weight: Float[Tensor, "out in"], format: WeightFormat, seen: InputStatistics | None
    ) -> QuantizedWeight:
        """Codes that lose little of the layer's output. `weight` is left as it was.

        CalibrationError where the layer has seen no tokens, or too few for its Hessian.
        """
        if seen is None or not seen.tokens:
            raise CalibrationError("GPTQ needs calibration tokens, and none reached this layer: use more or other text")
        hessian = damped(seen.gram.to(weight.dtype), self.damping)
        spread, order = self._spread(hessian)
        target = self._target(weight, seen, spread, order)
        match format.granularity:
            case PerGroup(size=size) if self.order == "given" and size <= SEGMENT:
                return self._with_fresh_grids(target, format, size, hessian, spread)
            case _:
                return self._with_fixed_grids(target, format, hessian, spread, order)

    def _spread(self, hessian: Float[Tensor, "in in"]) -> tuple[Float[Tensor, "in in"], Int[Tensor, "in"]]:
        order = torch.arange(len(hessian), device=hessian.device)
        if self.order == "activation":
            order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
        return error_spread(hessian[order][:, order]), order

    def _target(
        self,
        weight: Float[Tensor, "out in"],
        seen: InputStatistics,
        spread: Float[Tensor, "in in"],
        order: Int[Tensor, "in"],
    ) -> Float[Tensor, "out in"]:
        """What is to be rounded: without the columns whose inputs were never alive, and corrected for drift."""
        target = weight * (seen.gram.diagonal() > 0)
        if self.drift and seen.drift is not None:
            drift = seen.drift.to(weight.dtype)[order][:, order]
            target[:, order] += self.drift * correction(target[:, order], drift, spread)
        return target

    def _with_fixed_grids(
        self,
        weight: Float[Tensor, "out in"],
        format: WeightFormat,
        hessian: Float[Tensor, "in in"],
        spread: Float[Tensor, "in in"],
        order: Int[Tensor, "in"],
    ) -> QuantizedWeight:
        """Columns in `order`, every grid found beforehand."""
        return round_on_grid(weight, find_grid(weight, format, self.ranges, hessian), format, spread, order)

    def on_grids(
        self, weights: Sequence[tuple[Float[Tensor, "out in"], Grid, WeightFormat]], seen: InputStatistics
    ) -> list[QuantizedWeight]:
        """Weights that share their inputs, each on a grid that is given. `ranges` has no say; columns go in `order`.

        CalibrationError as `quantize` raises it.
        """
        dtype = weights[0][0].dtype
        spread, order = self._spread(damped(seen.gram.to(dtype), self.damping))
        results = []
        for weight, grid, format in weights:
            target = self._target(weight, seen, spread, order)
            results.append(round_on_grid(target, grid, format, spread, order))
        return results

    def _with_fresh_grids(
        self,
        weight: Float[Tensor, "out in"],
        format: WeightFormat,
        size: int,
        hessian: Float[Tensor, "in in"],
        spread: Float[Tensor, "in in"],
    ) -> QuantizedWeight:
        """Columns left to right; each group's grid is found when its turn comes, from what its weights are by then."""
        alone = format.model_copy(update={"granularity": PerChannel()})
        grids: list[Grid] = []

        def fresh(start: int, stop: int, current: Tensor) -> tuple[Tensor, Tensor | None]:
            grid = find_grid(current, alone, self.ranges, hessian[start:stop, start:stop])
            grids.append(grid)
            zeros = None if grid.zero_points is None else grid.zero_points.expand_as(current)
            return grid.scales.expand_as(current), zeros

        codes, _, _ = round_columns(weight, spread, fresh, size, format.lowest, format.highest)
        zeros = [grid.zero_points for grid in grids if grid.zero_points is not None]
        grid = Grid(torch.cat([grid.scales for grid in grids], dim=1), torch.cat(zeros, dim=1) if zeros else None)
        return QuantizedWeight(codes, grid, format)
