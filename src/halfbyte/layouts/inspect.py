"""What a checkpoint folder holds, and whether it is intact."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfbyte.errors import HalfbyteError
from halfbyte.layouts import layout_of
from halfbyte.layouts.cache import cache_format
from halfbyte.layouts.compressed_tensors import CompressedTensors
from halfbyte.layouts.folder import sha256
from halfbyte.layouts.inputs import SUFFIXES as INPUT_SUFFIXES
from halfbyte.layouts.inputs import read_inputs
from halfbyte.layouts.integer_scales import check_inputs
from halfbyte.layouts.layout import Layout
from halfbyte.layouts.rotations import online_inputs
from halfbyte.layouts.shards import SIDECAR, Shards, model_config, quantization_config
from halfbyte.layouts.targets import family
from halfbyte.numerics.certificate import INT32, TOKEN_INPUTS, magnitude
from halfbyte.scheme import ActivationFormat, WeightFormat


@dataclass(frozen=True, slots=True)
class InspectedModule:
    """One quantized linear layer."""

    path: str
    format: str  # "int4 sym g128"
    shape: tuple[int, int]  # out, in
    bits_per_weight: float  # all stored tensors: codes, scales, zero points
    accumulator: float | None = None  # share of int32 that some input can fill, by the certificate of integer scales


@dataclass(frozen=True, slots=True)
class Inspection:
    """A checkpoint folder on one page."""

    folder: str
    layout: str | None  # quant_method; None: not quantized
    formats: dict[str, int]  # modules of each format
    modules: tuple[InspectedModule, ...]
    bits_per_weight: float | None  # over the quantized modules
    model_bits_per_weight: float  # over everything
    bytes_on_disk: int  # of the weight files
    unquantized_share: float  # of the parameters
    problems: tuple[str, ...]  # empty: intact, as far as can be told
    accumulator: float | None = None  # of the fullest module with integer scales
    rotations: dict[str, int] | None = None  # modules that read inputs rotated at run time, by what rotates them
    cache: str | None = None  # the format of keys and values that the checkpoint asks for
    kernels: dict[str, int] | None = None  # modules that each kernel would run; for the caller to fill in

    def as_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        return asdict(self)


def inspect(folder: str | Path, *, linears: Sequence[str] = (), hashes: bool = True) -> Inspection:
    """Look at a checkpoint of any of LAYOUTS, intact or not. CheckpointError only where the folder is no checkpoint.

    `linears`: paths of the model's linear layers, if the caller knows them; otherwise a quantized module of which no
    tensor is left goes unnoticed unless an index, a target or a hash names it. `hashes`: read every byte to compare the
    files with the hashes in halfbyte.json.
    """
    folder = Path(folder)
    config, shards = model_config(folder), Shards(folder)
    problems = list(shards.problems)
    section = quantization_config(config)
    layout, formats, activations, rotations, cache = None, {}, {}, {}, None
    if section is not None:
        try:
            layout = layout_of(section)
            paths = candidates(layout, section, shards, linears)
            formats, activations = layout.formats(section, paths), layout.activations(section, paths)
            rotations, cache = online_inputs(section, list(formats)), cache_format(section)
        except HalfbyteError as cause:
            problems.append(str(cause))
    modules = []
    quantized = 0
    suffixes = layout.suffixes if layout else ()
    for path, format in formats.items():
        found = inspect_module(layout, shards, path, format, activations.get(path)) if layout else None
        if isinstance(found, InspectedModule):
            modules.append(found)
            quantized += found.shape[0] * found.shape[1]
        elif found:
            problems.append(found)
    problems += [
        f"{path} has packed tensors, which config.json does not mention"
        for path in shards.modules(suffixes)
        if path not in formats
    ]
    if hashes:
        problems += wrong_hashes(folder)
    packed = {f"{path}.{suffix}" for path in formats for suffix in (*suffixes, "weight")}
    plain = sum(shards.read(name).numel() for name in shards.place if name not in packed)
    bits = sum(module.bits_per_weight * module.shape[0] * module.shape[1] for module in modules)
    stored = sum(shards.read(name).nbytes for name in shards.place)
    return Inspection(
        folder=str(folder),
        layout=str(section.get("quant_method")) if section else None,
        formats=dict(Counter(module.format for module in modules).most_common()),
        modules=tuple(modules),
        bits_per_weight=bits / quantized if quantized else None,
        model_bits_per_weight=8 * stored / max(plain + quantized, 1),
        bytes_on_disk=shards.bytes_on_disk,
        unquantized_share=plain / max(plain + quantized, 1),
        problems=tuple(problems),
        accumulator=max((m.accumulator for m in modules if m.accumulator is not None), default=None),
        rotations=dict(Counter(str(online) for online in rotations.values()).most_common()) or None,
        cache=None if cache is None else str(cache),
    )


def candidates(layout: Layout, section: dict[str, Any], shards: Shards, linears: Iterable[str]) -> list[str]:
    """Paths that may belong to a quantized linear layer."""
    found = [*shards.modules(layout.suffixes), *linears]
    if isinstance(layout, CompressedTensors):
        # this layout names what it quantizes and what not; the others leave routers and the like to the reader
        groups = [group for group in section.get("config_groups", {}).values() if isinstance(group, dict)]
        found += [path for group in groups for path in group.get("targets") or () if "." in path and path[:3] != "re:"]
        found += [path for path in shards.matrices() if family(path)]
    return list(dict.fromkeys(found))


def inspect_module(
    layout: Layout, shards: Shards, path: str, format: WeightFormat, activations: ActivationFormat | None
) -> InspectedModule | str:
    """What is there of a module that config.json calls quantized, or what is wrong with it."""
    tensors = shards.module(path, (*layout.names(format), *INPUT_SUFFIXES))
    if not any(suffix in tensors for suffix in layout.suffixes):
        there = "is a plain matrix" if f"{path}.weight" in shards.place else "has no tensors"
        return f"{path} {there}, although config.json says that it is {format}"
    try:
        out, columns = layout.shape(tensors, format)
        grid, format = layout.read_grid(tensors, format)
        if activations is not None:
            read_inputs(tensors, activations, out, columns)
        share = accumulator_share(tensors, activations or TOKEN_INPUTS)
    except HalfbyteError as cause:
        return f"{path}: {cause}"
    if not torch.isfinite(grid.scales).all():
        return f"{path}: {int((~torch.isfinite(grid.scales)).sum())} scales are NaN or Inf"
    size = sum(tensor.nbytes for tensor in tensors.values())
    name = str(format) + (f", {activations}" if activations else "")
    return InspectedModule(path, name, (out, columns), 8 * size / (out * columns), share)


def accumulator_share(tensors: Mapping[str, Tensor], inputs: ActivationFormat) -> float | None:
    """How much of int32 the fullest row can fill. None without integer scales; CheckpointError where it overflows."""
    if "weight_reach" not in tensors:
        return None
    check_inputs(tensors["weight_reach"], inputs)
    return magnitude(inputs) * int(tensors["weight_reach"].max()) / INT32


def wrong_hashes(folder: Path) -> list[str]:
    """Files that differ from what halfbyte.json says of them."""
    path = folder / SIDECAR
    if not path.is_file():
        return []
    try:
        hashes = json.loads(path.read_text()).get("files") or {}
    except (ValueError, AttributeError) as cause:
        return [f"{SIDECAR} is damaged ({cause})"]
    problems = []
    for name, expected in hashes.items():
        if not (folder / name).is_file():
            problems.append(f"{name} is missing, which {SIDECAR} lists")
        elif sha256(folder / name) != expected:
            problems.append(f"{name} is not the file that was written: its sha256 differs from {SIDECAR}")
    return problems
