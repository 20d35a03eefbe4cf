"""Another attention function in the place of a block's own, for as long as calibration needs it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from halfbyte.models.heads import attentions


def attention_modules(block: nn.Module) -> list[Any]:
    """The block's attention modules that go through transformers' interface of attention functions."""
    return [module for module in attentions(block).values() if hasattr(module, "config")]


@contextmanager
def attending_by(block: nn.Module, name: str, key: str, make: Callable[[Any, str], Any]) -> Iterator[None]:
    """Within it, the block attends by the function registered as `name`. Edits the block in place and undoes it.

    Every module has `make(module, the name of its own function)` under `key` of its dictionary meanwhile; its `rotation`
    is that of the call's tokens.
    """

    def note_rotation(module: Any, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        module.__dict__[key].rotation = kwargs.get("position_embeddings")

    modules = attention_modules(block)
    configs = {id(module.config): module.config for module in modules}
    before = {place: config._attn_implementation for place, config in configs.items()}
    hooks = []
    for module in modules:
        module.__dict__[key] = make(module, before[id(module.config)])
        hooks.append(module.register_forward_pre_hook(note_rotation, with_kwargs=True))
    for config in configs.values():
        config._attn_implementation = name
    try:
        yield
    finally:
        for place, config in configs.items():
            config._attn_implementation = before[place]
        for hook in hooks:
            hook.remove()
        for module in modules:
            del module.__dict__[key]
