"""Learning through a cache sees what decoding through it gives, and gradients pass."""

import pytest
import torch

from closeness import relative_error
from halfbyte.calibration import past_only
from halfbyte.calibration.past_only import BlockCache, LearnedSmoothing, attending_past_only
from halfbyte.calibration.walk import enter
from halfbyte.models.tables import architecture_of
from halfbyte.numerics.cache import Smoothing
from halfbyte.runtime.cache_attention import seen_through_cache
from halfbyte.runtime.cache_plan import cache_plan, named_format
from tiny_models import tiny, tokens

CPU = torch.device("cpu")
TOKENS = 26


def smoothing(heads: int, dim: int) -> Smoothing:
    generator = torch.Generator().manual_seed(0)
    shift = torch.randn(heads, dim, generator=generator)
    return Smoothing(shift, shift.abs() + 0.2, -shift, shift.exp())


@torch.no_grad()
def disagreement(architecture: str, name: str, *, smooth: bool = False) -> float:
    """Of the hidden states before the head: block after block in calibration, against the whole model through the cache."""
    model, ids = tiny(architecture), tokens(2, TOKENS)
    table = architecture_of(model.config.model_type)
    blocks = list(model.get_submodule(table.blocks))
    config = model.config
    heads, dim = getattr(config, "num_key_value_heads", config.num_attention_heads), 8
    found = dict.fromkeys(range(len(blocks)), smoothing(heads, dim)) if smooth else None
    plan = cache_plan(model, named_format(name), found)
    stream = enter(model, blocks, [ids], CPU, CPU)
    for index, block in enumerate(blocks):
        with attending_past_only(block, plan.layers[index], plan.format):
            stream.advance(block, index)
    with seen_through_cache(model, plan):
        expected = model.get_submodule(table.blocks.rpartition(".")[0])(
            input_ids=ids, use_cache=False
        ).last_hidden_state
    return relative_error(model.get_submodule(table.final_norm)(stream.hidden[0]), expected)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt_neox"])
@pytest.mark.parametrize("name", ["int4", "k8v3-s2-w3", "int4-present", "int3-prerope-w2"])
def test_calibration_sees_what_decoding_gives(architecture, name):
    assert disagreement(architecture, name) < 1e-5


def test_shifts_and_scales_take_part():
    assert disagreement("llama", "int4-prerope", smooth=True) < 1e-5


def test_gradients_pass_to_keys_and_values_and_all_is_undone():
    model = tiny("llama")
    block = model.model.layers[0]
    plan = cache_plan(model, named_format("int4"))
    stream = enter(model, list(model.model.layers), [tokens(2, TOKENS)], CPU, CPU)
    exact = stream.run(block, 0, 0)
    projections = [block.self_attn.k_proj.weight, block.self_attn.v_proj.weight]
    for weight in projections:
        weight.requires_grad_()
    with attending_past_only(block, plan.layers[0], plan.format):
        answer = stream.run(block, 0, 0)
    answer.square().sum().backward()
    assert all(weight.grad.abs().min() > 0 for weight in projections)
    assert relative_error(answer.detach(), exact.detach()) > 1e-3
    with torch.no_grad():
        assert torch.equal(stream.run(block, 0, 0), exact)
    assert past_only.STATE not in block.self_attn.__dict__


def test_learning_begins_with_what_was_found():
    start = smoothing(2, 8)
    learned = LearnedSmoothing.of(start).settled()
    for name in ("key_shift", "key_scale", "value_shift", "value_scale"):
        assert torch.equal(getattr(learned, name), getattr(start, name))
        assert not getattr(learned, name).requires_grad


def test_one_rate_suits_quiet_and_loud_channels():
    """A step of the learned numbers moves a scale by a part of itself, and a shift by a part of the scale."""
    start = smoothing(2, 8)
    learned = LearnedSmoothing.of(start)
    for tensor in learned.tensors:
        tensor.data += 0.01
    found = learned.settled()
    for side in ("key", "value"):
        scale = getattr(start, f"{side}_scale")
        torch.testing.assert_close(
            getattr(found, f"{side}_scale") / scale, torch.full_like(scale, 1.01005), rtol=1e-4, atol=0
        )
        moved = getattr(found, f"{side}_shift") - getattr(start, f"{side}_shift")
        torch.testing.assert_close(moved / scale, torch.full_like(scale, 0.01), rtol=1e-2, atol=0)


def test_tied_keys_do_not_learn():
    start = Smoothing(None, torch.ones(2, 8), torch.zeros(2, 8), torch.ones(2, 8))
    learned = LearnedSmoothing.of(start)
    assert learned.factors.keys() == learned.moves.keys() == {"value"}
    assert learned.smoothing().key_scale is start.key_scale


def test_slopes_reach_shifts_and_scales_through_attention():
    model = tiny("llama")
    block = model.model.layers[0]
    stream = enter(model, list(model.model.layers), [tokens(2, TOKENS)], CPU, CPU)
    exact = stream.run(block, 0, 0)
    cache = BlockCache(named_format("int3-prerope-s1"), 0, 2, smoothing(2, 8))
    learned = LearnedSmoothing.of(cache.smoothing)
    with cache.attending(block, learned.smoothing()):
        answer = stream.run(block, 0, 0)
    (answer - exact).square().sum().backward()
    assert all(tensor.grad.abs().amax(dim=1).min() > 0 for tensor in learned.tensors), "every head learns"
    with cache.attending(block):
        assert torch.equal(stream.run(block, 0, 0), answer)


@pytest.mark.parametrize("bug", ["the diagonal is quantized too", "later tokens are seen", "rotation forgotten"])
def test_planted_bugs_are_seen(bug, monkeypatch):
    if bug == "the diagonal is quantized too":
        real = past_only.exact_tokens
        monkeypatch.setattr(past_only, "exact_tokens", lambda *args: torch.zeros_like(real(*args)))
    elif bug == "later tokens are seen":
        monkeypatch.setattr(past_only, "_masked", lambda scores, _mask, _places: scores)
    else:
        monkeypatch.setattr(past_only, "unrotate", lambda x, *_: x)
    assert disagreement("llama", "int4-prerope") > 1e-3
