"""Integer group scales at run time: what a checkpoint holds of them, checked, and the product that runs on them."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int8, Int16, Int32, Shaped, UInt8
from torch import Tensor

from halfbyte.kernels.w4a8_integer import row_sums, w4a8_integer
from halfbyte.layouts.integer_scales import check_inputs, check_reach
from halfbyte.runtime.codes import Codes
from halfbyte.scheme import ActivationFormat


@dataclass(frozen=True, slots=True)
class IntegerScales:
    """The scales S/α of a weight whose certificate covers its inputs."""

    multipliers: UInt8[Tensor, "out groups"] | Int16[Tensor, "out groups"]
    factors: Float[Tensor, "out"]  # 1/α
    zeros: Int8[Tensor, "out groups"] | None
    sums: Int32[Tensor, "out"] | None  # of rows, where inputs have zero points

    def times(
        self,
        found: Codes,
        weight: Shaped[Tensor, "*codes"],
        bits: int,
        bias: Float[Tensor, "out"] | None,
        dtype: torch.dtype,
    ) -> Float[Tensor, "tokens out"]:
        """Tokens times the weight whose codes or words these are, as the op takes them."""
        tokens = len(found.codes)
        return w4a8_integer(
            found.codes,
            found.scales.expand(tokens, 1).flatten(),
            weight,
            self.multipliers,
            self.factors,
            bias,
            bits=bits,
            x_zeros=None if found.zeros is None else found.zeros.expand(tokens, 1).flatten(),
            sums=self.sums,
            weight_zeros=self.zeros,
            dtype=dtype,
        )


def certified(
    codes: Int8[Tensor, "out in"],
    multipliers: UInt8[Tensor, "out groups"] | Int16[Tensor, "out groups"],
    amplifiers: Float[Tensor, "out"],
    reach: Int32[Tensor, "out"],
    zeros: Int8[Tensor, "out groups"] | None,
    inputs: ActivationFormat,
) -> IntegerScales:
    """CheckpointError unless the stored certificate is that of these codes, and covers these inputs."""
    check_reach(reach, codes, multipliers, zeros, 0)
    check_inputs(reach, inputs)
    sums = None if inputs.symmetric else row_sums(codes, multipliers, zeros)
    return IntegerScales(multipliers.contiguous(), 1 / amplifiers, zeros, sums)
