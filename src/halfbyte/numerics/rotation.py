"""Rotations of a vector's coordinates that are fast to apply: random signs, then a Hadamard matrix.

    x ↦ x·Q,   Q = diag(signs) · (H ⊗ core) / √n         H of Sylvester's order 2^k, core of order m, n = 2^k · m
    x ↦ x·Q·P, P the reflection with 1·Q·P = 1           where the sum of the coordinates must stay what it is

Q is orthogonal, and spreads what stands in one coordinate over all of them with the same magnitude (QuaRot, arXiv
2404.00456, section 3). The reflection is what a layer norm needs: a vector of mean zero keeps mean zero, so the norm,
which takes the mean away, still computes the norm of the same vector.
"""

from dataclasses import dataclass
from math import sqrt

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from halfbyte.errors import WeightError
from halfbyte.numerics.hadamard import LARGEST_CORE, factored, walsh_hadamard
from halfbyte.scheme import OnlineHadamard


@dataclass(frozen=True, slots=True, eq=False)
class Orthogonal:
    """An orthogonal matrix of n columns, applied without forming it."""

    power: int  # 2^k
    core: Float64[Tensor, "m m"]  # orthogonal
    signs: Float64[Tensor, "n"] | None = None
    mirror: Float64[Tensor, "n"] | None = None  # a unit vector: what comes out is reflected along it

    @property
    def size(self) -> int:
        return self.power * len(self.core)

    def apply(self, x: Float[Tensor, "*leading n"]) -> Float[Tensor, "*leading n"]:
        """x · Q over the last axis, computed in float32 or wider, in the dtype of x."""
        y = self._wide(x)
        if self.signs is not None:
            y = y * self.signs.to(y.device, y.dtype)
        return self._reflected(self._mixed(y, self.core)).to(x.dtype)

    def inverse(self, x: Float[Tensor, "*leading n"]) -> Float[Tensor, "*leading n"]:
        """x · Qᵀ, likewise."""
        y = self._mixed(self._reflected(self._wide(x)), self.core.T)
        if self.signs is not None:
            y = y * self.signs.to(y.device, y.dtype)
        return y.to(x.dtype)

    def _mixed(self, y: Tensor, core: Tensor) -> Tensor:
        grid = y.unflatten(-1, (self.power, len(core)))
        if len(core) > 1:
            grid = grid @ core.to(y.device, y.dtype)
        return walsh_hadamard(grid.transpose(-1, -2)).transpose(-1, -2).flatten(-2) / sqrt(self.power)

    def _reflected(self, y: Tensor) -> Tensor:
        if self.mirror is None:
            return y
        mirror = self.mirror.to(y.device, y.dtype)
        return y - 2 * (y @ mirror)[..., None] * mirror

    def _wide(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.size:
            raise WeightError(f"a rotation of {self.size} coordinates met a tensor of {x.shape[-1]} columns")
        return x.to(torch.promote_types(x.dtype, torch.float32))


def rotation(size: int, seed: int | None, *, fallback: bool = False, keep_sum: bool = False) -> Orthogonal:
    """The rotation of these coordinates that a seed stands for; None: no random signs.

    `fallback`: where no Hadamard matrix is known, a random orthogonal matrix of the odd factor takes the core's place.
    `keep_sum`: with the reflection. WeightError for a size without a Hadamard matrix, where no fallback is asked for.
    """
    power, core = _parts(size, seed or 0, fallback)
    signs = None if seed is None else random_signs(size, seed)
    plain = Orthogonal(power, core, signs)
    if not keep_sum:
        return plain
    ones = torch.ones(size, dtype=torch.float64, device="cpu")
    apart = plain.apply(ones) - ones
    length = float(apart.norm())
    return Orthogonal(power, core, signs, apart / length if length > 1e-9 * sqrt(size) else None)


def online_rotation(online: OnlineHadamard) -> Orthogonal:
    """What a checkpoint says is done to a tensor at run time."""
    return rotation(online.size, online.seed, fallback=online.fallback)


def random_signs(size: int, seed: int) -> Float64[Tensor, "n"]:
    """±1, the same on every machine."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return torch.randint(2, (size,), generator=generator, device="cpu").double() * 2 - 1


def _parts(size: int, seed: int, fallback: bool) -> tuple[int, Float64[Tensor, "m m"]]:
    try:
        power, core = factored(size)
    except WeightError:
        odd = size // (size & -size) if size > 0 else 0
        if not fallback or not 0 < odd <= LARGEST_CORE:
            raise
        return size // odd, random_orthogonal(odd, seed)
    return power, core.double() / sqrt(len(core))


def random_orthogonal(size: int, seed: int) -> Float64[Tensor, "n n"]:
    """An orthogonal matrix drawn evenly from all of them: Q of a Gaussian matrix, with R's diagonal positive."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    drawn = torch.randn(size, size, generator=generator, dtype=torch.float64, device="cpu")
    q, r = torch.linalg.qr(drawn)
    return q * r.diagonal().sign()
