import json

import pytest
import torch
from typer.testing import CliRunner

from halfbyte.cli import app
from halfbyte.errors import ModelError
from halfbyte.models import random_weights
from halfbyte.models.load import skeleton
from halfbyte.recipe import Recipe
from halfbyte.runtime.bench import bench, formats_alone

TINY = random_weights.LLAMA | {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _a_tiny_shape(monkeypatch):
    monkeypatch.setitem(random_weights.SHAPES, "tiny", TINY)


def test_what_is_counted_is_what_is_there():
    speed = bench("tiny", batch=3, context=8, new_tokens=4, device="cpu")
    parameters = 2 * 64 * 128 + 128 + 2 * (128 * (128 + 64 + 64 + 128) + 3 * 128 * 256 + 2 * 128)
    frequencies = 2 * 16  # the rotary module's, twice
    assert speed.weight_bytes == 4 * (parameters + frequencies)
    assert speed.step_bytes == speed.weight_bytes - 4 * 64 * 128
    assert speed.cache_bytes == 2 * 2 * 3 * 2 * 12 * 32 * 4
    assert speed.decode_rate == pytest.approx(3 / speed.step_seconds)
    assert speed.prefill_rate == pytest.approx(24 / speed.prefill_seconds)
    assert speed.kernels == {"float32 torch": 15}


def test_a_packed_cache_is_weighed_as_it_is():
    speed = bench("tiny", batch=3, context=8, new_tokens=4, device="cpu", kv_cache="int4-g32")
    assert speed.cache_bytes == 2 * 2 * 3 * 2 * 12 * (16 + 2 * 2)  # codes, and a step and a zero in float16


@pytest.mark.parametrize("recipe", ["rtn-w4a16", "gptq-w4a16", "smoothquant-w8a8"])
def test_a_shape_takes_the_formats_of_any_recipe(recipe):
    speed = bench("tiny", recipe=recipe, context=8, new_tokens=4, device="cpu", dtype=torch.bfloat16)
    float_speed = bench("tiny", context=8, new_tokens=4, device="cpu", dtype=torch.bfloat16)
    assert speed.recipe == recipe
    assert speed.kernels.pop("bfloat16 torch") == 1  # the head
    assert sum(speed.kernels.values()) == 14
    assert speed.weight_bytes < float_speed.weight_bytes


def test_a_head_in_eight_bits_runs_and_is_weighed_as_it_is():
    fields = Recipe.load("smoothquant-w8a8").model_dump()
    fields["scheme"]["head"] = {"bits": 8, "granularity": {"kind": "channel"}}
    plain = bench("tiny", recipe="smoothquant-w8a8", context=8, new_tokens=4, device="cpu")
    speed = bench("tiny", recipe=fields, context=8, new_tokens=4, device="cpu")
    assert list(speed.kernels.values()) == [15]
    assert plain.step_bytes - speed.step_bytes == 64 * 128 * (4 - 1) - 64 * 4  # codes for floats, and scales


def test_weights_are_random_and_every_time_the_same(tmp_path):
    bones = skeleton(random_weights.write_shape("tiny", tmp_path))
    files = random_weights.RandomWeights(bones, torch.device("cpu"), torch.float32)
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(files.read(name), files.read(name))
    assert float(files.read(name).std()) == pytest.approx(0.02, rel=0.05)
    assert bool((files.read("model.norm.weight") == 1).all())


def test_formats_alone_keeps_every_format_and_needs_no_data():
    recipe = Recipe.load("zeroquant-lkd-w4a8")
    alone = formats_alone(recipe)
    assert not alone.needs_data
    path = "model.layers.0.mlp.up_proj"
    assert (alone.format_of(path), alone.activations_of(path)) == (recipe.format_of(path), recipe.activations_of(path))


def test_what_is_no_shape_is_refused_with_its_neighbour(tmp_path):
    with pytest.raises(ModelError, match="did you mean 'llama-2-7b'"):
        random_weights.write_shape("llama-2-7", tmp_path)
    with pytest.raises(ModelError, match="at least"):
        bench("tiny", new_tokens=1)


def test_the_command_prints_json_that_has_the_bound():
    done = CliRunner().invoke(
        app, ["bench", "tiny", "--context", "8", "--new-tokens", "4", "--device", "cpu", "--json", "-"]
    )
    assert done.exit_code == 0, done.output
    measured = json.loads(done.stdout[: done.stdout.rindex("}") + 1])
    assert measured["bound_seconds"] == pytest.approx(
        (measured["step_bytes"] + measured["cache_bytes"] * 10 / 12) / measured["copy_rate"]
    )
