"""Reconstruction: a few tensors of one block learn until the block, or one some blocks later, answers as the float model.

    here             what it is
    parameters       the learned tensors as parameters of the block: whatever a method learns, this is all that is seen of it
    source           the stream that the block reads: the quantized model's, or the float model's
    target           the float model's answer for a batch, of this block or of the last of those that follow
    following        float blocks after this one, which pass on gradients and learn nothing (cross-block reconstruction,
                     WKVQuant, https://arxiv.org/abs/2402.12065, section 3.3)
    depths           at which of them each step compares: 1 is this block itself; steps take the depths in turn

The block keeps what it had if learning did not help. Where depths differ, each one's loss counts in parts of what it was
before the first step.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from halfbyte.calibration.walk import Stream, quantizing_inputs
from halfbyte.numerics.activations import InputQuantizer
from halfbyte.numerics.precision import float32_products

Loss = Literal["mse", "mae"]
"""Of answers: mean squared difference, or mean absolute difference, in which no loud channel drowns the others."""

BlockContext = Callable[[nn.Module], AbstractContextManager[None]]
"""What holds while a block computes: how it attends, for one."""


@dataclass(frozen=True, slots=True)
class Learned:
    """Tensors that learn at one rate."""

    tensors: Sequence[Tensor]
    learning_rate: float


@dataclass(frozen=True, slots=True)
class Choice:
    """Tensors that take one of several values together."""

    tensors: Sequence[Tensor]
    values: Sequence[Sequence[Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """How long, and how steadily."""

    steps: int
    decay: bool = True
    """The learning rates fall linearly to zero."""
    clip: float | None = None
    """Largest norm of the whole gradient; None: any."""
    batches: int | None = None
    """Learn from the first so many batches; None: from all."""


@dataclass(slots=True)
class Targets:
    """What the float model answers after `depth` blocks, by batch. `keep`: each is computed once, and waits at home."""

    original: nn.Module
    following: Sequence[nn.Module]
    stream: Stream
    index: int
    keep: bool = True
    kept: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def at(self, batch: int, depth: int) -> Float[Tensor, "samples length hidden"]:
        """The hidden states behind block `index + depth - 1` of the float model."""
        place = batch, depth
        if place in self.kept:
            return self.kept[place].to(self.stream.device)
        answer = self.stream.run(self.original, self.index, batch)
        for offset, block in enumerate(self.following[: depth - 1], start=1):
            answer = self.stream.call(block, self.index + offset, batch, answer)
        if self.keep:
            self.kept[place] = answer.to(self.stream.hidden[batch].device)
        return answer


@dataclass(slots=True, kw_only=True)
class Reconstruction:
    """A block that learns. `depths` are at most 1 + the number of blocks that follow."""

    block: nn.Module
    index: int
    parameters: Callable[[], Mapping[str, Tensor]]
    inputs: Mapping[str, InputQuantizer]
    source: Stream
    targets: Targets
    loss: Loss = "mse"
    depths: Sequence[int] = (1,)
    grid_slopes: bool = False
    """Whether gradients reach the scales of quantized inputs too, or pass them by."""
    context: BlockContext = lambda _block: nullcontext()
    judged: int | None = None
    """How many batches, evenly spread, say what the mean loss is; None: all."""
    weights: dict[int, float] = field(default_factory=dict)

    def learn(self, groups: Sequence[Learned], schedule: Schedule) -> tuple[float, float]:
        """Let the groups' tensors learn, in place. The mean loss before and after; where it is no less, all is undone.

        The loss that judges is the deepest one. It is not finite where the block overflows: nothing is undone then.
        """
        before = self.mean_loss()
        snapshot = [tensor.detach().clone() for group in groups for tensor in group.tensors]
        if len(set(self.depths)) > 1:
            self.weights = {depth: 1 / max(self.mean_loss(depth), 1e-30) for depth in set(self.depths)}
        self._train(groups, schedule)
        after = self.mean_loss()
        if after >= before:
            _put([tensor for group in groups for tensor in group.tensors], snapshot)
        return before, after

    @torch.no_grad()
    def choose(self, choices: Sequence[Choice], batches: int) -> tuple[float, float]:
        """Without gradients: one choice after the other takes, in place, the values of least loss over so many batches.

        The mean loss before and after; where no value is better, a choice's tensors stay as they are.
        """
        before = least = self.mean_loss(judged=batches)
        for choice in choices:
            best = [tensor.detach().clone() for tensor in choice.tensors]
            for values in choice.values:
                _put(choice.tensors, values)
                loss = self.mean_loss(judged=batches)
                if loss < least:
                    least, best = loss, list(values)
            _put(choice.tensors, best)
        return before, least

    @torch.no_grad()
    def mean_loss(
        self, depth: int | None = None, parameters: Mapping[str, Tensor] | None = None, judged: int | None = None
    ) -> float:
        """The mean loss over the judged batches, or another number of them; at the deepest depth if none is given.

        Of other parameters, if given.
        """
        held = self.parameters() if parameters is None else parameters
        available = len(self.source.hidden)
        wanted = judged or self.judged
        stride = 1 if wanted is None else max(1, available // wanted)
        places = range(0, available, stride)
        with self._computing():
            losses = [self._loss(held, batch, depth or max(self.depths)) for batch in places]
        return sum(map(float, losses)) / len(places)

    def _train(self, groups: Sequence[Learned], schedule: Schedule) -> None:
        settings = [{"params": list(group.tensors), "lr": group.learning_rate} for group in groups if group.tensors]
        optimizer = torch.optim.AdamW(settings, weight_decay=0.0)
        fade = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - schedule.decay * step / schedule.steps)
        tensors = [tensor for group in groups for tensor in group.tensors]
        count = min(len(self.source.hidden), schedule.batches or len(self.source.hidden))
        with (
            torch.enable_grad(),
            self._computing(),
            float32_products(tf32=True),  # a step is far coarser than TF32 rounds
        ):
            for step in range(schedule.steps):
                depth = self.depths[step % len(self.depths)]
                loss = self._loss(self.parameters(), step % count, depth) * self.weights.get(depth, 1.0)
                optimizer.zero_grad()
                loss.backward()
                if schedule.clip is not None:
                    torch.nn.utils.clip_grad_norm_(tensors, schedule.clip)
                optimizer.step()
                fade.step()

    def _computing(self) -> AbstractContextManager[None]:
        return quantizing_inputs(self.block, self.inputs, grid_slopes=self.grid_slopes)

    def _loss(self, parameters: Mapping[str, Tensor], batch: int, depth: int) -> Float[Tensor, ""]:
        target = self.targets.at(batch, depth)
        held = {name: tensor.to(target.dtype) for name, tensor in parameters.items()}

        def block(*args: Any, **kwargs: Any) -> Any:
            return functional_call(self.block, held, args, kwargs)

        with self.context(self.block):
            answer = self.source.run(block, self.index, batch)
        for offset, follower in enumerate(self.targets.following[: depth - 1], start=1):
            answer = self.source.call(follower, self.index + offset, batch, answer)
        difference = (answer - target).float()
        return difference.square().mean() if self.loss == "mse" else difference.abs().mean()


def _put(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.data.copy_(value)
