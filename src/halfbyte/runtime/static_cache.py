"""The quantized cache in buffers of fixed size and address, for torch.compile and CUDA graphs.

Codes of every token are written when it comes, beside exact copies of the sinks and of the last `window` tokens:

    key_codes, value_codes     uint8    [batch, kv_heads, capacity, head_dim*bits/8]   token t in row t
    key_scales, ..., zeros     float16  [batch, kv_heads, capacity, groups]            (symmetric: no zeros)
    exact, then    sinks       model's  [batch, kv_heads, sinks, head_dim]             token t in row t
                   window      model's  [batch, kv_heads, window + 1, head_dim]        token t in row t % (window + 1)

The window has a row more than it has tokens: a new one is written before attention reads those that it has not left.

A prompt that finds the cache empty attends to itself, and nothing is decoded. Keys before RoPE: static_rotations.py.
`length` is a tensor, so that a step depends on no number that the graph would hold on to.
"""

from copy import copy
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from halfbyte.errors import FormatError, ModelError
from halfbyte.kernels.kv_attention import KeptTokens, PackedTokens, write_tokens
from halfbyte.kernels.kv_attention.kept import row_of, rows_of
from halfbyte.numerics.cache import Coder, LayerCoders, TokenCodes
from halfbyte.packing.code_bytes import bytes_for, pack, unpack
from halfbyte.runtime.cache import QuantizedCache, smoothing_of, turn_of
from halfbyte.runtime.cache_rows import Rotation
from halfbyte.runtime.static_rotations import StaticRotations, before
from halfbyte.scheme import CacheFormat


class StaticSide:
    """The keys, or the values, of one layer."""

    def __init__(
        self, coder: Coder, format: CacheFormat, capacity: int, like: Float[Tensor, "batch heads _ dim"],
        rotations: StaticRotations | None = None,
    ) -> None:  # fmt: skip
        batch, heads, _, self.dim = like.shape
        self.coder, self.format, self.rotations = coder, format, rotations
        groups = coder.groups(self.dim)
        size = bytes_for(self.dim, coder.bits)
        self.codes = torch.zeros(batch, heads, capacity, size, dtype=torch.uint8, device=like.device)
        self.scales = torch.zeros(batch, heads, capacity, groups, dtype=torch.float16, device=like.device)
        self.zeros = None if coder.symmetric else torch.zeros_like(self.scales)
        self.exact = like.new_zeros(batch, heads, rows_of(format.sinks, format.window), self.dim)

    @property
    def tensors(self) -> list[Tensor]:
        """Everything that is stored."""
        return [x for x in (self.codes, self.scales, self.zeros, self.exact) if x is not None]

    def of_rows(self, first: int, last: int, rotations: StaticRotations | None = None) -> "StaticSide":
        """These rows of the batch, in the same memory."""
        part = copy(self)
        part.codes, part.scales = self.codes[first:last], self.scales[first:last]
        part.zeros = None if self.zeros is None else self.zeros[first:last]
        part.exact, part.rotations = self.exact[first:last], rotations
        return part

    @property
    def packed(self) -> PackedTokens:
        """All rows as kernels read and write them."""
        return PackedTokens(self.codes, self.scales, self.zeros)

    @property
    def sinks(self) -> Tensor:
        return self.exact[:, :, : self.format.sinks]

    @property
    def window(self) -> Tensor:
        return self.exact[:, :, self.format.sinks :]

    def step(
        self, x: Float[Tensor, "batch heads new dim"], length: Int64[Tensor, ""], stored: Tensor | None = None
    ) -> Tensor:
        """Store new tokens after the first `length`; all rows as attention is to see them, those beyond not yet real.

        `stored`: the tokens as they are to be stored, where that is before RoPE.
        """
        new = x.shape[2]
        places = torch.arange(new, device=x.device) + length
        encoded = self.coder.encode(x if stored is None else stored)
        self.codes.index_copy_(2, places, pack(encoded.codes, self.coder.bits))
        self.scales.index_copy_(2, places, encoded.scales)
        if self.zeros is not None and encoded.zeros is not None:
            self.zeros.index_copy_(2, places, encoded.zeros)
        codes = unpack(self.codes, self.coder.bits, self.dim)
        seen = self.coder.decode(TokenCodes(codes, self.scales, self.zeros), x.dtype)
        if self.rotations is not None:
            seen = self.rotations.after(seen)
        if self.format.past_only:
            self._recall(seen, length)
            seen.index_copy_(2, places, x)
        self._remember(x, places)
        if not self.format.past_only:
            self._recall(seen, length + new)
        if self.format.sinks:
            seen[:, :, : self.format.sinks] = self.sinks
        return seen

    def _recall(self, seen: Tensor, length: Tensor) -> None:
        """Put the window's exact tokens in the place of their codes. Edits `seen`."""
        if not self.format.window:
            return
        held = length - self.format.window + torch.arange(self.format.window, device=seen.device)
        kept = self.window.index_select(2, held % self.window.shape[2])
        # where there are fewer tokens, what is no token goes to a place beyond them, which is not real yet
        seen.index_copy_(2, torch.where(held < 0, held + self.format.window, held), kept)

    def _remember(self, x: Tensor, places: Tensor) -> None:
        """Keep exact copies where the window and the sinks ask for them."""
        sinks, ring = self.format.sinks, self.window.shape[2]
        if not ring:
            return
        if x.shape[2] == 1:  # in one piece, which a compiler writes in place
            self.exact.index_copy_(2, row_of(places, sinks, self.format.window), x)
            return
        self.window.index_copy_(2, places[-ring:] % ring, x[:, :, -ring:])
        if sinks:
            first = torch.arange(sinks, device=x.device)
            at = (first - places[0]).clamp(0, x.shape[2] - 1)
            here = (first >= places[0]) & (first <= places[-1])
            self.sinks.copy_(torch.where(here[:, None], x.index_select(2, at), self.sinks))


class StaticQuantizedLayer(CacheLayerMixin):
    """The cache of one layer, of at most `capacity` tokens."""

    is_compileable = True
    is_sliding = False
    reads_codes = False  # whether attention does (cache_decode.py)
    hands_on = False  # whether the last update handed on its own tokens alone, for attention to keep

    def __init__(
        self, coders: LayerCoders, format: CacheFormat, capacity: int, rotations: StaticRotations | None = None,
        leads: bool = True,
    ) -> None:  # fmt: skip
        """`leads`: of the layers that share rotations, the one that comes first."""
        super().__init__()
        if format.keys == "channel":
            raise FormatError(
                "a cache of fixed size cannot hold keys per channel: leave its capacity out, and it grows"
            )
        if capacity < format.sinks + format.window + 1:
            raise FormatError(
                f"a cache of {capacity} tokens has no room for {format.sinks} sinks, a window of {format.window} and one "
                "more: give it a larger capacity"
            )
        self.coders, self.format, self.capacity = coders, format, capacity
        self.rotations, self.leads = rotations, leads
        self.rotation: Rotation | None = None  # of the call's tokens, from the hook of runtime/cache_plan.py
        self.length = torch.tensor(0)
        self.counts = True  # its tokens; not where `follow` was called
        self.sees_all = False  # whether a step needs no mask
        self.is_empty = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make all buffers, for the batch, heads, dtype and device of the first tokens."""
        self.batch_size, self.device = key_states.shape[0], key_states.device
        self.key_side = StaticSide(self.coders.keys, self.format, self.capacity, key_states, self.rotations)
        self.value_side = StaticSide(self.coders.values, self.format, self.capacity, value_states)
        self.turn = turn_of(self.coders.keys, key_states)
        self.smoothing = smoothing_of(self.coders, self.device)
        first = torch.full((self.batch_size,), self.format.sinks, device=self.device)
        self.first = first if self.format.sinks else None  # token that is codes, for kernels
        if self.rotations is not None:
            self.rotations.prepare(self.batch_size, key_states.dtype, key_states.device)
        self.length = self.length.to(key_states.device)
        if not torch.compiler.is_compiling():
            for tensor in [*self.key_side.tensors, *self.value_side.tensors, self.length]:
                torch._dynamo.mark_static_address(tensor)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keep the call's tokens; all rows: the past as it is stored, these tokens as they are, and what is to come."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        empty, self.is_empty = self.is_empty, False
        if self.rotations is not None and self.leads:
            self.rotations.write(self._rotation(), self.length)
        self.hands_on = self.reads_codes and key_states.shape[2] == 1
        if self.hands_on:
            return key_states, value_states  # attention calls `keep`, reads the past by itself, and then calls `count`
        if empty and self._attends_to_itself(key_states.shape[2]):
            self.keep(key_states, value_states)
            self.count(key_states.shape[2])
            return key_states, value_states
        stored = None if self.rotations is None else before(key_states, self._rotation())
        keys = self.key_side.step(key_states, self.length, stored)
        values = self.value_side.step(value_states, self.length)
        self.count(key_states.shape[2])
        return keys, values

    def _attends_to_itself(self, tokens: int) -> bool:
        """Whether so many tokens in an empty cache see no codes."""
        return self.format.past_only and tokens > 1

    def _rotation(self) -> Rotation:
        if self.rotation is None:
            raise ModelError(
                "a cache of keys before RoPE was not told the rotation of its tokens: make it with "
                "halfbyte.runtime.cache_plan.new_cache after attach_cache(model, ...)"
            )
        return self.rotation

    def of_rows(self, first: int, last: int, rotations: StaticRotations | None) -> "StaticQuantizedLayer":
        """An empty layer that is these rows of this one's batch, in the same memory."""
        part = StaticQuantizedLayer(self.coders, self.format, self.capacity, rotations, self.leads)
        part.batch_size, part.device, part.turn, part.smoothing = last - first, self.device, self.turn, self.smoothing
        part.key_side = self.key_side.of_rows(first, last, rotations)
        part.value_side = self.value_side.of_rows(first, last)
        part.first = None if self.first is None else self.first[first:last]
        part.length, part.is_initialized = torch.zeros_like(self.length), True
        return part

    def follow(self, length: Int64[Tensor, ""], sees_all: bool) -> None:
        """Take the number of tokens from this tensor, which somebody else moves on: that of every row, without padding.

        `sees_all`: so does attention, in every step.
        """
        self.length, self.counts, self.sees_all = length, False, sees_all

    def count(self, tokens: int) -> None:
        """So many tokens more have been kept."""
        if self.counts:
            self.length.add_(tokens)

    @property
    def kept(self) -> KeptTokens | None:
        """Sinks and window, as kernels read and write them."""
        if not (self.format.sinks or self.format.window):
            return None
        return KeptTokens(self.key_side.exact, self.value_side.exact, self.format.sinks, self.first)

    def fill(self, length: int) -> None:
        """So many tokens have been written through `of_rows`, to all rows."""
        self.length.fill_(length)
        self.is_empty = False

    def keep(self, key_states: Tensor, value_states: Tensor) -> None:
        """Store the next tokens, which attention uses as they are. What it sees of the first `length` stays as it was, so
        that it may come afterwards; then `count` them."""
        keys, values, smoothing = self.key_side, self.value_side, self.smoothing
        stored = key_states if self.rotations is None else before(key_states, self._rotation())
        if self.turn is not None:
            stored = self.turn(replace(keys.coder, turned=False).smooth(stored.float()))
            smoothing = smoothing._replace(key_shift=None, key_scale=None)
        position = self.length.expand(self.batch_size)
        write_tokens(keys.packed, values.packed, stored, value_states.to(stored.dtype), position, smoothing)
        places = torch.arange(key_states.shape[2], device=key_states.device) + self.length
        keys._remember(key_states, places)
        values._remember(value_states, places)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Rows that the call's tokens are to see, from position 0: all, or in an empty cache those of a prompt alone."""
        return query_length if self.is_empty and self._attends_to_itself(query_length) else self.capacity, 0

    def get_seq_length(self) -> Any:
        """Tokens in the cache, as a tensor once there are buffers."""
        return self.length if self.is_initialized else 0

    def get_max_length(self) -> int:
        """The capacity."""
        return self.capacity

    def reset(self) -> None:
        """Forget everything; the buffers stay where they are."""
        self.length.zero_()
        self.is_empty = True

    def crop(self, tokens_to_remove: int) -> None:
        """FormatError: the window's rows would be those of tokens that are gone."""
        if tokens_to_remove:
            raise FormatError("a cache of fixed size is not cropped: leave its capacity out, and it grows and is")

    def reorder_cache(self, beam_idx: Int64[Tensor, "batch"]) -> None:
        """Let every row of the batch go on from another one's past. Edits the buffers in place."""
        if self.is_initialized:
            for tensor in [*self.key_side.tensors, *self.value_side.tensors]:
                tensor.copy_(tensor.index_select(0, beam_idx.to(tensor.device)))

    @property
    def nbytes(self) -> int:
        """Bytes of the layer's tensors."""
        if not self.is_initialized:
            return 0
        return sum(tensor.nbytes for tensor in [*self.key_side.tensors, *self.value_side.tensors])


def of_rows(cache: QuantizedCache, first: int, last: int) -> QuantizedCache:
    """An empty cache that is these rows of the batch of one of fixed size, in the same memory.

    So that prompts are read a few at a time; `fill` the whole cache's layers afterwards. All its buffers are there.
    """
    shared = {id(rotations): rotations.of_rows(first, last) for rotations in cache.rotations}
    layers = [layer.of_rows(first, last, shared.get(id(layer.rotations))) for layer in cache.layers]
    return QuantizedCache(layers, list(shared.values()))
