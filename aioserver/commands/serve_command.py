"""The command line of `serve`: its options, without the server, which takes half a second to
import.

A shell that completes options needs no more than this.
"""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import click

from aioserver.commands import options

if TYPE_CHECKING:
    from pathlib import Path


@click.command("serve")
@options.config
@click.option("--host", help="Address to listen on, instead of the configured one.")
@options.number(
    "--port",
    click.IntRange(0, 65535),
    "Port to listen on, instead of the configured one; 0: any free one.",
)
@click.option(
    "--loop",
    type=click.Choice(["auto", "uvloop", "asyncio"]),
    default="auto",
    show_default=True,
    help="Event loop; auto: uvloop if it is installed.",
)
@click.option(
    "--replaceable",
    is_flag=True,
    help="Let SIGUSR2 replace a single worker, too: it gets a parent process (Linux).",
)
@options.version
def command(
    config: Path | None, *, host: str | None, port: int | None, loop: str, replaceable: bool
) -> int:
    """Serve chat clients; the default.

    SIGTERM and Ctrl-C stop the server: answers that are running have the seconds of
    chat.websocket.shutdown_timeout to finish; a second signal ends the process at once. SIGHUP
    reloads the configuration. SIGUSR2 replaces the processes, if there are several workers or
    --replaceable is given: running answers stay where they are until they end.
    """
    # Nearly every object of the imports and the settings lives as long as the process: the
    # collector's passes over them were a tenth of the start. `serve` enables it once it listens.
    gc.disable()
    try:
        from aioserver.commands.serve import serve  # noqa: PLC0415 - start-up time

        return serve(config, host=host, port=port, loop=loop, replaceable=replaceable)
    finally:
        gc.enable()
