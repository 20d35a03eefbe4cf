"""What a transformer is, as data: where its blocks are, and between which modules a per-channel scale can move."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class Rows(StrEnum):
    """Which output channels of a writer its readers read."""

    ALL = "all"
    LAST_HALF = "last-half"  # the `up` half of a fused gate_up projection
    VALUES = "values"  # the value rows of a (fused qkv or plain v) projection; repeated over query heads under GQA
    VALUES_PER_HEAD = "values-per-head"  # as VALUES, of a qkv that holds each KV head's queries, key and value together


@dataclass(frozen=True, slots=True)
class Link:
    """`writer`'s output reaches each of `readers`' inputs through nothing but products with other signals.

    Dividing the writer's output channels by `scale` and multiplying the readers' input channels by it leaves the
    function of the block as it was. Names are relative to the block; `*` stands for every child of a module list
    (an expert index), the same child in writer and readers when both have one. `readers` are all that read the writer,
    a router included, and the first of them reads every token.
    """

    writer: str
    readers: tuple[str, ...]
    rows: Rows = Rows.ALL
    through: str | None = field(default=None, kw_only=True)
    """The activation between writer and readers: the link holds only where it is a ReLU, which a scale passes."""
    when: Mapping[str, object] = field(default_factory=dict, kw_only=True)
    """Attributes of the block, by dotted path, and the values at which the link holds; it is left out at others."""
    optional: bool = field(default=False, kw_only=True)
    """Some variants of the family lack the writer, or all of the readers: there the link is left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """One family of models. Names inside a block are relative to it; others are from the model's root."""

    model_types: tuple[str, ...]  # `config.model_type` of the families that share the table
    blocks: str  # the module list that is walked
    embeddings: tuple[str, ...]  # modules that write the hidden states which enter the first block
    final_norm: str | None  # None where the architecture has none after its last block
    head: str
    links: tuple[Link, ...]
    writers: tuple[str, ...] = ()
    """The linears whose outputs are added to the residual stream; every other one of a block reads a norm's output."""
    fixed_stream: str | None = None
    """Why the residual stream has to keep its coordinates; None where it can be rotated."""
    norm_offset: float = 0.0  # Gemma's norms multiply by (1 + weight)
    disk_names: Mapping[str, str] = field(default_factory=dict)
    """Patterns of names inside a block, here -> in the checkpoint, with `*` for an expert's index."""
    outer_disk_names: Mapping[str, str] = field(default_factory=dict)
    """Names of modules outside the blocks, here -> in the checkpoint, where the two differ."""
