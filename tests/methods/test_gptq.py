import pytest
import torch

from closeness import relative_error
from halfbyte.calibration.statistics import InputStatistics
from halfbyte.errors import CalibrationError
from halfbyte.methods.gptq import GPTQ, correction, damped, error_spread
from halfbyte.methods.rtn import RTN
from halfbyte.numerics.error import output_power
from halfbyte.scheme import Convention, FloatScale, PerChannel, PerGroup, WeightFormat


def format_of(bits=3, convention=Convention.GPTQ, granularity=None):
    return WeightFormat(
        bits=bits, convention=convention, granularity=granularity or PerGroup(size=8), scale=FloatScale(dtype="float32")
    )


def problem(seed=0, out=6, width=32, tokens=300):
    """A signed weight, and inputs that are correlated and of uneven size."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, width, generator=generator, dtype=torch.float64)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64) / width**0.5
    mix = mix + torch.diag(torch.logspace(-1, 1, width, dtype=torch.float64))
    inputs = torch.randn(tokens, width, generator=generator, dtype=torch.float64) @ mix
    return weight, inputs


def seen(inputs, reference=None):
    statistics = InputStatistics.empty(inputs.shape[1], drift=reference is not None)
    statistics.gram = statistics.gram.double()
    if statistics.drift is not None:
        statistics.drift = statistics.drift.double()
    statistics.absorb(inputs, reference)
    return statistics


def loss(weight, quantized, statistics):
    return output_power(weight - quantized.decode(), statistics.gram)


def obq(weight, hessian, grid, format, order):
    """Optimal Brain Quantization of one row after the other, in a given order, with the inverse downdated explicitly."""
    codes = torch.zeros_like(weight)
    scales = grid.scales.repeat_interleave(weight.shape[1] // grid.scales.shape[1], dim=1)
    zeros = torch.zeros_like(scales)
    if grid.zero_points is not None:
        zeros = grid.zero_points.repeat_interleave(weight.shape[1] // grid.zero_points.shape[1], dim=1)
    for row in range(len(weight)):
        values, inverse = weight[row].clone(), torch.linalg.inv(hessian)
        for column in order:
            scale, zero = scales[row, column], zeros[row, column]
            code = (values[column] / scale + zero).round().clamp(format.lowest, format.highest)
            codes[row, column] = code
            error = (values[column] - (code - zero) * scale) / inverse[column, column]
            values = values - error * inverse[column]
            inverse = inverse - torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return codes


@pytest.mark.parametrize("convention", [Convention.GPTQ, Convention.ODYSSEY, Convention.ASYMMETRIC])
@pytest.mark.parametrize("seed", range(3))
def test_it_makes_the_choices_of_obq_in_the_same_order(convention, seed):
    weight, inputs = problem(seed)
    statistics, format = seen(inputs), format_of(convention=convention)
    hessian = damped(statistics.gram, 0.01)
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    found = GPTQ().quantize(weight, format, statistics)
    assert torch.equal(found.codes.double(), obq(weight, hessian, found.grid, format, order.tolist()))


def test_per_channel_grids_left_to_right_are_obq_too():
    weight, inputs = problem()
    statistics, format = seen(inputs), format_of(granularity=PerChannel())
    found = GPTQ(order="given").quantize(weight, format, statistics)
    assert torch.equal(found.codes.double(), obq(weight, damped(statistics.gram, 0.01), found.grid, format, range(32)))


def test_without_correlation_it_is_plain_rounding():
    weight, _ = problem()
    statistics = seen(torch.eye(32, dtype=torch.float64))
    plain = RTN().quantize(weight, format_of(), None)
    assert torch.equal(GPTQ().quantize(weight, format_of(), statistics).codes, plain.codes)


@pytest.mark.parametrize("order", ["activation", "given"])
@pytest.mark.parametrize("ranges", ["minmax", "mse", "output"])
@pytest.mark.parametrize("convention", Convention)
def test_it_loses_less_of_the_output_than_plain_rounding(order, ranges, convention):
    weight, inputs = problem(out=24)
    statistics, format = seen(inputs), format_of(convention=convention)
    compensated = GPTQ(order=order, ranges=ranges).quantize(weight, format, statistics)
    # left to right is at its worst here: the inputs grow with the column, so the largest errors find no columns left
    bound = 0.8 if order == "activation" else 1.0
    plain = RTN().quantize(weight, format, None)
    assert loss(weight, compensated, statistics) < bound * loss(weight, plain, statistics)


def test_groups_left_to_right_take_their_grids_from_the_updated_weights():
    weight, inputs = problem()
    found = GPTQ(order="given").quantize(weight, format_of(), seen(inputs))
    static = RTN().quantize(weight, format_of(), None)
    assert torch.equal(found.grid.scales[:, 0], static.grid.scales[:, 0])
    assert not torch.equal(found.grid.scales[:, 1:], static.grid.scales[:, 1:])


def test_static_order_leaves_the_groups_where_they_are():
    weight, inputs = problem()
    found = GPTQ(order="activation").quantize(weight, format_of(), seen(inputs))
    assert torch.equal(found.grid.scales, RTN().quantize(weight, format_of(), None).grid.scales)


def test_the_spread_is_the_upper_factor_of_the_inverse_hessian():
    hessian = damped(seen(problem()[1]).gram, 0.01)
    spread = error_spread(hessian)
    assert torch.equal(spread, spread.triu())
    assert relative_error(spread.T @ spread @ hessian, torch.eye(32, dtype=torch.float64)) < 1e-9


def test_the_corrected_weight_is_the_least_squares_answer_on_the_drifted_inputs():
    weight, clean = problem()
    drifted = clean + 0.2 * torch.randn_like(clean)
    statistics = seen(drifted, clean)
    assert statistics.drift is not None
    spread = error_spread(statistics.gram)
    found = weight + correction(weight, statistics.drift, spread)
    expected = torch.linalg.lstsq(drifted, clean @ weight.T).solution.T
    assert relative_error(found, expected) < 1e-8


def test_correcting_the_drift_brings_the_outputs_nearer_to_the_float_model():
    weight, clean = problem(out=24)
    drifted = clean + 0.3 * torch.randn_like(clean)
    statistics = seen(drifted, clean)

    def distance(quantized):
        return float((drifted @ quantized.decode().T - clean @ weight.T).square().sum())

    plain, corrected = (GPTQ(drift=d).quantize(weight, format_of(4), statistics) for d in (0.0, 1.0))
    assert distance(corrected) < 0.95 * distance(plain)


def test_inputs_that_were_never_alive_get_zero_weights():
    weight, inputs = problem()
    inputs[:, 5] = 0
    assert float(GPTQ().quantize(weight, format_of(), seen(inputs)).decode()[:, 5].abs().max()) == 0


def test_the_weight_is_left_as_it_was():
    weight, inputs = problem()
    before, statistics = weight.clone(), seen(inputs, inputs * 1.1)
    gram = statistics.gram.clone()
    GPTQ(drift=1.0).quantize(weight, format_of(), statistics)
    assert torch.equal(weight, before)
    assert torch.equal(statistics.gram, gram)


def test_a_hessian_that_is_not_positive_definite_names_the_remedy():
    hessian = torch.eye(4)
    hessian[0, 1] = hessian[1, 0] = 2.0
    with pytest.raises(CalibrationError, match=r"more calibration tokens.*damping"):
        error_spread(hessian)


@pytest.mark.parametrize("statistics", [None, InputStatistics.empty(32)])
def test_a_layer_without_tokens_is_refused(statistics):
    with pytest.raises(CalibrationError, match="none reached this layer"):
        GPTQ().quantize(problem()[0], format_of(), statistics)


def errors_that_stay_where_they_are(spread):
    return torch.diag(spread.diagonal())


def lower_instead_of_upper(spread):
    return torch.linalg.cholesky(spread.T @ spread)


@pytest.mark.parametrize("bug", [errors_that_stay_where_they_are, lower_instead_of_upper])
def test_the_comparison_with_obq_notices(bug, monkeypatch):
    weight, inputs = problem()
    statistics = seen(inputs)
    right = GPTQ().quantize(weight, format_of(), statistics)
    monkeypatch.setattr("halfbyte.methods.gptq.error_spread", lambda hessian: bug(error_spread(hessian)))
    assert not torch.equal(GPTQ().quantize(weight, format_of(), statistics).codes, right.codes)
