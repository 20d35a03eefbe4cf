"""What every function of this room asks of its arguments; WeightError, with the remedy, where it is not so."""

import torch
from torch import Tensor

from halfbyte.errors import WeightError

ACTIVATION_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def activations(x: Tensor) -> None:
    """x is [tokens, in] of real numbers, and tokens have elements."""
    if x.dtype not in ACTIVATION_DTYPES or x.dim() != 2 or not x.shape[1]:
        raise WeightError(
            f"x is {x.dtype} {list(x.shape)}: give [tokens, in], at least one input, in one of {ACTIVATION_DTYPES}"
        )


def beside(x: Tensor, other: Tensor, name: str) -> None:
    """The other has the shape and the dtype of x."""
    if other.shape != x.shape or other.dtype != x.dtype:
        raise WeightError(
            f"the {name} is {other.dtype} {list(other.shape)}, but x {x.dtype} {list(x.shape)}: give two of a kind"
        )


def for_each_input(x: Tensor, vector: Tensor | None, name: str) -> None:
    """The vector, where there is one, has a number for each input."""
    if vector is not None and (vector.shape != x.shape[1:] or not vector.dtype.is_floating_point):
        raise WeightError(
            f"the {name} is {vector.dtype} {list(vector.shape)}, but x has {x.shape[1]} inputs: give one real number for each"
        )
