"""The one walk from block to block: hidden states that enter a block, how the model calls it, what its linears see.

No graph is traced. The model runs once with its blocks replaced by stand-ins that note their arguments, so masks and
position embeddings are whatever this architecture makes of them, per layer where layers differ.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from halfbyte.calibration.statistics import InputStatistics
from halfbyte.errors import CalibrationError, ModelError
from halfbyte.numerics.activations import InputQuantizer, simulate
from halfbyte.numerics.slopes import simulate_through, straight_through

Call = tuple[tuple[Any, ...], dict[str, Any]]  # a block's arguments without its hidden states
SharedInput = tuple[str, ...]  # names of the linears of a block that read one and the same tensor


class _LastBlockReached(Exception):  # noqa: N818 - it ends a forward pass, nothing went wrong
    """What comes after the blocks is not needed."""


class _NothingMoreToSee(Exception):  # noqa: N818 - likewise
    """What a block does after its last linear was called is not needed."""


@dataclass(slots=True)
class Stream:
    """The calibration set on its way through the model: one tensor [samples, length, hidden] per batch."""

    hidden: list[Float[Tensor, "samples length hidden"]]
    calls: list[list[Call]]  # [batch][block]
    unwrap: Callable[[Any], Tensor]
    device: torch.device  # where blocks run

    def run(self, block: Callable[..., Any], index: int, batch: int) -> Float[Tensor, "samples length hidden"]:
        """The output of a block that stands at place `index`, for one batch."""
        return self.call(block, index, batch, self.hidden[batch].to(self.device))

    def call(
        self, block: Callable[..., Any], index: int, batch: int, hidden: Float[Tensor, "samples length hidden"]
    ) -> Float[Tensor, "samples length hidden"]:
        """Likewise for other hidden states of the same batch, on the device."""
        args, kwargs = self.calls[batch][index]
        return self.unwrap(block(hidden, *args, **kwargs))

    def advance(self, block: nn.Module, index: int) -> None:
        """Step over the block as it now is. Edits in place, so that the calibration set is held once."""
        for batch in range(len(self.hidden)):
            self.hidden[batch] = self.run(block, index, batch).to(self.hidden[batch].device)

    def copy(self) -> "Stream":
        """A second stream over the same calls, for the float model beside the quantized one."""
        return Stream(list(self.hidden), self.calls, self.unwrap, self.device)

    @property
    def tokens(self) -> int:
        return sum(hidden.shape[0] * hidden.shape[1] for hidden in self.hidden)


@dataclass(slots=True)
class _Recorder:
    """Stands in for the blocks while the model runs up to its last one."""

    blocks: Sequence[nn.Module]
    template: Any = None
    entered: Tensor | None = None
    calls: list[Call] = field(default_factory=list)

    def stand_in(self, index: int) -> Callable[..., Any]:
        real = self.blocks[index].forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden, call = split(args, kwargs)
            self.calls.append(call)
            if index == 0:
                self.entered = hidden
                if self.template is None:
                    self.template = real(*args, **kwargs)
            if index == len(self.blocks) - 1:
                raise _LastBlockReached
            return (hidden, *self.template[1:]) if isinstance(self.template, tuple) else hidden

        return forward


def split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
    """The hidden states, and the rest of the call."""
    if args:
        return args[0], (args[1:], kwargs)
    rest = dict(kwargs)
    return rest.pop("hidden_states"), ((), rest)


@torch.no_grad()
def enter(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    batches: Sequence[Int[Tensor, "samples length"]],
    device: torch.device,
    home: torch.device,
) -> Stream:
    """The stream at the door of the first block. Everything before the blocks, and block 0, must have weights.

    Blocks run on `device`; hidden states wait for their turn at `home`.
    """
    recorder = _Recorder(blocks)
    hidden, calls = [], []
    with ExitStack() as stack:
        for index, block in enumerate(blocks):
            block.forward = recorder.stand_in(index)
            stack.callback(delattr, block, "forward")
        stack.enter_context(without_cache(model.config))
        for batch in batches:
            recorder.calls = []
            with suppress(_LastBlockReached):
                model(input_ids=batch.to(device))
            if len(recorder.calls) != len(blocks) or recorder.entered is None:
                raise ModelError(
                    f"{type(model).__name__} called {len(recorder.calls)} of its {len(blocks)} blocks: blocks that are "
                    "skipped or called twice cannot be walked one by one"
                )
            hidden.append(recorder.entered.to(home))
            calls.append(recorder.calls)
    first = (lambda output: output[0]) if isinstance(recorder.template, tuple) else (lambda output: output)
    return Stream(hidden, calls, first, device)


@contextmanager
def without_cache(config: Any) -> Iterator[None]:
    """Blocks that are run again and again must not append to a cache of keys and values."""
    before = getattr(config, "use_cache", None)
    config.use_cache = False
    try:
        yield
    finally:
        config.use_cache = before


def linears(block: nn.Module) -> dict[str, nn.Linear]:
    """Every linear of a block by its name in it."""
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


@contextmanager
def watching(modules: Mapping[str, nn.Module], notice: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Report the input of each module whenever it is called, for as long as the block lasts."""
    with ExitStack() as stack:
        for name, module in modules.items():

            def hook(_module: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
                notice(name, args[0])

            stack.callback(module.register_forward_pre_hook(hook).remove)
        yield


@contextmanager
def quantizing_inputs(
    block: nn.Module, inputs: Mapping[str, InputQuantizer], *, grid_slopes: bool = False
) -> Iterator[None]:
    """Let these linears compute with quantized inputs, for as long as the block lasts.

    Gradients pass straight through the rounding; with `grid_slopes` they reach the scales of the tokens too.
    """
    with ExitStack() as stack:
        for name, quantizer in inputs.items():

            def hook(
                _module: nn.Module, args: tuple[Any, ...], quantizer: InputQuantizer = quantizer
            ) -> tuple[Any, ...]:
                inputs = args[0]
                if not (torch.is_grad_enabled() and inputs.requires_grad):
                    return simulate(inputs.detach(), quantizer), *args[1:]
                if grid_slopes:
                    return simulate_through(inputs, quantizer), *args[1:]
                return straight_through(simulate(inputs.detach(), quantizer), inputs), *args[1:]

            stack.callback(block.get_submodule(name).register_forward_pre_hook(hook).remove)
        yield


@torch.no_grad()
def shared_inputs(block: nn.Module, stream: Stream, index: int) -> list[SharedInput]:
    """Which linears read the same tensor, in the order in which the block calls them; found by running one batch."""
    seen: list[tuple[Tensor, list[str]]] = []

    def notice(name: str, inputs: Tensor) -> None:
        for tensor, names in seen:
            if tensor is inputs:
                if name not in names:
                    names.append(name)
                return
        if all(name not in names for _, names in seen):
            seen.append((inputs, [name]))

    modules = linears(block)
    with watching(modules, notice):
        stream.run(block, index, 0)
    called = {name for _, names in seen for name in names}
    if silent := sorted(modules.keys() - called):
        raise CalibrationError(
            f"block {index} never called {', '.join(silent)}: nothing can be known of their inputs; put them on the "
            "recipe's `ignore` list"
        )
    return [tuple(names) for _, names in seen]


@torch.no_grad()
def observe(
    block: nn.Module,
    stream: Stream,
    index: int,
    shared: Sequence[SharedInput],
    reference: tuple[nn.Module, Stream] | None = None,
    *,
    magnitudes: bool = True,
) -> dict[str, InputStatistics]:
    """Statistics of every linear's input over the whole stream; linears that share an input share one object.

    `reference`: the float block and its own stream, for the drift between the two. A linear that sees a part of the
    tokens (an expert) has no drift: the two routers need not agree. `magnitudes`: also the extremes and mean magnitudes.
    """
    modules = linears(block)
    leaders = {names[0]: modules[names[0]] for names in shared}
    last = shared[-1][0]  # called last: what the block does after it need not be computed
    float_inputs: dict[str, Tensor] = {}
    seen: dict[str, InputStatistics] = {}

    def notice(name: str, inputs: Tensor) -> None:
        flat = inputs.detach().flatten(0, -2)
        if name not in seen:
            seen[name] = InputStatistics.empty(
                flat.shape[1], flat.device, drift=reference is not None, magnitudes=magnitudes
            )
        counterpart = float_inputs.get(name)
        if len(flat) != tokens or counterpart is None or len(counterpart) != tokens:
            seen[name].drift = None
        seen[name].absorb(flat, counterpart)
        if name == last:
            raise _NothingMoreToSee

    for batch, hidden in enumerate(stream.hidden):
        tokens = hidden.shape[0] * hidden.shape[1]
        if reference is not None:
            float_inputs.clear()
            original, float_stream = reference
            float_modules = linears(original)
            with watching({name: float_modules[name] for name in leaders}, collect(float_inputs)):
                float_stream.run(original, index, batch)
        with watching(leaders, notice), suppress(_NothingMoreToSee):
            stream.run(block, index, batch)
    return {name: seen[names[0]] for names in shared for name in names}


def collect(into: dict[str, Tensor]) -> Callable[[str, Tensor], None]:
    """A notice that keeps the inputs themselves."""

    def notice(name: str, inputs: Tensor) -> None:
        into[name] = inputs.detach().flatten(0, -2)

    return notice
