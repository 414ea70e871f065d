"""Completion in a shell, by the script that `aioserver completion` prints."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

from click.testing import CliRunner

from aioserver.__main__ import COMMANDS, cli
from tests.support.tools import installed
from tests.support.waiting import LATE

if TYPE_CHECKING:
    from pathlib import Path

# Completes each line of words on stdin. `compopt` works only while readline completes, so this one
# says that files are asked for.
COMPLETE = """
eval "$(aioserver completion bash)"
complete -p aioserver
compopt() { [ "$2" = default ] && COMPREPLY=(FILES); }
while read -r -a COMP_WORDS; do
    COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
    [ "${COMP_WORDS[$COMP_CWORD]}" = "''" ] && COMP_WORDS[$COMP_CWORD]=""
    COMPREPLY=()
    _aioserver_completion aioserver
    echo "${COMPREPLY[@]}"
done
"""


def test_bash_completes_commands_options_choices_and_files(tmp_path: Path) -> None:
    """It takes a second: each line starts Python anew, as each press of the key does."""
    program = tmp_path / "aioserver"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m aioserver "$@"\n')
    program.chmod(0o755)
    lines = (
        "aioserver ''",
        "aioserver serve --loop ''",
        "aioserver check --config ''",
        "aioserver provider --fault fault-dr",
    )

    done = subprocess.run(
        [installed("bash"), "--norc", "-c", COMPLETE],
        input="\n".join(lines) + "\n",
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=LATE,
        check=True,
    )

    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "complete -o nosort -F _aioserver_completion aioserver",
        " ".join(COMMANDS),
        "auto uvloop asyncio",
        "FILES",
        "fault-drop",
    ]


def test_completing_the_options_of_serve_does_not_import_the_server() -> None:
    program = (
        "import sys; from click.shell_completion import ShellComplete; from aioserver.__main__ "
        "import cli\nitems = ShellComplete(cli, {}, 'aioserver', '').get_completions(['serve'], "
        "'--')\nassert '--loop' in [item.value for item in items]\nassert not {'aiohttp', "
        "'aioserver.commands.serve'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], timeout=LATE, check=True)


def test_every_shell_has_its_script_and_another_is_a_usage_error() -> None:
    for shell in ("bash", "zsh", "fish"):
        result = CliRunner().invoke(cli, ["completion", shell])
        assert result.exit_code == 0
        assert f"_AIOSERVER_COMPLETE={shell}_complete" in result.stdout

    assert CliRunner().invoke(cli, ["completion", "csh"]).exit_code == 2
