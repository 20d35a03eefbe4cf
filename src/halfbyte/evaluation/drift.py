"""How far a quantized model's predictions are from the original's, on the same tokens: KL divergence and top-1."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

POSITIONS_AT_ONCE = 128  # float64 log-probabilities over the vocabulary are the largest tensors here
QUANTILE = 0.99


@dataclass(frozen=True, slots=True)
class Drift:
    """The divergence of every predicted token, in nats, and whether both models would choose the same one."""

    divergence: Float[Tensor, "tokens"]
    agreement: Bool[Tensor, "tokens"]

    @property
    def mean(self) -> float:
        return float(self.divergence.mean())

    @property
    def quantile(self) -> float:
        """The smallest divergence that 99 % of the tokens do not exceed."""
        return float(self.divergence.kthvalue(math.ceil(QUANTILE * len(self.divergence))).values)

    @property
    def top1_agreement(self) -> float:
        return float(self.agreement.double().mean())


def concatenate(parts: list[Drift]) -> Drift:
    """One drift over the tokens of all."""
    return Drift(torch.cat([part.divergence for part in parts]), torch.cat([part.agreement for part in parts]))


def drift(original: Float[Tensor, "tokens vocabulary"], quantized: Float[Tensor, "tokens vocabulary"]) -> Drift:
    """KL(original || quantized) of two models' logits, computed in float64. The result is on the CPU."""
    divergence = []
    for there, here in zip(original.split(POSITIONS_AT_ONCE), quantized.split(POSITIONS_AT_ONCE), strict=True):
        expected, found = there.double().log_softmax(dim=1), here.to(there.device).double().log_softmax(dim=1)
        # xlogy-like: a token that the original gives probability 0 costs nothing, even where both are -inf
        terms = torch.where(expected.isneginf(), 0.0, expected.exp() * (expected - found))
        divergence.append(terms.sum(dim=1).clamp(min=0).cpu())
    same = original.argmax(dim=1) == quantized.argmax(dim=1).to(original.device)
    return Drift(torch.cat(divergence), same.cpu())


def negative_log_likelihood(
    logits: Float[Tensor, "tokens vocabulary"], targets: Int64[Tensor, "tokens"]
) -> Float[Tensor, "tokens"]:
    """How surprised a model is by each token, in nats, computed in float64. The result is on the CPU."""
    parts = zip(logits.split(POSITIONS_AT_ONCE), targets.to(logits.device).split(POSITIONS_AT_ONCE), strict=True)
    losses = [torch.nn.functional.cross_entropy(rows.double(), ids, reduction="none").cpu() for rows, ids in parts]
    return torch.cat(losses)
