"""Rotations are orthogonal, exactly undone, and spread a coordinate evenly."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from closeness import relative_error
from halfbyte.errors import WeightError
from halfbyte.numerics import rotation as module
from halfbyte.numerics.hadamard import hadamard_matrix
from halfbyte.numerics.rotation import online_rotation, random_orthogonal, random_signs, rotation
from halfbyte.scheme import OnlineHadamard

SIZES = [1, 2, 8, 12, 24, 48, 112, 320]


def drawn(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def matrix_of(turn):
    return turn.apply(torch.eye(turn.size, dtype=torch.float64))


def undoes_itself(size, **options):
    turn, x = rotation(size, 3, **options), drawn(3, 5, size)
    return (
        relative_error(turn.inverse(turn.apply(x)), x) < 1e-14
        and relative_error(turn.apply(turn.inverse(x)), x) < 1e-14
    )


@pytest.mark.parametrize("keep_sum", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_a_rotation_is_orthogonal_and_its_inverse_is_exact(size, keep_sum):
    matrix = matrix_of(rotation(size, 0, keep_sum=keep_sum))
    assert relative_error(matrix @ matrix.T, torch.eye(size).double()) < 1e-14
    assert undoes_itself(size, keep_sum=keep_sum)


@pytest.mark.parametrize("size", SIZES)
def test_it_is_the_product_with_signs_and_a_hadamard_matrix(size):
    signs = random_signs(size, 5)
    power, core = module.factored(size)
    dense = torch.kron(hadamard_matrix(power).double(), core.double()) / size**0.5
    assert relative_error(matrix_of(rotation(size, 5)), signs[:, None] * dense) < 1e-14
    assert relative_error(matrix_of(rotation(size, None)), dense) < 1e-14


@pytest.mark.parametrize("size", [8, 12, 48])
def test_one_loud_coordinate_is_spread_evenly(size):
    spike = torch.zeros(size).double()
    spike[size // 3] = -100.0
    assert torch.allclose(rotation(size, 2).apply(spike).abs(), torch.full((size,), 100 / size**0.5).double())


@settings(max_examples=30, deadline=None)
@given(size=st.sampled_from([2, 4, 12, 20, 48]), seed=st.integers(0, 1000))
def test_a_sum_that_is_to_be_kept_is_kept(size, seed):
    turn, x = rotation(size, seed, keep_sum=True), drawn(7, size)
    assert torch.allclose(turn.apply(x).sum(-1), x.sum(-1), atol=1e-12)
    assert torch.allclose(turn.inverse(x).sum(-1), x.sum(-1), atol=1e-12)


def test_without_the_reflection_the_sum_changes():
    x = drawn(7, 48)
    assert not torch.allclose(rotation(48, 0).apply(x).sum(-1), x.sum(-1), atol=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_inputs_are_rotated_in_float32_and_rounded_once(dtype):
    turn, x = rotation(112, 0), drawn(9, 112, dtype=dtype)
    assert turn.apply(x).dtype == dtype
    assert relative_error(turn.apply(x), turn.apply(x.double())) < torch.finfo(dtype).eps
    assert relative_error(turn.inverse(x), turn.inverse(x.double())) < torch.finfo(dtype).eps


@pytest.mark.parametrize("size", [6, 28, 92, 13696 // 32])
def test_a_fallback_makes_any_size_orthogonal(size):
    turn = rotation(size, 0, fallback=True)
    matrix = matrix_of(turn)
    assert relative_error(matrix @ matrix.T, torch.eye(size).double()) < 1e-13
    assert undoes_itself(size, fallback=True)
    assert len(turn.core) == (28 if size == 28 else size // (size & -size))


def test_a_size_without_a_matrix_is_refused_where_no_fallback_is_asked_for():
    with pytest.raises(WeightError, match="order 92 is known"):
        rotation(92, 0)
    with pytest.raises(WeightError, match="order 0 is known"):
        rotation(0, 0, fallback=True)


def test_a_seed_stands_for_one_rotation_and_another_for_another():
    x = drawn(4, 48)
    assert torch.equal(rotation(48, 1).apply(x), rotation(48, 1).apply(x))
    assert relative_error(rotation(48, 2).apply(x), rotation(48, 1).apply(x)) > 0.5
    assert random_signs(12, 0).tolist() == [-1, 1, 1, -1, 1, 1, 1, 1, 1, 1, 1, -1]  # checkpoints depend on it
    assert torch.equal(random_orthogonal(5, 1), random_orthogonal(5, 1))


def test_a_checkpoints_words_stand_for_the_rotation_that_was_folded():
    x = drawn(4, 48)
    online = OnlineHadamard(size=48, seed=4)
    assert torch.equal(online_rotation(online).apply(x), rotation(48, 4).apply(x))
    assert torch.equal(online_rotation(OnlineHadamard(size=48)).apply(x), rotation(48, None).apply(x))


def test_another_width_is_refused():
    with pytest.raises(WeightError, match="48 coordinates met a tensor of 24"):
        rotation(48, 0).apply(drawn(3, 24))


def transposed_core(monkeypatch):
    original = module.Orthogonal._mixed
    monkeypatch.setattr(module.Orthogonal, "_mixed", lambda self, y, _core: original(self, y, self.core))


def forgotten_signs(monkeypatch):
    monkeypatch.setattr(module.Orthogonal, "inverse", lambda self, x: self._mixed(x, self.core.T))


def unscaled(monkeypatch):
    monkeypatch.setattr(module, "sqrt", lambda _number: 1.0)


@pytest.mark.parametrize("bug", [transposed_core, forgotten_signs, unscaled])
def test_a_planted_bug_is_noticed(bug, monkeypatch):
    assert undoes_itself(48)
    bug(monkeypatch)
    assert not undoes_itself(48)
