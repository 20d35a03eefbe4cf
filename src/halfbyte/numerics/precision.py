"""How exact products of float32 matrices are: settings of PyTorch that hold for a few lines and are put back."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def float32_products(*, tf32: bool) -> Iterator[None]:
    """Inside, operands are rounded to TF32 (10 bits of mantissa, several times faster) or not; afterwards as before."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32" if tf32 else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


@contextmanager
def exact_bfloat16_products(values_are_bfloat16: bool) -> Iterator[None]:
    """Lets a CPU multiply float32 operands as bfloat16, with float32 sums: exact where the values are bfloat16 anyway.

    AMX does this several times faster than float32. Without `values_are_bfloat16` nothing changes.
    """
    matmul = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
    before = matmul.fp32_precision
    if values_are_bfloat16:
        matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
