"""What runs in a fused layer: codes from norms and activations, integer products, sums where products end.

    a layer of transformers                        here
    norm of x                                      norm and codes in one pass
    linears that read it                           one integer product of their concatenated weights
    rotations, cache, attention                    the model's own module: its linears are stand-ins that hand out the
                                                   product's columns, and hand back what attention gives as it is; a
                                                   step on an even cache is one launch (even_cache.py)
    output linear, then its sum with x             codes of each token; product, scales, bias and x in one pass; where
                                                   an RMS norm follows, it adds x
    gelu, or silu(gate) · up                       activation and codes in one pass

A static input has its scale beforehand: there the model's own norm or activation runs, and then one pass to codes. Where
weights alone are quantized there are no codes: only the products are joined.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from halfbyte.kernels.token_quantize import (
    Approximation,
    QuantizedTokens,
    gelu_quantize,
    layer_norm_quantize,
    quantize_static,
    quantize_tokens,
    rms_norm_quantize,
    silu_mul_quantize,
)
from halfbyte.runtime.codes import Codes
from halfbyte.runtime.even_cache import attend, attends_in_one
from halfbyte.runtime.integer_linear import IntegerLinear
from halfbyte.runtime.linear import QuantizedLinear
from halfbyte.runtime.online import rotation_of

Linear = IntegerLinear | QuantizedLinear

Read = Codes | Float[Tensor, "tokens in"]
"""What a linear reads: codes, or tokens as they are where its weight alone is quantized."""

# transformers' and torch's classes of activation functions that have a kernel; any other runs as it is
SILU = ("SiLUActivation", "SiLU")
GELU: dict[str, Approximation] = {
    "GELUActivation": "none",
    "NewGELUActivation": "tanh",
    "FastGELUActivation": "tanh",
    "GELUTanh": "tanh",
}


class FusedLinears(nn.Module):
    """The products of a layer. `qkv` is None where attention multiplies its input itself."""

    def __init__(self, qkv: Linear | None, out: Linear, up: Linear, down: Linear) -> None:
        super().__init__()
        self.qkv, self.out, self.up, self.down = qkv, out, up, down


class Columns(nn.Module):
    """Stands where a linear stood that is part of a larger one: its columns of the product."""

    def __init__(self, first: int, count: int) -> None:
        super().__init__()
        self.first, self.count = first, count

    def forward(self, product: Float[Tensor, "*leading all"]) -> Float[Tensor, "*leading own"]:
        return product.narrow(-1, self.first, self.count)

    def extra_repr(self) -> str:
        return f"{self.first}..{self.first + self.count - 1}"


def llama(layer: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    """A layer of Llama, Mistral, Qwen2 or Qwen3."""
    linears, x, norm = layer.fused, hidden_states.flatten(0, 1), layer.input_layernorm
    read = norm(x) if linears.qkv is None else product(after_rms_norm(norm, x, linears.qkv)[0], linears.qkv, x.dtype)
    cache = kwargs.get("past_key_values")
    if linears.qkv is not None and attends_in_one(layer.self_attn, cache, hidden_states.shape[1]):
        attended = attend(layer.self_attn, read, cache, kwargs["position_embeddings"])
    else:
        attended, _ = layer.self_attn(_sequences(read, hidden_states), attention_mask=attention_mask, **kwargs)
        attended = attended.flatten(0, 1)
    attended = product(of_tokens(attended, linears.out), linears.out, x.dtype)
    read, x = after_rms_norm(layer.post_attention_layernorm, attended, linears.up, residual=x)
    gated = after_gate(layer.mlp, product(read, linears.up, x.dtype), linears.down)
    x = product(gated, linears.down, x.dtype, residual=x)
    return _sequences(x, hidden_states)


def gpt_neox(layer: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    """A layer of GPT-NeoX, whose MLP reads the layer's input or, without `use_parallel_residual`, the first sum."""
    linears, x, norm = layer.fused, hidden_states.flatten(0, 1), layer.input_layernorm
    read = norm(x) if linears.qkv is None else product(after_layer_norm(norm, x, linears.qkv), linears.qkv, x.dtype)
    attended, _ = layer.attention(_sequences(read, hidden_states), attention_mask=attention_mask, **kwargs)
    first = product(of_tokens(attended.flatten(0, 1), linears.out), linears.out, x.dtype, residual=x)
    second = x if layer.use_parallel_residual else first
    inner = product(after_layer_norm(layer.post_attention_layernorm, second, linears.up), linears.up, x.dtype)
    codes = after_activation(layer.mlp.act, layer.mlp, inner, linears.down)
    return _sequences(product(codes, linears.down, x.dtype, residual=first), hidden_states)


def bert(
    layer: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, *_encoder: Any, **kwargs: Any
) -> Tensor:
    """A layer of BERT, whose norms follow the sums. It reads no encoder, as BERT itself without cross-attention."""
    linears, x = layer.fused, hidden_states.flatten(0, 1)
    read = x if linears.qkv is None else product(of_tokens(x, linears.qkv), linears.qkv, x.dtype)
    attended, _ = layer.attention.self(_sequences(read, hidden_states), attention_mask=attention_mask, **kwargs)
    x = product(of_tokens(attended.flatten(0, 1), linears.out), linears.out, x.dtype, residual=x)
    x = layer.attention.output.LayerNorm(x)
    inner = product(of_tokens(x, linears.up), linears.up, x.dtype)
    codes = after_activation(layer.intermediate.intermediate_act_fn, layer.intermediate, inner, linears.down)
    x = product(codes, linears.down, x.dtype, residual=x)
    return _sequences(layer.output.LayerNorm(x), hidden_states)


def _sequences(rows: Float[Tensor, "tokens out"], like: Float[Tensor, "batch length in"]) -> Tensor:
    return rows.view(*like.shape[:2], -1)


def product(
    read: Read, linear: Linear, dtype: torch.dtype, residual: Float[Tensor, "tokens out"] | None = None
) -> Float[Tensor, "tokens out"]:
    """What `linear` gives for what it reads, plus the residual; of codes rounded once."""
    if isinstance(linear, QuantizedLinear):
        assert isinstance(read, Tensor)
        return linear(read) if residual is None else residual + linear(read)
    assert linear.product is not None
    assert isinstance(read, Codes)
    return linear.product(read, dtype, linear.bias, residual)


def of_found(found: QuantizedTokens) -> Codes:
    """Symmetric codes with a scale for each token."""
    return Codes(found.codes, found.scales[:, None], None)


def finds_scales(linear: Linear) -> bool:
    """Whether its tokens become codes by scales that are found at run time."""
    return isinstance(linear, IntegerLinear) and linear.input_scale is None


def of_tokens(x: Float[Tensor, "tokens in"], linear: Linear) -> Read:
    """x as `linear` reads it; rotated, where its weight expects that."""
    if isinstance(linear, QuantizedLinear):
        return x  # its own hook rotates
    rotation = rotation_of(linear)
    if linear.input_scale is not None:
        x = x if rotation is None else rotation(x)
        return Codes(quantize_static(x, linear.input_scale), linear.input_scale[None], None)
    return of_found(quantize_tokens(x)) if rotation is None else rotation.codes(x)


def after_rms_norm(
    norm: Any, x: Float[Tensor, "tokens in"], linear: Linear, residual: Float[Tensor, "tokens in"] | None = None
) -> tuple[Read, Float[Tensor, "tokens in"]]:
    """norm(x + residual) as `linear` reads it, and the sum."""
    if not finds_scales(linear):
        x = x if residual is None else residual + x
        return of_tokens(norm(x), linear), x
    found, x = rms_norm_quantize(x, norm.weight, norm.variance_epsilon, residual, rounds_before_weight=True)
    return of_found(found), x


def after_layer_norm(norm: Any, x: Float[Tensor, "tokens in"], linear: Linear) -> Read:
    """norm(x) as `linear` reads it."""
    if not finds_scales(linear):
        return of_tokens(norm(x), linear)
    return of_found(layer_norm_quantize(x, norm.weight, norm.bias, norm.eps)[0])


def after_gate(mlp: Any, inner: Float[Tensor, "tokens gates_and_ups"], linear: Linear) -> Read:
    """act(gate) · up as `linear` reads it. `mlp`: the model's own, between stand-ins."""
    if not finds_scales(linear) or rotation_of(linear) is not None or type(mlp.act_fn).__name__ not in SILU:
        return of_tokens(mlp(inner), linear)
    return of_found(silu_mul_quantize(inner))


def after_activation(activation: nn.Module, mlp: nn.Module, inner: Float[Tensor, "tokens in"], linear: Linear) -> Read:
    """activation(inner) as `linear` reads it. `mlp`: the model's own module around it, between stand-ins."""
    approximate = GELU.get(type(activation).__name__)
    if not finds_scales(linear) or rotation_of(linear) is not None or approximate is None:
        return of_tokens(mlp(inner), linear)
    return of_found(gelu_quantize(inner, approximate=approximate))
