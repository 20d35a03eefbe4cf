"""What a checkpoint holds of a module's input: the tensors beside its weight, and the entry in config.json.

    input_scale       float32  [1]        static formats; compressed-tensors' own name
    input_zero_point  int8     [1]        static asymmetric formats; likewise
    outlier_columns   int32    [n]        of a static outlier set, ascending; ours alone
    outlier_weight    float    [out, n]   the columns of the weight that are kept as they were (all of them where the
                                          set is dynamic); ours alone

An outlier split is told by the key `outliers` of the config group, a clipped range by `input_clip`, which no other reader
knows: such checkpoints carry our own quant_method.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from halfbyte.errors import CheckpointError
from halfbyte.numerics.activations import InputQuantizer
from halfbyte.numerics.quantized import QuantizedModule
from halfbyte.scheme import ActivationFormat, OutlierSplit

SUFFIXES = ("input_scale", "input_zero_point", "outlier_columns", "outlier_weight")


def write_inputs(module: QuantizedModule) -> dict[str, Tensor]:
    """The tensors beside the weight, by suffix, contiguous, on the CPU."""
    inputs = module.inputs
    if inputs is None:
        return {}
    tensors = {
        "input_scale": None if inputs.scale is None else inputs.scale.to(torch.float32),
        "input_zero_point": None if inputs.zero_point is None else inputs.zero_point.to(torch.int8),
        "outlier_columns": inputs.outlier_columns,
        "outlier_weight": module.kept,
    }
    return {suffix: tensor.cpu().contiguous() for suffix, tensor in tensors.items() if tensor is not None}


def read_inputs(
    tensors: Mapping[str, Tensor], format: ActivationFormat, out: int, columns: int
) -> tuple[InputQuantizer, Tensor | None]:
    """The inverse of `write_inputs` for an [out, columns] weight. CheckpointError where the tensors are not of `format`."""
    split = format.outliers
    listed = split is not None and split.columns == "static"
    count = len(_present(tensors, "outlier_columns")) if listed else columns
    wanted = {
        "input_scale": (1,) if not format.dynamic else None,
        "input_zero_point": (1,) if not (format.dynamic or format.symmetric) else None,
        "outlier_columns": (count,) if listed else None,
        "outlier_weight": (out, count) if split is not None and split.weights == "kept" else None,
    }
    for suffix, shape in wanted.items():
        if shape is None and suffix in tensors:
            raise CheckpointError(f"{suffix} is there, which inputs of format {format} lack: config.json is of another")
        if shape is not None and tuple(_present(tensors, suffix).shape) != shape:
            raise CheckpointError(
                f"{suffix} is {list(tensors[suffix].shape)} instead of {list(shape)}: the tensors are damaged, or of "
                "another config.json; download the checkpoint again"
            )
    chosen = tensors.get("outlier_columns")
    if chosen is not None and len(chosen) and not 0 <= int(chosen.min()) <= int(chosen.max()) < columns:
        raise CheckpointError(f"outlier_columns leave 0..{columns - 1}: download the checkpoint again")
    zero_point = tensors.get("input_zero_point")
    quantizer = InputQuantizer(
        format,
        scale=tensors.get("input_scale"),
        zero_point=None if zero_point is None else zero_point.to(torch.float32),
        outlier_columns=chosen,
    )
    return quantizer, tensors.get("outlier_weight")


def _present(tensors: Mapping[str, Tensor], suffix: str) -> Tensor:
    if suffix not in tensors:
        raise CheckpointError(f"{suffix} is missing: download the checkpoint again, or quantize again")
    return tensors[suffix]


def input_arguments(format: ActivationFormat) -> dict[str, Any]:
    """The `input_activations` entry of a config group: compressed-tensors' QuantizationArgs."""
    return {
        "num_bits": format.bits,
        "type": "int",
        "symmetric": format.symmetric,
        "strategy": format.granularity,
        "group_size": format.group_size,
        "dynamic": format.dynamic,
    }


def activation_format(group: Mapping[str, Any]) -> ActivationFormat | None:
    """The format of a config group's inputs; None where they stay as they are. CheckpointError for others than ours."""
    entry = group.get("input_activations")
    if entry is None:
        return None
    split, clip = group.get("outliers"), group.get("input_clip")
    kind, dynamic = entry.get("type", "int"), entry.get("dynamic", False)
    try:
        if kind != "int" or dynamic not in (True, False):
            raise ValueError(f"{kind} activations, dynamic: {dynamic}")
        return ActivationFormat(
            bits=entry.get("num_bits", 8),
            symmetric=entry.get("symmetric", True),
            granularity=entry.get("strategy") or "tensor",
            group_size=entry.get("group_size"),
            dynamic=dynamic,
            clip=1.0 if clip is None else clip,
            outliers=None if split is None else OutlierSplit.model_validate(split),
        )
    except ValueError as cause:
        raise CheckpointError(
            f"config.json asks for inputs that halfbyte does not know ({cause}): use the program that wrote the checkpoint"
        ) from cause
