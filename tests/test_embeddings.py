"""Tables of embeddings in 8 bits, from the recipe to the loaded model."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import halfbyte.huggingface  # noqa: F401 - registers the reader
from halfbyte.errors import CheckpointError, ModelError, RecipeError, WeightError
from halfbyte.layouts.embeddings import SCALE
from halfbyte.layouts.inspect import inspect
from halfbyte.models.load import skeleton
from halfbyte.numerics.grid import fit
from halfbyte.numerics.quantized import round_to_grid
from halfbyte.pipeline import quantize
from halfbyte.plan import plan_tables
from halfbyte.recipe import Recipe
from halfbyte.run import Run
from halfbyte.runtime.embedding import QuantizedEmbedding
from halfbyte.runtime.load import load_model
from halfbyte.scheme import WeightFormat
from tiny_models import tiny, tokens

TABLE = {"bits": 8, "convention": "odyssey", "granularity": {"kind": "channel"}, "stored": "bytes"}
WEIGHTS = {"bits": 8, "convention": "odyssey", "granularity": {"kind": "channel"}}
IN_GROUPS = TABLE | {"granularity": {"kind": "group", "size": 8}}


def recipe(table):
    return Recipe.load({"scheme": {"weights": WEIGHTS, "embeddings": table}, "steps": [{"method": "rtn"}]})


def saved(folder, model_type, **overrides):
    tiny(model_type, **overrides).save_pretrained(folder)
    return folder


def rounded(model, table):
    """The float model with rounded tables; a head that shares one computes with it."""
    format = WeightFormat.model_validate(table | {"scale": {"kind": "float", "dtype": "float32"}})
    for module in model.modules():
        if type(module) is nn.Embedding:
            module.weight.data.copy_(round_to_grid(module.weight, fit(module.weight, format), format).decode())
    return model


@torch.no_grad()
def logits(model):
    return model(input_ids=tokens()).logits


@pytest.mark.parametrize("table", [TABLE, IN_GROUPS], ids=["rows", "groups"])
@pytest.mark.parametrize(
    ("model_type", "overrides"),
    [("llama", {}), ("llama", {"tie_word_embeddings": True}), ("gpt2", {}), ("bert", {})],
    ids=["untied", "tied", "gpt2", "bert"],
)
def test_a_checkpoint_computes_with_its_rounded_tables(model_type, overrides, table, tmp_path):
    source = saved(tmp_path / "model", model_type, **overrides)
    quantize(source, recipe(table), tmp_path / "out", device="cpu")
    found = load_model(tmp_path / "out", device="cpu")
    quantize(source, recipe(None), tmp_path / "plain", device="cpu")
    expected = rounded(load_model(tmp_path / "plain", device="cpu"), table)
    torch.testing.assert_close(logits(found), logits(expected), rtol=1e-5, atol=1e-5)
    assert any(isinstance(module, QuantizedEmbedding) for module in found.modules())
    assert not any(type(module) is nn.Embedding for module in found.modules())


def test_loading_with_a_recipe_gives_the_same(tmp_path):
    source = saved(tmp_path / "model", "bert")
    quantize(source, recipe(TABLE), tmp_path / "out", device="cpu")
    on_the_fly = load_model(source, recipe=recipe(TABLE), device="cpu")
    assert torch.equal(logits(load_model(tmp_path / "out", device="cpu")), logits(on_the_fly))


def test_calibration_sees_the_rounded_tables(tmp_path):
    source = saved(tmp_path / "model", "llama")
    run = Run(source, recipe(TABLE), device="cpu")
    values = run.outside()["model.embed_tokens.weight"]
    exact = tiny("llama").model.embed_tokens.weight
    assert not torch.equal(values, exact)
    torch.testing.assert_close(values, exact, rtol=0, atol=float(exact.abs().amax()) / 254 * 1.001)


def test_the_file_holds_bytes_and_inspect_finds_nothing_wrong(tmp_path):
    source = saved(tmp_path / "model", "llama")
    report = quantize(source, recipe(TABLE), tmp_path / "out", device="cpu")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "halfbyte"
    assert list(config["embeddings"]) == ["model.embed_tokens"]
    assert not inspect(tmp_path / "out").problems
    assert report.bytes_after < report.bytes_before


def test_a_lost_scale_is_named(tmp_path):
    source = saved(tmp_path / "model", "llama")
    quantize(source, recipe(TABLE), tmp_path / "out", device="cpu")
    last = sorted((tmp_path / "out").glob("model-*.safetensors"))[-1]
    tensors = {name: tensor for name, tensor in load_file(last).items() if not name.endswith(SCALE)}
    save_file(tensors, last, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"embed_tokens .*embedding_scale"):
        load_model(tmp_path / "out", device="cpu")


def test_transformers_is_told_to_leave_it(tmp_path):
    source = saved(tmp_path / "model", "llama")
    quantize(source, recipe(TABLE), tmp_path / "out", device="cpu")
    with pytest.raises(ModelError, match=r"halfbyte\.load"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_what_is_no_table_of_bytes_is_refused(tmp_path):
    for table in (
        TABLE | {"stored": "words"},
        TABLE | {"convention": "asymmetric"},
        TABLE | {"granularity": {"kind": "tensor"}},
    ):
        with pytest.raises(RecipeError, match="symmetric scales per row or group"):
            recipe(table)
    bones = skeleton(saved(tmp_path / "model", "llama"))
    with pytest.raises(WeightError, match="embed_tokens: group size 7"):
        plan_tables(bones, recipe(TABLE | {"granularity": {"kind": "group", "size": 7}}))
