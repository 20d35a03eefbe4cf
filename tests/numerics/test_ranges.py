import pytest
import torch

from halfbyte.numerics.error import output_power, output_snr, weight_snr
from halfbyte.numerics.grid import decode, encode, fit
from halfbyte.numerics.ranges import MSE_NORM, deviation, find_grid, output_error
from halfbyte.scheme import Convention, FloatScale, PerChannel, PerGroup, WeightFormat


def problem(seed=0, rows=7, columns=64, tokens=200):
    """Signed weights with spikes, and inputs whose channels differ a hundredfold."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    weight[:, ::9] *= 6
    inputs = torch.randn(tokens, columns, generator=generator, dtype=torch.float64)
    inputs = inputs * torch.logspace(-1, 1, columns, dtype=torch.float64)
    return weight, inputs


def format_of(convention, granularity=None):
    return WeightFormat(
        bits=3, convention=convention, granularity=granularity or PerGroup(size=16), scale=FloatScale(dtype="float32")
    )


def rounded(weight, grid, format):
    return decode(encode(weight, grid, format), grid)


@pytest.mark.parametrize("convention", Convention)
def test_the_mse_search_never_does_worse_than_the_full_range_in_any_group(convention):
    weight, _ = problem()
    format = format_of(convention)

    def error(grid):
        return (rounded(weight, grid, format) - weight).abs().pow(MSE_NORM).unflatten(1, (-1, 16)).sum(-1)

    full, searched = error(fit(weight, format)), error(find_grid(weight, format, "mse"))
    assert bool((searched <= full * (1 + 1e-12)).all())
    assert float(searched.sum()) < float(full.sum())


@pytest.mark.parametrize("convention", [Convention.GPTQ, Convention.ASYMMETRIC])
def test_the_output_search_lowers_the_error_that_each_group_makes_in_the_outputs(convention):
    weight, inputs = problem()
    format = format_of(convention)

    def error(grid):
        delta = (rounded(weight, grid, format) - weight).unflatten(1, (-1, 16))
        return torch.einsum("ogk,tgk->otg", delta, inputs.unflatten(1, (-1, 16))).square().sum(1)

    full, searched = error(fit(weight, format)), error(find_grid(weight, format, "output", inputs.T @ inputs))
    assert bool((searched <= full * (1 + 1e-9)).all())
    assert float(searched.sum()) < 0.95 * float(full.sum())


@pytest.mark.parametrize("granularity", [PerGroup(size=16), PerChannel()])
def test_the_error_from_the_gram_matrix_is_the_error_over_the_tokens(granularity):
    weight, inputs = problem()
    delta = torch.randn_like(weight)
    size = 16 if isinstance(granularity, PerGroup) else 64
    expected = (
        torch.einsum("ogk,tgk->otg", delta.unflatten(1, (-1, size)), inputs.unflatten(1, (-1, size))).square().sum(1)
    )
    found = output_error(inputs.T @ inputs, format_of(Convention.GPTQ, granularity))(delta.view(-1, size))
    assert torch.allclose(found.view(expected.shape), expected, rtol=1e-10)


def test_output_snr_counts_what_the_layer_loses_over_the_tokens():
    weight, inputs = problem()
    other = weight + 0.01 * torch.randn_like(weight)
    gram = inputs.T @ inputs
    power, error = (inputs @ weight.T).square().sum(), (inputs @ (weight - other).T).square().sum()
    assert output_power(weight, gram) == pytest.approx(float(power))
    assert output_snr(weight, other, gram) == pytest.approx(float(10 * torch.log10(power / error)))


def test_an_unchanged_weight_has_infinite_snr():
    weight, _ = problem()
    assert weight_snr(weight, weight) == float("inf")
    assert weight_snr(weight, weight * 0.9) == pytest.approx(20.0)


@pytest.mark.parametrize("convention", Convention)
def test_the_search_judges_what_encoding_and_decoding_will_give(convention):
    weight, _ = problem()
    format = format_of(convention)
    grid = fit(weight, format)
    zeros = None if grid.zero_points is None else grid.zero_points.flatten()
    found = deviation(weight.reshape(-1, 16), grid.scales.flatten(), zeros, format)
    assert torch.equal(found.view(weight.shape), rounded(weight, grid, format) - weight)


def test_the_output_policy_without_a_gram_matrix_is_refused():
    with pytest.raises(ValueError, match="Gram"):
        find_grid(problem()[0], format_of(Convention.GPTQ), "output")
