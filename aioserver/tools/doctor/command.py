"""The command line of `doctor`: its options, its output, its exit code."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from typing import TYPE_CHECKING

import click
import orjson

from aioserver.client.client import base_url
from aioserver.commands import options
from aioserver.tools import remote
from aioserver.tools.doctor.results import LEVELS, Facts

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
    limits of this machine, and DNS, connection, TLS, key and first token of each provider. With the
    URL of a running server, it looks at the way to that, through any proxy. With the name of a
    PROVIDER in the configuration, it looks at that alone, and asks it for a call of a tool as agents
    ask. Keys and texts are not shown. Exit code 1: something failed; 2: the configuration is bad.
    """
    url, provider = "", target
    # A name alone is that of a provider, and so is one with a dot beside --config.
    bare = config is not None or (target != "localhost" and not set(target or "") & set(".:/["))
    if target is not None and ("://" in target or not bare):
        try:
            url, provider = base_url(target), None
        except ValueError as error:
            raise click.UsageError(str(error)) from None
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
    counts = Counter(result.level for result in results)
    if as_json:
        report = {"failed": counts["fail"] > 0, "findings": results}
        print(orjson.dumps(report, option=orjson.OPT_INDENT_2).decode())
    else:
        print(", ".join(f"{counts[level]} {level}" for level in LEVELS if counts[level]))
    return code
