"""A recipe with a cache, from calibration to a folder that generates and is measured through it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import halfbyte.huggingface  # noqa: F401 - registers quant_method: halfbyte
from halfbyte.errors import CheckpointError, FormatError, ModelError
from halfbyte.evaluation.perplexity import evaluate
from halfbyte.layouts.convert import export
from halfbyte.layouts.inspect import inspect
from halfbyte.pipeline import quantize
from halfbyte.runtime.cache import QuantizedCache
from halfbyte.runtime.cache_plan import plan_of
from halfbyte.runtime.load import load
from tiny_models import tiny, tokens
from tiny_tokenizer import prose, tiny_tokenizer

CACHE = {"key_bits": 4, "value_bits": 4, "rope": "before", "sinks": 1}
ONLY_CACHE = {"name": "kv4", "scheme": {"weights": None, "cache": CACHE}, "steps": [{"method": "wkv"}]}
BOTH = {
    "name": "w4kv4",
    "scheme": {"weights": {"bits": 4, "granularity": {"kind": "group", "size": 8}}, "cache": CACHE},
    "steps": [{"method": "gptq"}, {"method": "wkv"}],
    "minimum_tokens": 1,
}
LEARNED = {
    **ONLY_CACHE,
    "steps": [
        {"method": "wkvquant", "learn": "cache", "epochs": 20, "depth": 2, "cache_rate": 0.02},
        {"method": "wkv"},
    ],
}
TEXT = prose(400, seed=5)


def save_model(folder: Path, kind: str = "llama") -> Path:
    tiny(kind).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "text.txt").write_text(prose(600))
    return folder


def quantized(folder: Path, recipe: dict, kind: str = "llama") -> Path:
    source = save_model(folder / "source", kind)
    quantize(source, recipe, folder / "out", calibration=source / "text.txt", samples=4, length=24, device="cpu")
    return folder / "out"


@pytest.fixture(scope="module")
def cached(tmp_path_factory) -> Path:
    return quantized(tmp_path_factory.mktemp("cached"), ONLY_CACHE, "qwen2")


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> Path:
    return quantized(tmp_path_factory.mktemp("both"), BOTH)


def test_the_weights_of_a_cache_only_recipe_are_the_sources(cached):
    source = load_file(cached.parent / "source" / "model.safetensors")
    written = {}
    for path in cached.glob("*.safetensors"):
        written |= load_file(path)
    assert all(torch.equal(written[name], tensor) for name, tensor in source.items())
    rest = sorted(written.keys() - source.keys())
    assert rest == [
        f"model.layers.{layer}.self_attn.cache_{name}"
        for layer in (0, 1)
        for name in ("key_scale", "key_shift", "value_scale", "value_shift")
    ]


def test_config_says_the_cache(cached):
    section = json.loads((cached / "config.json").read_text())["quantization_config"]
    assert section["quant_method"] == "halfbyte"
    assert section["kv_cache"]["rope"] == "before"
    assert not inspect(cached).problems


@pytest.mark.parametrize("folder", ["cached", "both"])
def test_a_loaded_folder_uses_its_cache_by_itself(folder, request):
    path = request.getfixturevalue(folder)
    model, tokenizer = load(path, device="cpu")
    plan = plan_of(model)
    assert plan is not None
    assert plan.layers[1].keys.shift is not None
    written = model.generate(tokens(), max_new_tokens=3, do_sample=False, pad_token_id=0, return_dict_in_generate=True)
    assert isinstance(written.past_key_values, QuantizedCache)
    through = evaluate((model, tokenizer), text=TEXT, window=24, limit_windows=2)
    without = evaluate((model, tokenizer), text=TEXT, window=24, limit_windows=2, kv_cache="float")
    assert through.kv_cache == str(plan.format)
    assert without.kv_cache is None
    assert through.perplexity != without.perplexity


@pytest.mark.parametrize("folder", ["cached", "both"])
def test_transformers_reads_the_same(folder, request):
    path = request.getfixturevalue(folder)
    theirs: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ours, _ = load(path, device="cpu")
    here, there = plan_of(ours), plan_of(theirs)
    assert here is not None
    assert there is not None
    for mine, other in zip(here.layers, there.layers, strict=True):
        assert mine.keys.shift is not None
        assert other.keys.shift is not None
        assert torch.equal(mine.keys.shift, other.keys.shift)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(theirs.generate(tokens(), **options), ours.generate(tokens(), **options))


def test_the_shift_finds_the_bias_of_the_keys(cached):
    """Qwen2's projections have one; before RoPE it is the same at every position."""
    model = tiny("qwen2")
    with safe_open(next(cached.glob("model-00001*")), "pt") as file:
        shift = file.get_tensor("model.layers.0.self_attn.cache_key_shift").flatten()
    bias = model.model.layers[0].self_attn.k_proj.bias
    assert float(torch.corrcoef(torch.stack([shift, bias]))[0, 1]) > 0.5


def cache_tensors(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= {name: tensor for name, tensor in load_file(path).items() if "cache_" in name}
    return tensors


def test_what_the_cache_learned_is_what_is_stored(tmp_path, cached):
    found, learned = cache_tensors(cached), cache_tensors(quantized(tmp_path, LEARNED, "qwen2"))
    assert found.keys() == learned.keys()
    assert not any(torch.equal(found[name], learned[name]) for name in found)
    assert all(float((found[name] - learned[name]).norm() / found[name].norm()) < 1 for name in found)


@pytest.mark.parametrize("recipe", [BOTH, LEARNED], ids=["weights too", "learned"])
def test_a_resumed_run_gives_the_same_bytes(recipe, tmp_path):
    whole = quantized(tmp_path / "whole", recipe)
    source = tmp_path / "whole" / "source"

    def stop(done: int, _total: int, _what: str) -> None:
        if done == 1:
            raise KeyboardInterrupt

    arguments: dict[str, Any] = {"calibration": source / "text.txt", "samples": 4, "length": 24, "device": "cpu"}
    with pytest.raises(KeyboardInterrupt):
        quantize(source, recipe, tmp_path / "again", progress=stop, **arguments)
    quantize(source, recipe, tmp_path / "again", resume=True, **arguments)
    for path in whole.glob("*.safetensors"):
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_other_layouts_refuse_what_they_would_leave_out(both, tmp_path):
    with pytest.raises((FormatError, CheckpointError), match="past-only cache"):
        export(both, "gptq", tmp_path / "gptq")


def test_a_damaged_scale_is_refused(cached, tmp_path):
    shutil.copytree(cached, tmp_path / "bad")
    path = next((tmp_path / "bad").glob("model-00001*"))
    tensors = load_file(path)
    tensors["model.layers.0.self_attn.cache_key_scale"][0, 0] = -1
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match="scales above 0"):
        load(tmp_path / "bad", device="cpu")


def test_attention_that_cannot_be_watched_is_refused(tmp_path):
    recipe = {**ONLY_CACHE, "scheme": {"weights": None, "cache": {}}}
    with pytest.raises(ModelError, match="attention code of its own"):
        quantized(tmp_path, recipe, "bloom")


def test_groups_that_do_not_divide_the_heads_are_refused_before_anything_is_written(tmp_path):
    recipe = {**ONLY_CACHE, "scheme": {"weights": None, "cache": {"group_size": 5}}}
    with pytest.raises(FormatError, match="do not divide heads of 8"):
        quantized(tmp_path, recipe)
    assert not (tmp_path / "out").exists()
