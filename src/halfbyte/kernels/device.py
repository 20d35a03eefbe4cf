"""What launches ask of the device that they run on."""

from functools import cache

import torch
from torch import Tensor


@cache
def processors(device: torch.device) -> int:
    """How many multiprocessors a GPU has; 1 on a CPU, where kernels are interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def overlaps(x: Tensor) -> bool:
    """Whether a launch may begin before the one ahead of it ends ("programmatic dependent launch"): from Hopper on."""
    return x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0)
