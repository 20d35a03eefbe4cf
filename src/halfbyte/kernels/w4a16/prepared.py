"""A 4-bit weight as the tensor-core kernels read it, and the numbers by which they decode it."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int32
from torch import Tensor

COUNTERS = 4  # for every 64 outputs


@dataclass(frozen=True, slots=True)
class TensorCoreWeight:
    """A 4-bit weight as the kernels read it. `offsets` are zero + magic (`magic_values`); None without zeros.

    `counters` are zero before and after every launch. Launches that share them must not overlap: one stream at a time.
    """

    words: Int32[Tensor, "out_tiles in_tiles 512"]
    scales: Float[Tensor, "groups places"]
    offsets: Float[Tensor, "groups places"] | None
    counters: Int32[Tensor, "counts"]
    outs: int
    ins: int
    group_size: int


def magic_values(dtype: torch.dtype) -> tuple[float, float]:
    """What the mantissa adds to a code of rows r and r + 8: the power of two whose lowest bits hold the code."""
    return (128.0, 128.0) if dtype == torch.bfloat16 else (1024.0, 64.0)


def magics(dtype: torch.dtype) -> tuple[int, int]:
    """The bits of `magic_values`, in both halves of a word."""
    return (0x43004300, 0x43004300) if dtype == torch.bfloat16 else (0x64006400, 0x54005400)
