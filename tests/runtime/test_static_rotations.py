"""Rotations of a fixed cache whose keys are stored before RoPE, and what they are to a kernel."""

import pytest
import torch
from cached_models import FORMATS, stepwise, with_cache

from closeness import relative_error
from halfbyte.errors import ModelError
from halfbyte.numerics.cache import Smoothing, rotate, unrotate
from halfbyte.runtime.cache_decode import reading_codes
from halfbyte.runtime.cache_plan import attach_cache, cache_plan, named_format, new_cache
from halfbyte.runtime.static_rotations import StaticRotations, before, near_turns, turns_evenly
from tiny_models import tiny, tokens

ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16, "rope_theta": 10000.0,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0},
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}


@pytest.mark.parametrize("name", ROPES)
@torch.no_grad()
def test_neighbours_are_turned_further_by_as_much_wherever_they_are(name):
    model = tiny("llama", rope_parameters=ROPES[name])
    near = near_turns(model, "full_attention")
    cos, sin = model.base_model.rotary_emb(torch.zeros(1), torch.arange(100)[None])
    key = torch.randn(1, 1, 1, cos.shape[-1])
    further = rotate(key, *(torch.cat([part[None, 7:8]] * 2, dim=-1) for part in near))
    for place in (0, 50):
        expected = rotate(key, cos[:, place + 7 : place + 8], sin[:, place + 7 : place + 8])
        found = rotate(further, cos[:, place : place + 1], sin[:, place : place + 1])
        assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("model_type", ["qwen3", "gpt_neox", "gemma3_text", "mixtral"])
def test_every_family_that_stores_keys_before_rope_tells_its_turns(model_type):
    model = tiny(model_type)
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"]
    assert all(turns_evenly(model, kind) and near_turns(model, kind).shape[:2] == (2, 32) for kind in kinds)


def test_frequencies_that_depend_on_the_length_are_refused_where_codes_are_read():
    model = with_cache(tiny("llama", rope_parameters=DYNAMIC), FORMATS["int3-prerope-w2"])
    assert not turns_evenly(model, "full_attention")
    with pytest.raises(ModelError, match="depends on the length"), reading_codes(model):
        pass


def test_float16_rows_keep_what_bfloat16_says():
    cos, sin = (torch.randn(1, 5, 8).clamp(-1, 1).to(torch.bfloat16) for _ in range(2))
    kept = StaticRotations(9, torch.zeros(2, 32, 8))
    kept.prepare(3, cos.dtype, cos.device)
    kept.write((torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)), torch.tensor(2))
    assert kept.cos is not None
    assert kept.sin is not None
    assert kept.cos.dtype == torch.float16
    assert kept.nbytes == 2 * 3 * 9 * 8 * 2
    assert torch.equal(kept.cos[:, 2:7].to(torch.bfloat16), cos.expand(3, -1, -1))
    assert torch.equal(kept.sin[:, 2:7].to(torch.bfloat16), sin.expand(3, -1, -1))
    assert not kept.cos[:, 7:].any()


def test_keys_come_back_from_before_rope():
    cos, sin = (part[None] for part in torch.randn(2, 5, 16))
    keys = torch.randn(2, 3, 5, 16)
    assert torch.equal(before(keys, (cos, sin)), unrotate(keys, cos, sin))
    assert before(keys.bfloat16(), (cos, sin)).dtype == torch.float32


@pytest.mark.parametrize("name", ["int4-s2-w3", "int3-prerope-w2", "int3-rot-w2"])
@torch.no_grad()
def test_shifts_and_scales_are_in_what_is_read(name):
    model, ids = tiny("llama"), tokens(2, 14)
    config = model.config
    shape = (config.num_key_value_heads, config.head_dim)
    moved = {i: Smoothing(*(torch.rand(shape) + 0.5 for _ in range(4))) for i in range(config.num_hidden_layers)}
    attach_cache(model, cache_plan(model, named_format(name), moved))
    expected = stepwise(model, ids)
    with reading_codes(model):
        found = stepwise(model, ids, new_cache(model, capacity=20))
    assert relative_error(found, expected) < 1e-5


@torch.no_grad()
def test_a_rotation_that_is_one_token_late_is_noticed(monkeypatch):
    write = StaticRotations.write
    monkeypatch.setattr(StaticRotations, "write", lambda self, turn, at: write(self, turn, at + 1))
    model, ids = with_cache(tiny("llama"), FORMATS["int3-prerope-w2"]), tokens(2, 12)
    with reading_codes(model):
        wrong = stepwise(model, ids, new_cache(model, capacity=20))
    assert relative_error(wrong, stepwise(model, ids)) > 1e-3
