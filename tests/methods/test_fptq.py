import pytest
import torch
from torch import nn

from closeness import relative_error
from halfbyte.calibration.statistics import InputStatistics
from halfbyte.errors import RecipeError
from halfbyte.methods.contract import InputChoice, Transform
from halfbyte.methods.fptq import FPTQ, equalising, static_noise
from halfbyte.models.architecture import Rows
from halfbyte.models.fold import ResolvedLink
from halfbyte.numerics.activations import InputQuantizer, calibrated, rounded
from halfbyte.recipe import Recipe
from halfbyte.scheme import ActivationFormat, OutlierSplit, WeightFormat
from observed_models import observed_model
from tiny_models import VARIANTS, logits, tokens

PER_TOKEN = ActivationFormat()
STATIC = ActivationFormat(granularity="tensor", dynamic=False)
PAPER = {"dynamic_from": 150.0, "noise": None}


def problem(largest, writer="norm", width=33, count=300, spike=None, every=31):
    """A writer with one loud channel, two linears that read it, and statistics whose largest magnitude is given.

    `spike`: every 31st token is so much louder, and no channel.
    """
    generator = torch.Generator().manual_seed(0)
    module = nn.LayerNorm(width) if writer == "norm" else nn.Linear(9, width)
    for parameter in module.parameters():
        parameter.data = 1 + torch.randn(parameter.shape, generator=generator) / 4
    readers = {name: nn.Linear(width, out, bias=False) for name, out in (("q", 24), ("k", 7))}
    for part in (module, *readers.values()):
        part.requires_grad_(False)
    inputs = torch.randn(count, width, generator=generator).clamp(-3, 3)
    inputs[:, 5] *= 4
    if spike is not None:
        inputs[:, 5] /= 4
        inputs[::every] *= spike
    inputs *= largest / inputs.abs().max()
    link = ResolvedLink(
        writer_name="writer",
        writer=module,
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


def apply(link, seen, method=None, format=PER_TOKEN):
    """Run the method; the scale that moved, and the formats that were chosen."""
    method, before = method or FPTQ(), link.writer.weight.clone()
    activations = dict.fromkeys(seen, format)
    method.transform([link], seen, dict.fromkeys(seen, WeightFormat()), activations)
    scale = before / link.writer.weight
    return scale if scale.dim() == 1 else scale[:, 0], method.choose(seen, activations)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_family_computes_what_it_computed(variant):
    model, blocks = observed_model(variant)
    ids = tokens(seed=1)
    before, moved = logits(model, ids), []
    for block, links, seen in blocks:
        weights = {name: block.get_submodule(name).weight.clone() for link in links for name in link.readers}
        FPTQ(static_to=0.0, links="all").transform(links, seen, {}, dict.fromkeys(seen, PER_TOKEN))
        moved += [relative_error(block.get_submodule(name).weight, weight) for name, weight in weights.items()]
    assert max(moved) > 0.1
    assert relative_error(logits(model, ids), before) <= 1e-10


def small_inputs_are_static_and_not_equalised():
    link, _, seen = problem(15.0)
    scale, chosen = apply(link, seen, FPTQ(**PAPER))
    return torch.equal(scale, torch.ones(33)) and set(chosen.values()) == {STATIC}


def inputs_between_the_limits_are_equalised_and_static():
    link, _, seen = problem(100.0)
    largest = seen["q"].absolute_max.clone()
    scale, chosen = apply(link, seen, FPTQ(**PAPER))
    reached = torch.allclose(seen["q"].absolute_max, torch.log2(2 + largest), rtol=1e-5)
    moved = torch.allclose(scale, largest / torch.log2(2 + largest), rtol=1e-5)
    return reached and moved and set(chosen.values()) == {STATIC}


def large_inputs_are_per_token_and_not_equalised():
    link, _, seen = problem(150.0)
    scale, chosen = apply(link, seen, FPTQ(**PAPER))
    return torch.equal(scale, torch.ones(33)) and set(chosen.values()) == {PER_TOKEN}


def what_no_scale_can_leave_is_per_token():
    link, _, seen = problem(100.0, writer="linear")
    scale, chosen = apply(link, seen, FPTQ(**PAPER))
    return torch.equal(scale, torch.ones(33)) and set(chosen.values()) == {PER_TOKEN}


BRANCHES = [
    small_inputs_are_static_and_not_equalised,
    inputs_between_the_limits_are_equalised_and_static,
    large_inputs_are_per_token_and_not_equalised,
    what_no_scale_can_leave_is_per_token,
]


@pytest.mark.parametrize("branch", BRANCHES)
def test_the_branches_of_the_paper(branch):
    assert branch()


def natural_logarithm(monkeypatch):
    monkeypatch.setattr("halfbyte.methods.fptq.equalising", lambda largest: largest / torch.log(2 + largest))


def inverted_scale(monkeypatch):
    monkeypatch.setattr("halfbyte.methods.fptq.equalising", lambda largest: 1 / equalising(largest))


def statistics_of_before(monkeypatch):
    monkeypatch.setattr(InputStatistics, "divide", lambda self, scale: None)


def always_allowed(monkeypatch):
    monkeypatch.setattr("halfbyte.methods.fptq.moves", lambda link, links: True)


def mean_for_largest(monkeypatch):
    monkeypatch.setattr("halfbyte.methods.fptq.largest_inputs", lambda seen: seen[0].mean_absolute)


@pytest.mark.parametrize(
    ("bug", "branch"),
    [
        (natural_logarithm, inputs_between_the_limits_are_equalised_and_static),
        (inverted_scale, inputs_between_the_limits_are_equalised_and_static),
        (statistics_of_before, inputs_between_the_limits_are_equalised_and_static),
        (mean_for_largest, inputs_between_the_limits_are_equalised_and_static),
        (mean_for_largest, large_inputs_are_per_token_and_not_equalised),
        (always_allowed, what_no_scale_can_leave_is_per_token),
    ],
)
def test_the_branches_notice(bug, branch, monkeypatch):
    bug(monkeypatch)
    assert not branch()


def test_by_default_a_norm_is_equalised_however_loud_a_channel_is():
    link, _, seen = problem(900.0)
    _, chosen = apply(link, seen)
    assert float(seen["q"].absolute_max.max()) < 10
    assert set(chosen.values()) == {STATIC}


def test_a_few_loud_tokens_make_a_static_scale_too_noisy():
    link, _, seen = problem(10.0, spike=40.0)
    assert set(apply(link, seen)[1].values()) == {PER_TOKEN}
    assert set(apply(link, seen, FPTQ(noise=None))[1].values()) == {STATIC}


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_noise_is_the_ratio_of_the_squared_rounding_errors(symmetric):
    _, inputs, seen = problem(10.0, spike=4.0, every=7, width=129, count=1000)
    format = ActivationFormat(symmetric=symmetric)
    static = ActivationFormat(symmetric=symmetric, granularity="tensor", dynamic=False)
    whole = rounded(inputs, calibrated(static, seen["q"].minimum, seen["q"].maximum))
    alone = rounded(inputs, InputQuantizer(format))
    measured = float((whole - inputs).square().sum() / (alone - inputs).square().sum())
    assert static_noise(seen["q"], format) == pytest.approx(measured, rel=0.1)


def test_tokens_of_zeros_do_not_count_as_noise():
    _, inputs, seen = problem(10.0)
    with_silence = InputStatistics.empty(33)
    with_silence.absorb(torch.cat([inputs, torch.zeros_like(inputs)]))
    assert static_noise(with_silence, PER_TOKEN) == pytest.approx(static_noise(seen["q"], PER_TOKEN), rel=0.2)


def test_links_between_linears_can_be_equalised_too():
    link, _, seen = problem(100.0, writer="linear")
    scale, chosen = apply(link, seen, FPTQ(links="all"))
    assert float(scale.max()) > 5
    assert set(chosen.values()) == {STATIC}


def test_asymmetric_inputs_stay_asymmetric():
    link, _, seen = problem(10.0)
    _, chosen = apply(link, seen, FPTQ(noise=None), ActivationFormat(symmetric=False))
    assert chosen["q"] == ActivationFormat(symmetric=False, granularity="tensor", dynamic=False)


def test_a_layer_that_saw_no_tokens_keeps_a_scale_per_token():
    unseen = {"w": InputStatistics.empty(8)}
    assert FPTQ().choose(unseen, {"w": STATIC}) == {"w": PER_TOKEN}


def test_inputs_that_stay_in_16_bits_get_no_format_and_do_not_move_scales():
    link, _, seen = problem(100.0)
    before = link.writer.weight.clone()
    FPTQ().transform([link], seen, {"q": WeightFormat()}, {})
    assert torch.equal(link.writer.weight, before)
    assert FPTQ().choose(seen, {}) == {}


@pytest.mark.parametrize(
    "format", [ActivationFormat(outliers=OutlierSplit()), ActivationFormat(granularity="group", group_size=11)]
)
def test_formats_that_it_cannot_choose_between_are_refused(format):
    _, _, seen = problem(10.0)
    with pytest.raises(RecipeError, match=r"q: .*granularity: token"):
        FPTQ().choose(seen, {"q": format})


def test_it_keeps_both_contracts():
    (step,) = Recipe.load({"steps": [{"method": "fptq", **PAPER}, {"method": "rtn"}]}).transforms
    assert isinstance(step, Transform)
    assert isinstance(step, InputChoice)
    assert step == FPTQ(**PAPER)
