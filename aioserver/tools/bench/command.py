"""The command line of `bench`: its options, its output, its exit code."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from typing import TYPE_CHECKING, Any

import click
import orjson

from aioserver.commands import options
from aioserver.telemetry.kernel import file_limit
from aioserver.tools import remote
from aioserver.tools.bench.clients import FACES, Question
from aioserver.tools.bench.load import Plan, Run

if TYPE_CHECKING:
    from types import ModuleType

    from aioserver.tools.bench.load import Show

# Files that this process opens beside the sockets of its clients.
OWN_FILES = 64
DEFAULT_REQUESTS = 4
COUNT, SECONDS = click.IntRange(min=1), click.FloatRange(min=0, min_open=True)


@click.command("bench")
@remote.url_argument
@click.option(
    "--face",
    type=click.Choice(FACES),
    default="websocket",
    show_default=True,
    help="Protocol that the clients speak.",
)
@options.number("--clients", COUNT, "Clients at the same time.", 50)
@options.number(
    "--requests",
    COUNT,
    "Requests of each client, one after the other."
    f"  [default: {DEFAULT_REQUESTS}, unless --duration is set]",
)
@options.number(
    "--duration", SECONDS, "Seconds in which every client sends one request after the other."
)
@click.option("--model", help="Model to ask for.  [default: the server's choice]")
@click.option("--prompt", default="Hello", show_default=True, help="Message in every request.")
@options.number(
    "--max-tokens", COUNT, "Limit for the tokens of an answer.  [default: the server's choice]"
)
@click.option(
    "--no-stream",
    is_flag=True,
    help="Ask for answers in one piece; only with --face openai or anthropic.",
)
@click.option(
    "--ramp",
    type=click.FloatRange(min=0),
    default=0.0,
    help="Seconds over which the clients start.  [default: all at once]",
)
@options.number("--timeout", SECONDS, "Seconds after which a request counts as incomplete.", 120.0)
@remote.key_option
@click.option(
    "--json", "as_json", is_flag=True, help="Print the report as JSON; rich is not needed."
)
@options.version
def command(
    *,
    as_json: bool,
    requests: int | None,
    duration: float | None,
    prompt: str,
    model: str | None,
    max_tokens: int | None,
    no_stream: bool,
    **settings: Any,
) -> int:
    """Load a running server with chat clients.

    URL is the server's address, http://127.0.0.1:8000 unless you name another. The report has the
    latencies, how many answers were complete, how many requests were refused, and the limit that
    was met. Exit code 1: an answer was incomplete, or the server could not be reached; 2: it wants
    a key.
    """
    if requests is not None and duration is not None:
        raise click.UsageError("either --requests or --duration")
    if no_stream and settings["face"] not in {"openai", "anthropic"}:
        raise click.UsageError("--no-stream goes with --face openai or anthropic")
    if requests is None and duration is None:
        requests = DEFAULT_REQUESTS
    question = Question(prompt=prompt, model=model, max_tokens=max_tokens, streamed=not no_stream)
    plan = Plan(question=question, requests=requests, duration=duration, **settings)
    return bench(plan, as_json=as_json)


def bench(plan: Plan, *, as_json: bool) -> int:
    """Carry out *plan* and print the report on stdout; the progress bar goes to stderr.

    Returns the exit code: 0, 1 for an incomplete answer or an unreachable server, 2 otherwise. It
    is 2 if rich is missing, if the server wants another key, or if the clients need more open
    files than this process may have.
    """
    drawing: ModuleType | None = None
    with contextlib.suppress(ModuleNotFoundError):
        from aioserver.tools.bench import table  # noqa: PLC0415 - optional

        drawing = table
    if drawing is None and not as_json:
        print(remote.RICH_MISSING, file=sys.stderr)
        return 2
    allowed = max(0, file_limit(plan.clients + OWN_FILES) - OWN_FILES)
    if allowed < plan.clients:
        print(
            f"--clients {plan.clients} is too many: the open files that this process may have are"
            f" enough for {allowed} clients (ulimit -Hn raises the limit)",
            file=sys.stderr,
        )
        return 2
    run = Run(plan)
    try:
        asyncio.run(_execute(run, drawing.show_progress if drawing else None))
    except remote.Unreachable as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, remote.KeyNeeded) else 1
    report = run.report()
    if as_json or drawing is None:
        print(orjson.dumps(report, option=orjson.OPT_INDENT_2).decode())
    else:
        drawing.show(report)
    return 0 if report["complete"] else 1


async def _execute(run: Run, show: Show | None) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, run.stop)
    await run.execute(show)
