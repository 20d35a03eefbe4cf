"""WKVQuant's learned clipping: the ranges of weight groups learn from what the model computes some blocks later.

Yue et al., 2024 — https://arxiv.org/abs/2402.12065, section 3.3

    here            paper     what it is
    clips           γ, β      factors of each group's range, through sigmoids (numerics/clipping.py)
    depth           k         the answer compared is block i+k-1's, with float blocks after block i (CRR)
    loss            MAE       mean absolute error, in which loud channels count no more than their share
    context         –         how the quantized model attends: past keys and values quantized, the current token exact

The paper: AdamW, 5 epochs over 128 samples of 2048 tokens, rate 1e-2 for γ and β, and k of 5. It does not say whether the
following blocks are float; here they are, and gradients pass through them. What is cheaper: targets are computed once, the
ranges begin with a search's (`start: grid`), `samples` learns from a part of the text, and `stride` compares at depth k in
every so many steps and at the block's own output in the others.
"""

from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from halfbyte.calibration.reconstruct import Loss
from halfbyte.methods.contract import RoundedBlock
from halfbyte.methods.gptq import GPTQ
from halfbyte.methods.omniquant import OmniQuant
from halfbyte.numerics.quantized import QuantizedWeight
from halfbyte.scheme import Value


class WKVQuant(Value):
    """Learned clipping with cross-block reconstruction."""

    method: Literal["wkvquant"] = "wkvquant"
    epochs: float = Field(default=5, gt=0)
    tokens_per_step: int = Field(default=2048, ge=1)
    clip_rate: float = Field(default=1e-2, gt=0)
    start: Literal["grid", "paper"] = "grid"
    finish: GPTQ | None = None
    loss: Loss = "mae"
    depth: int = Field(default=5, ge=1)
    stride: int = Field(default=1, ge=1)
    samples: float = Field(default=1.0, gt=0, le=1)
    decay: bool = True

    def refine(self, rounded: RoundedBlock, quantized: Mapping[str, QuantizedWeight]) -> Mapping[str, QuantizedWeight]:
        """The learned weights. Nothing else of the block changes. Errors as OmniQuant.refine raises them."""
        clipping = OmniQuant(
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
        return clipping.refine(rounded, quantized)
