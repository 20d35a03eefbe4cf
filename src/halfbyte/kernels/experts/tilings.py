"""How the launches for experts are cut up, by how many rows an expert has on average: what `benchmarks/experts.py` found."""

from halfbyte.kernels.experts.prepared import Kind
from halfbyte.kernels.w4a8.tilings import Block

# at most so many rows of an expert on average; the last is for more, too
ROWS = (1, 4, 8, 16, 32, 64, 128, 256)
EIGHT_BITS = (
    Block(8, 1, 1, 4, 4, True, 2, 2),
    Block(8, 2, 1, 2, 5, True, 2, 2),
    Block(16, 2, 1, 2, 5, True, 2, 2),
    Block(32, 2, 1, 2, 4, True, 2, 2),
    Block(64, 2, 2, 1, 7, True),
    Block(64, 4, 1, 1, 7, False),
    Block(128, 2, 1, 1, 7, False),
    Block(128, 2, 1, 1, 7, False),
)
WEIGHT = (
    *EIGHT_BITS[:4],
    Block(64, 4, 1, 2, 3, True),
    Block(128, 2, 2, 1, 4, False),
    Block(128, 2, 2, 1, 4, True),
    Block(128, 2, 2, 1, 4, False),
)
HALVES = (
    Block(8, 2, 1, 2, 5, True, 2, 2),
    Block(8, 4, 1, 2, 5, True),
    Block(16, 2, 2, 2, 5, True),
    Block(32, 4, 1, 2, 4, True),
    Block(32, 4, 1, 2, 4, True),
    Block(128, 2, 2, 1, 3, False),
    Block(128, 2, 2, 1, 3, True),
    Block(128, 2, 2, 1, 3, False),
)


def choose(kind: Kind, rows: int, experts: int) -> Block:
    """What to launch, for both products, for so many rows of so many experts."""
    table = HALVES if kind == "half" else WEIGHT if kind == "weight" else EIGHT_BITS
    return next((block for block, most in zip(table, ROWS, strict=True) if rows <= most * experts), table[-1])


def shared_memory(block: Block, kind: Kind) -> int:
    """Bytes of the ring, and of what is staged."""
    piece = block.units * block.block_m * 128
    return block.shared_memory + (block.stages * piece if kind == "half" else 0)
