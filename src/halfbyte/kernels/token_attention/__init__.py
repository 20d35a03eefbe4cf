"""A step of decoding on a cache in 16 bits: RoPE, the new token's place in the cache, and attention, in one launch.

`attend_token` is the `torch.library` op `torch.ops.halfbyte.token_attention`, with a fake implementation for
`torch.compile` and CUDA graphs: the number of past tokens is read where it is, on the GPU. It is for batches whose rows
are equally long, which is what spares them a mask. On a CPU it is plain torch.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from halfbyte.errors import WeightError
from halfbyte.kernels.token_attention import reference


def fits(key_dim: int, value_dim: int) -> bool:
    """Whether heads of such sizes can be attended to: powers of two, and alike."""
    return key_dim == value_dim and key_dim & (key_dim - 1) == 0


def attend_token(
    qkv: Float[Tensor, "batch heads_and_twice_kv_heads_times_dim"],
    cos: Float[Tensor, "rows dim"],
    sin: Float[Tensor, "rows dim"],
    keys: Float[Tensor, "batch kv_heads capacity dim"],
    values: Float[Tensor, "batch kv_heads capacity dim"],
    position: Int[Tensor, "1"],
    counters: Int[Tensor, "counts"],
    scaling: float,
) -> Float[Tensor, "batch heads_times_dim"]:
    """What the new token of each row sees: itself and the `position` tokens before it, softmax in float32.

    `qkv`: a row's queries, keys and values before RoPE, head after head; `cos` and `sin` of the new position, a row for
    each or one for all. Writes the rotated key and the value of each row into `keys` and `values` at `position`, which
    has to be less than their capacity. `counters`: int32, at least one for each row and head of keys, zero before and
    after; launches that share them must not overlap. Raises WeightError where shapes or dtypes disagree.
    """
    return _op(qkv, cos, sin, keys, values, position, counters, scaling)


@torch.library.custom_op("halfbyte::token_attention", mutates_args=("keys", "values", "counters"), device_types="cpu")
def _op(
    qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, position: Tensor, counters: Tensor, scaling: float
) -> Tensor:  # fmt: skip
    _check(qkv, cos, sin, keys, values, position, counters)
    return reference.attend_token(qkv, cos, sin, keys, values, int(position), scaling)


@_op.register_kernel("cuda")
def _on_cuda(
    qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, position: Tensor, counters: Tensor, scaling: float
) -> Tensor:  # fmt: skip
    _check(qkv, cos, sin, keys, values, position, counters)
    # imported here: triton exists only where there is something to run it on
    from halfbyte.kernels.token_attention import triton_token

    with torch.cuda.device_of(qkv):  # triton launches on the current device, which need not be where the tokens are
        return triton_token.attend_token(qkv, cos, sin, keys, values, position, counters, scaling)


@_op.register_fake
def _shape_of(
    qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, position: Tensor, counters: Tensor, scaling: float
) -> Tensor:  # fmt: skip
    del scaling  # a fake has its op's signature
    heads = _check(qkv, cos, sin, keys, values, position, counters)
    return qkv.new_empty(len(qkv), heads * keys.shape[3])


def _check(
    qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, position: Tensor, counters: Tensor
) -> int:
    """The number of query heads. WeightError where the arguments are not of one step."""
    batch, kv_heads, _, dim = keys.shape
    heads = qkv.shape[1] // dim - 2 * kv_heads
    if qkv.shape != (batch, (heads + 2 * kv_heads) * dim) or heads < 1 or heads % kv_heads:
        raise WeightError(
            f"queries, keys and values are {list(qkv.shape)}, and the cache is {list(keys.shape)}: give a row for each "
            "of its rows, with so many heads of queries for each head of keys"
        )
    if (
        values.shape != keys.shape
        or keys.dtype != values.dtype
        or not keys.is_contiguous()
        or not values.is_contiguous()
    ):
        raise WeightError(f"keys are {list(keys.shape)} and values {list(values.shape)}: give two contiguous alike")
    if cos.shape != sin.shape or cos.shape[-1] != dim or cos.shape[0] not in (1, batch) or cos.dim() != 2:
        raise WeightError(
            f"cosines are {list(cos.shape)}, sines {list(sin.shape)}: give [1 or {batch}, {dim}], RoPE over whole heads"
        )
    if not fits(dim, dim) or qkv.dtype != keys.dtype:
        raise WeightError(f"heads of {dim} in {qkv.dtype}, a cache in {keys.dtype}: powers of two and one dtype fit")
    if position.numel() != 1 or counters.dtype != torch.int32 or counters.numel() < batch * kv_heads:
        raise WeightError(
            f"{position.numel()} positions and {counters.numel()} counters: give one and int32 {batch * kv_heads}"
        )
    return heads
