"""Turning the coordinates in which a model computes: the logits stay what they were.

    residual stream   x ↦ x·Q   what writes it (embeddings, projections back): W ↦ Qᵀ·W, b ↦ b·Q
                                what reads it (through a norm, whose gain moves into it first): W ↦ W·Q
    heads             v ↦ v·Q   value rows of each KV head: W ↦ Qᵀ·W, b ↦ b·Q; each query head's columns after: W ↦ W·Q
    inputs            x ↦ x·Q   done at run time; the linear that reads it: W ↦ W·Q

A `Turn` is x ↦ x·Q over the last axis, Q orthogonal. An RMS norm without gain commutes with every Q, and a layer norm
with every Q that leaves (1, …, 1) as it is; so nothing else of the model changes (QuaRot, arXiv 2404.00456, section 4.1).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from halfbyte.errors import ModelError
from halfbyte.models.architecture import Architecture, Rows
from halfbyte.models.fold import ResolvedLink, find_links
from halfbyte.models.linearize import is_router
from halfbyte.models.load import Skeleton

Turn = Callable[[Tensor], Tensor]
"""x ↦ x·Q over the last axis."""

ROWS_AT_ONCE = 8192  # of an embedding or a head, in float64


@dataclass(frozen=True, slots=True, eq=False)
class Wiring:
    """Who reads and who writes the residual stream of one block, and whom its values reach."""

    norms: tuple[ResolvedLink, ...]
    values: tuple[ResolvedLink, ...]
    writers: Mapping[str, nn.Linear]

    @property
    def down(self) -> dict[str, nn.Linear]:
        """The writers that read what a feed-forward part computes."""
        attention = {name for link in self.values for name in link.readers}
        return {name: linear for name, linear in self.writers.items() if name not in attention}


def wiring(block: nn.Module, skeleton: Skeleton) -> Wiring:
    """The wiring of a block. ModelError where there is no table, or where a linear neither reads a norm nor writes."""
    table = table_of(skeleton)
    links = find_links(block, table, *skeleton.heads)
    norms = tuple(link for link in links if not isinstance(link.writer, nn.Linear))
    values = tuple(link for link in links if link.rows in (Rows.VALUES, Rows.VALUES_PER_HEAD))
    writers = {
        name: module
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear) and any(_matches(name, pattern) for pattern in table.writers)
    }
    return Wiring(norms, values, writers)


def check_stream(skeleton: Skeleton) -> None:
    """ModelError, with the reason, unless every reader and every writer of the residual stream is known."""
    table = table_of(skeleton)
    remedy = "set `residual: false` in the recipe's quarot step, which keeps the rotations of heads and of inputs"
    if table.fixed_stream is not None:
        raise ModelError(
            f"the residual stream of {skeleton.config.model_type} cannot be rotated: {table.fixed_stream}; {remedy}"
        )
    known = (*table.embeddings, table.final_norm, table.head)
    prefix = skeleton.blocks_name + "."
    strangers = [
        name
        for name, module in skeleton.model.named_modules()
        if not name.startswith(prefix) and name not in known and dict(module.named_parameters(recurse=False))
    ]
    for index, block in enumerate(skeleton.blocks):
        found = wiring(block, skeleton)
        accounted = {*found.writers, *(name for link in found.norms for name in link.readers)}
        strangers += [
            f"{prefix}{index}.{name}"
            for name, module in block.named_modules()
            if (isinstance(module, nn.Linear) or is_router(module)) and name not in accounted
        ]
    if table.final_norm is None or strangers or _module(skeleton.model, table.final_norm) is None:
        raise ModelError(
            f"the residual stream of this {type(skeleton.model).__name__} cannot be rotated: "
            f"{', '.join(strangers[:3]) or 'its last block'} reads or writes it without a norm of its own; {remedy}"
        )


def keeps_mean(skeleton: Skeleton) -> bool:
    """Whether the model's norms take the mean away, so that a rotation has to leave it alone."""
    table = table_of(skeleton)
    return table.final_norm is not None and isinstance(_module(skeleton.model, table.final_norm), nn.LayerNorm)


@torch.no_grad()
def turn_stream(found: Wiring, turn: Turn) -> None:
    """Rotate the residual stream of a block, whose norms lose their gains. Edits in place."""
    for link in found.norms:
        fold_gain(link)
        bias = getattr(link.writer, "bias", None)
        for parameter in (*link.weights, *([] if bias is None else [bias])):
            parameter.copy_(turn(parameter))
    for linear in found.writers.values():
        _turn_outputs(linear, turn, slice(None))


@torch.no_grad()
def turn_values(found: Wiring, turn: Turn) -> None:
    """Rotate what each head sums up, between the values and the projection after them. Edits in place."""
    for link in found.values:
        writer, dim = link.writer, link.head_dim
        assert isinstance(writer, nn.Linear)
        for rows in link.written.to(writer.weight.device).view(-1, dim):
            _turn_outputs(writer, turn, rows)
        for weight in link.weights:
            weight.copy_(turn(weight.unflatten(1, (-1, dim))).flatten(1))


@torch.no_grad()
def turn_inputs(linear: nn.Linear, turn: Turn) -> None:
    """Let a linear expect its input rotated. Edits in place."""
    linear.weight.copy_(turn(linear.weight))


@torch.no_grad()
def turned_outside(skeleton: Skeleton, read: Callable[[str], Tensor], turn: Turn) -> dict[str, Tensor]:
    """What stands outside the blocks, after the rotation of the residual stream: path of a parameter -> its new value.

    `read` gives a parameter by its path, the head's its own or the embedding's; values come back in the dtypes of what
    was read. The head is among them, so that it is no longer tied to the embedding.
    """
    table = table_of(skeleton)
    assert table.final_norm is not None
    norm, head = skeleton.model.get_submodule(table.final_norm), skeleton.model.get_submodule(table.head)
    stored = read(f"{table.final_norm}.weight")
    gain = stored.double() + table.norm_offset
    values = {f"{name}.weight": _by_rows(read(f"{name}.weight"), turn) for name in table.embeddings}
    weight = read(f"{table.head}.weight")
    values[f"{table.head}.weight"] = _by_rows(weight, lambda rows: turn(rows * gain))
    values[f"{table.final_norm}.weight"] = torch.full_like(stored, 1 - table.norm_offset)
    if getattr(norm, "bias", None) is not None:
        bias = read(f"{table.final_norm}.bias")
        if getattr(head, "bias", None) is not None:
            own = read(f"{table.head}.bias")
            values[f"{table.head}.bias"] = (own.double() + weight.double() @ bias.double()).to(own.dtype)
            values[f"{table.final_norm}.bias"] = torch.zeros_like(bias)
        else:
            moved = _past_gain(bias.double(), gain, table.final_norm)
            values[f"{table.final_norm}.bias"] = turn(moved).to(bias.dtype)
    return values


@torch.no_grad()
def fold_gain(link: ResolvedLink) -> None:
    """Move a norm's gain into its readers, and its bias into theirs where all have one. Edits in place."""
    norm = link.writer
    weight, bias = norm.get_parameter("weight"), getattr(norm, "bias", None)
    gain = weight + link.norm_offset
    biases = [getattr(reader, "bias", None) for reader in link.readers.values()]
    if bias is not None and all(isinstance(each, Tensor) for each in biases):
        for reader, own in zip(link.weights, biases, strict=True):
            assert own is not None
            own += reader @ bias
        bias.zero_()
    elif bias is not None:
        bias.copy_(_past_gain(bias, gain, link.writer_name))
    for reader in link.weights:
        reader *= gain
    weight.fill_(1 - link.norm_offset)


def table_of(skeleton: Skeleton) -> Architecture:
    if skeleton.architecture is None:
        raise ModelError(
            f"{skeleton.config.model_type} has no table, and quarot must know who reads and writes the residual stream: "
            "leave the quarot step out, or add a table to models/tables.py"
        )
    return skeleton.architecture


def _past_gain(bias: Float[Tensor, "in"], gain: Float[Tensor, "in"], name: str) -> Float[Tensor, "in"]:
    """The bias of a norm that has given its gain away."""
    if bool(((gain == 0) & (bias != 0)).any()):
        raise ModelError(
            f"{name} has a bias where its gain is 0, and its readers have no bias to take it: set `residual: false` in "
            "the recipe's quarot step"
        )
    return torch.where(gain == 0, torch.zeros_like(bias), bias / gain)


def _turn_outputs(linear: nn.Linear, turn: Turn, rows: slice | Tensor) -> None:
    linear.weight[rows] = turn(linear.weight[rows].T).T
    if linear.bias is not None:
        linear.bias[rows] = turn(linear.bias[rows])


def _by_rows(weight: Float[Tensor, "rows in"], change: Turn) -> Float[Tensor, "rows in"]:
    """Each part changed in float64 and rounded once."""
    return torch.cat([change(rows.double()).to(weight.dtype) for rows in weight.split(ROWS_AT_ONCE)])


def _module(model: nn.Module, name: str) -> nn.Module | None:
    """transformers keeps a None under the name of a norm that a variant lacks."""
    parent, _, child = name.rpartition(".")
    return getattr(model.get_submodule(parent), child, None)


def _matches(name: str, pattern: str) -> bool:
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(w in ("*", p) for p, w in zip(parts, wanted, strict=True))
