"""One pass over a window equals decoding it token by token through the real cache."""

from dataclasses import replace

import pytest
import torch
from cached_models import FORMATS, stepwise, with_cache
from torch import Tensor

from closeness import relative_error
from halfbyte.errors import ModelError
from halfbyte.numerics.cache import Smoothing
from halfbyte.runtime import cache_attention
from halfbyte.runtime.cache_attention import seen_through_cache
from halfbyte.runtime.cache_plan import CachePlan, attach_cache, cache_plan, plan_of
from halfbyte.scheme import CacheFormat
from tiny_models import tiny, tokens

CODES = CacheFormat(key_bits=4, value_bits=4)


@torch.no_grad()
def in_one_pass(model, ids: Tensor, plan: CachePlan | None = None, **inputs: Tensor) -> Tensor:
    plan = plan or plan_of(model)
    assert plan is not None
    with seen_through_cache(model, plan):
        return model(input_ids=ids, use_cache=False, **inputs).logits


@pytest.fixture(autouse=True)
def few_queries_at_once(monkeypatch):
    monkeypatch.setattr(cache_attention, "QUERIES_AT_ONCE", 7)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt_neox"])
def test_one_pass_equals_decoding_token_by_token(architecture, name):
    """In float32: a number halfway between two codes may go either way, which 1e-3 allows and a wrong rule exceeds."""
    model, ids = with_cache(tiny(architecture), FORMATS[name]), tokens(2, 26)
    with torch.no_grad():
        exact = model(input_ids=ids, use_cache=False).logits
    found, wanted = in_one_pass(model, ids), stepwise(model, ids)
    assert relative_error(found, wanted) < min(1e-3, float(relative_error(wanted, exact)) / 10)


@pytest.mark.parametrize(
    "architecture", ["mistral", "gemma2", "gemma3_text", "qwen3", "phi3", "gpt2", "opt", "mixtral", "qwen3_moe"]
)
def test_it_does_so_in_every_family_that_attends_by_the_interface(architecture):
    model, ids = with_cache(tiny(architecture), FORMATS["k8v3-s2-w3"]), tokens(1, 20)
    assert relative_error(in_one_pass(model, ids), stepwise(model, ids)) < 1e-3


def test_a_sliding_window_of_the_model_is_kept():
    model = with_cache(tiny("mistral", sliding_window=6), FORMATS["int4"])
    ids = tokens(1, 20)
    assert relative_error(in_one_pass(model, ids), stepwise(model, ids)) < 1e-3


@pytest.mark.parametrize("rope", ["after", "before"])
def test_smoothing_is_part_of_both(rope):
    model, ids = tiny("qwen2"), tokens(2, 20)
    dice = torch.Generator().manual_seed(0)
    drawn = [torch.randn(2, 8, generator=dice) for _ in range(4)]
    smoothing = Smoothing(drawn[0], drawn[1].exp(), drawn[2], drawn[3].exp())
    format = CODES.model_copy(update={"rope": rope})
    attach_cache(model, cache_plan(model, format, {0: smoothing, 1: smoothing}))
    plain = in_one_pass(model, ids, cache_plan(model, format))
    found = in_one_pass(model, ids)
    assert relative_error(found, stepwise(model, ids)) < 1e-3
    assert relative_error(found, plain) > 3e-3


def test_padding_is_not_seen():
    model, ids = with_cache(tiny("llama"), FORMATS["int4"]), tokens(1, 15)
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), ids], dim=1)
    mask = torch.cat([torch.zeros(1, 5, dtype=torch.long), torch.ones_like(ids)], dim=1)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    found = in_one_pass(model, padded, attention_mask=mask, position_ids=places)[:, 5:]
    assert relative_error(found, in_one_pass(model, ids)) < 1e-5


def test_many_bits_come_near_the_float_model():
    model, ids = with_cache(tiny("llama"), CacheFormat(key_bits=8, value_bits=8)), tokens(2, 20)
    with torch.no_grad():
        exact = model(input_ids=ids, use_cache=False).logits
    assert relative_error(in_one_pass(model, ids), exact) < 0.01


def test_the_model_is_afterwards_what_it_was():
    model, ids = tiny("llama"), tokens()
    with torch.no_grad():
        before = model(input_ids=ids, use_cache=False).logits
        in_one_pass(model, ids, cache_plan(model, CODES))
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, before)
    assert model.config._attn_implementation == "sdpa"


def no_exact_diagonal(exact: Tensor) -> Tensor:
    return exact.tril(-1).triu(-(10**6)) & False


def all_exact(exact: Tensor) -> Tensor:
    return torch.ones_like(exact)


def one_off(exact: Tensor) -> Tensor:
    return exact.roll(1, dims=0)


@pytest.mark.parametrize("bug", [no_exact_diagonal, all_exact, one_off])
def test_the_comparison_notices(bug, monkeypatch):
    original = cache_attention.exact_tokens
    monkeypatch.setattr(cache_attention, "exact_tokens", lambda *arguments: bug(original(*arguments)))
    model, ids = with_cache(tiny("llama"), CODES), tokens(2, 26)
    assert relative_error(in_one_pass(model, ids), stepwise(model, ids)) > 3e-3


def test_the_comparison_notices_smoothing_of_another_layer():
    model, ids = tiny("qwen2"), tokens(2, 20)
    shift = 3 * torch.randn(2, 8, generator=torch.Generator().manual_seed(1))
    attach_cache(model, cache_plan(model, CODES, {0: Smoothing(key_shift=shift)}))
    plan = plan_of(model)
    assert plan is not None
    wrong = replace(plan, layers=plan.layers[::-1])
    assert relative_error(in_one_pass(model, ids, wrong), stepwise(model, ids)) > 3e-3


@pytest.mark.parametrize("architecture", ["bloom", "gptj", "falcon"])
def test_attention_code_of_its_own_is_refused(architecture):
    model = tiny(architecture)
    with pytest.raises(ModelError, match="attention code of its own"):
        in_one_pass(model, tokens(), cache_plan(model, CODES))


def test_a_cache_within_it_is_refused():
    model, ids = with_cache(tiny("llama"), CODES), tokens()
    plan = plan_of(model)
    assert plan is not None
    with seen_through_cache(model, plan), pytest.raises(ModelError, match="give it no cache"):
        stepwise(model, ids)


def test_learned_sinks_are_refused():
    module = torch.nn.Module()
    x = torch.zeros(1, 1, 2, 4)
    with pytest.raises(ModelError, match="serves within"):
        cache_attention.past_only_attention(module, x, x, x, None)
