"""What a checkpoint folder holds on the disk: config.json, safetensors files and their index."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from halfbyte.errors import CheckpointError

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SIDECAR = "halfbyte.json"


class Shards:
    """The tensors of a folder, as far as they can be read; what is wrong is told in `problems`, in words.

    Tensors are memory-mapped: reading one costs nothing until its values are looked at.
    """

    def __init__(self, folder: Path) -> None:
        """CheckpointError for a folder without any safetensors file."""
        self.folder = folder
        self.problems: list[str] = []
        self.files: dict[str, list[str]] = {}  # the tensors of each readable file
        self.place: dict[str, str] = {}  # the file of each tensor
        self._handles: dict[str, Any] = {}
        index = self._read_index()
        names = sorted(set(index.values())) or sorted(path.name for path in folder.glob("*.safetensors"))
        if not names:
            raise CheckpointError(f"{folder} has no safetensors files, so it is no checkpoint: give a model's folder")
        for name in names:
            self._open(name)
        for tensor, name in index.items():
            if name in self.files and self.place.get(tensor) != name:
                self.problems.append(f"{INDEX} places {tensor} in {name}, which does not have it")
        for tensor in self.place if index else ():
            if tensor not in index:
                self.problems.append(f"{tensor} of {self.place[tensor]} is not in {INDEX}, so clients will not find it")

    def _read_index(self) -> dict[str, str]:
        path = self.folder / INDEX
        if not path.is_file():
            return {}
        try:
            return dict(json.loads(path.read_text())["weight_map"])
        except (ValueError, KeyError, TypeError) as cause:
            self.problems.append(f"{INDEX} is damaged ({cause})")
            return {}

    def _open(self, name: str) -> None:
        if not (self.folder / name).is_file():
            self.problems.append(f"{name} is missing")
            return
        try:
            handle = self._handles[name] = safe_open(self.folder / name, framework="pt")
        except (SafetensorError, OSError) as cause:
            self.problems.append(f"{name} is truncated or damaged ({cause})")
            return
        self.files[name] = list(handle.keys())
        for tensor in self.files[name]:
            if tensor in self.place:
                self.problems.append(f"{tensor} is in {self.place[tensor]} and in {name}")
            self.place[tensor] = name

    def read(self, tensor: str) -> Tensor:
        """One of the tensors in `place`."""
        return self._handles[self.place[tensor]].get_tensor(tensor)

    def module(self, path: str, suffixes: Sequence[str]) -> dict[str, Tensor]:
        """Those of a module's tensors that are there, by suffix."""
        return {suffix: self.read(f"{path}.{suffix}") for suffix in suffixes if f"{path}.{suffix}" in self.place}

    def modules(self, suffixes: Sequence[str]) -> list[str]:
        """Paths of the modules that have a tensor of one of the suffixes."""
        split = (tensor.rpartition(".") for tensor in self.place)
        return list(dict.fromkeys(path for path, _, suffix in split if suffix in suffixes))

    def matrices(self) -> list[str]:
        """Paths of the modules with a floating-point matrix called `weight`: linear layers and embeddings."""
        found = []
        for path in self.modules(("weight",)):
            weight = self.read(f"{path}.weight")
            if weight.dim() == 2 and weight.is_floating_point() and weight.dtype.itemsize > 1:
                found.append(path)
        return found

    @property
    def bytes_on_disk(self) -> int:
        """Size of the files that can be read."""
        return sum((self.folder / name).stat().st_size for name in self.files)


def model_config(folder: Path) -> dict[str, Any]:
    """config.json. CheckpointError where the folder is no checkpoint."""
    path = folder / CONFIG
    if not path.is_file():
        raise CheckpointError(f"{folder} has no {CONFIG}, so it is no checkpoint: give the folder of a finished model")
    try:
        config = json.loads(path.read_text())
    except ValueError as cause:
        raise CheckpointError(f"{path} is damaged ({cause}): download it again") from cause
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds a {type(config).__name__}, not a model's settings: download it again")
    return config


def quantization_config(config: dict[str, Any]) -> dict[str, Any] | None:
    """The part of config.json that tells how the model is quantized; None where it is not."""
    return config.get("quantization_config") or config.get("compression_config")


def model_dtype(config: dict[str, Any]) -> torch.dtype | None:
    """The floating-point type that config.json states for the model, or None."""
    name = str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")
    return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}.get(name)
