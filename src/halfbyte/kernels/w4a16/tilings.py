"""How the launches of the prepared kernels are cut up: a table measured once, by `benchmarks/w4a16.py --search`."""

from dataclasses import dataclass
from functools import cache

import torch

EARLY = True  # a launch may start to fetch its weight while the kernel before it ends ("programmatic dependent launch")
WIDE = 16384  # outputs from which every multiprocessor has blocks of its own
# the rows of the table: at most so many tokens; the last row is for more, too
TOKENS = (8, 16, 32, 64, 128, 256, 512, 1024, 4096)


@dataclass(frozen=True, slots=True)
class Stream:
    """`few_tokens`: a step is `block_n` outputs and `warps_k` · `run` · 64 inputs."""

    block_m: int
    block_n: int
    warps_k: int
    warps_n: int
    run: int
    stages: int
    programs: int  # of a multiprocessor


@dataclass(frozen=True, slots=True)
class Block:
    """`many_tokens`: a block is [2 · `each` · 64 outputs, `block_m` tokens], a step `run` · 64 inputs."""

    block_m: int
    each: int
    run: int
    stages: int
    shared: bool
    beside: int = 8


Tiling = Stream | Block

NARROW_TABLE: tuple[Tiling, ...] = (
    Stream(8, 64, 4, 1, 2, 3, 3),
    Stream(16, 64, 4, 1, 2, 2, 3),
    Block(32, 1, 2, 9, True),
    Block(64, 1, 2, 6, True),
    Block(128, 1, 2, 3, True),
    Block(128, 1, 2, 3, True),
    Block(128, 1, 2, 3, False),
    Block(256, 1, 2, 2, False),
    Block(256, 1, 2, 2, False),
)
WIDE_TABLE: tuple[Tiling, ...] = (
    Stream(8, 64, 4, 1, 2, 3, 3),
    Stream(16, 64, 4, 1, 2, 2, 3),
    Block(32, 2, 4, 3, False),
    Block(64, 2, 2, 4, False),
    Block(128, 2, 2, 3, False),
    Block(128, 1, 2, 3, False),
    Block(256, 1, 1, 4, False),
    Block(256, 1, 1, 4, False, 4),
    Block(256, 1, 1, 4, False, 4),
)


def choose(tokens: int, outs: int) -> Tiling:
    """What to launch for so many tokens and outputs."""
    row = next((row for row, limit in enumerate(TOKENS) if tokens <= limit), len(TOKENS) - 1)
    return (WIDE_TABLE if outs >= WIDE else NARROW_TABLE)[row]


@cache
def processors(device: torch.device) -> int:
    """How many multiprocessors a device has."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def run_of(run: int, group_size: int, ins: int) -> int:
    """At most `run` tiles of 64 inputs in a row, so that groups and steps end together. A single group ends nowhere."""
    while run > 1 and group_size != ins and group_size % (run * 64) and run * 64 % group_size:
        run //= 2
    return run
