from typing import Any

import pytest
import torch
from cached_models import FORMATS, with_cache

from closeness import relative_error
from halfbyte.errors import ModelError
from halfbyte.runtime.cache import QuantizedCache
from halfbyte.runtime.decoder import Decoder, compiled_parts, parts_of, sees_all
from tiny_models import tiny, tokens


def greedy(model, prompts, new_tokens):
    """Token by token without any cache."""
    ids = prompts
    for _ in range(new_tokens):
        following = model(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, following], dim=1)
    return ids[:, prompts.shape[1] :]


@pytest.mark.parametrize("variant", ["llama", "qwen2", "gpt_neox", "mistral"])
def test_tokens_are_those_of_a_model_without_cache(variant):
    model = tiny(variant)
    prompts = tokens(3, 7)
    assert torch.equal(Decoder(model, 3, 20).decode(prompts, 9), greedy(model, prompts, 9))


@pytest.mark.parametrize("name", ["k8v3-s2-w3", "int3-prerope-w2", "int3-rot-w2"])
def test_prompts_may_be_read_a_few_at_a_time(name):
    model = with_cache(tiny("llama"), FORMATS[name])
    whole, parts = Decoder(model, 5, 20), Decoder(model, 5, 20, prompts_at_once=2)
    for seed in (0, 1):
        prompts = tokens(5, 7, seed)
        assert torch.equal(parts.decode(prompts, 9), whole.decode(prompts, 9))
    layers: list[Any] = whole.cache.layers
    others: list[Any] = parts.cache.layers
    for layer, other in zip(layers, others, strict=True):
        for tensor, same in zip(layer.key_side.tensors, other.key_side.tensors, strict=True):
            assert not tensor.numel() or relative_error(same.float(), tensor.float()) < 1e-4
    with pytest.raises(ModelError, match="at once"):
        Decoder(tiny("llama"), 5, 20, prompts_at_once=2)


@pytest.mark.parametrize("name", ["int4", "k8v3-s2-w3", "int3-prerope-w2", "int3-rot-w2"])
def test_a_model_with_a_cache_plan_decodes_on_packed_keys_and_values(name):
    model = with_cache(tiny("llama"), FORMATS[name])
    decoder = Decoder(model, 2, 20)
    assert isinstance(decoder.cache, QuantizedCache)
    for seed in (0, 1):
        prompts = tokens(2, 7, seed)
        grown = model.generate(prompts, do_sample=False, max_new_tokens=9, eos_token_id=None, pad_token_id=0)
        assert torch.equal(decoder.decode(prompts, 9), grown[:, 7:])
    assert model.config._attn_implementation == "sdpa"


def test_a_decoder_serves_one_prompt_after_another():
    model = tiny("llama")
    decoder = Decoder(model, 1, 16)
    for seed in (0, 1):
        prompts = tokens(1, 5, seed)
        assert torch.equal(decoder.decode(prompts, 6), greedy(model, prompts, 6))


def test_a_position_too_late_would_be_seen(monkeypatch):
    model = tiny("llama")
    prompts = tokens(2, 7)
    decoder = Decoder(model, 2, 20)
    decoder.prefill(prompts)
    decoder._position += 1
    found = torch.stack([decoder.step().clone() for _ in range(8)], dim=1)
    assert not torch.equal(found, greedy(model, prompts, 9)[:, 1:])


def test_what_has_no_room_is_refused():
    model = tiny("llama")
    decoder = Decoder(model, 2, 12)
    with pytest.raises(ModelError, match="capacity of 12"):
        decoder.decode(tokens(2, 8), 5)
    with pytest.raises(ModelError, match="room for 2"):
        decoder.prefill(tokens(3, 8))
    with pytest.raises(ModelError, match="positions"):
        Decoder(model, 1, 10**6)


def test_parts_have_their_own_forward_again_after_compiling():
    model = tiny("llama")
    parts = parts_of(model)
    assert parts == [*model.model.layers, model.model.embed_tokens, model.model.norm, model.model.rotary_emb]
    mark = parts[0].forward
    parts[1].forward = mark  # as a fused layer has one of its own
    with compiled_parts(parts, Decoder(model, 1, 8).cache):
        assert parts[0].forward is not mark
    assert "forward" not in parts[0].__dict__
    assert parts[1].__dict__["forward"] is mark


@pytest.mark.parametrize("name", [None, "int4", "k8v3-s2-w3"])
def test_layers_that_are_alike_are_compiled_once(monkeypatch, name):
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda work, **options: compile_(work, backend="eager", **options))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = tiny("llama") if name is None else with_cache(tiny("llama"), FORMATS[name])
    decoder, prompts = Decoder(model, 2, 20), tokens(2, 7)
    expected = Decoder(model, 2, 20, compiled=False).decode(prompts, 5)
    found = [decoder.prefill(prompts)]
    with compiled_parts(decoder._parts, decoder.cache):
        found.extend(decoder.step().clone() for _ in range(4))
    assert torch.equal(torch.stack(found, dim=1), expected)
    assert len(model.model.layers) > 1
    # a layer, the table, the norm, the angles, and the likeliest token
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 5


def test_models_that_see_all_tokens_get_their_mask_from_the_position():
    assert sees_all(tiny("llama"), Decoder(tiny("llama"), 1, 8).cache)
    planned = with_cache(tiny("llama"), FORMATS["int4"])
    assert sees_all(planned, Decoder(planned, 1, 8).cache)
    model = tiny("mistral")
    for window in (None, 4):
        model.config.sliding_window = window
        assert sees_all(model, Decoder(model, 1, 8).cache) == (window is None)
    assert not sees_all(tiny("gpt_neox"), Decoder(tiny("gpt_neox"), 1, 8).cache)
