"""`aioserver provider`: the simulated provider as a server of its own."""

from __future__ import annotations

import asyncio
import dataclasses
import difflib
import os
import signal
import sys
from typing import Any

import click

from aioserver.commands import options, output
from aioserver.wings.simulator import faults
from aioserver.wings.simulator.engine import EngineOptions
from aioserver.wings.simulator.exchange import Behaviour
from aioserver.wings.simulator.model import BadRequest
from aioserver.wings.simulator.server import Simulator

FAULTS_TITLE = """\
The faults of the simulated provider. --fault NAME gives one to every model, or with --fail-rate
to a share of the requests; `fault-` may be left out of NAME, as in --fault stall-5.
"""


def _fault(_context: click.Context, _parameter: click.Parameter, name: str) -> str:
    """Return the name of a fault as `Behaviour` takes it, without the prefix of its model.

    Raises:
        click.BadParameter: the simulator has no such fault.
    """
    name = name.removeprefix(faults.PREFIX)
    try:
        if name:
            faults.find(faults.PREFIX + name)
    except BadRequest:
        nearest = difflib.get_close_matches(name, faults.FAULTS, 1)
        hint = f"did you mean {nearest[0]}? " if nearest else ""
        message = f"no fault {name!r} ({hint}--list-faults prints all)"
        raise click.BadParameter(message) from None
    return name


def _fault_names(_context: click.Context, _parameter: click.Parameter, begun: str) -> list[str]:
    """Return the fault names that begin with *begun*, for a shell's completion."""
    prefix = faults.PREFIX if begun.startswith(faults.PREFIX) else ""
    return [name for fault in faults.FAULTS if (name := prefix + fault).startswith(begun)]


def _engine(
    _context: click.Context, _parameter: click.Parameter, text: str
) -> EngineOptions | None:
    """Return the engine that OPTIONS describe; None without any.

    Raises:
        click.BadParameter: an option is unknown, or no positive whole number.
    """
    if not text:
        return None
    known = {field.name: field.type for field in dataclasses.fields(EngineOptions)}
    given: dict[str, Any] = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name not in known:
            raise click.BadParameter(f"no option {name!r}; there are: {', '.join(known)}")
        if not value.isascii() or not value.isdigit() or not int(value):
            raise click.BadParameter(f"{name} must be a whole number above 0")
        given[name] = int(value)
    return EngineOptions(**given)


def _list_faults(context: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    """Print the names that --fault takes, and exit."""
    if wanted and not context.resilient_parsing:
        click.echo(f"{FAULTS_TITLE}\n{faults.TABLE}", nl=False)
        context.exit()


@click.command("provider")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@options.number("--port", click.IntRange(0, 65535), "Port to listen on; 0: any free one.", 9000)
@options.number("--ttft", click.FloatRange(min=0), "Seconds before the first token.", 0.2)
@options.number("--interval", click.FloatRange(min=0), "Seconds between two tokens.", 0.03)
@options.number(
    "--tokens",
    click.IntRange(min=0),
    "Tokens of each answer; 0: the natural length of its text.",
    0,
)
@options.number(
    "--fail-rate",
    click.FloatRange(0, 1),
    "Share of the requests that fail.  [default: 0; with --fault: 1]",
)
@options.number(
    "--fail-status", click.IntRange(400, 599), "HTTP status of the requests that fail.", 503
)
@click.option(
    "--fault",
    callback=_fault,
    shell_complete=_fault_names,
    default="",
    metavar="NAME",
    help="Fail in this way instead of with --fail-status: stall-3, for example.",
)
@click.option(
    "--list-faults",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_list_faults,
    help="Explain every NAME that --fault takes, and exit.",
)
@options.number(
    "--cut-after",
    click.IntRange(min=0),
    "Reset the connection after so many tokens.",
    metavar="TOKENS",
)
@options.number(
    "--stall-after",
    click.IntRange(min=0),
    "Send nothing more after so many tokens, and keep the connection open.",
    metavar="TOKENS",
)
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="NAME",
    help="List this model under /v1/models; may be repeated. Any other is answered, too.",
)
@click.option(
    "--responses/--no-responses",
    default=True,
    help="Have /v1/responses, or chat completions only, as many engines.  [default: responses]",
)
@click.option(
    "--engine",
    callback=_engine,
    default="",
    metavar="OPTIONS",
    help="Take the time of an engine with a prefix cache, instead of --ttft and --interval: "
    "slots=4,prefill=4000,decode=40,cache=65536,block=16 (requests at once; tokens of a prompt read, "
    "and of an answer written, in a second; tokens that the cache and one of its blocks hold).",
)
@options.version
def command(*, host: str, port: int, fail_rate: float | None, **behaviour: Any) -> int:
    """Run a simulated LLM provider, with faults on request.

    It speaks OpenAI's API (chat completions, completions, responses, embeddings, models) and
    answers any model with a canned text. A model called fault-NAME fails in the way that
    --list-faults explains; --fault NAME does that to every model.
    """
    if fail_rate is None:
        fail_rate = 1.0 if behaviour["fault"] else 0.0
    return provider(host, port, Behaviour(fail_rate=fail_rate, **behaviour))


def provider(host: str, port: int, behaviour: Behaviour) -> int:
    """Run the simulator until SIGINT or SIGTERM; port 0 is any free one.

    Returns the exit code: 0, or 1 if it cannot listen on *host* and *port*.
    """
    output.open_closed()
    return asyncio.run(_run(host, port, behaviour))


async def _run(host: str, port: int, behaviour: Behaviour) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    simulator = Simulator(behaviour)
    try:
        base_url = await simulator.start(host, port)
    except OSError as error:
        # asyncio's own text is long; a host name that was not found has no positive number.
        code = error.errno
        reason = os.strerror(code) if code and code > 0 else error.strerror
        print(f"cannot listen on {host}:{port}: {reason}", file=sys.stderr)
        return 1
    try:
        # A program that reads us through a pipe waits for these lines.
        output.announce(
            f"simulated provider on {base_url} (Ctrl-C stops it)\n"
            "point aioserver at it: AIOSERVER__LLM__ACTIVE=local"
            f" AIOSERVER__LLM__PROVIDERS__LOCAL__BASE_URL={base_url} python -m aioserver"
        )
        await stop.wait()
    finally:
        await simulator.close()
    return 0
