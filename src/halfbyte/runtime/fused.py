"""Fused layers: the linears of a transformer layer, its norms, activations and sums as few passes over memory.

ZeroQuant (Yao et al., 2022) — arXiv 2206.01861, section 4.3: activations are quantized where they are made, by the norm
or activation function before a linear, and products are scaled, and summed with what skips the layer, where they end.
So no pass over memory serves quantization alone but the one after attention.

`fuse` takes a layer's linears out of transformers' modules and leaves stand-ins there; fused_layers.py says what runs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.errors import ModelError
from halfbyte.numerics.grid import Grid
from halfbyte.numerics.quantized import QuantizedWeight
from halfbyte.runtime.fused_layers import Columns, FusedLinears, Linear, bert, gpt_neox, llama
from halfbyte.runtime.integer_linear import IntegerLinear
from halfbyte.runtime.linear import UNPREPARED, QuantizedLinear
from halfbyte.runtime.online import rotation_of
from halfbyte.scheme import PerChannel, PerTensor


@dataclass(frozen=True, slots=True)
class Parts:
    """What runs in place of a layer's forward, and where in it are the linears that read the same input."""

    forward: Callable[..., Tensor]
    qkv: tuple[str, ...]
    out: str
    up: tuple[str, ...]
    down: str


LLAMA = Parts(
    llama,
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    out="self_attn.o_proj",
    up=("mlp.gate_proj", "mlp.up_proj"),
    down="mlp.down_proj",
)
GPT_NEOX = Parts(
    gpt_neox,
    qkv=("attention.query_key_value",),
    out="attention.dense",
    up=("mlp.dense_h_to_4h",),
    down="mlp.dense_4h_to_h",
)
BERT = Parts(
    bert,
    qkv=("attention.self.query", "attention.self.key", "attention.self.value"),
    out="attention.output.dense",
    up=("intermediate.dense",),
    down="output.dense",
)
LAYERS = {
    "LlamaDecoderLayer": LLAMA,
    "MistralDecoderLayer": LLAMA,
    "Qwen2DecoderLayer": LLAMA,
    "Qwen3DecoderLayer": LLAMA,
    "GPTNeoXLayer": GPT_NEOX,
    "BertLayer": BERT,
}
"""By the name of transformers' class."""


def fuse(model: nn.Module) -> int:
    """Fuse every layer that has quantized linears; how many there were. Edits in place, for inference alone.

    Such a layer must have weights alone quantized; or symmetric weights and symmetric 8-bit inputs, per token or static,
    without outlier split. Its query, key and value may all be left out of that. The model computes
    what it computed before, to the rounding of its dtype. ModelError, before anything is changed, names what does not
    fit.
    """
    known = {
        path: layer
        for path, layer in model.named_modules()
        if type(layer).__name__ in LAYERS and not hasattr(layer, "fused")
    }
    if not known:
        raise ModelError(
            f"{type(model).__name__} has no layer left that can be fused: there are fused forms of {', '.join(LAYERS)}"
        )
    layers = {path: layer for path, layer in known.items() if _is_quantized(layer)}
    if not layers:
        raise ModelError(f"no layer of this {type(model).__name__} is quantized: quantize it first")
    for path, layer in layers.items():
        _check(path, layer, LAYERS[type(layer).__name__])
    for layer in layers.values():
        _fuse(layer, LAYERS[type(layer).__name__])
    return len(layers)


def _is_quantized(module: nn.Module) -> bool:
    return any(isinstance(part, Linear) for part in module.modules())


def _check(path: str, layer: nn.Module, parts: Parts) -> None:
    """ModelError unless the layer can be fused."""
    if hasattr(layer, "crossattention"):
        raise ModelError(f"{path} reads an encoder, which no fused layer does: leave this model as it is")
    reads = parts.qkv if any(_is_quantized(layer.get_submodule(name)) for name in parts.qkv) else ()
    for name in (*reads, parts.out, *parts.up, parts.down):
        if obstacle := _obstacle(layer.get_submodule(name)):
            raise ModelError(f"{path}.{name} {obstacle}")
    for names in (reads, parts.up):
        linears = _linears(layer, names)
        if any(rotation_of(linear) is not None for linear in linears):
            raise ModelError(
                f"{', '.join(names)} of {path} read their input rotated at run time, which only output linears can when "
                "they are fused: load without fusing"
            )
        if len({_kind(linear) for linear in linears}) > 1:
            raise ModelError(
                f"{', '.join(names)} of {path} are not of one format, and are fused to one weight: give them the same "
                "in the recipe"
            )
        integer = [linear for linear in linears if isinstance(linear, IntegerLinear)]
        scales = {float(linear.input_scale) for linear in integer if linear.input_scale is not None}
        if len(scales) > 1:
            raise ModelError(
                f"{', '.join(names)} of {path} read one input with the scales {sorted(scales)}: calibrate them "
                "together, or choose `granularity: token`"
            )


def _kind(linear: Linear) -> tuple[object, ...]:
    """Linears of one kind can be one linear."""
    if isinstance(linear, QuantizedLinear):
        return QuantizedLinear, str(linear.format), linear.group_size, linear._activations.dtype
    return IntegerLinear, str(linear.format), str(linear.activations), linear._dtype.dtype


def _obstacle(linear: nn.Module) -> str | None:
    """Why a linear cannot be part of a fused layer, with the remedy; None where it can."""
    if not isinstance(linear, Linear):
        return f"is a {type(linear).__name__}: quantize it, or load without fusing"
    if linear.kernel == UNPREPARED:
        return "is not prepared: call prepare with the dtype of the activations"
    if isinstance(linear, QuantizedLinear):
        return None
    inputs = linear.activations
    if linear.weight_zero_point is not None:
        return (
            f"has a weight of {linear.format} with zero points: choose a symmetric convention, or load without fusing"
        )
    if inputs.outliers is not None or not inputs.symmetric or inputs.bits != 8 or inputs.clip < 1:
        return f"has inputs of {inputs}, not symmetric ones of 8 bits without split or clip: load without fusing"
    if inputs.dynamic and inputs.granularity != "token":
        return f"has inputs of {inputs}, not per token or static: choose `granularity: token`"
    return None


def _linears(layer: nn.Module, names: Sequence[str]) -> list[Linear]:
    found = [layer.get_submodule(name) for name in names]
    return [linear for linear in found if isinstance(linear, Linear)]


def _fuse(layer: Any, parts: Parts) -> None:
    qkv = _taken(layer, parts.qkv) if _linears(layer, parts.qkv) else None
    out, up, down = _taken(layer, (parts.out,)), _taken(layer, parts.up), _taken(layer, (parts.down,))
    layer.fused = FusedLinears(qkv, out, up, down)
    layer.forward = MethodType(parts.forward, layer)  # the layer keeps its class, by which transformers finds it


def _taken(layer: nn.Module, names: Sequence[str]) -> Linear:
    """The linears of these names as one; in their places are stand-ins, so that the weights are in memory once."""
    linears, first = _linears(layer, names), 0
    if len(linears) == 1:
        layer.set_submodule(names[0], nn.Identity())
        return linears[0]
    for name, linear in zip(names, linears, strict=True):
        layer.set_submodule(name, Columns(first, linear.out_features))
        first += linear.out_features
    return _concatenated(linears)


def _concatenated(linears: Sequence[Linear]) -> Linear:
    """One linear that gives what these give, side by side."""
    bias = None
    if any(linear.bias is not None for linear in linears):
        bias = torch.cat([_bias(linear) for linear in linears])
    integer = [linear for linear in linears if isinstance(linear, IntegerLinear)]
    if integer:
        return _integers(integer, bias)
    return _weights([linear for linear in linears if isinstance(linear, QuantizedLinear)], bias)


def _bias(linear: Linear) -> Tensor:
    if linear.bias is not None:
        return linear.bias
    dtype = linear._dtype.dtype if isinstance(linear, IntegerLinear) else linear._activations.dtype
    return torch.zeros(linear.out_features, dtype=dtype, device=linear.weight_scale.device)


def _integers(linears: Sequence[IntegerLinear], bias: Tensor | None) -> IntegerLinear:
    first, outs = linears[0], sum(linear.out_features for linear in linears)
    tensors = {}
    for name in ("weight", "weight_amplifier", "weight_reach"):
        if getattr(first, name) is not None:
            tensors[name] = torch.cat([linear.get_buffer(name) for linear in linears])
    words = [words for linear in linears if (words := linear.stored_words()) is not None]
    if words:
        tensors["weight_packed"] = torch.cat(words)
    grids = [
        linear.weight_scale.view(-1, 1) if linear.weight_scale.dim() == 1 else linear.weight_scale for linear in linears
    ]
    rows = [grid.expand(linear.out_features, -1) for linear, grid in zip(linears, grids, strict=True)]
    tensors["weight_scale"] = torch.cat(rows)
    if first.weight_shape is not None:
        tensors["weight_shape"] = first.weight_shape.new_tensor([outs, first.in_features])
    if first.input_scale is not None:
        tensors["input_scale"] = first.input_scale
    whole_tensor = isinstance(first.format.granularity, PerTensor)
    format = first.format.model_copy(update={"granularity": PerChannel()}) if whole_tensor else first.format
    whole = IntegerLinear(first.in_features, outs, format, first.activations, bias=bias is not None, device="meta")
    return whole.fill(tensors, bias).prepare(first._dtype.dtype)


def _weights(linears: Sequence[QuantizedLinear], bias: Tensor | None) -> QuantizedLinear:
    first = linears[0]
    found = [linear.stored() for linear in linears]
    points = [part.grid.zero_points for part in found if part.grid.zero_points is not None]
    grid = Grid(torch.cat([part.grid.scales for part in found]), torch.cat(points) if points else None)
    whole = QuantizedWeight(torch.cat([part.codes for part in found]), grid, found[0].format)
    return QuantizedLinear.from_weight(whole, bias).prepare(first._activations.dtype)
