import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from closeness import relative_error
from halfbyte.errors import ModelError
from halfbyte.numerics.activations import InputQuantizer
from halfbyte.numerics.grid import fit
from halfbyte.numerics.integer_scales import on_integer_grid
from halfbyte.numerics.quantized import QuantizedModule, round_to_grid
from halfbyte.runtime import fused_layers
from halfbyte.runtime.fused import fuse
from halfbyte.runtime.integer_linear import IntegerLinear
from halfbyte.runtime.linear import QuantizedLinear
from halfbyte.runtime.online import add_rotations
from halfbyte.scheme import (
    ActivationFormat,
    Convention,
    FloatScale,
    IntegerScale,
    OnlineHadamard,
    OutlierSplit,
    PerChannel,
    PerGroup,
    PerTensor,
    WeightFormat,
)
from tiny_models import tiny, tokens

BYTES = WeightFormat(
    bits=8, convention=Convention.ODYSSEY, granularity=PerChannel(), scale=FloatScale(dtype="float32"), stored="bytes"
)
PER_TOKEN = ActivationFormat()
STATIC = ActivationFormat(granularity="tensor", dynamic=False)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-one-kv-head": ("llama", {"num_key_value_heads": 1, "attention_bias": False, "mlp_bias": False}),
    "llama-gelu": ("llama", {"hidden_act": "gelu"}),
    "mistral": ("mistral", {"sliding_window": 5}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "gpt_neox": ("gpt_neox", {}),
    "gpt_neox-serial": ("gpt_neox", {"use_parallel_residual": False, "attention_bias": False}),
    "gpt_neox-tanh": ("gpt_neox", {"hidden_act": "gelu_new"}),
    "gpt_neox-relu": ("gpt_neox", {"hidden_act": "relu"}),
    "bert": ("bert", {}),
    "bert-relu": ("bert", {"hidden_act": "relu"}),
}
# A code that a last bit tips over a tie changes what follows by a step of its grid; the sums between are in float32.
ROUNDING = 2e-4


def integer_linear(
    linear: nn.Linear, activations: ActivationFormat, format: WeightFormat = BYTES, scale: float = 1 / 16
) -> IntegerLinear:
    weight = linear.weight.float()
    rounded = on_integer_grid(lambda w, f: round_to_grid(w, fit(w, f), f), weight, format, activations)
    module = QuantizedModule(
        rounded,
        InputQuantizer(activations, None if activations.dynamic else torch.tensor([scale])),
    )
    return IntegerLinear.from_module(module, linear.bias).prepare(linear.weight.dtype)


def quantized(
    variant: str,
    activations: ActivationFormat = PER_TOKEN,
    dtype: torch.dtype = torch.float32,
    but: Callable[[str], bool] = lambda _path: False,
    **overrides: Any,
) -> Any:
    """A tiny model whose blocks multiply integers, apart from the linears that `but` names."""
    model_type, changes = VARIANTS[variant]
    model = tiny(model_type, dtype, **{**changes, **overrides})
    for path, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and ".layer" in path and not but(path):
            model.set_submodule(path, integer_linear(linear, activations))
    return model


def weight_only(variant: str, format: WeightFormat, dtype: torch.dtype = torch.float32) -> Any:
    """A tiny model of which the weights alone are quantized."""
    model_type, changes = VARIANTS[variant]
    model = tiny(model_type, dtype, **changes)
    for path, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and ".layer" in path:
            weight = linear.weight.float()
            rounded = round_to_grid(weight, fit(weight, format), format)
            model.set_submodule(path, QuantizedLinear.from_weight(rounded, linear.bias).prepare(dtype))
    return model


def fused(model: Any) -> Any:
    twin = copy.deepcopy(model)
    assert fuse(twin) == 2
    return twin


@torch.no_grad()
def answers(model: Any, **inputs: Any) -> Tensor:
    return model(**{"input_ids": tokens(3, 11), **inputs}).logits


@pytest.mark.parametrize("activations", [PER_TOKEN, STATIC], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_fused_model_answers_as_before(variant, activations):
    model = quantized(variant, activations)
    assert relative_error(answers(fused(model)), answers(model)) <= ROUNDING


@pytest.mark.parametrize("convention", [Convention.GPTQ, Convention.ASYMMETRIC])
@pytest.mark.parametrize("variant", VARIANTS)
def test_where_weights_alone_are_quantized_the_products_are_joined(variant, convention):
    format = WeightFormat(convention=convention, granularity=PerGroup(size=8), scale=FloatScale(dtype="float32"))
    model = weight_only(variant, format)
    twin = fused(model)
    assert relative_error(answers(twin), answers(model)) <= 1e-6
    before, after = (sum(isinstance(part, QuantizedLinear) for part in each.modules()) for each in (model, twin))
    assert after < before or "neox" in variant


@pytest.mark.parametrize(
    "format",
    [
        WeightFormat(bits=4, granularity=PerGroup(size=8), scale=FloatScale(dtype="float32")),
        WeightFormat(bits=4, granularity=PerGroup(size=8), scale=IntegerScale()),
        WeightFormat(bits=8, granularity=PerTensor(), scale=FloatScale(dtype="float32")),
    ],
    ids=str,
)
@pytest.mark.parametrize("variant", ["llama", "gpt_neox", "bert"])
def test_any_symmetric_weight_can_be_in_a_fused_layer(variant, format):
    model_type, changes = VARIANTS[variant]
    model = tiny(model_type, torch.float32, **changes)
    for path, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and ".layer" in path:
            model.set_submodule(path, integer_linear(linear, PER_TOKEN, format))
    assert relative_error(answers(fused(model)), answers(model)) <= ROUNDING


@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_is_masked_as_before(variant):
    model, mask = quantized(variant), torch.ones(3, 11, dtype=torch.long)
    mask[0, :4], mask[1, :7] = 0, 0
    found, expected = answers(fused(model), attention_mask=mask), answers(model, attention_mask=mask)
    seen = mask.bool()
    assert relative_error(found[seen], expected[seen]) <= ROUNDING
    assert relative_error(found[seen], answers(model)[seen]) > 10 * ROUNDING


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("variant", ["llama", "gpt_neox", "bert"])
def test_the_models_own_attention_runs(variant, implementation):
    model = quantized(variant)
    model.set_attn_implementation(implementation)
    assert relative_error(answers(fused(model)), answers(model)) <= ROUNDING


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", ["llama", "mistral", "gpt_neox", "bert"])
def test_in_16_bit_fusing_adds_no_error(variant, dtype):
    model = quantized(variant, dtype=dtype)
    exact = answers(copy.deepcopy(model).float())
    before, after = relative_error(answers(model), exact), relative_error(answers(fused(model)), exact)
    assert after <= 1.5 * before
    assert answers(fused(model)).dtype == dtype


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("variant", ["llama", "llama-one-kv-head", "mistral", "qwen2", "qwen3", "gpt_neox"])
def test_generation_with_a_cache_is_as_before(variant, cache):
    model = quantized(variant)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    question = {"input_ids": tokens(2, 7), "attention_mask": mask, "max_new_tokens": 9, "min_new_tokens": 9}
    options = {"do_sample": False, "cache_implementation": cache, "disable_compile": True}
    found, expected = fused(model).generate(**question, **options), model.generate(**question, **options)
    assert found.shape == (2, 16)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("variant", ["llama", "gpt_neox", "bert"])
def test_hidden_states_and_attentions_can_still_be_asked_for(variant):
    model = quantized(variant)
    model.set_attn_implementation("eager")
    asked = {"input_ids": tokens(), "output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        found, expected = fused(model)(**asked), model(**asked)
    for name in ("hidden_states", "attentions"):
        assert len(found[name]) == len(expected[name]) >= 2
        for ours, theirs in zip(found[name], expected[name], strict=True):
            assert relative_error(ours, theirs) <= ROUNDING


@pytest.mark.parametrize("variant", ["llama", "gpt_neox", "bert"])
def test_queries_keys_and_values_may_read_16_bits(variant):
    def of_qkv(path: str) -> bool:
        return path.rpartition(".")[2] in ("q_proj", "k_proj", "v_proj", "query_key_value", "query", "key", "value")

    model = quantized(variant, but=of_qkv)
    twin = fused(model)
    assert relative_error(answers(twin), answers(model)) <= ROUNDING
    assert sum(isinstance(module, nn.Linear) for module in twin.modules()) == sum(
        isinstance(module, nn.Linear) for module in model.modules()
    )


def test_layers_without_quantized_inputs_are_left_alone():
    model = quantized("llama", but=lambda path: ".layers.0." in path)
    twin = copy.deepcopy(model)
    assert fuse(twin) == 1
    assert relative_error(answers(twin), answers(model)) <= ROUNDING


@pytest.mark.parametrize("variant", ["llama", "qwen2", "gpt_neox", "bert"])
def test_the_weights_are_in_memory_once(variant):
    def bytes_of(model: nn.Module) -> int:
        held = [tensor.untyped_storage() for tensor in model.state_dict().values()]
        return sum({storage.data_ptr(): storage.nbytes() for storage in held}.values())

    model = quantized(variant)
    twin = fused(model)
    assert bytes_of(twin) == bytes_of(model)


@pytest.mark.parametrize("variant", ["llama", "gpt_neox", "bert"])
def test_a_fused_model_can_be_cast_and_copied(variant):
    model = quantized(variant)
    cast = copy.deepcopy(fused(model)).to(torch.bfloat16)
    for name, buffer in cast.named_buffers():
        assert not name.endswith("weight_scale") or buffer.dtype == torch.float32
    assert relative_error(answers(cast), answers(model)) <= 5e-2


class Passes(TorchDispatchMode):
    """Counts what runs of ours, and of torch's norms and activations, within it."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split("::")
        if name[0] == "halfbyte" or name[1] in ("native_layer_norm", "rsqrt", "gelu", "silu"):
            self.count[name[1]] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("variant", "passes"),
    [
        ("llama", {"rms_norm_quantize": 2, "quantize_tokens": 1, "silu_mul_quantize": 1}),
        ("gpt_neox", {"layer_norm_quantize": 2, "quantize_tokens": 1, "gelu_quantize": 1}),
        ("gpt_neox-tanh", {"layer_norm_quantize": 2, "quantize_tokens": 1, "gelu_quantize": 1}),
        ("bert", {"native_layer_norm": 2, "quantize_tokens": 3, "gelu_quantize": 1}),
    ],
)
def test_a_layer_is_four_products_and_as_few_passes_between_them(variant, passes):
    layer, args, kwargs = with_inputs(fused(quantized(variant)))
    with torch.no_grad(), Passes() as seen:
        layer(*args, **kwargs)
    assert seen.count == {"int8_matmul": 4, **passes}


def with_inputs(model: nn.Module) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """The first fused layer of a model, and what the model calls it with."""
    read = []
    layer = next(module for module in model.modules() if hasattr(module, "fused"))
    hook = layer.register_forward_pre_hook(lambda _layer, args, kwargs: read.append((args, kwargs)), with_kwargs=True)
    answers(model, use_cache=False)
    hook.remove()
    return layer, *read[0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("variant", ["llama", "gpt_neox", "bert"])
def test_a_layer_compiles_without_a_graph_break(variant):
    layer, args, kwargs = with_inputs(fused(quantized(variant)))
    torch._dynamo.reset()
    with torch.no_grad():
        found = torch.compile(layer, fullgraph=True, backend="eager")(*args, **kwargs)
        assert torch.equal(found, layer(*args, **kwargs))


# What does not fit


@pytest.mark.parametrize(
    ("name", "replacement", "said"),
    [
        ("mlp.down_proj", None, r"layers\.1\.mlp\.down_proj is a Linear: quantize"),
        ("self_attn.k_proj", None, r"layers\.1\.self_attn\.k_proj is a Linear: quantize"),
        ("mlp.up_proj", {"activations": ActivationFormat(symmetric=False)}, r"mlp\.up_proj has inputs of a8 asym"),
        ("mlp.up_proj", {"activations": ActivationFormat(outliers=OutlierSplit())}, "split at 6"),
        ("mlp.up_proj", {"activations": ActivationFormat(bits=6)}, "has inputs of a6"),
        ("mlp.up_proj", {"activations": ActivationFormat(granularity="tensor")}, "not per token or static"),
        ("mlp.up_proj", {"activations": STATIC}, r"mlp\.gate_proj, mlp\.up_proj of .* are not of one format"),
        (
            "self_attn.o_proj",
            {"activations": PER_TOKEN, "format": BYTES.model_copy(update={"convention": Convention.ASYMMETRIC})},
            "has a weight of int8 asym per channel with zero points",
        ),
    ],
)
def test_what_does_not_fit_is_named_before_anything_changes(name, replacement, said):
    path = f"model.layers.1.{name}"
    plain = tiny("llama").get_submodule(path)
    model = quantized("llama", but=lambda own: own == path)
    if replacement is not None:
        model.set_submodule(path, integer_linear(plain, **replacement))
    expected = answers(model)
    with pytest.raises(ModelError, match=said):
        fuse(model)
    assert torch.equal(answers(model), expected)


def test_static_scales_of_one_input_must_agree():
    model = quantized("llama", STATIC)
    path = "model.layers.0.self_attn.v_proj"
    model.set_submodule(path, integer_linear(tiny("llama").get_submodule(path), STATIC, scale=1 / 8))
    with pytest.raises(ModelError, match=r"layers\.0 read one input with the scales \[0\.0625, 0\.125\]"):
        fuse(model)


def test_an_unprepared_linear_is_named():
    model = quantized("llama")
    linear = model.get_submodule("model.layers.0.mlp.down_proj")
    linear.fill({name: buffer for name, buffer in linear.named_buffers() if name != "bias"}, linear.bias)
    with pytest.raises(ModelError, match=r"down_proj is not prepared: call prepare"):
        fuse(model)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (lambda: tiny("llama"), "no layer of this LlamaForCausalLM is quantized"),
        (lambda: tiny("opt"), r"OPTForCausalLM has no layer left .* LlamaDecoderLayer, "),
        (lambda: fused(quantized("bert")), "BertForMaskedLM has no layer left"),
    ],
    ids=["16 bits", "unknown", "fused already"],
)
def test_a_model_without_layers_to_fuse_is_refused(model, said):
    with pytest.raises(ModelError, match=said):
        fuse(model())


def test_cross_attention_is_refused():
    model = quantized("bert", is_decoder=True, add_cross_attention=True)
    with pytest.raises(ModelError, match=r"layer\.0 reads an encoder"):
        fuse(model)


# What the tests above would see


def _without_residual(codes, linear, dtype, residual=None):
    return TRUE_PRODUCT(codes, linear, dtype)


def _columns_in_reverse(self, product):
    return product.narrow(-1, product.shape[-1] - self.first - self.count, self.count)


def _gate_and_up_exchanged(both):
    return TRUE_SILU(both.roll(both.shape[1] // 2, dims=1))


TRUE_PRODUCT, TRUE_SILU = fused_layers.product, fused_layers.silu_mul_quantize


@pytest.mark.parametrize(
    ("variant", "owner", "name", "bug"),
    [
        ("llama", fused_layers, "product", _without_residual),
        ("gpt_neox", fused_layers, "product", _without_residual),
        ("bert", fused_layers, "product", _without_residual),
        ("llama-one-kv-head", fused_layers.Columns, "forward", _columns_in_reverse),
        ("bert", fused_layers.Columns, "forward", _columns_in_reverse),
        ("llama", fused_layers, "silu_mul_quantize", _gate_and_up_exchanged),
        ("gpt_neox-tanh", fused_layers, "GELU", {"NewGELUActivation": "none"}),
    ],
)
def test_planted_bugs_are_seen(variant, owner, name, bug, monkeypatch):
    model = quantized(variant)
    monkeypatch.setattr(owner, name, bug)
    assert relative_error(answers(fused(model)), answers(model)) > 2 * ROUNDING


def rotated(model: Any, *suffixes: str) -> Any:
    """Let these linears of every layer read their inputs rotated."""
    paths = [path for path, _ in model.named_modules() if path.endswith(suffixes)]
    add_rotations(model, {path: OnlineHadamard(size=model.get_submodule(path).in_features, seed=3) for path in paths})
    return model


@pytest.mark.parametrize("activations", [PER_TOKEN, STATIC], ids=str)
@pytest.mark.parametrize(("variant", "ends"), [("llama", ("o_proj", "down_proj")), ("gpt_neox", ("dense_4h_to_h",))])
def test_what_is_rotated_at_run_time_is_rotated_in_fused_layers(variant, ends, activations):
    model = rotated(quantized(variant, activations), *ends)
    assert relative_error(answers(fused(model)), answers(model)) <= ROUNDING
    assert relative_error(answers(fused(model)), answers(quantized(variant, activations))) > 0.1


def test_where_weights_alone_are_quantized_inputs_are_rotated_too():
    format = WeightFormat(granularity=PerGroup(size=8), scale=FloatScale(dtype="float32"))
    model = rotated(weight_only("llama", format), "o_proj", "down_proj")
    assert relative_error(answers(fused(model)), answers(model)) <= 1e-6


def test_rotated_inputs_of_joined_linears_are_refused():
    model = rotated(quantized("llama"), "up_proj")
    with pytest.raises(ModelError, match=r"up_proj of model\.layers\.0 read their input rotated"):
        fuse(model)
