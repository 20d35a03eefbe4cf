"""Products with an outlier split: columns whose inputs are loud are multiplied as they are, the rest as codes.

LLM.int8() (Dettmers et al., 2022) — arXiv 2208.07339, section 3.2

    MixedProduct    one symmetric scale per output    kernels/llm_int8
    SplitProduct    groups or zero points             kernels/w4a8, and the columns in float32
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int8, Int32
from torch import Tensor

from halfbyte.kernels import w4a8
from halfbyte.kernels.llm_int8 import (
    StaticOutliers,
    llm_int8_matmul,
    outlier_scratch,
    static_outlier_matmul,
    static_outliers,
)
from halfbyte.numerics.activations import InputQuantizer
from halfbyte.runtime.codes import encode_split
from halfbyte.runtime.products import cpu_arithmetic


@dataclass(frozen=True, slots=True)
class MixedProduct:
    """Both products in two launches. `kept`: all columns as the model had them, for a dynamic set; None: decoded."""

    weight: Int8[Tensor, "out in"]
    scales: Float[Tensor, "out"]
    threshold: float
    listed: StaticOutliers | None
    kept: Float[Tensor, "out in"] | None
    sums: Int32[Tensor, "out"] | None  # of rows, where inputs have zero points
    scratch: Tensor | None

    @classmethod
    def of(
        cls,
        weight: Int8[Tensor, "out in"],
        scales: Float[Tensor, "out"],
        inputs: InputQuantizer,
        kept: Float[Tensor, "out n"] | None,
        like: Tensor,
    ) -> "MixedProduct":
        """Prepared for activations of the dtype of `like`."""
        split, columns, listed = inputs.format.outliers, inputs.outlier_columns, None
        assert split is not None
        if columns is not None:
            decoded = weight[:, columns.long()].float() * scales[:, None] if kept is None else kept
            listed, kept = static_outliers(columns, decoded.to(like.dtype), weight.shape[1]), None
        sums = None if inputs.format.symmetric else weight.sum(dim=1, dtype=torch.int32)
        scratch = outlier_scratch(weight.shape[1], weight.device) if weight.is_cuda and listed is None else None
        return cls(weight, scales, split.threshold, listed, kept, sums, scratch)

    @property
    def name(self) -> str:
        """What runs, in words."""
        return f"llm_int8 {'triton' if self.weight.is_cuda else cpu_arithmetic()}"

    def __call__(self, rows: Float[Tensor, "tokens in"], bias: Float[Tensor, "out"] | None) -> Tensor:
        if self.listed is not None:
            return static_outlier_matmul(rows, self.weight, self.scales, self.listed, bias, weight_sums=self.sums)
        return llm_int8_matmul(
            rows, self.weight, self.scales, self.threshold, self.kept, bias,
            weight_sums=self.sums, scratch=self.scratch,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class SplitProduct:
    """The codes' product, then the columns'. `kept`: of a static set, or all; None: decoded when they are met."""

    weight: Int8[Tensor, "out in"]
    scales: Float[Tensor, "out groups"]
    zeros: Int8[Tensor, "out groups"] | None
    inputs: InputQuantizer
    kept: Float[Tensor, "out n"] | None

    @property
    def name(self) -> str:
        """What runs, in words."""
        run = self.weight.shape[1] // self.scales.shape[1]
        on = "triton" if self.weight.is_cuda else cpu_arithmetic()
        return f"w4a8 {on}, {run} inputs a run, and split columns"

    def __call__(self, rows: Float[Tensor, "tokens in"], bias: Float[Tensor, "out"] | None) -> Tensor:
        found, columns = encode_split(rows, self.inputs)
        y = w4a8.grouped_int8_matmul(
            found.codes,
            found.scales,
            self.weight,
            self.scales,
            x_zeros=found.zeros,
            weight_zeros=self.zeros,
            bias=bias,
        )
        chosen = columns.long()
        weight = self._decoded(chosen) if self.kept is None else self.kept
        if self.kept is not None and self.inputs.outlier_columns is None:
            weight = self.kept[:, chosen]
        return torch.addmm(y, rows[:, chosen].float(), weight.float().T).to(rows.dtype)

    def _decoded(self, chosen: Tensor) -> Float[Tensor, "out n"]:
        """Columns of the weight from their codes."""
        group = chosen // (self.weight.shape[1] // self.scales.shape[1])
        codes = self.weight[:, chosen].float()
        return (codes if self.zeros is None else codes - self.zeros[:, group]) * self.scales[:, group]
