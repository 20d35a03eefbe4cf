"""How decode attention is cut up into programs, and what a program leaves behind."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from halfbyte.kernels.kv_attention.tokens import KeyRotation, PackedTokens

CAPABILITY = 8  # Ampere's: asynchronous copies to shared memory
MOST_SPLITS = 64
FEWEST_TOKENS = 128  # of a split: one step
RESIDENT = 4  # programs that a multiprocessor runs at once
RESIDENT_TURNED = 8  # of one warp
NEAR = 32  # tokens of a warp's step at most, where keys are turned
ROUNDS = 3  # of programs that are tried
GOOD = 0.85  # of a round, or of two or three


@dataclass(frozen=True, slots=True)
class Cut:
    """Each row's tokens are shared by `splits` programs; a warp has `tokens` of them a step, in a ring of `stages` steps.

    registers: the most that a thread may have; 0: as many as the compiler likes.
    """

    splits: int
    tokens: int = 64
    warps: int = 2
    stages: int = 2
    registers: int = 0


class Partial(NamedTuple):
    """What the splits leave, in the order in which kernels take it."""

    sums: Float[Tensor, "batch query_heads splits dim"]
    tops: Float[Tensor, "batch query_heads splits"]
    totals: Float[Tensor, "batch query_heads splits"]


def empty_partial(query: Float[Tensor, "batch query_heads dim"], splits: int) -> Partial:
    """Room for so many splits."""
    batch, heads, dim = query.shape
    shape = (batch, heads, splits)
    return Partial(
        *(torch.empty(size, dtype=torch.float32, device=query.device) for size in ((*shape, dim), shape, shape))
    )


def obstacle(
    query_heads: int, dim: int, keys: PackedTokens, values: PackedTokens, rotation: KeyRotation | None = None
) -> str | None:
    """Why `hopper_decode` cannot read such a cache; None where it can."""
    if dim not in (64, 128):
        return f"heads have {dim} channels, not 64 or 128"
    if {tokens.codes.shape[3] * 8 // dim for tokens in (keys, values)} != {4}:
        return "codes have other widths than 4 bits"
    if any(dim // tokens.scales.shape[3] < 64 for tokens in (keys, values)):
        return "groups are narrower than 64 channels"
    if query_heads // keys.codes.shape[1] > 16:
        return "more than 16 query heads share keys"
    if (keys.zeros is None) != (values.zeros is None):
        return "keys are symmetric and values are not, or the other way round"
    strides = [
        (*tokens.codes.stride()[:2], *(step // tokens.scales.shape[3] for step in tokens.scales.stride()[:2]))
        for tokens in (keys, values)
    ]
    if strides[0] != strides[1] or any(tokens.codes.data_ptr() % 16 for tokens in (keys, values)):
        return "keys and values lie differently in memory"
    if rotation is not None and keys.scales.shape[3] > 1:
        return "keys before RoPE have more than one group"
    if rotation is not None and (2 * rotation.cos.shape[2] != dim or rotation.near.shape[1] < NEAR):
        return "not all channels are turned, or too few turns of tokens nearby are given"
    return None


def choose(rows: int, capacity: int, multiprocessors: int, together: int = 1, turned: bool = False) -> Cut:
    """The cut for so many rows and key heads together, measured on an H200. `together`: query heads of a key head.
    `turned`: keys are stored before RoPE.

    As many programs as run at once, or two or three times as many: a last round that is nearly empty costs as much as a
    full one. No length is asked for, since it is on the GPU: splits share what there is.
    """
    slots = (RESIDENT_TURNED if turned else RESIDENT) * multiprocessors
    least = -(-rows // slots)
    filled = {waves: slots * waves // rows for waves in range(least, least + ROUNDS)}
    good = [splits for waves, splits in filled.items() if splits * rows >= GOOD * slots * waves]
    wanted = good[0] if good else max(filled.values(), key=lambda splits: _share(splits * rows, slots))
    enough = min(-(-capacity // FEWEST_TOKENS), -(-multiprocessors // rows))
    splits = max(1, min(wanted, max(capacity // (2 * FEWEST_TOKENS), enough), MOST_SPLITS))
    if turned:  # what turns the keys takes registers
        return Cut(splits, tokens=32 if together <= 8 else 16, warps=1, stages=4)
    # twice the columns: 64 tokens would not fit the registers
    return Cut(splits) if together <= 8 else Cut(splits, tokens=32, stages=4)


def _share(programs: int, slots: int) -> float:
    """Of the rounds that so many programs make, how much is used."""
    return programs / (-(-programs // slots) * slots)


def has_async_copies(device: torch.device) -> bool:
    """Whether `hopper_decode` runs there."""
    return torch.cuda.get_device_capability(device)[0] >= CAPABILITY
