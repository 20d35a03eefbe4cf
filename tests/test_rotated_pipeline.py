"""Rotated checkpoints from the model's folder to logits: whole, resumed, loaded by us and by transformers."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import halfbyte.huggingface  # noqa: F401 - registers the quantizer
from closeness import assert_close, relative_error
from halfbyte.cli.tables import inspection
from halfbyte.errors import CheckpointError, FormatError, ModelError, RecipeError
from halfbyte.layouts.convert import export
from halfbyte.layouts.inspect import inspect
from halfbyte.models.tables import ARCHITECTURES
from halfbyte.pipeline import dry_run
from halfbyte.runtime.fused import fuse
from halfbyte.runtime.load import load, load_model
from halfbyte.runtime.online import rotation_of
from test_pipeline import contents, recipe, run, save_model
from tiny_models import CONFIGURATIONS, tokens

FOLDED = {"method": "quarot", "seed": 5}
ONLINE = FOLDED | {"online": ["down", "out"], "fallback": "orthogonal"}
RTN = {"method": "rtn"}
INPUTS = {"bits": 8}
FAMILIES = [name for name in CONFIGURATIONS if ARCHITECTURES[name].fixed_stream is None]


def answers(folder, ids=None, **options):
    model, _ = load(folder, device="cpu", **options)
    with torch.no_grad():
        return model(input_ids=tokens(2, 20) if ids is None else ids).logits


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_comes_out_whole_and_computes_nearly_the_same(kind, tmp_path):
    source = save_model(tmp_path / "float", kind)
    steps = ONLINE, {"method": "gptq", "ranges": "mse", "drift": 0.5}
    report = run(source, tmp_path / "out", recipe(*steps, bits=8, starved="round", ignore=["*shared_expert_gate"]))
    assert all(module.method.startswith("quarot → ") for module in report.modules)
    bound = 0.2 if "moe" in kind or kind == "mixtral" else 0.05  # a token may be routed to another expert
    assert relative_error(answers(tmp_path / "out"), answers(source)) < bound
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert config["quantization_config"]["quant_method"] == "halfbyte"


@pytest.mark.parametrize("steps", [(ONLINE, RTN), (FOLDED, RTN)], ids=["online", "folded"])
def test_rounding_to_nearest_needs_no_text_after_a_rotation(steps, tmp_path):
    source = save_model(tmp_path / "float")
    run(source, tmp_path / "out", recipe(*steps, bits=8), calibration=None)
    assert relative_error(answers(tmp_path / "out"), answers(source)) < 0.05


def test_scales_move_after_a_rotation_and_not_past_an_online_one(tmp_path):
    source = save_model(tmp_path / "float")
    for name, rotation in (("folded", FOLDED), ("online", ONLINE)):
        run(source, tmp_path / name, recipe(rotation, {"method": "awq", "duo": True}, RTN, bits=8))
        assert relative_error(answers(tmp_path / name), answers(source)) < 0.05


RESUMED = {
    "gptq": recipe(ONLINE, {"method": "gptq"}, activations=INPUTS),
    "drift": recipe(ONLINE, {"method": "awq"}, {"method": "gptq", "drift": 0.5}, sequential=True),
    "lkd": recipe(ONLINE, RTN, {"method": "lkd", "steps": 2}, activations=INPUTS),
}


@pytest.mark.parametrize("what", RESUMED.values(), ids=RESUMED)
@pytest.mark.parametrize("stop", [0, 2])
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(stop, what, tmp_path):
    source = save_model(tmp_path / "float", "qwen3")
    run(source, tmp_path / "whole", what)

    def interrupt(done, _total, _what):
        if done == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "out", what, progress=interrupt)
    run(source, tmp_path / "out", what, resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "opt"])
@pytest.mark.parametrize("tied", [False, True])
def test_what_is_folded_runs_in_transformers_as_it_is(kind, tied, tmp_path):
    source = save_model(tmp_path / "float", kind, tie_word_embeddings=tied)
    run(source, tmp_path / "out", recipe(FOLDED, RTN, bits=8), calibration=None)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert "online_hadamards" not in config["quantization_config"]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        found = theirs(input_ids=tokens(2, 20)).logits
    assert_close(found, answers(tmp_path / "out"), rounding_steps=64)
    assert relative_error(found, answers(source)) < 0.05


def test_what_runs_online_runs_in_transformers_with_our_quantizer(tmp_path):
    source = save_model(tmp_path / "float")
    run(source, tmp_path / "out", recipe(ONLINE, RTN, bits=8), calibration=None)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert rotation_of(theirs.model.layers[1].mlp.down_proj) is not None
    with torch.no_grad():
        found = theirs(input_ids=tokens(2, 20)).logits
    assert_close(found, answers(tmp_path / "out"), rounding_steps=64)
    theirs.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        again = load_model(tmp_path / "again", device="cpu")(input_ids=tokens(2, 20)).logits
    assert_close(again, found, rounding_steps=64)


def test_inspect_tells_what_is_rotated_at_run_time(tmp_path):
    source = save_model(tmp_path / "float")
    run(source, tmp_path / "online", recipe(ONLINE, RTN, bits=8), calibration=None)
    run(source, tmp_path / "folded", recipe(FOLDED, RTN, bits=8), calibration=None)
    found = inspect(tmp_path / "online")
    assert found.rotations is not None
    assert sum(found.rotations.values()) == 4
    assert all(name.startswith("h") for name in found.rotations)
    told = "\n".join(str(part) for part in inspection(found).renderables)
    assert "inputs at run time: h" in told
    assert inspect(tmp_path / "folded").rotations is None


def test_without_the_online_rotation_the_model_is_another(tmp_path):
    source = save_model(tmp_path / "float")
    run(source, tmp_path / "out", recipe(ONLINE, RTN, bits=8), calibration=None)
    right = answers(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    entry = config["quantization_config"].pop("online_hadamards")
    assert entry["inputs"][0]["targets"] == [r"re:(?:.*\.)?layers\.\d+\.mlp\.down_proj$"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    assert relative_error(answers(tmp_path / "out"), right) > 0.5


def test_other_layouts_refuse_what_runs_online_and_take_what_is_folded(tmp_path):
    source = save_model(tmp_path / "float", hidden_size=64, intermediate_size=64, head_dim=16)
    scale = {"kind": "float", "dtype": "float16"}
    weights = {"weights": {"bits": 4, "granularity": {"kind": "group", "size": 16}, "scale": scale}}
    run(source, tmp_path / "online", recipe(ONLINE, RTN, scheme=weights), calibration=None)
    with pytest.raises(FormatError, match=r"Hadamard products at run time.*`online: \[\]`"):
        export(tmp_path / "online", "gptq", tmp_path / "exported")
    run(source, tmp_path / "folded", recipe(FOLDED, RTN, scheme=weights), calibration=None)
    export(tmp_path / "folded", "gptq", tmp_path / "exported")
    assert relative_error(answers(tmp_path / "exported"), answers(tmp_path / "folded")) < 1e-5


def test_a_damaged_entry_is_refused(tmp_path):
    source = save_model(tmp_path / "float")
    run(source, tmp_path / "out", recipe(ONLINE, RTN), calibration=None)
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["online_hadamards"]["inputs"][0]["size"] = "many"
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"online_hadamards of config.json is damaged"):
        load(tmp_path / "out", device="cpu")


def test_a_model_that_cannot_be_rotated_is_refused_before_anything_is_written(tmp_path):
    source = save_model(tmp_path / "float", "gemma2")
    with pytest.raises(ModelError, match="residual stream of gemma2 cannot be rotated"):
        run(source, tmp_path / "out", recipe(FOLDED, RTN))
    assert not (tmp_path / "out.unfinished").exists()


def test_a_rotation_is_not_done_while_a_model_is_loaded(tmp_path):
    source = save_model(tmp_path / "float")
    with pytest.raises(RecipeError, match=r"rotates the whole model.*halfbyte quantize"):
        load(source, recipe=recipe(FOLDED, RTN), device="cpu")


def test_fused_layers_rotate_online(tmp_path):
    source = save_model(tmp_path / "float", intermediate_size=64)
    weights = {"bits": 8, "convention": "odyssey", "granularity": {"kind": "channel"}}
    what = recipe(FOLDED | {"online": ["down"]}, RTN, scheme={"weights": weights, "activations": INPUTS})
    run(source, tmp_path / "out", what, calibration=None)
    right = answers(tmp_path / "out")
    model, _ = load(tmp_path / "out", device="cpu")
    fuse(model)
    with torch.no_grad():
        assert relative_error(model(input_ids=tokens(2, 20)).logits, right) < 1e-2


def test_the_dry_run_counts_the_head_that_is_no_longer_tied(tmp_path):
    source = save_model(tmp_path / "float", tie_word_embeddings=True)
    plan = dry_run(source, recipe(ONLINE, RTN), calibration=source / "text.txt", device="cpu")
    plain = dry_run(source, recipe(RTN), calibration=source / "text.txt", device="cpu")
    report = run(source, tmp_path / "out", recipe(ONLINE, RTN))
    head = load_file(tmp_path / "out" / "model-00003-of-00003.safetensors")["lm_head.weight"]
    assert plan.bytes_after - plain.bytes_after == head.nbytes
    assert report.bytes_after == pytest.approx(plan.bytes_after, rel=0.2)
    assert plan.layout == "halfbyte"


def test_clipped_inputs_are_computed_as_they_were_calibrated(tmp_path):
    source = save_model(tmp_path / "float")
    for clip in (1.0, 0.8):
        run(source, tmp_path / f"{clip}", recipe(FOLDED, RTN, bits=8, activations={"bits": 4, "clip": clip}))
    config = json.loads((tmp_path / "0.8" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "halfbyte"
    assert config["config_groups"]["group_0"]["input_clip"] == 0.8
    assert relative_error(answers(tmp_path / "0.8"), answers(tmp_path / "1.0")) > 0.01
    assert relative_error(answers(tmp_path / "0.8"), answers(source)) < 0.7
    with pytest.raises(FormatError, match="inputs that are clipped"):
        export(tmp_path / "0.8", "compressed-tensors", tmp_path / "exported")
