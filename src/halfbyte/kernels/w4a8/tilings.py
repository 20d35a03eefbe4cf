"""How the launches of the prepared W4A8 kernel are cut up. `benchmarks/w4a8.py --search` finds out; see docs/w4a8.md for
what of it has been measured.
"""

from dataclasses import dataclass
from functools import cache

import torch

EARLY = True  # a launch may start to fetch its weight while the kernel before it ends ("programmatic dependent launch")
REGISTERS = 65536  # of a multiprocessor
LOADER = 24  # registers of its threads
GROUP = 128  # inputs: the least that share a scale


@dataclass(frozen=True, slots=True)
class Block:
    """A block is [`workers` · `each` · 64 outputs, `block_m` tokens], a step `units` · 128 inputs.

    `programs` for every multiprocessor take blocks in turns, or with `shared` steps; or `split` programs share each block.
    Registers are cut so that `residents` fit side by side, which may be of the next launch. `beside` blocks of tokens follow
    each other over the same outputs.
    """

    block_m: int
    workers: int
    each: int
    units: int
    stages: int
    shared: bool
    programs: int = 1
    residents: int = 1
    split: int = 1
    beside: int = 8

    @property
    def warps(self) -> int:
        return 4 * self.workers + 4

    @property
    def launch_registers(self) -> int | None:
        """Registers per thread at launch, for `residents` to fit; None for all that there are."""
        return None if self.residents == 1 else min(REGISTERS // self.residents // (32 * self.warps) // 8 * 8, 248)

    @property
    def worker_registers(self) -> int:
        """Registers per thread of a crew, once the loader has given up its own."""
        each = self.launch_registers or min(REGISTERS // (32 * self.warps) // 8 * 8, 248)
        return min((each * self.warps - LOADER * 4) // (4 * self.workers) // 8 * 8, 240)

    @property
    def shared_memory(self) -> int:
        """Bytes of the ring, and of what is staged."""
        tiles = self.workers * self.each
        step = self.units * (self.block_m * GROUP + tiles * (4096 + 128))
        return self.stages * (step + 16) + self.block_m * tiles * 128


# at most so many tokens; the last is for more, too
TOKENS = (8, 16, 32, 64, 128, 256, 512, 1024, 4096)
WIDE = 16384  # outputs from which on blocks alone fill an H200
DECODED = 512  # tokens from which on code · scale is written out as int8 first


def choose(kind: str, tokens: int, outs: int) -> Block | None:
    """What to launch for so many tokens and outputs; None for a weight that is decoded first."""
    if tokens <= 8:
        return Block(8, 1, 1, 4, 3, True, 3, 3) if outs >= WIDE else Block(8, 1, 1, 4, 4, True, 2, 2)
    if tokens <= 32:
        return Block(16, 1, 1, 4, 2, True, 3, 3) if tokens <= 16 else Block(32, 2, 1, 2, 3, True, 2, 2)
    if tokens <= 64:
        return Block(64, 4, 1, 1, 7, True)
    if kind != "weight":
        return Block(128, 2, 1, 1, 7, tokens <= DECODED)
    return Block(128, 2, 2, 1, 4, True) if tokens < DECODED else None


def units_of(units: int, group_size: int, ins: int) -> int:
    """How many times 128 inputs a step has, `units` or 1, for groups and the last step to end with steps."""
    return units if (ins if group_size == GROUP else group_size) % (units * GROUP) == 0 else 1


@cache
def processors(device: torch.device) -> int:
    """How many multiprocessors a device has."""
    return torch.cuda.get_device_properties(device).multi_processor_count
