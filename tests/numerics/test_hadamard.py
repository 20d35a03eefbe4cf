"""Hadamard matrices are what they are by their definition, so the tests multiply them out, in integers."""

import pytest
import torch

from halfbyte.errors import WeightError
from halfbyte.numerics import hadamard
from halfbyte.numerics.hadamard import factored, hadamard_matrix, jacobsthal, prime_power, walsh_hadamard

# Sylvester; Paley's first and second, of primes and of prime powers; products; inner sizes of real models' parts
ORDERS = [1, 2, 4, 8, 64, 12, 20, 24, 28, 36, 40, 44, 48, 52, 60, 76, 84, 100, 108, 140, 148, 112, 312, 344, 400, 684]
INNER = {11008: 344, 13824: 108, 14336: 28, 18944: 148, 27648: 108, 29568: 924, 8960: 140, 4864: 76, 5120: 20, 28672: 28,
         25600: 100, 9728: 76, 17408: 68, 1408: 44, 1536: 12, 22016: 344, 8192: 1}  # fmt: skip


def is_hadamard(matrix):
    size = len(matrix)
    wide = matrix.double()  # exact: integers below 2^53
    return bool((matrix.abs() == 1).all()) and torch.equal(wide @ wide.T, size * torch.eye(size).double())


@pytest.mark.parametrize("order", ORDERS)
def test_rows_are_signs_and_orthogonal(order):
    assert is_hadamard(hadamard_matrix(order))


@pytest.mark.parametrize("size", INNER)
def test_the_feed_forward_parts_of_known_models_have_a_small_core(size):
    power, core = factored(size)
    assert len(core) == INNER[size]
    assert power * len(core) == size
    assert is_hadamard(core)


@pytest.mark.parametrize("q", [3, 5, 7, 9, 11, 13, 25, 27, 49, 121, 125, 169, 243, 343])
def test_the_character_of_a_field_is_balanced_and_its_matrix_squares_to_what_paley_found(q):
    matrix = jacobsthal(q).long()
    ones = torch.ones(q, q).long()
    assert torch.equal(matrix @ matrix.T, q * torch.eye(q).long() - ones)
    assert not matrix.sum(dim=1).any()
    assert torch.equal(matrix.T, matrix if q % 4 == 1 else -matrix)


@pytest.mark.parametrize("size", [1, 2, 4, 64])
def test_the_fast_transform_is_the_product_with_sylvesters_matrix(size):
    x = torch.randn(3, 5, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(walsh_hadamard(x), x @ hadamard_matrix(size).double(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [0, 3, 6, 18, 22, 92, 13696, 4 * 6007])
def test_an_order_that_is_not_known_is_refused_with_what_is_possible(size):
    with pytest.raises(WeightError, match=rf"order {size} is known.*fallback: orthogonal"):
        factored(size)


@pytest.mark.parametrize("size", [0, 12])
def test_the_fast_transform_takes_powers_of_two_alone(size):
    with pytest.raises(WeightError, match=f"power of two, not {size}"):
        walsh_hadamard(torch.zeros(2, size))


def test_a_field_has_a_prime_power_of_elements():
    assert [q for q in range(30) if prime_power(q)] == [
        2, 3, 4, 5, 7, 8, 9, 11, 13, 16, 17, 19, 23, 25, 27, 29]  # fmt: skip
    assert prime_power(343) == (7, 3)
    for q in (6, 8, 15):
        with pytest.raises(WeightError, match=f"{q} is not an odd prime power"):
            jacobsthal(q)


def no_identity(monkeypatch):
    monkeypatch.setattr(hadamard, "_core", lambda order: hadamard._first_paley(11) - 1 if order == 12 else None)


def first_of_a_wrong_residue(monkeypatch):
    monkeypatch.setattr(hadamard, "_core", lambda order: hadamard._first_paley(13) if order == 14 else None)


def numbers_in_place_of_a_field(monkeypatch):
    """χ of 9 integers modulo 9 in place of the field of nine elements."""
    squares = {i * i % 9 for i in range(1, 9)} - {0}
    rows = [[0 if i == j else 1 if (i - j) % 9 in squares else -1 for j in range(9)] for i in range(9)]
    monkeypatch.setattr(hadamard, "jacobsthal", lambda q: torch.tensor(rows, dtype=torch.int8))
    monkeypatch.setattr(hadamard, "_core", lambda order: hadamard._second_paley(9) if order == 20 else None)


@pytest.mark.parametrize(
    ("bug", "order"), [(no_identity, 12), (first_of_a_wrong_residue, 14), (numbers_in_place_of_a_field, 20)]
)
def test_a_wrong_construction_is_noticed(bug, order, monkeypatch):
    bug(monkeypatch)
    assert not is_hadamard(hadamard_matrix(order))
