"""The growing cache: past-only, quantized once, and everything that transformers asks of a cache."""

import copy
from typing import Any

import pytest
import torch
from cached_models import FORMATS, stepwise, with_cache
from torch import Tensor

from closeness import relative_error
from halfbyte.errors import FormatError, ModelError
from halfbyte.numerics.cache import layer_coders
from halfbyte.runtime.cache import QuantizedCache, QuantizedLayer
from halfbyte.runtime.cache_plan import new_cache, plan_of
from halfbyte.runtime.cache_rows import FEWEST_ROWS, Rows
from halfbyte.scheme import CacheFormat
from tiny_models import tiny, tokens

NO_SAMPLING: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 6}


def states(tokens: int, seed: int = 0, batch: int = 2, heads: int = 2, dim: int = 8) -> Tensor:
    return torch.randn(batch, heads, tokens, dim, generator=torch.Generator().manual_seed(seed))


def layer(format: CacheFormat) -> QuantizedLayer:
    return QuantizedLayer(layer_coders(format, 0, 3), format)


@torch.no_grad()
def prefilled(model: Any, ids: Tensor, cache: QuantizedCache | None = None) -> tuple[Tensor, QuantizedCache]:
    cache = new_cache(model) if cache is None else cache
    return model(input_ids=ids, past_key_values=cache, use_cache=True).logits, cache


def test_prefill_attends_in_full_precision():
    model, ids = tiny("llama"), tokens()
    with torch.no_grad():
        exact = model(input_ids=ids, use_cache=False).logits
    logits, _ = prefilled(with_cache(model, FORMATS["int2"]), ids)
    assert relative_error(logits, exact) < 1e-6


def test_with_the_current_token_quantized_too_prefill_does_not():
    model, ids = tiny("llama"), tokens()
    with torch.no_grad():
        exact = model(input_ids=ids, use_cache=False).logits
    logits, _ = prefilled(with_cache(model, FORMATS["int4-present"]), ids)
    assert relative_error(logits, exact) > 1e-3


@pytest.mark.parametrize("name", ["int4", "k8v3-s2-w3", "kivi"])
def test_a_step_shows_the_past_as_stored_and_its_own_token_as_it_is(name):
    format = FORMATS[name]
    cache, x = layer(format), states(23)
    cache.update(x[:, :, :22], -x[:, :, :22])
    keys, values = cache.update(x[:, :, 22:], -x[:, :, 22:])
    assert torch.equal(keys[:, :, 22:], x[:, :, 22:])
    for seen, new, side in ((keys, x, cache.key_side), (values, -x, cache.value_side)):
        block, sinks = side.coder.block, format.sinks
        until = sinks + (22 - format.window - sinks) // block * block
        wanted = side.coder.simulate(new[:, :, sinks:until])
        assert torch.equal(seen[:, :, sinks:until], wanted)
        assert torch.equal(seen[:, :, :sinks], new[:, :, :sinks])
        assert torch.equal(seen[:, :, until:], new[:, :, until:])


def test_a_token_is_quantized_once_and_never_again():
    cache, x = layer(FORMATS["int4"]), states(300)
    cache.update(x[:, :, :5], x[:, :, :5])
    first = cache.key_side.codes.taken.clone(), cache.key_side.scales.taken.clone()
    for place in range(5, 300):
        cache.update(x[:, :, place : place + 1], x[:, :, place : place + 1])
    assert torch.equal(cache.key_side.codes.taken[:, :, :5], first[0])
    assert torch.equal(cache.key_side.scales.taken[:, :, :5], first[1])


def test_growing_copies_a_bounded_number_of_rows_for_each():
    rows, copied, capacity = Rows(0), 0, 0
    for _ in range(20_000):
        rows.append(torch.zeros(1, 1, dtype=torch.uint8))
        assert rows.buffer is not None
        if len(rows.buffer) != capacity:
            copied, capacity = copied + rows.length, len(rows.buffer)
    assert copied < 20 * 20_000
    assert capacity <= 20_000 * 17 / 16 + FEWEST_ROWS


@pytest.mark.parametrize(("tokens", "sinks", "window", "limit"), [
    (2048, 0, 0, 0.27), (32768, 0, 0, 0.27), (32768, 4, 64, 0.29),
])  # fmt: skip
def test_the_cache_is_a_quarter_of_bfloat16(tokens, sinks, window, limit):
    cache = layer(CacheFormat(sinks=sinks, window=window))
    x = states(tokens, batch=1, heads=1, dim=128).to(torch.bfloat16)
    cache.update(x, x)
    held = [cache.key_side, cache.value_side]
    stored = [rows.buffer for side in held for rows in (side.codes, side.scales, side.zeros)]
    exact = [part for side in held for part in (side.sinks, side.tail) if part is not None]
    assert cache.nbytes == sum(t.untyped_storage().nbytes() for t in [*stored, *exact] if t is not None)
    assert cache.nbytes <= limit * 2 * x.nbytes


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt_neox", "gemma2", "bloom", "gptj", "falcon"])
def test_models_generate_through_it(architecture):
    model, ids = with_cache(tiny(architecture), FORMATS["int4"]), tokens()
    written = model.generate(ids, return_dict_in_generate=True, **NO_SAMPLING)
    assert isinstance(written.past_key_values, QuantizedCache)
    assert written.past_key_values.get_seq_length() == ids.shape[1] + 5


@pytest.mark.parametrize("name", [name for name in FORMATS if "kivi" not in name and "s2" not in name])
def test_padding_changes_no_answer(name):
    """Sinks and blocks are counted from the first slot, padding included, so formats with them are left out."""
    model, ids = with_cache(tiny("llama"), FORMATS[name]), tokens(1, 13)
    alone = model.generate(ids, output_logits=True, return_dict_in_generate=True, **NO_SAMPLING)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], dim=1)
    mask = torch.cat([torch.zeros(1, 4, dtype=torch.long), torch.ones_like(ids)], dim=1)
    both = torch.cat([padded, tokens(1, 17, seed=1)]), torch.cat([mask, torch.ones(1, 17, dtype=torch.long)])
    beside = model.generate(both[0], attention_mask=both[1], output_logits=True, return_dict_in_generate=True,
                            **NO_SAMPLING)  # fmt: skip
    assert relative_error(torch.stack(beside.logits)[:, :1], torch.stack(alone.logits)) < 1e-5


@pytest.mark.parametrize("name", FORMATS)
def test_beams_go_on_from_their_own_past(name):
    model, ids = with_cache(tiny("qwen2"), FORMATS[name]), tokens(3, 12)
    _, cache = prefilled(model, ids)
    order = torch.tensor([2, 0, 0])
    cache.reorder_cache(order)
    _, other = prefilled(model, ids[order])
    assert relative_error(stepwise(model, ids[:, :4], cache), stepwise(model, ids[:, :4], other)) < 1e-5
    assert model.generate(ids, num_beams=3, **NO_SAMPLING).shape == (3, 18)


@pytest.mark.parametrize("name", FORMATS)
def test_rows_of_the_batch_are_repeated_and_selected(name):
    model, ids = with_cache(tiny("llama"), FORMATS[name]), tokens(2, 12)
    _, cache = prefilled(model, ids)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 3]))
    _, other = prefilled(model, ids)
    assert relative_error(stepwise(model, ids[:, :3], cache), stepwise(model, ids[:, :3], other)) < 1e-5


@pytest.mark.parametrize("name", ["int4", "int2", "int4-sym", "int4-present", "int4-e1"])
def test_a_cropped_cache_is_one_that_never_saw_the_rest(name):
    model, ids = with_cache(tiny("llama"), FORMATS[name]), tokens(2, 20)
    _, cache = prefilled(model, ids[:, :15])
    cache.crop(-4)
    assert cache.get_seq_length() == 11
    _, fresh = prefilled(model, ids[:, :11])
    assert relative_error(stepwise(model, ids[:, 11:], cache), stepwise(model, ids[:, 11:], fresh)) < 1e-5


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("removed", [0, 1, 7, 14, 15])
def test_any_crop_leaves_a_cache_that_goes_on(name, removed):
    """What was rounded stays rounded, so the answers are those of a cache with fewer exact tokens."""
    model, ids = with_cache(tiny("llama"), FORMATS[name]), tokens(2, 20)
    _, cache = prefilled(model, ids[:, :15])
    cache.crop(-removed)
    assert cache.get_seq_length() == 15 - removed
    again = stepwise(model, ids[:, 15 - removed :], cache)
    assert cache.get_seq_length() == 20
    assert relative_error(again, stepwise(model, ids)[:, 15 - removed :]) < 0.3


def test_only_a_negative_number_crops():
    with pytest.raises(ModelError, match="positive"):
        layer(FORMATS["int4"]).crop(3)


def test_a_conversation_goes_on():
    model, ids = with_cache(tiny("llama"), FORMATS["k8v3-s2-w3"]), tokens(1, 16)
    cache = new_cache(model)
    first = model.generate(ids[:, :9], past_key_values=cache, **NO_SAMPLING)
    length = cache.get_seq_length()
    both = torch.cat([first, ids[:, 9:]], dim=1)
    model.generate(both, past_key_values=cache, **NO_SAMPLING)
    assert cache.get_seq_length() == both.shape[1] + 5 > length


def test_a_reset_cache_is_a_new_one():
    model, ids = with_cache(tiny("llama"), FORMATS["int3-prerope-w2"]), tokens()
    _, cache = prefilled(model, ids)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert relative_error(stepwise(model, ids, cache), stepwise(model, ids)) == 0


def test_assisted_generation_crops_it():
    model = with_cache(tiny("llama"), FORMATS["int4"])
    written = model.generate(tokens(1, 9), assistant_model=tiny("llama", seed=1), **NO_SAMPLING)
    plain = model.generate(tokens(1, 9), **NO_SAMPLING)
    assert written.shape[1] <= plain.shape[1]


def test_keys_before_rope_need_the_hook():
    model = with_cache(tiny("llama"), FORMATS["int3-prerope-w2"])
    with pytest.raises(ModelError, match="attach_cache"):
        prefilled(tiny("llama"), tokens(), new_cache(model))


def test_rotations_are_kept_once_for_all_layers():
    model = with_cache(tiny("llama"), FORMATS["int3-prerope-w2"])
    _, cache = prefilled(model, tokens(2, 11))
    assert [shared.cos.length for shared in cache.rotations] == [11]


def test_groups_that_do_not_divide_the_heads_are_refused_before_anything_runs():
    with pytest.raises(FormatError, match="do not divide heads of 12"):
        with_cache(tiny("mistral"), CacheFormat(group_size=8))


def test_a_copy_of_the_model_has_the_plan():
    model = with_cache(tiny("llama"), FORMATS["int4"])
    assert plan_of(copy.deepcopy(model)) is not None
