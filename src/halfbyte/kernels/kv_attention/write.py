"""New keys and values to codes, in their places of a cache: how a token enters it, once and for all.

    value here   code · scale + zero            scale = (max - min) / (2^b - 1) and zero = min, both float16
    symmetric    (code - 2^(b-1)) · scale       scale = max |x| / (2^(b-1) - 1)

Codes are chosen for the stored float16 numbers, after the static shift and scale of every channel. On CUDA one kernel
for keys and values together; codes that do not fill bytes, and odd sizes, in plain torch.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from halfbyte.errors import FormatError
from halfbyte.kernels.kv_attention.tokens import NO_SMOOTHING, PackedTokens, Smoothing
from halfbyte.packing.code_bytes import bytes_for, pack

LARGEST = torch.finfo(torch.float16).max


def write_tokens(
    keys: PackedTokens,
    values: PackedTokens,
    key: Float[Tensor, "batch kv_heads tokens dim"],
    value: Float[Tensor, "batch kv_heads tokens dim"],
    position: Int[Tensor, "batch"],
    smoothing: Smoothing = NO_SMOOTHING,
) -> None:
    """Quantize tokens and write them to the rows `position`, `position` + 1, ... of each row's cache. Edits both caches.

    Magnitudes above 65504 take float16's largest number. Positions are not looked at: they must be within the capacity.
    Raises FormatError where the arguments disagree.
    """
    torch.ops.halfbyte.kv_write(*keys, *values, key, value, position, *smoothing)


@torch.library.custom_op(
    "halfbyte::kv_write",
    mutates_args=("key_codes", "key_scales", "key_zeros", "value_codes", "value_scales", "value_zeros"),
    device_types="cpu",
)
def _op(
    key_codes: Tensor, key_scales: Tensor, key_zeros: Tensor | None, value_codes: Tensor, value_scales: Tensor,
    value_zeros: Tensor | None, key: Tensor, value: Tensor, position: Tensor, key_shift: Tensor | None,
    key_scale: Tensor | None, value_shift: Tensor | None, value_scale: Tensor | None,
) -> None:  # fmt: skip
    keys, values = PackedTokens(key_codes, key_scales, key_zeros), PackedTokens(value_codes, value_scales, value_zeros)
    _check(keys, values, key, value, position)
    _write_in_torch(keys, key, position, key_shift, key_scale)
    _write_in_torch(values, value, position, value_shift, value_scale)


@_op.register_kernel("cuda")
def _on_cuda(
    key_codes: Tensor, key_scales: Tensor, key_zeros: Tensor | None, value_codes: Tensor, value_scales: Tensor,
    value_zeros: Tensor | None, key: Tensor, value: Tensor, position: Tensor, key_shift: Tensor | None,
    key_scale: Tensor | None, value_shift: Tensor | None, value_scale: Tensor | None,
) -> None:  # fmt: skip
    keys, values = PackedTokens(key_codes, key_scales, key_zeros), PackedTokens(value_codes, value_scales, value_zeros)
    _check(keys, values, key, value, position)
    # imported here: triton exists only where there is something to run it on
    from halfbyte.kernels.kv_attention import triton_write

    if not key.numel():
        return
    if not triton_write.can_write(key.shape[3], keys, values):
        _write_in_torch(keys, key, position, key_shift, key_scale)
        _write_in_torch(values, value, position, value_shift, value_scale)
        return
    smoothing = [
        None if part is None else part.float().contiguous()
        for part in (key_shift, key_scale, value_shift, value_scale)
    ]  # fmt: skip
    key, value = (x if x.stride(3) == 1 else x.contiguous() for x in (key, value))
    with torch.cuda.device_of(key):  # triton launches on the current device, which need not be where the tokens are
        triton_write.write(keys, values, key, value, position, smoothing)


@_op.register_fake
def _fake(
    key_codes: Tensor, key_scales: Tensor, key_zeros: Tensor | None, value_codes: Tensor, value_scales: Tensor,
    value_zeros: Tensor | None, key: Tensor, value: Tensor, position: Tensor, key_shift: Tensor | None,
    key_scale: Tensor | None, value_shift: Tensor | None, value_scale: Tensor | None,
) -> None:  # fmt: skip
    del key_shift, key_scale, value_shift, value_scale  # a fake has its op's signature
    keys, values = PackedTokens(key_codes, key_scales, key_zeros), PackedTokens(value_codes, value_scales, value_zeros)
    _check(keys, values, key, value, position)


def _write_in_torch(
    tokens: PackedTokens, x: Tensor, position: Tensor, shift: Tensor | None, scale: Tensor | None
) -> None:
    bits = tokens.codes.shape[3] * 8 // x.shape[3]
    codes, steps, lows = _quantized(x, bits, tokens.scales.shape[3], tokens.zeros is None, shift, scale)
    batch, kv_heads, count = x.shape[:3]
    rows = position.long()[:, None] + torch.arange(count, device=x.device)
    at = rows[:, None, :, None].expand(batch, kv_heads, count, 1)
    pairs = [(tokens.codes, pack(codes, bits)), (tokens.scales, steps)]
    if tokens.zeros is not None:
        pairs.append((tokens.zeros, lows))
    for kept, new in pairs:
        kept.scatter_(2, at.expand_as(new), new)


def _quantized(
    x: Tensor, bits: int, groups: int, symmetric: bool, shift: Tensor | None, scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, steps and lowest numbers."""
    wide = x.float()
    if shift is not None:
        wide = wide - shift.float()[:, None]
    if scale is not None:
        wide = wide / scale.float()[:, None]
    grouped = wide.unflatten(3, (groups, -1))
    low, high = grouped.aminmax(dim=4, keepdim=True)
    lows, least, reach = _stored(low), 0, 2**bits - 1
    if symmetric:
        lows, least, reach = torch.zeros_like(lows), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    steps = _stored((torch.maximum(-low, high) if symmetric else high - lows.float()) / reach)
    step = steps.float()
    ratio = torch.where(step > 0, (grouped - lows.float()) / torch.where(step > 0, step, 1), 0)
    codes = ratio.round().clamp(least, least + 2**bits - 1) - least
    return codes.to(torch.uint8).flatten(3), steps.squeeze(4), lows.squeeze(4)


def _stored(x: Tensor) -> Tensor:
    return x.clamp(-LARGEST, LARGEST).to(torch.float16)


def _check(keys: PackedTokens, values: PackedTokens, key: Tensor, value: Tensor, position: Tensor) -> None:
    """Raise FormatError unless the tokens fit the caches."""
    if key.dim() != 4 or key.shape != value.shape or key.dtype != value.dtype or not key.dtype.is_floating_point:
        raise FormatError(
            f"keys to write are {key.dtype} {list(key.shape)}, values {value.dtype} {list(value.shape)}: give two "
            "[batch, kv_heads, tokens, dim] of one dtype"
        )
    batch, kv_heads, _, dim = key.shape
    if position.shape != (batch,) or position.dtype not in (torch.int32, torch.int64):
        raise FormatError(
            f"positions are {position.dtype} {list(position.shape)}: give {batch} integers, one for each row"
        )
    for name, tokens in (("keys", keys), ("values", values)):
        codes, scales, zeros = tokens
        bits = codes.shape[-1] * 8 // dim
        groups = scales.shape[-1]
        fits = codes.dtype == torch.uint8 and scales.dtype == torch.float16 and 2 <= bits <= 8 and dim % groups == 0
        if not fits or codes.shape[:2] != (batch, kv_heads) or bytes_for(dim, bits) != codes.shape[-1]:
            raise FormatError(
                f"the cache of {name} has {codes.dtype} codes {list(codes.shape)} and {scales.dtype} scales "
                f"{list(scales.shape)}: give one for [{batch}, {kv_heads}, tokens, {dim}]"
            )
        if scales.shape[:3] != codes.shape[:3] or (zeros is not None and zeros.stride() != scales.stride()):
            raise FormatError(f"scales and zeros of the {name} lie differently: give them as runtime caches keep them")
        if not all(part[0, 0].is_contiguous() for part in (codes, scales)):
            raise FormatError(
                f"tokens of the {name} lie apart: give codes and scales with each head's tokens contiguous"
            )
