"""Tiny models with what a transform is given: the links of each block, and statistics of what its linears see."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from halfbyte.calibration.statistics import InputStatistics
from halfbyte.calibration.walk import linears, watching
from halfbyte.models.fold import ResolvedLink, find_links
from halfbyte.models.heads import head_counts
from halfbyte.models.linearize import linearize
from halfbyte.models.tables import ARCHITECTURES
from tiny_models import VARIANTS, logits, tiny, tokens


class ObservedBlock(NamedTuple):
    """One linearized block; linears that read one tensor have statistics of their own here."""

    block: nn.Module
    links: list[ResolvedLink]
    seen: dict[str, InputStatistics]


def observed_model(variant: str, ids: Tensor | None = None) -> tuple[Any, list[ObservedBlock]]:
    """A linearized float64 model of this variant, and its blocks after it has read `ids`."""
    model_type, overrides = VARIANTS[variant]
    model, table = tiny(model_type, torch.float64, **overrides), ARCHITECTURES[model_type]
    found = []
    for block in model.get_submodule(table.blocks).children():
        linearize(block)
        seen = {name: InputStatistics.empty(linear.in_features) for name, linear in linears(block).items()}
        found.append(ObservedBlock(block, find_links(block, table, *head_counts(model.config)), seen))
    read(model, found, tokens() if ids is None else ids)
    return model, found


def read(model: Any, blocks: list[ObservedBlock], ids: Tensor) -> None:
    """Let the model read and the statistics of every block grow. Edits in place."""
    named = {
        f"{index}.{name}": linear
        for index, (block, _, _) in enumerate(blocks)
        for name, linear in linears(block).items()
    }

    def notice(name: str, inputs: Tensor) -> None:
        index, _, linear = name.partition(".")
        blocks[int(index)].seen[linear].absorb(inputs.flatten(0, -2))

    with watching(named, notice):
        logits(model, ids)
