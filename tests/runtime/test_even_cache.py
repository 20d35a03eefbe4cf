"""A cache with one length for all rows: steps on it are what the model computes without any cache."""

from typing import Any

import pytest
import torch
from cached_models import FORMATS, with_cache
from torch import Tensor, nn

from closeness import relative_error
from halfbyte.numerics.grid import fit
from halfbyte.numerics.quantized import round_to_grid
from halfbyte.runtime import fused_layers
from halfbyte.runtime.decoder import Decoder
from halfbyte.runtime.even_cache import EvenLayer, even_cache
from halfbyte.runtime.fused import fuse
from halfbyte.runtime.linear import QuantizedLinear
from halfbyte.scheme import FloatScale, PerGroup, WeightFormat
from tiny_models import tiny, tokens

FORMAT = WeightFormat(granularity=PerGroup(size=8), scale=FloatScale(dtype="float32"))


def fused(variant: str, **overrides: Any) -> nn.Module:
    model = tiny(variant, **overrides)
    for path, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and ".layers." in path:
            rounded = round_to_grid(linear.weight.float(), fit(linear.weight.float(), FORMAT), FORMAT)
            model.set_submodule(path, QuantizedLinear.from_weight(rounded, linear.bias).prepare(torch.float32))
    fuse(model)
    return model


def stepped(model: nn.Module, ids: Tensor, prompt: int) -> Tensor:
    """Logits from `prompt` on: the prompt at once, what follows token by token."""
    position = torch.zeros((), dtype=torch.long)
    cache = even_cache(model.config, ids.shape[1] + 2, position)
    model(input_ids=ids[:, :prompt], past_key_values=cache, use_cache=True)
    found = []
    for place in range(prompt, ids.shape[1]):
        position.fill_(place)
        inputs = {"input_ids": ids[:, place : place + 1], "position_ids": torch.full((1, 1), place)}
        found.append(model(**inputs, past_key_values=cache, use_cache=True).logits)
    return torch.cat(found, dim=1)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The attention modules whose steps are one launch."""
    seen: list[str] = []
    attend = fused_layers.attend

    def counted(attention: nn.Module, *arguments: Any) -> Tensor:
        seen.append(type(attention).__name__)
        return attend(attention, *arguments)

    monkeypatch.setattr(fused_layers, "attend", counted)
    return seen


@pytest.mark.parametrize(
    ("variant", "overrides", "in_one"),
    [
        ("llama", {}, True),
        ("llama", {"num_key_value_heads": 4}, True),
        ("qwen2", {}, True),
        ("mistral", {"head_dim": 8, "sliding_window": None}, True),
        ("mistral", {"head_dim": 12, "sliding_window": None}, False),
        ("qwen3", {"head_dim": 8}, False),
        ("gpt_neox", {}, False),
    ],
)
@torch.no_grad()
def test_steps_are_what_the_model_computes_without_a_cache(variant, overrides, in_one, launches):
    model, ids = fused(variant, **overrides), tokens(3, 12)
    whole = model(input_ids=ids, use_cache=False).logits[:, 5:]
    assert relative_error(stepped(model, ids, 5), whole) < 2e-6
    assert len(launches) == (2 * 7 if in_one else 0)


@torch.no_grad()
def test_a_decoder_of_a_fused_model_starts_anew_with_each_prompt(launches):
    model = fused("llama")
    decoder = Decoder(model, 2, 16)
    for seed in (0, 1):
        prompts = tokens(2, 7, seed)
        ids = prompts
        for _ in range(6):
            following = model(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, following], dim=1)
        assert torch.equal(decoder.decode(prompts, 6), ids[:, 7:])
    assert launches


@pytest.mark.parametrize(
    "name", ["int4", "int2", "int4-sym", "int4-e1", "k8v3-s2-w3", "int3-prerope-w2", "int3-rot-w2"]
)
@torch.no_grad()
def test_a_packed_cache_decodes_the_same_in_one(name, launches):
    model = with_cache(fused("llama"), FORMATS[name])
    decoder, other = Decoder(model, 2, 16), Decoder(model, 2, 16)
    layers: list[Any] = decoder.cache.layers
    others: list[Any] = other.cache.layers
    for layer in others:
        layer.follow(layer.length, sees_all=False)
    for seed in (0, 1):
        prompts = tokens(2, 7, seed)
        assert torch.equal(decoder.decode(prompts, 6), other.decode(prompts, 6))
        for layer, apart in zip(layers, others, strict=True):
            assert int(layer.length) == int(apart.length) == 7 + 5
            for tensor, same in zip(layer.key_side.tensors, apart.key_side.tensors, strict=True):
                assert torch.equal(tensor, same) or relative_error(tensor.float(), same.float()) < 1e-3
    assert len(launches) == (0 if FORMATS[name].rotate_keys else 2 * 5 * 2)


@torch.no_grad()
def test_a_sliding_window_leaves_transformers_own_layers():
    model = fused("mistral", head_dim=8, sliding_window=5)
    cache = even_cache(model.config, 12, torch.zeros((), dtype=torch.long))
    assert not any(isinstance(layer, EvenLayer) for layer in cache.layers)


@torch.no_grad()
def test_a_length_that_is_not_moved_on_would_be_seen(monkeypatch):
    model, ids = fused("llama"), tokens(2, 9)
    whole = model(input_ids=ids, use_cache=False).logits[:, 5:]
    monkeypatch.setattr(torch.Tensor, "fill_", lambda tensor, _value: tensor)
    assert relative_error(stepped(model, ids, 5), whole) > 1e-2
