"""Which steps of which blocks a program computes, where blocks of one product, or their steps, are dealt out to programs.

A block has so many steps; all blocks in a row have `blocks` · `steps`, and a program has runs of them. SHARED and SPLIT are
as in kernels/w4a8/blocks.py.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportAssignmentType=false
# triton's decorators change signatures in ways that types do not tell
# ruff: noqa: RET505 - triton compiles what follows a return

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def place(block, blocks_m, blocks_n, BESIDE: tl.constexpr):
    """BESIDE blocks of tokens go side by side over one of outputs, so that its words come from the L2 cache."""
    first_m = block // (BESIDE * blocks_n) * BESIDE
    within = block % (BESIDE * blocks_n)
    beside = gl.minimum(blocks_m - first_m, BESIDE)
    return first_m + within % beside, within // beside


@gluon.jit
def steps_each(blocks, steps, SHARED: tl.constexpr):
    """How many steps a program has in a row."""
    if SHARED:
        return (blocks * steps + gl.num_programs(0) - 1) // gl.num_programs(0)
    else:
        return steps


@gluon.jit
def share_of(blocks, SHARED: tl.constexpr, SPLIT: tl.constexpr):
    """Which run of steps a program has. Programs start in their order: those for whom others wait come first."""
    if SPLIT > 1:
        return SPLIT - 1 - gl.program_id(0) // blocks
    elif SHARED:
        return gl.num_programs(0) - 1 - gl.program_id(0)
    else:
        return gl.program_id(0)


@gluon.jit
def run_of(share, blocks, steps, each, SHARED: tl.constexpr, SPLIT: tl.constexpr):
    """Of the steps of all blocks in a row, a program's first, and where it ends."""
    if SPLIT > 1:
        # the owner has three steps more than the others, who are then done when it adds up what they leave
        own = gl.minimum((steps + gl.minimum(steps // 4, 3) * (SPLIT - 1)) // SPLIT, steps - (SPLIT - 1))
        length = (steps - own) // (SPLIT - 1)
        longer = (steps - own) % (SPLIT - 1)
        first = gl.program_id(0) % blocks * steps
        begin = first + gl.where(share == 0, 0, own + (share - 1) * length + gl.minimum(share - 1, longer))
        end = first + own + share * length + gl.minimum(share, longer)
    else:
        begin = share * each
        end = blocks * steps
        if SHARED:
            end = gl.minimum(end, begin + each)
    return begin, end
