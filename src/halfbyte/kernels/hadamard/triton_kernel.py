"""A token's rotation as products with small matrices on the tensor cores; what a program makes stays on the chip.

    x, signs ─► grid [A, B] ─ · right [B, PART] ─► left [A, A] · ─► / √n ─► stored, or to codes

A program makes PART columns of a token's grid: all of them, or fewer of a large token, whose codes a second pass makes.
`right` is (H of order B/m) ⊗ core with B up to 128, or the core alone where it is larger; it is read in chunks of its
rows. `left` is Sylvester's matrix of order A, for large A in two steps. Entries of ±1 are exact in every dtype; sums are
float32, and what is multiplied from the left goes in as three TF32 parts of a float32.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportOptionalMemberAccess=false
# triton's decorators change signatures in ways that types do not tell

from collections import OrderedDict
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte.errors import WeightError
from halfbyte.kernels.hadamard.cpu import quantize, sylvester
from halfbyte.kernels.token_quantize.triton_codes import nearest

SMALLEST = 16  # side of a product on the tensor cores
WIDEST_RIGHT = 128  # beyond it a core stands alone
LARGEST_LEFT = 128  # beyond it in two steps
LARGEST_TILE = 2**14  # numbers that one program holds: 64 KiB in float32, twice while they change places
MATRICES = 64  # that are kept


@dataclass(frozen=True, slots=True)
class Shape:
    """A token as a grid, and its padded sides."""

    rows: int
    columns: int
    padded_rows: int
    padded_columns: int
    first: int  # rows = first · second where there are two steps
    second: int
    part: int  # columns that one program makes
    chunk: int  # of the right matrix' rows
    warps: int


def shape_of(ins: int, order: int) -> Shape:
    """How a token of so many inputs is laid out over a core of this order. WeightError where one program cannot hold it."""
    power, inside = ins // order, 1
    while inside < power and 2 * inside * order <= WIDEST_RIGHT:
        inside *= 2
    rows, columns = power // inside, inside * order
    first = rows if rows <= LARGEST_LEFT else 1 << (rows.bit_length() // 2)
    padded = max(SMALLEST, rows), max(SMALLEST, triton.next_power_of_2(columns))
    part = min(padded[1], LARGEST_TILE // padded[0])
    if part < SMALLEST:
        raise WeightError(
            f"a token of {ins} inputs over a core of {order} has {rows} rows of {SMALLEST} columns and more, and a program "
            f"holds {LARGEST_TILE} numbers: leave the online rotation out"
        )
    warps = 4 if padded[0] * part <= 2**12 else 8
    return Shape(rows, columns, *padded, first, rows // first, part, min(padded[1], 64), warps)


@triton.jit
def _rotated(
    x_ptr, signs_ptr, right_ptr, left_ptr, second_ptr, token, first_column, ins, scale,
    HAS_SIGNS: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FIRST: tl.constexpr,
    SECOND: tl.constexpr, A: tl.constexpr, B: tl.constexpr, PART: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Some columns of the token's grid, [A, PART] in float32, rotated; 0 where it is padded."""
    row = tl.arange(0, A)[:, None]
    column = first_column + tl.arange(0, PART)[None, :]
    y = tl.zeros((A, PART), dtype=tl.float32)
    for start in tl.range(0, B, CHUNK):
        k = start + tl.arange(0, CHUNK)
        place = row * COLUMNS + k[None, :]
        mask = (row < ROWS) & (k[None, :] < COLUMNS)
        x = tl.load(x_ptr + token * ins + place, mask=mask, other=0.0)
        if WIDE:
            x = x.to(tl.float32)
        if HAS_SIGNS:
            x = x * tl.load(signs_ptr + place, mask=mask, other=0).to(x.dtype)
        right = tl.load(right_ptr + k[:, None] * B + column)
        if WIDE:
            y = tl.dot(x, right, y, input_precision="tf32x3")
        else:
            y = tl.dot(x, right, y)
    if SECOND == 1:
        side = tl.arange(0, A)
        left = tl.load(left_ptr + side[:, None] * A + side[None, :])
        y = tl.dot(left, y, input_precision="tf32x3")
    else:
        first, second = tl.arange(0, FIRST), tl.arange(0, SECOND)
        y = tl.dot(
            tl.load(left_ptr + first[:, None] * FIRST + first[None, :]),
            tl.reshape(y, (FIRST, SECOND * PART)), input_precision="tf32x3",
        )  # fmt: skip
        y = tl.reshape(tl.permute(tl.reshape(y, (FIRST, SECOND, PART)), (1, 0, 2)), (SECOND, FIRST * PART))
        y = tl.dot(tl.load(second_ptr + second[:, None] * SECOND + second[None, :]), y, input_precision="tf32x3")
        y = tl.reshape(tl.permute(tl.reshape(y, (SECOND, FIRST, PART)), (1, 0, 2)), (A, PART))
    return y * scale


@triton.jit(do_not_specialize=["scale"])
def _hadamard_kernel(
    x_ptr, signs_ptr, right_ptr, left_ptr, second_ptr, y_ptr, ins, scale,
    HAS_SIGNS: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FIRST: tl.constexpr,
    SECOND: tl.constexpr, A: tl.constexpr, B: tl.constexpr, PART: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    # int64: activations may have more than 2**31 elements
    token = tl.program_id(0).to(tl.int64)
    first_column = tl.program_id(1) * PART
    y = _rotated(
        x_ptr, signs_ptr, right_ptr, left_ptr, second_ptr, token, first_column, ins, scale,
        HAS_SIGNS, WIDE, ROWS, COLUMNS, FIRST, SECOND, A, B, PART, CHUNK,
    )  # fmt: skip
    row, column = tl.arange(0, A)[:, None], first_column + tl.arange(0, PART)[None, :]
    mask = (row < ROWS) & (column < COLUMNS)
    tl.store(y_ptr + token * ins + row * COLUMNS + column, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["scale", "clip"])
def _hadamard_quantize_kernel(
    x_ptr, signs_ptr, right_ptr, left_ptr, second_ptr, codes_ptr, scales_ptr, ins, scale, clip,
    HIGHEST: tl.constexpr, HAS_SIGNS: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    FIRST: tl.constexpr, SECOND: tl.constexpr, A: tl.constexpr, B: tl.constexpr, PART: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    y = _rotated(
        x_ptr, signs_ptr, right_ptr, left_ptr, second_ptr, token, 0, ins, scale,
        HAS_SIGNS, WIDE, ROWS, COLUMNS, FIRST, SECOND, A, B, PART, CHUNK,
    )  # fmt: skip
    reach = tl.div_rn(tl.max(tl.max(tl.abs(y), axis=1), axis=0) * clip, HIGHEST)
    step = tl.where(reach > 0, reach, 1.0)
    codes = tl.div_rn(y, tl.zeros_like(y) + step)
    codes = nearest(tl.minimum(tl.maximum(codes, -HIGHEST), HIGHEST))
    row, column = tl.arange(0, A)[:, None], tl.arange(0, B)[None, :]
    mask = (row < ROWS) & (column < COLUMNS)
    tl.store(codes_ptr + token * ins + row * COLUMNS + column, codes.to(tl.int8), mask=mask)
    tl.store(scales_ptr + token, step)


def hadamard(
    x: Tensor, core: Tensor, signs: Tensor | None, dtype: torch.dtype | None = None, wide: bool = False
) -> Tensor:
    """See the op. `dtype`: of the result. `wide`: the first product in float32 too, as the interpreter needs bfloat16."""
    x, y = x.contiguous(), torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)
    if len(x):
        arguments, options = _launch(x, core, signs, wide)
        programs = len(x), options["B"] // options["PART"]
        _hadamard_kernel[programs](*arguments[:5], y, *arguments[5:], **options)
    return y


def hadamard_quantize(x: Tensor, core: Tensor, signs: Tensor | None, bits: int, clip: float) -> tuple[Tensor, Tensor]:
    """See the op."""
    shape = shape_of(x.shape[1], len(core))
    if shape.part < shape.padded_columns:
        return quantize(hadamard(x, core, signs, torch.float32), bits, clip)
    x = x.contiguous()
    codes, scales = x.new_empty(x.shape, dtype=torch.int8), x.new_empty(len(x), dtype=torch.float32)
    if len(x):
        arguments, options = _launch(x, core, signs)
        options["HIGHEST"] = float(2 ** (bits - 1) - 1)
        _hadamard_quantize_kernel[(len(x),)](*arguments[:5], codes, scales, *arguments[5:], clip, **options)
    return codes, scales


def _launch(x: Tensor, core: Tensor, signs: Tensor | None, wide: bool = False) -> tuple[list[Any], dict[str, Any]]:
    """What both kernels are called with: pointers, inputs per token, factor; and what they are compiled for."""
    ins, order = x.shape[1], len(core)
    shape = shape_of(ins, order)
    wide = wide or x.dtype == torch.float32 or core.dtype != torch.int8
    matrices = _matrices(core, shape, torch.float32 if wide else x.dtype)
    scale = 1 / sqrt(ins if core.dtype == torch.int8 else ins // order)
    options = {
        "HAS_SIGNS": signs is not None, "WIDE": wide, "ROWS": shape.rows, "COLUMNS": shape.columns,
        "FIRST": shape.first, "SECOND": shape.second, "A": shape.padded_rows, "B": shape.padded_columns,
        "PART": shape.part, "CHUNK": shape.chunk, "num_warps": shape.warps,
    }  # fmt: skip
    return [x, x if signs is None else signs, *matrices, ins, scale], options


_kept: OrderedDict[tuple[object, ...], tuple[Tensor, tuple[Tensor, Tensor, Tensor]]] = OrderedDict()


def _matrices(core: Tensor, shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The right matrix in `dtype` and the left ones in float32, padded with zeros; kept, with the core that they are of."""
    key = (core.data_ptr(), core._version, core.device, shape, dtype)
    if key not in _kept:
        right = torch.kron(sylvester(shape.columns // len(core)), core.cpu().float().contiguous())
        left = sylvester(shape.first)
        side = shape.padded_rows - shape.rows if shape.second == 1 else 0
        wide = shape.padded_columns - shape.columns
        padded = (
            torch.nn.functional.pad(right, (0, wide, 0, wide)).to(core.device, dtype),
            torch.nn.functional.pad(left, (0, side, 0, side)).to(core.device),
            sylvester(shape.second).to(core.device),
        )
        _kept[key] = core, padded  # the core is held, or another one might get its address
        if len(_kept) > MATRICES:
            _kept.popitem(last=False)
    return _kept[key][1]
