"""What a checkpoint holds of integer scales: the tensors in place of float scales, and the certificate beside them.

    weight_scale      uint8 or int16  [out, groups]   S >= 1; uint8 where a weight's largest S allows it
    weight_amplifier  float32         [out]           α of each row: the scale of a group is S/α, in float32
    weight_reach      int32           [out]           the certificate (numerics/certificate.py), checked when it is read

A config group has the key `scale` with the kind of scale as the recipe had it, which no other reader knows: such
checkpoints carry our own quant_method. Export to compressed-tensors writes S/α as floating-point numbers, or refuses.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float, Integer, Shaped
from torch import Tensor

from halfbyte.errors import CheckpointError, FormatError
from halfbyte.numerics.certificate import INT32, largest_reach, middle, reach, violation
from halfbyte.numerics.grid import Grid
from halfbyte.numerics.integer_scales import multipliers
from halfbyte.scheme import ActivationFormat, IntegerScale, WeightFormat

SUFFIXES = ("weight_amplifier", "weight_reach")
SCALE_TYPES = (torch.uint8, torch.int16)
AGAIN = "download the checkpoint again, or quantize again"


def write_scales(grid: Grid, scale: IntegerScale) -> dict[str, Tensor]:
    """Scales and amplifiers. FormatError where they are not exactly S/α with an S that can be stored."""
    if grid.amplifiers is None:
        raise FormatError("these scales have no amplifiers: quantize with a recipe that asks for integer scales")
    whole = multipliers(grid)
    inexact = (whole.to(grid.scales.dtype) / grid.amplifiers != grid.scales) | (whole < 1) | (whole > scale.largest)
    if inexact.any():
        row, group = (int(place) for place in inexact.nonzero()[0])
        raise FormatError(
            f"the scale {float(grid.scales[row, group]):g} of row {row} is not S/{float(grid.amplifiers[row]):g} with S "
            f"in 1..{scale.largest}: quantize with a smaller `amplifier`, or `amplifier: row`"
        )
    kind = torch.uint8 if int(whole.max()) <= 255 else torch.int16
    amplifiers = grid.amplifiers.flatten().to(torch.float32)
    return {"weight_scale": whole.to(kind).cpu().contiguous(), "weight_amplifier": amplifiers.cpu().contiguous()}


def write_reach(grid: Grid, codes: Integer[Tensor, "out in"], format: WeightFormat) -> dict[str, Tensor]:
    """The certificate. FormatError where no 8-bit input could be multiplied safely."""
    reached = reach(codes, multipliers(grid), grid.zero_points, middle(format))
    if problem := violation(reached, ActivationFormat(bits=2)):
        raise FormatError(f"{problem}: quantize with a smaller `amplifier`, or `amplifier: row`")
    return {"weight_reach": reached.to(torch.int32).cpu().contiguous()}


def expected(out: int, groups: int) -> dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]:
    """Shapes and types of the stored tensors."""
    return {
        "weight_scale": ((out, groups), SCALE_TYPES),
        "weight_amplifier": ((out,), (torch.float32,)),
        "weight_reach": ((out,), (torch.int32,)),
    }


def read_scales(tensors: Mapping[str, Tensor]) -> tuple[Float[Tensor, "out groups"], Float[Tensor, "out 1"]]:
    """S/α and α, float32. CheckpointError where one of them is not positive: a type was misread."""
    whole, amplifiers = tensors["weight_scale"], tensors["weight_amplifier"]
    if whole.numel() and int(whole.min()) < 1:
        raise CheckpointError(f"weight_scale holds {int(whole.min())}, and integer scales are at least 1: {AGAIN}")
    if wrong := amplifiers[~(torch.isfinite(amplifiers) & (amplifiers > 0))].tolist():
        raise CheckpointError(f"weight_amplifier holds {wrong[0]:g}, and amplifiers are positive: {AGAIN}")
    alphas = amplifiers[:, None]
    return whole.float() / alphas, alphas


def check_reach(
    stored: Integer[Tensor, "out"],
    codes: Integer[Tensor, "out in"],
    whole: Integer[Tensor, "out groups"],
    zero_points: Shaped[Tensor, "out groups"] | None,
    centre: int,
) -> None:
    """CheckpointError unless the stored certificate is that of the codes, scales and zero points.

    `centre`: what is taken off codes and zero points, as in `reach`.
    """
    found = reach(codes, whole.long(), zero_points, centre)
    if not torch.equal(found, stored.long()):
        row = int((found != stored).nonzero()[0])
        raise CheckpointError(
            f"row {row} has a reach of {int(found[row])} and the checkpoint certifies {int(stored[row])}: codes, scales "
            f"and certificate do not belong together; {AGAIN}"
        )


def check_inputs(stored: Integer[Tensor, "out"], inputs: ActivationFormat) -> None:
    """CheckpointError unless the certificate covers inputs of this format."""
    if problem := violation(stored.long(), inputs):
        raise CheckpointError(
            f"the overflow certificate does not hold: {problem}. Quantize again with `overflow: shrink` or a smaller "
            f"`amplifier` for these inputs (a reach up to {largest_reach(inputs)}; int32 ends at {INT32})"
        )
