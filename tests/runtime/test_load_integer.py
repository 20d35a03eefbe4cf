"""Folders whose inputs are quantized too: they answer as the dense model with simulated inputs."""

import pytest
import torch
from packed_folders import (
    INT4,
    INT8,
    edit_config,
    edit_tensors,
    logits,
    one_of,
    packed_folder,
    quantization_of,
    simulated_logits,
)
from transformers import AutoModelForCausalLM

import halfbyte.huggingface  # noqa: F401 - registers the quantizer
from closeness import assert_close, relative_error
from halfbyte.errors import CheckpointError
from halfbyte.runtime.choice import kernels_here
from halfbyte.runtime.integer_linear import IntegerLinear
from halfbyte.runtime.linear import QuantizedLinear
from halfbyte.runtime.load import load_model
from halfbyte.scheme import ActivationFormat, Convention, OutlierSplit, PerGroup, PerTensor
from tiny_models import tokens

TOKEN = ActivationFormat()
STATIC = ActivationFormat(granularity="tensor", dynamic=False, symmetric=False)
GROUPS = ActivationFormat(granularity="group", group_size=8)
DYNAMIC_SPLIT = ActivationFormat(outliers=OutlierSplit(threshold=1.5))
STATIC_SPLIT = ActivationFormat(outliers=OutlierSplit(threshold=2.5, columns="static", weights="kept"))
ASYMMETRIC = INT8.model_copy(update={"convention": Convention.ASYMMETRIC})
BYTE_GROUPS = INT8.model_copy(update={"granularity": PerGroup(size=8)})
ONE_SCALE = INT8.model_copy(update={"granularity": PerTensor()})


def integer_linears(model) -> list[IntegerLinear]:
    return [module for module in model.modules() if isinstance(module, IntegerLinear)]


def answers(folder, activations) -> torch.Tensor:
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return simulated_logits(dense, activations, tokens())


@pytest.mark.parametrize(
    ("variant", "format", "activations"),
    [
        ("llama", INT8, TOKEN),
        ("opt", INT8, STATIC),
        ("mixtral", INT8, DYNAMIC_SPLIT),
        ("gpt2", ASYMMETRIC, TOKEN),
        ("llama", ONE_SCALE, STATIC_SPLIT),
        ("qwen3_moe", INT4, GROUPS),
        ("bloom", BYTE_GROUPS, STATIC),
    ],
    ids=["w8a8", "static", "llm_int8", "asymmetric", "static-split", "w4a8", "byte-groups"],
)
def test_a_folder_answers_as_simulation_says(variant, format, activations, tmp_path):
    packed, dense = packed_folder(tmp_path, variant, format, method="halfbyte", activations=activations)
    model = load_model(packed, device="cpu")
    assert {linear.activations for linear in integer_linears(model)} == {activations}
    assert not [name for name, part in model.named_modules() if type(part) is torch.nn.Linear and ".layers." in name]
    # where a value lies between two codes, the order of sums decides: a code more or less in a few of thousands
    assert relative_error(logits(model, tokens()), answers(dense, activations)) < 2e-3
    assert relative_error(logits(model, tokens()), logits(load_model(dense, device="cpu"), tokens())) > 4e-3


def test_other_programs_static_scales_are_read(tmp_path):
    """W8A8 as llm-compressor writes it: no outliers, so the method is compressed-tensors."""
    packed, dense = packed_folder(tmp_path, "llama", INT8, activations=STATIC)
    assert quantization_of(packed)["quant_method"] == "compressed-tensors"
    assert relative_error(logits(load_model(packed, device="cpu"), tokens()), answers(dense, STATIC)) < 2e-3


def test_bytes_without_quantized_inputs_run_from_words(tmp_path):
    packed, dense = packed_folder(tmp_path, "llama", ASYMMETRIC)
    model = load_model(packed, device="cpu")
    linears = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    assert {linear.format.stored for linear in linears} == {"words"}
    expected = logits(AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval(), tokens())
    assert_close(logits(model, tokens()), expected, rounding_steps=64)


@pytest.mark.parametrize(
    ("suffix", "activations"),
    [
        ("weight", TOKEN),
        ("weight_scale", TOKEN),
        ("input_scale", STATIC),
        ("input_zero_point", STATIC),
        ("outlier_columns", STATIC_SPLIT),
        ("outlier_weight", STATIC_SPLIT),
    ],
)
def test_a_missing_tensor_is_named(suffix, activations, tmp_path):
    packed, _ = packed_folder(tmp_path, "llama", INT8, method="halfbyte", activations=activations)
    edit_tensors(packed, lambda tensors: tensors.pop(one_of(tensors, f"mlp.up_proj.{suffix}")))
    with pytest.raises(CheckpointError, match=suffix):
        load_model(packed, device="cpu")


@pytest.mark.parametrize("suffix", ["weight_scale", "input_scale", "outlier_weight", "weight_packed", "weight_shape"])
def test_tensors_that_nothing_reads_are_an_error(suffix, tmp_path):
    packed, _ = packed_folder(tmp_path, "llama", INT8, method="halfbyte", activations=TOKEN)
    edit_tensors(packed, lambda tensors: tensors.update({f"model.layers.7.mlp.up_proj.{suffix}": torch.zeros(1)}))
    with pytest.raises(CheckpointError, match=rf"holds model.layers.7.mlp.up_proj.{suffix}, which belong to no"):
        load_model(packed, device="cpu")


def test_an_input_scale_where_inputs_are_not_quantized_is_an_error(tmp_path):
    packed, _ = packed_folder(tmp_path, "llama", INT4)
    edit_tensors(packed, lambda tensors: tensors.update({"model.layers.0.mlp.up_proj.input_scale": torch.ones(1)}))
    with pytest.raises(CheckpointError, match=r"holds model.layers.0.mlp.up_proj.input_scale, which belong to no"):
        load_model(packed, device="cpu")


def test_a_layer_that_the_configuration_leaves_out_is_not_made_up(tmp_path):
    packed, _ = packed_folder(tmp_path, "llama", INT8, activations=TOKEN)
    config = quantization_of(packed)
    edit_config(packed, quantization_config=config | {"ignore": ["lm_head", "re:.*up_proj"]})
    with pytest.raises(CheckpointError, match=r"up_proj.weight_scale"):
        load_model(packed, device="cpu")


def test_the_kernels_are_known_without_the_weights(tmp_path):
    packed, _ = packed_folder(tmp_path, "llama", INT8, method="halfbyte", activations=DYNAMIC_SPLIT)
    model = load_model(packed, device="cpu")
    kernels = [linear.kernel for linear in integer_linears(model)]
    assert kernels_here(packed, device="cpu") == {"llm_int8 torch int8": len(kernels)}
    assert set(kernels) == {"llm_int8 torch int8"}


@pytest.mark.parametrize(
    ("variant", "format", "activations"),
    [
        ("gpt2", INT8, DYNAMIC_SPLIT),
        ("llama", INT8, STATIC_SPLIT),
        ("llama", ASYMMETRIC, STATIC),
        ("gpt_neox", INT4, TOKEN),
    ],
    ids=["transposed", "static-split", "asymmetric", "w4a8"],
)
def test_from_pretrained_answers_as_our_own_loader(variant, format, activations, tmp_path):
    packed, _ = packed_folder(tmp_path, variant, format, method="halfbyte", activations=activations)
    model = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32).eval()
    ours = load_model(packed, device="cpu")
    assert len(integer_linears(model)) == len(integer_linears(ours)) > 0
    assert relative_error(logits(model, tokens()), logits(ours, tokens())) < 2e-3


@pytest.mark.parametrize("suffix", ["weight", "input_scale"])
def test_from_pretrained_makes_nothing_up(suffix, tmp_path):
    packed, _ = packed_folder(tmp_path, "gpt2", INT8, method="halfbyte", activations=STATIC)
    edit_tensors(packed, lambda tensors: tensors.pop(one_of(tensors, f"c_fc.{suffix}")))
    with pytest.raises(CheckpointError, match=rf"c_fc.{suffix} is not in the files"):
        AutoModelForCausalLM.from_pretrained(packed)
