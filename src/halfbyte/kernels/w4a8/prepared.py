"""A 4-bit weight as the W4A8 tensor-core kernels read it."""

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float, Int32
from torch import Tensor

Kind = Literal["float", "integer", "weight"]
COUNTERS = 4  # for every 64 outputs


@dataclass(frozen=True, slots=True)
class PreparedWeight:
    """W[o, i] = code · group scale · row scale, laid out by packing/int8_tiles.py; codes are stored plus 8.

    kind        group scales, two to a word    what they are applied to
    float       bfloat16                       the group's sum, as float32
    integer     int16                          the group's sum, in int32
    weight      int16, to 18                   the code, in int8

    `sixteenfold` weights are multiplied by 16 · code, and their `row_scales` are a sixteenth. `counters` are zero before and
    after every launch: launches that share them must not overlap, so use one stream at a time.
    """

    kind: Kind
    words: Int32[Tensor, "out_tiles in_tiles 512"]
    pairs: Int32[Tensor, "groups places"]
    row_scales: Float[Tensor, "out"]
    counters: Int32[Tensor, "counts"]
    group_size: int
    sixteenfold: bool

    @property
    def outs(self) -> int:
        return self.row_scales.shape[0]

    @property
    def ins(self) -> int:
        return self.pairs.shape[0] * self.group_size
