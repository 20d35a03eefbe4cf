"""Quantizing while a model is loaded, for recipes that need no data: nothing is written.

Linears are read, rounded and replaced one by one, so that memory holds the result and one layer in 32 bits. Which
linears, and to which formats, is `plan_modules`'s word, as for a run that writes a checkpoint.
"""

import torch
from torch import Tensor, nn

from halfbyte.errors import HalfbyteError, RecipeError
from halfbyte.models.load import Skeleton, WeightFiles, materialize
from halfbyte.numerics.activations import InputQuantizer
from halfbyte.numerics.certificate import TOKEN_INPUTS
from halfbyte.numerics.integer_scales import on_integer_grid
from halfbyte.numerics.quantized import QuantizedModule, QuantizedWeight, along_rows
from halfbyte.numerics.rows import round_rows
from halfbyte.plan import ModulePlan, plan_head, plan_modules, plan_tables
from halfbyte.recipe import Recipe
from halfbyte.runtime.replacement import from_module


@torch.no_grad()
def quantize_linears(
    bones: Skeleton, files: WeightFiles, recipe: Recipe, device: torch.device, dtype: torch.dtype
) -> list[str]:
    """Put what runs the recipe's formats in the place of the model's linears. Edits the skeleton; returns the paths.

    RecipeError for a recipe that needs data, or that does not fit the model.
    """
    if recipe.rotation is not None:
        raise RecipeError(
            f"recipe {recipe.name!r} rotates the whole model, which is not done while one is loaded: quantize once "
            f"(`halfbyte quantize {files.folder} -r {recipe.name} -o OUT`) and load the result"
        )
    if recipe.needs_data:
        raise RecipeError(
            f"recipe {recipe.name!r} needs calibration text, which there is none of while a model is loaded: quantize "
            f"once (`halfbyte quantize {files.folder} -r {recipe.name} --calibration TEXT -o OUT`) and load the result"
        )
    replaced = []
    for plan in plan_modules(bones, files, recipe):
        if plan.format is not None:
            _replace(bones, files, recipe, plan, device, dtype)
            replaced.append(plan.path)
            files.close()  # what was read no longer counts as this process's memory
    head = plan_head(bones, files, recipe)
    if head is not None:
        _replace_head(bones, files, head, device, dtype)
        replaced.append(head.path)
        files.close()
    return replaced


def _replace(
    bones: Skeleton, files: WeightFiles, recipe: Recipe, plan: ModulePlan, device: torch.device, dtype: torch.dtype
) -> None:
    assert plan.format is not None
    linear = bones.model.get_submodule(plan.path)
    assert isinstance(linear, nn.Linear)
    materialize(bones, files, [(plan.path, linear)], device, dtype=None)
    weight = linear.weight.float()
    try:
        rounded = on_integer_grid(
            lambda weight, format: recipe.rounding.quantize(weight, format, None),
            weight,
            plan.format,
            plan.activations or TOKEN_INPUTS,
        )
    except HalfbyteError as cause:
        raise type(cause)(f"{plan.path}: {cause}") from cause
    bias = None if linear.bias is None else linear.bias.data
    _put(bones, plan, along_rows(rounded), bias, dtype, _kept(linear.weight.data, plan))


def _replace_head(
    bones: Skeleton, files: WeightFiles, plan: ModulePlan, device: torch.device, dtype: torch.dtype
) -> None:
    assert plan.format is not None
    linear = bones.model.get_submodule(plan.path)
    weight = files.read(bones.shared_name(f"{plan.path}.weight", files)).to(device)
    bias = None if linear.bias is None else files.read(bones.stored_name(f"{plan.path}.bias", files)).to(device)
    _put(bones, plan, round_rows(weight, plan.format), bias, dtype)


def _put(
    bones: Skeleton, plan: ModulePlan, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype,
    kept: Tensor | None = None,
) -> None:  # fmt: skip
    """What runs this weight, in the place of the linear."""
    inputs = None if plan.activations is None else InputQuantizer(plan.activations)
    module = QuantizedModule(weight, inputs, kept)
    bones.model.set_submodule(plan.path, from_module(module, bias).prepare(dtype))


def _kept(weight: Tensor, plan: ModulePlan) -> Tensor | None:
    """All columns, where a dynamic outlier split multiplies them as the model has them."""
    split = None if plan.activations is None else plan.activations.outliers
    return weight if split is not None and split.weights == "kept" else None


@torch.no_grad()
def rounded_tables(bones: Skeleton, recipe: Recipe) -> dict[str, QuantizedWeight]:
    """The tables of embeddings that the recipe quantizes, by path, of a model that has its weights."""
    return {
        path: round_rows(bones.model.get_parameter(f"{path}.weight"), format)
        for path, format in plan_tables(bones, recipe).items()
    }
