"""Our checkpoints: a quantized block as tensors and back, and the files that surround them.

Names are those of the source checkpoint, so that every client finds what it looks for.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte import __version__
from halfbyte.calibration.data import Calibration
from halfbyte.evaluation.card import card, own_card
from halfbyte.evaluation.report import Report, completed, html
from halfbyte.layouts.cache import cache_entry, write_smoothing
from halfbyte.layouts.compressed_tensors import OWN
from halfbyte.layouts.embeddings import embedding_entry
from halfbyte.layouts.folder import OutputFolder, sha256
from halfbyte.layouts.inputs import SUFFIXES as INPUT_SUFFIXES
from halfbyte.layouts.inputs import read_inputs, write_inputs
from halfbyte.layouts.rotations import rotation_entry
from halfbyte.models.heads import attentions
from halfbyte.models.linearize import TransposedLinear
from halfbyte.models.load import Skeleton, WeightFiles
from halfbyte.numerics.activations import InputQuantizer
from halfbyte.numerics.cache import Smoothing
from halfbyte.numerics.quantized import QuantizedModule, stored_format
from halfbyte.plan import Plan, ignored_paths
from halfbyte.recipe import Recipe
from halfbyte.record import ModuleRecord
from halfbyte.scheme import ActivationFormat, WeightFormat

LAYOUT = OWN
SIDECAR = "halfbyte.json"
CARRIED = ("*.json", "*.txt", "*.model", "*.jinja", "*.py")  # tokenizer, generation config, chat template, remote code
REPLACED = {"config.json", "model.safetensors.index.json", "quantize_config.json", SIDECAR}


def fingerprint(
    files: WeightFiles,
    recipe: Recipe,
    calibration: Calibration | None,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
) -> dict[str, Any]:
    """Everything that decides the result, cheap enough to compare before a run goes on: of the source its headers."""
    return {
        "source": files.headers(),
        "recipe": recipe.model_dump(mode="json"),
        "calibration": None if calibration is None else {"text": calibration.description, "sha256": calibration.sha256},
        "seed": seed,
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "versions": {"halfbyte": __version__}
        | {name: version(name) for name in ("torch", "transformers", "safetensors")},
    }


def hash_source(files: WeightFiles, pool: Executor) -> dict[str, Future[str]]:
    """Start hashing the source's files in full, beside the run."""
    paths = sorted({*files.files.values(), files.folder / "config.json"})
    return {path.name: pool.submit(sha256, path) for path in paths}


def block_tensors(
    skeleton: Skeleton, files: WeightFiles, index: int, block: nn.Module, quantized: Mapping[str, QuantizedModule]
) -> dict[str, Tensor]:
    """The tensors of a quantized block under their names in the checkpoint; unquantized ones in their stored dtype."""
    tensors = {}
    for path, module, key, parameter in parameters_of(skeleton, index, block):
        stored = skeleton.stored_name(f"{path}.{key}", files)
        name = path.removeprefix(f"{skeleton.blocks_name}.{index}.")
        if key == "weight" and name in quantized:
            packed = LAYOUT.write(quantized[name].weight) | write_inputs(quantized[name])
            tensors |= {f"{stored.removesuffix('weight')}{suffix}": tensor for suffix, tensor in packed.items()}
        else:
            value = parameter.T if isinstance(module, TransposedLinear) and key == "weight" else parameter
            tensors[stored] = value.to("cpu", files.dtype(stored)).contiguous()
    return tensors


def cache_tensors(skeleton: Skeleton, index: int, block: nn.Module, smoothing: Smoothing | None) -> dict[str, Tensor]:
    """What the block's cache does to keys and values, under the names of its attention in the checkpoint."""
    if smoothing is None:
        return {}
    (attention,) = attentions(block)
    base = skeleton.disk_path(f"{skeleton.blocks_name}.{index}.{attention}")
    return {f"{base}.{suffix}": tensor for suffix, tensor in write_smoothing(smoothing).items()}


def restore_block(
    skeleton: Skeleton,
    path: Path,
    index: int,
    block: nn.Module,
    formats: Mapping[str, WeightFormat],
    activations: Mapping[str, ActivationFormat],
) -> dict[str, InputQuantizer]:
    """Give a block the values of its finished file, as the run that wrote it left them. Edits in place.

    Returns how its inputs are quantized.
    """
    shard = WeightFiles(path.parent, [path.name])
    found: dict[str, InputQuantizer] = {}
    for module_path, module, key, parameter in parameters_of(skeleton, index, block):
        name = module_path.removeprefix(f"{skeleton.blocks_name}.{index}.")
        if key == "weight" and name in formats:
            format = stored_format(formats[name], *parameter.shape)
            first = LAYOUT.names(format)[0]
            base = skeleton.stored_name(f"{module_path}.{first}", shard).removesuffix(first)
            names = (*LAYOUT.names(format), *INPUT_SUFFIXES)
            parts = {suffix: shard.read(base + suffix) for suffix in names if base + suffix in shard}
            stored = QuantizedModule(LAYOUT.read(parts, format))
            if name in activations:
                found[name], kept = read_inputs(parts, activations[name], *parameter.shape)
                stored = replace(stored, inputs=found[name], kept=kept)
            value = stored.decode()
        else:
            value = shard.read(skeleton.stored_name(f"{module_path}.{key}", shard))
            value = value.T if isinstance(module, TransposedLinear) and key == "weight" else value
        parameter.data.copy_(value)
    return found


def parameters_of(
    skeleton: Skeleton, index: int, block: nn.Module
) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """Module's path from the root, module, parameter's key and value, for every parameter of a block."""
    for path, module in block.named_modules(prefix=f"{skeleton.blocks_name}.{index}"):
        for key, parameter in module._parameters.items():
            if parameter is not None:
                yield path, module, key, parameter


def write_rest(
    skeleton: Skeleton,
    files: WeightFiles,
    folder: OutputFolder,
    name: str,
    changed: Callable[[], tuple[Mapping[str, Tensor | None], list[ModuleRecord]]],
) -> None:
    """Everything of the source that no block holds, as it was stored, or as `changed` says: path -> value, None: not.

    `changed` also gives the journal's record.
    """
    if name in folder.finished:
        return
    prefix = skeleton.blocks_name + "."
    inside = {
        skeleton.stored_name(path, files) for path, _ in skeleton.model.named_parameters() if path.startswith(prefix)
    }
    values, records = changed()
    tensors = {skeleton.stored_name(path, files): value for path, value in values.items()}
    tensors |= {key: files.read(key) for key in files if key not in inside and key not in tensors}
    stored = {key: value.cpu() for key, value in sorted(tensors.items()) if value is not None}
    folder.write_tensors(name, stored, [asdict(record) for record in records])


def finish(skeleton: Skeleton, folder: OutputFolder, plan: Plan, recipe: Recipe, report: Report) -> Report:
    """Write the files around the tensors and let the folder appear under its name."""
    names = {"weight_map": {t: name for name, entry in folder.finished.items() for t in entry["tensors"]}}
    index = {"metadata": {"total_size": sum(entry["size"] for entry in folder.finished.values())}, **names}
    source = skeleton.folder
    for path in sorted({path for pattern in CARRIED for path in source.glob(pattern)} - {source / n for n in REPLACED}):
        folder.copy(path)
    formats = {module.path: stored_format(module.format, *module.shape) for module in plan if module.format is not None}
    on_disk = {name: format for path, format in formats.items() for name in sorted(skeleton.known_names(path))}
    inputs = {
        name: record.input_format
        for record in report.modules
        if record.input_format is not None
        for name in sorted(skeleton.known_names(record.path))
    }
    quantization: dict[str, Any] = (
        LAYOUT.config(on_disk, ignored_paths(skeleton, plan), inputs) if on_disk else {"ignore": []}
    )
    quantization |= cache_entry(recipe.scheme.cache)
    quantization["quant_method"] = plan.layout
    linear_paths = [skeleton.disk_path(module.path) for module in plan]
    online = {skeleton.disk_path(path): each for path, each in plan.rotations.inputs.items()}
    others = [path for path in linear_paths if path not in online]
    quantization |= rotation_entry(online, others)
    quantization |= embedding_entry({skeleton.disk_path(path): format for path, format in plan.tables.items()})
    sidecar = {
        "provenance": report.provenance,
        "formats": {path: format.model_dump(mode="json") for path, format in on_disk.items()},
        "activations": {path: format.model_dump(mode="json") for path, format in inputs.items()},
        "files": {name: entry["sha256"] for name, entry in folder.finished.items()},
    }
    config = json.loads((source / "config.json").read_text()) | {"quantization_config": quantization}
    if plan.head is not None or (recipe.rotation is not None and recipe.rotation.unties):
        config["tie_word_embeddings"] = False
    folder.write_text("model.safetensors.index.json", json.dumps(index, indent=2, sort_keys=True))
    folder.write_text(SIDECAR, json.dumps(sidecar, indent=2, sort_keys=True))
    folder.write_text("recipe.yaml", recipe.dump())
    report = completed(report, plan)
    folder.write_text("report.json", json.dumps(report.to_json(), indent=2))
    folder.write_text("report.html", html(report))
    folder.write_text("README.md", card(report, config, own_card(source)))
    folder.write_text("config.json", json.dumps(config, indent=2))
    folder.complete()
    return report
