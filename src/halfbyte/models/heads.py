"""How many attention heads a model's configuration says it has."""

from typing import Any


def head_counts(config: Any) -> tuple[int, int, int]:
    """Query heads, key-value heads and head dimension of a transformers configuration of one text model."""
    heads = int(config.num_attention_heads)
    kv_heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_kv_heads", None) or heads
    # Falcon-7B's config.json leaves `num_kv_heads` out and means one.
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        kv_heads = 1
    return heads, int(kv_heads), int(getattr(config, "head_dim", None) or config.hidden_size // heads)
