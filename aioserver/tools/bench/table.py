"""Draws a run with rich: a progress bar on stderr during the run, then a table on stdout."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from aioserver.tools.bench.load import Run

# Seconds. It is drawn on the event loop, since a thread of its own would take time from the
# clients.
DRAW_INTERVAL = 0.25


class ProgressConsole(Console):
    """Stderr, which may be a pipe without a reader: that costs the bar, and not the report."""

    def on_broken_pipe(self) -> None:
        """Stop writing; rich itself would end the process."""
        self.quiet = True


async def show_progress(run: Run) -> None:
    """Draw the progress of *run* on stderr, until cancelled."""
    plan = run.plan
    total = float(plan.duration or plan.clients * (plan.requests or 0))
    columns = (
        BarColumn(bar_width=None),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=ProgressConsole(stderr=True), auto_refresh=False) as progress:
        bar = progress.add_task("", total=total)
        try:
            while True:
                _draw(progress, bar, run)
                await asyncio.sleep(DRAW_INTERVAL)
        finally:
            _draw(progress, bar, run)


def _draw(progress: Progress, bar: Any, run: Run) -> None:
    results = run.results
    done = run.seconds if run.plan.duration else results.finished
    text = (
        f"{results.ok} ok, {results.refused.total()} refused,"
        f" {results.incomplete.total()} incomplete"
    )
    progress.update(bar, completed=done, description=text, refresh=True)


def show(report: dict[str, Any], console: Console | None = None) -> None:
    """Print *report* on stdout."""
    console = console or Console()
    requests, events = report["requests"], report["events"]
    head = f"{report['url']}  {report['face']}, {report['clients']} clients, {report['seconds']} s"
    counts = Table.grid(padding=(0, 2))
    counts.add_column()
    counts.add_column(justify="right")
    counts.add_column()
    counts.add_row("requests", str(requests["total"]), f"{requests['per_second']:.1f} ok a second")
    counts.add_row("ok", str(requests["ok"]))
    for name, style in (("refused", "yellow"), ("incomplete", "red")):
        codes = ", ".join(f"{code} {count}" for code, count in report[name].items())
        counts.add_row(name, str(requests[name]), Text(codes), style=style if codes else None)
    if requests["unfinished"]:
        counts.add_row("unfinished", str(requests["unfinished"]))
    counts.add_row("events", str(events["total"]), f"{events['per_second']:.1f} a second")

    console.print(Text(head, style="bold"))
    console.print(counts)
    if (times := _times(report)).row_count:
        console.print(times)
    console.print(_completeness(report))
    for code in report["incomplete"]:
        if message := report["messages"].get(code):
            console.print(Text(f"  {code}: {message}"), soft_wrap=True)
    console.print(Text(f"limit: {report['limit']['text']}"), soft_wrap=True)
    for note in report["notes"]:
        console.print(Text(f"note: {note}"), soft_wrap=True)


def _times(report: dict[str, Any]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("")
    for name in ("p50", "p95", "p99", "samples"):
        table.add_column(name, justify="right")
    rows = {"latency": "latency", "first token": "first_token", "gap between events": "gap"}
    for label, key in rows.items():
        if (summary := report[key]) is not None:
            times = (duration(summary[name]) for name in ("p50", "p95", "p99"))
            table.add_row(label, *times, str(summary["count"]))
    return table


def _completeness(report: dict[str, Any]) -> Text:
    requests = report["requests"]
    if not requests["ok"] + requests["incomplete"]:
        return Text("complete: no answer has begun, so none is incomplete")
    if report["complete"]:
        proofs = {"openai": "a finish_reason", "anthropic": "a stop_reason"}
        proof = proofs.get(report["face"], "every event, once, in order")
        return Text(
            f"complete: {requests['ok']} of {requests['ok']} answers have their end, {proof}"
        )
    served = requests["ok"] + requests["incomplete"]
    return Text(f"incomplete: {requests['incomplete']} of {served} answers", style="red")


def duration(seconds: float) -> str:
    """Write a duration in milliseconds below a second, else in seconds."""
    return f"{seconds * 1000:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"
