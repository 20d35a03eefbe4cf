import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.errors import WeightError
from halfbyte.numerics.grid import (
    Grid,
    decode,
    encode,
    expand,
    fit,
    grid_between,
    round_scales,
    scales_shape,
    to_groups,
)
from halfbyte.scheme import (
    Convention,
    FloatScale,
    GroupCount,
    IntegerScale,
    PerChannel,
    PerGroup,
    PerTensor,
    WeightFormat,
)

EXACT = FloatScale(dtype="float32")


def format_of(bits=4, convention=Convention.GPTQ, granularity=None, scale=EXACT):
    return WeightFormat(bits=bits, convention=convention, granularity=granularity or PerGroup(size=8), scale=scale)


def weights(rows=5, columns=32, seed=0):
    """Signed, with one spike, one all-zero group and one group of a single sign."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    weight[0, :8], weight[1, 3], weight[2, 8:16] = 0, 40.0, weight[2, 8:16].abs() + 1
    return weight


@pytest.mark.parametrize("convention", Convention)
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(), PerGroup(size=8), GroupCount(count=10)])
def test_an_element_inside_the_range_moves_by_half_a_step_at_most(convention, bits, granularity):
    format, weight = format_of(bits, convention, granularity), weights()
    grid = fit(weight, format)
    step = expand(grid.scales, *weight.shape)
    zero = 0 if grid.zero_points is None else expand(grid.zero_points, *weight.shape)
    inside = (weight / step + zero >= format.lowest) & (weight / step + zero <= format.highest)
    moved = (decode(encode(weight, grid, format), grid) - weight).abs() / step
    assert float(moved[inside].max()) <= 0.5 + 1e-9
    assert bool(inside.any())


@pytest.mark.parametrize(
    ("convention", "largest"),
    [
        (Convention.GPTQ, 7 / 7.5),  # the largest magnitude lands on 7.5 and is clipped to 7
        (Convention.AWQ, 1.0),
        (Convention.OMNIQUANT, 1.0),
        (Convention.ODYSSEY, 1.0),
        (Convention.DEEPSPEED, 7 / 8),
        (Convention.ASYMMETRIC, 1.0),
    ],
)
def test_the_largest_value_of_a_group_comes_back_as_its_convention_says(convention, largest):
    weight = torch.tensor([[1.0, -0.5, 0.25, 0.0, -0.9, 0.3, 0.1, -0.05]], dtype=torch.float64)
    format = format_of(4, convention)
    if convention is Convention.ASYMMETRIC:
        weight = weight.abs()
    grid = fit(weight, format)
    assert float(decode(encode(weight, grid, format), grid)[0, 0]) == pytest.approx(largest)


@pytest.mark.parametrize("convention", Convention)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_stay_in_their_range_and_reach_both_ends(convention, bits):
    format = format_of(bits, convention)
    grid = Grid(torch.ones(1, 1), None if format.symmetric else torch.full((1, 1), 2.0))
    codes = encode(torch.linspace(-300, 300, 601).view(1, -1), grid, format).int()
    assert int(codes.min()) == format.lowest
    assert int(codes.max()) == format.highest
    assert codes.unique().numel() == format.highest - format.lowest + 1


@pytest.mark.parametrize("convention", Convention)
def test_an_all_zero_group_stays_zero(convention):
    format = format_of(4, convention)
    weight = torch.zeros(2, 16)
    grid = fit(weight, format)
    assert torch.equal(decode(encode(weight, grid, format), grid), weight)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_tiny_group_has_a_scale_that_can_be_stored(dtype):
    format = format_of(scale=FloatScale(dtype=dtype))
    grid = fit(torch.full((1, 8), 1e-12), format)
    assert float(grid.scales.to(getattr(torch, dtype)).float().min()) > 0


@given(seed=st.integers(0, 2**16), bits=st.integers(2, 8), convention=st.sampled_from(list(Convention)))
@settings(max_examples=40, deadline=None)
def test_rounding_twice_changes_nothing(seed, bits, convention):
    format, weight = format_of(bits, convention), weights(seed=seed)
    grid = fit(weight, format)
    once = decode(encode(weight, grid, format), grid)
    assert torch.equal(decode(encode(once, grid, format), grid), once)


@given(amplifier=st.sampled_from([1, 256, 1024, 4096]), seed=st.integers(0, 2**16))
@settings(max_examples=20, deadline=None)
def test_integer_scales_are_whole_multiples_of_the_step_and_never_zero(amplifier, seed):
    scales = torch.rand(50, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 0.1
    whole = round_scales(scales, IntegerScale(amplifier=amplifier)) * amplifier
    assert torch.equal(whole, whole.round())
    assert float(whole.min()) >= 1


def test_zero_is_on_every_asymmetric_grid():
    weight = torch.rand(3, 16, dtype=torch.float64) + 5
    format = format_of(4, Convention.ASYMMETRIC)
    grid = fit(weight, format)
    assert grid.zero_points is not None
    assert torch.equal(grid.zero_points, torch.zeros_like(grid.zero_points))
    assert torch.equal(decode(encode(torch.zeros_like(weight), grid, format), grid), torch.zeros_like(weight))


@pytest.mark.parametrize(
    ("granularity", "shape", "groups"),
    [
        (PerTensor(), (1, 1), 1),
        (PerChannel(), (6, 1), 6),
        (PerGroup(size=4), (6, 2), 12),
        (GroupCount(count=3), (3, 1), 3),
    ],
)
def test_groups_cover_the_matrix_in_row_major_order(granularity, shape, groups):
    weight = torch.arange(48.0).view(6, 8)
    assert scales_shape(6, 8, granularity) == shape
    members = to_groups(weight, granularity)
    assert len(members) == groups
    assert torch.equal(members.flatten(), weight.flatten())


@pytest.mark.parametrize(
    ("granularity", "limit"), [(PerGroup(size=5), "group size 5"), (GroupCount(count=7), "7 groups")]
)
def test_a_granularity_that_does_not_divide_says_so(granularity, limit):
    with pytest.raises(WeightError, match=limit):
        scales_shape(6, 8, granularity)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_refused_with_a_count(bad):
    weight = weights().float()
    weight[3, 7] = bad
    with pytest.raises(WeightError, match="1 of 160 elements"):
        fit(weight, format_of())


def test_the_choice_of_convention_moves_the_error_by_a_quarter_on_gaussian_groups():
    """Relative mean squared errors on N(0,1), groups of 128, against amax/7 with -8..7 as 1."""
    weight = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))

    def error(convention):
        format = WeightFormat(bits=4, convention=convention, granularity=PerGroup(size=128), scale=EXACT)
        grid = fit(weight, format)
        return float((decode(encode(weight, grid, format), grid) - weight).square().mean())

    base = error(Convention.AWQ)
    assert error(Convention.GPTQ) / base == pytest.approx(0.89, abs=0.02)
    assert error(Convention.DEEPSPEED) / base == pytest.approx(0.81, abs=0.02)
    assert error(Convention.ASYMMETRIC) / base == pytest.approx(0.735, abs=0.02)


def forgotten_zero_point(weight, grid, format):
    return decode(encode(weight, grid, format), Grid(grid.scales))


def neighbouring_group(weight, grid, format):
    return decode(encode(weight, grid, format), Grid(grid.scales.roll(1, 1), grid.zero_points))


@pytest.mark.parametrize("bug", [forgotten_zero_point, neighbouring_group])
def test_the_half_step_bound_notices(bug):
    format, weight = format_of(4, Convention.ASYMMETRIC), weights()
    reach = torch.tensor([[1.0, 3.0, 9.0, 45.0]], dtype=torch.float64).expand(5, 4)
    grid = grid_between(-reach, reach, format)
    step = expand(grid.scales, *weight.shape)
    assert float(((bug(weight, grid, format) - weight).abs() / step).max()) > 0.6
