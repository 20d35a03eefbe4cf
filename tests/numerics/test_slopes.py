"""Slopes through a cache: the value is what is stored, the slope that of rounding which always errs by as many steps."""

from dataclasses import replace

import pytest
import torch

from halfbyte.numerics import slopes
from halfbyte.numerics.activations import InputQuantizer
from halfbyte.numerics.cache import Coder
from halfbyte.numerics.slopes import simulate_through, store_through
from halfbyte.scheme import ActivationFormat

CODERS = {
    "groups": Coder(4, 4),
    "symmetric": Coder(3, 8, symmetric=True),
    "blocks of tokens": Coder(3, 8, block=3),
    "rotated": Coder(4, 8, turned=True),
}
EVERY_CODER = pytest.mark.parametrize("coder", CODERS.values(), ids=CODERS)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def smoothed(coder: Coder, shift: torch.Tensor, scale: torch.Tensor) -> Coder:
    return replace(coder, shift=shift, scale=scale)


def written_out(x: torch.Tensor, coder: Coder, errors: torch.Tensor) -> torch.Tensor:
    """s·(u + step(u)·errors) + δ, one token and group after the other; `errors` in steps, in rotated coordinates."""
    u = (x - coder.shift[:, None]) / coder.scale[:, None]
    if coder.turned:
        signs = torch.tensor([[(-1.0) ** bin(i & j).count("1") for j in range(8)] for i in range(8)], dtype=x.dtype)
        u = u @ (signs / 8**0.5)
    batch, heads, tokens, dim = u.shape
    moved = u.clone()
    size = dim if coder.block > 1 else min(coder.group_size, dim)
    for b in range(batch):
        for h in range(heads):
            for t in range(0, tokens // coder.block * coder.block, coder.block):
                for c in range(0, dim, 1 if coder.block > 1 else size):
                    rows, columns = slice(t, t + coder.block), slice(c, c + (1 if coder.block > 1 else size))
                    part = u[b, h, rows, columns]
                    if coder.symmetric:
                        step = part.abs().max() / (2 ** (coder.bits - 1) - 1)
                    else:
                        step = (part.max() - part.min()) / (2**coder.bits - 1)
                    moved[b, h, rows, columns] = part + step * errors[b, h, rows, columns]
    if coder.turned:
        moved = moved @ (signs / 8**0.5)
    return moved * coder.scale[:, None] + coder.shift[:, None]


def situation(coder: Coder) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = drawn(2, 2, 7, 8) * drawn(8, seed=1).exp() + drawn(8, seed=2)
    return x.requires_grad_(), drawn(2, 8, seed=3).requires_grad_(), drawn(2, 8, seed=4).exp().detach().requires_grad_()


@EVERY_CODER
def test_the_value_is_what_the_cache_gives(coder):
    x, shift, scale = situation(coder)
    held = smoothed(coder, shift, scale)
    torch.testing.assert_close(store_through(x, held), held.simulate(x.detach()), rtol=1e-12, atol=1e-12)


def disagreement(coder: Coder) -> float:
    """Of the slopes in tokens, shifts and scales, with those of the formula written out with errors held."""
    x, shift, scale = situation(coder)
    held = smoothed(coder, shift, scale)
    with torch.no_grad():
        seen = held.simulate(x) - x
        rotated = replace(coder, shift=None).smooth(seen / scale[:, None])
        ones = written_out(x, replace(held, turned=False), torch.zeros_like(x))  # the tokens themselves
        assert torch.allclose(ones, x)
        steps = coder_steps(x, held)
        errors = rotated / steps
    weights = drawn(*x.shape, seed=9)
    wanted = torch.autograd.grad((written_out(x, held, errors) * weights).sum(), (x, shift, scale))
    found = torch.autograd.grad((store_through(x, held) * weights).sum(), (x, shift, scale))
    return max(float((a - b).norm() / b.norm().clamp(min=1e-3)) for a, b in zip(found, wanted, strict=True))


@torch.no_grad()
def coder_steps(x: torch.Tensor, coder: Coder) -> torch.Tensor:
    """The step of every number: what one unit of error does to the formula written out."""
    plain = replace(coder, shift=torch.zeros(2, 8), scale=torch.ones(2, 8))
    u = (x - coder.shift[:, None]) / coder.scale[:, None]
    if coder.turned:
        u = plain.smooth(u)
        plain = replace(plain, turned=False)
    one, none = written_out(u, plain, torch.ones_like(u)), written_out(u, plain, torch.zeros_like(u))
    return torch.where(one == none, 1.0, one - none)


@EVERY_CODER
def test_slopes_are_those_of_errors_that_keep_their_size_in_steps(coder):
    assert disagreement(coder) < 1e-9


def test_shifts_and_scales_have_slopes_that_move_them_the_right_way():
    """A channel that is four times too loud for its group: the loss falls where its scale grows."""
    x = drawn(4, 1, 32, 8)
    x[..., 3] = x[..., 3] * 4 + 20
    shift, scale = torch.zeros(1, 8, requires_grad=True), torch.ones(1, 8, requires_grad=True)
    loss = (store_through(x, Coder(4, 8, shift=shift, scale=scale)) - x)[..., [0, 1, 2, 4, 5, 6, 7]].square().sum()
    by_shift, by_scale = torch.autograd.grad(loss, (shift, scale))
    assert by_shift[0, 3] < 0
    assert by_scale[0, 3] < 0


def test_a_group_of_equal_numbers_has_finite_slopes():
    x = torch.ones(1, 1, 3, 8, requires_grad=True)
    shift = torch.zeros(1, 8, requires_grad=True)
    slopes_of = torch.autograd.grad(store_through(x, Coder(4, 8, shift=shift)).sum(), (x, shift))
    assert all(slope.isfinite().all() for slope in slopes_of)


def test_slopes_use_no_operation_that_older_versions_cannot_differentiate(monkeypatch):
    real = torch.Tensor.aminmax

    def aminmax(self, **options):
        assert not self.requires_grad, "aminmax has no slope in torch 2.11"
        return real(self, **options)

    monkeypatch.setattr(torch.Tensor, "aminmax", aminmax)
    x, shift, scale = situation(CODERS["groups"])
    store_through(x, smoothed(CODERS["groups"], shift, scale)).sum().backward()
    simulate_through(x, InputQuantizer(ActivationFormat(bits=4))).sum().backward()


@pytest.mark.parametrize("bug", ["the step has no slope", "the error does not grow"])
def test_planted_bugs_are_seen(bug, monkeypatch):
    if bug == "the step has no slope":
        monkeypatch.setattr(slopes, "store_through", lambda x, coder: x + (coder.simulate(x.detach()) - x).detach())
    else:
        monkeypatch.setattr(
            slopes, "store_through", lambda x, coder: coder.restore(coder.smooth(x)) + (coder.simulate(x) - x).detach()
        )
    monkeypatch.setitem(globals(), "store_through", slopes.store_through)
    with pytest.raises((AssertionError, RuntimeError)):
        test_slopes_are_those_of_errors_that_keep_their_size_in_steps(CODERS["groups"])
