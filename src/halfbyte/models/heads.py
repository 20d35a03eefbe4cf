"""How many attention heads a model's configuration says it has, and which of its modules attend."""

from typing import Any

from torch import nn


def head_counts(config: Any) -> tuple[int, int, int]:
    """Query heads, key-value heads and head dimension of a transformers configuration of one text model."""
    heads = int(config.num_attention_heads)
    kv_heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_kv_heads", None) or heads
    # Falcon-7B's config.json leaves `num_kv_heads` out and means one.
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        kv_heads = 1
    return heads, int(kv_heads), int(getattr(config, "head_dim", None) or config.hidden_size // heads)


def attentions(module: nn.Module) -> dict[str, Any]:
    """The modules of a model, or of one block, that attend to a cache, by name: they know the index of their layer."""
    return {
        name: found
        for name, found in module.named_modules()
        if isinstance(getattr(found, "layer_idx", None), int) and "Attention" in type(found).__name__
    }
