"""Learned clipping: grids that shrink, and gradients that know where to."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.numerics import clipping
from halfbyte.numerics.activations import InputQuantizer, simulate
from halfbyte.numerics.clipping import Clipping, ends, paper_clipping, warm_clipping
from halfbyte.numerics.grid import encode, fit
from halfbyte.numerics.quantized import round_to_grid
from halfbyte.numerics.ranges import find_grid
from halfbyte.numerics.slopes import round_through, simulate_through
from halfbyte.scheme import ActivationFormat, Convention, FloatScale, PerChannel, PerGroup, WeightFormat

FLOAT32 = FloatScale(dtype="float32")
CONVENTIONS = pytest.mark.parametrize("convention", list(Convention))


def format_of(convention: Convention, bits: int = 3, size: int = 8, dtype: str = "float32") -> WeightFormat:
    scale = FloatScale.model_validate({"dtype": dtype})
    return WeightFormat(bits=bits, convention=convention, granularity=PerGroup(size=size), scale=scale)


def weights(seed: int, rows: int = 5, columns: int = 24) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@CONVENTIONS
def test_the_paper_starts_at_982_thousandths_of_the_range(convention):
    weight, format = weights(0), format_of(convention)
    clip = paper_clipping(weight, format)
    grid = clip.grid(weight, format)
    assert torch.allclose(grid.scales, fit(weight, format).scales * 0.98201, rtol=1e-4)
    assert all(tensor.requires_grad for tensor in clip.learned)


@CONVENTIONS
@pytest.mark.parametrize("ranges", ["minmax", "mse"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_warm_start_is_the_grid_that_it_starts_from(convention, ranges, dtype):
    weight, format = weights(1), format_of(convention, dtype=dtype)
    grid = find_grid(weight, format, ranges)
    clipped = warm_clipping(weight, grid, format).grid(weight, format)
    assert torch.allclose(clipped.scales, grid.scales, rtol=1e-4 if dtype == "float32" else 2**-7)
    if grid.zero_points is not None and dtype == "float32":
        assert torch.equal(clipped.zero_points.detach(), grid.zero_points)


@given(seed=st.integers(0, 999), upper=st.floats(-2, 6), lower=st.floats(-2, 6), asymmetric=st.booleans())
def test_a_clipped_grid_spans_the_clipped_range(seed, upper, lower, asymmetric):
    weight = weights(seed)
    format = format_of(Convention.ASYMMETRIC if asymmetric else Convention.ODYSSEY, bits=4)
    low, high = ends(weight, format)
    clip = Clipping(torch.full(low.shape, upper), torch.full(low.shape, lower))
    grid = clip.grid(weight, format)
    top, bottom = torch.tensor([upper, lower]).sigmoid()
    if asymmetric:
        assert torch.allclose(grid.scales * 15, high * top - low * bottom, rtol=1e-5)
        assert ((-grid.zero_points * grid.scales - low * bottom).abs() <= 0.501 * grid.scales).all()
    else:
        assert torch.allclose(grid.scales * 7, torch.maximum(high * top, -low * bottom), rtol=1e-5)


@CONVENTIONS
def test_rounding_with_slopes_gives_what_is_stored(convention):
    weight, format = weights(2), format_of(convention, dtype="bfloat16")
    grid = paper_clipping(weight, format).grid(weight, format)
    assert torch.allclose(round_through(weight, grid, format), round_to_grid(weight, grid, format).decode(), atol=1e-6)


def test_a_group_of_zeros_stays_zero_and_has_finite_slopes():
    weight = weights(3)
    weight[1, 8:16] = 0
    weight[2, :8] = weight[2, :8].abs()
    for convention in Convention:
        format = format_of(convention)
        clip = paper_clipping(weight, format)
        rounded = round_through(weight, clip.grid(weight, format), format)
        rounded.square().sum().backward()
        assert not rounded[1, 8:16].any()
        assert all(torch.isfinite(tensor.grad).all() for tensor in clip.learned)


@CONVENTIONS
def test_a_saturated_weight_pulls_at_the_end_that_cut_it(convention):
    """At the upper end the value is γ·max times a constant, so its slope in the logit is that of the sigmoid."""
    weight = torch.tensor([[3.0, 0.1, -0.2, 0.05, -0.1, 0.3, -0.3, 0.2]]).double()
    format = format_of(convention, bits=4)
    clip = Clipping(torch.zeros(1, 1).double().requires_grad_(), torch.zeros(1, 1).double().requires_grad_())
    grid = clip.grid(weight, format)
    rounded = round_through(weight, grid, format)
    assert encode(weight, grid, format)[0, 0] == format.highest
    rounded[0, 0].backward()
    reach = format.highest / format.divisor if format.symmetric else 1.0
    rounding = 1e-6 if format.symmetric else 0.5 * 0.25 * 3.0 / 15  # half a code of the zero point, in slopes of a step
    assert clip.upper.grad.item() == pytest.approx(3.0 * 0.25 * reach, abs=rounding)
    assert clip.lower.grad.item() == pytest.approx(0.0, abs=rounding)


def test_descent_along_the_slopes_lowers_the_rounding_error():
    weight = weights(4, 16, 64)
    for convention in (Convention.ASYMMETRIC, Convention.GPTQ):
        format = format_of(convention, size=64)
        clip = paper_clipping(weight, format)
        optimizer = torch.optim.Adam(list(clip.learned), lr=0.05)
        losses = []
        for _ in range(60):
            loss = (round_through(weight, clip.grid(weight, format), format) - weight).square().mean()
            losses.append(float(loss.detach()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert min(losses) < 0.9 * losses[0]


def test_per_channel_is_one_group_a_row():
    format = WeightFormat(bits=4, granularity=PerChannel(), scale=FLOAT32)
    assert paper_clipping(weights(5), format).upper.shape == (5, 1)


@pytest.mark.parametrize("format", [
    ActivationFormat(bits=4), ActivationFormat(bits=4, symmetric=False), ActivationFormat(bits=8, clip=0.9),
    ActivationFormat(bits=8, granularity="tensor"), ActivationFormat(bits=4, granularity="group", group_size=6),
])  # fmt: skip
def test_inputs_with_slopes_are_the_inputs_that_kernels_see(format):
    x = weights(6).requires_grad_()
    seen = simulate_through(x, InputQuantizer(format))
    assert torch.allclose(seen, simulate(x.detach(), InputQuantizer(format)), atol=1e-6)
    seen.sum().backward()
    assert torch.isfinite(x.grad).all()
    assert x.grad.any()


def test_a_tokens_scale_has_the_slope_of_its_loudest_channel():
    x = torch.tensor([[7.0, 1.4, -0.6]], dtype=torch.float64, requires_grad=True)  # step 1: errors 0, -0.4, -0.4
    simulate_through(x, InputQuantizer(ActivationFormat(bits=4))).sum().backward()
    assert x.grad.tolist()[0] == pytest.approx([1 + (-0.4 - 0.4) / 7, 1.0, 1.0])


@pytest.mark.parametrize("bug", ["no slope of the zero point", "whole range at sigmoid 4", "scales unrounded"])
def test_planted_bugs_are_seen(bug, monkeypatch):
    if bug == "no slope of the zero point":
        real = clipping.straight_through

        def without_zeros(rounded, exact):
            return rounded if torch.equal(rounded, rounded.round()) else real(rounded, exact)

        monkeypatch.setattr(clipping, "straight_through", without_zeros)
        with pytest.raises(AssertionError):
            test_a_saturated_weight_pulls_at_the_end_that_cut_it(Convention.ASYMMETRIC)
    elif bug == "whole range at sigmoid 4":
        monkeypatch.setattr(clipping, "START", 40.0)
        with pytest.raises(AssertionError):
            test_the_paper_starts_at_982_thousandths_of_the_range(Convention.GPTQ)
    else:
        monkeypatch.setattr(clipping, "round_scales", lambda scales, *_: scales * 1.01)
        with pytest.raises(AssertionError):
            test_a_warm_start_is_the_grid_that_it_starts_from(Convention.GPTQ, "minmax", "float32")
