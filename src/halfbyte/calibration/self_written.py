"""Text that the model writes itself: calibration data where there are none (LLM-QAT, arXiv 2305.17888, section 3.1).

The first token is random, the next 3 to 5 are the likeliest ones, the rest are sampled from the model's distribution.
"""

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from halfbyte.errors import CalibrationError

GREEDY = (3, 5)
SEQUENCES_AT_ONCE = 16


@torch.no_grad()
def write(
    model: Any, first: Int64[Tensor, "samples"], length: int, generator: torch.Generator
) -> Int64[Tensor, "samples length"]:
    """What the model goes on to say after each of the `first` tokens; an end-of-text token does not end it.

    `generator` lives on the CPU and is drawn from, so that the global one stays as it was.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        raise CalibrationError("the model has no weights in memory, so it cannot write: load it, or give a text file")
    greedy = torch.randint(GREEDY[0], GREEDY[1] + 1, (len(first),), generator=generator)
    batches = zip(first.split(SEQUENCES_AT_ONCE), greedy.split(SEQUENCES_AT_ONCE), strict=True)
    return torch.cat([_continue(model, tokens, until, length, generator) for tokens, until in batches])


def _continue(
    model: Any,
    first: Int64[Tensor, "batch"],
    greedy: Int64[Tensor, "batch"],
    length: int,
    generator: torch.Generator,
) -> Int64[Tensor, "batch length"]:
    written, cache = [first], None
    for position in range(1, length):
        output = model(input_ids=written[-1][:, None].to(model.device), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits = output.logits[:, -1].float().cpu()
        written.append(torch.where(position <= greedy, logits.argmax(dim=1), _sample(logits, generator)))
    return torch.stack(written, dim=1)


def _sample(logits: Float[Tensor, "batch vocabulary"], generator: torch.Generator) -> Int64[Tensor, "batch"]:
    if not torch.isfinite(logits).all():
        raise CalibrationError("the model's logits are NaN or Inf, so it cannot write: use a wider dtype, or a text")
    return torch.multinomial(logits.softmax(dim=1), 1, generator=generator).squeeze(1)
