"""The overflow certificate: no input can drive an int32 accumulator of integer scales beyond its range.

A row's product is one integer, Σ_g S_g · Σ_{k∈g} x_k · q_k, with codes x of the input and q of the weight. With

    reach = Σ_g S_g · Σ_{k∈g} (|q_k| + |z_g|)          |x_k| <= m

every sum of some of its terms, in whatever order, partial or complete, within a group or across groups, has a magnitude
of at most m · reach. So m · reach <= 2^31 - 1 proves the row safe for accumulators that wrap around and for those that
saturate. For symmetric codes equality is reached: by x_k = m · sign(q_k).

    symmetric inputs    m = 127 at 8 bits, since -128 is never produced
    asymmetric inputs   Σ (x_k - z) · q_k is summed as Σ x_k·q_k - z · Σ q_k, where |x_k| and |z| reach 128 each: m = 256
    asymmetric weights  codes and zero points count from the middle of their range, as kernels read them, and the term
                        z_g · Σ x_k of per-group token sums is counted beside that of the codes

The reach is nearly the amplifier times the 1-norm of the row, whatever the groups: Σ_g S_g·Σ|q_k| ≈ α · Σ|w_k|.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64, Integer, Shaped
from torch import Tensor

from halfbyte.scheme import ActivationFormat, WeightFormat

INT32 = 2**31 - 1
TOKEN_INPUTS = ActivationFormat(bits=8)
"""What weights are certified for where nothing says how their inputs are quantized."""


def magnitude(inputs: ActivationFormat) -> int:
    """m: the largest factor by which an input's codes, and its zero point with them, multiply a row's reach."""
    return inputs.highest if inputs.symmetric else 2 * -inputs.lowest


def strictest(inputs: Sequence[ActivationFormat]) -> ActivationFormat:
    """Of several, the one that certifies the least reach; a row that is safe for it is safe for all."""
    return max(inputs, key=magnitude)


def largest_reach(inputs: ActivationFormat) -> int:
    """The reach up to which a row is safe on such inputs."""
    return INT32 // magnitude(inputs)


def middle(format: WeightFormat) -> int:
    """What is taken off an asymmetric code, and off its zero point, before integers are multiplied."""
    return 0 if format.symmetric else 2 ** (format.bits - 1)


def reach(
    codes: Integer[Tensor, "out in"],
    multipliers: Integer[Tensor, "out groups"] | Float[Tensor, "out groups"],
    zero_points: Shaped[Tensor, "out groups"] | None,
    centre: int,
) -> Int64[Tensor, "out"] | Float[Tensor, "out"]:
    """Σ_g S_g · Σ_{k∈g} (|q_k| + |z_g|) of each row, exact in int64; in float64 where the multipliers are not integers.

    `centre` is taken off codes and zero points: `middle(format)`, or 0 for codes that are signed already.
    """
    size = codes.shape[1] // multipliers.shape[1]
    # int16 holds the magnitude of -128 and of 255, of which int8 and uint8 lack the one or the other
    magnitudes = (codes.to(torch.int16) - centre).abs().unflatten(1, (-1, size)).sum(dim=2)
    if zero_points is not None:
        magnitudes += size * (zero_points.long() - centre).abs()
    kind = torch.float64 if multipliers.is_floating_point() else torch.int64
    return (multipliers.to(kind) * magnitudes.to(kind)).sum(dim=1)


def violation(reached: Int64[Tensor, "out"], inputs: ActivationFormat) -> str | None:
    """What is wrong with the worst row, with its values and the limit, without a remedy; None where all are safe."""
    if not len(reached) or int(reached.max()) <= largest_reach(inputs):
        return None
    row = int(reached.argmax())
    return (
        f"row {row} has a reach of {int(reached[row])} (limit {largest_reach(inputs)} for {inputs}), so that its int32 "
        f"accumulator may come to {magnitude(inputs)} * {int(reached[row])} > {INT32}"
    )
