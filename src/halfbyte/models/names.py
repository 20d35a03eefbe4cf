"""Names of tensors inside a block: what transformers calls them in memory and what checkpoints call them on disk.

mlp.experts.3.gate_proj.weight   Mixtral's block, linearized
block_sparse_moe.experts.3.w1.weight   the same tensor in its safetensors file
"""

import re
from collections.abc import Mapping

from halfbyte.models.architecture import Architecture


def disk_name(architecture: Architecture, name: str) -> str:
    """What the checkpoint calls a module, parameter or buffer whose name in a linearized block is `name`."""
    return _renamed(name, architecture.disk_names)


def block_name(architecture: Architecture, name: str) -> str:
    """The inverse of `disk_name`."""
    return _renamed(name, {there: here for here, there in architecture.disk_names.items()})


def outer_disk_name(architecture: Architecture, name: str) -> str:
    """What the checkpoint calls a module or parameter outside the blocks; names are from the model's root."""
    return _renamed(name, architecture.outer_disk_names)


def outer_name(architecture: Architecture, name: str) -> str:
    """The inverse of `outer_disk_name`."""
    return _renamed(name, {there: here for here, there in architecture.outer_disk_names.items()})


def _renamed(name: str, patterns: Mapping[str, str]) -> str:
    """`name` with its leading module path replaced by the first pattern that matches it."""
    for pattern, replacement in patterns.items():
        found = re.match(re.escape(pattern).replace(r"\*", r"([^.]+)") + r"(?=\.|$)", name)
        if found:
            head = replacement.replace("*", found[1]) if "*" in pattern else replacement
            return head + name[found.end() :]
    return name
