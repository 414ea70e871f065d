"""python -m aioserver: the parser, the commands, the exit codes (0 done, 2 usage, 1 else)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from aioserver import __version__

FILE = click.Path(dir_okay=False, path_type=Path)
CONTEXT = {"help_option_names": ["-h", "--help"]}


@click.group(invoke_without_command=True, context_settings=CONTEXT)
@click.version_option(__version__, prog_name="aioserver")
@click.pass_context
def cli(context: click.Context) -> None:
    """Many chat clients, few LLM provider connections, and no stalls. Without a command: serve."""
    if context.invoked_subcommand is None:
        context.invoke(serve)


@cli.command(context_settings=CONTEXT)
@click.option("--config", type=FILE, help="YAML file; else $AIOSERVER_CONFIG, else ./config.yaml.")
@click.option("--host", help="Address to listen on, in place of the configured one.")
@click.option(
    "--port", type=click.IntRange(0, 65535), help="Port, in place of the configured one."
)
@click.option(
    "--loop",
    type=click.Choice(["auto", "uvloop", "asyncio"]),
    default="auto",
    show_default=True,
    help="Event loop; auto: uvloop where it is installed.",
)
def serve(config: Path | None, host: str | None, port: int | None, loop: str) -> None:
    """Serve."""
    from aioserver.commands.serve import serve as run

    sys.exit(run(config, host=host, port=port, loop=loop))


@cli.command(context_settings=CONTEXT)
@click.argument("file", type=FILE, default=Path("config.yaml"))
def init(file: Path) -> None:
    """Write the shipped, commented config.yaml, never over a file."""
    from aioserver.commands.init import init as run

    sys.exit(run(file))


@cli.command(context_settings=CONTEXT)
@click.option("--config", type=FILE, help="YAML file; else $AIOSERVER_CONFIG, else ./config.yaml.")
def check(config: Path | None) -> None:
    """Validate the configuration without starting; print what is in effect, secrets masked."""
    from aioserver.commands.check import check as run

    sys.exit(run(config))


@cli.command(context_settings=CONTEXT)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=9000, show_default=True)
@click.option(
    "--ttft",
    type=click.FloatRange(min=0),
    default=0.2,
    show_default=True,
    help="Seconds before the first token.",
)
@click.option(
    "--interval",
    type=click.FloatRange(min=0),
    default=0.03,
    show_default=True,
    help="Seconds between tokens.",
)
@click.option(
    "--tokens",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Tokens of an answer; 0: as many as its text has.",
)
@click.option(
    "--fail-rate",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=True,
    help="Share of requests that fail.",
)
@click.option("--fail-status", type=click.IntRange(400, 599), default=503, show_default=True)
@click.option("--cut-after", type=click.IntRange(min=0), help="Close hard after so many tokens.")
@click.option(
    "--stall-after", type=click.IntRange(min=0), help="Fall silent after so many tokens."
)
def provider(host: str, port: int, **behaviour: Any) -> None:
    """The simulated OpenAI-compatible provider, as a server of its own."""
    from aioserver.commands.provider import provider as run
    from aioserver.providers.simulator import Behaviour

    sys.exit(run(host, port, Behaviour(**behaviour)))


def main() -> None:
    """The `aioserver` command."""
    cli(prog_name="aioserver")


if __name__ == "__main__":
    main()
