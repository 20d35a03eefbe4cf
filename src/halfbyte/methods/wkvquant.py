"""WKVQuant's learning: ranges of weight groups and the cache's smoothing, by what the model computes some blocks later.

Yue et al., 2024 — https://arxiv.org/abs/2402.12065, section 3.3

    here            paper     what it is
    clips           γ, β      factors of each group's range, through sigmoids (numerics/clipping.py)
    smoothing       s, δ      scales and shifts of the cache's channels, from those that the step wkv found (methods/wkv.py)
    depth           k         the answer compared is block i+k-1's, with float blocks after block i (CRR)
    loss            MAE       mean absolute error, in which loud channels count no more than their share
    cache           –         how the quantized model attends: past keys and values quantized, the current token exact

The paper: AdamW, 5 epochs over 128 samples of 2048 tokens, rates 1e-2 for γ and β, 5e-4 for s and δ, and k of 5. It does
not say whether the following blocks are float; here they are, and gradients pass through them. What is cheaper: targets are
computed once, the ranges begin with a search's (`start: grid`), `samples` learns from a part of the text, `stride` compares
at depth k in every so many steps and at the block's own output in the others, and `ratios` needs no gradients.
"""

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, model_validator

from halfbyte.calibration.learned_block import LearnedBlock
from halfbyte.calibration.past_only import LearnedSmoothing
from halfbyte.calibration.reconstruct import Choice, Learned, Loss, Reconstruction
from halfbyte.methods.contract import RoundedBlock
from halfbyte.methods.gptq import GPTQ
from halfbyte.methods.omniquant import OmniQuant, learn_block, planned
from halfbyte.numerics.quantized import QuantizedWeight
from halfbyte.scheme import Value


class WKVQuant(Value):
    """Learned clipping, and learned smoothing of the cache, with cross-block reconstruction."""

    method: Literal["wkvquant"] = "wkvquant"
    learn: Literal["clipping", "cache", "both"] = "clipping"
    """What learns: the weights' ranges, the shifts and scales that the step wkv found for the cache, or both at once."""
    epochs: float = Field(default=5, gt=0)
    tokens_per_step: int = Field(default=2048, ge=1)
    clip_rate: float = Field(default=1e-2, gt=0)
    cache_rate: float = Field(default=5e-4, gt=0)
    """Of logarithms of scales, and of shifts in parts of the scale."""
    ratios: tuple[float, ...] = ()
    """If any: no gradients; for one linear after the other, the ratio to its ranges that loses least."""
    start: Literal["grid", "paper"] = "grid"
    finish: GPTQ | None = None
    loss: Loss = "mae"
    depth: int = Field(default=5, ge=1)
    stride: int = Field(default=1, ge=1)
    samples: float = Field(default=1.0, gt=0, le=1)
    decay: bool = True

    @model_validator(mode="after")
    def _ratios_are_of_ranges(self) -> "WKVQuant":
        if self.ratios and self.learn != "clipping":
            raise ValueError(
                "ratios are of the weights' ranges, and the cache learns by gradient: leave one of them out"
            )
        if any(ratio <= 0 for ratio in self.ratios):
            raise ValueError(f"ratios {self.ratios} of ranges must be above 0")
        return self

    def refine(self, rounded: RoundedBlock, quantized: Mapping[str, QuantizedWeight]) -> Mapping[str, QuantizedWeight]:
        """The learned weights. Nothing else of the block changes but the smoothing of `rounded.cache`, if it learns.

        Errors as OmniQuant.refine raises them.
        """
        settings = OmniQuant(
            epochs=self.epochs,
            tokens_per_step=self.tokens_per_step,
            clip_rate=self.clip_rate,
            links="none",
            start=self.start,
            finish=self.finish,
            loss=self.loss,
            depth=self.depth,
            stride=self.stride,
            samples=self.samples,
            decay=self.decay,
        )
        smoothing = None
        if self.learn != "clipping" and rounded.cache is not None:
            smoothing = LearnedSmoothing.of(rounded.cache.smoothing)

        def teach(lesson: Reconstruction, learned: LearnedBlock) -> None:
            if self.ratios:
                self._choose(lesson, learned)
            else:
                more = [] if smoothing is None else [Learned(smoothing.tensors, self.cache_rate)]
                settings.teach(lesson, learned, more)

        ranges = {} if self.learn == "cache" else quantized
        return {**quantized, **learn_block(settings, rounded, ranges, teach, smoothing)}

    def _choose(self, lesson: Reconstruction, learned: LearnedBlock) -> None:
        _, batches = planned(len(lesson.source.hidden), self.epochs, self.samples)
        choices = [
            Choice(clip.learned, [clip.times(ratio) for ratio in self.ratios]) for clip in learned.clips.values()
        ]
        lesson.choose(choices, batches)
