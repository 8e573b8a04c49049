"""Charts as strings of SVG: their colours are classes of the page's style sheet, so that they follow its light and dark.

Predicted marks are hollow and dashed, measured ones filled and solid. What is not finite, or not above 0 on a logarithmic axis, is left
out and counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 760, 290
LEFT, RIGHT, TOP, BOTTOM = 64, 150, 14, 44  # around what is plotted
LINE, NUM_COLOURS, NUM_SHADES = 15, 8, 8  # pixels of a line of text
Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Axis:
    """From low to high; log: in decades."""

    low: float
    high: float
    log: bool = False

    @classmethod
    def over(cls, values: Sequence[float], log: bool = False) -> Axis:
        """With some room at both ends, but not below 0 where nothing is."""
        low, high = (math.log10(v) if log else v for v in (min(values, default=1.0), max(values, default=1.0)))
        room = 0.05 * (high - low) or 0.1 * abs(low) or 0.5
        least = max(low - room, 0.0) if low >= 0 and not log else low - room
        return cls(10**least, 10 ** (high + room), True) if log else cls(least, high + room)

    def at(self, value: float) -> float:
        """Its place: 0 at the low end, 1 at the high one."""
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return (value - low) / (high - low)

    def ticks(self) -> list[float]:
        """Round numbers inside: 3 to 10 of them."""
        if self.log and self.high / self.low > 8:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)))
            few = (1.0,) if len(decades) > 4 else (1.0, 3.0) if len(decades) > 2 else (1.0, 2.0, 5.0)
            every = [m * 10.0**n for n in decades for m in few]
        else:
            rough = (self.high - self.low) / 5
            power = 10.0 ** math.floor(math.log10(rough))
            step = power * min(m for m in (1, 2, 5, 10) if m * power >= rough)
            every = [n * step for n in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
        return [v for v in every if self.low <= v <= self.high]


@dataclass(frozen=True, slots=True)
class Series:
    """mark: of every point, "hollow", "filled" or "" for the line alone; line: "solid", "dashed" or "". colour: a number of the page's
    palette; None: grey."""

    label: str
    points: Sequence[Point]
    colour: int | None = None
    line: str = "solid"
    mark: str = ""


def number(value: float) -> str:
    """1234567 -> '1.23M', 5000 -> '5,000', 0.00012 -> '0.00012'"""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def text(x: float, y: float, words: str, anchor: str = "start", name: str = "", turn: int = 0) -> str:
    turned = f' transform="rotate({turn} {x:.1f} {y:.1f})"' if turn else ""
    named = f' class="{name}"' if name else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{named}{turned}>{escape(words)}</text>'


def drawing(width: float, height: float, title: str, parts: Iterable[str]) -> str:
    """One SVG; title: for who does not see it."""
    size = f'width="{width:.0f}" viewBox="0 0 {width:.0f} {height:.0f}"'
    head = f'<svg {size} role="img" aria-label="{escape(title)}">'
    return head + "".join(parts) + "</svg>"


def chart(title: str, x_label: str, y_label: str, series: Sequence[Series], log_y: bool = False) -> str:
    """Lines and marks over two axes, each named at its right end."""
    shown = [(one, _drawable(one.points, log_y)) for one in series]
    lost = sum(len(one.points) - len(points) for one, points in shown)
    shown = [(one, points) for one, points in shown if points]
    x = Axis.over([p[0] for _, points in shown for p in points])
    y = Axis.over([p[1] for _, points in shown for p in points], log_y)
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def placed(point: Point) -> Point:
        return LEFT + x.at(point[0]) * (right - LEFT), bottom - y.at(point[1]) * (bottom - TOP)

    parts = []
    for value in y.ticks():
        height = placed((x.low, value))[1]
        parts.append(f'<path class="grid" d="M{LEFT} {height:.1f}H{right}"/>')
        parts.append(text(LEFT - 8, height + 4, number(value), "end"))
    for value in x.ticks():
        place = placed((value, y.low))[0]
        parts.append(f'<path class="axis" d="M{place:.1f} {bottom}v4"/>')
        parts.append(text(place, bottom + 18, number(value), "middle"))
    parts.append(f'<path class="axis" d="M{LEFT} {bottom}H{right}"/>')
    parts.append(text((LEFT + right) / 2, HEIGHT - 6, x_label, "middle", "label"))
    parts.append(text(16, (TOP + bottom) / 2, y_label, "middle", "label", -90))
    ends = []
    for one, points in shown:
        places, name = [placed(point) for point in points], _colour(one.colour)
        if one.line and len(places) > 1:
            path = "L".join(f"{a:.1f} {b:.1f}" for a, b in places)
            parts.append(f'<path class="line {one.line} {name}" d="M{path}"/>')
        parts += [f'<circle class="{one.mark} {name}" cx="{a:.1f}" cy="{b:.1f}" r="4"/>' for a, b in places if one.mark]
        ends.append((places[-1][1], one, name))
    heights = apart([end for end, _, _ in ends], LINE, TOP, bottom)
    for height, (_, one, name) in zip(heights, ends, strict=True):
        parts += [f'<path class="line {one.line} {name}" d="M{right + 8} {height:.1f}h16"/>'] * bool(one.line)
        parts += [f'<circle class="{one.mark} {name}" cx="{right + 16}" cy="{height:.1f}" r="4"/>'] * bool(one.mark)
        parts.append(text(right + 30, height + 4, clipped(one.label, 20)))
    if lost:
        parts.append(text(right, TOP + 4, f"{lost} values are not finite: left out", "end", "label"))
    return drawing(WIDTH, HEIGHT, f"{title}: {y_label} over {x_label}", parts)


def apart(heights: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Pushed down, then up, so that neighbours are `gap` apart (less where there is no room) and all within low and high."""
    order = sorted(range(len(heights)), key=lambda n: heights[n])
    gap, placed = min(gap, (high - low) / max(1, len(order) - 1)), list(heights)
    least = low
    for here in order:
        placed[here] = max(placed[here], least)
        least = placed[here] + gap
    most = high
    for here in reversed(order):
        placed[here] = min(placed[here], most)
        most = placed[here] - gap
    return placed


@dataclass(frozen=True, slots=True)
class Cell:
    """Of a grid. shade: 0 to NUM_SHADES - 1, None: none. fill: the share of its height that is filled. ring: whether it is marked;
    mark: a character on it."""

    title: str
    shade: int | None = None
    fill: float | None = None
    ring: bool = False
    mark: str = ""


def grid(title: str, rows: Sequence[tuple[str, Sequence[Cell | None]]], cell_height: float, x_label: str) -> str:
    """A row of cells a name, a column a layer; None: nothing there."""
    count = max(len(cells) for _, cells in rows)
    left = 14 + 7 * max(len(clipped(name, 24)) for name, _ in rows)
    width = min(30.0, (960 - left) / count)
    parts, rings, gap = [], [], 1.0 if width > 6 else 0.3
    for row, (name, cells) in enumerate(rows):
        top = row * (cell_height + 2)
        parts.append(text(left - 8, top + cell_height / 2 + 4, clipped(name, 24), "end"))
        for column, cell in enumerate(cells):
            if cell is None:
                continue
            x, wide = left + column * width, width - gap
            shape = f'x="{x:.1f}" y="{top:.1f}" width="{wide:.1f}" height="{cell_height:.1f}"'
            name = "empty" if cell.shade is None else f"h{cell.shade}"
            parts.append(f'<rect class="{name}" {shape}><title>{escape(cell.title)}</title></rect>')
            if cell.fill:
                tall = max(1.5, cell.fill * cell_height)
                filled = f'x="{x:.1f}" y="{top + cell_height - tall:.1f}" width="{wide:.1f}" height="{tall:.1f}"'
                parts.append(f'<rect class="full" {filled} pointer-events="none"/>')
            if cell.mark and width >= 9:
                parts.append(text(x + wide / 2, top + cell_height / 2 + 4, cell.mark, "middle", "mark"))
            if cell.ring:
                rings.append(f'<rect class="ring" {shape} pointer-events="none"/>')
    bottom = len(rows) * (cell_height + 2)
    every = next(step for step in (1, 2, 5, 10, 20, 50, 100, 1000, 10**9) if step * width >= 22)
    parts += [text(left + (n + 0.5) * width, bottom + 13, str(n), "middle") for n in range(0, count, every)]
    parts.append(text(left + count * width / 2, bottom + 30, x_label, "middle", "label"))
    return drawing(max(left + count * width + 4, 320), bottom + 36, title, [*parts, *rings])


def clipped(words: str, most: int) -> str:
    return words if len(words) <= most else words[: most - 1] + "…"


def _colour(number: int | None) -> str:
    return "grey" if number is None else f"c{number % NUM_COLOURS}" + (" again" if number >= NUM_COLOURS else "")


def _drawable(points: Sequence[Point], log_y: bool) -> list[Point]:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y) and (y > 0 or not log_y)]
