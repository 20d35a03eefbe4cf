"""A prepared weight of kind "weight" as int8: code · scale, written out once for a product with many tokens.

words [out / 64, in / 64, 512], pairs [groups, out / 64 · 32]  ─►  int8 [out, in], four inputs at a time
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# triton's decorators change signatures in ways that types do not tell

import torch
import triton
import triton.language as tl
from jaxtyping import Int8
from torch import Tensor

from halfbyte.kernels.w4a8.prepared import PreparedWeight

TILES = 4  # of 64 inputs, for a program
SIGNS = tl.constexpr(-0x7F7F7F80)  # 0x80808080 as int32: the sign bits of four bytes


@triton.jit
def _int8_kernel(words_ptr, pairs_ptr, into_ptr, outs, ins, in_tiles, places, group_size, TILES: tl.constexpr):
    """A word has four codes of row r and four of row r + 8; see packing/int8_tiles.py."""
    row = tl.arange(0, 32)[:, None]  # 8 · strip + row of the strip
    column = tl.arange(0, TILES * 16)[None, :]  # four inputs each
    out_tile = tl.program_id(0)
    tile = tl.program_id(1) * TILES + column // 16
    lane = row % 8 * 4 + column % 4
    at = row // 8 * 128 + lane * 4 + column // 4 % 4
    there = tile < in_tiles
    words = tl.load(words_ptr + (out_tile.to(tl.int64) * in_tiles + tile) * 512 + at, mask=there, other=0)
    pair = tl.load(pairs_ptr + tile * 64 // group_size * places + out_tile * 32 + row, mask=tile * 64 < ins, other=0)
    scale = pair & 0xFFFF
    scale8 = pair >> 16
    # a byte of (code + 8) · scale + (128 - 8 · scale) is code · scale + 128: it carries nowhere
    low = (words & 0x0F0F0F0F) * scale + (SIGNS - scale * 0x08080808) ^ SIGNS
    high = (words >> 4 & 0x0F0F0F0F) * scale8 + (SIGNS - scale8 * 0x08080808) ^ SIGNS
    out = out_tile * 64 + row // 8 * 16 + row % 8
    into = into_ptr + out.to(tl.int64) * (ins // 4) + tl.program_id(1) * (TILES * 16) + column
    inside = tile * 64 < ins
    tl.store(into, low, mask=inside & (out < outs))
    tl.store(into + ins * 2, high, mask=inside & (out + 8 < outs))


def int8_weight(weight: PreparedWeight) -> Int8[Tensor, "out in"]:
    """code · scale of every weight; `row_scales` are what remains to multiply by. ValueError for another kind."""
    if weight.kind != "weight":
        raise ValueError(f"code · scale of a weight of kind {weight.kind!r} does not fit int8")
    out_tiles, in_tiles, _ = weight.words.shape
    into = torch.empty(weight.outs, weight.ins, dtype=torch.int8, device=weight.words.device)
    _int8_kernel[(out_tiles, triton.cdiv(in_tiles, TILES))](
        weight.words, weight.pairs, into.view(torch.int32), weight.outs, weight.ins, in_tiles, weight.pairs.shape[1],
        weight.group_size, TILES,
    )  # fmt: skip
    return into
