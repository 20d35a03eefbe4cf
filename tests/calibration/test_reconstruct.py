"""Reconstruction: what is learned, from which answers, at which depth; and that nothing is kept which did not help."""

import copy
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from halfbyte.calibration.reconstruct import Choice, Learned, Reconstruction, Schedule, Targets
from halfbyte.calibration.walk import Stream

CPU = torch.device("cpu")
WIDTH = 6


def lesson(*, followers: int = 0, **overrides) -> tuple[Reconstruction, torch.Tensor]:
    """A linear block that starts away from its teacher, and the tensor that learns: a step in its weight."""
    generator = torch.Generator().manual_seed(0)
    blocks = [nn.Linear(WIDTH, WIDTH).requires_grad_(requires_grad=False) for _ in range(1 + followers)]
    for block in blocks:
        for parameter in block.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / WIDTH**0.5)
    hidden = [torch.randn(2, 5, WIDTH, generator=generator) for _ in range(4)]
    stream = Stream(hidden, [[((), {})] * len(blocks)] * 4, lambda output: output, CPU)
    student = copy.deepcopy(blocks[0])
    step = torch.full((WIDTH, WIDTH), 0.3, requires_grad=True)
    fields = {
        "block": student,
        "index": 0,
        "parameters": lambda: {"weight": student.weight + step, "bias": student.bias},
        "inputs": {},
        "source": stream,
        "targets": Targets(blocks[0], blocks[1:], stream, 0),
    }
    return Reconstruction(**fields | overrides), step


@pytest.mark.parametrize("loss", ["mse", "mae"])
@pytest.mark.parametrize("depth", [1, 3])
def test_the_block_becomes_its_teacher(loss, depth):
    task, step = lesson(followers=2, loss=loss, depths=(depth,))
    before, after = task.learn([Learned([step], 0.02)], Schedule(steps=150))
    assert after < 0.1 * before
    if depth == 1:  # later blocks tell some directions from others badly
        assert step.abs().max() < 0.1


def test_losses_are_what_their_names_say():
    for loss, expected in (("mse", lambda d: d.square().mean()), ("mae", lambda d: d.abs().mean())):
        task, step = lesson(loss=loss, followers=1)
        difference = [task.source.hidden[batch] @ step.detach().T for batch in range(4)]
        assert task.mean_loss() == pytest.approx(float(sum(expected(d) for d in difference)) / 4, rel=1e-5)
        follower = task.targets.following[0]
        assert task.mean_loss(depth=2) == pytest.approx(
            float(sum(expected(d @ follower.weight.T) for d in difference)) / 4, rel=1e-5
        )


def test_a_rate_that_only_destroys_changes_nothing():
    task, step = lesson()
    before, after = task.learn([Learned([step], 50.0)], Schedule(steps=3, decay=False))
    assert after >= before
    assert torch.equal(step.detach(), torch.full_like(step, 0.3))


def test_targets_are_computed_once_or_every_time():
    calls = []

    class Counting(nn.Linear):
        def forward(self, x):
            calls.append(1)
            return super().forward(x)

    for keep, least in ((True, 4), (False, 4 * 5)):
        task, step = lesson()
        task.targets = Targets(Counting(WIDTH, WIDTH), (), task.source, 0, keep=keep)
        calls.clear()
        task.learn([Learned([step], 0.01)], Schedule(steps=12))
        assert len(calls) == least


def test_steps_take_depths_in_turn_and_relative_to_where_they_began(monkeypatch):
    task, step = lesson(followers=2, depths=(3, 1))
    asked = []
    real = Targets.at

    def noting(self, batch, depth):
        asked.append((batch, depth))
        return real(self, batch, depth)

    monkeypatch.setattr(Targets, "at", noting)
    start = {depth: task.mean_loss(depth) for depth in (1, 3)}
    asked.clear()
    task.learn([Learned([step], 0.01)], Schedule(steps=4, batches=2))
    assert task.weights == pytest.approx({depth: 1 / loss for depth, loss in start.items()})
    assert asked[12:16] == [(0, 3), (1, 1), (0, 3), (1, 1)]


def test_judged_batches_are_spread_over_the_whole_set(monkeypatch):
    task, _ = lesson(judged=2)
    asked = []
    monkeypatch.setattr(
        Reconstruction, "_loss", lambda _self, _held, batch, _depth: asked.append(batch) or torch.zeros(())
    )
    task.mean_loss()
    assert asked == [0, 2]


def test_groups_learn_at_their_own_rates():
    task, step = lesson()
    other = torch.zeros(WIDTH, requires_grad=True)
    weights = task.parameters
    task.parameters = lambda: weights() | {"bias": task.block.bias + other + 0.5}
    task.learn([Learned([step], 1e-3), Learned([other], 0.02)], Schedule(steps=1, decay=False))
    assert (step.detach() - 0.3).abs().max() == pytest.approx(1e-3, rel=1e-3)
    assert other.detach().abs().max() == pytest.approx(0.02, rel=1e-3)


def test_the_context_holds_while_the_learning_block_computes_and_not_for_others():
    inside, seen = [], []

    @contextmanager
    def context(block):
        inside.append(block)
        yield
        inside.pop()

    task, step = lesson(followers=1, depths=(2,), context=context)
    follower = task.targets.following[0]
    task.block.register_forward_pre_hook(lambda *_: seen.append(bool(inside)))
    follower.register_forward_pre_hook(lambda *_: seen.append(not inside))
    task.learn([Learned([step], 0.01)], Schedule(steps=2))
    assert seen
    assert all(seen)


def test_choices_take_what_loses_least_one_after_the_other():
    task, step = lesson()
    step.requires_grad_(requires_grad=False)
    other = torch.full((WIDTH,), 0.2)
    weights = task.parameters
    task.parameters = lambda: weights() | {"bias": task.block.bias + other}
    steps, biases = ([torch.full_like(x, value)] for x, value in ((step, 0.1), (other, 0.0)))
    worse = [torch.full_like(step, 2.0)]
    before, after = task.choose([Choice([step], [worse, steps]), Choice([other], [biases])], batches=2)
    assert after < before
    assert torch.equal(step, steps[0])
    assert torch.equal(other, biases[0])
    assert after == pytest.approx(task.mean_loss(judged=2))
    assert task.choose([Choice([step], [worse])], batches=2) == (after, after)
    assert torch.equal(step, steps[0])


@pytest.mark.parametrize("bug", ["learning is never undone", "depth is ignored", "target of the student"])
def test_planted_bugs_are_seen(bug, monkeypatch):
    if bug == "learning is never undone":
        falling = iter([2.0, 1.0])
        monkeypatch.setattr(Reconstruction, "mean_loss", lambda *_: next(falling))
        with pytest.raises(AssertionError):
            test_a_rate_that_only_destroys_changes_nothing()
    elif bug == "depth is ignored":
        real = Targets.at
        monkeypatch.setattr(Targets, "at", lambda self, batch, _depth: real(self, batch, 1))
        with pytest.raises(AssertionError):
            test_losses_are_what_their_names_say()
    else:
        monkeypatch.setattr(Targets, "at", lambda self, batch, _depth: self.stream.hidden[batch])
        with pytest.raises(AssertionError):
            test_the_block_becomes_its_teacher("mse", 1)
