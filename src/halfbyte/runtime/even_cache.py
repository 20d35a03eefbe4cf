"""A cache of fixed size whose rows are equally long, so that one position serves all rows and layers.

transformers' static layers each count their tokens. Where a whole batch has as many, one number that whoever decodes
moves on is enough, and a step needs no mask: a fused layer runs RoPE, the write and attention as one op, on a float
cache (kernels/token_attention) and on a packed one, of keys in the model's coordinates (kernels/kv_attention/step.py).
Any other layer uses the cache as it uses transformers' own.
"""

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from transformers import StaticCache
from transformers.cache_utils import StaticLayer

from halfbyte.kernels.kv_attention.step import attend_new_token
from halfbyte.kernels.token_attention import attend_token, fits
from halfbyte.runtime.cache import QuantizedCache
from halfbyte.runtime.one_layer import layer_of
from halfbyte.runtime.static_cache import StaticQuantizedLayer

ATTENTIONS = ("LlamaAttention", "MistralAttention", "Qwen2Attention")
"""transformers' classes that are RoPE over whole heads and softmax attention, and nothing more."""


class EvenLayer(StaticLayer):
    """Keys and values of one layer. `position` is how many tokens there are; nobody here changes it but `reset`."""

    sees_all = True  # `even_cache` makes no others

    def __init__(self, capacity: int, position: Int64[Tensor, ""]) -> None:
        super().__init__(capacity)
        self.cumulative_length = position

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.counters = torch.zeros(self.batch_size * self.num_heads, dtype=torch.int32, device=self.device)

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Put these tokens behind those that there are; all of the cache. The count stays as it was."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        places = torch.arange(key_states.shape[-2], device=self.device) + self.cumulative_length
        self.keys.index_copy_(2, places, key_states)
        self.values.index_copy_(2, places, value_states)
        return self.keys, self.values

    def reset(self) -> None:
        """Forget all tokens, of all layers. What is stored stays where it is, behind the end."""
        self.cumulative_length.zero_()


def even_cache(config: Any, capacity: int, position: Int64[Tensor, ""]) -> StaticCache:
    """A cache for `capacity` tokens in each row that reads its length from `position`; in models whose layers do not all
    see all tokens, transformers' own."""
    cache = StaticCache(config=config, max_cache_len=capacity)
    if _see_all(cache):
        cache.layers[:] = [EvenLayer(capacity, position) for _ in cache.layers]
    return cache


def make_even(cache: QuantizedCache, config: Any, position: Int64[Tensor, ""]) -> None:
    """Let a packed cache of fixed size read its length from `position`, which the caller moves on. Edits its layers."""
    sees_all = _see_all(StaticCache(config=config, max_cache_len=1))
    for layer in cache.layers:
        layer.follow(position, sees_all)


def _see_all(cache: StaticCache) -> bool:
    return all(type(layer) is StaticLayer for layer in cache.layers)


def attends_in_one(attention: Any, cache: Any, length: int) -> bool:
    """Whether `attend` computes what this module would for `length` new tokens."""
    if cache is None or length != 1 or type(attention).__name__ not in ATTENTIONS:
        return False
    layer = layer_of(attention, cache)
    if isinstance(layer, StaticQuantizedLayer):
        return layer.is_initialized and layer.reads_codes and layer.sees_all and layer.turn is None
    if not isinstance(layer, EvenLayer) or not layer.is_initialized:
        return False
    return fits(layer.k_head_dim, layer.v_head_dim)


def attend(
    attention: Any, qkv: Float[Tensor, "batch all"], cache: Any, position_embeddings: tuple[Tensor, Tensor]
) -> Float[Tensor, "batch heads_times_dim"]:
    """What goes into the output projection, from what its linears give for one new token of each row."""
    layer = layer_of(attention, cache)
    cos, sin = (part[:, 0] for part in position_embeddings)
    if isinstance(layer, StaticQuantizedLayer):
        return _attend_packed(attention, qkv, cos, sin, layer)
    position = layer.cumulative_length.view(1)
    return attend_token(qkv, cos, sin, layer.keys, layer.values, position, layer.counters, attention.scaling)


def _attend_packed(attention: Any, qkv: Tensor, cos: Tensor, sin: Tensor, layer: StaticQuantizedLayer) -> Tensor:
    layer.is_empty, rotation = False, None
    if layer.rotations is not None:
        if layer.leads:
            layer.rotations.write((cos[:, None], sin[:, None]), layer.length)
        rotation = layer.rotations.of_packed
    return attend_new_token(
        qkv, cos, sin, layer.key_side.packed, layer.value_side.packed, layer.length.view(1), layer.smoothing,
        attention.scaling, layer.kept, rotation,
    )  # fmt: skip
