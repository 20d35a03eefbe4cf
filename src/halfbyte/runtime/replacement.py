"""What takes the place of an nn.Linear: QuantizedLinear, or IntegerLinear where its input is quantized too.

Decided here alone, by the two formats.
"""

from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor, nn

from halfbyte.layouts.compressed_tensors import CompressedTensors
from halfbyte.layouts.inputs import write_inputs
from halfbyte.layouts.layout import Layout
from halfbyte.numerics.quantized import QuantizedModule, QuantizedWeight
from halfbyte.runtime.integer_linear import IntegerLinear
from halfbyte.runtime.linear import LAYOUT, QuantizedLinear
from halfbyte.scheme import ActivationFormat, WeightFormat

Replacement = QuantizedLinear | IntegerLinear


def linear_for(
    format: WeightFormat,
    activations: ActivationFormat | None,
    in_features: int,
    out_features: int,
    *,
    bias: bool,
    outliers: int = 0,
    device: str | None = None,
) -> Replacement:
    """Room for a weight of `format` on inputs of format `activations` (None: as they come), to be filled and prepared.

    `outliers`: how many columns a static outlier set has, for a loader that fills buffers by their shapes.
    """
    if activations is None:
        return QuantizedLinear(in_features, out_features, in_words(format), bias=bias, device=device)
    return IntegerLinear(in_features, out_features, format, activations, bias=bias, outliers=outliers, device=device)


def from_module(module: QuantizedModule, bias: Float[Tensor, "out"] | None) -> Replacement:
    """What runs this module, on its weight's device, still to be prepared. FormatError where it cannot be stored."""
    weight, inputs = module.weight, module.inputs
    out, columns = weight.codes.shape
    activations = None if inputs is None else inputs.format
    room = linear_for(weight.format, activations, columns, out, bias=bias is not None, device="meta")
    tensors = LAYOUT.write(QuantizedWeight(weight.codes, weight.grid, room.format)) | write_inputs(module)
    return room.fill(tensors, bias).to(weight.codes.device)


def from_checkpoint(
    linear: nn.Linear,
    layout: Layout,
    tensors: Mapping[str, Tensor],
    bias: Float[Tensor, "out"] | None,
    format: WeightFormat,
    activations: ActivationFormat | None,
) -> Replacement:
    """What runs these tensors in place of `linear`. CheckpointError where they are not of these formats and its shape."""
    if not isinstance(layout, CompressedTensors) or (activations is None and format.stored == "bytes"):
        weight = layout.read(tensors, format)
        format = in_words(weight.format)
        tensors = LAYOUT.write(QuantizedWeight(weight.codes, weight.grid, format))
    room = linear_for(
        format, activations, linear.in_features, linear.out_features, bias=bias is not None, device="meta"
    )
    return room.fill(tensors, bias)


def in_words(format: WeightFormat) -> WeightFormat:
    """The format as QuantizedLinear stores it."""
    return format.model_copy(update={"stored": "words"})
