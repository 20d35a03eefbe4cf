"""How tokens are dealt out to the programs of a launch."""

from dataclasses import dataclass

import torch

from halfbyte.kernels.device import processors

LANES = 32
ELEMENTS_OF_LOAD = 8  # 16 bytes of 16-bit numbers
WIDEST_IN_REGISTERS = 32768
BYTES_AHEAD = 2**16  # of shared memory, for the next tokens
FEW_TOKENS, FEW_WARPS = 128, 16  # so few wait for one instruction after the other: the fewer each warp has, the better


@dataclass(frozen=True, slots=True)
class Strip:
    """`programs` programs take turns; each holds `rows` tokens, in `chunks` chunks of `block` elements.

    Without chunks a row is too wide to hold: it is walked over `block` elements at a time. With two `stages` the next
    tokens are loaded while these are worked on.
    """

    programs: int
    rows: int
    block: int
    chunks: int
    warps: int
    stages: int


def at_once(tokens: int, ins: int) -> Strip:
    """A program for each token, or for several where rows are short: best where there is one input to load."""
    if ins <= 1024:
        block = max(16, 1 << (ins - 1).bit_length())
        rows = max(1, min(16, 1024 // block))
        return Strip(-(-tokens // rows), rows, block, 1, max(1, rows * block // 512), 1)
    if tokens <= FEW_TOKENS:
        warps = FEW_WARPS if ins > 2048 else FEW_WARPS // 2
    else:
        warps = 4 if ins <= 12288 else 8 if ins <= 16384 else 16
    block = warps * LANES * ELEMENTS_OF_LOAD
    return Strip(tokens, 1, block, -(-ins // block) if ins <= WIDEST_IN_REGISTERS else 0, warps, 1)


def in_turns(tokens: int, ins: int, bytes_of_token: int, device: torch.device) -> Strip:
    """As many programs as run at once, so that weights are loaded once: best where there is more to load than x."""
    strip = at_once(tokens, ins)
    if tokens <= FEW_TOKENS or ins <= 1024 or not strip.chunks or bytes_of_token > BYTES_AHEAD:
        return strip
    warps = 2 if ins <= 2048 else 4 if ins <= 8192 else 8 if ins <= 16384 else 16
    block = warps * LANES * ELEMENTS_OF_LOAD
    return Strip(min(tokens, 32 // warps * processors(device)), 1, block, -(-ins // block), warps, 2)
