"""Models that are only a shape: a config.json of a known architecture, and weights drawn at random when they are read.

For measuring time and memory, which do not depend on what the weights say.
"""

import json
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfbyte.errors import ModelError
from halfbyte.models.load import Skeleton, WeightFiles

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": LLAMA
    | {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    | {"num_key_value_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096},
    "llama-2-13b": LLAMA
    | {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
    | {"num_key_value_heads": 40, "vocab_size": 32000, "max_position_embeddings": 4096},
    "llama-3-8b": LLAMA
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 500000.0},
}
"""config.json of models that people know, by name."""

SPREAD = 0.02  # of matrices; vectors are ones, biases zeros


class RandomWeights(WeightFiles):
    """Tensors of every name that a skeleton asks for, drawn anew at each reading, the same ones every time."""

    def __init__(self, bones: Skeleton, device: torch.device, dtype: torch.dtype) -> None:
        self.folder = bones.folder
        self._shapes = {bones.disk_path(name): tuple(part.shape) for name, part in bones.model.state_dict().items()}
        self._device, self._dtype = device, dtype

    def __contains__(self, name: object) -> bool:
        return name in self._shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def read(self, name: str) -> Tensor:
        """A matrix of normal numbers, or a vector of ones or zeros."""
        shape = self._shapes[name]
        if len(shape) < 2:
            fill = torch.zeros if name.endswith("bias") else torch.ones
            return fill(shape, device=self._device, dtype=self._dtype)
        generator = torch.Generator(self._device).manual_seed(hash(shape) % 2**31)
        return torch.randn(shape, device=self._device, dtype=self._dtype, generator=generator).mul_(SPREAD)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:  # noqa: ARG002 - all are alike
        return self._dtype

    def close(self) -> None:
        """There are no files."""


def write_shape(name: str, folder: Path, layers: int | None = None) -> Path:
    """A folder with the config.json of this shape and no weights. ModelError for a shape that is not known."""
    if name not in SHAPES:
        close = get_close_matches(name, SHAPES, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ModelError(
            f"{name!r} is no folder and no shape{hint}: give a model's folder, or one of {', '.join(SHAPES)}"
        )
    config = SHAPES[name] | ({} if layers is None else {"num_hidden_layers": layers})
    (folder / "config.json").write_text(json.dumps(config))
    return folder
