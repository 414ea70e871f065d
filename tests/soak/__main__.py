"""The command `python -m tests.soak`: a run, its JSON lines and its picture; or the picture of
lines that are there.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tests.soak import claims
from tests.soak.plot import draw
from tests.soak.run import soak

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.soak.claims import Line


def main() -> int:
    """Run, draw and judge; return the exit code, 1 if a claim does not hold."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1, help="processes of the server")
    parser.add_argument("--deploys", type=float, default=0.0, help="minutes from one to the next")
    parser.add_argument("--lines", type=Path, default=Path("soak.jsonl"))
    parser.add_argument("--plot", type=Path, help="the picture, an SVG file")
    parser.add_argument("--draw", action="store_true", help="run nothing: take --lines as it is")
    options = parser.parse_args()
    if options.draw:
        run = [json.loads(line) for line in options.lines.read_text().splitlines()]
    else:
        load = (options.minutes, options.lines, options.seed, options.workers, options.deploys)
        run = asyncio.run(soak(*load))
    if options.plot is not None:
        options.plot.write_text(draw(run))
    print("\n".join(summary(run)))
    faults = [*claims.broken(run)]
    print("\n".join(faults) or "every claim holds")
    return 1 if faults else 0


def summary(run: Sequence[Line]) -> list[str]:
    """Return the numbers of *run* in a few lines."""
    windows = claims.lines(run, "window")
    (start,), (end,) = claims.lines(run, "start"), claims.lines(run, "end")
    before, after = (size / claims.MIB for size in claims.memory(run))
    lines = [
        f"{start['seconds'] / 60:g} minutes, seed {start['seed']}",
        f"{end['asked']:,} questions: "
        + ", ".join(f"{count:,} {end}" for end, count in sorted(end["outcomes"].items())),
        (
            f"{sum(window['ok'] for window in windows):,} of "
            f"{sum(window['requests'] for window in windows):,} probes were answered whole"
        ),
        f"memory: {before:.1f} MiB in the middle third, {after:.1f} in the last",
        (
            f"at the start and the end: {start['fds']} and {end['fds']} descriptors, "
            f"{start['tasks']} and {end['tasks']} tasks"
        ),
    ]
    for percentile in claims.ADDED:
        first, last = (1000 * seconds for seconds in claims.added(run, percentile))
        lines.append(
            f"added to the first token, {percentile}: {first:.1f} ms in the first third, "
            f"{last:.1f} in the last"
        )
    return lines


if __name__ == "__main__":
    sys.exit(main())
