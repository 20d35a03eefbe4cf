"""From a Hugging Face name or folder to a model on the meta device whose parts are read when their turn comes.

The only door to transformers for building models. Weights are read from safetensors and nothing else.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from halfbyte.errors import CheckpointError, ModelError
from halfbyte.models.architecture import Architecture
from halfbyte.models.heads import head_counts
from halfbyte.models.linearize import TransposedLinear, linearize, unlinearized
from halfbyte.models.names import disk_name, outer_disk_name
from halfbyte.models.tables import architecture_of

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py"]


def locate(model: str | Path) -> Path:
    """The folder of a model: the one given, or the hub's snapshot of that name. CheckpointError where there is none."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if (unfinished := path.with_name(path.name + ".unfinished")).is_dir():
        raise CheckpointError(f"{path} is not there yet, {unfinished} holds an unfinished run: go on with --resume")
    if path.exists() or str(model).startswith((".", "/", "~")) or str(model).count("/") > 1:
        raise CheckpointError(f"{model} is not a folder: give a model's folder, or a hub name such as org/model")
    try:
        return Path(snapshot_download(str(model), allow_patterns=HUB_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as cause:
        raise CheckpointError(
            f"{model!r} is neither a folder here nor a model that the hub gives: check the spelling and the network, "
            "or download the model first and give its folder"
        ) from cause


class WeightFiles:
    """The tensors of a safetensors checkpoint by name, read one at a time."""

    def __init__(self, folder: Path, names: Iterable[str] = ()) -> None:
        """Open the files that the folder's index lists, or `names` of them. CheckpointError where one is unusable."""
        self.folder = folder
        self.files: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        names = set(names) or self._indexed() or {SINGLE}
        for name in sorted(names):
            path = folder / name
            if not path.is_file():
                raise CheckpointError(self._missing(path))
            self.files.update(dict.fromkeys(self._handle(path).keys(), path))

    def _indexed(self) -> set[str]:
        index = self.folder / INDEX
        if not index.is_file():
            return set()
        try:
            return set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError) as cause:
            raise CheckpointError(f"{index} is damaged ({cause}): download the model again") from cause

    def _missing(self, path: Path) -> str:
        if any(self.folder.glob("pytorch_model*.bin")):
            return (
                f"{self.folder} holds pickled weights only, which can run code when they are read: convert them to "
                "safetensors first (`model.save_pretrained(folder)` in transformers does)"
            )
        return f"{path.name} is missing from {self.folder}: download the model again"

    def _handle(self, path: Path) -> Any:
        if path not in self._open:
            try:
                self._open[path] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as cause:
                raise CheckpointError(f"{path} is truncated or damaged ({cause}): download this file again") from cause
        return self._open[path]

    def __contains__(self, name: object) -> bool:
        return name in self.files

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def read(self, name: str) -> Tensor:
        """One tensor as it is stored. CheckpointError where it is missing or its file damaged."""
        if name not in self.files:
            raise CheckpointError(
                f"the checkpoint in {self.folder} has no tensor {name!r}, which its config.json asks for: download it "
                "again, or mend config.json"
            )
        path = self.files[name]
        try:
            return self._handle(path).get_tensor(name)
        except (SafetensorError, OSError) as cause:
            raise CheckpointError(f"{name} in {path} is truncated or damaged ({cause}): download it again") from cause

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._handle(self.files[name]).get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        return getattr(torch, STORED_DTYPES[self._handle(self.files[name]).get_slice(name).get_dtype()])

    def close(self) -> None:
        """Unmap the files, so that what was read no longer counts as this process's memory; reading opens them again."""
        self._open.clear()

    def headers(self) -> dict[str, str]:
        """SHA-256 of each file's header (names, dtypes, shapes, places) and size, and of config.json: quick to compute."""
        found = {"config.json": hashlib.sha256((self.folder / "config.json").read_bytes()).hexdigest()}
        for path in sorted(set(self.files.values())):
            with path.open("rb") as file:
                prefix = file.read(8)
                header = file.read(int.from_bytes(prefix, "little"))
            size = path.stat().st_size.to_bytes(8, "little")
            found[path.name] = hashlib.sha256(prefix + header + size).hexdigest()
        return found

    def nbytes(self, name: str) -> int:
        size = self.dtype(name).itemsize
        for length in self.shape(name):
            size *= length
        return size


STORED_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A model without its weights: every matrix of its blocks is an nn.Linear on the meta device."""

    folder: Path
    model: nn.Module
    config: Any
    architecture: Architecture | None
    blocks_name: str

    @property
    def blocks(self) -> nn.ModuleList:
        found = self.model.get_submodule(self.blocks_name)
        assert isinstance(found, nn.ModuleList)
        return found

    @property
    def heads(self) -> tuple[int, int, int]:
        """Query heads, key-value heads, head dimension."""
        return head_counts(self.config.get_text_config())

    @property
    def output_head(self) -> str | None:
        """Path of the linear that gives the logits; None for a model that fills masks, or has none of its own."""
        found = self.model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
        if not isinstance(found, nn.Linear) or type(self.model).__name__.endswith("ForMaskedLM"):
            return None
        return next(path for path, module in self.model.named_modules() if module is found)

    def disk_path(self, path: str) -> str:
        """What checkpoints of this family call a module or tensor."""
        if self.architecture is None:
            return path
        prefix = self.blocks_name + "."
        if not path.startswith(prefix):
            return outer_disk_name(self.architecture, path)
        index, _, rest = path.removeprefix(prefix).partition(".")
        return f"{prefix}{index}.{disk_name(self.architecture, rest)}"

    def known_names(self, path: str) -> set[str]:
        """What readers of a checkpoint may call a module: outside the blocks also what the model itself does."""
        inside = path.startswith(self.blocks_name + ".")
        return {self.disk_path(path)} if inside else {self.disk_path(path), path}

    def shared_name(self, path: str, files: "WeightFiles") -> str:
        """What this checkpoint calls a tensor or, where it lacks its own, the one that it is tied to."""
        name, tied = self.stored_name(path, files), getattr(self.model, "all_tied_weights_keys", None) or {}
        return self.stored_name(tied[path], files) if name not in files and path in tied else name

    def stored_name(self, path: str, files: "WeightFiles") -> str:
        """What this checkpoint calls a tensor: with or without the base model's prefix. The usual name if it has none."""
        name = self.disk_path(path)
        base = getattr(self.model, "base_model_prefix", "") + "."
        bare = name.removeprefix(base)
        candidates = [name, bare, base + bare] if base != "." else [name]
        return next((candidate for candidate in candidates if candidate in files), name)


def skeleton(folder: Path, *, trust_remote_code: bool = False, refuse_quantized: bool = False) -> Skeleton:
    """The model of a folder's config.json, on the meta device. ModelError, CheckpointError with what to do."""
    config = read_config(folder, trust_remote_code=trust_remote_code)
    if getattr(config, "quantization_config", None) is not None:
        if refuse_quantized:
            raise CheckpointError(f"{folder} is quantized already: start from the model in 16 or 32 bits")
        del config.quantization_config  # the structure is the float model's, whatever its numbers look like
    with init_empty_weights(include_buffers=False):
        model = model_class(config).from_config(config, trust_remote_code=trust_remote_code)
    architecture = architecture_of(config.model_type)
    blocks_name = architecture.blocks if architecture else find_blocks(model)
    for block in model.get_submodule(blocks_name).children():
        linearize(block)
        if left := unlinearized(block):
            raise ModelError(
                f"{config.model_type}: {', '.join(left)} hold weights in a layout that halfbyte does not know, and would "
                "stay unquantized; this architecture needs a rule in models/linearize.py"
            )
    model.eval().requires_grad_(False)
    return Skeleton(folder, model, config, architecture, blocks_name)


def read_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The parsed config.json. CheckpointError where it is missing or damaged."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json, so it is not a finished model folder: check the path")
    try:
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, OSError) as cause:
        raise CheckpointError(f"{folder}/config.json cannot be read: {cause}") from cause


def model_class(config: Any) -> Any:
    """Encoders that fill masks and decoders that continue text have a head each."""
    masked = any(name.endswith("ForMaskedLM") for name in getattr(config, "architectures", None) or [])
    return transformers.AutoModelForMaskedLM if masked else transformers.AutoModelForCausalLM


def find_blocks(model: nn.Module) -> str:
    """The longest list of modules of one class: the blocks of an architecture that has no table."""
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len({type(child) for child in module}) == 1
    }
    if not lists:
        raise ModelError(f"{type(model).__name__} has no list of blocks to walk: it needs a table in models/tables.py")
    return max(lists, key=lambda name: sum(p.numel() for p in lists[name].parameters()))


def materialize(
    skeleton: Skeleton,
    files: WeightFiles,
    modules: Iterable[tuple[str, nn.Module]],
    device: torch.device | str,
    dtype: torch.dtype | None,
) -> None:
    """Read the modules' own parameters and persistent buffers, without those of their children. Edits in place.

    `modules` are (path from the root, module); `dtype` None keeps the stored one. Buffers that were computed when the
    model was built only move to the device.
    """
    for path, module in modules:
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                module._parameters[key] = nn.Parameter(
                    _stored(skeleton, files, path, module, key, device, dtype), requires_grad=False
                )
        for key, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[key] = _stored(skeleton, files, path, module, key, device, dtype)
            elif buffer is not None:
                module._buffers[key] = buffer.to(device)


def _stored(
    skeleton: Skeleton,
    files: WeightFiles,
    path: str,
    module: nn.Module,
    key: str,
    device: torch.device | str,
    dtype: torch.dtype | None,
) -> Tensor:
    stored = files.read(skeleton.stored_name(f"{path}.{key}" if path else key, files))
    if isinstance(module, TransposedLinear) and key == "weight":
        stored = stored.T
    expected = tuple(getattr(module, key).shape)
    if tuple(stored.shape) != expected:
        raise CheckpointError(
            f"{path}.{key} is {tuple(stored.shape)} in {files.folder} and {expected} by its config.json: the two do not "
            "belong together"
        )
    # a copy: what was read is a view of the mapped file, and weights are edited in place
    return stored.to(device, dtype if stored.is_floating_point() else None, copy=True).contiguous()


def release(module: nn.Module, *, recurse: bool = True) -> None:
    """Drop the module's weights, so that only one block is in memory at a time. Edits in place."""
    for child in module.modules() if recurse else [module]:
        for key, parameter in child._parameters.items():
            if parameter is not None:
                child._parameters[key] = nn.Parameter(parameter.to("meta"), requires_grad=False)


def outer_modules(skeleton: Skeleton) -> list[tuple[str, nn.Module]]:
    """The modules outside the blocks; their parameters and buffers are read apart from the blocks'."""
    prefix = skeleton.blocks_name + "."
    return [(name, module) for name, module in skeleton.model.named_modules() if not name.startswith(prefix)]


def materialize_outer(
    skeleton: Skeleton, files: WeightFiles, device: torch.device | str, dtype: torch.dtype | None
) -> None:
    """Read everything outside the blocks and tie what the architecture ties. Edits in place."""
    tied = dict(getattr(skeleton.model, "all_tied_weights_keys", None) or {})
    absent = {name: source for name, source in tied.items() if skeleton.stored_name(name, files) not in files}
    for name in absent:
        skeleton.model.get_submodule(name.rpartition(".")[0])._parameters[name.rpartition(".")[2]] = None
    materialize(skeleton, files, outer_modules(skeleton), device, dtype)
    for name, source in absent.items():
        module, _, key = name.rpartition(".")
        skeleton.model.get_submodule(module)._parameters[key] = skeleton.model.get_parameter(source)
