"""How the launches of the prepared W4A8 kernels are cut up; `benchmarks/w4a8.py --search` finds out."""

from dataclasses import dataclass
from math import ceil

from halfbyte.kernels.crews import Crews

EARLY = True  # a launch may start to fetch its weight while the kernel before it ends ("programmatic dependent launch")
GROUP = 128  # inputs: the least that share a scale


@dataclass(frozen=True, slots=True)
class Block(Crews):
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
    def shared_memory(self) -> int:
        """Bytes of the ring, and of what is staged."""
        tiles = self.workers * self.each
        step = self.units * (self.block_m * GROUP + tiles * (4096 + 128))
        return self.stages * (step + 16) + self.block_m * tiles * 128


@dataclass(frozen=True, slots=True)
class Folded(Crews):
    """A program has 32 outputs and all inputs, for at most `tokens` tokens; a step is `units` · 256 inputs.

    `residents` fit side by side on a multiprocessor: those of a launch, and of the next one.
    """

    tokens: int
    workers: int
    units: int
    stages: int
    residents: int

    @property
    def shared_memory(self) -> int:
        """Bytes of the ring, and of what crews leave each other."""
        step = self.units * (self.tokens * 2 * GROUP + 4096 + 128)
        return self.stages * (step + 16) + self.workers * self.tokens * 512 + 8


Tiling = Block | Folded

# at most so many tokens; the last is for more, too
TOKENS = (4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
PROCESSORS = 132  # of an H200, for which the launches were found
FULL = 0.8  # of the places in use: then programs take whole blocks, else they share out the steps
LONG = 8192  # inputs: beyond, what a program reads and multiplies is more than what sharing a block costs
SPLITS = {32: 6, 64: 4, 128: 2}  # programs at most that share a block: its owner has registers for what they leave


def choose(kind: str, tokens: int, outs: int, ins: int, group_size: int) -> Tiling:
    """What to launch for so many tokens and a weight of that shape."""
    tiles = ceil(outs / 64)
    if tokens <= 32 and 2 * tiles <= PROCESSORS and group_size == GROUP and (tokens <= 8 or ins <= LONG):
        return _folded(tokens, ins)
    if tokens <= 32:
        return _few(tokens, tiles, ins)
    blocks = ceil(tokens / 64) * tiles
    if blocks <= (2 if ins <= LONG else 1) * PROCESSORS:  # so few that small ones, all there at once, are best
        return Block(64, 1, 1, 2, 4, False, 2, 2, min(2 * PROCESSORS // blocks, SPLITS[64]))
    if tokens <= 64:
        if tiles <= 3 * PROCESSORS:
            return Block(64, 1, 1, 2, 2, fill(tiles, 3) < FULL, 3, 3)
        return Block(64, 2, 1, 1, 5, fill(ceil(tiles / 2), 2) < FULL, 2, 2)
    return _many(kind, ceil(tokens / 128), tiles, ins)


def _folded(tokens: int, ins: int) -> Folded:
    """Up to 32 tokens, and at most as many blocks of 32 outputs as multiprocessors."""
    if tokens <= 4:
        return Folded(4, 2, 1, 16, 2) if ins <= LONG else Folded(4, 2, 2, 10, 2)
    if tokens <= 8:
        return Folded(8, 2, 1, 16, 2) if ins <= LONG else Folded(8, 2, 2, 8, 2)
    return Folded(16, 2, 2, 4, 2) if tokens <= 16 else Folded(32, 2, 1, 6, 2)


def _few(tokens: int, tiles: int, ins: int) -> Block:
    """Up to 32 tokens: the weight's bytes decide."""
    block_m = 8 if tokens <= 8 else 16 if tokens <= 16 else 32
    if tiles <= 2 * PROCESSORS and ins <= LONG:
        return Block(block_m, 1, 1, 4, {8: 5, 16: 4, 32: 3}[block_m], False, 2, 2)
    if tiles <= 3 * PROCESSORS:
        return Block(
            block_m, 1, 1, 2, {8: 7, 16: 5, 32: 4}[block_m], False, 3, 3, min(3 * PROCESSORS // tiles, SPLITS[32])
        )
    units, stages = {8: (2, 5), 16: (1, 10), 32: (1, 8)}[block_m]
    return Block(block_m, 2, 1, units, stages, fill(ceil(tiles / 2), 2) < FULL, 2, 2)


def _many(kind: str, blocks_m: int, tiles: int, ins: int) -> Block:
    """`blocks_m` blocks of 128 tokens: tensor cores decide."""
    two, three, four = (blocks_m * ceil(tiles / crews) for crews in (2, 3, 4))
    if kind == "weight" and fill(four, 1) >= max(FULL, 0.9 * fill(three, 1)):
        return Block(128, 4, 1, 1, 4, False)
    if two <= PROCESSORS:
        split = min(PROCESSORS // two, SPLITS[128])
        shared = ins > LONG and fill(split * two, 1) < FULL
        return Block(128, 2, 1, 2, 3, shared, split=1 if shared else split)
    if fill(three, 1) >= FULL and (kind == "weight" or fill(two, 1) < FULL):
        return Block(128, 3, 1, 1, 5, False)
    return Block(128, 2, 1, 2, 3, fill(two, 1) < FULL)


def fill(blocks: int, residents: int) -> float:
    """The part of the places for programs in use, on average until the end, by so many blocks with a program each."""
    places = residents * PROCESSORS
    return blocks / places / ceil(blocks / places)


def units_of(units: int, group_size: int, ins: int) -> int:
    """How many times 128 inputs a step has, `units` or 1, for groups and the last step to end with steps."""
    return units if (ins if group_size == GROUP else group_size) % (units * GROUP) == 0 else 1
