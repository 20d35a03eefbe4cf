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
from halfbyte.kernels.kv_attention.kept import rows_of
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


def kept(
    sinks: int, window: int, dtype: torch.dtype = torch.float32, batch: int = 3, kv_heads: int = 2
) -> kv.KeptTokens:
    g = torch.Generator().manual_seed(9)
    keys, values = (torch.randn(batch, kv_heads, rows_of(sinks, window), DIM, generator=g).to(dtype) for _ in range(2))
    return kv.KeptTokens(keys, values, sinks, torch.full((batch,), sinks) if sinks else None)


def turns(batch: int = 3) -> kv.KeyRotation:
    angles = torch.arange(PAST + 5)[None, :, None] * torch.rand(batch, 1, DIM // 2)
    return kv.KeyRotation(angles.cos(), angles.sin(), torch.zeros(2, 32, DIM // 2))


def with_copies(given: dict[str, Any]) -> dict[str, Any]:
    """The same arguments, with caches of their own."""
    own: dict[str, Any] = {}
    for name in ("keys", "values"):
        codes, scales, zeros = given[name]
        own[name] = kv.PackedTokens(codes.clone(), scales.clone(), None if zeros is None else zeros.clone())
    if "kept" in given:
        own["kept"] = given["kept"]._replace(keys=given["kept"].keys.clone(), values=given["kept"].values.clone())
    return given | own


def assert_same_caches(given: dict[str, Any], other: dict[str, Any]) -> None:
    pairs = [*zip(given["keys"], other["keys"], strict=True), *zip(given["values"], other["values"], strict=True)]
    if "kept" in given:
        pairs += [(given["kept"].keys, other["kept"].keys), (given["kept"].values, other["kept"].values)]
    for found, expected in pairs:
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


def kernel(given: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor, kv.ExactTokens | None]:
    arguments = {name: part for name, part in given.items() if name not in ("scaling", "rotation")}
    return triton_new_token.new_token(**arguments, early=False, before_rope="rotation" in given, fused=False)


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
    for found, part in zip(kernel(given)[:3], expected, strict=True):
        assert torch.equal(found, part)
    key, value = (part[:, :, None] for part in expected[1:])
    kv.write_tokens(other["keys"], other["values"], key, value, torch.full((batch,), PAST), given["smoothing"])
    assert_same_caches(given, other)


def test_in_bfloat16_codes_are_those_of_the_rounded_key():
    given = step(dtype=torch.bfloat16)
    other = with_copies(given)
    found = kernel(given)[:3]
    for part, expected in zip(found, parts(given), strict=True):
        assert relative_error(part, expected) < 2.0**-7  # the interpreter cuts off what a GPU rounds
    key, value = (x[:, :, None] for x in found[1:])
    kv.write_tokens(other["keys"], other["values"], key, value, torch.full((3,), PAST))
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


@pytest.mark.parametrize("position", [0, 3, 4, 11, PAST])
@pytest.mark.parametrize(("sinks", "window"), [(4, 8), (0, 5), (4, 0)])
@pytest.mark.parametrize("before", [False, True], ids=["after", "before"])
def test_exact_tokens_are_kept_and_seen_by_the_kernel_as_by_the_op(position, sinks, window, before):
    given: dict[str, Any] = step() | {"kept": kept(sinks, window), "position": torch.tensor([position])}
    if before:
        given["rotation"] = turns()
    others = with_copies(given), with_copies(given)
    query, key, value, last, exact = kernel(given)
    assert exact is not None
    found = kv.decode_attention(
        query, given["keys"], given["values"], last, key, value, given["kept"].first, exact, given["smoothing"], 0.3,
        given.get("rotation"),
    )  # fmt: skip
    expected = attend_new_token(**others[0])
    assert relative_error(found.flatten(1), expected) < 1e-6
    assert_same_caches(given, others[0])
    exact_places = [held if held < sinks or held >= position - window else -1 for held in range(position)]
    assert exact.seen is not None
    assert exact.seen.sum(dim=1).tolist() == [sum(place >= 0 for place in exact_places)] * 3
    stored = given["qkv"].unflatten(1, (-1, DIM))[:, -4:-2] if before else key
    places = torch.full((3,), position)
    kv.write_tokens(others[1]["keys"], others[1]["values"], stored[:, :, None], value[:, :, None], places)
    assert torch.equal(others[1]["keys"].codes, given["keys"].codes)


def test_a_token_after_the_other_leaves_the_window():
    """Sinks and the last tokens are attended to as they came; all others are codes that say nothing of them."""
    given: dict[str, Any] = step() | {"kept": kept(2, 3)}
    g, seen = torch.Generator().manual_seed(5), []
    for place in range(9):
        given |= {"qkv": torch.randn(3, 8 * DIM, generator=g), "position": torch.tensor([place])}
        seen.append(parts(given)[1:])
        attend_new_token(**given)
    given |= {"qkv": torch.randn(3, 8 * DIM, generator=g), "position": torch.tensor([9])}
    query, key, value = parts(given)
    exact = [torch.stack([seen[place][side] for place in (0, 1, 6, 7, 8)], dim=2) for side in (0, 1)]
    expected = reference.attention(
        query, given["keys"], given["values"], torch.full((3,), 6), key, value, torch.full((3,), 2),
        kv.ExactTokens(exact[0], exact[1]), scaling=0.3,
    )  # fmt: skip
    assert relative_error(attend_new_token(**given), expected.flatten(1)) < 1e-6


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
        exact = kept(2, 3)[:2] if symmetric else (None, None)
        flat = (
            given["qkv"], given["cos"], given["sin"], *given["keys"], *given["values"], *exact, given["position"],
            *given["smoothing"], 0.3, *((2, torch.tensor([2, 2, 2]), *turns()) if symmetric else (0, None, None, None, None)),
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
        ({"kept": kept(2, 3)._replace(first=None)}, "2 are sinks"),
        ({"kept": kept(2, 3, torch.float16)}, "float16 tokens are kept"),
        ({"kept": kept(2, 3, kv_heads=1)}, "exact keys are"),
        ({"rotation": turns(2)}, "cosines are"),
    ],
)
def test_arguments_that_disagree_are_refused(change: dict[str, Any], why: str) -> None:
    with pytest.raises(FormatError, match=why):
        attend_new_token(**step() | change)
