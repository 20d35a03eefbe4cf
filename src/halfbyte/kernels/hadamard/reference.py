"""What the kernels here promise, in float64: the dense matrix, slow and plainly right."""

import torch
from jaxtyping import Float, Float32, Float64, Int8
from torch import Tensor


def sylvester(order: int) -> Float64[Tensor, "n n"]:
    """(-1)^(common bits of row and column)."""
    index = torch.arange(order)
    common = index[:, None] & index
    odd = sum(common >> place & 1 for place in range(order.bit_length()))
    return 1 - 2.0 * (torch.as_tensor(odd) % 2).double()


def matrix(size: int, core: Tensor) -> Float64[Tensor, "n n"]:
    """(H ⊗ core) / √n: orthogonal."""
    order = len(core)
    scaled = core.double().contiguous() / (order**0.5 if core.dtype == torch.int8 else 1)
    return torch.kron(sylvester(size // order), scaled) / (size // order) ** 0.5


def hadamard(x: Float[Tensor, "tokens n"], core: Tensor, signs: Tensor | None = None) -> Float64[Tensor, "tokens n"]:
    """x · diag(signs) · (H ⊗ core) / √n."""
    x = x.double() if signs is None else x.double() * signs
    return x @ matrix(x.shape[1], core)


def quantize(
    y: Float64[Tensor, "tokens n"], bits: int, clip: float
) -> tuple[Int8[Tensor, "tokens n"], Float32[Tensor, "tokens"]]:
    """round(y / scale) within ±(2^(bits-1) - 1), scale = clip · max |y| over that; 1 where a token is zero."""
    highest = 2 ** (bits - 1) - 1
    reach = clip * y.abs().amax(dim=1) / highest
    scales = torch.where(reach > 0, reach, 1.0).float()
    codes = (y / scales.double()[:, None]).round().clamp(-highest, highest)
    return codes.to(torch.int8), scales
