"""What the tests of caches share: formats small enough for tiny heads, and decoding one token at a time."""

from typing import Any

import torch
from torch import Tensor

from halfbyte.runtime.cache import QuantizedCache
from halfbyte.runtime.cache_plan import attach_cache, cache_plan, named_format, new_cache
from halfbyte.scheme import CacheFormat

FORMATS: dict[str, CacheFormat] = {
    **{
        name: named_format(name)
        for name in (
            "int4",
            "int2",
            "k8v3-s2-w3",
            "int4-sym",
            "int4-present",
            "int4-present-w3",
            "int3-prerope-w2",
            "int3-rot-w2",
        )
    },
    "int4-e1": CacheFormat(key_bits=3, value_bits=2, edge_layers=1, edge_bits=4),
    "kivi": CacheFormat(keys="channel", block=4, group_size=4, window=5),
    "kivi-s3": CacheFormat(key_bits=2, value_bits=2, keys="channel", block=4, group_size=4, sinks=3, rope="before"),
}


def with_cache(model: Any, format: CacheFormat) -> Any:
    """The model, which now generates through a cache of this format."""
    attach_cache(model, cache_plan(model, format))
    return model


@torch.no_grad()
def stepwise(model: Any, ids: Tensor, cache: QuantizedCache | None = None, **inputs: Any) -> Tensor:
    """The logits of every token, each decoded by a call of its own through the model's cache."""
    cache = new_cache(model) if cache is None else cache
    parts = []
    for place in range(ids.shape[1]):
        step = {
            key: value[:, : cache.get_seq_length() + 1] if key == "attention_mask" else value[:, place : place + 1]
            for key, value in inputs.items()
        }
        parts.append(model(input_ids=ids[:, place : place + 1], past_key_values=cache, use_cache=True, **step).logits)
    return torch.cat(parts, dim=1)
