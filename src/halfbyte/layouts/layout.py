"""What a checkpoint layout can do, and the rules that all of them share.

A layout stores codes as unsigned integers: a code q of a symmetric grid as q + 2**(bits - 1), one of an asymmetric grid
as it is. Nothing is ever rounded on the way in or out; what a layout cannot hold exactly, it refuses.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from halfbyte.errors import CheckpointError, FormatError, WeightError
from halfbyte.numerics.grid import SCALE_DTYPES, Grid, code_dtype, scales_shape
from halfbyte.numerics.quantized import QuantizedWeight
from halfbyte.scheme import ActivationFormat, Convention, FloatScale, GroupCount, IntegerScale, WeightFormat

NONE_QUANTIZED: Mapping[str, ActivationFormat] = MappingProxyType({})

Stored = tuple[tuple[int, ...], tuple[torch.dtype, ...]]
"""Shape of a stored tensor and the types that it may have."""


@runtime_checkable
class Layout(Protocol):
    """Checkpoint tensors and `quantization_config` of one format; reading and writing are exact inverses."""

    @property
    def name(self) -> str:
        """The key in LAYOUTS."""
        ...

    @property
    def suffixes(self) -> tuple[str, ...]:
        """The tensors that only quantized modules have, first one that all of them have; not `bias` and `weight`."""
        ...

    def names(self, format: WeightFormat) -> tuple[str, ...]:
        """The tensors of a weight of this format, the codes first."""
        ...

    def refusal(self, format: WeightFormat, out: int, columns: int) -> str | None:
        """Why an [out, columns] weight of this format cannot be said, with the remedy; None where it can."""
        ...

    def caveat(self, format: WeightFormat) -> str | None:
        """Which well-known readers do not take this format although the layout says it; None where all do."""
        ...

    def write(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """The module's tensors by suffix, contiguous, on the CPU. FormatError where they would not be exact."""
        ...

    def read(self, tensors: Mapping[str, Tensor], format: WeightFormat) -> QuantizedWeight:
        """The inverse of `write`; scales and zero points are float32, a scale dtype `model` becomes the stored one.

        CheckpointError where the tensors are not an intact weight of this format.
        """
        ...

    def write_grid(self, grid: Grid, format: WeightFormat) -> dict[str, Tensor]:
        """The scales and zero points alone. FormatError where they would not be exact."""
        ...

    def read_grid(self, tensors: Mapping[str, Tensor], format: WeightFormat) -> tuple[Grid, WeightFormat]:
        """The inverse of `write_grid`, from all of a module's tensors, without reading the codes."""
        ...

    def shape(self, tensors: Mapping[str, Tensor], format: WeightFormat) -> tuple[int, int]:
        """[out, columns] of a module. CheckpointError where a tensor is missing or has another shape or type.

        Of memory-mapped tensors it reads `weight_shape` at most.
        """
        ...

    def config(
        self,
        formats: Mapping[str, WeightFormat],
        ignored: Sequence[str],
        activations: Mapping[str, ActivationFormat] = NONE_QUANTIZED,
    ) -> dict[str, Any]:
        """`quantization_config` of config.json. `ignored`: paths of the linear layers that are not quantized.

        `activations`: of the layers among `formats` whose inputs are quantized. FormatError where there are no formats,
        or the layout cannot tell them apart or cannot say them.
        """
        ...

    def formats(self, config: Mapping[str, Any], modules: Sequence[str]) -> dict[str, WeightFormat]:
        """Which of the linear layers `modules` a `quantization_config` of any writer quantizes, and how.

        Configurations do not state the scales' dtype: it is `model` here. CheckpointError for what we cannot read.
        """
        ...

    def activations(self, config: Mapping[str, Any], modules: Sequence[str]) -> dict[str, ActivationFormat]:
        """Which of the linear layers `modules` get quantized inputs, and how. CheckpointError for what we cannot read."""
        ...

    def beyond_weights(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """What a configuration asks for besides weights and inputs: caches, rotations, sparsity."""
        ...


def common_refusal(format: WeightFormat, out: int, columns: int, *, integer_scales: bool = False) -> str | None:
    """What no layout of other people's can say; None where nothing of that kind is in the way.

    `integer_scales`: whether it has a place for them, which only ours has.
    """
    if isinstance(format.scale, IntegerScale) and not integer_scales:
        return f"its scales are floating-point numbers, not {format.scale}: choose `scale: {{kind: float}}`"
    if isinstance(format.granularity, GroupCount):
        return (
            f"its groups are runs of a row, not {format.granularity.count} parts of the flattened matrix: choose "
            "`granularity: {kind: group, size: 128}`"
        )
    if format.convention is Convention.OMNIQUANT:
        top, bits = format.highest, format.bits
        return f"q + {2 ** (bits - 1)} takes code {top} beyond {bits} bits: choose `convention: awq`, whose codes fit"
    try:
        scales_shape(out, columns, format.granularity)
    except WeightError as cause:
        return str(cause)
    return None


def require(refusal: str | None, name: str) -> None:
    """FormatError if there is a refusal."""
    if refusal is not None:
        raise FormatError(f"{name} cannot hold this weight: {refusal}")


def weights_only(activations: Mapping[str, ActivationFormat], name: str) -> None:
    """FormatError for what layouts of packed weights alone lack."""
    if activations:
        some = next(iter(activations))
        raise FormatError(
            f"{name} has no place for quantized inputs, which {some} has: choose the layout compressed-tensors"
        )


def require_some(formats: Mapping[str, WeightFormat], name: str) -> None:
    """FormatError if there is nothing to write."""
    if not formats:
        raise FormatError(f"no module is quantized, so there is no {name} checkpoint: select modules in the recipe")


def expect(refusal: str | None, name: str, out: int, columns: int) -> None:
    """CheckpointError if there is a refusal: tensors that nobody can have written are damaged."""
    if refusal is not None:
        raise CheckpointError(
            f"config.json and the tensors of an {out}x{columns} weight do not belong together: {name} cannot hold it "
            f"({refusal})"
        )


def unsigned_codes(weight: QuantizedWeight) -> UInt8[Tensor, "out in"]:
    """The codes as they are packed. FormatError if one lies outside the format."""
    format = weight.format
    low, high = (int(code) for code in weight.codes.aminmax())
    if low < format.lowest or high > format.highest:
        raise FormatError(
            f"codes {low}..{high} are outside {format.lowest}..{format.highest} of {format} ({format.convention}): "
            "the weight was rounded to another format than the one it carries"
        )
    return (weight.codes.to(torch.int16) + offset(format)).to(torch.uint8)


def own_codes(stored: UInt8[Tensor, "out in"], format: WeightFormat) -> Tensor:
    """The inverse of `unsigned_codes`: [out, in], int8 or uint8. CheckpointError for codes that the format lacks."""
    codes = (stored.to(torch.int16) - offset(format)).to(code_dtype(format))
    low, high = (int(code) for code in codes.aminmax())
    if low < format.lowest or high > format.highest:
        raise CheckpointError(
            f"codes {low}..{high} are outside {format.lowest}..{format.highest} of {format} ({format.convention}): the "
            "tensors and the format that they are said to have do not belong together"
        )
    return codes


def offset(format: WeightFormat) -> int:
    """What is added to a code before it is packed: the stored code that stands for zero in a symmetric format."""
    return 2 ** (format.bits - 1) if format.symmetric else 0


def exact_scales(scales: Float[Tensor, "rows groups"], dtype: torch.dtype) -> Float[Tensor, "rows groups"]:
    """The scales in another type. FormatError if that would change one of them."""
    stored = scales.to(dtype)
    changed = (stored.to(scales.dtype) != scales) | ~torch.isfinite(stored)
    if changed.any():
        kind, limits = str(dtype).removeprefix("torch."), torch.finfo(dtype)
        raise FormatError(
            f"{int(changed.sum())} of {scales.numel()} scales, {float(scales[changed][0]):g} among them, are not "
            f"{kind} numbers (normal ones reach from {limits.smallest_normal:g} to {limits.max:g}): quantize with "
            f"`scale: {{kind: float, dtype: {kind}}}`, or with integer scales of `dtype: uint8` and an amplifier that is "
            "a power of two, which are exact; compressed-tensors keeps scales of every floating-point type"
        )
    return stored


def whole_zero_points(grid: Grid, format: WeightFormat) -> UInt8[Tensor, "rows groups"]:
    """Zero points as they are packed. FormatError if one is not a whole number among the codes."""
    if grid.zero_points is None:
        return torch.full(grid.scales.shape, offset(format), dtype=torch.uint8, device=grid.scales.device)
    points = grid.zero_points
    wrong = (points != points.round()) | (points < format.lowest) | (points > format.highest)
    if format.symmetric or wrong.any():
        example = float(points[wrong][0]) if wrong.any() else float(points.flatten()[0])
        raise FormatError(
            f"zero point {example:g} is not one of the codes {format.lowest}..{format.highest} of {format}: "
            "round zero points to codes of an asymmetric format before packing"
        )
    return points.to(torch.uint8)


def scale_dtype(format: WeightFormat) -> torch.dtype:
    """The type that the format's scales are stored in."""
    match format.scale:
        case FloatScale(dtype="model"):
            raise ValueError("resolve the scale's dtype against the model's first")
        case FloatScale(dtype=name):
            return SCALE_DTYPES[name]
        case IntegerScale():
            raise FormatError(f"scales {format.scale} are integers: they have no floating-point type")


def scale_dtypes(format: WeightFormat) -> tuple[torch.dtype, ...]:
    """The types that stored scales of the format may have: any for `model`."""
    if format.scale == FloatScale(dtype="model"):
        return tuple(SCALE_DTYPES.values())
    return (scale_dtype(format),)


def resolved(format: WeightFormat, stored: torch.dtype) -> WeightFormat:
    """The format with the scale dtype `model` replaced by the stored one."""
    if isinstance(format.scale, FloatScale) and format.scale.dtype == "model":
        name = next(name for name, dtype in SCALE_DTYPES.items() if dtype == stored)
        return format.model_copy(update={"scale": FloatScale.model_validate({"dtype": name})})
    return format


def present(tensors: Mapping[str, Tensor], suffix: str) -> Tensor:
    """One of a module's tensors. CheckpointError where it is missing."""
    if suffix not in tensors:
        raise CheckpointError(f"{suffix} is missing: download the checkpoint again, or quantize again")
    return tensors[suffix]


def check_stored(tensors: Mapping[str, Tensor], expected: Mapping[str, Stored]) -> None:
    """CheckpointError where a tensor is missing or has another shape or type than expected."""
    for suffix, (shape, dtypes) in expected.items():
        tensor = present(tensors, suffix)
        if tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
            kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise CheckpointError(
                f"{suffix} is {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} instead of {kinds} "
                f"{list(shape)}: the tensors and their config.json do not belong together, or are damaged"
            )
