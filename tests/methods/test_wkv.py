"""WKVQuant's statistics: shifts and scales that take outliers out, the search, ties, and what it writes."""

import pytest
import torch
from torch import Tensor

from halfbyte.calibration.cache import CacheStatistics, Extremes
from halfbyte.errors import CalibrationError, RecipeError
from halfbyte.methods.wkv import WKV, attend, attention_error, exact_attention, scale_of, shift_of, tie_pairs
from halfbyte.numerics.cache import NO_SMOOTHING, layer_coders, rotate
from halfbyte.recipe import Recipe
from halfbyte.scheme import CacheFormat

FORMAT = CacheFormat()


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def statistics(tokens: int = 24, heads: int = 2, dim: int = 16, batches: int = 2) -> CacheStatistics:
    """Two query heads for each of keys and values with loud channels and biases, seen before RoPE too."""
    found = CacheStatistics(scaling=dim**-0.5)
    for batch in range(batches):
        key, value = drawn(2, heads, tokens, dim, seed=batch), drawn(2, heads, tokens, dim, seed=10 + batch)
        key[..., 3] = key[..., 3] * 6 + 8
        value[..., 5] *= 12
        query = drawn(2, 2 * heads, tokens, dim, seed=20 + batch)
        query[..., 3] /= 6
        angles = torch.outer(torch.arange(tokens), 0.5 ** torch.arange(dim // 2)).repeat(1, 2)[None]
        turn = angles.cos(), angles.sin()
        found.absorb(rotate(query, *turn), rotate(key, *turn), value, turn)
    return found


def error(seen: CacheStatistics, step: WKV | None, format: CacheFormat = FORMAT) -> float:
    smoothing = NO_SMOOTHING if step is None else step.smooth(seen, format, 0, 1)
    return attention_error(seen, exact_attention(seen), format, layer_coders(format, 0, 1, smoothing))


def test_statistics_of_two_batches_are_those_of_both():
    x = drawn(4, 2, 5, 6)
    merged, whole = Extremes.of(x[:1]).merge(Extremes.of(x[1:])), Extremes.of(x)
    assert merged.tokens == whole.tokens == 20
    for one, other in zip(
        (merged.total, merged.squares, merged.minimum, merged.maximum),
        (whole.total, whole.squares, whole.minimum, whole.maximum),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_keys_before_rope_are_unrotated():
    seen = statistics()
    assert seen.bare_keys is not None
    assert seen.keys is not None
    bias = seen.bare_keys.total[:, 3] / seen.bare_keys.tokens
    assert float((bias - 8).abs().max()) < 2
    assert float((seen.keys.total[:, 3] / seen.keys.tokens).abs().max()) < 6


def test_what_is_smoothed_is_centred_and_equally_wide():
    x = drawn(1, 2, 500, 8) * torch.arange(1.0, 9) + 3
    seen = Extremes.of(x)
    shift = shift_of(seen, "midrange")
    scale = scale_of(seen, shift, "reach", 1.0)
    inside = (x - shift[:, None]) / scale[:, None]
    reach = inside.abs().amax((0, 2))
    torch.testing.assert_close(reach, reach[:, :1].expand_as(reach))
    torch.testing.assert_close(scale.log().mean(1), torch.zeros(2), atol=1e-5, rtol=0)
    deviation = scale_of(seen, shift_of(seen, "mean"), "deviation", 1.0)
    torch.testing.assert_close(deviation[0] / deviation[0, 0], torch.arange(1.0, 9), rtol=0.2, atol=0)


def test_a_channel_that_never_moves_keeps_a_positive_scale():
    seen = Extremes.of(torch.zeros(1, 2, 5, 4))
    scale = scale_of(seen, shift_of(seen, "mean"), "reach", 1.0)
    assert bool((scale > 0).all() & torch.isfinite(scale).all())


@pytest.mark.parametrize("rope", ["before", "after"])
def test_two_dimensions_err_less_than_one(rope):
    seen, format = statistics(), CacheFormat(rope=rope)
    plain, fixed, searched = (
        error(seen, None, format),
        error(seen, WKV(search=False), format),
        error(seen, WKV(), format),
    )
    assert searched <= fixed
    assert searched < plain / 2


def test_tied_scales_are_the_same_for_a_pair_and_shift_no_keys():
    smoothing = WKV(tied=True).smooth(statistics(), FORMAT, 0, 1)
    assert smoothing.key_shift is None
    assert smoothing.value_shift is not None
    scale = smoothing.key_scale
    assert scale is not None
    assert torch.equal(scale[:, :8], scale[:, 8:])


def test_ties_leave_channels_that_do_not_turn():
    scale = drawn(2, 8).exp()
    tied = tie_pairs(scale, 4)
    assert torch.equal(tied[:, 4:], scale[:, 4:])
    torch.testing.assert_close(tied[:, 0], (scale[:, 0] * scale[:, 2]).sqrt())


def test_attention_without_a_cache_is_pytorchs():
    seen = statistics()
    query, key, value = seen.samples[0]
    found = attend(query, (key, key), (value, value), seen.scaling, FORMAT, layer_coders(FORMAT, 0, 1))
    wanted = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=seen.scaling, enable_gqa=True
    )
    torch.testing.assert_close(found.flatten(1, 2), wanted, rtol=1e-4, atol=1e-5)


def swapped_keys_and_values(seen: CacheStatistics) -> float:
    found = WKV().smooth(seen, FORMAT, 0, 1)
    wrong = type(found)(found.value_shift, found.value_scale, found.key_shift, found.key_scale)
    return attention_error(seen, exact_attention(seen), FORMAT, layer_coders(FORMAT, 0, 1, wrong))


def statistics_of_rotated_keys(seen: CacheStatistics) -> float:
    """Keys before RoPE, smoothed by what was seen after it."""
    before = CacheFormat(rope="before")
    wrong = WKV(search=False).smooth(seen, FORMAT, 0, 1)
    return attention_error(seen, exact_attention(seen), before, layer_coders(before, 0, 1, wrong))


@pytest.mark.parametrize(
    ("bug", "format"),
    [(swapped_keys_and_values, FORMAT), (statistics_of_rotated_keys, CacheFormat(rope="before"))],
)
def test_the_comparison_notices(bug, format):
    seen = statistics()
    assert bug(seen) > 1.3 * error(seen, WKV(), format)


def test_keys_before_rope_that_nobody_saw_are_refused():
    seen = statistics()
    seen.bare_keys = None
    with pytest.raises(CalibrationError, match="rope: after"):
        WKV().smooth(seen, CacheFormat(rope="before"), 0, 1)


@pytest.mark.parametrize(("fields", "problem"), [
    ({"scheme": {"weights": None}, "steps": [{"method": "wkv"}]}, "give `scheme.cache`"),
    ({"scheme": {"weights": None, "cache": {}}, "steps": [{"method": "wkv"}, {"method": "wkv"}]}, "once"),
    ({"scheme": {"weights": None, "cache": {}}, "steps": [{"method": "gptq"}, {"method": "wkv"}]}, "nothing to do for gptq"),
    ({"scheme": {"cache": {}}, "steps": [{"method": "wkv"}, {"method": "gptq"}]}, "and wkv for the cache"),
    ({"scheme": {"cache": {}}, "steps": [{"method": "rtn"}, {"method": "wkvquant", "learn": "both"}]}, "add the step wkv"),
    ({"scheme": {"weights": None, "cache": {}}, "steps": [{"method": "wkvquant"}, {"method": "wkv"}]}, "to do for wkvquant"),
])  # fmt: skip
def test_a_recipe_that_makes_no_sense_is_refused(fields, problem):
    with pytest.raises(RecipeError, match=problem):
        Recipe.load(fields)


def test_the_shipped_recipes_say_what_they_do():
    cache_only, both = Recipe.load("wkvquant-kv4"), Recipe.load("wkvquant-w4kv4")
    assert cache_only.scheme.weights is None
    assert cache_only.needs_data
    assert not cache_only.needs_float_stream
    assert both.scheme.cache == cache_only.scheme.cache
    assert both.smoothing is not None
