"""Each condition for serving is one clear line and an exit code where it does not hold."""

from __future__ import annotations

import errno
import os
import resource
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import http_parser

from aioserver.server import preflight
from tests.support.server import CONCURRENCY, NOWHERE, configured, write
from tests.support.waiting import LATE

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from aioserver.config.settings import Settings

UNLIMITED = resource.RLIM_INFINITY


def refused(path: Path, *python: str, changes: dict[str, Any] | None = None) -> tuple[int, str]:
    """The exit code, and all that was said, of a process that does not come to serve."""
    write(NOWHERE, changes or {}, path / "c.yaml")
    done = subprocess.run(
        [sys.executable, *python, "-m", "aioserver", "--config", str(path / "c.yaml")],
        capture_output=True,
        text=True,
        timeout=LATE,
        check=False,
    )
    assert done.stdout == ""
    return done.returncode, done.stderr


def test_python_without_asserts_is_refused(tmp_path: Path) -> None:
    code, message = refused(tmp_path, "-O")
    assert code == 2
    assert (
        message
        == "python -O (or PYTHONOPTIMIZE) removes checks that aioserver needs: leave it out\n"
    )


def test_aiohttp_without_its_c_parser_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    preflight.check_interpreter()

    monkeypatch.setattr(http_parser, "HttpRequestParser", http_parser.HttpRequestParserPy)
    with pytest.raises(preflight.Unfit, match="aiohttp has no C parser here: install") as missing:
        preflight.check_interpreter()
    monkeypatch.setenv("AIOHTTP_NO_EXTENSIONS", "1")
    with pytest.raises(preflight.Unfit, match="C parser off: unset it") as switched_off:
        preflight.check_interpreter()

    assert (missing.value.code, switched_off.value.code) == (1, 2)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return configured(NOWHERE, {}, tmp_path / "c.yaml").settings


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets the limits of open files, which the kernel may refuse to change."""

    def limit(soft: int, hard: int, refusal: Exception | None = None) -> None:
        limits = [soft, hard]

        def change(_kind: int, wanted: tuple[int, int]) -> None:
            if refusal is not None:
                raise refusal
            limits[:] = wanted

        monkeypatch.setattr(resource, "getrlimit", lambda _kind: tuple(limits))
        monkeypatch.setattr(resource, "setrlimit", change)

    return limit


def test_files_for_every_cap_are_counted(tmp_path: Path) -> None:
    changes = {
        f"{CONCURRENCY}.max_connections": 100,
        f"{CONCURRENCY}.connection_queue_size": 128,
        "llm.providers.sim.http_client.max_connections": 30,
    }
    settings = configured(NOWHERE, changes, tmp_path / "c.yaml").settings
    assert preflight.wanted_files(settings) == 100 + 128 + 256 + 256 + 30 + 64


def test_too_few_files_for_the_clients_are_refused(
    settings: Settings, kernel: Callable[..., None]
) -> None:
    kernel(100, 100)
    wanted = preflight.wanted_files(settings)
    with pytest.raises(preflight.Unfit) as unfit:
        preflight.raise_file_limit(settings)
    assert unfit.value.code == 1
    assert str(unfit.value) == (
        "100 open files are too few for chat.websocket.concurrency.max_connections=50: raise it "
        f"to {wanted} (ulimit -Hn {wanted}; systemd: LimitNOFILE={wanted}), or lower that"
    )


@pytest.mark.parametrize(
    ("soft", "hard", "then", "warned"),
    [
        (200, 4000, 4000, False),  # raised as far as it goes
        (200, UNLIMITED, None, False),  # to what is wanted: macOS takes no infinite limit
        (3000, 4000, 3000, False),  # enough as it is
        (UNLIMITED, UNLIMITED, UNLIMITED, False),
        (200, 300, 300, True),  # for the clients, but not for all at once
    ],
)
def test_the_limit_of_files_is_raised_where_need_be(
    settings: Settings,
    kernel: Callable[..., None],
    *,
    soft: int,
    hard: int,
    then: int | None,
    warned: bool,
) -> None:
    kernel(soft, hard)
    warning = preflight.raise_file_limit(settings)
    wanted = preflight.wanted_files(settings) if then is None else then
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (wanted, hard)
    assert (warning or "").startswith("300 open files are fewer than") == warned


@pytest.mark.parametrize("refusal", [ValueError("a filter of system calls"), OSError("the same")])
def test_a_limit_of_files_that_cannot_be_raised_is_a_warning(
    settings: Settings, kernel: Callable[..., None], refusal: Exception
) -> None:
    kernel(200, 4000, refusal)
    warning = preflight.raise_file_limit(settings)
    assert warning is not None
    assert warning.startswith("200 open files are fewer than all limits together may take")


def test_a_port_in_use_is_one_line_that_says_what_to_do(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        changes = {"chat.websocket.port": port, "logging.level": "ERROR"}
        code, message = refused(tmp_path, changes=changes)
    assert code == 1
    assert message == (
        f"cannot listen on 127.0.0.1:{port}: Address already in use: "
        "end what listens there, or choose another port (--port)\n"
    )


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.EACCES, "choose a port above 1023 (--port)"),
        (errno.EADDRNOTAVAIL, "choose an address of this machine (--host)"),
        (socket.EAI_NONAME, "see chat.websocket.host"),
    ],
)
def test_an_address_that_cannot_be_listened_on_is_one_line(number: int, advice: str) -> None:
    words = os.strerror(number)
    line = preflight.cannot_listen("192.0.2.1", 80, OSError(number, words))
    assert line == f"cannot listen on 192.0.2.1:80: {words}: {advice}"


def test_certificates_that_are_none_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("no certificate")
    changes = {
        "llm.providers.sim.base_url": "https://127.0.0.1:9/v1",
        "llm.providers.sim.ca_file": str(tmp_path / "ca.pem"),
        "logging.level": "ERROR",
    }
    code, message = refused(tmp_path, changes=changes)
    assert code == 2
    assert message == f"llm.providers.sim.ca_file: {tmp_path / 'ca.pem'} holds no certificates\n"
