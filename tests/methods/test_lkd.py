"""LKD: a block learns to answer as its teacher does, on the grids it was given."""

import copy

import pytest
import torch

from halfbyte.calibration.walk import Stream, enter, linears, quantizing_inputs
from halfbyte.errors import CalibrationError
from halfbyte.methods.contract import RoundedBlock
from halfbyte.methods.lkd import LKD
from halfbyte.numerics.activations import InputQuantizer
from halfbyte.numerics.grid import fit
from halfbyte.numerics.quantized import QuantizedWeight, round_to_grid
from halfbyte.scheme import ActivationFormat, Convention, FloatScale, PerGroup, WeightFormat
from tiny_models import tiny, tokens

CPU = torch.device("cpu")
INT3 = WeightFormat(bits=3, granularity=PerGroup(size=8), scale=FloatScale(dtype="float32"))
STRIDE = 0.7


def situation(
    format: WeightFormat = INT3, activations: ActivationFormat | None = None, *, unusual: bool = False
) -> tuple[RoundedBlock, dict[str, QuantizedWeight]]:
    """Block 0 of a tiny Llama, rounded; `unusual`: to codes that are not the nearest, as GPTQ chooses them."""
    model = tiny("llama")
    stream = enter(model, list(model.model.layers), [tokens(3, 12), tokens(2, 12)], CPU, CPU)
    original, block = model.model.layers[0], copy.deepcopy(model.model.layers[0])
    quantized, weights = {}, {}
    for name, linear in linears(block).items():
        weights[name] = linear.weight.clone()
        grid = fit(linear.weight, format)
        target = linear.weight * STRIDE if unusual else linear.weight
        quantized[name] = round_to_grid(target, grid, format)
        linear.weight.data.copy_(quantized[name].decode())
    inputs = {name: InputQuantizer(activations) for name in quantized} if activations else {}
    drifted = Stream([h * 1.05 for h in stream.hidden], stream.calls, stream.unwrap, stream.device)
    return RoundedBlock(0, block, original, weights, inputs, drifted, stream), quantized


@torch.no_grad()
def lost(rounded: RoundedBlock, quantized: dict[str, QuantizedWeight], source: Stream) -> float:
    """The squared error of the block with these weights."""
    block = copy.deepcopy(rounded.block)
    for name, weight in quantized.items():
        block.get_submodule(name).weight.data.copy_(weight.decode())
    with quantizing_inputs(block, rounded.inputs):
        return sum(
            float((source.run(block, 0, b) - rounded.float_stream.run(rounded.original, 0, b)).square().sum())
            for b in range(len(source.hidden))
        )


@pytest.mark.parametrize("learn", ["weights", "scales", "both"])
@pytest.mark.parametrize("inputs", ["teacher", "student"])
@pytest.mark.parametrize("activations", [None, ActivationFormat()], ids=["a16", "a8"])
def test_the_block_answers_more_like_its_teacher(learn, inputs, activations):
    rounded, quantized = situation(activations=activations)
    source = rounded.float_stream if inputs == "teacher" else rounded.stream
    before = lost(rounded, quantized, source)
    step = LKD(learn=learn, inputs=inputs, steps=40, gentle_learning_rate=2e-3)
    better = dict(step.refine(rounded, quantized))
    assert lost(rounded, better, source) < 0.9 * before


@pytest.mark.parametrize("convention", [Convention.GPTQ, Convention.ASYMMETRIC])
@pytest.mark.parametrize("unit", ["step", "weight"])
@pytest.mark.parametrize("unusual", [False, True])
def test_learning_starts_at_the_codes_that_the_rounding_chose(convention, unit, unusual):
    rounded, quantized = situation(INT3.model_copy(update={"convention": convention}), unusual=unusual)
    lkd = LKD(unit=unit)
    for name, weight in quantized.items():
        student = lkd._student(weight, rounded.weights[name])
        assert torch.allclose(student.rounded(), weight.decode(), atol=1e-6)
        assert torch.equal(student.weight(weight).codes, weight.codes)
        if not unusual and convention is Convention.ASYMMETRIC:
            steps = weight.grid.scales.repeat_interleave(8, dim=1)
            start = student.values * steps if unit == "step" else student.values
            inside = (start - rounded.weights[name]).abs() <= 0.002 * steps
            assert inside.all(), "the nearest codes' cells hold the weight itself"


def test_weights_keep_their_grid_and_scales_keep_their_codes():
    rounded, quantized = situation()
    learned = LKD(learn="weights", steps=10).refine(rounded, quantized)
    assert all(torch.equal(learned[name].grid.scales, weight.grid.scales) for name, weight in quantized.items())
    assert any(not torch.equal(learned[name].codes, weight.codes) for name, weight in quantized.items())
    rounded, quantized = situation(INT3.model_copy(update={"scale": FloatScale(dtype="bfloat16")}))
    learned = LKD(learn="scales", steps=10, gentle_learning_rate=1e-2).refine(rounded, quantized)
    for name, weight in quantized.items():
        assert torch.equal(learned[name].codes, weight.codes)
        assert torch.equal(learned[name].grid.scales, learned[name].grid.scales.bfloat16().float())
    assert any(not torch.equal(learned[name].grid.scales, weight.grid.scales) for name, weight in quantized.items())


def test_the_papers_rate_moves_no_weight_further_than_its_steps_allow():
    rounded, quantized = situation()
    lkd = LKD(unit="weight", learning_rate=5e-6, inputs="teacher", learn="weights", norms=False, decay=False)
    learned = lkd.refine(rounded, quantized)
    for name, weight in quantized.items():
        steps = weight.grid.scales.repeat_interleave(8, dim=1)
        inside = weight.codes.abs() < 3  # the last codes' cells have no outer border
        away = ((rounded.weights[name] - learned[name].decode()).abs() - 0.502 * steps)[inside]
        assert (away <= 1.2 * 100 * lkd.learning_rate).all()


def test_a_rate_that_only_destroys_changes_nothing():
    rounded, quantized = situation()
    norms = {name: p.clone() for name, p in rounded.block.named_parameters()}
    learned = LKD(learning_rate=50.0, gentle_learning_rate=3.0, decay=False, steps=5).refine(rounded, quantized)
    assert all(torch.equal(learned[name].codes, weight.codes) for name, weight in quantized.items())
    assert all(torch.equal(p, norms[name]) for name, p in rounded.block.named_parameters())


@pytest.mark.parametrize("norms", [False, True])
def test_norms_learn_when_they_are_told_to(norms):
    rounded, quantized = situation()
    before = rounded.block.input_layernorm.weight.clone()
    LKD(norms=norms, steps=10).refine(rounded, quantized)
    assert torch.equal(rounded.block.input_layernorm.weight, before) is not norms


def test_teacher_streams_and_float_weights_are_left_alone():
    rounded, quantized = situation()
    held = [rounded.original, rounded.weights, rounded.stream.hidden, rounded.float_stream.hidden, quantized]
    copies = copy.deepcopy(held)
    LKD(steps=3).refine(rounded, quantized)
    assert all(torch.equal(a, b) for a, b in zip(held[0].parameters(), copies[0].parameters(), strict=True))
    assert all(torch.equal(held[1][name], copies[1][name]) for name in held[1])
    assert all(torch.equal(a, b) for i in (2, 3) for a, b in zip(held[i], copies[i], strict=True))
    assert all(torch.equal(held[4][name].codes, copies[4][name].codes) for name in quantized)
    assert not any(p.grad is not None for p in rounded.block.parameters())


def test_an_overflow_names_the_block_and_the_remedy():
    rounded, quantized = situation()
    rounded.float_stream.hidden[0][0, 0, 0] = torch.inf
    with pytest.raises(CalibrationError, match=r"block 0 is .*learning_rate"):
        LKD(steps=1).refine(rounded, quantized)


def test_gradients_pass_through_the_rounding_and_stop_at_the_ends_of_the_range():
    weight = torch.tensor([[0.4, 1.2, -4.0, 3.0]])
    format = INT3.model_copy(update={"granularity": PerGroup(size=4)})
    start = QuantizedWeight(torch.tensor([[0, 1, -4, 3]], dtype=torch.int8), fit(weight, format), format)
    student = LKD(learn="weights")._student(start, weight)
    student.values.data.copy_(torch.tensor([[0.3, 1.4, -9.0, 9.0]]))
    with torch.enable_grad():
        student.rounded().sum().backward()
    step = float(start.grid.scales[0, 0])
    assert student.values.grad.tolist()[0] == pytest.approx([step, step, 0.0, 0.0])
