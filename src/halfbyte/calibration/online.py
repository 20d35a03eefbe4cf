"""Rotations that a model needs at run time, while its blocks are walked."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from halfbyte.numerics.rotation import Orthogonal, online_rotation
from halfbyte.scheme import OnlineHadamard


def rotate_inputs(model: nn.Module, online: Mapping[str, OnlineHadamard]) -> None:
    """Let these linears, by path, read their inputs rotated; whoever watches them later sees that. Edits in place."""
    turns = {each: online_rotation(each) for each in set(online.values())}
    for path, each in online.items():

        def hook(_module: nn.Module, args: tuple[Any, ...], turn: Orthogonal = turns[each]) -> tuple[Any, ...]:
            return turn.apply(args[0]), *args[1:]

        model.get_submodule(path).register_forward_pre_hook(hook)
