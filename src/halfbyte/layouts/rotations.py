"""What a checkpoint says of the rotations that its model needs at run time: `online_hadamards` of `quantization_config`.

    inputs   a list of {targets, size, seed, fallback}: linears by path or expression, and what enters them (OnlineHadamard)

The weights hold the inverse, so a reader that leaves it out computes nonsense: such checkpoints carry our own quant_method.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from halfbyte.errors import CheckpointError
from halfbyte.layouts.compressed_tensors import Targets
from halfbyte.layouts.targets import patterns
from halfbyte.scheme import OnlineHadamard

KEY = "online_hadamards"


def rotation_entry(inputs: Mapping[str, OnlineHadamard], others: Iterable[str]) -> dict[str, Any]:
    """The entry of a `quantization_config`; empty where nothing runs online. `others`: linears that read as they are."""
    if not inputs:
        return {}
    others = list(others)
    groups = []
    for online in dict.fromkeys(inputs.values()):
        mine = [path for path, each in inputs.items() if each == online]
        rest = [path for path, each in inputs.items() if each != online]
        expressions, single = patterns(mine, [*rest, *others])
        targets = [*(f"re:{expression}" for expression in expressions), *single]
        groups.append({"targets": targets, **online.model_dump()})
    return {KEY: {"inputs": groups}}


def online_inputs(config: Mapping[str, Any], modules: Sequence[str]) -> dict[str, OnlineHadamard]:
    """Which of the linears `modules` read rotated inputs, and how. CheckpointError for an entry that is damaged."""
    entry = config.get(KEY) or {}
    groups = [(group.get("targets") or (), _parsed(group)) for group in entry.get("inputs") or ()]
    targets = Targets({target: online for names, online in groups for target in names})
    found = {path: targets.of(path) for path in modules}
    return {path: online for path, online in found.items() if online is not None}


def _parsed(entry: Mapping[str, Any]) -> OnlineHadamard:
    try:
        return OnlineHadamard.model_validate({key: value for key, value in entry.items() if key != "targets"})
    except ValidationError as cause:
        raise CheckpointError(f"{KEY} of config.json is damaged ({cause}): download the checkpoint again") from cause
