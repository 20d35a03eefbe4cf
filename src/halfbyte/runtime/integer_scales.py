"""Integer group scales at run time: what a checkpoint holds of them, checked, and the product that runs on them."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int8, Int16, Int32, Shaped, UInt8
from torch import Tensor

from halfbyte.kernels.w4a8_integer import w4a8_integer
from halfbyte.layouts.integer_scales import check_inputs, check_reach
from halfbyte.runtime.codes import Codes
from halfbyte.runtime.products import cpu_arithmetic
from halfbyte.scheme import ActivationFormat


@dataclass(frozen=True, slots=True)
class IntegerProduct:
    """A weight with scales S/α whose certificate covers its inputs: see runtime/products.py."""

    weight: Shaped[Tensor, "*codes"]  # as the kernel of the device reads it
    bits: int
    multipliers: UInt8[Tensor, "out groups"] | Int16[Tensor, "out groups"]
    factors: Float[Tensor, "out"]  # 1/α
    zeros: Int8[Tensor, "out groups"] | None
    sums: Int32[Tensor, "out"] | None  # of rows, where inputs have zero points
    group: int  # inputs that share a scale

    @property
    def name(self) -> str:
        on = "triton" if self.weight.is_cuda else cpu_arithmetic()
        return f"w4a8 integer scales {on}, groups of {self.group}"

    def __call__(
        self,
        found: Codes,
        dtype: torch.dtype,
        bias: Float[Tensor, "out"] | None = None,
        residual: Float[Tensor, "tokens out"] | None = None,
    ) -> Float[Tensor, "tokens out"]:
        """See Product."""
        tokens = len(found.codes)
        y = w4a8_integer(
            found.codes,
            found.scales.expand(tokens, 1).flatten(),
            self.weight,
            self.multipliers,
            self.factors,
            bias,
            bits=self.bits,
            x_zeros=None if found.zeros is None else found.zeros.expand(tokens, 1).flatten(),
            sums=self.sums,
            weight_zeros=self.zeros,
            dtype=dtype,
        )
        return y if residual is None else residual + y


def check_certificate(
    codes: Int8[Tensor, "out in"],
    multipliers: UInt8[Tensor, "out groups"] | Int16[Tensor, "out groups"],
    reach: Int32[Tensor, "out"],
    zeros: Int8[Tensor, "out groups"] | None,
    inputs: ActivationFormat,
) -> None:
    """CheckpointError unless the stored certificate is that of these codes, and covers these inputs."""
    check_reach(reach, codes, multipliers, zeros, 0)
    check_inputs(reach, inputs)
