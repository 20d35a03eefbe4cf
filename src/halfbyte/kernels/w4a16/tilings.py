"""How the launches of the prepared kernels are cut up: tables measured once, by `benchmarks/w4a16.py --search`."""

from dataclasses import dataclass
from math import ceil

from halfbyte.kernels.crews import Crews

EARLY = True  # a launch may start to fetch its weight while the kernel before it ends ("programmatic dependent launch")
GROUP = 128  # inputs that share a scale, in `streamed`
LONG = 8192  # inputs, beyond which 32 outputs are too few for a program of `streamed`


@dataclass(frozen=True, slots=True)
class Stream:
    """`few_tokens`: a program has `block_n` outputs, its warps share out the inputs, `run` · 64 of them a step.

    `split` programs share the inputs of the same outputs.
    """

    block_m: int
    block_n: int
    warps: int
    run: int
    stages: int
    split: int


@dataclass(frozen=True, slots=True)
class Block:
    """`many_tokens`: a block is [`workers` · `each` · 64 outputs, `block_m` tokens], a step `run` · 64 inputs.

    `shared` deals out steps instead of blocks; `beside` blocks of tokens follow each other over the same outputs.
    """

    block_m: int
    workers: int
    each: int
    run: int
    stages: int
    shared: bool
    beside: int = 8


@dataclass(frozen=True, slots=True)
class Streamed(Crews):
    """`streamed`: a program has 64 / `fold` outputs and all inputs, its crews take steps of `units` · `fold` · 128 in turns.

    Or crews stand `beside` each other, each with all steps of 64 outputs of its own. `residents` fit side by side on a
    multiprocessor: those of a launch, and of the next one.
    """

    block_m: int
    fold: int
    workers: int
    units: int
    stages: int
    residents: int
    beside: bool = False

    @property
    def tiles(self) -> int:
        """Of 64 / `fold` outputs, that a program has."""
        return self.workers if self.beside else 1

    @property
    def turns(self) -> int:
        """Crews that share the steps of a tile."""
        return 1 if self.beside else self.workers

    @property
    def shared_memory(self) -> int:
        """Bytes of the ring, and of what crews leave each other."""
        step = self.units * (self.fold * self.block_m * 256 + self.tiles * (4096 + self.fold * 128))
        return self.stages * (step + 16) + self.workers * self.fold * self.block_m * 256 + 8


Tiling = Stream | Block | Streamed

PROCESSORS = 132  # of an H200, for which the launches were found
# rows: at most so many tokens; the last row is for more, too
TOKENS = (4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
# columns: at least so many outputs. Of the multiprocessors, the third column gives every one a block of 64
# outputs or two, the fourth three or more; in the second it takes blocks of 32 for that
OUTS = (0, 6144, 16384, 25344)
TABLE: tuple[tuple[Tiling, ...], ...] = (
    *2
    * ((Stream(8, 32, 4, 2, 3, 4), Stream(8, 32, 4, 2, 4, 1), Stream(8, 64, 4, 2, 3, 1), Stream(8, 64, 2, 2, 4, 1)),),
    (Stream(16, 32, 4, 2, 4, 2), Stream(16, 32, 4, 2, 4, 1), Stream(16, 64, 2, 2, 3, 1), Stream(16, 64, 2, 2, 3, 1)),
    (
        Block(32, 2, 1, 2, 9, True),
        Block(32, 2, 1, 2, 9, True),
        Block(32, 4, 1, 2, 6, False),
        Block(32, 4, 1, 2, 6, False),
    ),
    (
        Block(64, 2, 1, 2, 3, True),
        Block(64, 2, 1, 2, 3, True),
        Block(64, 4, 1, 2, 4, False),
        Block(64, 4, 1, 2, 4, False),
    ),
    (Block(128, 2, 1, 2, 3, True), Block(128, 2, 1, 2, 3, True), *2 * (Block(128, 2, 2, 2, 3, False),)),
    (Block(128, 2, 1, 2, 3, True), *2 * (Block(128, 2, 1, 2, 3, False),), Block(256, 2, 1, 1, 3, False)),
    (*2 * (Block(128, 2, 1, 2, 3, False),), *2 * (Block(256, 2, 1, 1, 4, False),)),
    (*2 * (Block(128, 2, 2, 2, 3, False),), Block(256, 2, 1, 1, 4, True), Block(256, 2, 1, 1, 4, False, 16)),
    4 * (Block(256, 2, 1, 2, 2, False),),
)

# what is faster for symmetric groups of 128, in the first rows; None: what `TABLE` says. Columns: `streamed_column`
STREAMED: tuple[tuple[Streamed | None, ...], ...] = (
    (
        Streamed(4, 2, 2, 2, 8, 2),
        Streamed(4, 2, 2, 2, 8, 2),
        Streamed(8, 1, 2, 2, 8, 2),
        Streamed(8, 1, 1, 2, 5, 3),
        Streamed(8, 1, 2, 2, 5, 2, beside=True),
    ),
    (
        Streamed(8, 2, 2, 1, 12, 2),
        Streamed(8, 2, 2, 1, 6, 3),
        Streamed(8, 1, 2, 2, 8, 2),
        Streamed(8, 1, 1, 2, 5, 3),
        Streamed(8, 1, 2, 2, 5, 2, beside=True),
    ),
    (
        Streamed(16, 2, 1, 2, 4, 2),
        Streamed(16, 2, 2, 1, 6, 2),
        Streamed(16, 1, 1, 2, 6, 2),
        Streamed(16, 1, 1, 2, 4, 3),
        Streamed(16, 1, 2, 1, 8, 2, beside=True),
    ),
    (
        Streamed(32, 2, 1, 2, 2, 2),
        Streamed(32, 2, 1, 2, 2, 2),
        Streamed(32, 1, 1, 2, 4, 2),
        Streamed(32, 1, 1, 2, 2, 3),
        Streamed(32, 1, 2, 1, 5, 2, beside=True),
    ),
)


def choose(tokens: int, outs: int, ins: int, group_size: int, symmetric: bool) -> Tiling:
    """What to launch for so many tokens and a weight of that shape."""
    row = next((row for row, most in enumerate(TOKENS) if tokens <= most), len(TOKENS) - 1)
    other = streamed_column(outs, ins) if symmetric and group_size == GROUP and row < len(STREAMED) else None
    return (None if other is None else STREAMED[row][other]) or TABLE[row][column(outs)]


def column(outs: int) -> int:
    """The column of `TABLE` for so many outputs."""
    return max(column for column, least in enumerate(OUTS) if outs >= least)


def streamed_column(outs: int, ins: int) -> int | None:
    """The column of `STREAMED`, if any.

    0, 1: at most 8192 inputs, and a program of 32 outputs for every multiprocessor, or two. 2, 3, 4: at most two programs of
    64 outputs for every multiprocessor, or three, or more.
    """
    tiles = ceil(outs / 64)
    if 4 * tiles < PROCESSORS or (tiles <= PROCESSORS and ins > LONG):
        return None
    return next((column for column, most in enumerate((0.5, 1, 2, 3)) if tiles <= most * PROCESSORS), 4)


def stream_tokens(outs: int, ins: int, group_size: int, symmetric: bool) -> int:
    """Up to how many tokens `few_tokens` or `streamed` runs."""
    return max(most for most in TOKENS if not isinstance(choose(most, outs, ins, group_size, symmetric), Block))


def run_of(run: int, group_size: int, ins: int) -> int:
    """How many tiles of 64 inputs a step has, at most `run`, for groups to end with steps. A single group ends nowhere."""
    return run if group_size == ins or group_size % (run * 64) == 0 else 1
