"""The rows of the table, and how runs become one."""

import contextlib
import dataclasses
import json
import os
import platform
import statistics
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peers import BASELINE, DIRECT, OURS

# The best median that each ratio ever had in a full run, and the commit of that table.
BEST = Path(__file__).with_name("best.json")
# The requests a second of the baseline on the machines on which these were measured; and the part of
# them below which, or the multiple above which, a machine is another one, or is slowed down.
CLASS_PER_SECOND, SAME_CLASS = 10_263, (0.75, 1.33)
Run = dict[str, dict[str, dict[str, Any]]]  # {peer: {step: result}}


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: field *field* of step *step*."""

    step: str
    field: str
    title: str
    better: str  # more | less
    digits: int = 0
    added: bool = False  # to what the mock provider alone needs
    by: tuple[str, str] | None = None  # the step and the field that it is divided by
    ratio: bool = True
    goal: float | None = (
        None  # of aioserver's ratio; of its number where there is none, or `absolute`
    )
    absolute: bool = False


FIRST = "requests/s, not streamed, 64 connections"
ROWS = (
    Row("plain", "per_second", FIRST, "more", goal=1.35),
    Row("fast", "per_second", "streams/s of 100 events, 64 connections", "more", goal=0.9),
    Row("fast", "chunks_per_second", "events/s of these", "more"),
    Row("fast10", "per_second", "streams/s of 10 events, 64 connections", "more", goal=0.9),
    Row(
        "sse500", "cpu_us", "CPU µs per event, 500 SSE streams of 50 events/s", "less", 1, goal=0.7
    ),
    Row("sse500", "gap_p99_ms", "p99 gap, ms, 500 SSE streams", "less", 1),
    Row("sse500", "ttft_p99_ms", "p99 first token, ms, 500 SSE streams", "less", 1),
    Row("tlsplain", "per_second", "requests/s, not streamed, TLS to the provider", "more"),
    Row(
        "tls500",
        "cpu_us",
        "CPU µs per event, 500 SSE streams, TLS to the provider",
        "less",
        1,
        goal=0.7,
    ),
    Row("tls500", "gap_p99_ms", "p99 gap, ms, 500 SSE streams, TLS to the provider", "less", 1),
    Row(
        "tls500",
        "cpu_us",
        "CPU µs per event over TLS, by that without TLS",
        "less",
        2,
        ratio=False,
        by=("sse500", "cpu_us"),
        goal=1.4,
    ),
    Row("sse1000", "chunks_per_second", "events/s, 1,000 SSE streams, 50,000 sent", "more"),
    Row("sse1000", "gap_p99_ms", "p99 gap, ms, 1,000 SSE streams", "less", 1),
    Row("sse1000", "ttft_p99_ms", "p99 first token, ms, 1,000 SSE streams", "less", 1),
    Row("sse1000", "rss_mb", "resident MB, 1,000 SSE streams", "less", 1),
    Row(
        "ws500",
        "cpu_us",
        "CPU µs per event, 500 WebSocket streams of 50 events/s",
        "less",
        1,
        goal=0.7,
    ),
    Row("ws500", "chunks_per_second", "events/s, 500 WebSocket streams, 25,000 sent", "more"),
    Row("ws500", "gap_p99_ms", "p99 gap, ms, 500 WebSocket streams", "less", 1),
    Row("ws500", "ttft_p99_ms", "p99 first token, ms, 500 WebSocket streams", "less", 1),
    Row("held", "streams", "SSE streams held", "more"),
    Row(
        "rws500", "cpu_us", "CPU µs per event, 500 streams of Responses over WebSocket", "less", 1
    ),
    Row("rws500", "chunks_per_second", "events/s of these, 25,000 sent", "more"),
    Row("rws500", "gap_p99_ms", "p99 gap, ms, of these", "less", 1),
    Row("rws500", "ttft_p99_ms", "p99 first token, ms, of these", "less", 1),
    Row("wsheld", "streams", "WebSocket streams held", "more"),
    Row(
        "first", "ttft_p50_ms", "p50 first token added, ms, 750 SSE streams", "less", 2, added=True
    ),
    Row(
        "first", "ttft_p99_ms", "p99 first token added, ms, 750 SSE streams", "less", 2, added=True
    ),
    Row(
        "memory",
        "kib",
        "KiB per running SSE stream, 1,000 of them",
        "less",
        1,
        goal=28.0,
        absolute=True,
    ),
    Row("wsmemory", "kib", "KiB per running WebSocket stream, 1,000 of them", "less", 1),
    Row(
        "idle",
        "kib",
        "KiB per idle WebSocket, 10,000 of them",
        "less",
        1,
        goal=15.0,
        absolute=True,
    ),
    Row("idle", "cpu_percent", "CPU % of one core, these idle", "less", 2, ratio=False),
    Row("agents", "kb100_us", "CPU µs per answer to a body of 100 kB", "less", goal=1.1),
    Row("agents", "kb400_us", "CPU µs per answer to a body of 400 kB", "less", goal=1.1),
    Row("agents", "kb1000_us", "CPU µs per answer to a body of 1 MB", "less", goal=1.1),
    Row("agents", "kb2000_us", "CPU µs per answer to a body of 2 MB", "less", goal=1.1),
    Row("crowded", "few_us", "CPU µs per plain request, 100 idle WebSockets", "less", 1),
    Row("crowded", "many_us", "CPU µs per plain request, 4,000 idle WebSockets", "less", 1),
    Row("crowded", "quotient", "the latter by the former", "less", 2),
    Row(
        "watched",
        "quotient",
        "CPU per plain request, 200 watch, by that while nobody does",
        "less",
        2,
    ),
    Row(
        "leave",
        "close_ms",
        "ms until the provider's connection of one that left is closed",
        "less",
        1,
    ),
    Row("leave", "sent_after", "events still sent to each of 100 that left", "less", ratio=False),
    Row("leave", "to_the_end", "of these 100, how many were sent to the end", "less", ratio=False),
    Row(
        "large",
        "gap_p99_ms",
        "p99 gap, ms, 50 SSE streams, beside a body of 16 MiB each second",
        "less",
        1,
    ),
    Row("large", "gap_max_ms", "longest gap, ms, of these", "less", 1),
    Row("refuse", "sse_p50_ms", "p50 to a 503, ms, 1,000 come to 200 places", "less", 1),
    Row("refuse", "sse_p99_ms", "p99 to a 503, ms, 1,000 come to 200 places", "less", 1),
    Row(
        "refuse",
        "ws_p50_ms",
        "p50 to a WebSocket's refusal, ms, 1,000 come to 200 places",
        "less",
        1,
    ),
    Row(
        "refuse",
        "ws_p99_ms",
        "p99 to a WebSocket's refusal, ms, 1,000 come to 200 places",
        "less",
        1,
    ),
    Row(
        "firehose", "gap_p99_ms", "p99 gap, ms, 500 SSE streams beside one of 100 kB/ms", "less", 1
    ),
    Row(
        "firehose",
        "quotient",
        "p99 gap of 500 SSE streams beside one of 100 kB/ms, by that without it",
        "less",
        2,
        ratio=False,
        goal=2.0,
    ),
    Row(
        "rush",
        "refuse_p99_ms",
        "p99 to a 503, ms, 10,000 come in 5 s to a full house",
        "less",
        1,
        ratio=False,
        goal=150.0,
    ),
    Row(
        "rush",
        "gap_p99_ms",
        "p99 gap, ms, of the 200 streams inside meanwhile",
        "less",
        1,
        ratio=False,
        goal=50.0,
    ),
    Row(
        "overload",
        "refuse_p95_ms",
        "p95 to a 503, ms, five times what there is room for",
        "less",
        1,
        ratio=False,
        goal=10.0,
    ),
    Row(
        "overload",
        "quotient",
        "p50 of an admitted answer, by that at 0.9 of the room",
        "less",
        2,
        ratio=False,
        goal=1.05,
    ),
    Row("restart", "lost", "requests lost in a restart, 64 connections", "less", ratio=False),
    Row("restart", "turned_away", "answered 4xx or 5xx in it", "less", ratio=False),
    Row("restart", "connect_errors", "connections refused in it", "less", ratio=False),
    Row("start", "seconds", "start to first good answer, s", "less", 2, goal=0.25, absolute=True),
    Row("start", "rss_mb", "resident MB after it", "less", 1, goal=45.0, absolute=True),
)


def value(run: Run, peer: str, row: Row) -> float | None:
    """The number of *row* in one run; None where it does not count. KeyError: not measured."""
    results = [run[peer][row.step]]
    if row.added:
        results.append(run[DIRECT.name][row.step])
    if any(result["faults"] for result in results):
        return None
    number, *alone = (float(result[row.field]) for result in results)
    if row.by is None:
        return number - sum(alone)
    step, field = row.by
    divisor = run[peer][step]
    return None if divisor["faults"] or not divisor[field] else number / float(divisor[field])


def tabulate(runs: Sequence[Run], peers: Sequence[str]) -> list[dict[str, Any]]:
    """The table's rows: the median of each peer, and of its ratios to the baseline run by run."""
    rows = []
    for row in ROWS:
        line: dict[str, Any] = dataclasses.asdict(row) | {
            "values": {},
            "ratios": {},
            "spread": None,
        }
        series: dict[str, dict[int, float]] = {name: {} for name in peers}  # by number of the run
        for name in peers:
            numbers: dict[int, float | None] = {}
            for number, run in enumerate(runs):
                with contextlib.suppress(KeyError):  # not asked for, or not of this peer
                    numbers[number] = value(run, name, row)
            valid = {number: value for number, value in numbers.items() if value is not None}
            if numbers:
                complete = len(valid) == len(numbers)
                line["values"][name] = statistics.median(valid.values()) if complete else None
                series[name] = valid if complete else {}
                if name == OURS and complete:
                    line["spread"] = low_middle_high(list(valid.values()))
        base = series.get(BASELINE, {})
        for name in others(peers) if row.ratio else []:
            pairs = [(series[name][n], base[n]) for n in series[name].keys() & base.keys()]
            if pairs and all(ours > 0 and theirs > 0 for ours, theirs in pairs):
                ratios = [ours / theirs for ours, theirs in pairs]
                line["ratios"][name] = low_middle_high(ratios)
        if line["values"]:
            rows.append(line)
    return rows


def low_middle_high(numbers: Sequence[float]) -> list[float]:
    return [min(numbers), statistics.median(numbers), max(numbers)]


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """The rows that have a goal, and whether the median reaches it, as markdown."""
    lines = ["| aioserver | min, median, max | goal | |", "| --- | ---: | ---: | --- |"]
    for row in rows:
        relative = row["ratio"] and not row["absolute"]
        three = row["ratios"].get(OURS) if relative else row["spread"]
        if row["goal"] is None or three is None:
            continue
        least = row["better"] == "more"
        reached = three[1] >= row["goal"] if least else three[1] <= row["goal"]
        title = f"{row['title']}, by {BASELINE}'s" if relative else row["title"]
        sign, verdict = "≥" if least else "≤", "reached" if reached else "missed"
        lines.append(f"| {title} | {ratio(three)} | {sign} {row['goal']:g} | {verdict} |")
    return "\n".join(lines)


def distances(rows: Sequence[dict[str, Any]]) -> list[str]:
    """How far the median of each ratio is from the best that it ever had, those that are worse by
    a tenth first. On another class of machine they cannot be compared.
    """
    per_second = next((row["values"].get(BASELINE) for row in rows if row["title"] == FIRST), None)
    if per_second is not None:
        speed = per_second / CLASS_PER_SECOND
        if not SAME_CLASS[0] <= speed <= SAME_CLASS[1]:
            line = (
                f"Not compared with the best: {BASELINE} has {speed:.2f} of the requests/s that it "
                "has on the machines of best.json; others slow this one down, or it is another class"
            )
            return [line]
    best: dict[str, dict[str, Any]] = json.loads(BEST.read_text())
    lines = []
    for row in rows:
        three, record = row["ratios"].get(OURS), best.get(row["title"])
        if three is None or record is None:
            continue
        now, then = three[1], record["median"]
        worse = then / now - 1 if row["better"] == "more" else now / then - 1
        mark = "WORSE by more than a tenth: " if worse > 0.1 else ""
        at = f"the best ever was {then:.2f} ({record['commit']})"
        lines.append(
            (worse, f"{mark}{row['title']}: {now:.2f} of {BASELINE}'s; {at}, {worse:+.0%} worse")
        )
    return [line for _worse, line in sorted(lines, reverse=True)]


def others(peers: Sequence[str]) -> list[str]:
    """Those that are compared with the baseline."""
    return [name for name in peers if name != BASELINE and BASELINE in peers]


def markdown(rows: Sequence[dict[str, Any]], peers: Sequence[str]) -> str:
    head = ["measured", "better", *peers]
    head += [f"{name}/{BASELINE}: min, median, max" for name in others(peers)]
    lines = [head, ["---", "---", *["---:"] * (len(head) - 2)]]
    for row in rows:
        cells = [row["title"], row["better"]]
        for name in peers:
            number = row["values"].get(name, "")
            if isinstance(number, float):
                number = f"{number:,.{row['digits']}f}"
            cells.append("INVALID" if number is None else number)
        cells += [ratio(row["ratios"].get(name, ())) for name in others(peers)]
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def ratio(three: Sequence[float]) -> str:
    """Min, median and max; the median alone where all are one."""
    if not three:
        return ""
    low, middle, high = three
    return f"**{middle:.2f}**" if low == high else f"{low:.2f}, **{middle:.2f}**, {high:.2f}"


def brief(step: str, result: dict[str, Any]) -> str:
    """One line about one result, while a run goes on."""
    if result["faults"]:
        return " ".join(result["faults"])
    fields = [(row.field, row.digits) for row in ROWS if row.step == step and row.by is None]
    return ", ".join(f"{field} {result[field]:.{digits}f}" for field, digits in fields)


def machine(cores: Sequence[int], loop: str, runs: int, quick: bool) -> str:
    """One line that says where the numbers come from."""
    model = "unknown processor"
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as cpuinfo:
        model = next(
            (x.split(": ")[1].strip() for x in cpuinfo if x.startswith("model name")), model
        )
    stamp = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    software = f"Python {platform.python_version()}, aiohttp {version('aiohttp')}"
    software += f", uvloop {version('uvloop')}" if loop == "uvloop" else ", asyncio's loop"
    measured = f"{runs} run{'s' if runs > 1 else ''}{', --quick' if quick else ''}"
    return (
        f"{stamp}; {model}, cores {cores[0]} (server) and {cores[1]} (load) of {os.cpu_count()}; "
        f"Linux {platform.release()}; {software}; {measured}"
    )


def remarks(runs: Sequence[Run]) -> list[str]:
    """What a reader must know: what is invalid and why, and how noisy the machine was."""
    lines, noise, late = [], 0.0, 0.0
    for number, run in enumerate(runs, 1):
        for name, steps in run.items():
            for step, result in steps.items():
                if result["faults"]:
                    why = "; ".join(result["faults"])
                    lines.append(f"INVALID: {name}, {step}, run {number}: {why}")
                lines += [f"{name}, {step}: {note}" for note in result.get("notes", [])]
                noise = max(noise, result.get("foreign_share") or 0.0)
                late = max(late, result.get("provider_late_p99_ms") or 0.0)
    lines.append(f"Others used at most {noise:.0%} of the two cores in a step (quiet: under 5%).")
    lines.append(f"The mock provider was at most {late:.1f} ms late (p99 of a step).")
    return lines
