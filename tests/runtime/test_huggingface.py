import pytest
import torch
from packed_folders import INT4, edit_config, edit_tensors, logits, one_of, packed_folder, quantization_of
from transformers import AutoModelForCausalLM

import halfbyte.huggingface  # noqa: F401 - registers the quantizer
from closeness import assert_close
from halfbyte.errors import CheckpointError, ModelError
from halfbyte.runtime.linear import QuantizedLinear
from halfbyte.runtime.load import load_model
from halfbyte.scheme import Convention, FloatScale, PerTensor
from tiny_models import tokens

BFLOAT16_SCALES = INT4.model_copy(update={"scale": FloatScale(dtype="bfloat16")})
ASYMMETRIC = INT4.model_copy(update={"convention": Convention.ASYMMETRIC})
ONE_SCALE = INT4.model_copy(update={"granularity": PerTensor()})


@pytest.mark.parametrize(
    ("variant", "format"),
    [("gpt2", INT4), ("llama", BFLOAT16_SCALES), ("qwen2", ASYMMETRIC), ("gpt_neox", ONE_SCALE), ("gptj", INT4)],
    ids=["transposed", "bfloat16-scales", "asymmetric", "one-scale", "buffers-of-its-own"],
)
def test_from_pretrained_answers_as_our_own_loader(variant, format, tmp_path):
    packed, dense = packed_folder(tmp_path, variant, format, method="halfbyte")
    model = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32).eval()
    assert any(isinstance(module, QuantizedLinear) for module in model.modules())
    expected = logits(AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval(), tokens())
    assert_close(logits(model, tokens()), expected, rounding_steps=64)
    assert_close(logits(load_model(packed, device="cpu"), tokens()), expected, rounding_steps=64)


def test_what_was_loaded_can_be_saved_and_loaded_again(tmp_path):
    packed, _ = packed_folder(tmp_path, "gpt2", BFLOAT16_SCALES, method="halfbyte")
    model = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32).eval()
    model.save_pretrained(tmp_path / "again")
    for again in (
        AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32).eval(),
        load_model(tmp_path / "again", device="cpu"),
    ):
        assert_close(logits(again, tokens()), logits(model, tokens()), rounding_steps=64)


@pytest.mark.parametrize("suffix", ["weight_packed", "weight_scale", "weight_shape"])
def test_a_missing_tensor_is_an_error_and_not_made_up(suffix, tmp_path):
    packed, _ = packed_folder(tmp_path, "gpt2", method="halfbyte")
    edit_tensors(packed, lambda tensors: tensors.pop(one_of(tensors, suffix)))
    with pytest.raises(CheckpointError, match=f"{suffix} is not in the files"):
        AutoModelForCausalLM.from_pretrained(packed)


def test_packed_tensors_of_no_quantized_layer_are_an_error(tmp_path):
    packed, _ = packed_folder(tmp_path, "gpt2", method="halfbyte")
    edit_config(packed, quantization_config=quantization_of(packed) | {"ignore": ["lm_head", "re:.*c_proj"]})
    with pytest.raises(CheckpointError, match=r"c_proj.weight_packed is of no quantized layer"):
        AutoModelForCausalLM.from_pretrained(packed)


def test_mixtures_of_experts_are_sent_to_our_own_loader(tmp_path):
    packed, _ = packed_folder(tmp_path, "mixtral", method="halfbyte")
    with pytest.raises(ModelError, match=r"fused experts.*use halfbyte.load"):
        AutoModelForCausalLM.from_pretrained(packed)
