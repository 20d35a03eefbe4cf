"""The int8 matmul for Hopper, in Gluon: one warp copies tiles to shared memory, one to three warpgroups multiply them.

    copying warp      x tile [64 · warpgroups, block_k], W tile [block_n, block_k] ─► one of `stages` buffers
    each warpgroup    64 rows of the x tile · W tileᵀ ─► total [64, block_n], int32, in registers
                      after the last step: scales, bias, residual, 32 columns at a time ─► shared memory ─► y

A program stays for the whole launch and takes tiles in turns; the copying warp runs ahead, so that the next tile is
there when one is done.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportAssignmentType=false
# gluon's decorators change signatures in ways that types do not tell

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from halfbyte.kernels.device import processors
from halfbyte.kernels.w8a8 import tiling
from halfbyte.kernels.w8a8.tiling import Cut

ROWS = gl.constexpr(tiling.ROWS)
GROUP = gl.constexpr(8)  # rows of tiles side by side
WGMMA_COLUMNS = gl.constexpr(128)  # the most that triton multiplies at once in int8
SUB = gl.constexpr(32)  # columns that leave the registers at once
BUFFERS = gl.constexpr(2)  # for them

# triton 3.9 has new names for what 3.6 has
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
_load_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
_store_tile = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global

_place = gluon.jit(tiling.place)


@dataclass(frozen=True)
class Form:
    """What the sums are turned into."""

    static: bool
    bias: bool
    residual: bool
    zeros: bool


@gluon.jit
def _after(stage, phase, STAGES: gl.constexpr):
    stage += 1
    return gl.where(stage == STAGES, 0, stage), gl.where(stage == STAGES, phase ^ 1, phase)


@gluon.jit
def _before(stage, STAGES: gl.constexpr):
    return gl.where(stage == 0, STAGES, stage) - 1


@gluon.jit
def _copy(x_desc, weight_desc, x_tiles, weight_tiles, full, empty, work, cut: gl.constexpr):
    """The copying warp: a buffer is filled again once all warpgroups have given it back."""
    rows, columns, steps = work
    stage = gl.to_tensor(0)
    phase = gl.to_tensor(1)  # the buffers begin empty
    for tile in range(gl.program_id(0), rows * columns, gl.num_programs(0)):
        row, column = _place(tile, rows, columns, GROUP)
        for step in range(steps):
            mbarrier.wait(empty.index(stage), phase)
            copied = full.index(stage)
            mbarrier.expect(copied, (ROWS * cut.warpgroups + cut.block_n) * cut.block_k)
            k = step * cut.block_k
            _load_tile(weight_desc, [column * cut.block_n, k], copied, weight_tiles.index(stage))
            for i in gl.static_range(gl.constexpr(cut.warpgroups)):
                m = (row * cut.warpgroups + i) * ROWS
                _load_tile(x_desc, [m, k], copied, x_tiles.index(stage * cut.warpgroups + i))
            stage, phase = _after(stage, phase, cut.stages)


@gluon.jit
def _scaled(total, row, column, inputs, sizes, form: gl.constexpr):
    x_scales, weight_scales, bias, residual, x_zeros, weight_sums = inputs
    tokens, outs, residual_stride = sizes
    layout: gl.constexpr = total.type.layout
    m = row + gl.arange(0, total.shape[0], gl.SliceLayout(1, layout))
    n = column + gl.arange(0, total.shape[1], gl.SliceLayout(0, layout))
    if form.zeros:
        zeros = gl.load(x_zeros + m, mask=m < tokens, other=0)
        sums = gl.load(weight_sums + n, mask=n < outs, other=0)
        total -= zeros[:, None] * sums[None, :]
    y = total.to(gl.float32)
    if form.static:
        y *= gl.load(x_scales)
    else:
        y *= gl.load(x_scales + m, mask=m < tokens, other=0.0)[:, None]
    y *= gl.load(weight_scales + n, mask=n < outs, other=0.0)[None, :]
    if form.bias:
        y += gl.load(bias + n, mask=n < outs, other=0.0).to(gl.float32)[None, :]
    if form.residual:
        # int64: there may be more than 2**31 results
        at = m.to(gl.int64)[:, None] * residual_stride + n[None, :]
        y += gl.load(residual + at, mask=(m < tokens)[:, None] & (n < outs)[None, :], other=0.0).to(gl.float32)
    return y


@gluon.jit
def _write(
    total, row, column, y_desc, y_tiles, inputs, sizes,
    FIRST: gl.constexpr, LAST: gl.constexpr, WARPGROUP: gl.constexpr, PENDING: gl.constexpr, form: gl.constexpr,
):  # fmt: skip
    """Scale and store columns FIRST to LAST of a tile. What lies outside y, the copy engine leaves out.

    PENDING: of the stores before, how many may still read their buffer.
    """
    if LAST - FIRST > SUB:
        HALF: gl.constexpr = (LAST - FIRST) // 2
        left, right = total.reshape([ROWS, 2, HALF]).permute((0, 2, 1)).split()
        _write(left, row, column, y_desc, y_tiles, inputs, sizes, FIRST, FIRST + HALF, WARPGROUP, PENDING, form)
        _write(right, row, column, y_desc, y_tiles, inputs, sizes, FIRST + HALF, LAST, WARPGROUP, PENDING, form)
    else:
        layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SUB, 32])
        total = gl.convert_layout(total, layout, assert_trivial=True)
        y = _scaled(total, row, column + FIRST, inputs, sizes, form).to(y_desc.dtype)
        y_tile = y_tiles.index(WARPGROUP * BUFFERS + FIRST // SUB % BUFFERS)
        tma.store_wait(PENDING)
        _barrier()
        y_tile.store(y)
        fence_async_shared()
        _barrier()
        _store_tile(y_desc, [row, column + FIRST], y_tile)


@gluon.jit
def _multiply(
    y_desc, x_tiles, weight_tiles, y_tiles, full, empty, inputs, sizes, work,
    WARPGROUP: gl.constexpr, cut: gl.constexpr, form: gl.constexpr,
):  # fmt: skip
    """A warpgroup: its 64 rows of every tile. A buffer is given back one step late, when its product must be done."""
    BLOCK_N: gl.constexpr = cut.block_n
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, min(BLOCK_N, WGMMA_COLUMNS), 32])
    rows, columns, steps = work
    stage = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    for tile in range(gl.program_id(0), rows * columns, gl.num_programs(0)):
        total = gl.zeros([ROWS, BLOCK_N], gl.int32, layout)
        for step in range(steps):
            mbarrier.wait(full.index(stage), phase)
            x_tile = x_tiles.index(stage * cut.warpgroups + WARPGROUP)
            weight_tile = weight_tiles.index(stage).permute((1, 0))
            total = warpgroup_mma(x_tile, weight_tile, total, use_acc=step != 0, is_async=True)
            total = warpgroup_mma_wait(1, deps=(total,))
            mbarrier.arrive(empty.index(_before(stage, cut.stages)), pred=step != 0)
            stage, phase = _after(stage, phase, cut.stages)
        total = warpgroup_mma_wait(0, deps=(total,))
        mbarrier.arrive(empty.index(_before(stage, cut.stages)))
        row, column = _place(tile, rows, columns, GROUP)
        m = (row * cut.warpgroups + WARPGROUP) * ROWS
        PENDING: gl.constexpr = min(BLOCK_N // SUB, BUFFERS) - 1
        _write(total, m, column * BLOCK_N, y_desc, y_tiles, inputs, sizes, 0, BLOCK_N, WARPGROUP, PENDING, form)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["tokens", "outs", "rows", "columns", "steps"])
def _int8_matmul_kernel(
    x_desc, weight_desc, y_desc, x_scales, weight_scales, bias, residual, x_zeros, weight_sums,
    tokens, outs, residual_stride, rows, columns, steps,
    cut: gl.constexpr, form: gl.constexpr,
):  # fmt: skip
    x_tiles = gl.allocate_shared_memory(gl.int8, [cut.stages * cut.warpgroups, ROWS, cut.block_k], x_desc.layout)
    weight_tiles = gl.allocate_shared_memory(gl.int8, [cut.stages, cut.block_n, cut.block_k], weight_desc.layout)
    y_tiles = gl.allocate_shared_memory(y_desc.dtype, [cut.warpgroups * BUFFERS, ROWS, SUB], y_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [cut.stages, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [cut.stages, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(gl.constexpr(cut.stages)):
        mbarrier.init(full.index(i), 1)
        mbarrier.init(empty.index(i), cut.warpgroups)
    fence_async_shared()

    inputs = (x_scales, weight_scales, bias, residual, x_zeros, weight_sums)
    sizes = (tokens, outs, residual_stride)
    work = (rows, columns, steps)
    # registers: those of the first warpgroup are what the others leave of 65536
    if cut.warpgroups == 1:
        gl.warp_specialize([
            (_multiply, (y_desc, x_tiles, weight_tiles, y_tiles, full, empty, inputs, sizes, work, 0, cut, form)),
            (_copy, (x_desc, weight_desc, x_tiles, weight_tiles, full, empty, work, cut)),
        ], [1], [40])  # fmt: skip
    elif cut.warpgroups == 2:
        gl.warp_specialize([
            (_multiply, (y_desc, x_tiles, weight_tiles, y_tiles, full, empty, inputs, sizes, work, 0, cut, form)),
            (_multiply, (y_desc, x_tiles, weight_tiles, y_tiles, full, empty, inputs, sizes, work, 1, cut, form)),
            (_copy, (x_desc, weight_desc, x_tiles, weight_tiles, full, empty, work, cut)),
        ], [4, 1], [240, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_multiply, (y_desc, x_tiles, weight_tiles, y_tiles, full, empty, inputs, sizes, work, 0, cut, form)),
            (_multiply, (y_desc, x_tiles, weight_tiles, y_tiles, full, empty, inputs, sizes, work, 1, cut, form)),
            (_multiply, (y_desc, x_tiles, weight_tiles, y_tiles, full, empty, inputs, sizes, work, 2, cut, form)),
            (_copy, (x_desc, weight_desc, x_tiles, weight_tiles, full, empty, work, cut)),
        ], [4, 4, 1], [160, 160, 24])  # fmt: skip


@cache
def _tiled(row_bytes: int, bits: int) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout(swizzle_byte_width=row_bytes, element_bitwidth=bits, rank=2)


def int8_matmul(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    x_zeros: Tensor | None = None,
    weight_sums: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    cut: Cut | None = None,
) -> Tensor:
    """The op on a Hopper chip. Rows of x, weight and y begin at multiples of 16 bytes; they may lie apart."""
    (tokens, ins), outs = x.shape, weight.shape[0]
    y = torch.empty(tokens, outs, dtype=dtype, device=x.device)
    if not tokens or not outs:
        return y
    cut = cut or tiling.cut_for(tokens, outs, ins)
    rows, columns = tiling.tiles(tokens, outs, cut)
    codes, results = _tiled(min(cut.block_k, 128), 8), _tiled(int(SUB) * dtype.itemsize, 8 * dtype.itemsize)
    _int8_matmul_kernel[(min(rows * columns, processors(x.device)),)](
        TensorDescriptor.from_tensor(x, [int(ROWS), cut.block_k], codes),
        TensorDescriptor.from_tensor(weight, [cut.block_n, cut.block_k], codes),
        TensorDescriptor.from_tensor(y, [int(ROWS), int(SUB)], results),
        x_scales, weight_scales, *(y if part is None else part for part in (bias, residual)),
        *(x_scales if part is None else part for part in (x_zeros, weight_sums)),
        tokens, outs, 0 if residual is None else residual.stride(0), rows, columns, -(-ins // cut.block_k),
        cut, Form(len(x_scales) == 1, bias is not None, residual is not None, x_zeros is not None),
        num_warps=4,
    )  # fmt: skip
    return y
