"""OmniQuant: the ranges of weight groups, and the scales between modules, learn from what the block computes.

Shao et al., 2023 — https://arxiv.org/abs/2308.13137, sections 3.2 and 3.3

    here            paper     what it is
    clips           γ, β      learned weight clipping: factors of each group's range (numerics/clipping.py, equation 2)
    moves           s, δ      learned equivalent transformation along the table's links (models/moved.py, equation 3)
    float_stream    X         what the float model feeds the block; its own answer to that is the target (equation 1)
    stream          X̃         what the quantized model feeds it: the block reads this

The paper: 20 epochs over 128 samples of 2048 tokens, one a step, AdamW, rates 5e-3 for clips and 1e-2 for moves in its text
and 1e-2 and 5e-3 in its code. Our rates are per step of a shorter schedule, and fade. Scales learn as logarithms, on top of
what a transform before left (`smoothquant` with alpha 0.5 is the paper's start). Shifts need biases on both sides, so
Llama has none. Query-key scales are left out: a factor of a row moves its grid along, so that neither weight nor input
rounds otherwise. Three things go beyond the paper: `start: grid` begins with the ranges and the codes of the rounding
before it, which may be a search's or GPTQ's; `finish` rounds the learned weights on the learned grids once more, with
GPTQ's error feedback; and a block that gained nothing stays as it came.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from halfbyte.calibration.learned_block import LearnedBlock, learned_block
from halfbyte.calibration.past_only import BlockCache, LearnedSmoothing
from halfbyte.calibration.reconstruct import BlockContext, Learned, Loss, Reconstruction, Schedule, Targets
from halfbyte.calibration.statistics import InputStatistics
from halfbyte.calibration.walk import linears, observe, shared_inputs
from halfbyte.errors import CalibrationError, RecipeError
from halfbyte.methods.contract import RoundedBlock
from halfbyte.methods.gptq import GPTQ
from halfbyte.models.fold import ResolvedLink
from halfbyte.numerics.clipping import Clipping, paper_clipping, warm_clipping
from halfbyte.numerics.quantized import QuantizedWeight
from halfbyte.scheme import GroupCount, IntegerScale, Value

JUDGED = 16  # batches that decide whether a block has gained


class OmniQuant(Value):
    """Learned clipping and learned equivalent transformation, one block at a time."""

    method: Literal["omniquant"] = "omniquant"
    epochs: float = Field(default=5, gt=0)
    """Times that the calibration text passes in learning."""
    tokens_per_step: int = Field(default=2048, ge=1)
    clip_rate: float = Field(default=2e-2, gt=0)
    links: Literal["all", "norms", "none"] = "norms"
    """The links along which scales and shifts learn: all of the table, those out of norms, or none."""
    link_rate: float = Field(default=5e-3, gt=0)
    start: Literal["grid", "paper"] = "grid"
    """Ranges and codes of the rounding before; or the whole ranges times σ(4), and the unrounded weights."""
    finish: GPTQ | None = None
    """Round the learned weights on the learned grids with error feedback; none: to nearest."""
    loss: Loss = "mse"
    depth: int = Field(default=1, ge=1)
    """Compare what comes out of block i + depth - 1, with float blocks after block i (cross-block reconstruction)."""
    stride: int = Field(default=1, ge=1)
    """Every so many steps at that depth, the others at the block's own output."""
    samples: float = Field(default=1.0, gt=0, le=1)
    """The part of the calibration text to learn from."""
    decay: bool = True
    """Learning rates fall linearly to zero; the paper's are constant."""

    def refine(self, rounded: RoundedBlock, quantized: Mapping[str, QuantizedWeight]) -> Mapping[str, QuantizedWeight]:
        """The learned weights. Edits norms and biases of `rounded.block`, and what moves along links, in place.

        CalibrationError where the loss is not finite; RecipeError for grids that span rows and for integer scales;
        ModelError where links are wanted and none are known.
        """
        return learn_block(self, rounded, quantized, self.teach)

    def teach(self, lesson: Reconstruction, learned: LearnedBlock, more: Sequence[Learned] = ()) -> None:
        """Let what is to be learned learn, and `more` beside it."""
        groups = Learned(learned.clip_tensors, self.clip_rate), Learned(learned.move_tensors, self.link_rate), *more
        steps, batches = planned(len(lesson.source.hidden), self.epochs, self.samples)
        lesson.learn(groups, Schedule(steps=steps, decay=self.decay, batches=batches))

    def learned(self, rounded: RoundedBlock, quantized: Mapping[str, QuantizedWeight]) -> LearnedBlock:
        """What is to be learned of the weights, where it begins."""
        links = [link for link in self._links(rounded) if movable(link, rounded)]
        start = started if self.start == "grid" else unstarted
        keep_codes = self.start == "grid" and self.finish is None
        return learned_block(rounded.block, rounded.weights, quantized, start, links, keep_codes=keep_codes)

    def _links(self, rounded: RoundedBlock) -> list[ResolvedLink]:
        if self.links == "none":
            return []
        return [link for link in rounded.links() if self.links == "all" or not isinstance(link.writer, nn.Linear)]


def learn_block(
    settings: OmniQuant,
    rounded: RoundedBlock,
    quantized: Mapping[str, QuantizedWeight],
    teach: Callable[[Reconstruction, LearnedBlock], None],
    smoothing: LearnedSmoothing | None = None,
) -> Mapping[str, QuantizedWeight]:
    """Let `teach` learn the weights' ranges and moves, and `smoothing`; keep all of it if the block has gained."""
    check_grids(quantized)
    if not quantized and (smoothing is None or not smoothing.tensors):
        return quantized
    learned = settings.learned(rounded, quantized)
    lesson = reconstruction(rounded, learned, settings, attention(rounded.cache, smoothing))
    came = lesson.mean_loss(parameters=as_stored(rounded.block, quantized))
    teach(lesson, learned)
    result, seen = finished(rounded, learned, settings.finish)
    unrounded = {name: value.detach() for name, value in learned.unrounded().items()}
    stored = unrounded | {f"{name}.weight": weight.decode() for name, weight in result.items()}
    gone = lesson.mean_loss(parameters=stored)
    check_loss(rounded.index, came, gone)
    if gone >= came:
        return quantized
    write(rounded, learned, unrounded, seen)
    if smoothing is not None and rounded.cache is not None:
        rounded.cache.smoothing, rounded.cache.learned = smoothing.settled(), True
    return result


def attention(cache: BlockCache | None, smoothing: LearnedSmoothing | None) -> BlockContext:
    """How the block attends while it learns: through its cache, smoothed as it stands at that moment."""
    if cache is None:
        return lambda _block: nullcontext()
    return lambda block: cache.attending(block, None if smoothing is None else smoothing.smoothing())


def started(weight: Tensor, quantized: QuantizedWeight) -> Clipping:
    """Clipping that begins with the grid of the rounding before."""
    return warm_clipping(weight, quantized.grid, quantized.format)


def unstarted(weight: Tensor, quantized: QuantizedWeight) -> Clipping:
    """Clipping that begins as the paper's."""
    return paper_clipping(weight, quantized.format)


def planned(batches: int, epochs: float, samples: float) -> tuple[int, int]:
    """How many steps to take, and over how many batches."""
    used = max(1, round(batches * samples))
    return max(1, round(used * epochs)), used


def movable(link: ResolvedLink, rounded: RoundedBlock) -> bool:
    """Whether a scale along the link changes nothing but quantized weights: not what calibration has measured of inputs."""
    quantizers = [rounded.inputs[name] for name in link.readers if name in rounded.inputs]
    readers = any(name in rounded.weights for name in link.readers)
    return readers and not any(quantizer.format.needs_data for quantizer in quantizers)


def check_grids(quantized: Mapping[str, QuantizedWeight]) -> None:
    """RecipeError for grids that span rows, and for integer scales, whose certificate was for the grid before."""
    for name, weight in quantized.items():
        if isinstance(weight.format.scale, IntegerScale):
            raise RecipeError(f"{name} has integer scales, and ranges that learn have float ones: leave this step out")
        if isinstance(weight.format.granularity, GroupCount):
            raise RecipeError(
                f"{name} has a number of groups over all rows: clipping learns per group, channel or tensor"
            )


def check_loss(index: int, before: float, after: float) -> None:
    """CalibrationError where a loss is not finite."""
    if not torch.isfinite(torch.tensor([before, after])).all():
        raise CalibrationError(
            f"the reconstruction loss of block {index} is {before:g}, then {after:g}: lower the learning rates, or "
            "calibrate in bfloat16 or float32"
        )


def reconstruction(
    rounded: RoundedBlock, learned: LearnedBlock, settings: OmniQuant, context: BlockContext
) -> Reconstruction:
    """The lesson: the block as it is learned, on the quantized model's inputs, against the float model's answers.

    At the model's end there are fewer blocks to follow, and the depth is less.
    """
    following = rounded.following(settings.depth - 1) if settings.depth > 1 else ()
    deepest = 1 + len(following)
    return Reconstruction(
        block=rounded.block,
        index=rounded.index,
        parameters=learned.parameters,
        inputs=rounded.inputs,
        source=rounded.stream,
        targets=Targets(rounded.original, following, rounded.float_stream, rounded.index),
        loss=settings.loss,
        depths=(deepest, *[1] * (settings.stride - 1)),
        grid_slopes=True,
        judged=JUDGED,
        context=context,
    )


def as_stored(block: nn.Module, quantized: Mapping[str, QuantizedWeight]) -> dict[str, Tensor]:
    """The block's parameters with these weights."""
    parameters = {name: parameter.detach() for name, parameter in block.named_parameters()}
    return parameters | {f"{name}.weight": weight.decode() for name, weight in quantized.items()}


@torch.no_grad()
def finished(
    rounded: RoundedBlock, learned: LearnedBlock, finish: GPTQ | None
) -> tuple[dict[str, QuantizedWeight], dict[str, InputStatistics]]:
    """The learned weights on their grids, and what their inputs are then; nothing new of inputs where nothing moved."""
    if not learned.quantized or (finish is None and not learned.moves):
        return learned.settled(), {}
    block = copy.deepcopy(rounded.block)
    for name, value in learned.unrounded().items():
        block.get_parameter(name).data.copy_(value)
    together = shared_inputs(block, rounded.stream, rounded.index)
    quantized = (tuple(name for name in names if name in learned.quantized) for names in together)
    shared = [names for names in quantized if names]
    reference = None
    if finish is not None and finish.needs_drift:
        reference = copy.deepcopy(block), rounded.float_stream
    seen = observe(block, rounded.stream, rounded.index, shared, reference, magnitudes=False)
    if finish is None:
        return learned.settled(), seen
    modules, results = linears(block), {}
    for names in shared:
        weights = []
        for name in names:
            weight, format = modules[name].weight.float(), learned.quantized[name].format
            weights.append((weight, learned.clips[name].grid(weight, format), format))
        results |= dict(zip(names, finish.on_grids(weights, seen[names[0]]), strict=True))
    return results, seen


@torch.no_grad()
def write(
    rounded: RoundedBlock, learned: LearnedBlock, unrounded: Mapping[str, Tensor], seen: Mapping[str, InputStatistics]
) -> None:
    """Put what moved into norms, biases and the weights before rounding, in place."""
    for name, parameter in rounded.block.named_parameters():
        if name.removesuffix(".weight") not in learned.quantized:
            parameter.data.copy_(unrounded[name])
    if learned.moves:
        originals = {f"{name}.weight": weight.float() for name, weight in rounded.weights.items()}
        moved = learned.unrounded(dict(learned.base) | originals)
        for name, weight in rounded.weights.items():
            weight.copy_(moved[f"{name}.weight"])
    rounded.seen.update(seen)
