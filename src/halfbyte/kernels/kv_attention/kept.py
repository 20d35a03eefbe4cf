"""Which rows hold the tokens that are kept as they came.

sinks    token t in row t
window   token t in row sinks + t % (window + 1): a new one is written before attention reads those it has not left
"""

import torch
from jaxtyping import Int64
from torch import Tensor


def rows_of(sinks: int, window: int) -> int:
    """How many rows there are."""
    return sinks + window + 1 if sinks or window else 0


def row_of(places: Int64[Tensor, "tokens"], sinks: int, window: int) -> Int64[Tensor, "tokens"]:
    """Where tokens are kept."""
    return torch.where(places < sinks, places, sinks + places % (window + 1))


def held_before(length: Tensor, sinks: int, window: int) -> Int64[Tensor, "rows"]:
    """Which of the first `length` tokens each row holds, now that the next one is written too; -1: none of them."""
    rows = torch.arange(rows_of(sinks, window), device=length.device)
    held = torch.where(rows < sinks, rows, length - (length - rows + sinks) % (window + 1))
    return torch.where((held < length) & ((rows < sinks) | (held >= sinks)), held, -1)
