"""Decoding that reads codes answers as decoding that reads a decoded copy, and leaves the same cache behind."""

from contextlib import nullcontext

import pytest
import torch
from cached_models import FORMATS, stepwise, with_cache

from closeness import relative_error
from halfbyte.errors import ModelError
from halfbyte.runtime.cache_decode import reading_codes
from halfbyte.runtime.cache_plan import attach_cache, cache_plan, named_format, new_cache
from tiny_models import tiny, tokens

FIXED = ["int4", "int2", "k8v3-s2-w3", "int4-sym", "int4-e1", "int3-prerope-w2", "int3-rot-w2"]


@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize("prompt", [1, 9])
@torch.no_grad()
def test_it_answers_as_the_decoded_cache(name, prompt):
    model, ids = with_cache(tiny("llama"), FORMATS[name]), tokens(2, 16)
    caches = [new_cache(model, capacity=24) for _ in range(2)]
    answers = []
    for cache, reads in zip(caches, (False, True), strict=True):
        begun = model(input_ids=ids[:, :prompt], past_key_values=cache, use_cache=True).logits
        if not reads:
            answers.append(torch.cat([begun, stepwise(model, ids[:, prompt:], cache)], dim=1))
            continue
        with reading_codes(model):
            answers.append(torch.cat([begun, stepwise(model, ids[:, prompt:], cache)], dim=1))
    assert relative_error(answers[1], answers[0]) < 1e-5
    for layer, other in zip(caches[0].layers, caches[1].layers, strict=True):
        assert int(layer.length) == int(other.length) == 16
        assert torch.equal(layer.key_side.codes, other.key_side.codes)
        assert torch.equal(layer.value_side.scales, other.value_side.scales)
        assert relative_error(other.key_side.window, layer.key_side.window) < 1e-5 or not layer.format.window


@pytest.mark.parametrize(
    ("name", "prompt"), [("int4", 1), ("k8v3-s2-w3", 9), ("int4-sym", 9), ("int3-prerope-w2", 9), ("int3-rot-w2", 9)]
)
@torch.no_grad()
def test_the_growing_cache_reads_them_too(name, prompt):
    model, ids = with_cache(tiny("llama"), FORMATS[name]), tokens(2, 16)
    caches = [new_cache(model) for _ in range(2)]
    expected = torch.cat(
        [
            model(input_ids=ids[:, :prompt], past_key_values=caches[0]).logits,
            stepwise(model, ids[:, prompt:], caches[0]),
        ],
        dim=1,
    )
    with reading_codes(model):
        begun = model(input_ids=ids[:, :prompt], past_key_values=caches[1]).logits
        found = torch.cat([begun, stepwise(model, ids[:, prompt:], caches[1])], dim=1)
        assert all(layer.hands_on for layer in caches[1].layers)
    assert relative_error(found, expected) < 1e-5
    assert caches[1].get_seq_length() == 16
    for layer, other in zip(caches[0].layers, caches[1].layers, strict=True):
        assert torch.equal(layer.key_side.packed.codes, other.key_side.packed.codes)


@pytest.mark.parametrize("name", ["int4", "int3-prerope-w2"])
@torch.no_grad()
def test_beams_and_cropped_texts_go_on_reading(name):
    model, ids = with_cache(tiny("llama"), FORMATS[name]), tokens(2, 12)
    expected = model.generate(ids, num_beams=3, max_new_tokens=5, eos_token_id=None, pad_token_id=0)
    with reading_codes(model):
        found = model.generate(ids, num_beams=3, max_new_tokens=5, eos_token_id=None, pad_token_id=0)
    assert torch.equal(found, expected)
    answers = []
    for reads in (False, True):
        with reading_codes(model) if reads else nullcontext():
            cache = new_cache(model)
            model(input_ids=ids, past_key_values=cache)
            cache.crop(-3)
            answers.append(stepwise(model, ids[:, 3:7], cache))
    assert relative_error(answers[1], answers[0]) < 1e-5


@pytest.mark.parametrize("architecture", ["qwen3", "mistral", "phi3", "gpt_neox", "mixtral"])
@pytest.mark.parametrize("name", ["k8v3-s2-w3", "int3-prerope-w2"])
@torch.no_grad()
def test_other_architectures_do_too(architecture, name):
    model, ids = with_cache(tiny(architecture), FORMATS[name]), tokens(2, 12)
    expected = stepwise(model, ids, new_cache(model, capacity=20))
    with reading_codes(model):
        found = stepwise(model, ids, new_cache(model, capacity=20))
    assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("name", ["int4", "k8v3-s2-w3", "int3-prerope-w2"])
@torch.no_grad()
def test_padding_on_the_left_is_not_seen(name):
    model, ids = with_cache(tiny("llama"), FORMATS[name]), tokens(2, 12)
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[1, :4] = 0
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(ids, past_key_values=new_cache(model, capacity=24), **options)
    with reading_codes(model):
        found = model.generate(ids, past_key_values=new_cache(model, capacity=24), **options)
        grown = model.generate(ids, **options)
    assert torch.equal(found, expected)
    assert torch.equal(grown, expected)


@torch.no_grad()
def test_afterwards_the_model_is_as_it_was():
    model, ids = with_cache(tiny("llama"), FORMATS["int4"]), tokens(1, 5)
    before, cache = model.config._attn_implementation, new_cache(model, capacity=12)
    with reading_codes(model):
        stepwise(model, ids, cache)
    assert model.config._attn_implementation == before
    assert not any(layer.reads_codes for layer in cache.layers)
    stepwise(model, ids, cache)
    assert int(cache.layers[0].length) == 10


def test_what_cannot_read_codes_is_refused():
    model = tiny("llama")
    with pytest.raises(ModelError, match="attach_cache"), reading_codes(model):
        pass
    for name, why in [("int4-present", "attach_cache"), ("kivi", "channel"), ("int4-prerope-rot", "coordinates")]:
        attach_cache(model, cache_plan(model, named_format(name)))
        with pytest.raises(ModelError, match=why), reading_codes(model):
            pass
    capped = with_cache(tiny("gemma2"), FORMATS["int4"])
    with pytest.raises(ModelError, match="of its own"), reading_codes(capped):
        pass
