"""What a compiler makes of a layer's step on the packed cache: nothing that is stored is copied as a whole."""

import math
from typing import Any

import pytest
import torch
from cached_models import FORMATS, with_cache
from torch._inductor.utils import run_and_get_code

from halfbyte.runtime.decoder import Decoder, compiled_parts
from halfbyte.runtime.static_cache import StaticQuantizedLayer
from tiny_models import tiny, tokens

CAPACITY = 37  # a number that no other size is


def code_of_a_step(name: str) -> tuple[str, list[tuple[int, ...]]]:
    """What a layer's step is compiled to, and the shapes of what the cache stores."""
    torch.compiler.reset()
    decoder = Decoder(with_cache(tiny("llama"), FORMATS[name]), 3, CAPACITY)
    decoder.prefill(tokens(3, 7))

    def step() -> None:
        with compiled_parts(decoder._parts[:1], decoder.cache), torch.no_grad():
            decoder.step()

    _, code = run_and_get_code(step)
    layer: Any = decoder.cache.layers[0]
    stored = [*layer.key_side.tensors, *layer.value_side.tensors]
    if layer.rotations is not None:
        stored += [layer.rotations.cos, layer.rotations.sin]
    return "\n".join(code), [tuple(tensor.shape) for tensor in stored if tensor.numel()]


def copies(code: str, shapes: list[tuple[int, ...]]) -> list[str]:
    """Lines that make room for a second one of what is stored, or for its numbers in a row."""
    rooms = [f"({', '.join(map(str, shape))})" for shape in shapes] + [f"({math.prod(shape)}, )" for shape in shapes]
    return [line for line in code.splitlines() if "empty_strided" in line and any(room in line for room in rooms)]


@pytest.mark.parametrize("name", ["int4", "k8v3-s2-w3", "int3-prerope-w2"])
def test_a_step_copies_nothing_that_is_stored(name: str) -> None:
    code, shapes = code_of_a_step(name)
    assert "halfbyte.kv_write" in code
    assert not copies(code, shapes)


def test_writing_after_attention_would_copy_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing orders a reader and a later writer in the graph, so that the writer comes first, and into a copy."""
    keep = StaticQuantizedLayer.keep
    kept: list[Any] = []
    monkeypatch.setattr(StaticQuantizedLayer, "keep", lambda _layer, *now: kept.append(now))
    monkeypatch.setattr(StaticQuantizedLayer, "count", lambda layer, _tokens: keep(layer, *kept.pop()))
    code, shapes = code_of_a_step("int4")
    assert len(copies(code, shapes)) >= 6
