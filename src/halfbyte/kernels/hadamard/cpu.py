"""The rotation in plain torch, on any device: Sylvester's matrix as the Kronecker product of small ones.

tokens × [a, b, m] ─ · core ─► H_a over the first axis ─► H_b over the second, a · b = 2^k
"""

from functools import lru_cache
from math import sqrt

import torch
from jaxtyping import Float, Float32, Int8
from torch import Tensor

WIDEST = 64  # of the small matrices: below it a product is as fast as its additions


def hadamard(x: Float[Tensor, "tokens n"], core: Tensor, signs: Tensor | None) -> Float32[Tensor, "tokens n"]:
    """The rotated tokens in float32."""
    (tokens, ins), order = x.shape, len(core)
    power = ins // order
    y = x.float() if signs is None else x.float() * signs
    y = y.view(tokens, power, order)
    if order > 1:
        y = y @ core.float()
    done = 1
    while done < power:
        part = min(WIDEST, power // done)
        inner = power // (done * part) * order
        y = sylvester(part).to(y.device) @ y.reshape(tokens * done, part, inner)
        done *= part
    return y.reshape(tokens, ins) / sqrt(power * (order if core.dtype == torch.int8 else 1))


def quantize(
    y: Float32[Tensor, "tokens n"], bits: int, clip: float
) -> tuple[Int8[Tensor, "tokens n"], Float32[Tensor, "tokens"]]:
    """Codes and scales of each token."""
    highest = 2 ** (bits - 1) - 1
    reach = y.abs().amax(dim=1) * clip / highest
    scales = torch.where(reach > 0, reach, 1.0)
    return (y / scales[:, None]).round_().clamp_(-highest, highest).to(torch.int8), scales


@lru_cache(maxsize=16)
def sylvester(order: int) -> Float32[Tensor, "n n"]:
    """Sylvester's matrix of a small order."""
    matrix = torch.ones(1, 1, device="cpu")
    while len(matrix) < order:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix
