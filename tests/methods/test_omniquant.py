"""OmniQuant: ranges, scales and shifts learn, and the block stays itself where nothing is gained."""

import copy
from contextlib import nullcontext

import pytest
import torch

from halfbyte.calibration.learned_block import near_codes
from halfbyte.calibration.walk import Stream, enter, linears, quantizing_inputs, shared_inputs
from halfbyte.errors import CalibrationError, RecipeError
from halfbyte.methods import omniquant
from halfbyte.methods.contract import RoundedBlock
from halfbyte.methods.gptq import GPTQ
from halfbyte.methods.omniquant import OmniQuant
from halfbyte.methods.wkvquant import WKVQuant
from halfbyte.models.fold import find_links
from halfbyte.models.heads import head_counts
from halfbyte.models.linearize import linearize
from halfbyte.models.tables import architecture_of
from halfbyte.numerics.activations import InputQuantizer
from halfbyte.numerics.grid import encode, fit
from halfbyte.numerics.quantized import QuantizedWeight, round_to_grid
from halfbyte.scheme import ActivationFormat, Convention, FloatScale, GroupCount, IntegerScale, PerGroup, WeightFormat
from tiny_models import tiny, tokens

CPU = torch.device("cpu")
INT3 = WeightFormat(bits=3, granularity=PerGroup(size=8), scale=FloatScale(dtype="float32"))
INT3_ASYMMETRIC = INT3.model_copy(update={"convention": Convention.ASYMMETRIC})
QUICK = {"epochs": 8.0, "clip_rate": 8e-2, "link_rate": 5e-2}


def situation(
    format: WeightFormat = INT3, activations: ActivationFormat | None = None, *, family: str = "llama", **overrides
) -> tuple[RoundedBlock, dict[str, QuantizedWeight]]:
    """Block 0 of a tiny model of four blocks, rounded to nearest."""
    model = tiny(family, num_hidden_layers=4)
    table = architecture_of(model.config.model_type)
    blocks = list(model.get_submodule(table.blocks))
    for each in blocks:
        linearize(each)
    stream = enter(model, blocks, [tokens(3, 12), tokens(2, 12), tokens(3, 12)], CPU, CPU)
    original, block = blocks[0], copy.deepcopy(blocks[0])
    quantized, weights = {}, {}
    for name, linear in linears(block).items():
        weights[name] = linear.weight.detach().clone()
        quantized[name] = round_to_grid(linear.weight, fit(linear.weight, format), format)
        linear.weight.data.copy_(quantized[name].decode())
    inputs = {name: InputQuantizer(activations) for name in quantized} if activations else {}
    drifted = Stream([h * 1.02 for h in stream.hidden], stream.calls, stream.unwrap, stream.device)
    more = {
        "links": lambda: find_links(block, table, *head_counts(model.config)),
        "following": lambda count: blocks[1 : 1 + count],
    }
    return RoundedBlock(0, block, original, weights, inputs, drifted, stream, **more | overrides), quantized


@torch.no_grad()
def lost(rounded: RoundedBlock, quantized, *, loss="mse", depth=1) -> float:
    """The loss of the block as it would be stored, after `depth` blocks."""
    block = copy.deepcopy(rounded.block)
    for name, weight in quantized.items():
        block.get_submodule(name).weight.data.copy_(weight.decode())
    total = 0.0
    for batch in range(len(rounded.stream.hidden)):
        with quantizing_inputs(block, rounded.inputs):
            answer = rounded.stream.run(block, 0, batch)
        target = rounded.float_stream.run(rounded.original, 0, batch)
        for place, follower in enumerate(rounded.following(depth - 1), start=1):
            answer = rounded.stream.call(follower, place, batch, answer)
            target = rounded.stream.call(follower, place, batch, target)
        total += float((answer - target).square().mean() if loss == "mse" else (answer - target).abs().mean())
    return total


NEAREST, FEEDBACK, DRIFT = None, GPTQ(damping=0.1), GPTQ(damping=0.1, drift=1.0)


@pytest.mark.parametrize(("format", "links", "finish"), [
    (INT3, "none", NEAREST), (INT3_ASYMMETRIC, "none", NEAREST), (INT3, "norms", NEAREST), (INT3_ASYMMETRIC, "all", NEAREST),
    (INT3, "none", FEEDBACK), (INT3_ASYMMETRIC, "all", FEEDBACK), (INT3, "all", DRIFT),
])  # fmt: skip
def test_the_block_loses_less(format, links, finish):
    rounded, quantized = situation(format)
    before = lost(rounded, quantized)
    better = OmniQuant(links=links, finish=finish, **QUICK).refine(rounded, quantized)
    assert lost(rounded, better) < 0.85 * before
    for name, weight in better.items():
        assert weight.format == format
        assert weight.codes.min() >= format.lowest
        assert weight.codes.max() <= format.highest
        assert torch.equal(encode(weight.decode(), weight.grid, format), weight.codes), name


def test_scales_learn_for_quantized_inputs():
    clipped, moved = ([], [])
    for links, found in (("none", clipped), ("all", moved)):
        rounded, quantized = situation(INT3, ActivationFormat(bits=4))
        before = lost(rounded, quantized)
        better = OmniQuant(links=links, **QUICK).refine(rounded, quantized)
        found.append(lost(rounded, better) / before)
    assert clipped[0] < 0.97
    assert moved[0] < 0.95 * clipped[0]


@pytest.mark.parametrize("family", ["llama", "opt", "mixtral"])
def test_what_moved_leaves_the_float_function_as_it_was(family):
    """Norms and biases of the block, with the weights before rounding, compute what the original computes."""
    rounded, quantized = situation(INT3, family=family)
    old = {name: p.clone() for name, p in rounded.block.named_parameters()}
    better = OmniQuant(links="all", **QUICK).refine(rounded, quantized)
    assert better is not quantized
    block = copy.deepcopy(rounded.block)
    for name, weight in rounded.weights.items():
        block.get_submodule(name).weight.data.copy_(weight)
    with torch.no_grad():
        here, there = (rounded.float_stream.run(b, 0, 0) for b in (block, rounded.original))
    assert (here - there).norm() / there.norm() < 2e-4  # shifts cancel in float32
    assert any(not torch.equal(p, old[name]) for name, p in rounded.block.named_parameters() if "norm" in name)


def test_statistics_follow_what_moved():
    rounded, quantized = situation()
    OmniQuant(links="all", **QUICK).refine(rounded, quantized)
    assert rounded.seen.keys() == quantized.keys()
    for names in shared_inputs(rounded.block, rounded.stream, 0):
        assert len({id(rounded.seen[name]) for name in names}) == 1
    assert all(statistics.tokens == rounded.stream.tokens for statistics in rounded.seen.values())


def test_static_inputs_keep_what_was_measured_of_them():
    rounded, quantized = situation()
    static = ActivationFormat(bits=8, granularity="tensor", dynamic=False)
    inputs = {name: InputQuantizer(static, torch.tensor([0.05])) for name in quantized if "mlp" not in name}
    held = RoundedBlock(
        0, rounded.block, rounded.original, rounded.weights, inputs, rounded.stream, rounded.float_stream,
        links=rounded.links, following=rounded.following,
    )  # fmt: skip
    first, second = (
        p.clone() for p in (rounded.block.input_layernorm.weight, rounded.block.post_attention_layernorm.weight)
    )
    OmniQuant(links="all", **QUICK).refine(held, quantized)
    assert torch.equal(rounded.block.input_layernorm.weight, first)
    assert not torch.equal(rounded.block.post_attention_layernorm.weight, second)


def test_a_rate_that_only_destroys_changes_nothing():
    rounded, quantized = situation()
    norms = {name: p.clone() for name, p in rounded.block.named_parameters()}
    better = OmniQuant(links="all", epochs=3, clip_rate=30.0, link_rate=0.7).refine(rounded, quantized)
    assert all(torch.equal(p, norms[name]) for name, p in rounded.block.named_parameters())
    assert lost(rounded, better) <= lost(rounded, quantized)


def test_a_warm_start_keeps_the_codes_that_it_was_given():
    """GPTQ's codes are not the nearest; each weight begins inside the cell of its code."""
    rounded, _ = situation()
    for name, weight in rounded.weights.items():
        unusual = round_to_grid(weight * 0.7, fit(weight, INT3), INT3)
        near = near_codes(weight, unusual)
        assert torch.equal(encode(near, unusual.grid, INT3), unusual.codes), name
        nearest = round_to_grid(weight, unusual.grid, INT3)
        assert torch.allclose(near_codes(weight, nearest), weight, atol=2e-3)


def test_an_overflow_names_the_block_and_the_remedy():
    rounded, quantized = situation()
    rounded.float_stream.hidden[0][0, 0, 0] = torch.inf
    with pytest.raises(CalibrationError, match=r"block 0 is .*lower the learning rates"):
        OmniQuant(epochs=1, links="none").refine(rounded, quantized)


def test_groups_over_rows_are_refused():
    rounded, quantized = situation()
    format = INT3.model_copy(update={"granularity": GroupCount(count=4)})
    name = next(iter(quantized))
    odd = round_to_grid(rounded.weights[name], fit(rounded.weights[name], format), format)
    with pytest.raises(RecipeError, match="groups over all rows"):
        OmniQuant().refine(rounded, {**quantized, name: odd})


def test_integer_scales_are_refused():
    rounded, quantized = situation(INT3.model_copy(update={"scale": IntegerScale(amplifier=1024)}))
    with pytest.raises(RecipeError, match="integer scales"):
        OmniQuant().refine(rounded, quantized)


@pytest.mark.parametrize("stride", [1, 3])
def test_cross_block_reconstruction_learns_what_later_blocks_need(stride):
    rounded, quantized = situation()
    before = lost(rounded, quantized, loss="mae", depth=3)
    better = WKVQuant(depth=3, epochs=10, clip_rate=8e-2, stride=stride).refine(rounded, quantized)
    assert lost(rounded, better, loss="mae", depth=3) < 0.98 * before


def test_depth_is_cut_at_the_models_end():
    rounded, quantized = situation()
    deep = WKVQuant(depth=40, epochs=8, clip_rate=8e-2).refine(rounded, quantized)
    assert lost(rounded, deep, loss="mae", depth=4) < lost(rounded, quantized, loss="mae", depth=4)


def test_wkvquant_moves_nothing_and_learns_in_the_given_context():
    entered = []

    def context(block):
        entered.append(block)
        return nullcontext()

    rounded, quantized = situation(context=context)
    before = {name: p.clone() for name, p in rounded.block.named_parameters()}
    weights = copy.deepcopy(rounded.weights)
    WKVQuant(depth=2, epochs=2).refine(rounded, quantized)
    assert all(torch.equal(p, before[name]) for name, p in rounded.block.named_parameters())
    assert all(torch.equal(w, weights[name]) for name, w in rounded.weights.items())
    assert entered
    assert all(block is rounded.block for block in entered), "the float blocks attend as they always do"


def test_fewer_samples_see_fewer_batches():
    rounded, quantized = situation()
    asked = []
    real = rounded.stream.calls

    class Watched(list):
        def __getitem__(self, place):
            asked.append(place)
            return super().__getitem__(place)

    rounded.stream.calls = Watched(real)
    OmniQuant(links="none", epochs=4, samples=0.34).refine(rounded, quantized)
    assert asked.count(0) > 4 * asked.count(2) / 3


@pytest.mark.parametrize("bug", ["weights do not follow", "norms do not follow"])
def test_planted_bugs_are_seen(bug, monkeypatch):
    real = omniquant.write

    def wrong(rounded, learned, unrounded, seen):
        norms = {name: p.clone() for name, p in rounded.block.named_parameters()}
        weights = {name: weight.clone() for name, weight in rounded.weights.items()}
        real(rounded, learned, unrounded, seen)
        if bug == "weights do not follow":
            for name, weight in rounded.weights.items():
                weight.copy_(weights[name])
        else:
            for name, parameter in rounded.block.named_parameters():
                parameter.data.copy_(norms[name])

    monkeypatch.setattr(omniquant, "write", wrong)
    with pytest.raises(AssertionError):
        test_what_moved_leaves_the_float_function_as_it_was("llama")
