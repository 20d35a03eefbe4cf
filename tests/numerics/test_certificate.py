"""The overflow certificate against int64 arithmetic: what it calls safe is safe in any order, and the bound is reached."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from halfbyte.numerics.certificate import INT32, largest_reach, magnitude, middle, reach, strictest, violation
from halfbyte.scheme import ActivationFormat, Convention, PerGroup, WeightFormat

A8, A8_ASYMMETRIC = ActivationFormat(bits=8), ActivationFormat(bits=8, symmetric=False)
SYMMETRIC = WeightFormat(granularity=PerGroup(size=8))
ASYMMETRIC = SYMMETRIC.model_copy(update={"convention": Convention.ASYMMETRIC})
ODD = {"tokens": 3, "out": 5, "groups": 7}


def problem(format: WeightFormat, *, out: int, groups: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes with the extreme ones, multipliers up to the largest that can be stored, zero points."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(format.lowest, format.highest + 1, (out, 8 * groups), generator=g)
    codes[0, 0], codes[-1, -1] = format.lowest, format.highest
    whole = torch.randint(1, 2**15, (out, groups), generator=g, dtype=torch.int32)
    zeros = None if format.symmetric else torch.randint(0, 16, (out, groups), generator=g).float()
    return codes.to(torch.int8 if format.symmetric else torch.uint8), whole, zeros


def terms(
    codes: Tensor, whole: Tensor, zeros: Tensor | None, format: WeightFormat, x: Tensor, x_zeros: Tensor
) -> Tensor:
    """Everything that an implementation may add up for [tokens, out], one after the other, in int64."""
    c = (codes.long() - middle(format)).unflatten(1, (whole.shape[1], -1)) * whole.long()[:, :, None]
    parts = [x[:, None] * c.flatten(1), -x_zeros[:, None, None] * c.flatten(1)]
    if zeros is not None:
        z = (zeros.long() - middle(format)) * whole.long()
        spread = z.repeat_interleave(codes.shape[1] // z.shape[1], dim=1)
        parts += [-x[:, None] * spread, x_zeros[:, None, None] * spread]
    return torch.cat(parts, dim=2)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    format=st.sampled_from([SYMMETRIC, ASYMMETRIC]),
    inputs=st.sampled_from([A8, A8_ASYMMETRIC]),
)
def test_every_partial_sum_in_any_order_stays_within_the_bound(seed, format, inputs):
    codes, whole, zeros = problem(format, out=5, groups=7, seed=seed)
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(inputs.lowest, inputs.highest + 1, (3, 56), generator=g)
    x_zeros = torch.zeros(3, dtype=torch.int64)
    if not inputs.symmetric:
        x_zeros = torch.randint(inputs.lowest, inputs.highest + 1, (3,), generator=g)
    added = terms(codes, whole, zeros, format, x, x_zeros)
    added = added[:, :, torch.randperm(added.shape[2], generator=g)]
    bound = magnitude(inputs) * reach(codes, whole, zeros, middle(format))
    assert bool((added.cumsum(dim=2).abs().amax(dim=2) <= bound).all())


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**16), bits=st.sampled_from([2, 4, 8]))
def test_an_adversary_drives_a_symmetric_row_to_the_bound_itself(seed, bits):
    format = SYMMETRIC.model_copy(update={"bits": bits})
    codes, whole, _ = problem(format, out=5, groups=7, seed=seed)
    worst = A8.highest * codes.long().sign()
    driven = (worst * codes.long() * whole.long().repeat_interleave(8, dim=1)).sum(dim=1)
    assert torch.equal(driven, magnitude(A8) * reach(codes, whole, None, middle(format)))


def test_minus_128_counts_as_128():
    format = WeightFormat(bits=8, granularity=PerGroup(size=2))
    codes = torch.tensor([[-128, 0], [127, 1]], dtype=torch.int8)
    assert reach(codes, torch.ones(2, 1, dtype=torch.int32), None, middle(format)).tolist() == [128, 128]
    wide = torch.tensor([[255, 0]], dtype=torch.uint8)
    unsigned = format.model_copy(update={"convention": Convention.ASYMMETRIC})
    assert reach(wide, torch.ones(1, 1, dtype=torch.int32), torch.tensor([[255.0]]), middle(unsigned)).tolist() == [509]


def test_the_limit_is_the_largest_reach_that_int32_holds():
    assert magnitude(A8) == 127
    assert magnitude(A8_ASYMMETRIC) == 256
    assert magnitude(ActivationFormat(bits=4)) == 7
    for inputs in (A8, A8_ASYMMETRIC):
        assert magnitude(inputs) * largest_reach(inputs) <= INT32 < magnitude(inputs) * (largest_reach(inputs) + 1)
    assert strictest([A8, A8_ASYMMETRIC, ActivationFormat(bits=4)]) == A8_ASYMMETRIC


def test_a_row_at_the_limit_passes_and_one_beyond_is_named():
    limit = largest_reach(A8)
    assert violation(torch.tensor([3, limit]), A8) is None
    assert violation(torch.zeros(0, dtype=torch.int64), A8) is None
    told = violation(torch.tensor([limit, limit + 1, 5]), A8)
    assert told is not None
    for word in ("row 1", str(limit + 1), str(limit), str(INT32)):
        assert word in told


def test_a_row_at_the_limit_sums_exactly_in_int32_and_one_beyond_wraps():
    """512 codes of 8 reach 4096·S: 4128 is the largest S that the certificate passes on symmetric 8-bit inputs."""
    codes, x = torch.full((1, 512), -8, dtype=torch.int8), torch.full((512,), -127)
    format = WeightFormat(granularity=PerGroup(size=512))
    for multiplier, safe in ((4128, True), (4129, False)):
        whole = torch.tensor([[multiplier]], dtype=torch.int32)
        exact = int((x * codes[0].long()).sum()) * multiplier
        assert (violation(reach(codes, whole, None, middle(format)), A8) is None) == safe
        assert (int(torch.tensor(exact).int()) == exact) == safe


def signs_kept(codes: Tensor, whole: Tensor, zeros: Tensor | None, format: WeightFormat) -> Tensor:
    return (codes.long().unflatten(1, (whole.shape[1], -1)).sum(dim=2).abs() * whole).sum(dim=1)


def one_multiplier_for_all(codes: Tensor, whole: Tensor, zeros: Tensor | None, format: WeightFormat) -> Tensor:
    return reach(codes, whole[:, :1].expand_as(whole), zeros, middle(format))


def groups_shifted(codes: Tensor, whole: Tensor, zeros: Tensor | None, format: WeightFormat) -> Tensor:
    return reach(codes, whole.roll(1, dims=1), zeros, middle(format))


def int8_magnitudes(codes: Tensor, whole: Tensor, zeros: Tensor | None, format: WeightFormat) -> Tensor:
    return (codes.abs().long().unflatten(1, (whole.shape[1], -1)).sum(dim=2) * whole).sum(dim=1)


@pytest.mark.parametrize("bug", [signs_kept, one_multiplier_for_all, groups_shifted, int8_magnitudes])
def test_the_adversary_finds_a_wrong_certificate(bug: Callable[..., Any]):
    format = WeightFormat(bits=8, granularity=PerGroup(size=8))
    codes, whole, _ = problem(format, out=5, groups=7)
    codes[:, ::9] = -128
    worst = A8.highest * codes.long().sign()
    driven = (worst * codes.long() * whole.long().repeat_interleave(8, dim=1)).sum(dim=1)
    assert bool((driven > magnitude(A8) * bug(codes, whole, None, format)).any())


def test_forgotten_zero_points_are_found():
    codes, whole, zeros = problem(ASYMMETRIC, out=5, groups=7)
    x = 127 * (codes.long() - 8).sign()
    added = terms(codes, whole, zeros, ASYMMETRIC, x[:1], torch.zeros(1, dtype=torch.int64))[0, 0]
    without = 127 * reach(codes, whole, None, middle(ASYMMETRIC))[0]
    assert int(added.clamp(min=0).sum()) > int(without)
