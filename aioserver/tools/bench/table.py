"""Draws a run with rich: a progress bar on stderr during the run, then a table on stdout."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text

if TYPE_CHECKING:
    from aioserver.tools.bench.load import Run

# Seconds. It is drawn on the event loop, since a thread of its own would take time from the
# clients.
DRAW_INTERVAL = 0.25
MEASURES = {"latency": "latency", "first token": "first_token", "gap between events": "gap"}


class ProgressConsole(Console):
    """Stderr, which may be a pipe without a reader: that costs the bar, and not the report."""

    def on_broken_pipe(self) -> None:
        """Stop writing; rich itself would end the process."""
        self.quiet = True


async def show_progress(run: Run) -> None:
    """Draw the progress of *run* on stderr, until cancelled."""
    plan, results = run.plan, run.results
    columns = ("{task.percentage:>3.0f} %", "{task.description}")
    with Progress(
        BarColumn(bar_width=None),
        *map(TextColumn, columns),
        TimeElapsedColumn(),
        console=ProgressConsole(stderr=True),
        auto_refresh=False,
    ) as progress:
        bar = progress.add_task("", total=plan.duration or plan.clients * (plan.requests or 0))

        def draw() -> None:
            done = run.seconds if plan.duration else results.finished
            text = (
                f"{results.ok} ok, {results.refused.total()} refused,"
                f" {results.incomplete.total()} incomplete"
            )
            progress.update(bar, completed=done, description=text, refresh=True)

        try:
            while True:
                draw()
                await asyncio.sleep(DRAW_INTERVAL)
        finally:
            draw()


def show(report: dict[str, Any], console: Console | None = None) -> None:
    """Print *report* on stdout."""
    console = console or Console()
    requests, events = report["requests"], report["events"]
    counts = Table.grid("", Column(justify="right"), "", padding=(0, 2))
    counts.add_row("requests", str(requests["total"]), f"{requests['per_second']:.1f} ok a second")
    counts.add_row("ok", str(requests["ok"]))
    for name, style in (("refused", "yellow"), ("incomplete", "red")):
        codes = ", ".join(f"{code} {count}" for code, count in report[name].items())
        counts.add_row(name, str(requests[name]), Text(codes), style=style if codes else None)
    if requests["unfinished"]:
        counts.add_row("unfinished", str(requests["unfinished"]))
    counts.add_row("events", str(events["total"]), f"{events['per_second']:.1f} a second")
    head = f"{report['url']}  {report['face']}, {report['clients']} clients, {report['seconds']} s"
    console.print(Text(head, style="bold"))
    console.print(counts)
    names = ("p50", "p95", "p99")
    heads = (Column(name, justify="right") for name in (*names, "samples"))
    times = Table("", *heads, box=None, padding=(0, 2, 0, 0))
    for label, key in MEASURES.items():
        if (summary := report[key]) is not None:
            times.add_row(label, *(duration(summary[n]) for n in names), str(summary["count"]))
    if times.row_count:
        console.print(times)
    console.print(_completeness(report))
    messages = report["messages"]
    for line in (
        *(f"  {code}: {messages[code]}" for code in report["incomplete"] if code in messages),
        f"limit: {report['limit']['text']}",
        *(f"note: {note}" for note in report["notes"]),
    ):
        console.print(Text(line), soft_wrap=True)


def _completeness(report: dict[str, Any]) -> Text:
    requests = report["requests"]
    served = requests["ok"] + requests["incomplete"]
    if not served:
        return Text("complete: no answer has begun, so none is incomplete")
    if not report["complete"]:
        return Text(f"incomplete: {requests['incomplete']} of {served} answers", style="red")
    proofs = {"openai": "a finish_reason", "anthropic": "a stop_reason"}
    proof = proofs.get(report["face"], "every event, once, in order")
    return Text(f"complete: {served} of {served} answers have their end, {proof}")


def duration(seconds: float) -> str:
    """Write a duration in milliseconds below a second, else in seconds."""
    return f"{seconds * 1000:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"
