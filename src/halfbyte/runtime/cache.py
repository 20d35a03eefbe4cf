"""A transformers Cache whose past is packed codes: prefill attends in full precision and a token is quantized once.

WKVQuant, Yue et al., 2024 — https://arxiv.org/abs/2402.12065, past-only quantization

Of a layer's tokens the first `sinks` and the last `window` are kept as they came, the others as codes:

    position    0 .. sinks │ sinks .. until │ until .. length │ the call's own tokens
    kept as     exact      │ codes          │ exact           │ exact for attention, stored afterwards

Layout of the codes, for kernels: uint8 [batch, kv_heads, capacity, head_dim*bits/8], a token's codes contiguous along
the head dimension (packing/code_bytes.py); steps and zeros float16 [batch, kv_heads, capacity, groups]. Keys per channel
have theirs as [batch, kv_heads, capacity/block, head_dim]. Buffers grow by a sixteenth, so that appending a token copies
a bounded number of tokens on average. runtime/static_cache.py has the form of fixed size.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from halfbyte.errors import ModelError
from halfbyte.kernels.kv_attention import PackedTokens, Smoothing
from halfbyte.numerics.cache import Coder, LayerCoders, TokenCodes, rotate, tokens_to_store, unrotate
from halfbyte.packing.code_bytes import pack, unpack
from halfbyte.runtime.cache_rows import Rotation, Rotations, Rows
from halfbyte.runtime.online import OnlineRotation
from halfbyte.scheme import CacheFormat, OnlineHadamard


class Side:
    """The keys, or the values, of one layer."""

    def __init__(self, coder: Coder, format: CacheFormat, rotations: Rotations | None = None) -> None:
        self.coder, self.format, self.rotations = coder, format, rotations
        self.dim = 0
        self.sinks: Tensor | None = None
        self.tail: Tensor | None = None  # exact tokens after the codes
        self.codes, self.scales, self.zeros = Rows(2), Rows(2), Rows(2)

    @property
    def packed(self) -> PackedTokens:
        """The codes as kernels read them."""
        return PackedTokens(self.codes.taken, self.scales.taken, None if self.coder.symmetric else self.zeros.taken)

    @property
    def exact(self) -> Tensor:
        """Tokens that are kept as they came: sinks, then what comes after the codes."""
        return torch.cat([part for part in (self.sinks, self.tail) if part is not None], dim=2)

    @property
    def length(self) -> int:
        """Tokens in all."""
        exact = [part.shape[2] for part in (self.sinks, self.tail) if part is not None]
        return sum(exact) + self.codes.length

    def append(self, x: Float[Tensor, "batch heads tokens dim"]) -> None:
        """Keep new tokens, and quantize those that now come before the window, once and for all."""
        self.dim = x.shape[3]
        missing = self.format.sinks - (0 if self.sinks is None else self.sinks.shape[2])
        if missing > 0 and self.codes.length == 0:
            first = x[:, :, :missing]
            self.sinks = first.clone() if self.sinks is None else torch.cat([self.sinks, first], dim=2)
            x = x[:, :, missing:]
        waiting = x if self.tail is None else torch.cat([self.tail, x], dim=2)
        seen = self.codes.length + waiting.shape[2] + self.format.sinks
        count = max(tokens_to_store(seen, self.format, self.coder.block) - self.codes.length, 0)
        if count:
            self._store(waiting[:, :, :count])
        self.tail = waiting[:, :, count:].clone()

    def read(self, dtype: torch.dtype) -> Float[Tensor, "batch heads tokens dim"]:
        """All tokens as attention sees them."""
        parts = [self.sinks, self._decoded(dtype), self.tail]
        return torch.cat([part for part in parts if part is not None], dim=2)

    def crop(self, length: int) -> None:
        """Forget all but the first `length` tokens. Codes in a block that is cut wait in it again, as they decode."""
        first, past = self.format.sinks, self.format.sinks + self.codes.length
        if self.tail is not None:
            self.tail = self.tail[:, :, : max(length - past, 0)].clone()
        if length < past and self.codes.length:
            kept = max(length - first, 0)
            whole = kept // self.coder.block * self.coder.block
            if kept > whole and self.tail is not None:
                decoded = self._decoded(self.tail.dtype)
                assert decoded is not None
                self.tail = decoded[:, :, whole:kept].clone()
            self.codes.length = whole
            self.scales.length = self.zeros.length = whole // self.coder.block
        if self.sinks is not None:
            self.sinks = self.sinks[:, :, :length].clone()

    def change(self, change: Callable[[Tensor], Tensor]) -> None:
        """Let the batch become another one."""
        for rows in (self.codes, self.scales, self.zeros):
            rows.change(change)
        self.sinks = None if self.sinks is None else change(self.sinks)
        self.tail = None if self.tail is None else change(self.tail)

    @property
    def nbytes(self) -> int:
        exact = [part.nbytes for part in (self.sinks, self.tail) if part is not None]
        return sum(rows.nbytes for rows in (self.codes, self.scales, self.zeros)) + sum(exact)

    def _store(self, x: Float[Tensor, "batch heads tokens dim"]) -> None:
        first = self.format.sinks + self.codes.length
        if self.rotations is not None:
            x = unrotate(x, *self.rotations.of(first, first + x.shape[2]))
        encoded = self.coder.encode(x)
        self.codes.append(pack(encoded.codes, self.coder.bits))
        self.scales.append(encoded.scales)
        if encoded.zeros is not None:
            self.zeros.append(encoded.zeros)

    def _decoded(self, dtype: torch.dtype) -> Tensor | None:
        if self.codes.length == 0:
            return None
        codes = unpack(self.codes.taken, self.coder.bits, self.dim)
        zeros = None if self.zeros.buffer is None else self.zeros.taken
        decoded = self.coder.decode(TokenCodes(codes, self.scales.taken, zeros), dtype)
        if self.rotations is None:
            return decoded
        first = self.format.sinks
        return rotate(decoded, *self.rotations.of(first, first + self.codes.length)).to(dtype)


def turn_of(coder: Coder, keys: Float[Tensor, "batch heads tokens dim"]) -> OnlineRotation | None:
    """The rotation of stored keys, as a kernel computes it; None where there is none."""
    if not coder.turned:
        return None
    return OnlineRotation(OnlineHadamard(size=keys.shape[3], seed=None)).to(keys.device)


def smoothing_of(coders: LayerCoders, device: torch.device) -> Smoothing:
    """Shifts and scales of stored keys and values, as kernels read them."""
    parts = (part for coder in (coders.keys, coders.values) for part in (coder.shift, coder.scale))
    return Smoothing(*(None if part is None else part.to(device, torch.float32).contiguous() for part in parts))


class QuantizedLayer(CacheLayerMixin):
    """The cache of one layer; grows with the text."""

    is_croppable = True
    is_sliding = False
    reads_codes = False  # whether attention does (cache_decode.py)
    hands_on = False  # whether the last update handed on its own tokens alone, for attention to keep

    def __init__(self, coders: LayerCoders, format: CacheFormat, rotations: Rotations | None = None) -> None:
        super().__init__()
        self.coders, self.format, self.rotations = coders, format, rotations
        self.rotation: Rotation | None = None  # of the call's tokens, from the hook of runtime/cache_plan.py
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.key_side = Side(self.coders.keys, self.format, self.rotations)
        self.value_side = Side(self.coders.values, self.format)
        self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, _value_states: Tensor) -> None:
        """Take dtype and device from the first tokens."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.turn = turn_of(self.coders.keys, key_states)
        self.smoothing = smoothing_of(self.coders, self.device)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keep the call's tokens; what attention is to see: the past as it is stored, these tokens as they are."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.rotations is not None:
            if self.rotation is None:
                raise ModelError(
                    "a cache of keys before RoPE was not told the rotation of its tokens: make it with "
                    "halfbyte.runtime.cache_plan.new_cache after attach_cache(model, ...)"
                )
            self.rotations.extend(self.rotation, self.get_seq_length())
        pairs = (self.key_side, key_states), (self.value_side, value_states)
        if not self.format.past_only:
            for side, new in pairs:
                side.append(new)
            return self.key_side.read(key_states.dtype), self.value_side.read(value_states.dtype)
        self.hands_on = self.reads_codes and key_states.shape[2] == 1 and self.key_side.codes.length > 0
        if self.hands_on:
            return key_states, value_states  # attention reads the past by itself, and then calls `keep`
        seen = [torch.cat([side.read(new.dtype), new], dim=2) if side.length else new for side, new in pairs]
        self.keep(key_states, value_states)
        return seen[0], seen[1]

    def keep(self, key_states: Tensor, value_states: Tensor) -> None:
        """Store tokens that attention has used as they are."""
        self.key_side.append(key_states)
        self.value_side.append(value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Tokens that the mask is for, and the first one's position."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens in the cache."""
        return self.key_side.length

    def get_max_length(self) -> int:
        """No end."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -`tokens_to_remove` tokens. ModelError for a positive number."""
        if tokens_to_remove > 0:
            raise ModelError(f"a cache is cropped by a negative number of tokens, and {tokens_to_remove} is positive")
        length = max(self.get_seq_length() + tokens_to_remove, 0)
        for side in (self.key_side, self.value_side):
            side.crop(length)

    def reorder_cache(self, beam_idx: Int64[Tensor, "batch"]) -> None:
        """Let every row of the batch go on from another one's past."""
        self.change(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row of the batch `repeats` times."""
        self.change(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these rows of the batch."""
        self.change(lambda x: x[indices])

    def change(self, change: Callable[[Tensor], Tensor]) -> None:
        for side in (self.key_side, self.value_side):
            side.change(change)

    def offload(self) -> None:
        """Move the layer to the host's memory."""
        self.change(lambda x: x.to("cpu"))

    def prefetch(self) -> None:
        """Move the layer back."""
        if self.is_initialized:
            self.change(lambda x: x.to(self.device))

    @property
    def nbytes(self) -> int:
        """Bytes of the layer's tensors, room to grow included."""
        return self.key_side.nbytes + self.value_side.nbytes


class QuantizedCache(Cache):
    """One quantized layer per layer of the model. Pass it to a model, or to its `generate`, as `past_key_values`."""

    layers: Any

    def __init__(self, layers: list[Any], rotations: Sequence[Any] = ()) -> None:
        super().__init__(layers=layers)
        self.rotations = list(rotations)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, room to grow included."""
        return sum(layer.nbytes for layer in self.layers) + sum(shared.nbytes for shared in self.rotations)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -`tokens_to_remove` tokens."""
        super().crop(tokens_to_remove)
        for shared in self.rotations:
            shared.crop(self.get_seq_length())

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        for shared in self.rotations:
            shared.crop(0)

    def reorder_cache(self, beam_idx: Int64[Tensor, "batch"]) -> None:
        """Let every row of the batch go on from another one's past."""
        for layer in self.layers:
            layer.reorder_cache(beam_idx)
        self._change(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row of the batch `repeats` times."""
        super().batch_repeat_interleave(repeats)
        self._change(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these rows of the batch."""
        super().batch_select_indices(indices)
        self._change(lambda x: x[indices])

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        for shared in self.rotations:
            shared.change(change)
