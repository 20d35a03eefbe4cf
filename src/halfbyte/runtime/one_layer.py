"""A layer's own part of a cache: what one layer of a model is given, so that it is compiled once for all of them."""

from typing import Any

from torch import Tensor, nn

from halfbyte.models.heads import attentions


class OneLayer:
    """One layer of a cache, whatever index it is asked by: what is compiled for one layer of a model then serves all."""

    def __init__(self, cache: Any, layer: Any) -> None:
        self.cache, self.layer = cache, layer

    def update(self, key_states: Tensor, value_states: Tensor, _index: int, *args: Any, **kwargs: Any) -> Any:
        return self.layer.update(key_states, value_states, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)


def layer_of(attention: Any, cache: Any) -> Any:
    """This module's layer of the cache; None where it has none."""
    if isinstance(cache, OneLayer):
        return cache.layer
    return cache.layers[attention.layer_idx] if attention.layer_idx < len(cache.layers) else None


def own_layer(part: nn.Module, cache: Any) -> OneLayer | None:
    """The layer of the cache that all attention within this part of a model uses; None where that is not one."""
    indices = {module.layer_idx for module in attentions(part).values()}
    if len(indices) != 1 or not max(indices) < len(cache.layers):
        return None
    return OneLayer(cache, cache.layers[indices.pop()])
