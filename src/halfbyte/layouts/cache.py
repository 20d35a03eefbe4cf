"""What a checkpoint says of its cache: the format in `quantization_config`, shifts and scales among the tensors.

    quantization_config.kv_cache      the fields of CacheFormat
    <attention>.cache_key_shift       float32 [kv_heads, head_dim], and likewise cache_key_scale, cache_value_shift and
                                      cache_value_scale; absent where nothing is moved

Only our own quant_method has them. What reads the weights alone gets the model with a cache of its own kind.
"""

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from halfbyte.errors import CheckpointError
from halfbyte.numerics.cache import Smoothing
from halfbyte.scheme import CacheFormat

KEY = "kv_cache"
NAMES = ("key_shift", "key_scale", "value_shift", "value_scale")
SUFFIXES = tuple(f"cache_{name}" for name in NAMES)


def write_smoothing(smoothing: Smoothing) -> dict[str, Tensor]:
    """The tensors of one attention by suffix, contiguous, on the CPU."""
    found = {f"cache_{name}": getattr(smoothing, name) for name in NAMES}
    return {suffix: x.to("cpu", torch.float32).contiguous() for suffix, x in found.items() if x is not None}


def read_smoothing(tensors: Mapping[str, Tensor], heads: int, dim: int) -> Smoothing:
    """The inverse of `write_smoothing`. CheckpointError for other shapes, and for scales that are not positive."""
    for suffix, x in tensors.items():
        if (
            tuple(x.shape) != (heads, dim)
            or not torch.isfinite(x).all()
            or ("scale" in suffix and bool((x <= 0).any()))
        ):
            raise CheckpointError(
                f"{suffix} is {list(x.shape)} between {float(x.min()):g} and {float(x.max()):g}, and must be finite "
                f"[{heads}, {dim}], scales above 0: config.json and the tensors do not belong together, or are damaged"
            )
    return Smoothing(**{suffix.removeprefix("cache_"): x for suffix, x in tensors.items()})


def cache_entry(format: CacheFormat | None) -> dict[str, Any]:
    """What `quantization_config` says of the cache; nothing where it stays as it is."""
    return {} if format is None else {KEY: format.model_dump(mode="json")}


def cache_format(config: Mapping[str, Any]) -> CacheFormat | None:
    """The cache's format that a `quantization_config` asks for. CheckpointError for what this version does not know."""
    if config.get(KEY) is None:
        return None
    try:
        return CacheFormat.model_validate(config[KEY])
    except ValidationError as cause:
        raise CheckpointError(
            f"config.json asks for a cache that halfbyte does not know ({config[KEY]}): use the version that wrote it"
        ) from cause
