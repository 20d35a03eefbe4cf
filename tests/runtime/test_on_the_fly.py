"""Quantizing while loading: the model that a written checkpoint gives, from recipes that need no data."""

import pytest
import torch
from packed_folders import edit_tensors, logits, one_of, packed_folder
from torch import nn

import halfbyte
from closeness import assert_close, relative_error
from halfbyte.calibration.walk import linears
from halfbyte.errors import CheckpointError, RecipeError, WeightError
from halfbyte.evaluation.perplexity import evaluate
from halfbyte.methods.rtn import RTN
from halfbyte.runtime import on_the_fly
from halfbyte.runtime.generate import generate
from halfbyte.runtime.integer_linear import IntegerLinear
from halfbyte.runtime.linear import QuantizedLinear
from halfbyte.runtime.load import load, load_model
from tiny_models import tiny, tokens
from tiny_tokenizer import prose, tiny_tokenizer

ROUNDING = [{"method": "rtn"}]
W4 = {"scheme": {"weights": {"bits": 4, "granularity": {"kind": "group", "size": 8}}}, "steps": ROUNDING}
W8 = {"bits": 8, "convention": "odyssey", "granularity": {"kind": "channel"}}
W8A8 = {"scheme": {"weights": W8, "activations": {}}, "steps": ROUNDING}
KEPT = {"outliers": {"threshold": 1.5, "weights": "kept"}}
SPLIT = {"scheme": {"weights": W8, "activations": KEPT}, "steps": ROUNDING}
MIXED = {
    "scheme": {"weights": W8, "activations": {}},
    "steps": [{"method": "rtn", "ranges": "mse"}],
    "overrides": {
        "*.o_proj": {"bits": 4, "granularity": {"kind": "count", "count": 64}},
        "*.k_proj": {"activations": None},
    },
    "ignore": ["lm_head", "*.0.self_attn.v_proj"],
}


def folder_of(path, variant="llama", dtype=torch.float32, **changes):
    tiny(variant, dtype, **changes).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("variant", "recipe"),
    [("llama", W4), ("gpt2", W8A8), ("mixtral", SPLIT), ("llama", MIXED)],
    ids=["weights", "transposed", "experts-split", "overrides"],
)
def test_it_is_the_model_that_a_written_checkpoint_gives(variant, recipe, tmp_path):
    folder = folder_of(tmp_path / "model", variant)
    halfbyte.quantize(folder, recipe, tmp_path / "out", device="cpu")
    written, quick = load_model(tmp_path / "out", device="cpu"), load_model(folder, recipe=recipe, device="cpu")
    state, again = written.state_dict(), quick.state_dict()
    assert state.keys() == again.keys()
    assert all(torch.equal(state[name], again[name]) for name in state)
    assert torch.equal(logits(quick, tokens()), logits(written, tokens()))


def test_overrides_and_ignored_modules_are_honoured(tmp_path):
    model = load_model(folder_of(tmp_path), recipe=MIXED, device="cpu")
    first, second = (layer.self_attn for layer in model.model.layers)
    assert isinstance(first.q_proj, IntegerLinear)
    assert isinstance(first.k_proj, QuantizedLinear)
    assert type(first.v_proj) is nn.Linear
    assert isinstance(second.v_proj, IntegerLinear)
    assert first.o_proj.format.bits == 4
    assert type(model.lm_head) is nn.Linear


def test_one_float_layer_is_in_memory_at_a_time(tmp_path, monkeypatch):
    folder, alive, real = folder_of(tmp_path), [], RTN.quantize
    bones = []

    def spy(self, weight, format, seen):
        alive.append(sum(not part.weight.is_meta for block in bones[0].blocks for part in linears(block).values()))
        return real(self, weight, format, seen)

    planned = on_the_fly.plan_modules
    monkeypatch.setattr(on_the_fly, "plan_modules", lambda *all: (bones.append(all[0]), planned(*all))[1])
    monkeypatch.setattr(RTN, "quantize", spy)
    load_model(folder, recipe=W4, device="cpu")
    assert alive == [1] * 14


def test_it_computes_in_the_dtype_asked_for_from_weights_as_stored(tmp_path):
    folder = folder_of(tmp_path, dtype=torch.bfloat16)
    model = load_model(folder, recipe=W8A8, device="cpu", dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    wide = load_model(folder, recipe=W8A8, device="cpu")
    state, again = model.state_dict(), wide.state_dict()
    assert all(torch.equal(state[name], again[name]) for name in state if name.endswith("weight_scale"))
    assert relative_error(logits(model, tokens()), logits(wide, tokens())) < 16 * 2**-8


def test_load_gives_the_tokenizer_too(tmp_path):
    model, tokenizer = load(folder_of(tmp_path), recipe=W4, device="cpu")
    assert tokenizer.bos_token_id == 1
    assert not model.training


@pytest.mark.parametrize(
    "change",
    [
        {"steps": [{"method": "gptq"}]},
        {"steps": [{"method": "rtn", "ranges": "output"}]},
        {"scheme": {"weights": W8, "activations": {"dynamic": False, "granularity": "tensor"}}},
        {"scheme": {"weights": W8, "activations": {"outliers": {"columns": "static"}}}},
    ],
    ids=["gptq", "ranges", "static-scale", "static-split"],
)
def test_recipes_that_need_data_are_sent_to_quantize(change, tmp_path):
    with pytest.raises(RecipeError, match=r"'custom' needs calibration text.*halfbyte quantize .* --calibration"):
        load_model(folder_of(tmp_path), recipe=W4 | change, device="cpu")


def test_a_quantized_folder_is_not_quantized_again(tmp_path):
    packed, _ = packed_folder(tmp_path, "llama")
    with pytest.raises(CheckpointError, match="is quantized already"):
        load_model(packed, recipe=W4, device="cpu")


def test_what_cannot_be_rounded_is_named(tmp_path):
    folder = folder_of(tmp_path)
    edit_tensors(folder, lambda tensors: tensors[one_of(tensors, "up_proj.weight")].fill_(float("nan")))
    with pytest.raises(WeightError, match=r"model.layers.0.mlp.up_proj: .* NaN or Inf"):
        load_model(folder, recipe=W4, device="cpu")
    with pytest.raises(WeightError, match=r"group size 7 does not divide"):
        load_model(folder, recipe=W4 | {"scheme": {"weights": {"granularity": {"kind": "group", "size": 7}}}})


def test_evaluate_and_generate_take_a_recipe(tmp_path):
    folder = folder_of(tmp_path)
    text = prose(200)
    measured = evaluate(folder, recipe=W4, against=folder, text=text, window=32, device="cpu")
    assert measured.recipe == "custom"
    assert measured.kl_mean is not None
    assert measured.kl_mean > 1e-4
    pair = load(folder, recipe=W4, device="cpu")
    assert evaluate(pair, text=text, window=32).perplexity == measured.perplexity
    written = generate(folder, prose(4), recipe=W4, max_new_tokens=5, device="cpu")
    assert written == generate(pair, prose(4), max_new_tokens=5)
    for use in (lambda: evaluate(pair, recipe=W4, text=text), lambda: generate(pair, prose(4), recipe=W4)):
        with pytest.raises(RecipeError, match="a model in memory is used as it is"):
            use()


def test_a_zero_threshold_is_plain_w8a8(tmp_path):
    folder = folder_of(tmp_path)
    none = SPLIT | {"scheme": {"weights": W8, "activations": {"outliers": {"threshold": 0}}}}
    found, plain = (load_model(folder, recipe=recipe, device="cpu") for recipe in (none, W8A8))
    assert_close(logits(found, tokens()), logits(plain, tokens()), rounding_steps=64)
