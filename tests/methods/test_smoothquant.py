from dataclasses import replace

import pytest
import torch
from torch import nn

from closeness import relative_error
from halfbyte.calibration.statistics import InputStatistics
from halfbyte.errors import RecipeError
from halfbyte.methods.rtn import RTN
from halfbyte.methods.smoothquant import SmoothQuant, balanced, largest_inputs, largest_weights
from halfbyte.models.architecture import Rows
from halfbyte.models.fold import ResolvedLink
from halfbyte.numerics.activations import calibrated, simulate
from halfbyte.recipe import Recipe
from halfbyte.scheme import ActivationFormat, Convention, FloatScale, OutlierSplit, PerChannel, WeightFormat
from observed_models import observed_model
from tiny_models import VARIANTS, logits, tokens

FORMAT = WeightFormat(
    bits=8, convention=Convention.ODYSSEY, granularity=PerChannel(), scale=FloatScale(dtype="float32")
)
PER_TOKEN = ActivationFormat()
INPUTS = {
    "token": PER_TOKEN,
    "token-asymmetric": ActivationFormat(symmetric=False),
    "tensor": ActivationFormat(granularity="tensor"),
    "static": ActivationFormat(granularity="tensor", dynamic=False),
    "static-asymmetric": ActivationFormat(granularity="tensor", dynamic=False, symmetric=False),
    "group": ActivationFormat(granularity="group", group_size=16),
    "split": ActivationFormat(outliers=OutlierSplit(threshold=20.0, columns="static")),
}


def problem(gain=30.0, width=64, count=400):
    """A norm with two loud channels, two linears that read it, and its outputs over some tokens."""
    generator = torch.Generator().manual_seed(0)
    norm = nn.LayerNorm(width)
    norm.weight.data = 1 + torch.randn(width, generator=generator) / 4
    norm.weight.data[[3, 40]] *= gain
    norm.bias.data = torch.randn(width, generator=generator) / 10
    norm.bias.data[[3, 40]] *= gain
    readers = {name: nn.Linear(width, out, bias=False) for name, out in (("q", 24), ("k", 7))}
    for reader in readers.values():
        reader.weight.data = torch.randn(reader.weight.shape, generator=generator)
        reader.weight.data[:, [3, 40]] /= gain
        reader.requires_grad_(False)
    norm.requires_grad_(False)
    inputs = norm(torch.randn(count, width, generator=generator))
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


def smooth(link, seen, method=None, formats=("q", "k"), activations=("q", "k"), inputs=PER_TOKEN):
    """Run the method; the scale that it moved out of the norm."""
    before = link.writer.weight.clone()
    (method or SmoothQuant()).transform(
        [link], seen, dict.fromkeys(formats, FORMAT), dict.fromkeys(activations, inputs)
    )
    return before / link.writer.weight


def quantized_loss(link, rows, seen, activations):
    """How far the quantized products are from the exact ones, in float64, computed plainly."""
    total = 0.0
    for reader in link.readers.values():
        rounded = RTN().quantize(reader.weight, FORMAT, None).decode().double()
        read = simulate(rows, calibrated(activations, seen.minimum, seen.maximum)).double()
        total += float((read @ rounded.T - rows.double() @ reader.weight.double().T).square().sum())
    return total


@pytest.mark.parametrize("alpha", [0.5, "search"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_family_computes_what_it_computed(variant, alpha):
    model, blocks = observed_model(variant)
    ids = tokens(seed=1)
    before, moved = logits(model, ids), []
    for block, links, seen in blocks:
        weights = {name: block.get_submodule(name).weight.clone() for link in links for name in link.readers}
        SmoothQuant(alpha=alpha, points=4).transform(
            links, seen, dict.fromkeys(seen, FORMAT), dict.fromkeys(seen, PER_TOKEN)
        )
        moved += [relative_error(block.get_submodule(name).weight, weight) for name, weight in weights.items()]
    assert max(moved) > 0.1
    assert relative_error(logits(model, ids), before) <= 1e-10


def every_input_channel_reaches_one():
    link, _, seen = problem()
    smooth(link, seen, SmoothQuant(alpha=1.0))
    return torch.allclose(seen["q"].absolute_max, torch.ones(64))


def every_column_reaches_one():
    link, _, seen = problem()
    smooth(link, seen, SmoothQuant(alpha=0.0))
    return torch.allclose(torch.cat(link.weights).abs().amax(dim=0), torch.ones(64))


def inputs_and_columns_reach_the_same():
    link, _, seen = problem()
    smooth(link, seen, SmoothQuant(alpha=0.5))
    return torch.allclose(torch.cat(link.weights).abs().amax(dim=0), seen["q"].absolute_max, rtol=1e-4)


def the_router_counts_and_is_scaled():
    _, blocks = observed_model("mixtral")
    _, links, seen = blocks[0]
    link = next(link for link in links if "mlp.gate" in link.readers)
    link.readers["mlp.gate"].weight[:, 5] = 9.0
    SmoothQuant(alpha=0.0).transform([link], seen, dict.fromkeys(seen, FORMAT), dict.fromkeys(seen, PER_TOKEN))
    columns = torch.stack([weight.abs().amax(dim=0) for weight in link.weights]).amax(dim=0)
    return relative_error(columns, torch.ones_like(columns)) < 1e-6


def the_experts_together_reach_one():
    _, blocks = observed_model("mixtral")
    _, links, seen = blocks[0]
    link = next(link for link in links if "mlp.gate" in link.readers)
    SmoothQuant(alpha=1.0).transform([link], seen, dict.fromkeys(seen, FORMAT), dict.fromkeys(seen, PER_TOKEN))
    reached = torch.stack([seen[name].absolute_max for name in link.readers if name in seen]).amax(dim=0)
    return torch.allclose(reached, torch.ones_like(reached))


FACTS = [
    every_input_channel_reaches_one,
    every_column_reaches_one,
    inputs_and_columns_reach_the_same,
    the_router_counts_and_is_scaled,
    the_experts_together_reach_one,
]


@pytest.mark.parametrize("fact", FACTS)
def test_the_limits_of_the_exponent(fact):
    assert fact()


def swapped_exponents(monkeypatch):
    monkeypatch.setattr("halfbyte.methods.smoothquant.balanced", lambda x, w, alpha: balanced(x, w, 1 - alpha))


def inverted_scale(monkeypatch):
    monkeypatch.setattr("halfbyte.methods.smoothquant.balanced", lambda x, w, alpha: 1 / balanced(x, w, alpha))


def forgotten_weights(monkeypatch):
    monkeypatch.setattr("halfbyte.methods.smoothquant.largest_weights", lambda link: torch.ones(link.scale_width))


def forgotten_router(monkeypatch):
    def without(link):
        readers = {name: reader for name, reader in link.readers.items() if name != "mlp.gate"}
        return largest_weights(replace(link, readers=readers))

    monkeypatch.setattr("halfbyte.methods.smoothquant.largest_weights", without)


def first_expert_only(monkeypatch):
    monkeypatch.setattr("halfbyte.methods.smoothquant.largest_inputs", lambda seen: largest_inputs(seen[:1]))


@pytest.mark.parametrize(
    ("bug", "fact"),
    [
        (swapped_exponents, every_input_channel_reaches_one),
        (swapped_exponents, every_column_reaches_one),
        (inverted_scale, every_input_channel_reaches_one),
        (inverted_scale, inputs_and_columns_reach_the_same),
        (forgotten_weights, every_column_reaches_one),
        (forgotten_router, the_router_counts_and_is_scaled),
        (first_expert_only, the_experts_together_reach_one),
    ],
)
def test_the_facts_notice(bug, fact, monkeypatch):
    bug(monkeypatch)
    assert not fact()


@pytest.mark.parametrize("inputs", INPUTS.values(), ids=INPUTS)
def test_the_search_lowers_the_error_of_the_quantized_product(inputs):
    link, x, seen = problem()
    before = quantized_loss(link, x, seen["q"], inputs)
    scale = smooth(link, seen, inputs=inputs)
    assert quantized_loss(link, x / scale, seen["q"], inputs) < (0.95 if inputs.outliers else 0.5) * before


@pytest.mark.parametrize("gain", [1.0, 30.0])
@pytest.mark.parametrize("inputs", INPUTS.values(), ids=INPUTS)
def test_the_search_is_never_worse_than_no_scale_or_any_fixed_exponent(inputs, gain):
    errors = {}
    for alpha in ("search", None, 0.0, 0.25, 0.5, 0.75, 1.0):
        link, _, seen = problem(gain)
        if alpha is not None:
            smooth(link, seen, SmoothQuant(alpha=alpha), inputs=inputs)
        errors[alpha] = quantized_loss(link, seen["q"].rows, seen["q"], inputs)
    assert errors["search"] <= min(errors.values()) * (1 + 1e-4), errors


def test_the_modelled_error_is_that_of_the_quantized_product():
    link, _, seen = problem()
    expected = quantized_loss(link, seen["q"].rows, seen["q"], PER_TOKEN)
    found = sum(SmoothQuant().error(weight, torch.ones(64), seen["q"], FORMAT, PER_TOKEN) for weight in link.weights)
    assert found == pytest.approx(expected * seen["q"].tokens / len(seen["q"].rows), rel=1e-4)


def test_the_balance_does_not_care_how_loud_a_channel_was_made():
    """Growing an input channel and shrinking its column leaves the smoothed weights as they were."""
    quiet, loud = problem(1.0)[::2], problem(64.0)[::2]
    for link, seen in (quiet, loud):
        smooth(link, seen)
    assert relative_error(torch.cat(loud[0].weights), torch.cat(quiet[0].weights)) < 1e-5


def test_the_statistics_become_those_of_the_smoothed_inputs_and_are_divided_once():
    link, inputs, seen = problem()
    assert seen["q"] is seen["k"]
    scale = smooth(link, seen)
    fresh = InputStatistics.empty(64)
    fresh.absorb(inputs / scale)
    assert relative_error(seen["q"].gram, fresh.gram) < 1e-5
    assert torch.allclose(seen["q"].absolute_max, fresh.absolute_max, rtol=1e-4)
    assert relative_error(seen["q"].rows, fresh.rows) < 1e-5


def test_weights_alone_can_be_smoothed():
    link, _, seen = problem()
    assert not torch.allclose(smooth(link, seen, activations=()), torch.ones(64))


def test_a_reader_that_stays_as_it_is_does_not_steer_the_search_but_is_scaled():
    link, inputs, seen = problem()
    expected = inputs @ link.readers["k"].weight.T
    scale = smooth(link, seen, formats=["q"], activations=["q"])
    assert torch.allclose((inputs / scale) @ link.readers["k"].weight.T, expected, rtol=1e-4, atol=1e-4)


def test_a_link_without_quantized_readers_is_left_alone():
    link, _, seen = problem()
    assert torch.equal(smooth(link, seen, formats=(), activations=()), torch.ones(64))


def test_norms_only_leaves_what_linears_write():
    _, blocks = observed_model("llama")
    block, links, seen = blocks[0]
    before = {name: block.get_submodule(name).weight.clone() for name in ("self_attn.o_proj", "mlp.down_proj")}
    everything = dict.fromkeys(seen, FORMAT), dict.fromkeys(seen, PER_TOKEN)
    SmoothQuant(alpha=0.5, links="norms").transform(links, seen, *everything)
    assert all(torch.equal(block.get_submodule(name).weight, weight) for name, weight in before.items())
    SmoothQuant(alpha=0.5).transform(links, seen, *everything)
    assert not any(torch.equal(block.get_submodule(name).weight, weight) for name, weight in before.items())


def test_channels_that_were_never_alive_keep_their_scale():
    scale = balanced(torch.tensor([0.0, 4.0]), torch.tensor([2.0, 0.0]), 0.5)
    assert float(scale[0]) == 1
    assert bool(torch.isfinite(scale).all())


def test_an_expert_without_tokens_does_not_disturb_the_others():
    scales = []
    for silent in (False, True):
        link, _, seen = problem()
        if silent:
            seen["k"] = InputStatistics.empty(64)
        scales.append(
            smooth(link, seen, formats=["q", "k"] if silent else ["q"], activations=["q", "k"] if silent else ["q"])
        )
    assert torch.equal(*scales)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, "best"])
def test_an_exponent_outside_its_range_is_refused(alpha):
    with pytest.raises(RecipeError, match="alpha"):
        Recipe.load({"steps": [{"method": "smoothquant", "alpha": alpha}, {"method": "rtn"}]})
