"""From a folder or hub name to a model that can answer, quantized or not, and its tokenizer.

A quantized folder is read tensor by tensor: every tensor that belongs to a quantized weight is used, every linear that
the configuration calls quantized gets its tensors, or there is no model. Nothing is ever left randomly initialised.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from halfbyte.errors import CheckpointError, FormatError, HalfbyteError
from halfbyte.layouts import LAYOUTS, layout_of
from halfbyte.layouts.layout import Layout
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
from halfbyte.runtime.linear import QuantizedLinear
from halfbyte.scheme import WeightFormat

Pair = tuple[Any, Any]
"""A transformers model and its tokenizer."""

OWN_METHOD = "halfbyte"
OWN_LAYOUT = LAYOUTS["compressed-tensors"]  # the tensors of our own method, and what QuantizedLinear runs
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


def load(
    path_or_name: str | Path, *, device: str = "auto", dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> Pair:
    """A transformers model in evaluation mode and its tokenizer.

    `device`: auto is the GPU, or the CPU without one. `dtype`: float32 on the CPU and the checkpoint's own on a GPU,
    unless given. CheckpointError where the folder is damaged, unfinished, or not what its config.json says.
    """
    folder = locate(path_or_name)
    model = load_model(folder, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    return model, load_tokenizer(folder, trust_remote_code=trust_remote_code)


def opened(model: str | Path | Pair, *, device: str = "auto", dtype: torch.dtype | None = None) -> Pair:
    """A loaded pair as it is, or what `load` makes of a folder or name."""
    return load(model, device=device, dtype=dtype) if isinstance(model, str | Path) else model


def load_model(
    folder: Path, *, device: str = "auto", dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> Any:
    """The model of `load`, without its tokenizer."""
    place = pick_device(device)
    if dtype is None and place.type == "cpu":
        dtype = torch.float32
    config = read_config(folder, trust_remote_code=trust_remote_code)
    files = WeightFiles(folder)
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


def layout_and_formats(quantization: Mapping[str, Any], bones: Skeleton) -> tuple[Layout, dict[str, WeightFormat]]:
    """How the tensors are laid out, and the format of every linear that a `quantization_config` calls quantized.

    Keys are paths in the skeleton. CheckpointError for what we cannot read or cannot run.
    """
    layout = OWN_LAYOUT if quantization.get("quant_method") == OWN_METHOD else layout_of(quantization)
    if beyond := layout.beyond_weights(quantization):
        raise CheckpointError(
            f"the checkpoint asks for {' and '.join(beyond)}, which would be left out here: use the program that wrote "
            "it"
        )
    paths = [path for path, module in bones.model.named_modules() if isinstance(module, nn.Linear)]
    on_disk = layout.formats(quantization, [bones.disk_path(path) for path in paths])
    # clients differ in whether a head has its name on disk or in memory: ignored under one is ignored
    outside = layout.formats(quantization, [path for path in paths if not path.startswith(bones.blocks_name)])
    formats = {
        path: on_disk[bones.disk_path(path)]
        for path in paths
        if bones.disk_path(path) in on_disk and (path.startswith(bones.blocks_name) or path in outside)
    }
    if not formats:
        raise CheckpointError(
            "quantization_config selects none of the model's linear layers: config.json and the model do not belong "
            "together"
        )
    return layout, formats


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
    for path, format in formats.items():
        linear = bones.model.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        names = {suffix: bones.stored_name(f"{path}.{suffix}", files) for suffix in layout.suffixes}
        tensors = {suffix: files.read(name) for suffix, name in names.items() if name in files}
        bias = None if linear.bias is None else files.read(bones.stored_name(f"{path}.bias", files))
        try:
            replacement = _quantized(linear, layout, tensors, bias, format)
        except HalfbyteError as cause:
            raise CheckpointError(f"{bones.disk_path(path)} in {files.folder}: {cause}") from cause
        bones.model.set_submodule(path, replacement.to(device).prepare(dtype))
        used |= {names[suffix] for suffix in tensors}
    if left := [name for name in files if name.rpartition(".")[2] in layout.suffixes and name not in used]:
        raise CheckpointError(
            f"{files.folder} holds {_some(left)}, which belong to no quantized layer of its config.json: the two do "
            "not belong together"
        )
    materialize(bones, files, list(bones.blocks.named_modules(prefix=bones.blocks_name)), device, dtype)
    materialize_outer(bones, files, device, dtype)
    for path in formats:
        # a head that shares the embedding's weight has got it back; what was quantized runs from its own
        bones.model.get_submodule(path)._parameters.pop("weight", None)
    return _finished(bones.model, files.folder)


def _quantized(
    linear: nn.Linear, layout: Layout, tensors: Mapping[str, Tensor], bias: Tensor | None, format: WeightFormat
) -> QuantizedLinear:
    """The module that runs these tensors in place of `linear`."""
    if layout is not OWN_LAYOUT:
        weight = layout.read(tensors, format)
        tensors, format = OWN_LAYOUT.write(weight), weight.format
    room = QuantizedLinear(linear.in_features, linear.out_features, format, bias=bias is not None, device="meta")
    return room.fill(tensors, bias)


def _own_dtype(bones: Skeleton, files: WeightFiles) -> torch.dtype:
    """The dtype that the checkpoint computes in: config.json's, or else that of its first unpacked matrix."""
    stated = getattr(bones.config, "dtype", None)
    if isinstance(stated, torch.dtype):
        return stated
    return next(files.dtype(name) for name in files if name.endswith(".weight") and len(files.shape(name)) == 2)


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
