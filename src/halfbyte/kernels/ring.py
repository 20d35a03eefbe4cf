"""What Gluon kernels share whose crews meet in a ring of slots in shared memory."""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportAssignmentType=false
# triton's decorators change signatures in ways that types do not tell

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

# names that changed between triton 3.6 and 3.9
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
fetch = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
flush = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global


@gluon.jit
def after(slot, phase, by: tl.constexpr, STAGES: tl.constexpr):
    """The slot `by` further, at most once round, and its phase."""
    slot += by
    return gl.where(slot >= STAGES, slot - STAGES, slot), gl.where(slot >= STAGES, phase ^ 1, phase)


@gluon.jit
def fetch_weight(
    words_tiles, scales_tiles, words_ring, scales_ring, ready, slot, tile, step, steps_of_group,
    BYTES: tl.constexpr, WORKERS: tl.constexpr, EACH: tl.constexpr, UNITS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Words and scales of a step for a block of outputs from `tile` on, apart for each crew. BYTES: of x, too."""
    mbarrier.expect(ready, BYTES)
    group = step * PARTS
    if PARTS == 1:
        group = step // steps_of_group
    for worker in gl.static_range(WORKERS):
        at = tile + worker * EACH
        fetch(words_tiles, [at, step * (UNITS * 32), 0], ready, words_ring.index(slot * WORKERS + worker))
        fetch(scales_tiles, [group, at * 32], ready, scales_ring.index(slot * WORKERS + worker))
