"""A tiny model of any architecture as two folders: its linears packed, and the same function as dense weights."""

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from halfbyte.calibration.walk import linears, quantizing_inputs
from halfbyte.layouts import LAYOUTS
from halfbyte.layouts.inputs import write_inputs
from halfbyte.models.linearize import TransposedLinear, linearize
from halfbyte.models.load import WeightFiles, skeleton
from halfbyte.numerics.activations import InputQuantizer, calibrated
from halfbyte.numerics.grid import fit
from halfbyte.numerics.quantized import QuantizedModule, QuantizedWeight, round_to_grid
from halfbyte.scheme import ActivationFormat, FloatScale, PerChannel, PerGroup, WeightFormat
from tiny_models import VARIANTS, tiny
from tiny_tokenizer import tiny_tokenizer

INT4 = WeightFormat(bits=4, granularity=PerGroup(size=8), scale=FloatScale(dtype="float32"))
INT8 = WeightFormat(bits=8, granularity=PerChannel(), scale=FloatScale(dtype="float32"), stored="bytes")


def packed_folder(
    folder: Path,
    variant: str,
    format: WeightFormat = INT4,
    layout: str = "compressed-tensors",
    method: str | None = None,
    activations: ActivationFormat | None = None,
) -> tuple[Path, Path]:
    """(packed, dense): both with the names that transformers gives files of this family, and a tokenizer.

    With `activations` every packed linear also quantizes its input, by `quantizer_of`, which the dense folder cannot say.
    """
    model_type, overrides = VARIANTS[variant]
    dense, packed = folder / "dense", folder / "packed"
    tiny(model_type, **overrides).save_pretrained(dense)
    tiny_tokenizer().save_pretrained(dense)
    packed.mkdir()
    for path in dense.glob("*.json"):
        (packed / path.name).write_bytes(path.read_bytes())
    bones, files = skeleton(dense), WeightFiles(dense)
    tensors = load_file(dense / "model.safetensors")
    decoded, formats, ignored = dict(tensors), {}, []
    for path, linear in bones.model.named_modules():
        if not isinstance(linear, nn.Linear):
            continue
        if not path.startswith(bones.blocks_name):
            ignored.append(path)
            continue
        name = bones.stored_name(f"{path}.weight", files)
        module = quantized(upright(tensors.pop(name), linear), format, activations)
        decoded[name] = upright(module.decode(), linear)
        stem = name.removesuffix("weight")
        parts = LAYOUTS[layout].write(module.weight) | write_inputs(module)
        tensors |= {stem + suffix: tensor for suffix, tensor in parts.items()}
        formats[bones.disk_path(path)] = format
    save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})
    save_file(decoded, dense / "model.safetensors", metadata={"format": "pt"})
    routers = [bones.disk_path(name) for name, _ in bones.model.named_modules() if name.endswith("mlp.gate")]
    inputs = {} if activations is None else dict.fromkeys(formats, activations)
    quantization = LAYOUTS[layout].config(formats, [*ignored, *routers], inputs)
    quantization["quant_method"] = method or quantization["quant_method"]
    edit_config(packed, quantization_config=quantization)
    return packed, dense


def upright(weight: Tensor, linear: nn.Linear) -> Tensor:
    """[out, in] of what is stored, and the reverse."""
    return weight.T.contiguous() if isinstance(linear, TransposedLinear) else weight


def rounded(weight: Tensor, format: WeightFormat) -> QuantizedWeight:
    return round_to_grid(weight, fit(weight, format), format)


def quantizer_of(format: ActivationFormat, columns: int) -> InputQuantizer:
    """What a calibration would have found on inputs whose ranges grow from column to column."""
    return calibrated(format, -torch.linspace(1, 3, columns), torch.linspace(1, 4, columns))


def quantized(weight: Tensor, format: WeightFormat, activations: ActivationFormat | None = None) -> QuantizedModule:
    if activations is None:
        return QuantizedModule(rounded(weight, format))
    inputs, kept = quantizer_of(activations, weight.shape[1]), None
    if activations.outliers is not None and activations.outliers.weights == "kept":
        kept = weight if inputs.outlier_columns is None else weight[:, inputs.outlier_columns.long()]
    return QuantizedModule(rounded(weight, format), inputs, kept)


def simulated_logits(model: nn.Module, activations: ActivationFormat, ids: Tensor) -> Tensor:
    """What a dense model answers whose linears see quantized inputs, computed on reals. Edits the model's blocks."""
    blocks = max((module for module in model.modules() if isinstance(module, nn.ModuleList)), key=len)
    with ExitStack() as stack:
        for block in blocks:
            linearize(block)
            inputs = {name: quantizer_of(activations, linear.in_features) for name, linear in linears(block).items()}
            stack.enter_context(quantizing_inputs(block, inputs))
        return logits(model, ids)


def quantization_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """`change` edits the dictionary of tensors in place."""
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def one_of(tensors: dict[str, Tensor], ending: str) -> str:
    return next(name for name in sorted(tensors) if name.endswith(ending))


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids).logits
