"""What this machine has and uses: device, memory, and its rate of products for time estimates."""

import resource
import sys
import time
from pathlib import Path

import torch

from halfbyte.errors import HalfbyteError


def pick_device(device: str) -> torch.device:
    """`auto` is the GPU where there is one. HalfbyteError for a device that is not here."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise HalfbyteError(f"device {device!r} is not known: use auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise HalfbyteError(
            "device cuda was asked for and PyTorch sees no GPU here: use --device cpu, or mend the driver"
        )
    return torch.device(device)


def pick_dtype(name: str, device: torch.device, stored: torch.dtype) -> torch.dtype:
    """`auto`: what the weights are stored in where the device multiplies it in hardware, else float32.

    On a CPU that is bfloat16 with AMX. HalfbyteError for a dtype of another name.
    """
    if name == "auto":
        amx = device.type == "cpu" and torch.cpu._is_amx_tile_supported()
        return stored if device.type != "cpu" or (amx and stored == torch.bfloat16) else torch.float32
    names = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if name not in names:
        raise HalfbyteError(f"dtype {name!r} is not known: use auto, {', '.join(names)}")
    return names[name]


def resident_memory() -> int:
    """Bytes that this process holds now; where the system does not say, the most it ever held."""
    return _of_status("VmRSS") or _most_resident()


def _most_resident() -> int:
    # getrusage is second choice: on Linux its peak starts at what the parent process held when it forked
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return _of_status("VmHWM") or (peak if sys.platform == "darwin" else peak * 1024)


def _of_status(field: str) -> int | None:
    """A field of Linux's /proc/self/status, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    return None


def start_measuring() -> None:
    """Forget earlier peaks of the device's memory."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory_used(device: torch.device) -> tuple[int, int]:
    """Peak bytes of this process on the host, and of PyTorch's tensors on the device since `start_measuring`."""
    return _most_resident(), torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def measured_flops(device: torch.device, size: int = 1024) -> float:
    """Operations a second of float32 products on this device, now."""
    left = torch.randn(size, size, device=device)
    float((left @ left)[0, 0])  # the first product pays for loading libraries
    rounds, start = 0, time.perf_counter()
    while time.perf_counter() - start < 0.2:
        float((left @ left)[0, 0])
        rounds += 1
    return rounds * 2 * size**3 / (time.perf_counter() - start)
