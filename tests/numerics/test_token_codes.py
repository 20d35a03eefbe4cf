"""Keys and values as codes: half-step bounds, extremes, smoothing, blocks, and which tokens a query sees exactly."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from halfbyte.errors import FormatError
from halfbyte.numerics.cache import (
    Coder,
    Smoothing,
    TokenCodes,
    exact_tokens,
    layer_coders,
    rotate,
    tokens_to_store,
    unrotate,
)
from halfbyte.scheme import CacheFormat

HALF = 2**-11  # relative rounding of float16


def states(tokens: int = 7, dim: int = 16, heads: int = 2, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Signed, with a loud channel and one that is far from zero."""
    x = torch.randn(2, heads, tokens, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x[..., 3] *= 20
    x[..., 5] += 9
    return x.to(dtype)


def ranges(x: Tensor, coder: Coder) -> tuple[Tensor, Tensor]:
    """Of every number, the lowest and highest of its group."""
    grouped = x.unflatten(-1, (coder.groups(x.shape[-1]), -1))
    low, high = grouped.aminmax(dim=-1, keepdim=True)
    return low.expand_as(grouped).flatten(-2), high.expand_as(grouped).flatten(-2)


@settings(deadline=None, max_examples=40)
@given(bits=st.integers(2, 8), group=st.sampled_from([4, 8, 16, 128]), seed=st.integers(0, 2**16))
def test_no_number_moves_by_more_than_half_a_step_and_what_float16_rounds(bits: int, group: int, seed: int) -> None:
    x, coder = states(seed=seed), Coder(bits, group)
    low, high = ranges(x, coder)
    step = (high - low) / (2**bits - 1)
    # the zero is off by HALF·|low|, which the step makes up for at the other end; the step by HALF of itself
    bound = step / 2 + 2 * HALF * low.abs() + 2 * HALF * (high - low)
    assert bool(((coder.simulate(x) - x).abs() <= bound).all())


def test_symmetric_codes_have_no_zeros_and_stay_within_half_a_step():
    x, coder = states(), Coder(4, 16, symmetric=True)
    stored = coder.encode(x)
    assert stored.zeros is None
    step = x.abs().amax(-1, keepdim=True) / 7
    assert bool(((coder.decode(stored, x.dtype) - x).abs() <= step * (0.5 + 16 * HALF)).all())


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_group_of_equal_numbers_and_one_of_zeros_come_back(symmetric):
    x = torch.zeros(1, 1, 2, 8)
    x[0, 0, 1] = -3.0
    rounded = Coder(4, 8, symmetric).simulate(x)
    assert torch.equal(rounded[:, :, 0], x[:, :, 0])
    assert float((rounded - x).abs().max()) <= 3 * HALF


def test_every_code_appears_and_a_grid_comes_back_exactly():
    x = torch.arange(16.0).view(1, 1, 1, 16) - 5
    stored = Coder(4, 128).encode(x)
    assert stored.codes.flatten().tolist() == list(range(16))
    assert torch.equal(Coder(4, 128).decode(stored, x.dtype), x)


def test_a_second_rounding_changes_nothing():
    coder = Coder(4, 8)
    once = coder.simulate(states())
    assert float((coder.simulate(once) - once).norm() / once.norm()) < 8 * HALF


def test_tokens_do_not_influence_each_other():
    x = states(tokens=9)
    whole, alone = Coder(4, 8).simulate(x), Coder(4, 8).simulate(x[:, :, 4:5])
    assert torch.equal(whole[:, :, 4:5], alone)


@pytest.mark.parametrize("symmetric", [False, True])
def test_numbers_beyond_float16_come_back_finite(symmetric):
    x = torch.tensor([-1e9, -1.0, 1.0, 1e9]).view(1, 1, 1, 4)
    assert bool(torch.isfinite(Coder(4, 4, symmetric).simulate(x)).all())


def test_heads_narrower_than_a_group_are_one_group_and_others_must_divide():
    assert Coder(4, 128).groups(64) == 1
    assert Coder(4, 64).groups(128) == 2
    with pytest.raises(FormatError, match="128 channels do not divide heads of 192"):
        Coder(4, 128).groups(192)


def test_float32_agrees_with_the_float64_reference():
    """Codes near the middle between two may differ, by one step of their group."""
    x = states(dtype=torch.float32)
    coder = Coder(4, 8)
    here, there = coder.encode(x), coder.encode(x.double())
    assert torch.equal(here.scales, there.scales)
    assert int((here.codes.int() - there.codes.int()).abs().max()) <= 1
    assert float((here.codes != there.codes).double().mean()) < 0.01


def test_shift_and_scale_take_outliers_out_of_the_range():
    x = states(tokens=64)
    low, high = x.amin((0, 2)), x.amax((0, 2))
    shift = (low + high) / 2
    smooth = Coder(4, 16, shift=shift, scale=(high - shift).clamp(min=1e-5))
    plain = float((Coder(4, 16).simulate(x) - x)[..., :3].norm())
    assert float((smooth.simulate(x) - x)[..., :3].norm()) < plain / 4


def test_turned_channels_share_the_range_of_a_loud_one():
    x = states(tokens=64)
    turned = Coder(4, 16, turned=True)
    assert float((turned.simulate(x) - x).norm()) < float((Coder(4, 16).simulate(x) - x).norm()) * 0.9
    fine = Coder(8, 16, turned=True)
    assert float((fine.simulate(x) - x).norm() / x.norm()) < 2**-8
    with pytest.raises(FormatError, match="heads of 7 channels cannot be rotated"):
        Coder(4, 16, turned=True).groups(7)


def without_shift_back(x: Tensor, coder: Coder) -> Tensor:
    return replace(coder, shift=None).decode(coder.encode(x), x.dtype)


def interleaved_groups(x: Tensor, coder: Coder) -> Tensor:
    stored = coder.encode(x)
    assert stored.zeros is not None
    return coder.decode(TokenCodes(stored.codes, stored.scales.roll(1, -1), stored.zeros), x.dtype)


def forgotten_zeros(x: Tensor, coder: Coder) -> Tensor:
    stored = coder.encode(x)
    assert stored.zeros is not None
    return coder.decode(TokenCodes(stored.codes, stored.scales, torch.zeros_like(stored.zeros)), x.dtype)


@pytest.mark.parametrize("bug", [without_shift_back, interleaved_groups, forgotten_zeros])
def test_the_comparison_notices(bug):
    x = states()
    coder = Coder(8, 8, shift=torch.full((2, 16), 2.0, dtype=torch.float64))
    assert float((coder.simulate(x) - x).norm() / x.norm()) < 0.01
    assert float((bug(x, coder) - x).norm() / x.norm()) > 0.05


def test_blocks_have_a_grid_per_channel_and_leave_an_unfinished_one_exact():
    x = states(tokens=11)
    coder = Coder(4, 16, block=4)
    stored = coder.encode(x[:, :, :8])
    assert stored.scales.shape == (2, 2, 2, 16)
    rounded = coder.simulate(x)
    assert torch.equal(rounded[:, :, 8:], x[:, :, 8:])
    step = (x[:, :, :4].amax(2) - x[:, :, :4].amin(2)) / 15
    assert bool(((rounded - x)[:, :, :4].abs().amax(2) <= step * 0.6 + 0.02).all())


def test_128_channels_of_4_bits_take_4_and_a_quarter():
    stored = Coder(4, 128).encode(states(tokens=32, dim=128))
    assert stored.zeros is not None
    tokens = stored.codes.numel() / 128
    bits = tokens * 64 * 8 + 8 * (stored.scales.nbytes + stored.zeros.nbytes)
    assert bits / stored.codes.numel() == 4.25


def test_the_edges_may_have_more_bits_and_keys_others_than_values():
    format = CacheFormat(key_bits=4, value_bits=2, edge_layers=1, edge_bits=8)
    bits = [(layer_coders(format, i, 4).keys.bits, layer_coders(format, i, 4).values.bits) for i in range(4)]
    assert bits == [(8, 8), (4, 2), (4, 2), (8, 8)]


def test_layers_take_their_own_smoothing():
    shift = torch.ones(2, 16)
    coders = layer_coders(CacheFormat(), 0, 1, Smoothing(key_shift=shift))
    assert coders.keys.shift is shift
    assert coders.values.shift is None


def seen_exactly(query: int, token: int, format: CacheFormat, block: int) -> bool:
    """The rule in words: itself, the sinks, the window before it, and a block that is not over before the window."""
    past = query if format.past_only else query + 1
    if token < format.sinks or token >= past:
        return True
    end = format.sinks + ((token - format.sinks) // block + 1) * block
    return end > past - format.window


@settings(deadline=None, max_examples=60)
@given(
    sinks=st.integers(0, 5), window=st.integers(0, 6), block=st.integers(1, 5), past_only=st.booleans()
)  # fmt: skip
def test_what_a_query_sees_exactly_is_the_rule_in_words(sinks: int, window: int, block: int, past_only: bool) -> None:
    format = CacheFormat(sinks=sinks, window=window, past_only=past_only)
    found = exact_tokens(torch.arange(13), torch.arange(13), format, block)
    for query in range(13):
        wanted = [seen_exactly(query, token, format, block) for token in range(query + 1)]
        assert found[query, : query + 1].tolist() == wanted
        past = query + (0 if past_only else 1)
        assert tokens_to_store(past, format, block) == wanted.count(False)


@pytest.mark.parametrize("rotated", [8, 4])
def test_unrotating_undoes_a_rotation_that_also_scales(rotated):
    x = states(tokens=5, dim=8)
    angles = torch.randn(2, 5, rotated // 2, dtype=torch.float64).repeat(1, 1, 2)
    cos, sin = 1.3 * angles.cos(), 1.3 * angles.sin()
    turned = rotate(x, cos, sin)
    assert float((unrotate(turned, cos, sin) - x).norm() / x.norm()) < 1e-14
    assert math.isclose(float(turned[..., :rotated].norm() / x[..., :rotated].norm()), 1.3)
