"""Integer scales: what methods find on them, how amplifiers are chosen, and that every weight comes out certified."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from closeness import relative_error
from halfbyte.calibration.statistics import InputStatistics
from halfbyte.errors import WeightError
from halfbyte.methods import GPTQ, RTN
from halfbyte.numerics.certificate import largest_reach
from halfbyte.numerics.grid import Grid
from halfbyte.numerics.integer_scales import heuristic, multipliers, nearest, on_integer_grid, require_safe, row_reach
from halfbyte.numerics.quantized import QuantizedWeight
from halfbyte.scheme import (
    ActivationFormat,
    Convention,
    FloatScale,
    IntegerScale,
    PerChannel,
    PerGroup,
    PerTensor,
    WeightFormat,
)

A8 = ActivationFormat(bits=8)


def format_of(convention: Convention = Convention.GPTQ, size: int = 16, bits: int = 4, **scale: Any) -> WeightFormat:
    return WeightFormat(bits=bits, convention=convention, granularity=PerGroup(size=size), scale=IntegerScale(**scale))


def weights(out: int = 7, ins: int = 96, sigma: float = 0.02, seed: int = 0) -> Tensor:
    """Rows of very different size, an all-zero group, a spike."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, ins, generator=g) * sigma * torch.logspace(-1, 1, out)[:, None]
    weight[0, :16] = 0
    weight[-1, 3] *= 8
    return weight


def seen_of(ins: int = 96, tokens: int = 400) -> InputStatistics:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, ins, generator=g) @ (torch.eye(ins) + 0.1 * torch.randn(ins, ins, generator=g))
    seen = InputStatistics.empty(ins)
    seen.absorb(x)
    return seen


def rtn(ranges: Any = "minmax") -> Callable[[Tensor, WeightFormat], QuantizedWeight]:
    return lambda weight, format: RTN(ranges=ranges).quantize(weight, format, None)


def gptq(**options: Any) -> Callable[[Tensor, WeightFormat], QuantizedWeight]:
    seen = seen_of()
    return lambda weight, format: GPTQ(**options).quantize(weight, format, seen)


METHODS = {
    "rtn": rtn(),
    "rtn mse": rtn("mse"),
    "gptq": gptq(),
    "gptq mse": gptq(ranges="mse"),
    "gptq fresh grids": gptq(order="given"),
}
EVERY = pytest.mark.parametrize("quantize", METHODS.values(), ids=METHODS.keys())
AMPLIFIERS = [256, 1000, 1024, "heuristic", "layer", "row"]


@EVERY
@pytest.mark.parametrize("amplifier", AMPLIFIERS)
@pytest.mark.parametrize("convention", [Convention.GPTQ, Convention.ASYMMETRIC])
def test_every_method_comes_out_on_integer_scales_and_certified(quantize, amplifier, convention):
    format = format_of(convention, amplifier=amplifier, overflow="shrink")
    weight = weights()
    found = on_integer_grid(quantize, weight, format, A8)
    assert found.format == format
    assert found.grid.amplifiers is not None
    assert found.grid.amplifiers.shape == (7, 1)
    whole = multipliers(found.grid)
    assert torch.equal(found.grid.scales, whole.float() / found.grid.amplifiers)
    assert int(whole.min()) >= 1
    assert int(whole.max()) <= 2**15 - 1
    assert int(row_reach(found).max()) <= largest_reach(A8)
    assert float((found.decode() - weight).norm() / weight.norm()) < 0.3
    if quantize in (METHODS["rtn"], METHODS["rtn mse"]):  # GPTQ may use these columns for the errors of others
        assert bool((found.decode()[0, :16] == 0).all())


@EVERY
def test_a_large_amplifier_gives_what_float_scales_give(quantize):
    """Codes differ only where a value lies beside a tie; with AWQ's step the largest value of a group is not on one."""
    weight, format = weights(sigma=0.5), format_of(Convention.AWQ, amplifier="row")
    exact = quantize(weight, format.model_copy(update={"scale": FloatScale(dtype="float32")}))
    whole = on_integer_grid(quantize, weight, format, A8)
    assert float((whole.decode() - exact.decode()).norm() / exact.decode().norm()) < 0.02


def test_codes_found_on_the_integer_grid_lose_less_than_rounded_scales():
    """Small weights, N(0, 0.01): their scales are about 4/1024, and 1/256."""
    weight = 0.01 * torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))

    def error(**scale: Any) -> float:
        format = format_of(Convention.AWQ, size=128, **scale)
        return float((on_integer_grid(rtn(), weight, format, A8).decode() - weight).square().mean())

    reference = rtn()(weight, format_of(Convention.AWQ, 128).model_copy(update={"scale": FloatScale(dtype="float32")}))
    exact = float((reference.decode() - weight).square().mean())
    assert error(amplifier=256, plug_in=True) > 1.5 * exact
    assert error(amplifier=1024, plug_in=True) > 1.2 * exact
    assert error(amplifier=256) < 1.06 * exact
    assert error(amplifier=1024) < 1.06 * exact


@EVERY
@pytest.mark.parametrize("amplifier", AMPLIFIERS)
def test_the_plug_in_form_keeps_the_codes_of_float_scales(quantize, amplifier):
    weight = weights()
    floats = quantize(weight, format_of().model_copy(update={"scale": FloatScale(dtype="float32")}))
    format = format_of(amplifier=amplifier, plug_in=True, overflow="shrink")
    found = on_integer_grid(quantize, weight, format, A8)
    assert torch.equal(found.codes, floats.codes)
    assert found.grid.amplifiers is not None
    alive = torch.ones_like(found.grid.scales, dtype=torch.bool)
    alive[0, 0] = False
    wanted = (floats.grid.scales * found.grid.amplifiers).round().clamp(min=1)
    assert torch.equal(multipliers(found.grid)[alive].float(), wanted[alive])
    assert int(multipliers(found.grid)[0, 0]) == 1


@pytest.mark.parametrize(
    ("smallest", "alpha"),
    [(0.3, 4), (0.5, 2), (0.51, 2), (1.0, 1), (5.0, 1), (2.0**-9, 512), (1e-30, 2**24)],
)
def test_the_heuristic_lifts_the_smallest_scale_to_one(smallest, alpha):
    scales = torch.tensor([[0.0, 7.0, smallest]], dtype=torch.float64)
    assert heuristic(scales) == alpha


def test_the_heuristic_ends_where_the_papers_loop_does_not():
    assert heuristic(torch.zeros(3, 2)) == 1
    assert heuristic(torch.full((3, 2), 4.0)) == 1


def test_the_heuristic_is_the_papers_loop_elsewhere():
    for smallest in (0.9, 0.4, 0.25, 0.013, 0.0021):
        n, lifted = 0, smallest
        while lifted < 1:
            lifted = smallest * 2**n
            n += 1
        assert heuristic(torch.tensor([smallest, 1.0], dtype=torch.float64)) == 2 ** (n - 1)


def test_largest_amplifiers_leave_less_than_a_factor_of_two_or_fill_the_storage():
    weight = weights(out=7, ins=96, sigma=30.0)
    found = on_integer_grid(rtn(), weight, format_of(amplifier="row"), A8)
    fullest = multipliers(found.grid).amax(dim=1) * 2 > 2**15 - 1
    tight = row_reach(found) * 2.2 > largest_reach(A8)  # codes at 2α are not those at α
    assert bool((fullest | tight).all())


def test_an_amplifier_of_the_layer_serves_its_largest_row():
    found = on_integer_grid(rtn(), weights(), format_of(amplifier="layer"), A8)
    assert found.grid.amplifiers is not None
    assert len(found.grid.amplifiers.unique()) == 1
    rows = on_integer_grid(rtn(), weights(), format_of(amplifier="row"), A8).grid.amplifiers
    assert rows is not None
    assert float(found.grid.amplifiers[0]) == float(rows.min())
    assert float(rows.max()) > float(rows.min())


def test_scales_of_eight_bits_fill_a_byte_row_by_row():
    found = on_integer_grid(rtn(), weights(), format_of(amplifier="row", dtype="uint8"), A8)
    largest = multipliers(found.grid).amax(dim=1)
    assert int(largest.max()) <= 255
    assert int(largest.min()) >= 127
    assert torch.equal(found.grid.scales.bfloat16().float(), found.grid.scales)


LARGE = 2000 * torch.ones(3, 32)


def test_a_row_beyond_the_certificate_is_refused_with_the_remedy():
    weight = torch.cat([0.01 * LARGE, 0.2 * torch.ones(1, 32)]).repeat(1, 64)
    with pytest.raises(WeightError, match=r"row 0 has a reach of \d+ \(limit 16909320.*`overflow: shrink`"):
        on_integer_grid(rtn(), weight, format_of(size=32), A8)


def test_scales_beyond_the_storage_are_refused_with_the_remedy():
    with pytest.raises(WeightError, match=r"row 0 has a scale of 546/1024, and S is stored up to 255: .*smaller"):
        on_integer_grid(rtn(), torch.eye(3)[:, :2].repeat(1, 16) * 4, format_of(dtype="uint8"), A8)


def test_where_no_amplifier_will_do_float_scales_are_named():
    with pytest.raises(WeightError, match="too large for integer scales"):
        on_integer_grid(rtn(), 1e9 * LARGE, format_of(amplifier="row"), A8)


@pytest.mark.parametrize("plug_in", [False, True])
def test_shrinking_touches_the_failing_rows_alone(plug_in):
    weight = torch.cat([0.01 * LARGE, 0.2 * torch.ones(1, 32)]).repeat(1, 64)
    found = on_integer_grid(rtn(), weight, format_of(size=32, overflow="shrink", plug_in=plug_in), A8)
    assert found.grid.amplifiers is not None
    assert found.grid.amplifiers.flatten().tolist() == [256.0, 256.0, 256.0, 1024.0]
    assert int(row_reach(found).max()) <= largest_reach(A8)
    assert float((found.decode() - weight).norm() / weight.norm()) < 0.07


def test_inputs_of_a_wider_range_get_smaller_amplifiers():
    asymmetric = ActivationFormat(bits=8, symmetric=False)
    weight = weights(sigma=30.0)
    found = on_integer_grid(rtn(), weight, format_of(amplifier="row"), asymmetric)
    assert int(row_reach(found).max()) <= largest_reach(asymmetric) < largest_reach(A8)


def test_rows_are_rounded_as_if_they_were_alone():
    weight, format = weights(), format_of(amplifier="row")
    whole = on_integer_grid(gptq(ranges="mse"), weight, format, A8)
    for row in range(len(weight)):
        alone = on_integer_grid(gptq(ranges="mse"), weight[row : row + 1], format, A8)
        assert torch.equal(alone.grid.scales, whole.grid.scales[row : row + 1])


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**16), power=st.integers(-6, 3))
def test_a_power_of_two_times_a_row_moves_into_its_amplifier(seed, power):
    weight, format = weights(seed=seed, sigma=30.0), format_of(size=32, amplifier="row")
    one, other = (on_integer_grid(rtn(), w, format, A8) for w in (weight, weight * 2.0**power))
    assert torch.equal(one.decode() * 2.0**power, other.decode())


def test_candidates_are_compared_on_the_grid_that_they_will_have():
    weight, format = weights(), format_of(amplifier="row")
    assert torch.equal(
        nearest(weight, format, "mse").decode(), on_integer_grid(rtn("mse"), weight, format, A8).decode()
    )
    floats = format.model_copy(update={"scale": FloatScale(dtype="float32")})
    assert torch.equal(nearest(weight, floats, "mse").decode(), rtn("mse")(weight, floats).decode())


@EVERY
@pytest.mark.parametrize("convention", [Convention.GPTQ, Convention.AWQ, Convention.ASYMMETRIC])
def test_products_of_a_byte_hold_every_code_times_its_multiplier(quantize, convention):
    weight, format = weights(), format_of(convention, amplifier="row", product="int8")
    found = on_integer_grid(quantize, weight, format, A8)
    grid = found.grid
    assert grid.amplifiers is not None
    steps = found.codes.long() - (0 if grid.zero_points is None else grid.zero_points.long().repeat_interleave(16, 1))
    products = steps * multipliers(grid).repeat_interleave(16, dim=1)
    assert int(products.abs().max()) <= 127
    assert int(products[1:].abs().amax(dim=1).min()) >= 100  # the range is used
    assert relative_error(products / grid.amplifiers, found.decode()) < 1e-6
    assert relative_error(found.decode(), weight) < 0.25


def test_the_protective_range_is_the_largest_that_rounding_cannot_leave():
    """Every int8 group (low, high) within ±119 stays within ±127 when its step is rounded; ±120 does not (QoQ)."""
    format = WeightFormat(
        convention=Convention.ASYMMETRIC, granularity=PerGroup(size=2), scale=IntegerScale(amplifier=1)
    )
    for reach, largest in ((119, 121), (120, 128)):
        ends = torch.arange(-reach, reach + 1.0)
        pairs = torch.cartesian_prod(ends, ends)
        found = RTN().quantize(pairs[pairs[:, 0] <= pairs[:, 1]], format, None)
        assert float(found.decode().abs().max()) == largest


def test_products_of_a_byte_ask_for_amplifiers_of_rows():
    with pytest.raises(ValueError, match="goes with amplifier: row, not 1024"):
        IntegerScale(product="int8")


def test_a_weight_that_a_refinement_changed_is_certified_again():
    found = on_integer_grid(rtn(), weights(), format_of(amplifier="row", dtype="uint8"), A8)
    require_safe(found, A8)
    larger = replace(found.grid, scales=found.grid.scales * 8)
    with pytest.raises(WeightError, match="no longer pass the overflow certificate"):
        require_safe(replace(found, grid=larger), A8)


def test_one_scale_per_channel_may_be_an_integer_and_one_per_tensor_not():
    format = WeightFormat(granularity=PerChannel(), scale=IntegerScale(amplifier="row"))
    assert on_integer_grid(rtn(), weights(), format, A8).grid.scales.shape == (7, 1)
    with pytest.raises(ValueError, match="not per tensor"):
        WeightFormat(granularity=PerTensor(), scale=IntegerScale())


def test_a_grid_without_amplifiers_has_no_multipliers():
    with pytest.raises(ValueError, match="no amplifiers"):
        multipliers(Grid(torch.ones(2, 2)))
    with pytest.raises(ValueError, match="choose the amplifiers of `row`"):
        RTN().quantize(weights(), format_of(amplifier="row"), None)
