"""A picture of a run (SVG): memory, what the server adds to a first token, and requests, over the minutes."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from tests.soak import claims

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from tests.soak.claims import Line

Curve = list[tuple[float, float]]
WIDTH, HEIGHT = 760, 150
LEFT, RIGHT, TOP, BOTTOM = 70, 150, 34, 26
COLOURS = ("#2563eb", "#d97706", "#6b7280")


def draw(run: Sequence[Line]) -> str:
    """Return the picture of *run*."""
    samples, windows = claims.lines(run, "sample"), claims.lines(run, "window")
    (end,) = claims.lines(run, "end")
    before, after = claims.memory(run)
    rates = [
        (b["t"] / 60, (b["asked"] - a["asked"]) / max(0.1, b["t"] - a["t"]))
        for a, b in zip(samples[:-12], samples[12:], strict=True)
    ]
    panels = [
        (
            (
                f"memory of the server, MiB: median {before / claims.MIB:.1f} in the middle third,"
                f" {after / claims.MIB:.1f} in the last"
            ),
            {
                "resident": _curve(samples, "rss", 1 / claims.MIB),
                "kept answers": _curve(samples, "kept", 1 / claims.MIB),
            },
        ),
        (
            f"first token of {sum(window['ok'] for window in windows):,} answers that are measured, ms",
            {
                "p99": _curve(windows, "first_token_p99", 1000),
                "p50": _curve(windows, "first_token_p50", 1000),
                "p50 without aioserver": _curve(windows, "direct_p50", 1000),
            },
        ),
        (
            f"{end['asked']:,} other questions: asked a second, and running at once",
            {"asked": rates, "running": _curve(samples, "running", 1.0)},
        ),
    ]
    height = len(panels) * HEIGHT
    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
            'font-family="sans-serif" font-size="12" fill="#111827">'
        ),
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
    ]
    for number, (title, curves) in enumerate(panels):
        parts += _panel(number * HEIGHT, title, curves)
    return "\n".join((*parts, "</svg>")) + "\n"


def _curve(lines: Iterable[Line], name: str, factor: float) -> Curve:
    return [(line["t"] / 60, line[name] * factor) for line in lines]


def _panel(top: int, title: str, curves: dict[str, Curve]) -> list[str]:
    points = [point for curve in curves.values() for point in curve]
    last = max((x for x, _ in points), default=1.0)
    high = _round_up(max((y for _, y in points), default=1.0))
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    floor = top + TOP + height

    def place(x: float, y: float) -> str:
        return f"{LEFT + width * x / last:.1f},{floor - height * y / high:.1f}"

    parts = [f'<text x="{LEFT}" y="{top + 20}" font-weight="bold">{escape(title)}</text>']
    for share in (0.0, 0.5, 1.0):
        y = floor - height * share
        parts += [
            f'<path d="M{LEFT} {y:.1f}h{width}" stroke="#d1d5db" fill="none"/>',
            f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{high * share:g}</text>',
        ]
    parts += [
        f'<text x="{LEFT}" y="{floor + 16}">0</text>',
        f'<text x="{LEFT + width}" y="{floor + 16}" text-anchor="end">{last:.0f} minutes</text>',
    ]
    for number, (name, curve) in enumerate(curves.items()):
        colour = COLOURS[number]
        line = " ".join(place(x, y) for x, y in curve)
        y = top + TOP + 14 + 20 * number
        parts += [
            f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>',
            f'<text x="{WIDTH - RIGHT + 12}" y="{y}" fill="{colour}">{escape(name)}</text>',
        ]
    return parts


def _round_up(value: float) -> float:
    """Return the next of 1, 2, 4, 5, 6, 8 and 10, times a power of ten."""
    power = 1.0
    while value > 10 * power:
        power *= 10
    while value <= power and power > 1e-3:
        power /= 10
    return next(step * power for step in (1, 2, 4, 5, 6, 8, 10) if value <= step * power)
