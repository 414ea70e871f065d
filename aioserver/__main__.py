"""python -m aioserver: the parser, the commands, the exit codes (0 done, 2 usage, 1 else)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from aioserver import __version__

FILE = click.Path(dir_okay=False, path_type=Path)
CONTEXT = {"help_option_names": ["-h", "--help"]}
SERVER = "http://127.0.0.1:8000"
KEY_HELP = "A client key of the server's.  [env: AIOSERVER_KEY]"


def _address(_context: click.Context, _parameter: click.Parameter, text: str) -> str:
    """The base URL of a running server."""
    from aioserver.commands.remote import address

    try:
        return address(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def _fault(_context: click.Context, _parameter: click.Parameter, name: str) -> str:
    """A fault of the simulator's; its prefix may be left out."""
    from aioserver.commands.provider import fault

    try:
        return fault(name)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def _list_faults(context: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    """Print the simulator's table of faults, and end."""
    if not wanted or context.resilient_parsing:
        return
    from aioserver.commands.provider import faults_table

    click.echo(faults_table())
    context.exit()


class Commands(click.Group):
    """The commands; the options of `serve` may stand alone."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put `serve` in front of options that are not the group's own."""
        if args and args[0].startswith("-") and args[0] not in {"-h", "--help", "--version"}:
            args = ["serve", *args]
        return super().parse_args(ctx, args)


@click.group(cls=Commands, invoke_without_command=True, context_settings=CONTEXT)
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
@click.argument("name")
@click.option("--admin", is_flag=True, help="It may also read /stats, /events and /metrics.")
def key(name: str, admin: bool) -> None:
    """Make a client key: print it, once, and the line for auth.keys with its hash."""
    from aioserver.commands.key import key as run

    sys.exit(run(name, admin=admin))


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
    help="Share of requests that fail.  [default: 0; with --fault 1]",
)
@click.option("--fail-status", type=click.IntRange(400, 599), default=503, show_default=True)
@click.option(
    "--fault",
    callback=_fault,
    default="",
    help="How they fail, for example stall-3, in place of --fail-status.",
)
@click.option(
    "--list-faults",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_list_faults,
    help="Print the names for --fault and what they do.",
)
@click.option("--cut-after", type=click.IntRange(min=0), help="Close hard after so many tokens.")
@click.option(
    "--stall-after", type=click.IntRange(min=0), help="Fall silent after so many tokens."
)
def provider(host: str, port: int, fail_rate: float | None, **behaviour: Any) -> None:
    """The simulated OpenAI-compatible provider, as a server of its own."""
    from aioserver.commands.provider import provider as run
    from aioserver.providers.simulator.exchange import Behaviour

    if fail_rate is None:
        fail_rate = 1.0 if behaviour["fault"] else 0.0
    sys.exit(run(host, port, Behaviour(fail_rate=fail_rate, **behaviour)))


@cli.command(context_settings=CONTEXT)
@click.argument("url", callback=_address, default=SERVER)
@click.option(
    "--interval",
    type=click.FloatRange(1, 60),
    default=1.0,
    show_default=True,
    help="Seconds between two snapshots.",
)
@click.option(
    "--once", is_flag=True, help="Print one snapshot; so does a stdout that is no terminal."
)
@click.option("--key", envvar="AIOSERVER_KEY", help=KEY_HELP)
def top(url: str, interval: float, once: bool, key: str | None) -> None:
    """The live state of a running server, in the terminal."""
    from aioserver.commands.top.command import top as run

    sys.exit(run(url, interval=interval, once=once, key=key))


@cli.command(context_settings=CONTEXT)
@click.argument("url", callback=_address, default=SERVER)
@click.option(
    "--face",
    type=click.Choice(["websocket", "sse", "openai"]),
    default="websocket",
    show_default=True,
    help="How the clients talk to the server.",
)
@click.option("--clients", type=click.IntRange(min=1), default=50, show_default=True)
@click.option(
    "--requests",
    type=click.IntRange(min=1),
    help="Of each client, one after the other.  [default: 4]",
)
@click.option(
    "--duration",
    type=click.FloatRange(min=0, min_open=True),
    help="Seconds, instead of --requests.",
)
@click.option("--model", help="Else the server's own choice.")
@click.option("--prompt", default="Hello", show_default=True, help="What every client asks.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="Of an answer.")
@click.option("--no-stream", is_flag=True, help="Whole answers; with --face openai.")
@click.option(
    "--ramp",
    type=click.FloatRange(min=0),
    default=0.0,
    help="Seconds over which the clients come.  [default: all at once]",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=120.0,
    show_default=True,
    help="Seconds that one request may take.",
)
@click.option("--key", envvar="AIOSERVER_KEY", help=KEY_HELP)
@click.option("--json", "as_json", is_flag=True, help="The numbers as JSON; works without rich.")
def bench(
    *,
    as_json: bool,
    requests: int | None,
    duration: float | None,
    prompt: str,
    model: str | None,
    max_tokens: int | None,
    no_stream: bool,
    **plan: Any,
) -> None:
    """Load a running server with chat clients; exit code 1 where an answer was not complete."""
    from aioserver.commands.bench.clients import Question
    from aioserver.commands.bench.command import bench as run
    from aioserver.commands.bench.load import Plan

    if requests is not None and duration is not None:
        raise click.UsageError("either --requests or --duration")
    if no_stream and plan["face"] != "openai":
        raise click.UsageError("--no-stream goes with --face openai")
    if requests is None and duration is None:
        requests = 4
    question = Question(prompt=prompt, model=model, max_tokens=max_tokens, streamed=not no_stream)
    sys.exit(
        run(Plan(question=question, requests=requests, duration=duration, **plan), as_json=as_json)
    )


def main() -> None:
    """The `aioserver` command."""
    cli(prog_name="aioserver")


if __name__ == "__main__":
    main()
