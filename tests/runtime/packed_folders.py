"""A tiny model of any architecture as two folders: its linears packed, and the same function as dense weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from halfbyte.layouts import LAYOUTS
from halfbyte.models.linearize import TransposedLinear
from halfbyte.models.load import WeightFiles, skeleton
from halfbyte.numerics.grid import fit
from halfbyte.numerics.quantized import QuantizedWeight, round_to_grid
from halfbyte.scheme import FloatScale, PerGroup, WeightFormat
from tiny_models import VARIANTS, tiny
from tiny_tokenizer import tiny_tokenizer

INT4 = WeightFormat(bits=4, granularity=PerGroup(size=8), scale=FloatScale(dtype="float32"))


def packed_folder(
    folder: Path,
    variant: str,
    format: WeightFormat = INT4,
    layout: str = "compressed-tensors",
    method: str | None = None,
) -> tuple[Path, Path]:
    """(packed, dense): both with the names that transformers gives files of this family, and a tokenizer."""
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
        weight = rounded(upright(tensors.pop(name), linear), format)
        decoded[name] = upright(weight.decode(), linear)
        stem = name.removesuffix("weight")
        tensors |= {stem + suffix: tensor for suffix, tensor in LAYOUTS[layout].write(weight).items()}
        formats[bones.disk_path(path)] = format
    save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})
    save_file(decoded, dense / "model.safetensors", metadata={"format": "pt"})
    routers = [bones.disk_path(name) for name, _ in bones.model.named_modules() if name.endswith("mlp.gate")]
    quantization = LAYOUTS[layout].config(formats, [*ignored, *routers])
    quantization["quant_method"] = method or quantization["quant_method"]
    edit_config(packed, quantization_config=quantization)
    return packed, dense


def upright(weight: Tensor, linear: nn.Linear) -> Tensor:
    """[out, in] of what is stored, and the reverse."""
    return weight.T.contiguous() if isinstance(linear, TransposedLinear) else weight


def rounded(weight: Tensor, format: WeightFormat) -> QuantizedWeight:
    return round_to_grid(weight, fit(weight, format), format)


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
