"""The `key` command: a key, and a line that the configuration takes."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
import yaml
from click.testing import CliRunner

from aioserver.__main__ import cli
from aioserver.auth.access import Access
from aioserver.commands.key import add_key
from aioserver.config import keys_file, schema
from aioserver.config.settings import ClientKey
from tests.support.configurations import load, small

if TYPE_CHECKING:
    from pathlib import Path

    from click.testing import Result


@pytest.mark.parametrize(("options", "admin"), [([], False), (["--admin"], True)])
def test_the_line_lets_the_key_in(tmp_path: Path, options: list[str], admin: bool) -> None:
    result = CliRunner().invoke(cli, ["key", "web-1.b_c", *options])

    assert result.exit_code == 0
    made, line = result.stdout.splitlines()
    assert made.startswith("aio-")
    assert len(made) == 4 + 43
    assert made not in result.stderr
    assert made not in line
    text = f"{small()}auth:\n  keys:\n  {line}\n"
    auth = load(text, tmp_path / "config.yaml").settings.auth
    caller = Access(auth).keys.caller(made.encode())
    assert (caller.name, caller.admin) == ("web-1.b_c", admin)
    assert yaml.safe_load(line)[0]["sha256"] == hashlib.sha256(made.encode()).hexdigest()


def test_no_two_keys_are_alike() -> None:
    made = {CliRunner().invoke(cli, ["key", "web"]).stdout.splitlines()[0] for _ in range(50)}

    assert len(made) == 50


@pytest.mark.parametrize("name", ["", "a b", "-x", "é", "a\nb", "x" * 65, '"', "a:b", "../x"])
def test_a_name_that_no_caller_can_have_is_usage(name: str) -> None:
    result = CliRunner().invoke(cli, ["key", "--", name])

    assert result.exit_code == 2
    assert result.stdout == ""
    assert "NAME" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("arguments", [[], ["a", "b"], ["--root", "a"]])
def test_anything_but_one_name_is_a_usage_error(arguments: list[str]) -> None:
    assert CliRunner().invoke(cli, ["key", *arguments]).exit_code == 2


def test_a_name_with_a_number_or_a_word_of_yaml_stays_a_name(tmp_path: Path) -> None:
    for name in ("7", "no", "1.5", "null"):
        line = CliRunner().invoke(cli, ["key", name]).stdout.splitlines()[1]
        auth = load(f"{small()}auth: {{keys: [{line[2:]}]}}\n", tmp_path / "c.yaml").settings.auth

        assert auth is not None
        assert auth.all_keys[0].name == name


# The file of keys.


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["key", *map(str, arguments)])


def test_a_key_is_added_listed_and_revoked(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"

    added = run("web", "--add", file, "--max-concurrent", 5, "--class", "batch", "--admin")
    other = run("app", "--add", file, "--queue-size", 0)

    assert (added.exit_code, other.exit_code) == (0, 0)
    (key,) = added.stdout.splitlines()
    assert key not in added.stderr
    assert file.stat().st_mode & 0o777 == 0o600
    assert key not in file.read_text()
    web, app = keys_file.read(file)
    assert web.sha256 == hashlib.sha256(key.encode()).hexdigest()
    assert (web.max_concurrent, web.class_, web.admin, web.queue_size) == (5, "batch", True, 200)
    assert (app.queue_size, app.admin) == (0, False)
    shown = run("--list", file)
    assert shown.stdout == "web max_concurrent=5 queue_size=200 class=batch admin\napp\n"
    assert run("web", "--revoke", file).exit_code == 0
    assert [key.name for key in keys_file.read(file)] == ["app"]
    assert run("app", "--revoke", file).exit_code == 0
    assert keys_file.read(file) == ()
    assert run("--list", file).stdout == ""


def test_each_limit_of_a_key_is_an_option() -> None:
    shown = run("--help").stdout

    limits = {schema.key_of(field) for field in schema.fields(ClientKey)}
    for limit in limits - {"name", "key_env", "key_file", "sha256"}:
        assert f"--{limit.replace('_', '-')}" in shown
    made = run("web", "--tokens-per-minute", 5000, "--priority", 3).stdout.splitlines()[1]
    assert made.endswith(", tokens_per_minute: 5000, queue_size: 200, priority: 3}")


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (("web", "--add", "F"), "a key is named web already"),
        (("other", "--revoke", "F"), "no key is named other; there are: web"),
        (("other", "--revoke", "gone"), "no such file (--add makes it)"),
        (("other", "--add", "no/folder"), "no such file (no is no folder)"),
        (("--list", "gone"), "no such file"),
        (("other", "--add", "config.yaml"), "is this a configuration?"),
        (("other", "--revoke", "config.yaml"), "is this a configuration?"),
        (("--list", "config.yaml"), "is this a configuration?"),
        (("a b", "--add", "F"), "NAME must be"),
        (("other", "--add", "F", "--priority", "11"), "must be at most 10"),
        (("other", "--add", "F", "--class", "slow"), "expected one of interactive, batch"),
        (("other", "--add", "F", "--tokens-per-day", "1", "--tokens-per-minute", "2"), ">= tok"),
        (("other", "--add", "F", "--revoke", "F"), "one at a time"),
        (("web", "--revoke", "F", "--admin"), "--revoke takes no limits"),
        (("web", "--list", "F"), "--list takes neither NAME nor limits"),
        (("--add", "F"), "Missing argument 'NAME'"),
    ],
)
def test_what_cannot_be_done_is_usage_with_a_hint_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], hint: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(small())
    assert run("web", "--add", "F").exit_code == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    result = run(*arguments)

    assert result.exit_code == 2
    assert result.stdout == ""
    assert hint in result.stderr
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert {name: after[name] for name in after if not name.endswith(".lock")} == {
        name: before[name] for name in before if not name.endswith(".lock")
    }


def test_links_are_followed_and_stay(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link.yaml").symlink_to(tmp_path / "other.yaml")
    (tmp_path / "other.yaml").symlink_to(tmp_path / "real" / "keys.yaml")

    assert run("web", "--add", tmp_path / "link.yaml").exit_code == 0
    assert run("app", "--add", tmp_path / "link.yaml").exit_code == 0

    assert (tmp_path / "link.yaml").is_symlink()
    assert (tmp_path / "other.yaml").is_symlink()
    names = [key.name for key in keys_file.read(tmp_path / "real" / "keys.yaml")]
    assert names == ["web", "app"]


def test_the_mode_of_a_file_stays(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text("[]\n")
    file.chmod(0o640)

    assert run("web", "--add", file).exit_code == 0

    assert file.stat().st_mode & 0o777 == 0o640
    assert {path.name for path in tmp_path.iterdir()} == {"keys.yaml", "keys.yaml.lock"}


def test_two_writers_at_once_lose_nothing(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    names = [f"k{number}" for number in range(40)]

    def add(name: str) -> None:
        entry = ClientKey(name=name, sha256=hashlib.sha256(name.encode()).hexdigest())
        assert add_key(entry, "", file) == 0

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, names))

    assert sorted(key.name for key in keys_file.read(file)) == sorted(names)


WRITER = """
import sys
from pathlib import Path
from aioserver.commands.key import add_key, revoke_key
from aioserver.config.settings import ClientKey
file, first = Path(sys.argv[1]), int(sys.argv[2])
sys.stderr = open("/dev/null", "w")
for number in range(first, first + 100_000):
    name = f"k{number}"
    assert add_key(ClientKey(name=name, sha256=f"{number:064}"), name, file) == 0
    if number % 3 == 0:
        assert revoke_key(name, file) == 0
    sys.stdout.flush()
"""


# Two processes have to start.
def test_killed_writers_leave_the_old_list_or_the_new_one(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    run("first", "--add", file)
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(file), str(start)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for start in (0, 1000)
    ]
    told = []
    for writer in writers:
        assert writer.stdout is not None
        # The other one goes on to write while this one is killed.
        names = [writer.stdout.readline() for _ in range(20)]
        writer.kill()
        told += [*names, *writer.communicate()[0].split()]

    there = {key.name for key in keys_file.read(file)}

    assert "first" in there
    # Each third one was to be taken out again.
    assert {name.strip() for name in told if int(name[1:]) % 3} <= there
    assert run("last", "--add", file).exit_code == 0
