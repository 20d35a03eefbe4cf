"""A finished checkpoint in another layout: codes and scales bit for bit, everything else as it was."""

import json
import shutil
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfbyte.errors import CheckpointError, FormatError, OutputError
from halfbyte.layouts import LAYOUTS, layout_of
from halfbyte.layouts.folder import OutputFolder, sha256
from halfbyte.layouts.layout import Layout, require, resolved
from halfbyte.layouts.shards import CONFIG, INDEX, SIDECAR, Shards, model_config, model_dtype, quantization_config
from halfbyte.layouts.targets import family
from halfbyte.scheme import ActivationFormat, FloatScale, IntegerScale, WeightFormat

SHOWN = 3  # of many problems
HEAD = "lm_head"  # what models call it, whatever their files do
OLD_CONFIGS = ("quantize_config.json", "quant_config.json")  # what AutoGPTQ and AutoAWQ kept beside config.json


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint that is to be converted, found intact."""

    folder: Path
    config: dict[str, Any]
    layout: Layout
    shards: Shards
    formats: dict[str, WeightFormat]
    activations: dict[str, ActivationFormat]
    ignored: list[str]  # linear layers (and embeddings, which no reader minds) that stay as they are


def export(folder: str | Path, format: str, output: str | Path, overwrite: bool = False) -> Path:
    """Write the checkpoint in `folder` to `output` in the layout of LAYOUTS called `format`. Returns `output`.

    Shard by shard, in a folder beside `output` that gets its name at the end and is removed if anything fails.
    FormatError, before anything is written, where the layout cannot hold the weights exactly; CheckpointError where the
    source is damaged; OutputError where the output is in the way.
    """
    folder, output = Path(folder), Path(output)
    if format not in LAYOUTS:
        raise FormatError(f"there is no layout {format!r}: choose one of {', '.join(LAYOUTS)}")
    if output.resolve() == folder.resolve():
        raise OutputError(f"the output is the checkpoint itself, {folder}: choose another folder")
    source, target = open_source(folder), LAYOUTS[format]
    config = new_config(source, target)
    mark = {"export": format, "source": str(folder.resolve())}
    size = sum((folder / name).stat().st_size for name in source.shards.files)
    with ExitStack() as stack:
        opened = OutputFolder(output, mark, size=size, resume=False, overwrite=overwrite)
        stack.callback(shutil.rmtree, opened.folder, ignore_errors=True)  # gone already if all went well
        stack.enter_context(opened)
        write_shards(source, target, opened)
        opened.write_text(CONFIG, json.dumps(config, indent=2) + "\n")
        copy_rest(source, opened)
        return opened.complete()


def open_source(folder: Path) -> Source:
    """Read everything but the weights. CheckpointError where the folder is not an intact quantized checkpoint."""
    config, shards = model_config(folder), Shards(folder)
    if shards.problems:
        raise CheckpointError(
            f"{folder} is damaged: {'; '.join(shards.problems[:SHOWN])}. Download it again, or quantize again"
        )
    section = quantization_config(config)
    if section is None:
        raise CheckpointError(f"{folder} is not quantized: quantize it first")
    layout = layout_of(section)
    quantized = shards.modules(layout.suffixes)
    formats = layout.formats(section, quantized)
    if strangers := [path for path in quantized if path not in formats]:
        raise CheckpointError(f"{folder} holds packed weights of {strangers[0]}, of which its {CONFIG} says nothing")
    if beyond := layout.beyond_weights(section):
        raise FormatError(
            f"{folder} asks for {' and '.join(beyond)}, which no other layout can say: use it as it is, or quantize "
            "again without (a quarot step with `online: []`, inputs without `outliers` and `clip`)"
        )
    stated = section.get("ignore") or section.get("modules_to_not_convert") or ()
    names = [*shards.matrices(), *(name for name in stated if not name.startswith("re:"))]
    names += [] if any(family(path) is None for path in formats) else [HEAD]
    ignored = [path for path in dict.fromkeys(names) if path not in formats]
    return Source(folder, config, layout, shards, formats, layout.activations(section, quantized), ignored)


def new_config(source: Source, target: Layout) -> dict[str, Any]:
    """config.json of the converted checkpoint. FormatError with reasons and modules if there can be none."""
    if source.layout.name == target.name:
        raise FormatError(f"{source.folder} is in the layout {target.name} already: copy the folder")
    refused: dict[str, list[str]] = defaultdict(list)
    for path, format in source.formats.items():
        tensors = source.shards.module(path, source.layout.names(format))
        try:
            shape = source.layout.shape(tensors, format)
            grid, stored = source.layout.read_grid(tensors, format)
            written = written_format(source, target, stored)
            require(target.refusal(written, *shape), target.name)
            target.write_grid(grid, written)
        except FormatError as cause:
            refused[str(cause)].append(path)
        except CheckpointError as cause:
            raise CheckpointError(f"{path}: {cause}") from cause
    if refused:
        raise FormatError(told(refused))
    kept = {key: value for key, value in source.config.items() if key != "compression_config"}
    formats = {path: written_format(source, target, format) for path, format in source.formats.items()}
    formats, activations = by_all_names(formats), by_all_names(source.activations)
    return kept | {"quantization_config": target.config(formats, source.ignored, activations)}


def by_all_names(formats: dict[str, Any]) -> dict[str, Any]:
    """With what stands outside the blocks also under the name that clients have for a head."""
    outside = [format for path, format in formats.items() if family(path) is None]
    return {**({HEAD: outside[0]} if outside else {}), **formats}


def told(refused: dict[str, list[str]]) -> str:
    """The first reasons, each with the modules that it concerns."""
    lines = [
        f"{paths[0]}{f' and {len(paths) - 1} more modules' if paths[1:] else ''}: {reason}"
        for reason, paths in refused.items()
    ]
    rest = sum(len(paths) for paths in list(refused.values())[SHOWN:])
    return "; ".join(lines[:SHOWN]) + (f"; and {rest} more modules for such reasons" if rest else "")


def written_format(source: Source, target: Layout, format: WeightFormat) -> WeightFormat:
    """The format with the scale dtype that is to be written: readers of compressed-tensors cast to the model's.

    Integer scales become the floating-point numbers S/α, which `write_grid` refuses where one would be rounded.
    """
    dtype = model_dtype(source.config)
    floats = format.model_copy(update={"scale": FloatScale()})
    if target.name != "compressed-tensors":
        return resolved(floats, torch.float16) if isinstance(format.scale, IntegerScale) else format
    return format if dtype is None else resolved(floats, dtype)


def write_shards(source: Source, target: Layout, output: OutputFolder) -> None:
    """Every shard under its own name; a module's tensors go where its codes were."""
    index: dict[str, str] = {}
    size = 0
    for file, names in source.shards.files.items():
        tensors: dict[str, Tensor] = {}
        for name in names:
            path, _, suffix = name.rpartition(".")
            stored = source.layout.names(source.formats[path]) if path in source.formats else ()
            if suffix not in stored:
                tensors[name] = source.shards.read(name)
            elif suffix == next(iter(stored)):
                tensors |= converted(source, target, path)
        output.write_tensors(file, tensors, None)
        output.flush()  # one shard in memory
        index |= dict.fromkeys(tensors, file)
        size += sum(tensor.nbytes for tensor in tensors.values())
    if (source.folder / INDEX).is_file():
        output.write_text(INDEX, json.dumps({"metadata": {"total_size": size}, "weight_map": index}, indent=2) + "\n")


def converted(source: Source, target: Layout, path: str) -> dict[str, Tensor]:
    """One module's tensors in the new layout, by full name."""
    format = source.formats[path]
    weight = source.layout.read(source.shards.module(path, source.layout.names(format)), format)
    weight = type(weight)(weight.codes, weight.grid, written_format(source, target, weight.format))
    return {f"{path}.{suffix}": tensor for suffix, tensor in target.write(weight).items()}


def copy_rest(source: Source, output: OutputFolder) -> None:
    """Tokenizer, generation settings, model card and whatever else lies there; hidden files stay behind."""
    written = {CONFIG, INDEX, SIDECAR, *OLD_CONFIGS, *source.shards.files}
    for path in sorted(source.folder.iterdir()):
        if path.name in written or path.name.startswith("."):
            continue
        if path.is_dir():
            shutil.copytree(path, output.folder / path.name, ignore=shutil.ignore_patterns(".*"), dirs_exist_ok=True)
        else:
            output.copy(path)
    sidecar = source.folder / SIDECAR
    if sidecar.is_file():
        record = json.loads(sidecar.read_text())
        if isinstance(record.get("files"), dict):
            here = sorted(set(record["files"]) | set(source.shards.files))
            record["files"] = {name: sha256(output.folder / name) for name in here if (output.folder / name).is_file()}
        output.write_text(SIDECAR, json.dumps(record, indent=2) + "\n")
