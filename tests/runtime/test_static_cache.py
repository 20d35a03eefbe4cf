"""The cache of fixed size shows what the growing one shows, in place and under torch.compile."""

import pytest
import torch
from cached_models import FORMATS, stepwise, with_cache

from closeness import relative_error
from halfbyte.errors import FormatError
from halfbyte.numerics.cache import layer_coders
from halfbyte.runtime.cache import QuantizedCache
from halfbyte.runtime.cache_plan import new_cache
from halfbyte.runtime.static_cache import StaticQuantizedLayer, StaticSide
from halfbyte.scheme import CacheFormat
from tiny_models import tiny, tokens

FIXED = [name for name, format in FORMATS.items() if format.keys == "token"]


@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize("prompt", [1, 9])
@torch.no_grad()
def test_it_answers_as_the_growing_one(name, prompt):
    model, ids = with_cache(tiny("llama"), FORMATS[name]), tokens(2, 16)
    answers = []
    for cache in (new_cache(model), new_cache(model, capacity=24)):
        begun = model(input_ids=ids[:, :prompt], past_key_values=cache, use_cache=True).logits
        answers.append(torch.cat([begun, stepwise(model, ids[:, prompt:], cache)], dim=1))
    # a window is counted from the end of a prompt whose own tokens are quantized too, in both the same
    assert relative_error(answers[1], answers[0]) < 1e-5


@torch.no_grad()
def test_its_buffers_stay_where_they_are():
    model, ids = with_cache(tiny("llama"), FORMATS["k8v3-s2-w3"]), tokens(2, 12)
    cache = new_cache(model, capacity=20)
    model(input_ids=ids, past_key_values=cache, use_cache=True)
    side = cache.layers[0].key_side
    before, size = [tensor.data_ptr() for tensor in side.tensors], cache.nbytes
    stepwise(model, ids[:, :5], cache)
    assert [tensor.data_ptr() for tensor in side.tensors] == before
    assert cache.nbytes == size


def test_the_layout_is_as_documented():
    layer = StaticQuantizedLayer(layer_coders(CacheFormat(window=3, sinks=1), 0, 1), CacheFormat(window=3, sinks=1), 10)
    layer.update(torch.randn(2, 4, 5, 256), torch.randn(2, 4, 5, 256))
    side = layer.key_side
    assert side.zeros is not None
    assert side.codes.shape == (2, 4, 10, 128)
    assert side.codes.dtype == torch.uint8
    assert side.scales.shape == side.zeros.shape == (2, 4, 10, 2)
    assert side.scales.dtype == side.zeros.dtype == torch.float16
    assert side.codes.is_contiguous()


@pytest.mark.parametrize("name", ["k8v3-s2-w3", "int3-prerope-w2"])
@torch.no_grad()
def test_a_compiled_step_answers_as_an_eager_one(name):
    torch.compiler.reset()
    model, ids = with_cache(tiny("llama"), FORMATS[name]), tokens(2, 12)
    cache, other = new_cache(model, capacity=20), new_cache(model, capacity=20)
    compiled = torch.compile(model.forward, backend="eager", fullgraph=True)
    for each in (cache, other):
        model(input_ids=ids[:, :6], past_key_values=each, use_cache=True)
    for place in range(6, 12):
        step = ids[:, place : place + 1]
        wanted = model(input_ids=step, past_key_values=other, use_cache=True).logits
        found = compiled(input_ids=step, past_key_values=cache, use_cache=True).logits
        assert relative_error(found, wanted) < 1e-5


@pytest.mark.parametrize("name", ["k8v3-s2-w3", "int3-prerope-w2"])
@torch.no_grad()
def test_beams_go_on_from_their_own_past(name):
    model, ids = with_cache(tiny("llama"), FORMATS[name]), tokens(3, 9)
    cache, other = new_cache(model, capacity=16), new_cache(model, capacity=16)
    order = torch.tensor([1, 1, 0])
    model(input_ids=ids, past_key_values=cache, use_cache=True)
    model(input_ids=ids[order], past_key_values=other, use_cache=True)
    cache.reorder_cache(order)
    assert relative_error(stepwise(model, ids[:, :3], cache), stepwise(model, ids[:, :3], other)) < 1e-6


def test_generate_takes_it():
    model, ids = with_cache(tiny("llama"), FORMATS["int4"]), tokens(2, 9)
    grown = model.generate(ids, do_sample=False, max_new_tokens=6, pad_token_id=0)
    fixed = model.generate(
        ids, past_key_values=new_cache(model, capacity=32), do_sample=False, max_new_tokens=6, pad_token_id=0
    )
    assert torch.equal(fixed, grown)


@torch.no_grad()
def test_the_comparison_notices_a_window_that_is_one_token_off(monkeypatch):
    remember = StaticSide._remember
    monkeypatch.setattr(StaticSide, "_remember", lambda side, x, places: remember(side, x, places + 1))
    model, ids = with_cache(tiny("llama"), FORMATS["k8v3-s2-w3"]), tokens(2, 12)
    wrong = stepwise(model, ids, new_cache(model, capacity=20))
    assert relative_error(wrong, stepwise(model, ids)) > 1e-3


def test_what_a_fixed_size_cannot_hold_is_refused():
    with pytest.raises(FormatError, match="it grows"):
        new_cache(with_cache(tiny("llama"), FORMATS["kivi"]), capacity=20)


def test_a_capacity_that_only_the_exact_tokens_fill_is_refused():
    with pytest.raises(FormatError, match="larger capacity"):
        StaticQuantizedLayer(layer_coders(FORMATS["k8v3-s2-w3"], 0, 1), FORMATS["k8v3-s2-w3"], 5)


def test_it_is_not_cropped():
    cache = new_cache(with_cache(tiny("llama"), FORMATS["int4"]), capacity=20)
    assert isinstance(cache, QuantizedCache)
    with pytest.raises(FormatError, match="not cropped"):
        cache.crop(-1)
    assert not cache.is_croppable
