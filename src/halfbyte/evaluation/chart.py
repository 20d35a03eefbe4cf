"""The geometry of the report's charts: one small SVG panel per kind of module, all of them to one scale."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from halfbyte.evaluation.summary import kind, short
from halfbyte.record import ModuleRecord

WIDTH, HEIGHT = 240, 110
LEFT, RIGHT, TOP, BOTTOM = 26, 6, 8, 16
STEPS = (1, 2, 5, 10, 20, 50, 100)
MOST_TICKS = 5


@dataclass(frozen=True, slots=True)
class Point:
    """One block: where its weakest module lies, and its best one where it has several of the kind (experts)."""

    x: float
    y: float
    top: float
    path: str
    decibels: float


@dataclass(frozen=True, slots=True)
class Panel:
    """One kind of module through the blocks; coordinates are in a box of WIDTH x HEIGHT."""

    title: str
    points: tuple[Point, ...]
    weakest: Point
    first_block: int
    last_block: int

    @property
    def line(self) -> str:
        """The `points` of an SVG polyline."""
        return " ".join(f"{point.x:.1f},{point.y:.1f}" for point in self.points)


@dataclass(frozen=True, slots=True)
class Chart:
    """All panels and the scale that they share."""

    measure: str
    panels: tuple[Panel, ...]
    ticks: tuple[tuple[float, int], ...]  # y, decibels


def chart(modules: Sequence[ModuleRecord]) -> Chart | None:
    """Output SNR by block where it was observed, else weight SNR; None where nothing finite was measured."""
    observed = any(module.output_snr is not None for module in modules)
    values = {module.path: module.output_snr if observed else module.weight_snr for module in modules}
    finite = {path: value for path, value in values.items() if value is not None and math.isfinite(value)}
    if not finite:
        return None
    low, high, step = scale(min(finite.values()), max(finite.values()))
    blocks = {path: _block(path) for path in finite}
    edges = min(blocks.values()), max(blocks.values())
    kinds: dict[str, dict[int, list[str]]] = {}
    for path in finite:
        kinds.setdefault(kind(path), {}).setdefault(blocks[path], []).append(path)

    def place(block: int, paths: list[str]) -> Point:
        worst = min(paths, key=finite.__getitem__)
        best = max(finite[path] for path in paths)
        return Point(_x(block, *edges), _y(finite[worst], low, high), _y(best, low, high), worst, finite[worst])

    panels = []
    for name, members in kinds.items():
        points = tuple(place(block, paths) for block, paths in sorted(members.items()))
        panels.append(Panel(short(name), points, min(points, key=lambda point: point.decibels), *edges))
    ticks = tuple((_y(tick, low, high), tick) for tick in range(low, high + 1, step))
    return Chart("output SNR" if observed else "weight SNR", tuple(panels), ticks)


def scale(lowest: float, highest: float) -> tuple[int, int, int]:
    """Ends of an axis and the distance of its ticks: round numbers around the values, at most five ticks."""
    for step in STEPS:
        low = math.floor(lowest / step) * step
        high = max(math.ceil(highest / step) * step, low + step)
        if (high - low) // step < MOST_TICKS:
            return low, high, step
    low, high = math.floor(lowest), math.ceil(highest)
    return low, high, high - low


def _block(path: str) -> int:
    return next((int(part) for part in path.split(".") if part.isdigit()), 0)


def _x(block: int, first: int, last: int) -> float:
    share = (block - first) / (last - first) if last > first else 0.5
    return LEFT + share * (WIDTH - LEFT - RIGHT)


def _y(decibels: float, low: int, high: int) -> float:
    return HEIGHT - BOTTOM - (decibels - low) / (high - low) * (HEIGHT - TOP - BOTTOM)
