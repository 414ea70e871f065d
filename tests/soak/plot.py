"""A picture of a run (SVG): memory, what the server adds to a first token, and requests, over the
minutes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.soak import claims
from tests.support.plots import Panel, picture

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from tests.soak.claims import Line
    from tests.support.plots import Curve


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
            (
                f"first token of {sum(window['ok'] for window in windows):,} "
                "answers that are measured, ms"
            ),
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
    return picture([Panel(title, curves, "minutes") for title, curves in panels])


def _curve(lines: Iterable[Line], name: str, factor: float) -> Curve:
    return [(line["t"] / 60, line[name] * factor) for line in lines]
