"""A step on a float cache: the kernel against the reference, the reference against transformers' own attention."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

from closeness import relative_error
from halfbyte.errors import WeightError
from halfbyte.kernels.token_attention import attend_token, reference, triton_token

DIM = 16


def step(
    batch: int, heads: int, kv_heads: int, capacity: int, dtype: torch.dtype = torch.float32, own_places: bool = False
) -> dict[str, Any]:
    g = torch.Generator().manual_seed(capacity)
    draw = lambda *shape: torch.randn(*shape, generator=g).to(dtype)  # noqa: E731
    angles = torch.randn(batch if own_places else 1, DIM // 2, generator=g).repeat(1, 2)
    return {
        "qkv": draw(batch, (heads + 2 * kv_heads) * DIM),
        "cos": angles.cos().to(dtype),
        "sin": angles.sin().to(dtype),
        "keys": draw(batch, kv_heads, capacity, DIM),
        "values": draw(batch, kv_heads, capacity, DIM),
        "scaling": 0.3,
    }


def run(given: dict[str, Any], past: int, splits: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    keys, values = given["keys"].clone(), given["values"].clone()
    counters = torch.zeros(keys.shape[0] * keys.shape[1], dtype=torch.int32)
    y = triton_token.attend_token(
        **given | {"keys": keys, "values": values}, position=torch.tensor([past]), counters=counters, splits=splits
    )
    return y, keys, values, counters


@pytest.mark.parametrize("splits", [1, 3, 8, None])
@pytest.mark.parametrize("past", [0, 1, 5, 70, 149])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2), (10, 2)])
def test_the_kernel_is_the_reference_in_float64(heads: int, kv_heads: int, past: int, splits: int | None) -> None:
    given = step(3, heads, kv_heads, 150, own_places=past % 2 == 1)
    y, keys, values, counters = run(given, past, splits)
    exact = {name: part.double() if isinstance(part, Tensor) else part for name, part in given.items()}
    expected = reference.attend_token(**exact, position=past)
    assert relative_error(y, expected) < 1e-5
    assert relative_error(keys, exact["keys"]) < 1e-6  # the reference wrote into its own
    assert torch.equal(values, exact["values"].float())
    assert not counters.any()


def test_tokens_behind_the_new_one_are_not_seen() -> None:
    given = step(2, 4, 2, 100)
    y, keys, values, _ = run(given, 40, 2)
    given["keys"][:, :, 41:], given["values"][:, :, 41:] = torch.nan, torch.nan
    assert torch.equal(run(given, 40, 2)[0], y)
    touched = torch.zeros(100, dtype=torch.bool).index_fill(0, torch.tensor([40]), value=True)
    assert torch.equal(keys[:, :, ~touched], step(2, 4, 2, 100)["keys"][:, :, ~touched])
    assert torch.equal(values[:, :, ~touched], step(2, 4, 2, 100)["values"][:, :, ~touched])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_round_the_result_and_the_key(dtype: torch.dtype) -> None:
    given = step(2, 4, 2, 90, dtype)
    y, keys, _, _ = run(given, 80, 2)
    op_keys, op_values = given["keys"].clone(), given["values"].clone()
    counters = torch.zeros(4, dtype=torch.int32)
    parts = given | {"keys": op_keys, "values": op_values}
    expected = attend_token(**parts, position=torch.tensor([80]), counters=counters)
    assert y.dtype == keys.dtype == dtype
    assert relative_error(y, expected) < 2 * torch.finfo(dtype).eps
    assert relative_error(keys, op_keys) < torch.finfo(dtype).eps


def test_the_reference_is_transformers_attention() -> None:
    config = transformers.LlamaConfig(
        hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=DIM, attn_implementation="eager"
    )
    torch.manual_seed(0)
    attention, past = LlamaAttention(config, layer_idx=0).eval(), 6
    x = torch.randn(2, past + 1, 64)
    places = torch.arange(past + 1)[None]
    cos, sin = LlamaRotaryEmbedding(config)(x, places)
    mask = torch.full((past + 1, past + 1), -torch.inf).triu(1)[None, None]
    cache = transformers.DynamicCache(config=config)
    with torch.no_grad():
        whole, _ = attention(x, (cos, sin), mask, past_key_values=cache)
        qkv = torch.cat([part(x[:, -1]) for part in (attention.q_proj, attention.k_proj, attention.v_proj)], dim=-1)
        keys, values = (torch.zeros(2, 2, 9, DIM) for _ in range(2))
        layer = cache.layers[0]
        assert layer.keys is not None
        assert layer.values is not None
        keys[:, :, :past], values[:, :, :past] = layer.keys[:, :, :past], layer.values[:, :, :past]
        y = reference.attend_token(qkv, cos[:, -1], sin[:, -1], keys, values, past, attention.scaling)
        assert relative_error(attention.o_proj(y), whole[:, -1]) < 1e-6
    assert relative_error(keys[:, :, past], layer.keys[:, :, past]) < 1e-6


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"qkv": torch.zeros(2, 7 * DIM)}, "queries, keys and values are"),
        ({"qkv": torch.zeros(3, 8 * DIM)}, "queries, keys and values are"),
        ({"values": torch.zeros(2, 2, 11, DIM)}, "values \\[2, 2, 11"),
        ({"cos": torch.zeros(1, 8)}, "cosines are \\[1, 8\\]"),
        ({"qkv": torch.zeros(2, 8 * DIM, dtype=torch.float16)}, "float16"),
        ({"counters": torch.zeros(3, dtype=torch.int32)}, "3 counters"),
    ],
)
def test_arguments_that_disagree_are_refused(change: dict[str, Tensor], why: str) -> None:
    given = step(2, 4, 2, 10) | {"position": torch.tensor([3]), "counters": torch.zeros(4, dtype=torch.int32)}
    attend_token(**given)
    with pytest.raises(WeightError, match=why):
        attend_token(**given | change)


def test_the_op_says_what_it_writes() -> None:
    given = step(2, 4, 2, 10)
    arguments = (*(given[name] for name in ("qkv", "cos", "sin", "keys", "values")), torch.tensor([3]))
    counters = torch.zeros(4, dtype=torch.int32)
    torch.library.opcheck(torch.ops.halfbyte.token_attention.default, (*arguments, counters, 0.3))


def test_many_rows_are_split_less() -> None:
    assert triton_token.splits_for(8, 640, 132) == 20
    assert triton_token.splits_for(32, 640, 132) == 8
    assert triton_token.splits_for(8, 4096, 132) == 32
    assert triton_token.splits_for(16 * 32, 640, 132) == 1
