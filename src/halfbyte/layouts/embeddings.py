"""Tables of embeddings in 8 bits: `weight` int8 [rows, dim] and `embedding_scale` [rows, groups], formats in config.json.

    quantization_config: {embeddings: {path: {bits: 8, convention: odyssey, granularity: {kind: channel}, ...}}}

ZeroQuant (arXiv 2206.01861) quantizes BERT's tables so. No other reader knows them: the quant_method is our own.
"""

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from halfbyte.errors import CheckpointError
from halfbyte.numerics.grid import Grid, scales_shape
from halfbyte.numerics.quantized import QuantizedWeight
from halfbyte.scheme import WeightFormat

KEY = "embeddings"
SCALE = "embedding_scale"


def write_embedding(weight: QuantizedWeight) -> dict[str, Tensor]:
    """A table's tensors by their last names."""
    return {"weight": weight.codes.cpu().contiguous(), SCALE: weight.grid.scales.float().cpu().contiguous()}


def read_embedding(tensors: Mapping[str, Tensor], format: WeightFormat) -> QuantizedWeight:
    """The inverse. CheckpointError where a tensor is missing or not of this format."""
    if missing := {"weight", SCALE} - tensors.keys():
        raise CheckpointError(f"{' and '.join(sorted(missing))} of a quantized table is missing: download it again")
    codes, scales = tensors["weight"], tensors[SCALE]
    rows, dim = codes.shape
    expected = scales_shape(rows, dim, format.granularity)
    if codes.dtype != torch.int8 or tuple(scales.shape) != expected:
        raise CheckpointError(
            f"a table of {codes.dtype} with scales {list(scales.shape)} is no {format}, which has int8 and scales "
            f"{list(expected)}: config.json and the tensors do not belong together"
        )
    return QuantizedWeight(codes, Grid(scales), format)


def embedding_entry(formats: Mapping[str, WeightFormat]) -> dict[str, Any]:
    """The entry of a `quantization_config`; empty where no table is quantized."""
    return {KEY: {path: format.model_dump(mode="json") for path, format in formats.items()}} if formats else {}


def embedding_formats(config: Mapping[str, Any]) -> dict[str, WeightFormat]:
    """Path of a table -> its format. CheckpointError for an entry that is damaged."""
    try:
        return {path: WeightFormat.model_validate(fields) for path, fields in (config.get(KEY) or {}).items()}
    except (ValidationError, AttributeError) as cause:
        raise CheckpointError(f"{KEY} of config.json is damaged ({cause}): download the checkpoint again") from cause
