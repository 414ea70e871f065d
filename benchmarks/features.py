"""What a feature costs where it is off, and where it is on; and a server beside others of its kind:
without a wing, of another tree, on another Python or event loop.

    python benchmarks/features.py                       # each feature, off and on
    python benchmarks/features.py --only hook,ledger    # some of them
    python benchmarks/features.py --only off --without hooks     # beside one whose wing is deleted
    python benchmarks/features.py --only off --beside '3.14=/opt/py3.14/bin/python'
    python benchmarks/features.py --only off --beside 'asyncio=python;asyncio'

`off` is the configuration of all benchmarks, and each other server has one thing switched on. All
are up together, and get every load in turns (A B B A …), so that a noisy neighbour is a neighbour
of all of them. Printed are medians over the rounds, and the least, the median and the greatest of
the ratios of each round's pair. Where others use the machine, CPU times say more than rates.

`--beside NAME=PROGRAM;LOOP` is aioserver as `PROGRAM -m aioserver` runs it, on the event loop LOOP;
PROGRAM is a command with its arguments, as `env -C TREE python` is for another work tree. With
`--json FILE` the rounds that are in that file count as well, and new ones are added to it: several
short runs are a long one, and `--rounds 0` prints their table.

Exit code: 0 done, 1 something went wrong, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from certificate import HARNESS, Encrypted
from loads import Load, paced
from measure import Bench, Server, faults
from peers import AIOSERVER, AUTH, CONTINUED, OURS, PEERS, Peer
from table import machine

from tests.support.without_wing import copy_package_without

ROUNDS = 5
# The loads, and what is told of each: the title of a column, and the field of a result.
LOADS: tuple[tuple[Load, dict[str, str]], ...] = (
    (
        Load(mode="http", connections=64, warmup=0.3, duration=1.5, drain=2.0),
        {"requests/s": "per_second", "CPU of a request, µs": "cpu_us"},
    ),
    (
        Load(mode="sse", connections=64, warmup=0.3, duration=1.5, drain=2.0),
        {"events/s at full speed": "chunks_per_second"},
    ),
    # Each stream takes a second, and so does the ramp.
    (
        paced("sse", 300, chunks=50, ramp=1.0, warmup=0.3, duration=2.5, drain=3.0),
        {"CPU of a paced event, µs": "cpu_us"},
    ),
)
TITLES = [title for _, fields in LOADS for title in fields]
OFF = "off"
LOCAL = "llm:\n  active: local\n"
SECOND = "    second: {like: local}\n"
KEYED = AUTH + AIOSERVER
BUDGET = "      tokens_per_minute: 1000000000\n      tokens_per_day: 2000000000\n"
ENDLESS = "      requests_per_minute: 100000000\n"
HOOKED = AIOSERVER + "hooks:\n- {name: passing, %s}\n"
PYTHON = "python: 'benchmarks.passing_hook:Passing'"
TRACED = AIOSERVER + "tracing:\n  otlp_endpoint: %s\n"


@dataclasses.dataclass(frozen=True, slots=True)
class Feature:
    """A server with one thing switched on, and which one it is compared with."""

    config: str
    than: str = OFF
    tls: bool = False


def group(affinity: str) -> str:
    """Return a configuration with the model as a group of two members."""
    named = (
        f"  models:\n    mock-model: {{members: [local, second], choose: least_busy{affinity}}}\n"
    )
    config = AIOSERVER.replace(LOCAL, LOCAL + named)
    return config.replace("logging:\n", SECOND + "logging:\n")


FEATURES = {
    OFF: Feature(AIOSERVER),
    "group": Feature(group("")),
    "group with affinity": Feature(group(", affinity: prefix")),
    "continuation": Feature(CONTINUED),
    "ledger": Feature(AIOSERVER + "usage:\n  path: $folder/ledger\n"),
    "keys": Feature(KEYED),
    "budgets of keys": Feature(AUTH.replace(ENDLESS, ENDLESS + BUDGET) + AIOSERVER, than="keys"),
    "tls": Feature(
        AIOSERVER.replace(
            "    concurrency:\n",
            "    tls: {cert_file: $folder/provider.pem}\n    concurrency:\n",
            1,
        ),
        tls=True,
    ),
    "hook": Feature(HOOKED % f"{PYTHON}, on: [request]"),
    "hook for answers": Feature(HOOKED % f"{PYTHON}, on: [request, answer]"),
    "hook over HTTP": Feature(HOOKED % "url: '$origin/hook', on: [request]"),
    "tracing": Feature(TRACED % "$origin"),
    "tracing without collector": Feature(TRACED % "http://127.0.0.1:9"),
}
# {server: {load: number of each round}}
Numbers = dict[str, dict[str, list[float]]]


def one_round(bench: Bench, servers: dict[str, Server], numbers: Numbers) -> list[str]:
    """Put each load on each server in turn. Returns what went wrong; such a number is left out, as
    is that of all others in this turn: ratios are of pairs.
    """
    wrong = []
    for load, fields in LOADS:
        results = {}
        with bench.mock(load) as mock:
            for name, server in servers.items():
                results[name] = bench.loaded(server, load, mock)
                wrong += [f"{name}, {load.mode}: {fault}" for fault in faults(results[name])]
        for title, field in fields.items():
            row = {name: result[field] for name, result in results.items()}
            shown = ", ".join(f"{name} {value:.5g}" for name, value in row.items())
            print(f"  {title}: {shown}", file=sys.stderr, flush=True)
            for name, value in row.items() if not wrong else ():
                numbers.setdefault(name, {}).setdefault(title, []).append(value)
    return wrong


def table(numbers: Numbers, than: dict[str, str]) -> str:
    """Return the medians as a table of Markdown, with the ratios to what each server is compared
    with: the least, the median and the greatest.
    """
    lines = [f"| | {' | '.join(TITLES)} |", "| --- |" + " ---: |" * len(TITLES)]
    for name, row in numbers.items():
        cells = []
        for title in TITLES:
            values, other = row[title], numbers[than[name]][title]
            middle = statistics.median(values)
            cell = f"{middle:,.1f}" if middle < 1000 else f"{middle:,.0f}"
            ratios = [on / off for on, off in zip(values, other, strict=True)]
            if name != than[name]:
                least, most = min(ratios), max(ratios)
                cell += f" · {least:.2f}, **{statistics.median(ratios):.2f}**, {most:.2f}"
            cells.append(cell)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def options() -> argparse.Namespace:
    """Return what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", help=f"features, comma-separated: {', '.join(FEATURES)}")
    parser.add_argument("--without", action="append", default=[], metavar="WING")
    parser.add_argument("--beside", action="append", default=[], metavar="NAME=PROGRAM;LOOP")
    parser.add_argument("--loop", choices=("uvloop", "asyncio"), default="uvloop")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", type=Path, help="rounds before these, and these as well")
    chosen = parser.parse_args()
    chosen.only = chosen.only.split(",") if chosen.only else list(FEATURES)
    if unknown := [name for name in chosen.only if name not in FEATURES]:
        parser.error(f"{unknown[0]!r} is none of {', '.join(FEATURES)}")
    # What a feature is compared with comes with it.
    needed = {OFF, *chosen.only, *(FEATURES[name].than for name in chosen.only)}
    chosen.only = [name for name in FEATURES if name in needed]
    return chosen


def others(chosen: argparse.Namespace, folder: Path) -> dict[str, tuple[str, str]]:
    """Return the other servers that were asked for: their programs and event loops."""
    found = {}
    for wing in chosen.without:
        copy_package_without(wing, folder / wing)
        program = f"env -C {shlex.quote(str(folder / wing))} {shlex.quote(sys.executable)}"
        found[f"without {wing}"] = (program, chosen.loop)
    for text in chosen.beside:
        name, _, rest = text.partition("=")
        program, _, loop = rest.partition(";")
        found[name] = (program, loop or chosen.loop)
    return found


def start(
    bench: Bench, stack: contextlib.ExitStack, chosen: argparse.Namespace
) -> dict[str, Server]:
    """Start each server."""
    ours, servers = PEERS[OURS], {}
    peers: dict[str, tuple[Peer, str, str]] = {}
    for name in chosen.only:
        feature = FEATURES[name]
        peer = dataclasses.replace(ours, tls=feature.tls)
        peers[name] = (peer, feature.config, bench.loop)
    for name, (program, loop) in others(chosen, bench.folder).items():
        command = (*shlex.split(program), *ours.command[1:])
        peers[name] = (dataclasses.replace(ours, command=command), AIOSERVER, loop)
    with bench.mock(Load(mode="http", connections=1)):
        for name, (peer, config, loop) in peers.items():
            where = dataclasses.replace(bench, loop=loop)
            servers[name] = stack.enter_context(where.server(peer, config=config))
    return servers


def main() -> int:
    """Measure, and print the table."""
    chosen = options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what we started is ended
    cores = sorted(os.sched_getaffinity(0))[:2]
    os.sched_setaffinity(0, {cores[-1]})
    subprocess.run(["make", "-s", "-C", str(HARNESS)], check=True, timeout=120)
    if not Encrypted.supported():
        chosen.only.remove("tls")
    numbers: Numbers = {}
    if chosen.json and chosen.json.exists():
        numbers = json.loads(chosen.json.read_text())
    wrong: list[str] = []
    with (
        tempfile.TemporaryDirectory(prefix="aioserver-bench-") as folder,
        contextlib.ExitStack() as stack,
    ):
        bench = Bench.create(Path(folder), chosen.loop, cores[0], cores[-1])
        servers = start(bench, stack, chosen) if chosen.rounds else {}
        for _ in range(chosen.rounds):
            wrong += one_round(bench, servers, numbers)
            # Who comes first is first in every other round.
            servers = dict(reversed(servers.items()))
            if chosen.json:
                chosen.json.write_text(json.dumps(numbers, indent=1) + "\n")
    than = {name: FEATURES[name].than if name in FEATURES else OFF for name in numbers}
    rounds = len(numbers[OFF]["requests/s"])
    print(f"{machine(cores, chosen.loop, rounds, quick=False)}\n\n{table(numbers, than)}")
    for line in wrong:
        print(f"- INVALID: {line}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
