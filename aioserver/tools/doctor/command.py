"""The command line of `doctor`: its options, its output, its exit code."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

import click
import orjson

from aioserver.client.client import base_url
from aioserver.commands import options
from aioserver.tools import remote
from aioserver.tools.doctor.facts import Facts
from aioserver.tools.doctor.results import summary

if TYPE_CHECKING:
    from pathlib import Path

    from aioserver.tools.doctor.results import Result

# Seconds: somewhat more than the usual longest timeout of a proxy, an hour.
MAX_IDLE = 3700.0


@click.command("doctor")
@click.argument("target", required=False, metavar="[URL|PROVIDER]")
@options.config
@click.option(
    "--no-ask",
    is_flag=True,
    help="Ask no question that could cost money. Otherwise a small one goes to the active "
    "provider and to each fallback; with URL, to the server, if it has no simulated model.",
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
    target: str | None,
    config: Path | None,
    *,
    no_ask: bool,
    idle: float,
    key: str | None,
    as_json: bool,
) -> int:
    """Find what stands between a client and an answer.

    Without an argument, the doctor looks at a server that would start here: its configuration, the
    limits of this machine, and DNS, connection, TLS, key and first token of each provider. URL is
    the address of a running server, direct or through a proxy: the doctor then looks at the way to
    it, as a client meets it. PROVIDER is the name of one in the configuration: the doctor then
    looks at that alone, and asks it for a call of a tool as agents ask, over the bridges. Keys and
    texts are not shown. Exit code 1: something failed; 2: the configuration is bad.
    """
    url, provider = "", None
    if target is not None and _address(target, config):
        try:
            url = base_url(target)
        except ValueError as error:
            raise click.UsageError(str(error)) from None
    else:
        provider = target
    if not url and idle:
        raise click.UsageError("--idle goes with a URL")
    if url and config is not None:
        raise click.UsageError("either --config or a URL")
    from aioserver.tools.doctor.checks import examine  # noqa: PLC0415 - start-up time

    # The log of the server in this process is not part of the report.
    logging.getLogger("aioserver").addHandler(logging.NullHandler())
    facts = Facts(url=url, key=key, config=config, only=provider, ask=not no_ask, idle=idle)
    results: list[Result] = []

    def tell(result: Result) -> None:
        results.append(result)
        if not as_json:
            # Flushed, since a person waits, and the next check may take long.
            print(result, flush=True)

    code = asyncio.run(examine(facts, tell))
    if as_json:
        failed = any(result.level == "fail" for result in results)
        report = {"failed": failed, "findings": results}
        print(orjson.dumps(report, option=orjson.OPT_INDENT_2).decode())
    else:
        print(summary(results))
    return code


def _address(target: str, config: Path | None) -> bool:
    """Return whether *target* is the address of a server, and not the name of a provider."""
    bare = target != "localhost" and not any(mark in target for mark in ".:/[")
    return "://" in target or (config is None and not bare)
