"""Grouped integer products on the CPU: torch's int8 matmul run by run, scaled while a tile is still in the cache.

    weight run [outs, size] · xᵀ run [size, tokens] ─► int32 [outs, tokens] ─► · scales ─► total, float32

The weight is the left operand because oneDNN reorders the right one in every call, and there tokens are fewer.

Milliseconds of processor time, the best of many, one core of an x86 server with AMX, 4096 x 4096, groups of 128:

    tokens                                     1     4    16    64   128   512
    4-bit words, unpacked run by run         5.0   6.0   6.7    14    27   101
    bytes, as they lie in the file           8.7   9.8    11    19    31   118
    decode 4 bits and multiply, bfloat16      48    45    47    51    63    70
    decode 4 bits and multiply, float32       46    48    56    77   130   222
    one run of 4096, the products alone      1.9   1.8   2.0   2.9   5.1    18

torch's int8 matmul runs on AMX or VNNI where oneDNN finds them. Without them oneDNN may saturate sums of two products
in 16 bits: a processor that gets the extreme products wrong (`product_is_exact`) multiplies in float32, in pieces so
short that nothing rounds.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int8, Int32, Shaped
from torch import Tensor

from halfbyte.kernels.w8a8.cpu import product_is_exact

TILE_TOKENS = 128
TILE_SUMS = 2**16  # int32 sums, their float32 copy and the total should stay in the second cache
EXACT_PIECE = 2**10  # products of int8 codes are at most 2**14, and float32 holds integers up to 2**24


def grouped_int8_matmul(
    x: Int8[Tensor, "tokens in"],
    x_scales: Float[Tensor, "tokens x_groups"],
    codes: Int8[Tensor, "runs out size"],
    weight_scales: Float[Tensor, "out groups"],
    x_zeros: Int32[Tensor, "tokens x_groups"] | None,
    weight_zeros: Int8[Tensor, "out groups"] | None,
    bias: Float[Tensor, "out"] | None,
    dtype: torch.dtype,
) -> Float[Tensor, "tokens out"]:
    """x · Wᵀ + bias as the op says it, of a weight whose codes are viewed run by run."""
    runs, outs, size = codes.shape
    y = torch.empty(len(x), outs, dtype=dtype)
    scales, zeros = (
        by_run(weight_scales.float(), runs),
        None if weight_zeros is None else by_run(weight_zeros.int(), runs),
    )
    for first in range(0, len(x), TILE_TOKENS):
        tokens = slice(first, min(first + TILE_TOKENS, len(x)))
        tile = Tokens.of(x[tokens], x_scales[tokens], None if x_zeros is None else x_zeros[tokens], size)
        step = max(1, TILE_SUMS // tile.count)
        for start in range(0, outs, step):
            rows = slice(start, min(start + step, outs))
            total = tile.times(codes[:, rows], scales[:, rows], None if zeros is None else zeros[:, rows])
            y[tokens, rows] = (total if bias is None else total.add_(bias[rows, None])).T
    return y


@dataclass(frozen=True, slots=True)
class Tokens:
    """Some tokens as the right operand of integer products, run by run."""

    columns: tuple[Int8[Tensor, "size count_and_ones"], ...]  # with zero points, a last column of ones sums the weight
    scales: Float[Tensor, "runs count"]
    zeros: Int32[Tensor, "runs count"] | None
    sums: Int32[Tensor, "runs count"]  # of the codes in each run
    shared: bool  # whether a token has one scale, which can wait until the runs are summed

    @classmethod
    def of(cls, x: Tensor, scales: Tensor, zeros: Tensor | None, size: int) -> "Tokens":
        runs = x.shape[1] // size
        rows = x if zeros is None else torch.cat([x, x.new_ones(1, x.shape[1])])
        return cls(
            columns=tuple(part.T for part in rows.split(size, dim=1)),
            scales=by_run(scales.float(), runs),
            zeros=None if zeros is None else by_run(zeros, runs),
            sums=x.unflatten(1, (runs, size)).sum(dim=2, dtype=torch.int32).T,
            shared=scales.shape[1] == 1,
        )

    @property
    def count(self) -> int:
        return self.scales.shape[1]

    def times(
        self,
        codes: Int8[Tensor, "runs out size"],
        scales: Float[Tensor, "runs out"],
        zeros: Int32[Tensor, "runs out"] | None,
    ) -> Float[Tensor, "out count"]:
        """The sum over runs of weight · tokens. int32 arithmetic wraps around, and the final integers fit."""
        size, outs = codes.shape[2], codes.shape[1]
        products = torch.empty(outs, self.columns[0].shape[1], dtype=torch.int32)
        real, total = torch.empty(outs, self.count), torch.zeros(outs, self.count)
        for run, columns in enumerate(self.columns):
            multiply(codes[run], columns, products)
            sums, own = products[:, : self.count], self.sums[run]
            if self.zeros is not None:
                sums.addcmul_(products[:, self.count :], self.zeros[run], value=-1)
                own = own - size * self.zeros[run]
            if zeros is not None:
                sums.addcmul_(zeros[run, :, None], own, value=-1)
            real.copy_(sums)
            if not self.shared:
                real.mul_(self.scales[run])
            total.addcmul_(real, scales[run, :, None])
        return total.mul_(self.scales[0]) if self.shared else total


def by_run(values: Shaped[Tensor, "rows groups"], runs: int) -> Shaped[Tensor, "runs rows"]:
    """The value of each run's group."""
    return values.T.repeat_interleave(runs // values.shape[1], dim=0)


def multiply(
    left: Int8[Tensor, "out size"], right: Int8[Tensor, "size tokens"], into: Int32[Tensor, "out tokens"]
) -> None:
    """The exact integer product, written to `into`."""
    if product_is_exact():
        torch._int_mm(left, right, out=into)  # pyright: ignore[reportPrivateImportUsage]
        return
    into.zero_()
    for first in range(0, left.shape[1], EXACT_PIECE):
        piece = slice(first, first + EXACT_PIECE)
        into += (left[:, piece].float() @ right[piece].float()).int()
