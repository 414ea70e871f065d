"""Draw a run of `run.py`: the longest gaps and the CPU by the number of streams, and a request by
what idles beside it; or one of `board.py`: requests/s by their latency, and stalls.

    python benchmarks/run.py --steps crowded,curve --runs 1 --json numbers.json
    python benchmarks/graph.py numbers.json docs/images/benchmark.svg
    python benchmarks/board.py --steps frontier,streams --runs 1 --json board.json
    python benchmarks/graph.py board.json docs/images/board.svg

A curve ends where the server no longer keeps up, or where no more was tried.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.support.plots import Panel, picture

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.support.plots import Curve

Run = dict[str, dict[str, Any]]
# Milliseconds of a gap, and microseconds of an event, above which a point stands at the upper
# edge.
GAP_CEILING, CPU_CEILING = 200.0, 50.0
# The slowest requests, in ms, of the curve of requests/s.
SLOWEST = 50.0
# The servers, in the order of their colours.
SERVERS = ("aioserver", "bare", "nginx", "litellm")


def draw(numbers: Mapping[str, Any]) -> str:
    """Return the picture of what `run.py --json` or `board.py --json` has written: of its first
    run.
    """
    run: Run = numbers["runs"][0]
    if "curves" in run:
        return picture(board_panels(run["curves"]))
    return picture(
        [
            Panel(
                "p99 gap between two events, ms, by streams of 50 events a second (20 is perfect)",
                curves(run, "gap_p99_ms"),
                "streams",
                dots=True,
                ceiling=GAP_CEILING,
            ),
            Panel(
                "CPU of the server per event, µs (at the upper edge: 50 or more)",
                curves(run, "cpu_us"),
                "streams",
                dots=True,
                ceiling=CPU_CEILING,
            ),
            Panel(
                "CPU of the server per request that is not streamed, µs, "
                "by idle WebSockets beside it",
                {
                    name: [
                        (level["idle"], level["cpu_us"]) for level in steps["crowded"]["levels"]
                    ]
                    for name, steps in known(run).items()
                    if "levels" in steps.get("crowded", {})
                },
                "idle WebSockets",
                dots=True,
            ),
        ]
    )


def board_panels(found: Mapping[str, Mapping[str, Curve]]) -> list[Panel]:
    """Return the panels of the curves of `board.py`."""
    frontier, stalls = (
        {name: found[step][name] for name in SERVERS if name in found.get(step, {})}
        for step in ("frontier", "streams")
    )
    return [
        Panel(
            "requests/s that are not streamed, by the slowest in a hundred of them",
            {name: best(curve) for name, curve in frontier.items()},
            "ms p99",
            dots=True,
        ),
        Panel(
            "streams with a gap above 200 ms, %, by streams of 50 events a second",
            stalls,
            "streams",
            dots=True,
            ceiling=100.0,
        ),
    ]


def best(windows: Curve) -> Curve:
    """Return those of *windows*, (ms, requests/s), that carry more than each faster one."""
    kept: Curve = []
    for slowest, rate in sorted(tuple(window) for window in windows):
        if slowest <= SLOWEST and (not kept or rate > kept[-1][1]):
            kept.append((slowest, rate))
    return kept


def curves(run: Run, field: str) -> dict[str, Curve]:
    """Return *field* of each server at each number of streams."""
    return {
        name: [(level["streams"], level[field]) for level in steps["curve"]["levels"]]
        for name, steps in known(run).items()
        if "levels" in steps.get("curve", {})
    }


def known(run: Run) -> Run:
    """Return the servers of *run* that have a colour, in their order."""
    return {name: run[name] for name in SERVERS if name in run}


def main() -> None:
    """Read the numbers, and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "numbers", type=Path, help="the file that run.py or board.py has written with --json"
    )
    parser.add_argument("picture", type=Path, help="the SVG file to write")
    chosen = parser.parse_args()
    chosen.picture.write_text(draw(json.loads(chosen.numbers.read_text())))


if __name__ == "__main__":
    main()
