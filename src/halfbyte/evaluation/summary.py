"""Hundreds of modules as a few lines: those that differ in their numbers only and came out alike are one group."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Generic, Protocol, TypeVar


class HasPath(Protocol):
    @property
    def path(self) -> str: ...


Member = TypeVar("Member", bound=HasPath)


@dataclass(frozen=True, slots=True)
class Group(Generic[Member]):
    """Modules such as model.layers.0-31.mlp.up_proj, in the model's order."""

    name: str
    members: tuple[Member, ...]


@dataclass(frozen=True, slots=True)
class Spread:
    """The worst and the middle of some decibels."""

    worst: float
    median: float


def grouped(modules: Iterable[Member], alike: Callable[[Member], Hashable]) -> list[Group[Member]]:
    """Groups in the order of their first members; `alike` says what else than the path must be the same."""
    found: dict[Hashable, list[Member]] = {}
    for module in modules:
        found.setdefault((kind(module.path), alike(module)), []).append(module)
    return [Group(_name([module.path for module in members]), tuple(members)) for members in found.values()]


def in_block(path: str) -> bool:
    """Whether a module stands in a block, whose paths have numbers; else it is the head."""
    return kind(path) != path


def kind(path: str) -> str:
    """The path with `*` for every number: what a module is, whichever block and expert it belongs to."""
    return ".".join("*" if part.isdigit() else part for part in path.split("."))


def short(name: str) -> str:
    """A path or a group's name from behind its block's number: `self_attn.q_proj`, `mlp.experts.0-7.up_proj`."""
    parts = name.split(".")
    first = next((place for place, part in enumerate(parts) if part[0] in "*0123456789"), len(parts))
    return ".".join(parts[first + 1 :]) or name


def span(numbers: Iterable[int]) -> str:
    """0, 1, 2, 3, 7 → `0-3,7`."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in runs)


def spread(decibels: Iterable[float | None]) -> Spread | None:
    """None where nothing was measured."""
    values = [value for value in decibels if value is not None]
    return Spread(min(values), median(values)) if values else None


def _name(paths: Sequence[str]) -> str:
    columns = zip(*(path.split(".") for path in paths), strict=True)
    return ".".join(span(map(int, column)) if column[0].isdigit() else column[0] for column in columns)
