"""What perplexity hides of a cache's damage: the second copy of a passage far behind the first, and the worst head.

    first copy │ other text │ second copy        the loss on the second copy, its first token left out, by the distance
    0 .. n     │            │ distance ..        from one copy to the other

A model that reads the first copy predicts the second almost surely. A cache that blurs keys loses the place, one that
blurs values the word; on the next token of ordinary text both cost little.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from halfbyte.calibration.encoders import fills_masks
from halfbyte.calibration.text import longest_sequence
from halfbyte.errors import CalibrationError, ModelError
from halfbyte.evaluation.drift import negative_log_likelihood
from halfbyte.evaluation.perplexity import text_windows
from halfbyte.runtime.cache_attention import head_errors, seen_through_cache
from halfbyte.runtime.cache_plan import chosen_plan
from halfbyte.runtime.load import Pair
from halfbyte.scheme import CacheFormat

PASSAGE = 64  # tokens
LIMIT = 32768  # of a model that states none


@dataclass(frozen=True, slots=True)
class LongContext:
    """What was measured."""

    losses: dict[int, float]  # nats per token of the second copy, by its distance from the first
    first_copy: float  # nats per token of the first copy, for comparison
    worst_head: float | None  # relative error of the attention output of the head that errs most; None: no cache
    worst_layer: int | None
    passage: int
    sequences: int
    kv_cache: str | None

    @property
    def mean(self) -> float:
        """The loss over all distances."""
        return sum(self.losses.values()) / len(self.losses)

    def to_json(self) -> dict[str, Any]:
        """The fields by name, as plain values."""
        return asdict(self) | {"mean": self.mean}


@torch.no_grad()
def long_context(
    model: Pair,
    *,
    text: str | Path,
    kv_cache: str | CacheFormat | None = None,
    distances: Sequence[int] | None = None,
    passage: int = PASSAGE,
    sequences: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> LongContext:
    """Loss on the second copy at each distance, and the worst head on the same sequences.

    `text` as in `evaluate`; `distances` in tokens, by default doubling up to the model's limit. `kv_cache`: as in
    `evaluate`. `progress` is told (sequences done, in all). CalibrationError where the text is too short or a distance
    leaves the model's positions; ModelError for encoders and as `seen_through_cache` raises it.
    """
    network, tokenizer = model
    if fills_masks(network):
        raise ModelError(f"{type(network).__name__} fills masks: it cannot continue a passage")
    limit = longest_sequence(network.config) or LIMIT
    chosen = tuple(distances or doubling(passage, limit))
    if not chosen or min(chosen) < passage or max(chosen) + passage > limit or passage < 2:
        raise CalibrationError(
            f"copies of {passage} tokens at distances {list(chosen)} do not fit the model's {limit} positions: a distance "
            f"is between {passage} and {limit - passage}"
        )
    plan = chosen_plan(network, kv_cache)
    texts = text_windows(text, tokenizer, max(chosen), sequences)
    losses, first, worst = {}, [], None
    for place, distance in enumerate(chosen):
        found = []
        for number, words in enumerate(texts):
            ids = repeated(words, passage, distance)
            with nullcontext() if plan is None else seen_through_cache(network, plan, compare=True):
                logits = network(input_ids=ids[None].to(network.device), use_cache=False).logits[0]
                if plan is not None and distance == max(chosen):
                    errors = head_errors(network)
                    worst = errors if worst is None else torch.maximum(worst, errors)
            found.append(negative_log_likelihood(logits[distance:-1], ids[distance + 1 :]))
            first.append(negative_log_likelihood(logits[: passage - 1], ids[1:passage]))
            if progress is not None:
                progress(place * len(texts) + number + 1, len(chosen) * len(texts))
        losses[distance] = float(torch.cat(found).mean())
    return LongContext(
        losses=losses,
        first_copy=float(torch.cat(first).mean()),
        worst_head=None if worst is None else float(worst.max()),
        worst_layer=None if worst is None else int(worst.amax(dim=1).argmax()),
        passage=passage,
        sequences=len(texts),
        kv_cache=None if plan is None else str(plan.format),
    )


def doubling(passage: int, limit: int) -> list[int]:
    """Distances from the passage's length on, doubling, and the longest that is possible."""
    last = limit - passage
    powers = [passage * 2**power for power in range(max(int(math.log2(max(last / passage, 1))), 0) + 1)]
    return sorted({distance for distance in powers if distance <= last} | ({last} if last >= passage else set()))


def repeated(words: Int64[Tensor, "tokens"], passage: int, distance: int) -> Int64[Tensor, "distance_and_passage"]:
    """The text's first `distance` tokens, and the first `passage` of them once more."""
    return torch.cat([words[:distance], words[:passage]])
