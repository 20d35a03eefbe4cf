"""Codes times a weight: what a kernel needs of the weight, prepared once, and the call.

PlainProduct        one symmetric scale per output                       kernels/w8a8
GroupedProduct      groups, zero points, inputs in groups                kernels/w4a8
IntegerProduct      integer scales                                       kernels/w4a8_integer (integer_scales.py)
TensorCoreProduct   4 bits in groups of 128, laid out for a Hopper GPU   kernels/w4a8/tensor_cores.py
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float, Int8, Int32, Shaped
from torch import Tensor

from halfbyte.kernels import w4a8
from halfbyte.kernels.w4a8 import tensor_cores
from halfbyte.kernels.w4a8.prepared import Kind, PreparedWeight
from halfbyte.kernels.w8a8 import int8_matmul, route
from halfbyte.kernels.w8a8.cpu import product_is_exact
from halfbyte.runtime.codes import Codes


class Product(Protocol):
    """A weight that codes can be multiplied with."""

    @property
    def name(self) -> str:
        """What runs, in words."""
        ...

    def __call__(
        self,
        found: Codes,
        dtype: torch.dtype,
        bias: Float[Tensor, "out"] | None = None,
        residual: Float[Tensor, "tokens out"] | None = None,
    ) -> Float[Tensor, "tokens out"]:
        """The tokens that `found` stands for, times the weight, plus bias and residual, in `dtype`."""
        ...


@dataclass(frozen=True, slots=True)
class PlainProduct:
    """int8 times int8, scaled by token and output."""

    weight: Int8[Tensor, "out in"]
    scales: Float[Tensor, "out"]
    sums: Int32[Tensor, "out"] | None  # of rows, where inputs have zero points
    dtype: torch.dtype

    @property
    def name(self) -> str:
        if not self.weight.is_cuda:
            return f"w8a8 {cpu_arithmetic()}"
        capability = torch.cuda.get_device_capability(self.weight.device)
        return f"w8a8 triton {route('cuda', self.weight, self.weight, self.dtype, capability)}"

    def __call__(
        self, found: Codes, dtype: torch.dtype, bias: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """See Product."""
        zeros = None if found.zeros is None else found.zeros.expand(len(found.codes), 1).flatten()
        return int8_matmul(
            found.codes,
            found.scales.flatten(),
            self.weight,
            self.scales,
            bias=bias,
            residual=residual,
            x_zeros=zeros,
            weight_sums=self.sums,
            dtype=dtype,
        )


@dataclass(frozen=True, slots=True)
class GroupedProduct:
    """Groups of products, each scaled by a float."""

    weight: Shaped[Tensor, "*codes"]  # as the kernel of the device reads it: words, codes, or runs of them
    scales: Float[Tensor, "out groups"]
    zeros: Int8[Tensor, "out groups"] | None
    bits: int
    run: int  # inputs that share all scales

    @property
    def name(self) -> str:
        return f"w4a8 {'triton' if self.weight.is_cuda else cpu_arithmetic()}, {self.run} inputs a run"

    def __call__(
        self, found: Codes, dtype: torch.dtype, bias: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """See Product."""
        tokens = len(found.codes)
        y = w4a8.grouped_int8_matmul(
            found.codes,
            found.scales.expand(tokens, -1),
            self.weight,
            self.scales,
            bits=self.bits,
            x_zeros=None if found.zeros is None else found.zeros.expand(tokens, -1),
            weight_zeros=self.zeros,
            bias=bias,
            dtype=dtype,
        )
        return y if residual is None else residual + y


@dataclass(frozen=True, slots=True)
class TensorCoreProduct:
    """A 4-bit weight in groups, in the order in which a Hopper GPU's tensor cores take it."""

    weight: PreparedWeight

    @property
    def name(self) -> str:
        return f"w4a8 tensor cores, {self.weight.kind} scales, groups of {self.weight.group_size}"

    def __call__(
        self, found: Codes, dtype: torch.dtype, bias: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """See Product."""
        scales = found.scales.expand(len(found.codes), 1).flatten()
        if residual is not None and bias is None and residual.stride(-1) == 1:
            return tensor_cores.matmul(found.codes, scales, self.weight, residual, dtype)
        y = tensor_cores.matmul(found.codes, scales, self.weight, bias, dtype)
        return y if residual is None else residual + y


def for_tensor_cores(
    words: Int32[Tensor, "out words"],
    scales: Shaped[Tensor, "out groups"],
    factors: Float[Tensor, "out"],
    kind: Kind,
    bits: int,
    dtype: torch.dtype,
) -> TensorCoreProduct | None:
    """The weight code · scale · factor for the tensor cores; None where it does not fit them, or is not on such a GPU."""
    outs, groups = scales.shape
    ins = words.shape[1] * 32 // bits
    if not tensor_cores.runs_on(words.device) or dtype not in tensor_cores.RESULT_DTYPES:
        return None
    if tensor_cores.obstacle(outs, ins, bits, ins // groups) is not None:
        return None
    if kind == "float":
        rounded = scales.to(torch.bfloat16)
        if not torch.equal(rounded.to(scales.dtype), scales):
            return None
        scales = rounded
    return TensorCoreProduct(tensor_cores.prepare(kind, words, scales, factors, ins // groups))


def cpu_arithmetic() -> str:
    """What multiplies integers on this CPU."""
    return "torch int8" if product_is_exact() else "torch float"
