"""The column solver as one kernel: each warp keeps 8 rows of the segment in registers through all its columns.

A program has BLOCK_ROWS rows, cut into tiles of 16 columns (a tuple of tiles, not one wide tile):

      one row of the segment:  | tile 0: 16 columns | tile 1 | ... | tile 7 |
                                 4 threads, 4 columns each, and the same 4 threads in every tile

Triton (3.6 and 3.9 were looked at) gives a [8 * warps, 16] tile of float32 exactly this layout: 16-byte loads put 4
threads on a row and 8 rows on a warp. So picking column j is four selects and two shuffles, nothing goes through shared
memory and no warp waits for another. The loop over tiles is unrolled: a tile that is done costs nothing. A step is
bound by the latency of its chain (two shuffles, two divisions), not by arithmetic or memory.

The inner loop stores nothing: a column stops changing when its turn has come, so afterwards the tile holds each column
as it was rounded, and codes, rounded and errors follow from it by the same arithmetic, 16 columns at once.

Equality with the reference is bit for bit (but for the sign of zeros), because division is IEEE (`div_rn`), products
are not fused with sums (`enable_fp_fusion=False`), and both do the same operations in the same order. It cannot be
promised where a compiler of the reference's own operations rounds otherwise. The codes of NaN are unspecified.
"""

# ruff: noqa: RUF005 -- the kernel language joins tuples but does not unpack them
import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte.solvers.columns.reference import Segment, code_dtype

BLOCK_COLUMNS = 16


@triton.jit
def _nearest(weight, scale, zero, low, high):
    # A float32 near 1.5 * 2**23 has no fraction, so the sum rounds, ties to even; unlike rint the interpreter has it.
    # Clamping first keeps the sum in range, and changes nothing since low and high are whole.
    code = tl.minimum(tl.maximum(tl.div_rn(weight, scale) + zero, low), high)
    return (code + 12582912.0) - 12582912.0


@triton.jit
def _round_segment_kernel(
    weight_ptr, spread_ptr, scales_ptr, zeros_ptr, codes_ptr, rounded_ptr, errors_ptr,
    outs, low, high,
    weight_row, weight_column, spread_row, spread_column,
    scales_row, scales_column, zeros_row, zeros_column,
    width: tl.constexpr, has_zeros: tl.constexpr,
    BLOCKS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    # int64: a segment is a view, and the size of the whole matrix may exceed int32
    row = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)[:, None]
    lane = tl.arange(0, BLOCK_COLUMNS)[None, :]
    tiles, spreads, spread_places, spread_masks = (), (), (), ()
    for block in tl.static_range(BLOCKS):
        column = block * BLOCK_COLUMNS + lane
        mask = (row < outs) & (column < width)
        tiles = tiles + (tl.load(weight_ptr + row * weight_row + column * weight_column, mask, 0.0),)
        # As many pointers as the tile has elements, though its rows share them: a smaller shape gets another layout
        place = tl.broadcast_to(spread_ptr + column * spread_column, (BLOCK_ROWS, BLOCK_COLUMNS))
        mask = tl.broadcast_to(column < width, (BLOCK_ROWS, BLOCK_COLUMNS))
        spreads = spreads + (tl.load(place, mask, 0.0),)
        spread_places, spread_masks = spread_places + (place,), spread_masks + (mask,)
    pivot = tl.load(spread_ptr)

    for now in tl.static_range(BLOCKS):
        column = now * BLOCK_COLUMNS + lane
        present = (row < outs) & (column < width)
        scales = tl.load(scales_ptr + row * scales_row + column * scales_column, present, 1.0)
        zeros = tl.zeros_like(scales)
        if has_zeros:
            zeros = tl.load(zeros_ptr + row * zeros_row + column * zeros_column, present, 0.0)
        for here in range(min(BLOCK_COLUMNS, width - now * BLOCK_COLUMNS)):
            mine = lane == here
            current = tl.sum(tl.where(mine, tiles[now], 0.0), axis=1, keep_dims=True)
            scale = tl.sum(tl.where(mine, scales, 0.0), axis=1, keep_dims=True)
            zero = tl.sum(tl.where(mine, zeros, 0.0), axis=1, keep_dims=True)
            error = tl.div_rn(current - (_nearest(current, scale, zero, low, high) - zero) * scale, pivot)

            # `spread` is loaded a step ahead, since it does not depend on the chain of columns
            following = tl.minimum(now * BLOCK_COLUMNS + here + 1, width - 1)
            updated, following_spreads = tiles[:now], spreads[:now]
            for block in tl.static_range(now, BLOCKS):
                tile = tiles[block] - spreads[block] * error
                if block == now:
                    tile = tl.where(lane > here, tile, tiles[block])
                updated = updated + (tile,)
                spread = tl.load(spread_places[block] + following * spread_row, spread_masks[block], 0.0)
                following_spreads = following_spreads + (spread,)
            tiles, spreads = updated, following_spreads
            pivot = tl.load(spread_ptr + following * (spread_row + spread_column))

        place = tl.broadcast_to(spread_ptr + column * (spread_row + spread_column), (BLOCK_ROWS, BLOCK_COLUMNS))
        pivots = tl.load(place, spread_masks[now], 1.0)
        codes = _nearest(tiles[now], scales, zeros, low, high)
        rounded = (codes - zeros) * scales
        place = row * width + column
        tl.store(codes_ptr + place, codes.to(codes_ptr.dtype.element_ty), present)
        tl.store(rounded_ptr + place, rounded, present)
        tl.store(errors_ptr + place, tl.div_rn(tiles[now] - rounded, pivots), present)


def round_segment(
    weight: Tensor,
    spread: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    low: int,
    high: int,
    *,
    block_rows: int = 8,
    warps: int = 1,
) -> Segment:
    """As the reference, for float32 on CUDA. Any strides; fastest if columns are neighbours and rows 16-byte aligned.

    `block_rows` should be 8 * `warps` (see above). Triton compiles once per width and per use of zero points.
    """
    outs, width = weight.shape
    codes = torch.empty(outs, width, dtype=code_dtype(low, high), device=weight.device)
    rounded, errors = (torch.empty(outs, width, dtype=weight.dtype, device=weight.device) for _ in range(2))
    zeros = scales if zero_points is None else zero_points
    with torch.cuda.device_of(weight):  # Triton launches on the current device, wherever the tensors are
        _round_segment_kernel[(triton.cdiv(outs, block_rows),)](
            weight, spread, scales, zeros, codes, rounded, errors,
            outs, float(low), float(high),
            *weight.stride(), *spread.stride(), *scales.stride(), *zeros.stride(),
            width, zero_points is not None,
            triton.cdiv(width, BLOCK_COLUMNS), block_rows, BLOCK_COLUMNS,
            num_warps=warps, num_stages=1, enable_fp_fusion=False,
        )  # fmt: skip
    return Segment(codes, rounded, errors)
