"""From a folder or hub name to a model that can answer, quantized or not, and its tokenizer."""

from pathlib import Path
from typing import Any

import torch
import transformers

from halfbyte.errors import CheckpointError
from halfbyte.models.load import WeightFiles, locate, model_class, read_config

Pair = tuple[Any, Any]
"""A transformers model and its tokenizer."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


def load(
    path_or_name: str | Path, *, device: str = "auto", dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> Pair:
    """A transformers model in evaluation mode and its tokenizer.

    `device`: auto is the first GPU, or the CPU without one. `dtype`: float32 on the CPU and the checkpoint's own on a
    GPU, unless given. CheckpointError where the folder is damaged, unfinished, or not what its config.json says.
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
    config = read_config(folder, trust_remote_code=trust_remote_code)
    place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    if dtype is None and place.type == "cpu":
        dtype = torch.float32
    WeightFiles(folder)
    model, report = model_class(config).from_pretrained(
        folder, dtype=dtype or "auto", trust_remote_code=trust_remote_code, output_loading_info=True
    )
    absent = sorted(report["missing_keys"]) + sorted(str(name) for name in report["mismatched_keys"])
    if absent:
        raise CheckpointError(f"{folder} lacks {', '.join(absent[:5])}, which its config.json asks for")
    return model.to(place).eval().requires_grad_(False)


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model's folder. CheckpointError where it has none, or one that cannot be read."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise CheckpointError(f"{folder} has no tokenizer: copy tokenizer.json and tokenizer_config.json into it")
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, OSError) as cause:
        raise CheckpointError(f"the tokenizer in {folder} cannot be read: {cause}") from cause
