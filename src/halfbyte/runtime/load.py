"""From a folder or hub name to a model that can answer, quantized, to be quantized or neither, and its tokenizer.

A quantized folder is read tensor by tensor: every tensor that belongs to a quantized weight is used, every linear that
the configuration calls quantized gets its tensors, or there is no model. Nothing is ever left randomly initialised.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from halfbyte.errors import CheckpointError, FormatError, HalfbyteError, RecipeError
from halfbyte.layouts import inputs, layout_of
from halfbyte.layouts.cache import cache_format
from halfbyte.layouts.compressed_tensors import OWN
from halfbyte.layouts.embeddings import SCALE, embedding_formats, read_embedding
from halfbyte.layouts.layout import Layout
from halfbyte.layouts.rotations import online_inputs
from halfbyte.machine import pick_device
from halfbyte.models.load import (
    Skeleton,
    WeightFiles,
    locate,
    materialize,
    materialize_outer,
    model_class,
    read_config,
    skeleton,
)
from halfbyte.numerics.quantized import QuantizedWeight
from halfbyte.recipe import Recipe
from halfbyte.runtime.cache_plan import attach_cache, stored_plan
from halfbyte.runtime.embedding import replace_tables
from halfbyte.runtime.experts import join_experts
from halfbyte.runtime.fused import fuse
from halfbyte.runtime.integer_linear import IntegerLinear
from halfbyte.runtime.linear import QuantizedLinear
from halfbyte.runtime.on_the_fly import quantize_linears, rounded_tables
from halfbyte.runtime.online import add_rotations
from halfbyte.runtime.replacement import from_checkpoint
from halfbyte.scheme import ActivationFormat, OnlineHadamard, WeightFormat

Pair = tuple[Any, Any]
"""A transformers model and its tokenizer."""

Formats = tuple[WeightFormat, ActivationFormat | None]
"""Of a linear's weight, and of its input (None: as it comes)."""

AnyRecipe = Recipe | str | Path | Mapping[str, Any]
"""A recipe, the name of a shipped one, a file, or its fields."""

OWN_METHOD = OWN.name
OWN_WORDS = (
    "a past-only cache",
    "Hadamard products at run time",
    "inputs with outliers split off",
    "inputs that are clipped",
    "tables of embeddings in 8 bits",
)
"""What no other reader of compressed-tensors runs, and this one does."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


def load(
    path_or_name: str | Path,
    *,
    recipe: AnyRecipe | None = None,
    fused: bool = False,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> Pair:
    """A transformers model in evaluation mode and its tokenizer.

    `recipe`: quantize an unquantized model while it is read, by a recipe that needs no data (`rtn-w8a16`, ...); nothing
    is written. `fused`: join what stands between integer products (runtime/fused.py). `device`: auto is the GPU, or the
    CPU without one. `dtype`: float32 on the CPU and the checkpoint's own on a GPU, unless given. CheckpointError where
    the folder is damaged, unfinished, or not what its config.json says;
    RecipeError where the recipe needs data; ModelError where layers cannot be fused.
    """
    folder = locate(path_or_name)
    model = load_model(folder, recipe=recipe, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    if fused:
        fuse(model)
    return model, load_tokenizer(folder, trust_remote_code=trust_remote_code)


def opened(
    model: str | Path | Pair,
    *,
    recipe: AnyRecipe | None = None,
    device: str = "auto",
    dtype: torch.dtype | None = None,
) -> Pair:
    """A loaded pair as it is, or what `load` makes of a folder or name. RecipeError for a pair and a recipe."""
    if isinstance(model, str | Path):
        return load(model, recipe=recipe, device=device, dtype=dtype)
    if recipe is not None:
        raise RecipeError("a model in memory is used as it is, without a recipe: give its folder or name")
    return model


def load_model(
    folder: Path,
    *,
    recipe: AnyRecipe | None = None,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """The model of `load`, without its tokenizer."""
    place = pick_device(device)
    if dtype is None and place.type == "cpu":
        dtype = torch.float32
    config = read_config(folder, trust_remote_code=trust_remote_code)
    files = WeightFiles(folder)
    if recipe is not None:
        bones = skeleton(folder, trust_remote_code=trust_remote_code, refuse_quantized=True)
        dtype = dtype or _own_dtype(bones, files)
        paths = quantize_linears(bones, files, Recipe.load(recipe), place, dtype)
        model = completed(bones, files, paths, place, dtype)
        replace_tables(model, rounded_tables(bones, Recipe.load(recipe)), dtype)
        join_experts(model)
        return model
    if quantization := quantization_of(folder):
        bones = skeleton(folder, trust_remote_code=trust_remote_code)
        return _load_quantized(files, quantization, bones, place, dtype)
    model, report = model_class(config).from_pretrained(
        folder, dtype=dtype or "auto", trust_remote_code=trust_remote_code, output_loading_info=True
    )
    absent = [*sorted(report["missing_keys"]), *sorted(str(name) for name in report["mismatched_keys"])]
    if absent:
        raise CheckpointError(
            f"{folder} lacks {_some(absent)}, or holds them in another shape than its config.json asks for: download "
            "it again"
        )
    return model.to(place).eval().requires_grad_(False)


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model's folder. CheckpointError where it has none, or one that cannot be read."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise CheckpointError(f"{folder} has no tokenizer: copy tokenizer.json and tokenizer_config.json into it")
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, OSError) as cause:
        raise CheckpointError(f"the tokenizer in {folder} cannot be read: {cause}") from cause


def quantization_of(folder: Path) -> dict[str, Any]:
    """`quantization_config` of a folder's config.json; empty for a model that is not quantized."""
    return json.loads((folder / "config.json").read_text()).get("quantization_config") or {}


def layout_and_formats(quantization: Mapping[str, Any], bones: Skeleton) -> tuple[Layout, dict[str, Formats]]:
    """How the tensors are laid out, and the formats of every linear that a `quantization_config` calls quantized.

    Keys are paths in the skeleton. CheckpointError for what we cannot read or cannot run.
    """
    layout = layout_of(quantization)
    if beyond := [asked for asked in layout.beyond_weights(quantization) if asked not in OWN_WORDS]:
        raise CheckpointError(
            f"the checkpoint asks for {' and '.join(beyond)}, which would be left out here: use the program that wrote "
            "it"
        )
    paths = [path for path, module in bones.model.named_modules() if isinstance(module, nn.Linear)]
    on_disk = [bones.disk_path(path) for path in paths]
    formats, activations = layout.formats(quantization, on_disk), layout.activations(quantization, on_disk)
    # clients differ in whether a head has its name on disk or in memory: ignored under one is ignored
    outside = layout.formats(quantization, [path for path in paths if not path.startswith(bones.blocks_name)])
    found = {
        path: (formats[name], activations.get(name))
        for path, name in zip(paths, on_disk, strict=True)
        if name in formats and (path.startswith(bones.blocks_name) or path in outside)
    }
    if not found and cache_format(quantization) is None:
        raise CheckpointError(
            "quantization_config selects none of the model's linear layers: config.json and the model do not belong "
            "together"
        )
    return layout, found


def _load_quantized(
    files: WeightFiles,
    quantization: Mapping[str, Any],
    bones: Skeleton,
    device: torch.device,
    dtype: torch.dtype | None,
) -> Any:
    layout, formats = layout_and_formats(quantization, bones)
    dtype = dtype or _own_dtype(bones, files)
    used: set[str] = set()
    for path, (format, activations) in formats.items():
        linear = bones.model.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        suffixes = (*layout.names(format), *(inputs.SUFFIXES if activations is not None else ()))
        names = {suffix: bones.stored_name(f"{path}.{suffix}", files) for suffix in suffixes}
        tensors = {suffix: files.read(name) for suffix, name in names.items() if name in files}
        bias = None if linear.bias is None else files.read(bones.stored_name(f"{path}.bias", files))
        try:
            replacement = from_checkpoint(linear, layout, tensors, bias, format, activations).to(device).prepare(dtype)
        except HalfbyteError as cause:
            raise CheckpointError(f"{bones.disk_path(path)} in {files.folder}: {cause}") from cause
        bones.model.set_submodule(path, replacement)
        used |= {names[suffix] for suffix in tensors}
    if left := [name for name in files if name.rpartition(".")[2] in layout.suffixes and name not in used]:
        raise CheckpointError(
            f"{files.folder} holds {_some(left)}, which belong to no quantized layer of its config.json: the two do "
            "not belong together"
        )
    model = completed(bones, files, formats, device, dtype)
    replace_tables(model, _tables(quantization, bones, files), dtype)
    add_rotations(model, rotated_inputs(quantization, bones))
    join_experts(model)
    attach_cache(model, stored_plan(model, quantization, bones.disk_path, files))
    return model


def _tables(quantization: Mapping[str, Any], bones: Skeleton, files: WeightFiles) -> dict[str, QuantizedWeight]:
    """Path of a table of embeddings -> its codes. CheckpointError where one is not there."""
    formats = embedding_formats(quantization)
    paths = {
        bones.disk_path(path): path for path, module in bones.model.named_modules() if isinstance(module, nn.Embedding)
    }
    if unknown := sorted(formats.keys() - paths.keys()):
        raise CheckpointError(f"config.json calls {_some(unknown)} a quantized table, and the model has none there")
    found = {}
    for name, format in formats.items():
        names = {suffix: bones.stored_name(f"{paths[name]}.{suffix}", files) for suffix in ("weight", SCALE)}
        tensors = {suffix: files.read(stored) for suffix, stored in names.items() if stored in files}
        try:
            found[paths[name]] = read_embedding(tensors, format)
        except CheckpointError as cause:
            raise CheckpointError(f"{name} in {files.folder}: {cause}") from cause
    return found


def rotated_inputs(quantization: Mapping[str, Any], bones: Skeleton) -> dict[str, OnlineHadamard]:
    """Path of a linear -> what is done to its input at run time."""
    linears = {
        bones.disk_path(path): path
        for path, module in bones.model.named_modules()
        if isinstance(module, nn.Linear | QuantizedLinear | IntegerLinear)
    }
    return {linears[name]: online for name, online in online_inputs(quantization, list(linears)).items()}


def completed(
    bones: Skeleton, files: WeightFiles, quantized: Iterable[str], device: torch.device, dtype: torch.dtype
) -> Any:
    """The model, once the linears at `quantized` are replaced: everything else is read."""
    materialize(bones, files, list(bones.blocks.named_modules(prefix=bones.blocks_name)), device, dtype)
    materialize_outer(bones, files, device, dtype)
    for path in quantized:
        # a head that shares the embedding's weight has got it back; what was quantized runs from its own
        bones.model.get_submodule(path)._parameters.pop("weight", None)
    return _finished(bones.model, files.folder)


def _own_dtype(bones: Skeleton, files: WeightFiles) -> torch.dtype:
    """The dtype that the checkpoint computes in: config.json's, or else that of its first unpacked matrix."""
    stated = getattr(bones.config, "dtype", None)
    if isinstance(stated, torch.dtype):
        return stated
    matrices = (files.dtype(name) for name in files if name.endswith(".weight") and len(files.shape(name)) == 2)
    return next(dtype for dtype in matrices if dtype.is_floating_point)


def _finished(model: Any, folder: Path) -> Any:
    if bare := [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]:
        raise CheckpointError(f"{folder} has nothing for {_some(bare)}: download it again")
    if (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    model.save_pretrained = _refuse_to_save
    return model.eval().requires_grad_(False)


def _refuse_to_save(*_args: Any, **_kwargs: Any) -> None:
    raise FormatError(
        "a model that runs packed weights is not saved from memory, where its modules have other names than in files: "
        "copy its folder, or convert it with halfbyte.layouts"
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
