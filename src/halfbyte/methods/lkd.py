"""LKD: layer-by-layer knowledge distillation. Each quantized block learns to answer as the float block does.

Yao et al., 2022, ZeroQuant — https://arxiv.org/abs/2206.01861, section 4.2

    here                paper   what it is
    original            L_k     the float block, the teacher
    rounded.block       L̂_k     the quantized block, the student
    float_stream        L_{k-1}…L_1(X)   what the float model feeds the block: both read it (`inputs: teacher`)
    loss                ‖L_k(·) - L̂_k(·)‖²   mean squared difference of the two outputs

One block learns at a time, so that memory holds two blocks and one block's optimiser. Rounding has no slope; its
gradient passes straight through, for weights and for activations.

The paper updates the weights themselves, at most 100 steps of AdamW, lr 5e-6, no labels and no original data. Here the
grid stays as the rounding method left it and each weight starts inside the cell of its code, as near to the unrounded
weight as that cell allows: after `rtn` that is the weight itself, after `gptq` the codes are GPTQ's until a gradient
moves one. Three things go beyond the paper and can be switched on: `inputs: student` reads the quantized model's own
hidden states, so that a block also corrects what the blocks before it lost; `learn: scales` keeps every code and learns
the scales; `norms` also learns the block's norms and biases. A weight's learning rate is counted in steps of its grid
(`unit: step`) or as it is (`unit: weight`, the paper's).
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from halfbyte.calibration.reconstruct import Learned, Reconstruction, Schedule, Targets
from halfbyte.errors import CalibrationError
from halfbyte.methods.contract import RoundedBlock
from halfbyte.numerics.grid import encode, expand, round_scales
from halfbyte.numerics.quantized import QuantizedWeight
from halfbyte.numerics.slopes import straight_through
from halfbyte.scheme import Value

INSIDE = 0.499  # of a step: as far from its code as a weight may start


class LKD(Value):
    """Distillation of one block at a time."""

    method: Literal["lkd"] = "lkd"
    steps: int = Field(default=100, ge=1)
    tokens_per_step: int = Field(default=4096, ge=1)
    """That one step sees: the calibration text passes in batches of so many, in whole samples."""
    learning_rate: float = Field(default=0.02, gt=0)
    unit: Literal["step", "weight"] = "step"
    inputs: Literal["teacher", "student"] = "student"
    learn: Literal["weights", "scales", "both"] = "both"
    norms: bool = True
    gentle_learning_rate: float = Field(default=1e-3, gt=0)
    """Of scales (relative), norms and biases (absolute)."""
    decay: bool = True
    """The learning rate falls linearly to zero; the paper's is constant."""
    clip: float = Field(default=1.0, gt=0)
    """Largest norm of a gradient."""

    def refine(self, rounded: RoundedBlock, quantized: Mapping[str, QuantizedWeight]) -> Mapping[str, QuantizedWeight]:
        """The distilled weights, on grids of the same formats. Edits norms and biases of `rounded.block` in place.

        CalibrationError where the loss is not finite.
        """
        students = {name: self._student(weight, rounded.weights[name]) for name, weight in quantized.items()}
        rest = {
            name: parameter.detach().float().clone().requires_grad_(self.norms)
            for name, parameter in rounded.block.named_parameters()
            if name.removesuffix(".weight") not in quantized
        }

        def parameters() -> dict[str, Tensor]:
            return rest | {f"{name}.weight": student.rounded() for name, student in students.items()}

        lesson = Reconstruction(
            block=rounded.block,
            index=rounded.index,
            parameters=parameters,
            inputs=rounded.inputs,
            source=rounded.float_stream if self.inputs == "teacher" else rounded.stream,
            targets=Targets(rounded.original, (), rounded.float_stream, rounded.index, keep=False),
        )
        schedule = Schedule(steps=self.steps, decay=self.decay, clip=self.clip)
        before, after = lesson.learn(self._groups(students, rest), schedule)
        if not torch.isfinite(torch.tensor([before, after])).all():
            raise CalibrationError(
                f"the distillation loss of block {rounded.index} is {before:g}, then {after:g}: lower `learning_rate` "
                f"({self.learning_rate:g}), or calibrate in bfloat16 or float32"
            )
        for name, parameter in rounded.block.named_parameters():
            if name in rest:
                parameter.data.copy_(rest[name].detach())
        return {name: student.weight(quantized[name]) for name, student in students.items()}

    def _groups(self, students: Mapping[str, "Student"], rest: Mapping[str, Tensor]) -> tuple[Learned, Learned]:
        values = [s.values for s in students.values() if s.values is not None]
        gentle = [s.factors for s in students.values() if s.factors is not None]
        gentle += [tensor for tensor in rest.values() if tensor.requires_grad]
        return Learned(values, self.learning_rate), Learned(gentle, self.gentle_learning_rate)

    def _student(self, weight: QuantizedWeight, original: Float[Tensor, "out in"]) -> "Student":
        values = scales = None
        if self.learn in ("weights", "both"):
            steps = expand(weight.grid.scales, *original.shape)
            near = weight.decode() + ((original - weight.decode()) / steps).clamp(-INSIDE, INSIDE) * steps
            values = near if self.unit == "weight" else near / steps
            values = values.detach().float().requires_grad_()
        if self.learn in ("scales", "both"):
            scales = torch.zeros_like(weight.grid.scales).requires_grad_()
        return Student(weight, values, scales, in_steps=self.unit == "step")


class Student:
    """One weight that learns: values inside their cells, or factors of its scales, or both."""

    def __init__(
        self,
        start: QuantizedWeight,
        values: Float[Tensor, "out in"] | None,
        factors: Float[Tensor, "rows groups"] | None,
        *,
        in_steps: bool,
    ) -> None:
        """`factors` are logarithms: zero leaves a scale as it is. `in_steps`: values count steps of the grid."""
        self.start, self.values, self.factors, self.in_steps = start, values, factors, in_steps

    def rounded(self) -> Float[Tensor, "out in"]:
        """The weight on its grid; gradients pass through the rounding where the value is inside the code's range."""
        grid, format = self.start.grid, self.start.format
        scales = grid.scales
        if self.factors is not None:
            exact = scales * self.factors.exp()
            scales = straight_through(round_scales(exact, format.scale, grid.amplifiers), exact)
        steps = expand(scales, *self.start.codes.shape)
        zeros = 0 if grid.zero_points is None else expand(grid.zero_points, *self.start.codes.shape)
        if self.values is None:
            return (self.start.codes - zeros) * steps
        position = self.values if self.in_steps else self.values / steps.detach()
        inside = (position + zeros).clamp(format.lowest, format.highest) - zeros
        return straight_through((position + zeros).round().clamp(format.lowest, format.highest) - zeros, inside) * steps

    @torch.no_grad()
    def weight(self, start: QuantizedWeight) -> QuantizedWeight:
        """What was learned, as it is stored."""
        grid, format = start.grid, start.format
        if self.factors is not None:
            scales = round_scales(grid.scales * self.factors.exp(), format.scale, grid.amplifiers)
            grid = replace(grid, scales=scales)
        if self.values is None:
            return QuantizedWeight(start.codes, grid, format)
        steps = expand(start.grid.scales, *start.codes.shape)
        reals = self.values * steps if self.in_steps else self.values
        return QuantizedWeight(encode(reals, start.grid, format), grid, format)
