import pytest
import torch
from torch import nn

from closeness import relative_error
from halfbyte.calibration.statistics import InputStatistics
from halfbyte.methods.awq import AWQ, candidate
from halfbyte.methods.rtn import RTN
from halfbyte.models.architecture import Rows
from halfbyte.models.fold import ResolvedLink
from halfbyte.numerics.error import output_power
from halfbyte.scheme import FloatScale, PerGroup, WeightFormat

FORMAT = WeightFormat(bits=3, granularity=PerGroup(size=16), scale=FloatScale(dtype="float32"))


def problem(seed=0, width=64, tokens=400, gain=30.0):
    """A norm with two loud channels, two linears that read it, and its outputs over some tokens."""
    generator = torch.Generator().manual_seed(seed)
    norm = nn.LayerNorm(width)
    norm.weight.data = 1 + torch.randn(width, generator=generator) / 4
    norm.weight.data[[3, 40]] *= gain
    norm.bias.data = torch.randn(width, generator=generator) / 10
    readers = {name: nn.Linear(width, out, bias=False) for name, out in (("q", 24), ("k", 8))}
    for reader in readers.values():
        reader.weight.data = torch.randn(reader.weight.shape, generator=generator)
        reader.weight.data[:, [3, 40]] /= gain
        reader.requires_grad_(False)
    norm.requires_grad_(False)
    inputs = norm(torch.randn(tokens, width, generator=generator))
    link = ResolvedLink(
        writer_name="norm",
        writer=norm,
        readers=readers,
        rows=Rows.ALL,
        heads=1,
        kv_heads=1,
        head_dim=width,
        norm_offset=0.0,
    )
    statistics = InputStatistics.empty(width)
    statistics.absorb(inputs)
    return link, inputs, {"q": statistics, "k": statistics}


def output_loss(link, gram):
    return sum(
        output_power(reader.weight - RTN().quantize(reader.weight, FORMAT, None).decode(), gram)
        for reader in link.readers.values()
    )


@pytest.mark.parametrize("duo", [False, True])
def test_scaling_lowers_the_output_error_of_plain_rounding(duo):
    link, _, seen = problem()
    before = output_loss(link, seen["q"].gram)
    AWQ(duo=duo).transform([link], seen, {"q": FORMAT, "k": FORMAT}, {})
    after = output_loss(link, seen["q"].gram)
    assert after < 0.9 * before, after / before


def test_the_scaled_block_computes_what_it_computed():
    link, inputs, seen = problem()
    expected = [inputs @ reader.weight.T for reader in link.readers.values()]
    norm_before = link.writer.weight.clone()
    AWQ().transform([link], seen, {"q": FORMAT, "k": FORMAT}, {})
    scale = norm_before / link.writer.weight
    found = [(inputs / scale) @ reader.weight.T for reader in link.readers.values()]
    assert not torch.allclose(scale, torch.ones_like(scale))
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-4)


def test_the_statistics_become_those_of_the_scaled_inputs():
    link, inputs, seen = problem()
    norm_before = link.writer.weight.clone()
    AWQ().transform([link], seen, {"q": FORMAT, "k": FORMAT}, {})
    fresh = InputStatistics.empty(inputs.shape[1])
    fresh.absorb(inputs / (norm_before / link.writer.weight))
    assert relative_error(seen["q"].gram, fresh.gram) < 1e-5
    assert torch.allclose(seen["q"].absolute_max, fresh.absolute_max, rtol=1e-4)


def test_shared_statistics_are_rescaled_once():
    link, _, seen = problem()
    assert seen["q"] is seen["k"]
    before, norm_before = seen["q"].absolute_max.clone(), link.writer.weight.clone()
    AWQ().transform([link], seen, {"q": FORMAT, "k": FORMAT}, {})
    assert torch.allclose(seen["q"].absolute_max, before * link.writer.weight / norm_before, rtol=1e-4)


def test_the_balanced_family_does_not_care_how_loud_a_channel_was_made():
    """Growing an input channel and shrinking its column leaves the rounded product as it was."""
    losses = []
    for gain in (1.0, 64.0):
        link, _, seen = problem(gain=gain)
        AWQ(duo=True).transform([link], seen, {"q": FORMAT, "k": FORMAT}, {})
        losses.append(output_loss(link, seen["q"].gram))
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def test_a_reader_that_stays_in_16_bits_does_not_steer_the_search_but_is_scaled():
    link, inputs, seen = problem()
    expected, norm_before = inputs @ link.readers["k"].weight.T, link.writer.weight.clone()
    AWQ().transform([link], seen, {"q": FORMAT}, {})
    scale = norm_before / link.writer.weight
    assert torch.allclose((inputs / scale) @ link.readers["k"].weight.T, expected, rtol=1e-4, atol=1e-4)


def test_a_link_without_rounded_readers_is_left_alone():
    link, _, seen = problem()
    before = link.writer.weight.clone()
    AWQ().transform([link], seen, {}, {})
    assert torch.equal(link.writer.weight, before)


def test_candidates_are_normalised_and_ignore_dead_channels():
    inputs = torch.tensor([0.0, 0.5, 2.0, 8.0])
    scale = candidate(inputs, None, 0.5)
    assert float(scale.max() * scale.min()) == pytest.approx(1.0)
    assert torch.isfinite(scale).all()
    assert torch.equal(candidate(inputs, None, 0.0), torch.ones(4))
