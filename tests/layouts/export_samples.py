"""Quantized weights and small checkpoints for the tests of this room."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from halfbyte.layouts import LAYOUTS
from halfbyte.numerics.grid import Grid, scales_shape
from halfbyte.numerics.quantized import QuantizedWeight
from halfbyte.scheme import Convention, FloatScale, PerGroup, WeightFormat
from tiny_models import tiny

SIZES = {"hidden_size": 64, "intermediate_size": 128, "attention_bias": True}
INT4 = WeightFormat(bits=4, granularity=PerGroup(size=32), scale=FloatScale(dtype="float32"))
INT8 = INT4.model_copy(update={"bits": 8})
ASYMMETRIC = INT4.model_copy(update={"convention": Convention.ASYMMETRIC})


def sample(format: WeightFormat, out: int, columns: int, seed: int = 0) -> QuantizedWeight:
    """Every code and every zero point from 1 on, scales of uneven size that any scale dtype can hold."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(format.lowest, format.highest + 1, (out, columns), generator=generator)
    shape = scales_shape(out, columns, format.granularity)
    scales = torch.randint(1, 256, shape, generator=generator) * 2.0 ** torch.randint(
        -14, -6, shape, generator=generator
    )
    points = None
    if not format.symmetric:
        points = torch.randint(1, format.highest + 1, shape, generator=generator).float()
    return QuantizedWeight(codes.to(torch.int8 if format.symmetric else torch.uint8), Grid(scales, points), format)


def same(one: QuantizedWeight, other: QuantizedWeight) -> bool:
    """Equal to the bit, types included."""
    first, second = one.grid.zero_points, other.grid.zero_points
    return (
        one.format == other.format
        and one.codes.dtype == other.codes.dtype
        and torch.equal(one.codes, other.codes)
        and one.grid.scales.dtype == other.grid.scales.dtype
        and torch.equal(one.grid.scales, other.grid.scales)
        and (second is None if first is None else second is not None and torch.equal(first, second))
    )


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of the blocks."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {name: module for name, module in found.items() if ".layers." in name}


def checkpoint(
    folder: Path,
    formats: Mapping[str, WeightFormat] | WeightFormat,
    layout: str = "compressed-tensors",
    shards: int = 1,
    **sizes: Any,
) -> nn.Module:
    """A folder with a two-block Llama, quantized where told, and other files. Returns the dense model it stands for."""
    model = tiny("llama", **{**SIZES, **sizes})
    layers = linears(model)
    chosen = dict.fromkeys(layers, formats) if isinstance(formats, WeightFormat) else dict(formats)
    tensors: dict[str, Tensor] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for seed, (path, format) in enumerate(chosen.items()):
        weight = layers[path].weight
        quantized = sample(format, *weight.shape, seed=seed)
        weight.copy_(quantized.decode())
        del tensors[f"{path}.weight"]
        tensors |= {f"{path}.{suffix}": tensor for suffix, tensor in LAYOUTS[layout].write(quantized).items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_shards(folder, tensors, shards)
    ignored = [path for path in layers if path not in chosen] + ["lm_head"]
    config = model.config.to_dict() | {"architectures": ["LlamaForCausalLM"], "dtype": "float32"}
    if chosen:
        config["quantization_config"] = LAYOUTS[layout].config(chosen, ignored)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text('{"not": "touched"}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "figures").mkdir(exist_ok=True)
    (folder / "figures" / "loss.svg").write_text("<svg/>")
    return model


def save_shards(folder: Path, tensors: Mapping[str, Tensor], shards: int) -> None:
    """One file, or several with an index; consecutive tensors go to different files, so that modules straddle them."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if shards == 1:
        save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
        return
    index = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: contiguous[name] for name in sorted(contiguous)[number::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
