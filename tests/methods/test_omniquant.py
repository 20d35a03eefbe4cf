"""OmniQuant: ranges, scales and shifts learn, and the block stays itself where nothing is gained."""

import copy

import pytest
import torch

from halfbyte.calibration.learned_block import near_codes
from halfbyte.calibration.past_only import BlockCache
from halfbyte.calibration.reconstruct import Reconstruction
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
from halfbyte.numerics.cache import Smoothing
from halfbyte.numerics.grid import Grid, encode, fit
from halfbyte.numerics.quantized import QuantizedWeight, round_to_grid
from halfbyte.scheme import (
    ActivationFormat,
    CacheFormat,
    Convention,
    FloatScale,
    GroupCount,
    IntegerScale,
    PerGroup,
    WeightFormat,
)
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


@pytest.mark.parametrize("step", [OmniQuant(), WKVQuant(), WKVQuant(learn="both")])
def test_a_block_without_quantized_weights_stays_as_it_came(step):
    rounded, _ = situation()
    assert step.refine(rounded, {}) == {}


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


class WatchedCache(BlockCache):
    """A cache that notes which blocks attend through it."""

    __slots__ = ("entered",)

    def attending(self, block, smoothing=None):
        self.entered.append(block)
        return super().attending(block, smoothing)


def block_cache(kind: type[BlockCache] = BlockCache, **format) -> BlockCache:
    """Of block 0 of the tiny Llama; shifts and scales that somebody found."""
    x = torch.randn(4, 2, 8, generator=torch.Generator().manual_seed(0))
    smoothing = Smoothing(x[0], x[1].exp(), x[2], x[3].exp())
    return kind(CacheFormat(key_bits=3, value_bits=3, **format), 0, 4, smoothing)


def test_wkvquant_moves_nothing_and_learns_through_the_cache():
    cache = block_cache(WatchedCache)
    cache.entered = entered = []
    rounded, quantized = situation(cache=cache)
    before = {name: p.clone() for name, p in rounded.block.named_parameters()}
    weights = copy.deepcopy(rounded.weights)
    WKVQuant(depth=2, epochs=2).refine(rounded, quantized)
    assert all(torch.equal(p, before[name]) for name, p in rounded.block.named_parameters())
    assert all(torch.equal(w, weights[name]) for name, w in rounded.weights.items())
    assert entered
    assert all(block is rounded.block for block in entered), "the float blocks attend as they always do"

    assert not cache.learned


@torch.no_grad()
def lost_through_cache(rounded: RoundedBlock, quantized) -> float:
    """`lost`, with the block attending through its cache."""
    assert rounded.cache is not None
    block = copy.deepcopy(rounded.block)
    for name, weight in quantized.items():
        block.get_submodule(name).weight.data.copy_(weight.decode())
    total = 0.0
    for batch in range(len(rounded.stream.hidden)):
        with rounded.cache.attending(block):
            answer = rounded.stream.run(block, 0, batch)
        total += float((answer - rounded.float_stream.run(rounded.original, 0, batch)).abs().mean())
    return total


@pytest.mark.parametrize("rope", ["before", "after"])
@pytest.mark.parametrize("learn", ["cache", "both"])
def test_the_cache_learns(learn, rope):
    rounded, quantized = situation(cache=block_cache(rope=rope))
    cache = rounded.cache
    before, start = lost_through_cache(rounded, quantized), cache.smoothing
    better = WKVQuant(learn=learn, depth=1, epochs=15, clip_rate=8e-2, cache_rate=5e-2).refine(rounded, quantized)
    assert cache.learned
    assert lost_through_cache(rounded, better) < (0.95 if learn == "cache" else 0.85) * before
    for name in ("key_shift", "key_scale", "value_shift", "value_scale"):
        moved = getattr(cache.smoothing, name)
        assert not torch.equal(moved, getattr(start, name))
        assert not moved.requires_grad
    assert all(torch.equal(better[name].codes, quantized[name].codes) for name in better) == (learn == "cache")


def test_a_cache_that_gains_nothing_stays_as_it_was_found():
    rounded, quantized = situation(cache=block_cache())
    start = rounded.cache.smoothing
    WKVQuant(learn="cache", depth=1, epochs=1, cache_rate=4.0, decay=False).refine(rounded, quantized)
    assert rounded.cache.smoothing is start
    assert not rounded.cache.learned


def test_ratios_find_better_ranges_without_gradients(monkeypatch):
    monkeypatch.setattr(Reconstruction, "learn", None)
    rounded, quantized = situation()
    wide = {
        name: round_to_grid(rounded.weights[name], Grid(weight.grid.scales * 1.5, weight.grid.zero_points), INT3)
        for name, weight in quantized.items()
    }
    found = WKVQuant(depth=2, ratios=(0.6, 0.8)).refine(rounded, wide)
    assert lost(rounded, found, loss="mae", depth=2) < 0.95 * lost(rounded, wide, loss="mae", depth=2)


@pytest.mark.parametrize("fields", [{"ratios": (0.8,), "learn": "both"}, {"ratios": (0.8, 0.0)}])
def test_ratios_that_make_no_sense_are_refused(fields):
    with pytest.raises(ValueError, match="ratios"):
        WKVQuant(**fields)


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
