"""A line plot as SVG, for the documents: measured numbers over a few labelled places, one line for each series."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 640, 320
LEFT, RIGHT, TOP, BOTTOM = 60, 200, 30, 44
COLOURS = ("#1b6ca8", "#d1495b", "#2e7d32", "#8e5ea2", "#b26a00", "#455a64")


@dataclass(frozen=True, slots=True)
class Line:
    """One series: labels of places on the horizontal axis, and values. Dashed lines are for comparison."""

    name: str
    points: tuple[tuple[str, float], ...]
    dashed: bool = False


@dataclass(frozen=True, slots=True)
class Plot:
    """Lines over the same places, in the order in which they first occur."""

    title: str
    horizontal: str
    vertical: str
    lines: tuple[Line, ...]


def svg(plot: Plot) -> str:
    """The plot as a stand-alone file. ValueError where there is no point to show."""
    places = list(dict.fromkeys(label for line in plot.lines for label, _ in line.points))
    values = [value for line in plot.lines for _, value in line.points]
    if not values:
        raise ValueError(f"the plot {plot.title!r} has no points")
    marks = ticks(min(values), max(values))
    low, high = marks[0], marks[-1]

    def x(label: str) -> float:
        return LEFT + (places.index(label) + 0.5) / len(places) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text(LEFT, 18, plot.title, "start", bold=True),
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, plot.horizontal, "middle"),
        f'<text transform="translate(14 {(TOP + HEIGHT - BOTTOM) / 2:.1f}) rotate(-90)" text-anchor="middle">'
        f"{escape(plot.vertical)}</text>",
    ]
    for mark in marks:
        parts.append(f'<path d="M{LEFT} {y(mark):.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        parts.append(_text(LEFT - 6, y(mark) + 4, f"{mark:g}", "end"))
    parts += [_text(x(place), HEIGHT - BOTTOM + 16, place, "middle") for place in places]
    for number, line in enumerate(plot.lines):
        parts += _series(
            line, COLOURS[number % len(COLOURS)], TOP + 8 + 18 * number, [(x(p), y(v)) for p, v in line.points]
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


def ticks(lowest: float, highest: float) -> list[float]:
    """Round numbers around the values, at most seven of them."""
    spread = max(highest - lowest, 1e-9)
    unit = 10 ** math.floor(math.log10(spread))
    step = next(unit * factor for factor in (0.2, 0.5, 1, 2, 5) if spread / (unit * factor) <= 5)
    first, last = math.floor(lowest / step), math.ceil(highest / step)
    return [round(step * number, 12) for number in range(first, max(last, first + 1) + 1)]


def _series(line: Line, colour: str, legend: float, points: Sequence[tuple[float, float]]) -> list[str]:
    dash = ' stroke-dasharray="5 4"' if line.dashed else ""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    start = WIDTH - RIGHT + 12
    parts = [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>']
    parts += [] if line.dashed else [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points]
    parts.append(f'<path d="M{start} {legend:.1f}h18" stroke="{colour}" stroke-width="2"{dash}/>')
    return [*parts, _text(start + 24, legend + 4, line.name, "start")]


def _text(x: float, y: float, words: str, anchor: str, *, bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{weight}>{escape(words)}</text>'
