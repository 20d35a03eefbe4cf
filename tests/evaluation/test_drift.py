import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.evaluation.drift import Drift, concatenate, drift, negative_log_likelihood


def logits(tokens: int, vocabulary: int, seed: int) -> torch.Tensor:
    return 4 * torch.randn(tokens, vocabulary, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_definition(original: torch.Tensor, quantized: torch.Tensor) -> list[float]:
    p, q = original.double().softmax(dim=1), quantized.double().softmax(dim=1)
    return [
        sum(float(a) * math.log(float(a) / float(b)) for a, b in zip(*rows, strict=True))
        for rows in zip(p, q, strict=True)
    ]


@settings(max_examples=30, deadline=None)
@given(tokens=st.integers(1, 300), vocabulary=st.integers(2, 9), seed=st.integers(0, 2**16))
def test_divergence_is_what_its_definition_says(tokens, vocabulary, seed):
    original, quantized = logits(tokens, vocabulary, seed), logits(tokens, vocabulary, seed + 1)
    found = drift(original, quantized)
    assert found.divergence.tolist() == pytest.approx(by_definition(original, quantized), rel=1e-9, abs=1e-12)
    assert found.agreement.tolist() == (original.argmax(1) == quantized.argmax(1)).tolist()


def test_divergence_has_a_direction():
    original, quantized = logits(7, 5, 0), logits(7, 5, 1)
    assert abs(drift(original, quantized).mean - drift(quantized, original).mean) > 0.01


def test_equal_logits_have_no_drift():
    found = drift(logits(5, 33, 0).float(), logits(5, 33, 0).float())
    assert (found.mean, found.quantile, found.top1_agreement) == (0.0, 0.0, 1.0)


def test_shifted_logits_are_the_same_prediction():
    assert drift(logits(5, 33, 0), logits(5, 33, 0) + 3).mean < 1e-12


def test_a_token_that_neither_model_can_say_costs_nothing():
    original, quantized = logits(3, 8, 0), logits(3, 8, 1)
    masked = [rows.index_fill(1, torch.tensor([2]), -torch.inf) for rows in (original, quantized)]
    others = [rows[:, [0, 1, 3, 4, 5, 6, 7]] for rows in (original, quantized)]
    assert torch.allclose(drift(*masked).divergence, drift(*others).divergence)
    assert drift(original, masked[1]).mean == math.inf


@pytest.mark.parametrize(("tokens", "place"), [(1, 1), (99, 99), (100, 99), (101, 100), (1000, 990)])
def test_the_quantile_is_the_smallest_value_that_99_percent_do_not_exceed(tokens, place):
    values = torch.arange(1, tokens + 1, dtype=torch.float64)
    assert Drift(values[torch.randperm(tokens)], torch.ones(tokens, dtype=torch.bool)).quantile == place


def test_parts_together_are_the_whole():
    original, quantized = logits(40, 6, 0), logits(40, 6, 1)
    parts = [drift(a, b) for a, b in zip(original.split(7), quantized.split(7), strict=True)]
    assert torch.equal(concatenate(parts).divergence, drift(original, quantized).divergence)


def test_likelihood_is_that_of_the_target():
    rows, targets = logits(300, 5, 0), torch.arange(300) % 5
    expected = [-math.log(float(p[t])) for p, t in zip(rows.softmax(1), targets, strict=True)]
    assert negative_log_likelihood(rows, targets).tolist() == pytest.approx(expected, rel=1e-9)


def swapped(original, quantized):
    return drift(quantized, original)


def unnormalised(original, quantized):
    difference = (original.softmax(1) * (original - quantized)).sum(1)
    return Drift(difference, original.argmax(1) == quantized.argmax(1))


def bfloat16(original, quantized):
    return drift(original.bfloat16(), quantized.bfloat16())


@pytest.mark.parametrize("bug", [swapped, unnormalised, bfloat16])
def test_the_comparison_with_the_definition_notices(bug):
    original, quantized = logits(20, 7, 0), logits(20, 7, 1)
    assert bug(original, quantized).divergence.tolist() != pytest.approx(by_definition(original, quantized), rel=1e-3)
