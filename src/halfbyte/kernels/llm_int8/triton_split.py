"""Quantize tokens with their outliers left out: the first of the two launches.

Found while it runs (dynamic): an entry of at least `threshold` gets no code and flags its column. The program that ends
last lists the flagged columns in ascending order and leaves the flags as it found them, all zero.

    x [tokens, in] ─► |x| < threshold ─► range ─► scale, zero ─► codes, 0 in value at outliers
                  └─► |x| ≥ threshold ─► flags [in] ─ last program ─► columns: count, k₀, k₁, ...

Known beforehand (static): `is_outlier` leaves whole columns out, and their entries are gathered side by side.

    x [tokens, in] ─► the columns of O ─► outliers [tokens, n]
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportOptionalMemberAccess=false
# triton's decorators change signatures in ways that types do not tell

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte.kernels.device import processors
from halfbyte.kernels.token_quantize.triton_codes import as_float32, encode, grid_of, widened

LANES = 32
ELEMENTS_OF_LOAD = 8  # 16 bytes of 16-bit numbers
WORDS_OF_THREAD = 4  # of flags, at a time
BYTES_AHEAD = 2**16  # of shared memory, for the next token


@dataclass(frozen=True, slots=True)
class Strip:
    """`programs` programs take turns, a token at a time, in `chunks` chunks of `block` elements."""

    programs: int
    block: int
    chunks: int
    warps: int
    stages: int


def strip_for(tokens: int, ins: int, itemsize: int, processors: int) -> Strip:
    """As many programs as run at once: each has to report when it is done. The next token is loaded meanwhile."""
    warps = 1 if ins <= 512 else 2 if ins <= 2048 else 4 if ins <= 5120 else 8 if ins <= 10240 else 16
    block = min(warps * LANES * ELEMENTS_OF_LOAD, max(16, 1 << (ins - 1).bit_length()))
    stages = 2 if ins * itemsize <= BYTES_AHEAD else 1
    return Strip(min(tokens, processors * 32 // warps), block, -(-ins // block), warps, stages)


@triton.jit
def _inside(x, flags_ptr, k, k_mask, threshold, DYNAMIC: tl.constexpr, PTX: tl.constexpr):
    """x in float32 without its outliers: 0 in their place. Flags the columns of dynamic ones."""
    y = as_float32(x, PTX)
    if DYNAMIC:
        inside = tl.abs(y) < threshold
        outlier = k_mask & (inside == 0)
        # most tokens have outliers in the same few columns: a flag that is seen set is not set again
        unseen = tl.load(flags_ptr + k, mask=outlier, other=1) == 0
        tl.store(flags_ptr + k, tl.full(k.shape, 1, tl.int8), mask=outlier & unseen)
    else:
        inside = tl.load(flags_ptr + k, mask=k_mask, other=0) == 0
    return tl.where(inside, y, 0.0)


@triton.jit
def _list_flagged(flags_ptr, columns_ptr, ins, WORDS: tl.constexpr):
    """The number of flagged columns and these columns, ascending; afterwards no flag is set.

    Flags are bytes of 0 or 1, read as words of four. Multiplied by 0x01010101 a word holds running sums of its flags.
    """
    words_ptr = flags_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    count = 0
    for first in tl.range(0, tl.cdiv(ins, 4), WORDS):
        word = first + tl.arange(0, WORDS)
        # not from the cache of this processor: others have written them
        flags = tl.load(words_ptr + word, mask=word < tl.cdiv(ins, 4), other=0, cache_modifier=".cg")
        sums = flags * 0x01010101
        before = count + tl.cumsum(sums >> 24, axis=0) - (sums >> 24)
        for place in tl.static_range(4):
            nth = before + ((sums >> (8 * place)) & 0xFF)
            tl.store(columns_ptr + nth, 4 * word + place, mask=(flags >> (8 * place)) & 1 == 1)
        tl.store(words_ptr + word, tl.zeros((WORDS,), tl.int32), mask=flags != 0)
        count += tl.sum(sums >> 24, axis=0)
    tl.store(columns_ptr, count)


@triton.jit(do_not_specialize=["tokens", "threshold"])
def _split_kernel(
    x_ptr, codes_ptr, scales_ptr, zeros_ptr, flags_ptr, done_ptr, columns_ptr, outliers_ptr,
    tokens, ins, x_stride, threshold,
    DYNAMIC: tl.constexpr, SYMMETRIC: tl.constexpr, GATHERED: tl.constexpr, GATHERED_BLOCK: tl.constexpr,
    PTX: tl.constexpr, OVERLAPS: tl.constexpr, EVEN: tl.constexpr,
    BLOCK: tl.constexpr, CHUNKS: tl.constexpr, WORDS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, BLOCK)[None, :]
    for row in tl.range(tl.program_id(0), tokens, tl.num_programs(0), num_stages=STAGES):
        # int64: activations may have more than 2**31 elements
        only = (row + tl.arange(0, 1)).to(tl.int64)
        token = only[:, None]
        lows = tl.zeros((1, BLOCK), dtype=tl.float32)
        highs = tl.zeros((1, BLOCK), dtype=tl.float32)
        ys = ()
        for chunk in tl.static_range(CHUNKS):
            k = chunk * BLOCK + lane
            k_mask = (k < ins) | EVEN
            x = tl.load(x_ptr + token * x_stride + k, mask=k_mask, other=0.0)
            y = _inside(x, flags_ptr, k, k_mask, threshold, DYNAMIC, PTX)
            lows, highs = widened(lows, highs, y, SYMMETRIC)
            ys = ys + (y,)  # noqa: RUF005 - triton knows no unpacking
        scale, zero = grid_of(lows, highs, SYMMETRIC)
        for chunk in tl.static_range(CHUNKS):
            k = chunk * BLOCK + lane
            codes = encode(ys[chunk], scale, zero, SYMMETRIC)
            tl.store(codes_ptr + token * ins + k, codes, mask=(k < ins) | EVEN)
        tl.store(scales_ptr + only, scale)
        if not SYMMETRIC:
            tl.store(zeros_ptr + only, zero)
        if GATHERED:
            place = tl.arange(0, GATHERED_BLOCK)
            column = tl.load(columns_ptr + place, mask=place < GATHERED, other=-1)
            x = tl.load(x_ptr + only * x_stride + column, mask=column >= 0, other=0.0)
            tl.store(outliers_ptr + only * GATHERED + place, x, mask=place < GATHERED)
    if OVERLAPS:
        tl.extra.cuda.gdc_launch_dependents()
    if DYNAMIC:
        tl.debug_barrier()  # every thread's flags are set before the program says that it is done
        done = tl.atomic_add(done_ptr, 1, sem="acq_rel")
        if done == tl.num_programs(0) - 1:
            _list_flagged(flags_ptr, columns_ptr, ins, WORDS)
            tl.store(done_ptr, 0)


def split(
    x: Tensor, threshold: float, symmetric: bool, scratch: Tensor, overlaps: bool, strip: Strip | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes, scales, zeros (empty if symmetric), and columns: their number, then the columns, ascending.

    `overlaps` lets a launch that depends on this one begin before it ends. `scratch` is int32 [in / 4 rounded up, + 1],
    all zero: flags of the columns, then the number of programs that are done. It is all zero again afterwards.
    """
    tokens, ins = x.shape
    codes, scales, zeros = _outputs(x, symmetric)
    columns = torch.empty(ins + 1, dtype=torch.int32, device=x.device)
    x = x if x.stride(1) == 1 else x.contiguous()
    strip = strip or strip_for(tokens, ins, x.itemsize, processors(x.device))
    _split_kernel[(strip.programs,)](
        x, codes, scales, zeros, scratch.view(torch.int8), scratch[-1:], columns, x,
        tokens, ins, x.stride(0), threshold,
        True, symmetric, 0, 1, x.is_cuda, overlaps, ins == strip.block * strip.chunks,
        strip.block, strip.chunks, WORDS_OF_THREAD * LANES * strip.warps, strip.stages,
        num_warps=strip.warps,
    )  # fmt: skip
    return codes, scales, zeros, columns


def split_static(
    x: Tensor, columns: Tensor, is_outlier: Tensor, symmetric: bool, overlaps: bool, strip: Strip | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes, scales, zeros (empty if symmetric), and x[:, columns]; 0 where a column is -1."""
    (tokens, ins), gathered = x.shape, columns.shape[0]
    codes, scales, zeros = _outputs(x, symmetric)
    outliers = torch.empty(tokens, gathered, dtype=x.dtype, device=x.device)
    x = x if x.stride(1) == 1 else x.contiguous()
    strip = strip or strip_for(tokens, ins, x.itemsize, processors(x.device))
    _split_kernel[(strip.programs,)](
        x, codes, scales, zeros, is_outlier, columns, columns, outliers,
        tokens, ins, x.stride(0), 0.0,
        False, symmetric, gathered, triton.next_power_of_2(gathered),
        x.is_cuda, overlaps, ins == strip.block * strip.chunks,
        strip.block, strip.chunks, WORDS_OF_THREAD * LANES * strip.warps, strip.stages,
        num_warps=strip.warps,
    )  # fmt: skip
    return codes, scales, zeros, outliers


def _outputs(x: Tensor, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    tokens = x.shape[0]
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scales = torch.empty(tokens, dtype=torch.float32, device=x.device)
    return codes, scales, torch.empty(0 if symmetric else tokens, dtype=torch.int32, device=x.device)
