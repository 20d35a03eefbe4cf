"""How the result is cut into tiles on a Hopper chip, and in which order they are computed.

Programs live as long as the launch, one for a multiprocessor, and take tiles in turns. What a tile costs does not depend
on the others much, so the time of a launch is the number of turns times the cost of a tile:

    ⌈tiles / multiprocessors⌉ · (⌈in / 128⌉ · cost of a step + what begins and ends a tile)

`COSTS` are the costs of a step that fit an H200 (`benchmarks/w8a8.py`), within 6 % in the root mean square over 60 sizes;
`cut_for` takes the cut for which the sum is least, which loses 1.5 % on average against the best of them all.
"""

from dataclasses import dataclass

ROWS = 64  # of x in a warpgroup
STEP = 128  # inputs
TILE_COST = 2000
MULTIPROCESSORS = 132  # of the chip that COSTS were measured on; others of its kind have about as many


@dataclass(frozen=True, slots=True)
class Cut:
    """Tiles of 64 · `warpgroups` tokens by `block_n` outputs; `stages` steps of `block_k` inputs are in flight."""

    warpgroups: int
    block_n: int
    block_k: int
    stages: int

    @property
    def tokens(self) -> int:
        return ROWS * self.warpgroups


# nanoseconds of a step of 128 inputs
COSTS = {
    Cut(2, 256, 128, 4): 656,
    Cut(3, 256, 128, 3): 1000,
    Cut(2, 128, 128, 6): 325,
    Cut(2, 64, 128, 8): 175,
    Cut(1, 128, 128, 8): 177,
    Cut(1, 64, 256, 6): 97,
    Cut(1, 32, 256, 8): 57,
}


def tiles(tokens: int, outs: int, cut: Cut) -> tuple[int, int]:
    """How many rows and columns of tiles there are."""
    return -(-tokens // cut.tokens), -(-outs // cut.block_n)


def nanoseconds(tokens: int, outs: int, ins: int, cut: Cut) -> int:
    """The formula above."""
    rows, columns = tiles(tokens, outs, cut)
    return -(-rows * columns // MULTIPROCESSORS) * (-(-ins // STEP) * COSTS[cut] + TILE_COST)


def cut_for(tokens: int, outs: int, ins: int) -> Cut:
    """The cut that should be fastest."""
    return min(COSTS, key=lambda cut: nanoseconds(tokens, outs, ins, cut))


def place(tile: int, rows: int, columns: int, group: int) -> tuple[int, int]:
    """Row and column of a tile: `group` rows side by side, so that tiles of a turn have operands in common.

    It also compiles for the GPU, hence the plain style.
    """
    first = tile // (group * columns) * group
    beside = min(rows - first, group)
    within = tile % (group * columns)
    return first + within % beside, within // beside
