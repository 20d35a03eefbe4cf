"""The tensors of a quantized linear before they are read: names, shapes and types as layouts/ stores them."""

import torch
from torch import Tensor

from halfbyte.layouts.layout import scale_dtype
from halfbyte.numerics.grid import scales_shape
from halfbyte.packing import int32_words
from halfbyte.scheme import ActivationFormat, FloatScale, IntegerScale, PerTensor, WeightFormat


def weight_room(out: int, columns: int, format: WeightFormat, device: str | None = None) -> dict[str, Tensor]:
    """The tensors of an [out, columns] weight (layouts/compressed_tensors.py), uninitialised."""
    rows, groups = scales_shape(out, columns, format.granularity)
    scales = (1,) if format.granularity == PerTensor() else (rows, groups)
    if isinstance(format.scale, IntegerScale):
        tensors = {
            "weight_scale": torch.empty(scales, dtype=torch.int16, device=device),  # which holds uint8 too
            "weight_amplifier": torch.empty(out, device=device),
            "weight_reach": torch.empty(out, dtype=torch.int32, device=device),
        }
    else:
        # float32 holds every type that scales are stored in
        stored = torch.float32 if format.scale == FloatScale(dtype="model") else scale_dtype(format)
        tensors = {"weight_scale": torch.empty(scales, dtype=stored, device=device)}
    if format.stored == "bytes":
        tensors["weight"] = torch.empty(out, columns, dtype=torch.int8, device=device)
        zeros = torch.empty(rows, groups, dtype=torch.int8, device=device)
    else:
        words = int32_words.words_for(columns, format.bits)
        tensors["weight_packed"] = torch.empty(out, words, dtype=torch.int32, device=device)
        tensors["weight_shape"] = torch.tensor([out, columns], device=device)
        words = int32_words.words_for(out, format.bits)
        zeros = torch.empty(words, groups, dtype=torch.int32, device=device)
    return tensors if format.symmetric else tensors | {"weight_zero_point": zeros}


def input_room(
    out: int, columns: int, format: ActivationFormat, outliers: int = 0, device: str | None = None
) -> dict[str, Tensor]:
    """The tensors of its input (layouts/inputs.py), uninitialised; `outliers`: how many columns a static set has."""
    tensors: dict[str, Tensor] = {}
    if not format.dynamic:
        tensors["input_scale"] = torch.empty(1, device=device)
        if not format.symmetric:
            tensors["input_zero_point"] = torch.empty(1, dtype=torch.int8, device=device)
    split = format.outliers
    if split is not None and split.columns == "static":
        tensors["outlier_columns"] = torch.empty(outliers, dtype=torch.int32, device=device)
    if split is not None and split.weights == "kept":
        kept = outliers if split.columns == "static" else columns
        tensors["outlier_weight"] = torch.empty(out, kept, device=device)
    return tensors
