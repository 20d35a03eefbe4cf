"""Greedy decoding with nothing between two tokens but one CUDA graph.

    prompt  ─► the model's forward ─► first token; keys and values in a cache of fixed size
    step    ─► layers and norms compiled one by one, head, argmax, the token and its position moved on

Each is recorded once and replayed: the prefill for prompts of the length that `record` was told, others run as they are.

transformers' own `generate` decides in Python after every token whether to go on; here the number of tokens is known
beforehand. On a CPU the same step runs as it is. A model with a plan for its cache decodes on the packed one and reads
its codes (cache_decode.py).
"""

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from halfbyte.calibration.text import longest_sequence
from halfbyte.errors import ModelError
from halfbyte.models.heads import attentions, head_counts
from halfbyte.models.load import find_blocks
from halfbyte.runtime.cache import QuantizedCache
from halfbyte.runtime.cache_decode import reading_codes
from halfbyte.runtime.cache_plan import new_cache, plan_of
from halfbyte.runtime.even_cache import ATTENTIONS, even_cache, make_even
from halfbyte.runtime.one_layer import own_layer
from halfbyte.runtime.static_cache import of_rows

MOST_PARTS = 128  # of a row of logits
WARM_UP = 3  # steps before the recording: the first compiles


class Decoder:
    """Continues prompts of one length, `batch` at a time, to at most `capacity` tokens, prompt included.

    `compiled`: what torch leaves between our kernels is fused by torch.compile, one of `parts_of` the model at a time. The
    model must be a causal one that takes a StaticCache, and stays as it is. With a cache plan, one that `reading_codes`
    takes; then so many prompts may be read at a time, `prompts_at_once`, as memory allows.
    """

    def __init__(
        self, model: Any, batch: int, capacity: int, *, compiled: bool = True, prompts_at_once: int | None = None
    ) -> None:
        """ModelError where the model has fewer positions than `capacity`, no list of layers, or only a float cache to
        read prompts in parts."""
        limit = longest_sequence(model.config)
        if limit is not None and capacity > limit:
            raise ModelError(f"{capacity} tokens are more than the model's {limit} positions: ask for fewer")
        self.model, self.batch, self.capacity = model, batch, capacity
        rows = max(capacity, WARM_UP + 1)
        planned = plan_of(model) is not None
        self._token = torch.zeros(batch, 1, dtype=torch.long, device=model.device)
        self._position = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        if planned:
            self.cache = new_cache(model, rows)
            make_even(self.cache, model.config, self._position.view(()))
        else:
            self.cache = even_cache(model.config, rows, self._position.view(()))
        self._at_once = prompts_at_once
        if prompts_at_once is not None:
            if not planned:
                raise ModelError(
                    "a float cache is read into at once: attach_cache(model, ...), or leave prompts_at_once out"
                )
            _, heads, dim = head_counts(model.config.get_text_config())
            self.cache.early_initialization(batch, heads, dim, model.dtype, model.device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._prefill_graph: torch.cuda.CUDAGraph | None = None
        self._prompts = self._token
        self._parts = parts_of(model) if compiled else []
        self._likeliest = torch.compile(likeliest, dynamic=False) if compiled else likeliest
        self._places = torch.arange(rows, device=model.device) if sees_all(model, self.cache) else None

    @torch.no_grad()
    def prefill(self, prompts: Int64[Tensor, "batch length"]) -> Int64[Tensor, "batch"]:
        """Read the prompts from an empty cache; the likeliest token after each. ModelError where they do not fit."""
        if prompts.shape[0] != self.batch or not 0 < prompts.shape[1] < self.capacity:
            raise ModelError(
                f"prompts are {list(prompts.shape)}, and this decoder has room for {self.batch} of 1 to "
                f"{self.capacity - 1} tokens: make another Decoder"
            )
        if self._prefill_graph is not None and prompts.shape == self._prompts.shape:
            self._prompts.copy_(prompts)
            self._prefill_graph.replay()
        else:
            self._read(prompts)
        return self._token[:, 0].clone()

    def _read(self, prompts: Tensor) -> None:
        self.cache.reset()
        if self._at_once is None:
            self._read_rows(prompts, self.cache, self._token)
        else:
            assert isinstance(self.cache, QuantizedCache)
            for first in range(0, self.batch, self._at_once):
                last = min(first + self._at_once, self.batch)
                self._read_rows(prompts[first:last], of_rows(self.cache, first, last), self._token[first:last])
            for layer in self.cache.layers:
                layer.fill(prompts.shape[1])
        self._position.fill_(prompts.shape[1])

    def _read_rows(self, prompts: Tensor, cache: Any, token: Tensor) -> None:
        logits = self.model(input_ids=prompts, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        token.copy_(likeliest(logits))

    @torch.no_grad()
    def step(self) -> Int64[Tensor, "batch"]:
        """The token after the last one; on a GPU the decoder's own tensor, valid until the next step."""
        if self._graph is not None:
            self._graph.replay()
        else:
            self._step()
        return self._token[:, 0]

    def _step(self) -> None:
        cache, mask = self.cache, None
        if self._places is not None:  # what transformers would make of the position, in one launch
            mask = (self._places <= self._position).expand(self.batch, 1, 1, -1)
        with reading_codes(self.model, cache) if isinstance(cache, QuantizedCache) else nullcontext():
            logits = self.model(
                input_ids=self._token, position_ids=self._position, attention_mask=mask, past_key_values=cache,
                use_cache=True,
            ).logits  # fmt: skip
        self._token.copy_(self._likeliest(logits))
        self._position += 1

    @torch.no_grad()
    def record(self, length: int) -> "Decoder":
        """Compile and record a step, and the prefill of prompts of `length` tokens. On a CPU there is nothing to do."""
        if self._token.device.type != "cuda":
            return self
        if self._at_once is None:  # else it is long, and what is between the parts does not matter
            self._prompts = torch.zeros(self.batch, length, dtype=torch.long, device=self._token.device)
            self._prefill_graph = recorded(lambda: self._read(self._prompts), times=2)
        self.cache.reset()
        self.start_at(0)
        return self.record_step()

    @torch.no_grad()
    def record_step(self) -> "Decoder":
        """Compile and record a step alone; it goes on from the tokens in the cache, and adds a few. Not on a CPU."""
        if self._token.device.type == "cuda":
            with compiled_parts(self._parts, self.cache):
                self._graph = recorded(self._step, times=WARM_UP)
        return self

    def start_at(self, position: int) -> None:
        """Let the next step's token have this position: that of tokens in the cache which no prefill has put there."""
        self._position.fill_(position)

    def decode(self, prompts: Int64[Tensor, "batch length"], new_tokens: int) -> Int64[Tensor, "batch new"]:
        """The likeliest continuation, one token after the other. ModelError where it does not fit."""
        if prompts.shape[1] + new_tokens > self.capacity:
            raise ModelError(
                f"{prompts.shape[1]} tokens and {new_tokens} new ones are more than the capacity of {self.capacity}: "
                "make a larger Decoder"
            )
        if self._graph is None:
            self.record(prompts.shape[1])
        tokens = [self.prefill(prompts)]
        tokens.extend(self.step().clone() for _ in range(new_tokens - 1))
        return torch.stack(tokens, dim=1)


def recorded(work: Callable[[], None], times: int) -> torch.cuda.CUDAGraph:
    """A CUDA graph of `work`, after so many runs that compile, tune and allocate."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(times):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def likeliest(logits: Float[Tensor, "batch tokens vocabulary"]) -> Int64[Tensor, "batch 1"]:
    """The token after each row's last one. In parts, so that a GPU looks at more than one of a row at a time."""
    last = logits[:, -1]
    count = next(count for count in range(MOST_PARTS, 0, -1) if last.shape[1] % count == 0)
    tops, places = last.unflatten(1, (count, -1)).max(2)
    best = tops.argmax(1, keepdim=True)
    return best * (last.shape[1] // count) + places.gather(1, best)


def sees_all(model: Any, cache: Any) -> bool:
    """Whether every layer attends, by a mask of ones and zeros, to all tokens before it."""
    known = all(type(module).__name__ in ATTENTIONS for module in attentions(model).values())
    by_mask = known and model.config.get_text_config()._attn_implementation == "sdpa"
    return by_mask and all(getattr(layer, "sees_all", False) for layer in cache.layers)


def parts_of(model: Any) -> list[nn.Module]:
    """What is compiled, each on its own: the layers, and what stands beside them."""
    path = find_blocks(model)
    layers, beside = model.get_submodule(path), model.get_submodule(path.rpartition(".")[0]).children()
    return [*layers, *(part for part in beside if part is not layers)]


@contextmanager
def compiled_parts(parts: Sequence[nn.Module], cache: Any) -> Iterator[None]:
    """Every part's forward through torch.compile, and afterwards as it was.

    A layer is given its own layer of the cache alone: its place in the model is then no constant of its code, and one
    compilation serves all layers that are alike.
    """
    dynamo: Any = importlib.import_module("torch._dynamo.config")
    before, limit = [part.__dict__.get("forward") for part in parts], dynamo.recompile_limit
    dynamo.recompile_limit = max(limit, 2 * len(parts) + 8)  # layers that are not alike
    try:
        for part in parts:
            part.forward = _compiled(part, cache)
        yield
    finally:
        dynamo.recompile_limit = limit
        for part, forward in zip(parts, before, strict=True):
            part.__dict__.pop("forward", None)
            if forward is not None:
                part.forward = forward


def _compiled(part: nn.Module, cache: Any) -> Callable[..., Any]:
    compiled, own = torch.compile(part.forward, dynamic=False), own_layer(part, cache)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return compiled(*args, **{name: own if given is cache else given for name, given in kwargs.items()})

    return compiled if own is None else forward
