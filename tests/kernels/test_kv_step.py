"""A step on a packed cache from queries, keys and values before RoPE: its kernel, its parts, and the float64 reference."""

from typing import Any

import pytest
import torch
from kv_steps import packed
from torch import Tensor

from closeness import relative_error
from halfbyte.errors import FormatError
from halfbyte.kernels import kv_attention as kv
from halfbyte.kernels.kv_attention import reference, triton_new_token
from halfbyte.kernels.kv_attention.step import attend_new_token

DIM, PAST = 32, 21


def step(
    heads: int = 4, kv_heads: int = 2, bits: int = 4, groups: int = 1, symmetric: bool = False, smoothed: bool = False,
    dtype: torch.dtype = torch.float32, own_places: bool = False, batch: int = 3,
) -> dict[str, Any]:  # fmt: skip
    """Arguments of `attend_new_token`."""
    g = torch.Generator().manual_seed(heads)
    angles = torch.randn(batch if own_places else 1, DIM // 2, generator=g).repeat(1, 2)
    smoothing = kv.Smoothing(*(torch.rand(kv_heads, DIM, generator=g) + 0.5 if smoothed else None for _ in range(4)))
    shape = (batch, kv_heads, PAST + 5)
    return {
        "qkv": torch.randn(batch, (heads + 2 * kv_heads) * DIM, generator=g).to(dtype),
        "cos": angles.cos().to(dtype),
        "sin": angles.sin().to(dtype),
        "keys": packed(g, shape, DIM, bits, groups, symmetric),
        "values": packed(g, shape, DIM, bits, groups, symmetric),
        "position": torch.tensor([PAST]),
        "smoothing": smoothing,
        "scaling": 0.3,
    }


def with_copies(given: dict[str, Any]) -> dict[str, Any]:
    """The same arguments, with caches of their own."""
    copies = {
        name: kv.PackedTokens(*(x if x is None else x.clone() for x in given[name])) for name in ("keys", "values")
    }
    return given | copies


def assert_same_caches(given: dict[str, Any], other: dict[str, Any]) -> None:
    for name in ("keys", "values"):
        for found, expected in zip(given[name], other[name], strict=True):
            assert found is expected is None or torch.equal(found, expected)


def parts(given: dict[str, Any], exact: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value after RoPE, in the dtype of the product, or `exact` in float64."""
    kv_heads = given["keys"].codes.shape[1]
    split, cos, sin = (given[name].double() if exact else given[name].float() for name in ("qkv", "cos", "sin"))
    split = split.unflatten(1, (-1, DIM))
    low, high = split[:, :-kv_heads].chunk(2, dim=-1)
    turned = split[:, :-kv_heads] * cos[:, None] + torch.cat([-high, low], dim=-1) * sin[:, None]
    found = turned[:, :-kv_heads], turned[:, -kv_heads:], split[:, -kv_heads:]
    return found if exact else tuple(part.to(given["qkv"].dtype) for part in found)  # pyright: ignore


def kernel(given: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    names = ("qkv", "cos", "sin", "keys", "values", "position", "smoothing")
    return triton_new_token.new_token(*(given[name] for name in names), early=False, fused=False)


@pytest.mark.parametrize("smoothed", [False, True], ids=["plain", "smoothed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "bits", "groups", "symmetric", "batch"),
    [(4, 2, 4, 1, False, 3), (2, 2, 4, 1, True, 1), (6, 1, 8, 2, False, 2), (3, 3, 2, 4, True, 2)],
)
def test_the_kernel_rotates_and_writes_as_rope_and_write_tokens(
    heads, kv_heads, bits, groups, symmetric, batch, dtype, smoothed
):
    given = step(heads, kv_heads, bits, groups, symmetric, smoothed, dtype, own_places=batch > 2, batch=batch)
    other = with_copies(given)
    expected = parts(given)
    for found, part in zip(kernel(given), expected, strict=True):
        assert torch.equal(found, part)
    key, value = (part[:, :, None] for part in expected[1:])
    kv.write_tokens(other["keys"], other["values"], key, value, torch.full((batch,), PAST), given["smoothing"])
    assert_same_caches(given, other)


def test_in_bfloat16_codes_are_those_of_the_rounded_key():
    given = step(dtype=torch.bfloat16)
    other = with_copies(given)
    found = kernel(given)
    for part, expected in zip(found, parts(given), strict=True):
        assert relative_error(part, expected) < 2.0**-7  # the interpreter cuts off what a GPU rounds
    kv.write_tokens(other["keys"], other["values"], *(x[:, :, None] for x in found[1:]), torch.full((3,), PAST))
    assert_same_caches(given, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_op_is_the_reference_in_float64(dtype, symmetric):
    given = step(bits=4, symmetric=symmetric, smoothed=True, dtype=dtype, own_places=True)
    before = with_copies(given)
    found = attend_new_token(**given)
    query, key, value = parts(given, exact=True)
    last = torch.full((3,), PAST)
    expected = reference.attention(
        query, before["keys"], before["values"], last, key, value, smoothing=given["smoothing"], scaling=0.3
    )
    assert found.dtype == dtype
    assert relative_error(found, expected.flatten(1)) < max(2 * torch.finfo(dtype).eps, 1e-6)
    key, value = (part[:, :, None] for part in parts(given)[1:])
    kv.write_tokens(before["keys"], before["values"], key, value, last, given["smoothing"])
    assert_same_caches(given, before)


def test_a_key_that_is_not_turned_would_be_seen():
    given = step()
    other = with_copies(given)
    found = attend_new_token(**given)
    still: dict[str, Any] = other | {"cos": torch.ones(1, DIM), "sin": torch.zeros(1, DIM)}
    assert relative_error(attend_new_token(**still), found) > 0.05
    assert not torch.equal(given["keys"].codes, other["keys"].codes)
    assert torch.equal(given["values"].codes, other["values"].codes)


def test_the_op_says_what_it_writes():
    for symmetric in (False, True):
        given = step(symmetric=symmetric, smoothed=symmetric)
        flat = (
            given["qkv"], given["cos"], given["sin"], *given["keys"], *given["values"], given["position"],
            *given["smoothing"], 0.3,
        )  # fmt: skip
        torch.library.opcheck(torch.ops.halfbyte.kv_step.default, flat)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"qkv": torch.zeros(3, 7 * DIM + 1)}, "225 numbers are no"),
        ({"qkv": torch.zeros(3, 4 * DIM)}, "give heads"),
        ({"qkv": torch.zeros(2, 8 * DIM)}, "codes of the keys"),
        ({"qkv": torch.zeros(3, 8 * DIM, dtype=torch.float64)}, "float64"),
        ({"qkv": torch.zeros(3, 7 * DIM)}, "multiple of their heads"),
        ({"cos": torch.zeros(2, DIM)}, "cosines are \\[2, 32\\]"),
        ({"position": torch.tensor([1, 2, 3])}, "one integer"),
    ],
)
def test_arguments_that_disagree_are_refused(change: dict[str, Any], why: str) -> None:
    with pytest.raises(FormatError, match=why):
        attend_new_token(**step() | change)
