"""Hadamard matrices, n × n of ±1 with H·Hᵀ = n·I, by construction: nothing here is a table.

    order        from                                                   construction
    2n           H of order n                                           [[H, H], [H, -H]] (Sylvester 1867)
    q + 1        a prime power q ≡ 3 mod 4                              I + [[0, 1], [-1, J]] (Paley 1933, first)
    2(q + 1)     a prime power q ≡ 1 mod 4                              of [[0, 1], [1, J]] (Paley 1933, second)
    a · b        H of order a and of order b                            their Kronecker product

J is Jacobsthal's matrix, J[i, j] = χ(i - j), where χ says of an element of the field of q whether it is a square (1), none
(-1), or zero. A size is taken apart into 2^k · m with the smallest m whose core is known: the factor 2^k is applied by
butterflies, the core by a small product.
"""

from functools import lru_cache
from itertools import product

import torch
from jaxtyping import Float, Float64, Int8, Int64
from torch import Tensor

from halfbyte.errors import WeightError

LARGEST_CORE = 4096  # a core is applied as a dense product
WIDEST = 256  # of the small matrices that a fast transform multiplies by


def hadamard_matrix(size: int) -> Int8[Tensor, "size size"]:
    """A Hadamard matrix of this order. WeightError where none is known here, which names orders beside it."""
    power, core = factored(size)
    matrix = core
    for _ in range(power.bit_length() - 1):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def factored(size: int) -> tuple[int, Int8[Tensor, "m m"]]:
    """size = power · m, power of two, and a Hadamard matrix of the smallest order m that allows it.

    WeightError where no construction of this module reaches the size.
    """
    power = size & -size if size > 0 else 1
    while power:
        core = _core(size // power) if size > 0 else None
        if core is not None:
            return power, core
        power //= 2
    raise WeightError(f"no Hadamard matrix of order {size} is known here: {_possible(size)}")


def walsh_hadamard(x: Float[Tensor, "*leading n"]) -> Float[Tensor, "*leading n"]:
    """x · H of Sylvester's order n, without a factor; n is a power of two. In the dtype of x.

    H is a Kronecker product of small matrices, and products with those are faster than their additions one by one.
    """
    size, done = x.shape[-1], 1
    if size & (size - 1) or not size:
        raise WeightError(f"the fast transform takes a power of two, not {size} columns: use `factored` for others")
    y = x
    while done < size:
        part = min(WIDEST, size // done)
        y = y.reshape(-1, part) @ _sylvester(part).to(y)
        # the axis that is done moves to the front: after the last one they stand as they stood
        y = y.view(-1, size // part, part).transpose(1, 2)
        done *= part
    return y.reshape(x.shape)


@lru_cache(maxsize=8)
def _sylvester(order: int) -> Float64[Tensor, "n n"]:
    """Sylvester's matrix, of a small order."""
    matrix = torch.ones(1, 1, dtype=torch.float64, device="cpu")
    while len(matrix) < order:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


@lru_cache(maxsize=64)
def _core(order: int) -> Int8[Tensor, "m m"] | None:
    """A Hadamard matrix of an order that is not taken apart into halves first; None where none is known."""
    if order == 1:
        return torch.ones(1, 1, dtype=torch.int8, device="cpu")
    if order % 4 or order > LARGEST_CORE:
        return None
    if prime_power(order - 1) and (order - 1) % 4 == 3:
        return _first_paley(order - 1)
    if order % 2 == 0 and prime_power(order // 2 - 1) and (order // 2 - 1) % 4 == 1:
        return _second_paley(order // 2 - 1)
    for part in range(4, int(order**0.5) + 1, 4):
        if order % part == 0:
            left, right = _core(part), _core(order // part)
            if left is not None and right is not None:
                return torch.kron(left, right)
    return None


def _first_paley(q: int) -> Int8[Tensor, "m m"]:
    matrix = torch.ones(q + 1, q + 1, dtype=torch.int8, device="cpu")
    matrix[1:, 0] = -1
    matrix[1:, 1:] = jacobsthal(q) + torch.eye(q, dtype=torch.int8, device="cpu")
    return matrix


def _second_paley(q: int) -> Int8[Tensor, "m m"]:
    """Every entry of the symmetric conference matrix becomes a block of two by two."""
    conference = torch.ones(q + 1, q + 1, dtype=torch.int8, device="cpu")
    conference[0, 0] = 0
    conference[1:, 1:] = jacobsthal(q)
    off = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8, device="cpu")
    diagonal = torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8, device="cpu")
    return torch.kron(conference, off) + torch.kron(torch.eye(q + 1, dtype=torch.int8, device="cpu"), diagonal)


def jacobsthal(q: int) -> Int8[Tensor, "q q"]:
    """χ(i - j) over the field of q elements, q an odd prime power."""
    found = prime_power(q)
    if found is None or q % 2 == 0:
        raise WeightError(f"{q} is not an odd prime power, so there is no field of {q} elements")
    prime, degree = found
    digits = torch.tensor(list(product(range(prime), repeat=degree)), device="cpu")  # an element as a polynomial
    weights = prime ** torch.arange(degree - 1, -1, -1, device="cpu")
    squares = _squares(digits, prime)
    character = torch.full((q,), -1, dtype=torch.int8, device="cpu")
    character[squares @ weights] = 1
    character[0] = 0
    differences = (digits[:, None] - digits[None]) % prime
    return character[differences @ weights]


def _squares(digits: Int64[Tensor, "q degree"], prime: int) -> Int64[Tensor, "q degree"]:
    """The square of every element, modulo the first polynomial that makes a field of them."""
    degree = digits.shape[1]
    weights = prime ** torch.arange(degree - 1, -1, -1, device="cpu")
    for tail in digits.tolist():
        squares = _squares_modulo(digits, tail, prime)
        numbers = squares @ weights
        # in a field nothing but 0 has the square 0, and half of the rest are squares: in no other such ring
        if degree == 1 or (int((numbers == 0).sum()) == 1 and len(numbers.unique()) == (len(digits) + 1) // 2):
            return squares
    raise AssertionError("there is an irreducible polynomial of every degree")


def _squares_modulo(digits: Int64[Tensor, "q degree"], tail: list[int], prime: int) -> Int64[Tensor, "q degree"]:
    """Squares modulo x^degree + tail; coefficients of the highest power first."""
    degree = digits.shape[1]
    result = torch.zeros(len(digits), 2 * degree - 1, dtype=torch.int64, device="cpu")
    for i, j in product(range(degree), repeat=2):
        result[:, i + j] += digits[:, i] * digits[:, j]
    for lead in range(degree - 1):
        for place, coefficient in enumerate(tail, start=lead + 1):
            result[:, place] -= result[:, lead] * coefficient
        result %= prime
    return result[:, degree - 1 :] % prime


def prime_power(q: int) -> tuple[int, int] | None:
    """q = prime^degree, or None."""
    if q < 2:
        return None
    prime = next((p for p in range(2, int(q**0.5) + 1) if q % p == 0), q)
    degree = 0
    while q % prime == 0:
        q, degree = q // prime, degree + 1
    return (prime, degree) if q == 1 else None


def _possible(size: int) -> str:
    """What a user can do about a size that has none."""
    if size < 1 or (size > 2 and size % 4):
        return "beyond 1 and 2 an order is a multiple of 4; pad the layer, or ask for `fallback: orthogonal`"
    return "ask for `fallback: orthogonal`, a random rotation in place of the odd factor, or leave this rotation out"
