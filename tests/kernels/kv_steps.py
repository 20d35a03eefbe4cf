"""What the tests of attention on packed keys share: a step of decoding, and the kernels in the interpreter."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from without_layouts import interpreted

from closeness import relative_error
from halfbyte.kernels import kv_attention as kv
from halfbyte.kernels.kv_attention import (
    cuts,
    hopper_decode,
    operands,
    reference,
    triton_combine,
    triton_decode,
    turned_keys,
)
from halfbyte.kernels.kv_attention.cuts import Cut
from halfbyte.packing.code_bytes import pack

FAST = interpreted(hopper_decode, operands, turned_keys)
# float16 queries and shares are rounded once, by at most 2**-11 of themselves, and errors add up as their squares
TOLERANCE = 2.0**-10


class Step(NamedTuple):
    """Arguments of `decode_attention`, in order."""

    query: Tensor
    keys: kv.PackedTokens
    values: kv.PackedTokens
    last: Tensor
    key_now: Tensor
    value_now: Tensor
    first: Tensor | None = None
    exact: kv.ExactTokens | None = None
    smoothing: kv.Smoothing = kv.NO_SMOOTHING
    scaling: float | None = None
    rotation: kv.KeyRotation | None = None
    packed_query: Tensor | None = None


def packed(
    g: torch.Generator, shape: tuple[int, ...], dim: int, bits: int, groups: int, symmetric: bool
) -> kv.PackedTokens:
    codes = torch.randint(0, 2**bits, (*shape, dim), generator=g, dtype=torch.uint8)
    codes[0, 0, 0], codes[-1, -1, -1] = 0, 2**bits - 1
    steps = torch.rand((*shape, groups), generator=g).mul(0.3).add(0.02).mul(16 / 2**bits).half()
    zeros = None if symmetric else (torch.randn((*shape, groups), generator=g) - 1).half()
    return kv.PackedTokens(pack(codes, bits), steps, zeros)


def step(
    query_heads: int = 2, kv_heads: int = 1, capacity: int = 100, dim: int = 128, bits: int = 4, groups: int = 1,
    symmetric: bool = False, whole: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0, batch: int = 2,
) -> Step:  # fmt: skip
    """Rows of uneven length; `whole`: with padding, exact tokens and smoothing."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(dtype)

    shape = (batch, kv_heads, capacity)
    last = torch.randint(capacity // 2, capacity, (batch,), generator=g)
    last[-1] = capacity
    bare = Step(
        normal(batch, query_heads, dim), packed(g, shape, dim, bits, groups, symmetric),
        packed(g, shape, dim, bits, groups, symmetric), last, normal(batch, kv_heads, dim), normal(batch, kv_heads, dim),
    )  # fmt: skip
    if not whole:
        return bare
    exact = kv.ExactTokens(
        normal(batch, kv_heads, 19, dim), normal(batch, kv_heads, 19, dim), torch.rand(batch, 19, generator=g) > 0.3
    )
    smoothing = kv.Smoothing(*(torch.randn(kv_heads, dim, generator=g).abs() + 0.1 for _ in range(4)))
    return bare._replace(first=torch.tensor([3, 17])[:batch], exact=exact, smoothing=smoothing, scaling=0.07)


Decode = Callable[..., cuts.Partial]


def attend(decode: Decode, arguments: Step, cut: Cut, **options: Any) -> Tensor:
    """As `launch` does, with a kernel of the interpreter."""
    query, keys, values, last, key_now, value_now, first, exact, smoothing, scaling, rotation, packed_query = arguments
    scale = (query.shape[2] ** -0.5 if scaling is None else scaling) / math.log(2)
    asking = query if packed_query is None else packed_query
    partial = decode(
        asking, keys, values, last, first, smoothing.key_scale, scale, cut, early=False, key_shift=smoothing.key_shift,
        rotation=rotation, **options,
    )  # fmt: skip
    if rotation is not None:
        smoothing = smoothing._replace(key_shift=None)
    return triton_combine.combine(query, partial, key_now, value_now, exact, smoothing, scale, early=False)


def fast(arguments: Step, cut: Cut) -> Tensor:
    return attend(FAST.decode, arguments, cut, ptx=False)


def plain(arguments: Step, cut: Cut) -> Tensor:
    return attend(triton_decode.decode, arguments, cut)


def errors(found: Tensor, arguments: Step) -> float:
    assert found.shape == arguments.query.shape
    assert found.dtype == arguments.query.dtype
    return relative_error(found, reference.attention(*arguments))
