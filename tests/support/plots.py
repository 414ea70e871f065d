"""Curves as pictures (SVG): panels below each other, each with a horizontal axis of its own."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Curve = list[tuple[float, float]]
WIDTH, HEIGHT = 760, 150
LEFT, RIGHT, TOP, BOTTOM = 70, 150, 34, 26
COLOURS = ("#2563eb", "#d97706", "#6b7280", "#059669")


@dataclass(frozen=True, slots=True)
class Panel:
    """A picture's part: its *title*, its *curves* by name, and the *unit* of the horizontal axis.

    With *dots* each point is marked, where a curve has few. What is above *ceiling* is cut off.
    """

    title: str
    curves: Mapping[str, Curve]
    unit: str
    dots: bool = False
    ceiling: float | None = None


def picture(panels: Sequence[Panel]) -> str:
    """Return the picture of *panels*."""
    height = len(panels) * HEIGHT
    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
            'font-family="sans-serif" font-size="12" fill="#111827">'
        ),
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
    ]
    for number, panel in enumerate(panels):
        parts += _drawn(number * HEIGHT, panel)
    return "\n".join((*parts, "</svg>")) + "\n"


def _drawn(top: int, panel: Panel) -> list[str]:
    points = [point for curve in panel.curves.values() for point in curve]
    last = max((x for x, _ in points), default=1.0)
    high = round_up(max((y for _, y in points), default=1.0))
    if panel.ceiling is not None:
        high = min(high, panel.ceiling)
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    floor = top + TOP + height

    def place(x: float, y: float) -> tuple[str, str]:
        return f"{LEFT + width * x / last:.1f}", f"{floor - height * min(y, high) / high:.1f}"

    parts = [f'<text x="{LEFT}" y="{top + 20}" font-weight="bold">{escape(panel.title)}</text>']
    for share in (0.0, 0.5, 1.0):
        y = floor - height * share
        parts += [
            f'<path d="M{LEFT} {y:.1f}h{width}" stroke="#d1d5db" fill="none"/>',
            f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{high * share:g}</text>',
        ]
    parts += [
        f'<text x="{LEFT}" y="{floor + 16}">0</text>',
        (
            f'<text x="{LEFT + width}" y="{floor + 16}" text-anchor="end">'
            f"{last:,.0f} {escape(panel.unit)}</text>"
        ),
    ]
    for number, (name, curve) in enumerate(panel.curves.items()):
        colour = COLOURS[number]
        places = [place(x, y) for x, y in curve]
        line = " ".join(f"{x},{y}" for x, y in places)
        y = top + TOP + 14 + 20 * number
        parts += [
            f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>',
            f'<text x="{WIDTH - RIGHT + 12}" y="{y}" fill="{colour}">{escape(name)}</text>',
        ]
        if panel.dots:
            parts += [f'<circle cx="{x}" cy="{y}" r="2.5" fill="{colour}"/>' for x, y in places]
    return parts


def round_up(value: float) -> float:
    """Return the next of 1, 2, 4, 5, 6, 8 and 10, times a power of ten."""
    power = 1.0
    while value > 10 * power:
        power *= 10
    while value <= power and power > 1e-3:
        power /= 10
    return next(step * power for step in (1, 2, 4, 5, 6, 8, 10) if value <= step * power)
