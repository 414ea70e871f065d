"""The command line: `python -m aioserver`, installed also as `aioserver`.

A new command is one line in COMMANDS and one module. The module's `command` is a click command
with its options and its help; the function behind it returns the exit code: 0 done, 2 bad
configuration or usage, 1 anything else. Where its results cannot be written, one line on stderr
says so.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

import click

from aioserver import __version__
from aioserver.commands import output

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer
    from click.shell_completion import CompletionItem

DEFAULT = "serve"
GROUP_OPTIONS = frozenset({"-h", "--help", "--version"})

# name: (module in aioserver, line in the list of commands)
COMMANDS = {
    "serve": ("commands.serve_command", "Serve chat clients; the default."),
    "init": ("commands.init", "Write a commented config.yaml to start from."),
    "check": ("commands.check", "Validate the configuration and print it."),
    "key": ("commands.key", "Make an API key for a client."),
    "provider": ("tools.provider", "Run a simulated LLM provider, with faults on request."),
    "chat": ("tools.chat.command", "Chat with a running server, or ask it one question."),
    "doctor": ("tools.doctor.command", "Find what stands between a client and an answer."),
    "top": ("tools.top.command", "Show the live state of a running server."),
    "usage": ("tools.usage", "Add up what callers have spent, as the ledger has it."),
    "why": ("tools.why", "Show where the time of one request went."),
    "bench": ("tools.bench.command", "Load a running server with chat clients."),
    "completion": ("commands.completion", "Print the script that completes commands in a shell."),
}


def load(name: str) -> click.Command:
    """Import the module of the command *name*, and return the command."""
    command: click.Command = import_module(f"aioserver.{COMMANDS[name][0]}").command
    return command


class CommandGroup(click.Group):
    """Imports the module of a command only to run, explain or complete that command.

    click lists, completes and suggests commands from stubs with a name and one line of help. To
    import the modules behind them takes ten times as long as to print the list.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        """Return the names of the commands in the order of COMMANDS."""
        return list(self.commands)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Insert the default command if *args* begins with neither a command nor a group
        option.
        """
        if args:
            default = args[0].startswith("-") and args[0] not in GROUP_OPTIONS
        else:
            # A shell that completes the first word may offer any command.
            default = not ctx.resilient_parsing
        if default:
            args = [DEFAULT, *args]
        return super().parse_args(ctx, args)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Put the command itself in place of its stub."""
        name, command, rest = super().resolve_command(ctx, args)
        if name is not None:
            command = load(name)
        return name, command, rest

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command and exit with the code that it returns."""
        ctx.exit(super().invoke(ctx))

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete the options of the default command too, since they may stand alone."""
        items = super().shell_complete(ctx, incomplete)
        if incomplete.startswith("-"):
            items += load(DEFAULT).shell_complete(ctx, incomplete)
        return list({item.value: item for item in items}.values())


@click.group(
    cls=CommandGroup,
    commands=[click.Command(name, short_help=line) for name, (_, line) in COMMANDS.items()],
    context_settings={"help_option_names": ["-h", "--help"]},
    subcommand_metavar="[COMMAND] [ARGS]...",
)
@click.version_option(__version__, prog_name="aioserver")
def cli() -> None:
    """A gateway between many chat clients and few connections to LLM providers.

    Without a command, aioserver runs `serve`, whose options may stand alone: aioserver --port
    9000. `aioserver COMMAND --help` explains a command.

    Exit codes: 0 done, 2 bad configuration or usage, 1 anything else.
    """


class OutputError(OSError):
    """Stdout cannot be written: its disk is full, for example, or its reader has gone."""


class Output(io.FileIO):
    """The descriptor of stdout. Its errors can be distinguished from those of other files."""

    def write(self, data: ReadableBuffer, /) -> int:
        """Write *data*, and return how much of it was written.

        Raises:
            OutputError: nothing could be written.
        """
        try:
            written = super().write(data)
        except OSError as error:
            raise OutputError(*error.args) from error
        if written is None:
            # A pipe that does not block, and is full.
            raise OutputError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return written


def watch_stdout() -> None:
    """Put a stream that raises `OutputError` in place of stdout, unless that is closed, or not
    Python's own.
    """
    stdout = sys.stdout
    if isinstance(stdout, io.TextIOWrapper) and stdout is sys.__stdout__:
        raw = Output(stdout.fileno(), "w", closefd=False)
        sys.stdout = io.TextIOWrapper(
            # `python -u` has no buffer.
            raw if stdout.write_through else io.BufferedWriter(raw),
            encoding=stdout.encoding,
            errors=stdout.errors,
            line_buffering=stdout.line_buffering,
            write_through=stdout.write_through,
        )


def main() -> None:
    """Run the command of the command line, and exit."""
    watch_stdout()
    stdout = sys.stdout
    try:
        try:
            cli(prog_name="aioserver")
        finally:
            # After EPIPE, click has put a stream there that hides the error; but Python would meet
            # it again at its end, with the rest of the buffer.
            sys.stdout = stdout
            if stdout is not None:
                # Small results reach the descriptor only now.
                stdout.flush()
    except OutputError as error:
        # A reader that has ended, such as `head`, needs no message.
        if error.errno != errno.EPIPE:
            with contextlib.suppress(OSError):
                click.echo(f"aioserver: stdout cannot be written: {error.strerror}", err=True)
        sys.exit(1)
    finally:
        output.give_up()


if __name__ == "__main__":
    main()
