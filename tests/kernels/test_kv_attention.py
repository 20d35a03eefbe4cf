"""Attention on packed keys and values: every kernel against the float64 reference, and the reference against hand."""

import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_steps import FAST, TOLERANCE, Step, errors, fast, packed, plain, step
from torch import Tensor

from closeness import relative_error
from halfbyte.errors import FormatError
from halfbyte.kernels import kv_attention as kv
from halfbyte.kernels.kv_attention import cuts, reference, triton_write
from halfbyte.kernels.kv_attention.cuts import Cut
from halfbyte.numerics.cache import Coder
from halfbyte.packing.code_bytes import bytes_for, pack

NEW_PROCESS = "import sys; import halfbyte.kernels.kv_attention; assert 'triton' not in sys.modules"


def test_the_reference_attends_as_by_hand() -> None:
    tokens = kv.PackedTokens(torch.tensor([[[[0x10]], [[0x32]]]], dtype=torch.uint8).view(1, 1, 2, 1), *(
        torch.tensor([value, value]).half().view(1, 1, 2, 1) for value in (2.0, -1.0)
    ))  # fmt: skip
    assert reference.decoded(tokens, 2).tolist() == [[[[-1, 1], [3, 5]]]]
    query, now = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.5, 7.0]]])
    found = reference.attention(query, tokens, tokens, torch.tensor([2]), now, now, scaling=1.0)
    weights = [math.exp(-1), math.exp(3), math.exp(0.5)]
    expected = [sum(w * v for w, v in zip(weights, vs, strict=True)) / sum(weights) for vs in ((-1, 3, 0.5), (1, 5, 7))]
    assert found[0, 0].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("whole", [False, True], ids=["bare", "whole"])
@pytest.mark.parametrize(
    ("query_heads", "kv_heads", "dim", "groups", "symmetric"),
    [(2, 2, 128, 1, False), (1, 1, 128, 2, False), (3, 1, 64, 1, True), (12, 1, 64, 1, False)],
)
def test_the_kernel_for_tensor_cores_agrees_with_the_reference(
    query_heads: int, kv_heads: int, dim: int, groups: int, symmetric: bool, whole: bool
) -> None:
    arguments = step(query_heads, kv_heads, 70, dim, 4, groups, symmetric, whole)
    assert cuts.obstacle(query_heads, dim, arguments.keys, arguments.values) is None
    assert errors(fast(arguments, Cut(1, 32, 2, 2)), arguments) < TOLERANCE


@pytest.mark.parametrize("cut", [Cut(1, 16, 1, 2), Cut(2, 16, 2, 4), Cut(2, 64, 2, 2), Cut(3, 32, 4, 3)], ids=str)
def test_every_cut_agrees_with_the_reference(cut: Cut) -> None:
    arguments = step(whole=True, capacity=140)
    assert errors(fast(arguments, cut), arguments) < TOLERANCE
    assert errors(plain(arguments, cut), arguments) < 1e-5


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_kernel_for_all_widths_agrees_with_the_reference(bits: int, symmetric: bool) -> None:
    arguments = step(3, 1, 50, 40, bits, 5, symmetric, whole=True)
    assert errors(plain(arguments, Cut(2, 16)), arguments) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("whole", [False, True], ids=["bare", "whole"])
def test_the_op_agrees_with_the_reference(dtype: torch.dtype, whole: bool) -> None:
    arguments = step(dtype=dtype, whole=whole)
    assert errors(kv.decode_attention(*arguments), arguments) < max(torch.finfo(dtype).eps, 1e-6)


@given(st.integers(1, 3), st.integers(1, 2), st.sampled_from([2, 4, 8]), st.integers(1, 60), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_the_op_agrees_whatever_the_shape(together: int, kv_heads: int, bits: int, capacity: int, seed: int) -> None:
    arguments = step(together * kv_heads, kv_heads, capacity, 32, bits, 2, whole=capacity > 20, seed=seed)
    assert errors(kv.decode_attention(*arguments), arguments) < 1e-5


def test_rows_without_a_past_answer_with_what_is_exact() -> None:
    arguments = step()._replace(last=torch.tensor([0, 5]), first=torch.tensor([0, 5]))
    expected = arguments.value_now.repeat_interleave(2, dim=1)
    for found in (fast(arguments, Cut(2, 16, 2, 2)), plain(arguments, Cut(2)), kv.decode_attention(*arguments)):
        assert torch.equal(found, expected)


def test_what_is_not_seen_may_be_anything() -> None:
    """A cache of `torch.empty` has infinities where no token is yet."""
    arguments = step(whole=True, capacity=100)._replace(last=torch.tensor([40, 50]))
    expected = reference.attention(*arguments)
    for tokens in (arguments.keys, arguments.values):
        assert tokens.zeros is not None
        for grids in (tokens.scales, tokens.zeros):
            grids[:, :, 50:] = float("nan")
        tokens.codes[:, :, 50:] = 0xAB
    for found in (fast(arguments, Cut(2, 16, 2, 2)), plain(arguments, Cut(2)), kv.decode_attention(*arguments)):
        assert relative_error(found, expected) < TOLERANCE


def test_steps_of_any_size_keep_their_precision() -> None:
    """Shares times steps are float16: they are relative to the largest of a split, so that tiny steps are not lost."""
    for factor in (2.0**-12, 2.0**8):
        arguments = step(symmetric=True)
        values = arguments.values._replace(scales=(arguments.values.scales.float() * factor).half())
        arguments = arguments._replace(values=values, value_now=arguments.value_now * factor)
        assert errors(fast(arguments, Cut(1, 32, 2, 2)), arguments) < TOLERANCE


def test_a_token_that_outweighs_all_others_is_the_answer() -> None:
    arguments = step()
    codes = arguments.keys.codes.clone()
    codes[:, :, 77] = 0xFF
    keys = arguments.keys._replace(codes=codes)
    arguments = arguments._replace(keys=keys, query=arguments.query.abs() * 30, last=torch.tensor([100, 100]))
    assert errors(fast(arguments, Cut(2, 16, 2, 2)), arguments) < TOLERANCE


def test_caches_that_are_parts_of_larger_ones_are_read_in_place() -> None:
    whole = step(capacity=64)
    part = whole._replace(
        keys=kv.PackedTokens(*(x[:, :, :48] for x in whole.keys if x is not None)),
        values=kv.PackedTokens(*(x[:, :, :48] for x in whole.values if x is not None)),
        last=torch.tensor([48, 31]),
    )
    for found in (fast(part, Cut(2, 16, 2, 2)), plain(part, Cut(2)), kv.decode_attention(*part)):
        assert errors(found, part) < TOLERANCE


def test_what_is_the_same_for_all_rows_or_lies_apart_is_read_in_place() -> None:
    whole = step(4, 2, whole=True)
    assert whole.exact is not None
    assert whole.exact.seen is not None
    apart = torch.cat([whole.key_now, whole.value_now], dim=1)
    part = whole._replace(
        last=torch.tensor([90]).expand(2), key_now=apart[:, :2], value_now=apart[:, 2:],
        exact=whole.exact._replace(seen=whole.exact.seen[:1].expand(2, -1)),
    )  # fmt: skip
    for found in (fast(part, Cut(2, 16, 2, 2)), plain(part, Cut(2)), kv.decode_attention(*part)):
        assert errors(found, part) < TOLERANCE


def test_the_first_channel_of_a_word_taken_for_the_last_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every gate is seen red: a wrong order of channels, of keys or of values, and a forgotten zero."""
    arguments = step()
    for name in ("channel_of_key", "channel_of_value"):
        right = getattr(FAST, name)
        monkeypatch.setattr(FAST, name, lambda place, words, right=right: right(place, words) ^ 7)
        assert errors(fast(arguments, Cut(1, 32, 2, 2)), arguments) > 0.1
        monkeypatch.setattr(FAST, name, right)
    tokens = arguments.values
    assert tokens.zeros is not None
    shifted = arguments._replace(values=tokens._replace(zeros=tokens.zeros + 1))
    assert relative_error(fast(shifted, Cut(1, 32, 2, 2)), reference.attention(*arguments)) > 0.1


def test_the_fast_kernel_says_what_it_cannot_read() -> None:
    def why(**options: Any) -> str | None:
        arguments = step(**options)
        return cuts.obstacle(arguments.query.shape[1], arguments.query.shape[2], arguments.keys, arguments.values)

    assert why() is None
    for options in ({"dim": 96}, {"bits": 8}, {"groups": 4}, {"query_heads": 34, "kv_heads": 2}):
        assert why(**options)
    arguments = step(4, 2)
    apart = arguments.values._replace(codes=arguments.values.codes.transpose(0, 1).contiguous().transpose(0, 1))
    assert cuts.obstacle(4, 128, arguments.keys, apart)
    assert cuts.obstacle(4, 128, arguments.keys, arguments.values._replace(zeros=None))


def test_programs_fill_the_chip_and_are_no_more_than_steps() -> None:
    assert [cuts.choose(rows, 8192, 132).splits for rows in (8, 32, 128, 512, 2048)] == [32, 16, 4, 1, 1]
    for rows in (1, 8, 32, 512):
        for capacity in (1, 100, 4096, 10**6):
            splits = cuts.choose(rows, capacity, 132).splits
            assert 1 <= splits <= cuts.MOST_SPLITS
            assert cuts.choose(rows, capacity, 132, together=16) == Cut(splits, tokens=32, stages=4)
            turned = cuts.choose(rows, capacity, 132, turned=True)
            assert (turned.tokens, turned.warps) == (32, 1)
            assert splits <= turned.splits <= cuts.MOST_SPLITS
            assert (splits - 1) * 128 < capacity


BROKEN: dict[str, Callable[[Step], dict[str, Any]]] = {
    "query": lambda s: {"query": s.query[0]},
    "dtype": lambda s: {"query": s.query.double()},
    "codes": lambda s: {"keys": s.keys._replace(codes=s.keys.codes.int())},
    "bytes": lambda s: {"keys": s.keys._replace(codes=s.keys.codes[..., :7])},
    "scales": lambda s: {"values": s.values._replace(scales=s.values.scales.float())},
    "zeros": lambda s: {"values": s.values._replace(zeros=s.values.scales[:, :, :5])},
    "heads": lambda s: {"values": packed(torch.Generator(), (2, 2, 100), 128, 4, 1, False)},
    "now": lambda s: {"key_now": s.key_now.half()},
    "last": lambda s: {"last": s.last.float()},
    "first": lambda s: {"first": s.last[:1]},
    "exact": lambda s: {"exact": kv.ExactTokens(s.key_now[:, :, None], s.value_now)},
    "seen": lambda s: {"exact": kv.ExactTokens(s.key_now[:, :, None], s.value_now[:, :, None], s.last > 0)},
    "apart": lambda s: {"keys": s.keys._replace(codes=s.keys.codes.transpose(2, 3).contiguous().transpose(2, 3))},
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_what_does_not_fit_is_refused(broken: Callable[[Step], dict[str, Any]]) -> None:
    arguments = step()
    with pytest.raises(FormatError, match=r"give|pack"):
        kv.decode_attention(*arguments._replace(**broken(arguments)))


def test_the_op_is_traced_as_it_runs() -> None:
    arguments = step(whole=True)
    flat = (
        arguments.query, *arguments.keys, *arguments.values, arguments.last, arguments.key_now, arguments.value_now,
        arguments.first, *(arguments.exact or ()), *arguments.smoothing, 0.1, None, None, None, None,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.halfbyte.kv_attention, flat)


def test_importing_the_op_needs_no_triton() -> None:
    subprocess.run([sys.executable, "-c", NEW_PROCESS], check=True)


def cache(kv_heads: int, dim: int, bits: int, groups: int, symmetric: bool) -> kv.PackedTokens:
    shape = (2, kv_heads, 40)
    grids = torch.full((*shape, groups), -1.0).half()
    codes = torch.full((*shape, bytes_for(dim, bits)), 99, dtype=torch.uint8)
    return kv.PackedTokens(codes, grids, None if symmetric else grids.clone())


def assert_written(tokens: kv.PackedTokens, x: Tensor, coder: Coder, position: Tensor) -> None:
    """The codes, steps and zeros that the cache of the model would keep, and nothing beside them."""
    expected = coder.encode(x)
    kept = [(tokens.codes, pack(expected.codes, coder.bits), 99), (tokens.scales, expected.scales, -1)]
    if tokens.zeros is not None:
        assert expected.zeros is not None
        kept.append((tokens.zeros, expected.zeros, -1))
    for found, new, before in kept:
        for row, first in enumerate(position.tolist()):
            last = first + x.shape[2]
            assert torch.equal(found[row, :, first:last], new[row])
            assert bool((found[row, :, :first] == before).all())
            assert bool((found[row, :, last:] == before).all())


@pytest.mark.parametrize("smoothed", [False, True], ids=["plain", "smoothed"])
@pytest.mark.parametrize(
    ("bits", "groups", "symmetric", "count"),
    [(4, 1, False, 1), (4, 2, False, 11), (4, 1, True, 3), (8, 1, False, 9), (2, 4, True, 3), (3, 1, False, 5)],
)
def test_tokens_are_written_as_the_numerics_encode_them(
    bits: int, groups: int, symmetric: bool, count: int, smoothed: bool
) -> None:
    g = torch.Generator().manual_seed(0)
    dim, heads, position = 64, 2, torch.tensor([7, 20])
    # as models have them: a view in which heads lie beside each other
    key, value = ((torch.randn(2, count, heads, dim, generator=g) * 3 + 1).half().transpose(1, 2) for _ in range(2))
    key[0, 0, 0] = 5  # equal channels: a step of 0
    key[0, 1, 0] = 6e-8
    value[1, 0, -1, 3] = 60000
    smoothing = kv.Smoothing(*(torch.rand(heads, dim, generator=g) + 0.5 if smoothed else None for _ in range(4)))
    coders = [
        Coder(bits, dim // groups, symmetric, shift=shift, scale=scale)
        for shift, scale in (smoothing[:2], smoothing[2:])
    ]  # fmt: skip
    for kernel in (False, True):
        keys, values = (cache(heads, dim, bits, groups, symmetric) for _ in range(2))
        if not kernel:
            kv.write_tokens(keys, values, key, value, position, smoothing)
        elif triton_write.can_write(dim, keys, values):
            triton_write.write(keys, values, key, value, position, list(smoothing), fused=False)
        else:
            continue
        assert_written(keys, key, coders[0], position)
        assert_written(values, value, coders[1], position)


def test_written_tokens_are_attended_to() -> None:
    g = torch.Generator().manual_seed(1)
    keys, values = (cache(1, 64, 8, 1, False) for _ in range(2))
    key, value = (torch.randn(2, 1, 30, 64, generator=g) for _ in range(2))
    kv.write_tokens(keys, values, key, value, torch.tensor([0, 10]))
    query, now = torch.randn(2, 2, 64, generator=g), torch.zeros(2, 1, 64)
    first, last = torch.tensor([0, 10]), torch.tensor([30, 40])
    found = kv.decode_attention(query, keys, values, last, now, now, first)
    all_keys, all_values = (torch.cat([x, now[:, :, None]], dim=2).expand(2, 2, 31, 64) for x in (key, value))
    expected = torch.nn.functional.scaled_dot_product_attention(query[:, :, None], all_keys, all_values)[:, :, 0]
    assert relative_error(found, expected) < 0.02


def test_writing_is_traced_as_it_runs() -> None:
    g = torch.Generator().manual_seed(2)
    x = torch.randn(2, 2, 3, 64, generator=g)
    flat = (*cache(2, 64, 4, 1, False), *cache(2, 64, 4, 1, True), x, x + 1, torch.tensor([1, 9]), *kv.NO_SMOOTHING)
    torch.library.opcheck(torch.ops.halfbyte.kv_write, flat)


def test_tokens_that_do_not_fit_a_cache_are_refused() -> None:
    caches = [cache(2, 64, 4, 1, False) for _ in range(2)]
    x, position = torch.zeros(2, 2, 3, 64), torch.tensor([0, 0])
    wide = cache(2, 64, 4, 1, False)._replace(scales=torch.zeros(2, 2, 40, 1))
    for keys, key, value, places in [
        (caches[0], x[:, :1], x, position), (caches[0], x[..., :60], x[..., :60], position), (caches[0], x, x, position[:1]),
        (wide, x, x, position), (caches[0], x.half(), x, position),
    ]:  # fmt: skip
        with pytest.raises(FormatError, match="give"):
            kv.write_tokens(keys, caches[1], key, value, places)
