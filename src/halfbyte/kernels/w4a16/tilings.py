"""How the launches of the prepared kernels are cut up: tables measured once, by `benchmarks/w4a16.py --search`."""

from dataclasses import dataclass

EARLY = True  # a launch may start to fetch its weight while the kernel before it ends ("programmatic dependent launch")


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


Tiling = Stream | Block

# rows: at most so many tokens; the last row is for more, too
TOKENS = (8, 16, 32, 64, 128, 256, 512, 1024, 4096)
# columns: at least so many outputs. Of an H200's 132 multiprocessors, the third column gives every one a block of 64
# outputs or two, the fourth three or more; in the second it takes blocks of 32 for that
OUTS = (0, 6144, 16384, 25344)
TABLE: tuple[tuple[Tiling, ...], ...] = (
    (Stream(8, 32, 4, 2, 3, 4), Stream(8, 32, 4, 2, 4, 1), Stream(8, 64, 4, 2, 3, 1), Stream(8, 64, 2, 2, 4, 1)),
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


def choose(tokens: int, outs: int) -> Tiling:
    """What to launch for so many tokens and outputs."""
    row = next((row for row, most in enumerate(TOKENS) if tokens <= most), len(TOKENS) - 1)
    return TABLE[row][column(outs)]


def column(outs: int) -> int:
    """The column of the table for so many outputs."""
    return max(column for column, least in enumerate(OUTS) if outs >= least)


def stream_tokens(outs: int) -> int:
    """Up to how many tokens `few_tokens` runs."""
    return max(most for most in TOKENS if isinstance(choose(most, outs), Stream))


def run_of(run: int, group_size: int, ins: int) -> int:
    """How many tiles of 64 inputs a step has, at most `run`, for groups to end with steps. A single group ends nowhere."""
    return run if group_size == ins or group_size % (run * 64) == 0 else 1
