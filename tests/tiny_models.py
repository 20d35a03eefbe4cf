"""Every architecture as a random model of two narrow blocks, made in memory; nothing is downloaded.

Weights, biases and norms are all random and signed: ones and zeros would hide a forgotten norm, bias or router.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

VOCABULARY, HIDDEN, INNER, HEADS, HEAD_DIM, BLOCKS = 96, 32, 48, 4, 8, 2

_COMMON = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_SIZES = {
    **_COMMON,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_attention_heads": HEADS,
    "num_hidden_layers": BLOCKS,
    "max_position_embeddings": 64,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
_WIDE_HEADS = {**_GROUPED, "head_dim": 12}  # heads * head_dim differs from hidden_size
_SPARSE = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 1}
_GPT = {**_COMMON, "n_embd": HIDDEN, "n_head": HEADS, "n_layer": BLOCKS, "n_positions": 64, "n_inner": INNER}
_FALCON = {**_COMMON, "hidden_size": HIDDEN, "num_attention_heads": HEADS, "num_hidden_layers": BLOCKS, "bias": True}

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "llama": {**_GROUPED, "attention_bias": True, "mlp_bias": True},
    "mistral": _WIDE_HEADS,
    "qwen2": _GROUPED,
    "qwen3": _WIDE_HEADS,
    "gemma": _WIDE_HEADS,
    "gemma2": _WIDE_HEADS,
    "gemma3_text": _WIDE_HEADS,
    "phi3": _GROUPED,
    "opt": {
        **_COMMON,
        "hidden_size": HIDDEN,
        "ffn_dim": INNER,
        "num_attention_heads": HEADS,
        "num_hidden_layers": BLOCKS,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": HIDDEN,
    },
    "gpt2": _GPT,
    "gptj": {**_GPT, "rotary_dim": 4},
    "gpt_neox": _SIZES,
    "bloom": {**_COMMON, "hidden_size": HIDDEN, "n_head": HEADS, "n_layer": BLOCKS},
    "falcon": _FALCON,
    "mixtral": {**_GROUPED, "num_local_experts": 5, "num_experts_per_tok": 2},
    "qwen2_moe": {**_GROUPED, **_SPARSE, "shared_expert_intermediate_size": 40},
    "qwen3_moe": {**_WIDE_HEADS, **_SPARSE},
    "bert": _SIZES,
}

# What a configuration can change about the wiring of a block: name -> (model type, overrides).
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in CONFIGURATIONS},
    "opt-without-bias": ("opt", {"enable_bias": False}),
    "opt-post-norm": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 16}),
    "opt-gelu": ("opt", {"activation_function": "gelu"}),
    "gpt2-relu": ("gpt2", {"activation_function": "relu"}),
    "gptj-relu": ("gptj", {"activation_function": "relu"}),
    "gpt_neox-relu": ("gpt_neox", {"hidden_act": "relu"}),
    "gpt_neox-serial": ("gpt_neox", {"use_parallel_residual": False, "attention_bias": False}),
    "bloom-norm-to-residual": ("bloom", {"apply_residual_connection_post_layernorm": True}),
    "falcon-relu": ("falcon", {"activation": "relu"}),
    "falcon-two-norms": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-one-norm": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1}),
    "falcon-serial": ("falcon", {"parallel_attn": False, "multi_query": False, "alibi": True}),
    "qwen2_moe-some-dense": ("qwen2_moe", {"mlp_only_layers": [0]}),
    "qwen3_moe-some-dense": ("qwen3_moe", {"mlp_only_layers": [1]}),
    "bert-relu": ("bert", {"hidden_act": "relu"}),
}


def tiny(model_type: str, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> Any:
    """A random transformers model in evaluation mode, the same for the same seed. `overrides` change its configuration.

    On the meta device (`with torch.device("meta")`) it has names and shapes alone.
    """
    config = AutoConfig.for_model(model_type, **{**CONFIGURATIONS[model_type], **overrides})
    family = AutoModelForMaskedLM if model_type == "bert" else AutoModelForCausalLM
    model = family.from_config(config).to(dtype).eval().requires_grad_(False)
    if dtype == torch.float64:
        model.set_experts_implementation("eager")  # torch has no grouped_mm in float64
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                continue
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.dim() > 1:
                drawn = drawn * parameter.shape[-1] ** -0.5
            elif name == "weight":
                drawn = 1 + drawn / 4
            parameter.copy_(drawn)
    return model


def tokens(sequences: int = 2, length: int = 11, seed: int = 0) -> Tensor:
    """Random token ids, [sequences, length]."""
    return torch.randint(3, VOCABULARY, (sequences, length), generator=torch.Generator().manual_seed(seed))


class Float64Throughout(TorchFunctionMode):
    """Within it, what model code computes in float32 for stability (norms, softmax, routers) is float64.

    So a float64 model is float64 to the last digit, and a difference of 1e-9 is a mistake, not a rounding.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        wider: list[Any] = [torch.float64 if argument is torch.float32 else argument for argument in args]
        named = {key: torch.float64 if value is torch.float32 else value for key, value in (kwargs or {}).items()}
        return (torch.Tensor.double if func is torch.Tensor.float else func)(*wider, **named)


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    """What a float64 model answers, computed in float64 throughout."""
    with Float64Throughout():
        return model(input_ids=ids).logits
