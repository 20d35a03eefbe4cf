"""Formats by name, plans of models, and what a model's generate does with them."""

import pytest
from cached_models import FORMATS, with_cache
from transformers import DynamicCache

from halfbyte.errors import FormatError, ModelError
from halfbyte.runtime.cache import QuantizedCache
from halfbyte.runtime.cache_plan import (
    attach_cache,
    cache_plan,
    chosen_plan,
    named_format,
    new_cache,
    plan_of,
    using_cache,
)
from halfbyte.scheme import CacheFormat
from tiny_models import tiny, tokens


@pytest.mark.parametrize(("name", "format"), [
    ("int4", CacheFormat()),
    ("int8", CacheFormat(key_bits=8, value_bits=8)),
    ("int4-g64", CacheFormat(group_size=64)),
    ("k8v4-w64-s4", CacheFormat(key_bits=8, window=64, sinks=4)),
    ("int4-sym-present", CacheFormat(symmetric=True, past_only=False)),
    ("int3-e2-prerope", CacheFormat(key_bits=3, value_bits=3, edge_layers=2, rope="before")),
    ("kivi", CacheFormat(keys="channel", group_size=32, window=128)),
    ("kivi2-w0", CacheFormat(key_bits=2, value_bits=2, keys="channel", group_size=32)),
])  # fmt: skip
def test_a_name_says_the_format(name, format):
    assert named_format(name) == format


@pytest.mark.parametrize("name", ["int9", "int1", "fp8", "k4", "", "kivi9"])
def test_an_unknown_name_is_refused_with_what_there_is(name):
    with pytest.raises(FormatError, match="write int2"):
        named_format(name)


@pytest.mark.parametrize("name", ["int4-x3", "int4-g0", "int4-w", "int4-"])
def test_an_unknown_option_is_refused_with_what_there_is(name):
    with pytest.raises(FormatError, match="-g64"):
        named_format(name)


def test_a_model_has_its_own_plan_another_or_none():
    model = tiny("llama")
    assert chosen_plan(model, None) is None
    attach_cache(model, cache_plan(model, FORMATS["int2"]))
    assert chosen_plan(model, None) is plan_of(model)
    assert chosen_plan(model, "float") is None
    chosen = chosen_plan(model, "int8")
    assert chosen is not None
    assert chosen.format.key_bits == 8


def test_detached_it_generates_as_before():
    model, ids = with_cache(tiny("llama"), FORMATS["int3-prerope-w2"]), tokens()
    attach_cache(model, None)
    written = model.generate(ids, max_new_tokens=2, pad_token_id=0, do_sample=False, return_dict_in_generate=True)
    assert isinstance(written.past_key_values, DynamicCache)
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(ModelError, match="no cache plan"):
        new_cache(model)


def test_a_cache_of_the_caller_and_none_at_all_are_respected():
    model, ids = with_cache(tiny("llama"), FORMATS["int4"]), tokens()
    own = DynamicCache()
    options = {"max_new_tokens": 2, "pad_token_id": 0, "do_sample": False, "return_dict_in_generate": True}
    assert model.generate(ids, past_key_values=own, **options).past_key_values is own
    assert model.generate(ids, use_cache=False, **options).past_key_values is None


def test_a_plan_lasts_as_long_as_it_is_used():
    model = with_cache(tiny("llama"), FORMATS["int4"])
    before = plan_of(model)
    with using_cache(model, None):
        assert plan_of(model) is None
    assert plan_of(model) is before
    assert isinstance(new_cache(model), QuantizedCache)


def test_layers_without_keys_are_refused():
    model = tiny("qwen3")
    model.config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(ModelError, match="linear_attention"):
        cache_plan(model, FORMATS["int4"])


def test_rotations_that_are_not_known_are_refused():
    with pytest.raises(ModelError, match="gptj"):
        cache_plan(tiny("gptj"), named_format("int4-prerope"))
