from pathlib import Path

import pytest
import torch
from packed_folders import INT4, edit_config, edit_tensors, logits, one_of, packed_folder, quantization_of, rounded
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from closeness import assert_close, relative_error
from halfbyte.errors import CheckpointError, FormatError
from halfbyte.layouts import LAYOUTS
from halfbyte.runtime.linear import QuantizedLinear
from halfbyte.runtime.load import load, load_model, load_tokenizer
from halfbyte.scheme import Convention, FloatScale, PerChannel, PerGroup, PerTensor, WeightFormat
from tiny_models import CONFIGURATIONS, VARIANTS, tiny, tokens

WIDE = {"hidden_size": 64, "intermediate_size": 96}  # 4-bit groups of 32, and widths that older layouts pack


def dense_logits(folder: Path, variant: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    family = AutoModelForMaskedLM if variant.startswith("bert") else AutoModelForCausalLM
    return logits(family.from_pretrained(folder, dtype=dtype).eval(), tokens())


def quantized_linears(model) -> list[QuantizedLinear]:
    return [module for module in model.modules() if isinstance(module, QuantizedLinear)]


@pytest.mark.parametrize("variant", CONFIGURATIONS)
def test_a_packed_model_answers_as_the_dense_decoded_one(variant, tmp_path):
    packed, dense = packed_folder(tmp_path, variant)
    model = load_model(packed, device="cpu")
    # the two differ in the order of sums alone: some rounding steps per layer
    assert_close(logits(model, tokens()), dense_logits(dense, variant), rounding_steps=64)
    assert not [
        name for name, module in model.named_modules() if type(module) is torch.nn.Linear and ".layers." in name
    ]


def forgotten_expert(model):
    quantized_linears(model)[-1].weight_packed.zero_()


def exchanged_layers(model):
    first, second = (module for name, module in model.named_modules() if name.endswith("self_attn.q_proj"))
    first.weight_packed, second.weight_packed = second.weight_packed, first.weight_packed


def stale_scales(model):
    quantized_linears(model)[0]._scales.mul_(1.01)


@pytest.mark.parametrize("bug", [forgotten_expert, exchanged_layers, stale_scales])
def test_the_comparison_notices(bug, tmp_path):
    packed, dense = packed_folder(tmp_path, "mixtral")
    model = load_model(packed, device="cpu")
    bug(model)
    assert relative_error(logits(model, tokens()), dense_logits(dense, "mixtral")) > 1e-3


def variant_of(**changes) -> WeightFormat:
    return INT4.model_copy(update=changes)


@pytest.mark.parametrize(
    ("layout", "format"),
    [
        ("compressed-tensors", variant_of(bits=3, convention=Convention.ASYMMETRIC)),
        ("compressed-tensors", variant_of(bits=8, granularity=PerChannel())),
        ("compressed-tensors", variant_of(bits=5, granularity=PerTensor())),
        ("gptq", variant_of(scale=FloatScale(dtype="float16"), granularity=PerGroup(size=32))),
        ("gptq_v2", variant_of(scale=FloatScale(dtype="float16"), convention=Convention.ASYMMETRIC)),
        ("awq", variant_of(scale=FloatScale(dtype="float16"), convention=Convention.ASYMMETRIC)),
    ],
    ids=["3-bit-asymmetric", "8-bit-channel", "5-bit-tensor", "gptq", "gptq_v2", "awq"],
)
def test_every_layout_loads(layout, format, tmp_path, monkeypatch):
    monkeypatch.setitem(VARIANTS, "wide", ("llama", WIDE))
    packed, dense = packed_folder(tmp_path, "wide", format, layout)
    model = load_model(packed, device="cpu")
    assert_close(logits(model, tokens()), dense_logits(dense, "wide"), rounding_steps=64)
    assert {linear.format.bits for linear in quantized_linears(model)} == {format.bits}


def test_our_own_method_has_the_tensors_of_compressed_tensors(tmp_path):
    packed, dense = packed_folder(tmp_path, "gpt2", method="halfbyte")
    assert_close(logits(load_model(packed, device="cpu"), tokens()), dense_logits(dense, "gpt2"), rounding_steps=64)


def test_in_bfloat16_torchs_packed_kernel_runs(tmp_path, monkeypatch):
    monkeypatch.setitem(VARIANTS, "wide", ("llama", WIDE))
    packed, dense = packed_folder(tmp_path, "wide", variant_of(granularity=PerGroup(size=32)))
    model = load_model(packed, device="cpu", dtype=torch.bfloat16)
    assert {linear.kernel for linear in quantized_linears(model)} == {"torch int4pack up to 64 tokens, decode for more"}
    assert model.dtype == torch.bfloat16
    # bfloat16 has 8 bits; a few dozen roundings that partly cancel
    assert relative_error(logits(model, tokens()), dense_logits(dense, "wide")) < 16 * 2**-8


def test_load_gives_the_tokenizer_too(tmp_path):
    packed, _ = packed_folder(tmp_path, "llama")
    model, tokenizer = load(packed, device="cpu")
    assert tokenizer.bos_token_id == 1
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    (packed / "tokenizer.json").unlink()
    (packed / "tokenizer_config.json").unlink()
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        load_tokenizer(packed)


def test_an_unquantized_folder_is_left_to_transformers(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    model = load_model(tmp_path, device="cpu")
    assert torch.equal(logits(model, tokens()), logits(tiny("llama"), tokens()))
    edit_tensors(tmp_path, lambda tensors: tensors.pop(one_of(tensors, "up_proj.weight")))
    with pytest.raises(CheckpointError, match=r"lacks model.layers.0.mlp.up_proj.weight"):
        load_model(tmp_path, device="cpu")


@pytest.mark.parametrize("suffix", ["weight_packed", "weight_scale", "weight_shape", "bias", "norm.weight"])
def test_a_missing_tensor_is_named(suffix, tmp_path):
    packed, _ = packed_folder(tmp_path, "llama")
    edit_tensors(packed, lambda tensors: tensors.pop(one_of(tensors, suffix)))
    with pytest.raises(CheckpointError, match=suffix):
        load_model(packed, device="cpu")


def test_packed_tensors_that_nothing_reads_are_an_error(tmp_path):
    packed, _ = packed_folder(tmp_path, "llama")
    edit_tensors(
        packed, lambda tensors: tensors.update({"model.layers.7.mlp.up_proj.weight_packed": torch.zeros(2, 2)})
    )
    with pytest.raises(CheckpointError, match=r"holds model.layers.7.mlp.up_proj.weight_packed, which belong to no"):
        load_model(packed, device="cpu")


def test_a_layer_that_the_configuration_leaves_out_is_not_made_up(tmp_path):
    packed, _ = packed_folder(tmp_path, "llama")
    config = quantization_of(packed)
    edit_config(packed, quantization_config=config | {"ignore": ["lm_head", "re:.*up_proj"]})
    with pytest.raises(CheckpointError, match=r"up_proj.weight_packed"):
        load_model(packed, device="cpu")


def test_a_weight_of_another_shape_is_refused(tmp_path):
    packed, _ = packed_folder(tmp_path, "llama")
    edit_config(packed, intermediate_size=64)
    with pytest.raises(CheckpointError, match=r"mlp.*48x32 and the model asks for 64x32"):
        load_model(packed, device="cpu")


def test_a_truncated_file_is_refused(tmp_path):
    packed, _ = packed_folder(tmp_path, "llama")
    path = packed / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        load_model(packed, device="cpu")


def test_an_unfinished_folder_says_how_to_go_on(tmp_path):
    (tmp_path / "model.unfinished").mkdir()
    with pytest.raises(CheckpointError, match="--resume"):
        load(tmp_path / "model")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"quant_method": "fp8"}, "quant_method 'fp8' is none of"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "a quantized cache, which would be left out"),
        ({"config_groups": {}}, "selects none of the model's linear layers"),
    ],
)
def test_what_cannot_be_run_is_refused(changes, complaint, tmp_path):
    packed, _ = packed_folder(tmp_path, "llama")
    config = quantization_of(packed)
    edit_config(packed, quantization_config=config | changes)
    with pytest.raises(CheckpointError, match=complaint):
        load_model(packed, device="cpu")


def test_a_packed_model_is_not_saved_from_memory(tmp_path):
    packed, _ = packed_folder(tmp_path, "mixtral")
    with pytest.raises(FormatError, match="copy its folder"):
        load_model(packed, device="cpu").save_pretrained(tmp_path / "again")


def test_a_quantized_head_does_not_share_the_embeddings_weight(tmp_path):
    """Gemma ties the two; a packed head has a weight of its own."""
    packed, _ = packed_folder(tmp_path, "gemma")

    weight = rounded(tiny("gemma").lm_head.weight, INT4)
    head = {f"lm_head.{suffix}": tensor for suffix, tensor in LAYOUTS["compressed-tensors"].write(weight).items()}
    edit_tensors(packed, lambda tensors: tensors.update(head))
    config = quantization_of(packed)
    edit_config(packed, quantization_config=config | {"ignore": []})
    model = load_model(packed, device="cpu")
    assert isinstance(model.lm_head, QuantizedLinear)
    assert "weight" not in dict(model.lm_head.named_parameters())
    hidden = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    assert_close(model.lm_head(hidden), hidden @ weight.decode().T, rounding_steps=64)
    assert torch.equal(model.model.embed_tokens.weight, tiny("gemma").model.embed_tokens.weight)
