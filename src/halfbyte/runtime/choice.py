"""Which kernels would run a checkpoint on this machine, without reading its weights."""

from collections import Counter
from pathlib import Path

import torch
from torch import nn

from halfbyte.machine import pick_device
from halfbyte.models.load import skeleton
from halfbyte.runtime.load import Formats, layout_and_formats, quantization_of
from halfbyte.runtime.replacement import linear_for


def kernels_here(folder: Path, *, device: str = "auto", trust_remote_code: bool = False) -> dict[str, int]:
    """Kernel -> how many of the quantized layers it would run, most first, in the dtype that `load` chooses.

    Empty for a model that is not quantized. CheckpointError where config.json does not fit the model.
    """
    quantization = quantization_of(folder)
    if not quantization:
        return {}
    place = pick_device(device)
    bones = skeleton(folder, trust_remote_code=trust_remote_code)
    stated = getattr(bones.config, "dtype", None)
    dtype = stated if place.type == "cuda" and isinstance(stated, torch.dtype) else torch.float32
    chosen: dict[tuple[Formats, int, int], str] = {}
    count: Counter[str] = Counter()
    for path, formats in layout_and_formats(quantization, bones)[1].items():
        linear = bones.model.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        key = (formats, linear.out_features, linear.in_features)
        if key not in chosen:
            chosen[key] = _kernel(*key, place, dtype)
        count[chosen[key]] += 1
    return dict(count.most_common())


def _kernel(formats: Formats, out: int, columns: int, device: torch.device, dtype: torch.dtype) -> str:
    """What a layer of these formats and shape chooses: asked of one whose weight is all zeros."""
    layer = linear_for(*formats, columns, out, bias=False, device=str(device))
    for name, buffer in layer.named_buffers():
        if name != "weight_shape":
            buffer.zero_()
    return layer.prepare(dtype).kernel
