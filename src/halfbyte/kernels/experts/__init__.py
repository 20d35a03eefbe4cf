"""The experts of a mixture on prepared 4-bit weights: every token through the experts that it was routed to, and their sum.

`gated_experts` is the `torch.library` op `torch.ops.halfbyte.gated_experts`, with a fake implementation: nothing of it asks
the GPU how many tokens an expert has, so it works under `torch.compile` and in CUDA graphs. On a CPU it computes in float64
(`reference`). On a Hopper GPU six launches:

    route      rows sorted by expert, and a schedule of blocks           triton_rows.py
    spread     tokens as rows, as int8 codes where weights want them
    product    gate and up of every row                                  blocks.py
    silu_mul   silu(gate) · up, as codes                                 kernels/token_quantize
    product    what every row writes
    combine    the sum of a token's rows, times their weights

`join` makes W4A8 weights, in the three kinds of kernels/w4a8, of each expert's own, and `join_halves` those for W4A16.
"""

from typing import get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from halfbyte.errors import WeightError
from halfbyte.kernels.experts import reference, tilings
from halfbyte.kernels.experts.prepared import COUNTERS, HALVES, ExpertWeight, Kind, join, join_halves, obstacle
from halfbyte.kernels.w4a8.tilings import Block
from halfbyte.packing import int8_tiles

__all__ = ["ExpertWeight", "gated_experts", "join", "join_halves", "obstacle"]

LARGEST = 2**30  # elements of gates and ups at once; with more tokens in turns

Parts = tuple[Tensor, Tensor, Tensor, Tensor, str, int, bool]


def gated_experts(
    x: Float[Tensor, "tokens hidden"],
    index: Int[Tensor, "tokens k"],
    weights: Float[Tensor, "tokens k"],
    up: ExpertWeight,
    down: ExpertWeight,
) -> Float[Tensor, "tokens hidden"]:
    """The sum, over a token's experts, of weight · down(silu(gate) · up), in the dtype of x, float16 or bfloat16.

    `up` has an expert's gate first and then its up. `index` names experts below `up.experts`; on a GPU that is not checked.
    Raises WeightError where the arguments disagree.
    """
    return _op(x, index, weights, up.experts, *_parts(up), *_parts(down))


def _parts(weight: ExpertWeight) -> Parts:
    return (
        weight.words, weight.pairs, weight.row_scales, weight.counters, weight.kind, weight.group_size,
        weight.sixteenfold,
    )  # fmt: skip


@torch.library.custom_op("halfbyte::gated_experts", mutates_args=(), device_types="cpu")
def _op(
    x: Tensor, index: Tensor, weights: Tensor, experts: int,
    up_words: Tensor, up_pairs: Tensor, up_rows: Tensor, up_counters: Tensor, up_kind: str, up_group: int, up_high: bool,
    down_words: Tensor, down_pairs: Tensor, down_rows: Tensor, down_counters: Tensor, down_kind: str, down_group: int,
    down_high: bool,
) -> Tensor:  # fmt: skip
    up = _weight(experts, up_words, up_pairs, up_rows, up_counters, up_kind, up_group, up_high)
    down = _weight(experts, down_words, down_pairs, down_rows, down_counters, down_kind, down_group, down_high)
    _check(x, index, weights, up, down)
    return reference.gated_experts(x, index, weights, up, down)


@_op.register_kernel("cuda")
def _on_cuda(
    x: Tensor, index: Tensor, weights: Tensor, experts: int,
    up_words: Tensor, up_pairs: Tensor, up_rows: Tensor, up_counters: Tensor, up_kind: str, up_group: int, up_high: bool,
    down_words: Tensor, down_pairs: Tensor, down_rows: Tensor, down_counters: Tensor, down_kind: str, down_group: int,
    down_high: bool,
) -> Tensor:  # fmt: skip
    up = _weight(experts, up_words, up_pairs, up_rows, up_counters, up_kind, up_group, up_high)
    down = _weight(experts, down_words, down_pairs, down_rows, down_counters, down_kind, down_group, down_high)
    _check(x, index, weights, up, down)
    if not x.shape[0]:
        return torch.empty_like(x)
    kind, step = up.kind if up.kind == down.kind else "integer", max(LARGEST // (index.shape[1] * up.outs), 1)
    turns = zip(x.split(step), index.split(step), weights.split(step), strict=True)
    with torch.cuda.device_of(x):  # triton launches on the current device, which need not be where x is
        written = [launch(*some, up, down, tilings.choose(kind, some[1].numel(), experts)) for some in turns]
    return written[0] if len(written) == 1 else torch.cat(written)


def launch(x: Tensor, index: Tensor, weights: Tensor, up: ExpertWeight, down: ExpertWeight, block: Block) -> Tensor:
    """`gated_experts` on the current GPU with products that are cut up so."""
    # imported here: triton exists only where there is something to run it on
    from halfbyte.kernels.experts import blocks, triton_rows
    from halfbyte.kernels.token_quantize import silu_mul_quantize

    order, places, schedule = triton_rows.route(index, up.experts, block.block_m)
    rows, scales = triton_rows.spread(x, order, index.shape[1], up.kind != "half")
    # the schedule was there before `spread`, and before what makes codes, began
    both = blocks.matmul(rows, scales, up, schedule, x.dtype, block, early=True)
    if down.kind == "half":
        inner, scales = triton_rows.silu_mul(both), None
    else:
        inner, scales, _zeros = silu_mul_quantize(both)
    written = blocks.matmul(inner, scales, down, schedule, x.dtype, block, early=True)
    return triton_rows.combine(written, places, weights)


@_op.register_fake
def _shape_of(
    x: Tensor, index: Tensor, weights: Tensor, experts: int,
    up_words: Tensor, up_pairs: Tensor, up_rows: Tensor, up_counters: Tensor, up_kind: str, up_group: int, up_high: bool,
    down_words: Tensor, down_pairs: Tensor, down_rows: Tensor, down_counters: Tensor, down_kind: str, down_group: int,
    down_high: bool,
) -> Tensor:  # fmt: skip
    up = _weight(experts, up_words, up_pairs, up_rows, up_counters, up_kind, up_group, up_high)
    down = _weight(experts, down_words, down_pairs, down_rows, down_counters, down_kind, down_group, down_high)
    _check(x, index, weights, up, down)
    return x.new_empty(x.shape[0], down.outs)


def _weight(experts: int, *parts: Tensor | str | int | bool) -> ExpertWeight:
    """The parts as one. Raise WeightError unless they are of one prepared weight."""
    words, pairs, rows, counters, kind, group_size, sixteenfold = parts
    weight = ExpertWeight(kind, experts, words, pairs, rows, counters, group_size, sixteenfold)  # type: ignore[arg-type]
    if kind not in get_args(Kind):
        raise WeightError(f"no weight is of kind {kind!r}: take what `join` made")
    sizes = (
        weight.words.shape[0] % experts, weight.words.shape[1], weight.pairs.shape[1], weight.row_scales.shape[0],
        weight.counters.shape[0],
    )  # fmt: skip
    tiles = weight.words.shape[0]
    rows_there = 0 if kind == "half" else tiles * int8_tiles.TILE
    if sizes != (0, int8_tiles.in_tiles_for(weight.ins), tiles * 32, rows_there, COUNTERS):
        raise WeightError(f"the parts are not of one weight of {experts} experts: take what `join` made")
    return weight


def _check(x: Tensor, index: Tensor, weights: Tensor, up: ExpertWeight, down: ExpertWeight) -> None:
    """Raise WeightError unless the arguments describe one mixture and tokens for it."""
    if x.dim() != 2 or x.dtype not in HALVES or x.shape[1] != up.ins:
        raise WeightError(f"x is {x.dtype} {list(x.shape)}: give [tokens, {up.ins}] in one of {HALVES}")
    if index.shape != weights.shape or index.dim() != 2 or index.shape[0] != x.shape[0] or not index.shape[1]:
        raise WeightError(
            f"there are {x.shape[0]} tokens, experts {list(index.shape)} and weights {list(weights.shape)}: give an expert "
            "and a weight for each choice of each token"
        )
    if index.dtype not in (torch.int32, torch.int64) or not weights.dtype.is_floating_point:
        raise WeightError(f"experts are {index.dtype} and weights {weights.dtype}: give whole numbers and real ones")
    if (up.outs, down.outs) != (2 * down.ins, up.ins):
        raise WeightError(
            f"experts of {up.outs}x{up.ins} and {down.outs}x{down.ins} are not of one network: the first has gate and up, "
            "the second reads as many inputs as either"
        )
    if (up.kind == "half") != (down.kind == "half"):
        raise WeightError(f"weights of kind {up.kind!r} and {down.kind!r} read different tokens: give two of a kind")
    if up.kind == "half" and {x.dtype} != {up.row_scales.dtype, down.row_scales.dtype}:
        raise WeightError(f"x is {x.dtype}, and the weights were prepared for {up.row_scales.dtype}: join them again")
