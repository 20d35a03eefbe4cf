"""The AWQ layout, version `gemm` (packing/awq_words.py), which AutoAWQ began: qweight, qzeros and scales, 4 bits only.

Scales are float16, zero points are always stored. Symmetric weights are written with zero point 8 and `zero_point:
true`: kernels run them unchanged, whereas readers differ over what `zero_point: false` means (AutoAWQ cannot write it,
vLLM's fast kernels do not take it).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from halfbyte.errors import CheckpointError, FormatError
from halfbyte.layouts.layout import (
    NONE_QUANTIZED,
    check_stored,
    common_refusal,
    exact_scales,
    expect,
    offset,
    own_codes,
    present,
    require,
    require_some,
    resolved,
    unsigned_codes,
    weights_only,
    whole_zero_points,
)
from halfbyte.layouts.targets import family
from halfbyte.numerics.grid import SCALE_DTYPES, Grid, scales_shape
from halfbyte.numerics.quantized import QuantizedWeight
from halfbyte.packing import awq_words
from halfbyte.scheme import ActivationFormat, Convention, PerChannel, PerGroup, PerTensor, WeightFormat


@dataclass(frozen=True, slots=True)
class Awq:
    """The layout; it has no options."""

    name: str = "awq"
    suffixes: tuple[str, ...] = ("qweight", "qzeros", "scales")

    def names(self, format: WeightFormat) -> tuple[str, ...]:  # noqa: ARG002
        """See Layout."""
        return self.suffixes

    def refusal(self, format: WeightFormat, out: int, columns: int) -> str | None:
        """See Layout."""
        if format.bits != awq_words.BITS:
            return f"it has {awq_words.BITS} bits only, not {format.bits}: write compressed-tensors"
        if out % awq_words.WORD_CODES:
            return f"it packs outputs by {awq_words.WORD_CODES}, which does not divide {out}: write compressed-tensors"
        if format.granularity == PerTensor():
            return "it has one scale per channel or group: choose `granularity: {kind: channel}`"
        return common_refusal(format, out, columns)

    def caveat(self, format: WeightFormat) -> str | None:  # noqa: ARG002
        """See Layout."""
        return None

    def write(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """See Layout."""
        out, columns = weight.codes.shape
        require(self.refusal(weight.format, out, columns), self.name)
        return {
            "qweight": awq_words.pack(unsigned_codes(weight)).cpu().contiguous(),
            **self.write_grid(weight.grid, weight.format),
        }

    def write_grid(self, grid: Grid, format: WeightFormat) -> dict[str, Tensor]:
        """See Layout."""
        return {
            "scales": exact_scales(grid.scales, torch.float16).T.cpu().contiguous(),
            "qzeros": awq_words.pack(whole_zero_points(grid, format)).cpu().contiguous(),
        }

    def read(self, tensors: Mapping[str, Tensor], format: WeightFormat) -> QuantizedWeight:
        """See Layout."""
        grid, format = self.read_grid(tensors, format)
        return QuantizedWeight(own_codes(awq_words.unpack(tensors["qweight"]), format), grid, format)

    def read_grid(self, tensors: Mapping[str, Tensor], format: WeightFormat) -> tuple[Grid, WeightFormat]:
        """See Layout. A symmetric format demands that every stored zero point is 8."""
        self.shape(tensors, format)
        format = resolved(format, tensors["scales"].dtype)
        scales = tensors["scales"].T.to(torch.float32).contiguous()
        points = awq_words.unpack(tensors["qzeros"])
        if not format.symmetric:
            return Grid(scales, points.to(torch.float32)), format
        if (points != offset(format)).any():
            raise CheckpointError(
                f"qzeros hold zero points other than {offset(format)}, so the weight is not symmetric: read it with "
                "`convention: asymmetric`"
            )
        return Grid(scales), format

    def shape(self, tensors: Mapping[str, Tensor], format: WeightFormat) -> tuple[int, int]:
        """See Layout."""
        qweight = present(tensors, "qweight")
        if qweight.dim() != 2:
            raise CheckpointError(f"qweight has {qweight.dim()} axes instead of 2: download the checkpoint again")
        columns, out = qweight.shape[0], qweight.shape[1] * awq_words.WORD_CODES
        expect(self.refusal(format, out, columns), self.name, out, columns)
        groups = scales_shape(out, columns, format.granularity)[1]
        check_stored(
            tensors,
            {
                "qweight": ((columns, out // awq_words.WORD_CODES), (torch.int32,)),
                "qzeros": ((groups, out // awq_words.WORD_CODES), (torch.int32,)),
                "scales": ((groups, out), tuple(SCALE_DTYPES.values())),
            },
        )
        return out, columns

    def config(
        self,
        formats: Mapping[str, WeightFormat],
        ignored: Sequence[str],
        activations: Mapping[str, ActivationFormat] = NONE_QUANTIZED,
    ) -> dict[str, Any]:
        """See Layout. FormatError unless all groups have one size, or where the name of an ignored module is part of
        a quantized one's, which readers would skip too.
        """
        require_some(formats, self.name)
        weights_only(activations, self.name)
        sizes = {_group_size(format): path for path, format in formats.items()}
        if len(sizes) > 1:
            told = ", ".join(f"{size} ({path})" for size, path in sizes.items())
            raise FormatError(f"awq has one group size for the whole model, not {told}: write compressed-tensors")
        for path in formats:
            if swallowed := next((entry for entry in ignored if entry in path), None):
                raise FormatError(
                    f"awq skips every module whose path contains that of an ignored one, so {swallowed} would leave "
                    f"{path} unread: write compressed-tensors, or quantize {swallowed} as well"
                )
        config = {
            "quant_method": "awq",
            "bits": awq_words.BITS,
            "group_size": next(iter(sizes)),
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": list(ignored) or None,
        }
        return config | ({"lm_head": True} if any(not family(path) for path in formats) else {})

    def formats(self, config: Mapping[str, Any], modules: Sequence[str]) -> dict[str, WeightFormat]:
        """See Layout. With `zero_point: true` weights are asymmetric here, also those that were written symmetric."""
        stored_as = str(config.get("version") or config.get("format") or "gemm").lower()
        bits = config.get("bits", config.get("w_bit"))
        size = config.get("group_size", config.get("q_group_size", 128))
        if stored_as != "gemm" or bits != awq_words.BITS or not isinstance(size, int) or size < -1 or size == 0:
            raise CheckpointError(
                f"the checkpoint is AWQ version {stored_as}, bits: {bits}, group_size: {size}: halfbyte reads version "
                f"gemm of {awq_words.BITS} bits; convert it with the program that wrote it"
            )
        format = WeightFormat(
            bits=bits,
            convention=Convention.ASYMMETRIC if config.get("zero_point", True) else Convention.AWQ,
            granularity=PerChannel() if size == -1 else PerGroup(size=size),
        )
        skipped = config.get("modules_to_not_convert") or ()
        return {path: format for path in modules if not any(entry in path for entry in skipped)}

    def activations(self, config: Mapping[str, Any], modules: Sequence[str]) -> dict[str, ActivationFormat]:  # noqa: ARG002
        """See Layout."""
        return {}

    def beyond_weights(self, config: Mapping[str, Any]) -> tuple[str, ...]:  # noqa: ARG002
        """See Layout."""
        return ()


def _group_size(format: WeightFormat) -> int:
    return format.granularity.size if isinstance(format.granularity, PerGroup) else -1
