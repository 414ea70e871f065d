"""The command line of `doctor`: its options, its output, its exit code."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import click
import orjson

from aioserver.commands import options
from aioserver.tools import remote
from aioserver.tools.doctor.findings import Finding, Report

if TYPE_CHECKING:
    from pathlib import Path

# Seconds: a proxy's longest timeout, and some more.
MAX_IDLE = 3700.0


@click.command("doctor")
@remote.optional_url_argument
@options.config
@click.option(
    "--no-ask",
    is_flag=True,
    help="Ask no question that could cost money. Otherwise a small one goes to the active provider and to"
    " each fallback; with URL, to the server, if it has no simulated model.",
)
@click.option(
    "--idle",
    type=click.FloatRange(min=0, max=MAX_IDLE),
    default=0.0,
    help="Seconds for which a WebSocket to URL is kept open in silence.  [default: not tested]",
)
@remote.key_option
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
@options.version
def command(
    url: str | None,
    config: Path | None,
    *,
    no_ask: bool,
    idle: float,
    key: str | None,
    as_json: bool,
) -> int:
    """Find what stands between a client and an answer.

    Without URL, the doctor looks at a server that would start here: its configuration, the limits of this
    machine, and DNS, connection, TLS, key and first token of each provider. URL is the address of a running
    server, direct or through a proxy: the doctor then looks at the way to it, as a client meets it. Keys and
    texts are not shown. Exit code 1: something failed; 2: the configuration is bad.
    """
    if url is None and idle:
        raise click.UsageError("--idle goes with a URL")
    if url is not None and config is not None:
        raise click.UsageError("either --config or a URL")
    report = Report(_ignore if as_json else _print)
    if url is None:
        code = examine_here(report, config, ask=not no_ask)
    else:
        code = examine_server(report, url, key, ask=not no_ask, idle=idle)
    if as_json:
        print(orjson.dumps(report.plain(), option=orjson.OPT_INDENT_2).decode())
    else:
        print(report.summary())
    return code


def _print(finding: Finding) -> None:
    # The next step may take long, and a person waits.
    print(finding, flush=True)


def _ignore(_finding: Finding) -> None:
    """Wait for the whole report."""


def examine_here(report: Report, config: Path | None, *, ask: bool) -> int:
    """Examine this machine, and the configuration in *config* (None: the file that `serve` would choose).

    *ask*: whether a question may cost money. Returns the exit code: 0, 1 if anything failed, 2 for a configuration that
    `serve` would refuse.
    """
    from aioserver.tools.doctor import here  # noqa: PLC0415 - start-up time

    return here.examine(report, config, ask=ask)


def examine_server(report: Report, url: str, key: str | None, *, ask: bool, idle: float) -> int:
    """Examine the way to the server at *url*, as a client with *key* meets it. Returns the exit code.

    *ask*: whether a question may cost money. *idle*: seconds for which a WebSocket is kept open in silence; 0: none.
    """
    from aioserver.tools.doctor.server import Examination  # noqa: PLC0415 - start-up time

    asyncio.run(Examination(report, url, key).run(ask=ask, idle=idle))
    return int(report.failed)
