"""Keys that are stored before RoPE, or in rotated coordinates, against the float64 reference."""

from typing import Any

import pytest
import torch
from kv_steps import Step, errors, fast, plain, step
from torch import Tensor

from halfbyte.errors import FormatError
from halfbyte.kernels import kv_attention as kv
from halfbyte.kernels.kv_attention import cuts
from halfbyte.kernels.kv_attention.cuts import Cut

# keys, their turns and the query's are float16, each rounded once, by at most 2**-11 of itself
TOLERANCE = 2.0**-9.5


def turns(positions: Tensor, half: int) -> Tensor:
    """Cosines and sines, [2, ..., half]."""
    angles = positions[..., None].double() * 10000.0 ** (-torch.arange(half) / half)
    return torch.stack([angles.cos(), angles.sin()]).float()


def before_rope(arguments: Step, half: int, mscale: float = 1.0) -> Step:
    """Rows whose tokens begin at positions of their own; what is not seen is turned anyhow."""
    batch, _, capacity = arguments.keys.codes.shape[:3]
    positions = torch.arange(capacity) - torch.tensor([[0], [-700]])[:batch]
    if arguments.first is not None:
        positions = torch.where(torch.arange(capacity) < arguments.first[:, None], 1, positions)
    cos, sin = turns(positions, half) * mscale
    return arguments._replace(rotation=kv.KeyRotation(cos, sin, turns(torch.arange(cuts.NEAR), half)))


@pytest.mark.parametrize("whole", [False, True], ids=["bare", "whole"])
@pytest.mark.parametrize(
    ("query_heads", "kv_heads", "dim", "symmetric"), [(2, 2, 128, False), (3, 1, 64, True), (12, 1, 128, False)]
)
def test_the_kernel_for_tensor_cores_turns_keys(
    query_heads: int, kv_heads: int, dim: int, symmetric: bool, whole: bool
) -> None:
    arguments = before_rope(step(query_heads, kv_heads, 140, dim, 4, 1, symmetric, whole), dim // 2)
    assert cuts.obstacle(query_heads, dim, arguments.keys, arguments.values, arguments.rotation) is None
    assert errors(fast(arguments, Cut(1, 32, 2, 2)), arguments) < TOLERANCE


@pytest.mark.parametrize("cut", [Cut(1, 16, 1, 2), Cut(2, 16, 2, 4), Cut(3, 32, 4, 3)], ids=str)
def test_every_cut_turns_them(cut: Cut) -> None:
    arguments = before_rope(step(whole=True, capacity=200), 64, mscale=1.3)
    assert errors(fast(arguments, cut), arguments) < TOLERANCE
    assert errors(plain(arguments, cut), arguments) < 1e-5


@pytest.mark.parametrize(("bits", "half"), [(3, 20), (4, 12), (8, 4)])
def test_the_kernel_for_all_widths_turns_some_channels_or_all(bits: int, half: int) -> None:
    arguments = before_rope(step(3, 1, 50, 40, bits, 5, whole=True), half)
    assert errors(plain(arguments, Cut(2, 16)), arguments) < 1e-5


@pytest.mark.parametrize("whole", [False, True], ids=["bare", "whole"])
def test_the_op_turns_them(whole: bool) -> None:
    arguments = before_rope(step(2, 1, 60, 40, 8, 1, whole=whole), 16)
    assert errors(kv.decode_attention(*arguments), arguments) < 1e-6


def in_other_coordinates(whole: bool) -> Step:
    arguments = step(4, 2, whole=whole)
    smoothing = arguments.smoothing._replace(key_scale=None)
    return arguments._replace(packed_query=torch.randn(arguments.query.shape), smoothing=smoothing)


@pytest.mark.parametrize("whole", [False, True], ids=["bare", "whole"])
def test_keys_in_other_coordinates_have_a_query_of_their_own(whole: bool) -> None:
    arguments = in_other_coordinates(whole)
    assert errors(kv.decode_attention(*arguments), arguments) < 1e-6
    assert errors(plain(arguments, Cut(2, 16)), arguments) < 1e-5
    assert errors(fast(arguments, Cut(2, 32, 2, 2)), arguments) < 2.0**-10


@pytest.mark.parametrize("broken", ["far", "near", "back"])
def test_a_wrong_turn_is_noticed(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every gate is seen red: the turn of a warp's first token, those of its others, the direction of the query's."""
    arguments = before_rope(step(capacity=100), 64)
    rotation = arguments.rotation
    assert rotation is not None
    if broken == "far":
        wrong = rotation._replace(cos=rotation.cos.roll(1, 1), sin=rotation.sin.roll(1, 1))
    elif broken == "near":
        wrong = rotation._replace(near=rotation.near.roll(1, 1).contiguous())
    else:
        wrong = rotation._replace(sin=-rotation.sin)
    found = fast(arguments._replace(rotation=wrong), Cut(1, 32, 2, 2))
    assert errors(found, arguments) > 0.02


def test_what_the_fast_kernel_cannot_turn_is_left_to_the_plain_one() -> None:
    arguments = before_rope(step(groups=2), 64)
    assert cuts.obstacle(2, 128, arguments.keys, arguments.values, arguments.rotation)
    partial = before_rope(step(), 32)
    assert cuts.obstacle(2, 128, partial.keys, partial.values, partial.rotation)


@pytest.mark.parametrize(
    "broken",
    [
        lambda r: {"rotation": r._replace(cos=r.cos[:1])},
        lambda r: {"rotation": r._replace(sin=r.sin[..., :3])},
        lambda r: {"rotation": r._replace(near=r.near[0])},
        lambda _: {"packed_query": torch.zeros(2, 2, 128)},
        lambda _: {"rotation": None, "packed_query": torch.zeros(1, 2, 128)},
    ],
)
def test_what_does_not_fit_is_refused(broken: Any) -> None:
    arguments = before_rope(step(), 64)
    with pytest.raises(FormatError, match="give"):
        kv.decode_attention(*arguments._replace(**broken(arguments.rotation)))


@pytest.mark.parametrize("arguments", [before_rope(step(), 64), in_other_coordinates(False)], ids=["turned", "other"])
def test_the_op_is_traced_as_it_runs(arguments: Step) -> None:
    flat = (
        arguments.query, *arguments.keys, *arguments.values, arguments.last, arguments.key_now, arguments.value_now,
        None, None, None, None, *arguments.smoothing, 0.1, *(arguments.rotation or (None, None, None)),
        arguments.packed_query,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.halfbyte.kv_attention, flat)
