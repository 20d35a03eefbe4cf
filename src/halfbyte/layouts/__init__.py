"""Checkpoints that other engines read: one file per layout, each a pair of inverses, and what is done with folders.

layout.py              what a layout can do, and the rules that all share
compressed_tensors.py  the layout that we write by default
gptq.py, awq.py        the two older ones
folder.py              an output folder that is complete or absent
convert.py             a finished checkpoint in another layout
inspect.py             what a checkpoint folder holds, and whether it is intact
"""

from collections.abc import Mapping
from typing import Any

from halfbyte.errors import CheckpointError
from halfbyte.layouts.awq import Awq
from halfbyte.layouts.compressed_tensors import OWN, CompressedTensors
from halfbyte.layouts.gptq import Gptq
from halfbyte.layouts.layout import Layout

LAYOUTS: dict[str, Layout] = {
    "compressed-tensors": CompressedTensors(),
    "gptq": Gptq(),
    "gptq_v2": Gptq(version=2),
    "awq": Awq(),
}


def layout_of(config: Mapping[str, Any]) -> Layout:
    """The layout of a `quantization_config`. CheckpointError where it is none that we read."""
    method = str(config.get("quant_method") or "").lower()
    if method == "gptq" and (config.get("checkpoint_format") or config.get("format")) == "gptq_v2":
        method = "gptq_v2"
    if method == OWN.name:
        return OWN
    if method not in LAYOUTS:
        raise CheckpointError(
            f"quant_method {method!r} is none of {', '.join(LAYOUTS)}: use the program that wrote the checkpoint, or "
            "quantize the original model"
        )
    return LAYOUTS[method]
