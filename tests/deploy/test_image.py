"""The container's recipe, read as text. `test_container.py` builds it, in CI."""

from __future__ import annotations

import itertools
import json
import re
import shlex
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from aioserver.__main__ import cli
from aioserver.config import Configuration
from tests.support.process import Process
from tests.support.tools import DEPLOY

if TYPE_CHECKING:
    from tests.support.server import MakeServer

ROOT = Path(__file__).parents[2]


def instructions() -> list[tuple[str, str]]:
    """The lines of the Dockerfile: instruction and the rest, continued lines joined."""
    text = (DEPLOY / "Dockerfile").read_text()
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    whole = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [
        (word, rest.strip()) for word, _, rest in (line.partition(" ") for line in whole) if word
    ]


RECIPE = instructions()
LAST = RECIPE[max(at for at, (word, _) in enumerate(RECIPE) if word == "FROM") :]


def of(word: str) -> list[str]:
    """The arguments of each instruction *word* in the last stage, which is the image."""
    return [rest for instruction, rest in LAST if instruction == word]


def exec_form(text: str) -> list[str]:
    """A command without a shell between it and the signals."""
    command = json.loads(text)
    assert isinstance(command, list)
    assert all(isinstance(word, str) for word in command)
    return command


def environment() -> dict[str, str]:
    return dict(pair.split("=", 1) for line in of("ENV") for pair in shlex.split(line))


def test_every_file_that_is_copied_exists_and_is_let_in() -> None:
    rules = (ROOT / ".dockerignore").read_text().splitlines()
    let_in = [rule[1:] for rule in rules if rule.startswith("!")]
    copied = [
        source
        for word, rest in RECIPE
        if word == "COPY" and not rest.startswith("--from")
        for source in rest.split()[:-1]
    ]

    assert copied
    for source in copied:
        assert (ROOT / source).exists(), source
        assert any(fnmatch(source, rule) for rule in let_in), source
    assert "*" in rules


def test_every_file_that_the_installation_reads_is_copied() -> None:
    setup = "".join((ROOT / name).read_text() for name in ("setup.cfg", "setup.py"))
    copied = " ".join(rest for word, rest in RECIPE if word == "COPY")

    for name in ("README.md", "LICENSE"):
        assert name in setup
        assert name in copied


def test_image_runs_without_root_and_ends_on_a_signal() -> None:
    (user,) = of("USER")

    assert all(int(number) >= 1000 for number in user.split(":"))
    assert [word for word, _ in LAST if word in {"USER", "ENTRYPOINT"}] == ["USER", "ENTRYPOINT"]
    assert of("STOPSIGNAL") == ["SIGTERM"]


def test_the_command_is_one_that_there_is_and_gets_the_signals() -> None:
    command = exec_form(of("ENTRYPOINT")[0]) + exec_form(of("CMD")[0])

    assert command[:3] == ["python", "-m", "aioserver"]
    assert command[3] in cli.commands


def test_no_secret_is_built_in() -> None:
    for name in environment():
        assert not any(word in name for word in ("KEY", "SECRET", "TOKEN", "PASSWORD"))


@pytest.mark.parametrize("guard", ["", "AIOSERVER__AUTH__OPEN"])
def test_its_address_needs_a_guard(guard: str) -> None:
    environ = {
        name: value for name, value in environment().items() if name.startswith("AIOSERVER__")
    }
    configuration = Configuration.load(
        ROOT / "config.yaml", environ={**environ, **({guard: "true"} if guard else {})}
    )

    assert configuration.settings.chat.websocket.host == "0.0.0.0"
    assert str(configuration.settings.chat.websocket.port) in of("EXPOSE")
    if guard:
        configuration.check_usable()
    else:
        with pytest.raises(Exception, match=r"0\.0\.0\.0 is open to others"):
            configuration.check_usable()


def test_its_own_commands_start_it_as_they_stand() -> None:
    text = "\n".join(
        line.removeprefix("#") for line in (DEPLOY / "Dockerfile").read_text().splitlines()
    )
    commands = [line.strip() for line in text.splitlines() if line.strip().startswith("docker")]
    _build, serve, chat, key = map(shlex.split, commands)

    assert chat[:4] == ["docker", "exec", "aioserver", "aioserver"]
    for command in (chat[3:], key[key.index("aioserver") :]):
        assert command[1] in cli.commands
    assert serve[-1] == "aioserver"
    options = list(itertools.pairwise(serve))
    passed = dict(value.split("=", 1) for option, value in options if option == "-e")
    Configuration.load(shipped(), environ=environment() | passed).check_usable()
    (mount,) = re.findall(r'-v "\$PWD/(\S+):(\S+):ro"', text)
    assert mount == ("config.yaml", environment()["AIOSERVER_CONFIG"])


def shipped() -> Path:
    """The configuration that the image has where `AIOSERVER_CONFIG` says."""
    (source,) = [
        rest.split()[1]
        for word, rest in LAST
        if word == "COPY" and rest.endswith(f" {environment()['AIOSERVER_CONFIG']}")
    ]
    return ROOT / source.removeprefix("/build/")


async def test_the_health_check_asks_what_there_is(
    make_server: MakeServer,
) -> None:
    (check,) = of("HEALTHCHECK")
    program, *arguments = exec_form(check.partition("CMD")[2].strip())
    assert program == "python"
    server = await make_server()

    for port, code in ((server.port, 0), (9, 1)):
        # That of the image is 8000.
        environ = {"AIOSERVER__CHAT__WEBSOCKET__PORT": str(port)}
        async with await Process.start(*arguments, environ=environ) as process:
            assert await process.ended() == code, process.log
