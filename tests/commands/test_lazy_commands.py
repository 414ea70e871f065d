"""The group of commands: a command's module is imported only when that command is typed."""

from __future__ import annotations

import gc
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

from aioserver import __version__
from aioserver.__main__ import COMMANDS, cli, load
from tests.support.waiting import LATE

if TYPE_CHECKING:
    from pathlib import Path

LISTED = """
import sys
from click.shell_completion import ShellComplete
from click.testing import CliRunner
from aioserver.__main__ import cli

assert CliRunner().invoke(cli, ["--help"]).exit_code == 0
assert CliRunner().invoke(cli, ["no-such-command"]).exit_code == 2
assert ShellComplete(cli, {}, "aioserver", "").get_completions([], "")
print(*(name for name in sys.modules if name.startswith(("aiohttp", "aioserver."))))
"""

# `serve`, which says on request what the collector of garbage does.
COLLECTING = """
import gc, sys, threading
from aioserver.__main__ import main

def tell():
    sys.stdin.readline()
    print(gc.isenabled(), gc.get_threshold()[0], gc.get_freeze_count() > 50_000, flush=True)

threading.Thread(target=tell, daemon=True).start()
main()
"""


def completions(*words: str) -> list[str]:
    """The completions that a shell offers for the last of *words*."""
    *complete, incomplete = words
    items = ShellComplete(cli, {}, "aioserver", "").get_completions(complete, incomplete)
    return [item.value for item in items]


def test_listing_and_completing_commands_imports_none_of_them() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LISTED], capture_output=True, text=True, timeout=LATE, check=True
    )

    # The module `output` is for the end of every command.
    own = {"aioserver.__main__", "aioserver.commands", "aioserver.commands.output"}
    assert set(done.stdout.split()) <= own


# What no server needs before its configuration asks for it.
RARE = {
    "aioserver.wings.cluster.membership",
    "aioserver.wings.conversations.redis",
    "aioserver.wings.jwt.issuer",
    "aioserver.wings.simulator.server",
    "aioserver.wings.tracing.tracer",
    "difflib",
    "importlib.metadata",
    "importlib.resources",
    "redis",
    "sqlite3",
    "zipfile",
}


def test_one_process_imports_nothing_of_several_and_nothing_rare() -> None:
    program = "import sys, aioserver.commands.serve; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=LATE, check=True
    )
    imported = set(done.stdout.split())

    assert "aioserver.server.reload" in imported
    several = {"parent", "supervisor", "worker"}
    assert not {f"aioserver.workers.{name}" for name in several} & imported
    assert not RARE & imported


def test_garbage_is_collected_once_the_server_listens_and_not_what_the_start_has_made() -> None:
    # Not while it starts: see `serve_command.py`.
    command = [sys.executable, "-c", COLLECTING, "--port", "0"]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        ready = server.stdout.readline()
        server.stdin.write("\n")
        server.stdin.flush()
        state = server.stdout.readline()
        server.terminate()

    assert ready.startswith("aioserver is ready: ")
    assert state.split() == ["True", "2000", "True"]


def test_a_start_that_is_refused_leaves_the_collector_as_it_was(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["serve", "--config", str(tmp_path / "missing.yaml")])

    assert result.exit_code == 2
    assert gc.isenabled()


@pytest.mark.parametrize("name", COMMANDS)
def test_command_has_its_name_and_the_help_of_the_table(name: str) -> None:
    command = load(name)

    assert command.name == name
    assert command.help is not None
    assert command.help.splitlines()[0] == COMMANDS[name][1]
    assert len(COMMANDS[name][1]) < 66  # a line of 80 columns has no room for more


@pytest.mark.parametrize("name", COMMANDS)
def test_command_explains_each_of_its_options(name: str) -> None:
    result = CliRunner().invoke(cli, [name, "--help"])

    assert result.exit_code == 0
    for parameter in load(name).params:
        if parameter.param_type_name == "option":
            assert getattr(parameter, "help", None), parameter.name


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_version_is_an_option_of_every_command(command: list[str]) -> None:
    result = CliRunner().invoke(cli, [*command, "--version"])

    assert result.exit_code == 0
    assert result.stdout == f"aioserver, version {__version__}\n"


def test_nothing_typed_is_serve(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.yaml")

    result = CliRunner().invoke(cli, [], env={"AIOSERVER_CONFIG": missing})

    assert result.exit_code == 2
    assert missing in result.stderr


def test_unknown_command_is_a_usage_error() -> None:
    result = CliRunner().invoke(cli, ["bensh"])

    assert result.exit_code == 2
    assert "No such command 'bensh'" in result.stderr


def test_exit_code_is_what_the_command_returns(tmp_path: Path) -> None:
    target = str(tmp_path / "config.yaml")

    codes = [CliRunner().invoke(cli, ["init", target]).exit_code for _ in range(2)]

    assert codes == [0, 2]


def test_shell_completes_commands_options_and_values() -> None:
    assert completions("") == list(COMMANDS)
    assert completions("be") == ["bench"]
    assert completions("bench", "--fa") == ["--face"]
    assert completions("bench", "--face", "o") == ["openai"]


def test_shell_completes_the_options_of_serve_without_its_name() -> None:
    assert completions("--po") == ["--port"]
    assert completions("--port", "9000", "--lo") == ["--loop"]
    assert completions("--loop", "uv") == ["uvloop"]
    offered = completions("--")
    assert {"--version", "--help", "--config"} < set(offered)
    assert len(offered) == len(set(offered))
