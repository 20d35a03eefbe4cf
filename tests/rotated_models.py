"""Tiny float64 models before and after a rotation, in memory, as a run rotates them on disk."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.calibration.online import rotate_inputs
from halfbyte.methods.quarot import QuaRot
from halfbyte.models.linearize import linearize
from halfbyte.models.load import Skeleton
from halfbyte.models.tables import ARCHITECTURES
from tiny_models import VARIANTS, logits, tiny, tokens


def bones(variant: str, **more: Any) -> Skeleton:
    """A linearized float64 model of this variant as a skeleton that has its weights."""
    model_type, overrides = VARIANTS[variant]
    model = tiny(model_type, torch.float64, **{**overrides, **more})
    table = ARCHITECTURES[model_type]
    for block in model.get_submodule(table.blocks).children():
        linearize(block)
    return Skeleton(Path(), model, model.config, table, table.blocks)


def rotate(skeleton: Skeleton, step: QuaRot) -> None:
    """What a run does with the step, online parts included. Edits in place."""
    step.check(skeleton)
    outside = step.rotate_outside(skeleton, lambda path: skeleton.model.get_parameter(path).data)
    for path, value in outside.items():
        module, _, key = path.rpartition(".")
        skeleton.model.get_submodule(module)._parameters[key] = nn.Parameter(value, requires_grad=False)
    for block in skeleton.blocks:
        step.rotate_block(skeleton, block)
    rotate_inputs(skeleton.model, step.online_inputs(skeleton))


def before_and_after(variant: str, step: QuaRot, **more: Any) -> tuple[Tensor, Tensor, Skeleton]:
    """The logits of the model, those of the rotated one, and that one."""
    skeleton, ids = bones(variant, **more), tokens(seed=3)
    before = logits(skeleton.model, ids)
    rotate(skeleton, step)
    return before, logits(skeleton.model, ids), skeleton
