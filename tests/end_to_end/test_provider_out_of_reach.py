"""A provider that cannot be reached, as a client sees it on each face, alone and with another."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import functools
import socket
import ssl
import threading
from typing import TYPE_CHECKING, Any

import pytest
import trustme

from tests.support.faces import (
    FACES,
    ask_every_face,
    expected_text,
    over_openai,
)
from tests.support.scripted_provider import OK, Peer, ScriptedProvider, full_listener
from tests.support.server import MakeServer, provider_entry
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


class Names:
    """The machine's resolver, which finds one name only when a test says so."""

    def __init__(self, slow: str) -> None:
        self._slow = slow
        self.asked = 0
        self.found = threading.Event()

    def getaddrinfo(self, host: str, *args: Any, **kwargs: Any) -> Any:
        """`socket.getaddrinfo`: it blocks its thread."""
        if host != self._slow:
            return socket.getaddrinfo(host, *args, **kwargs)
        self.asked += 1
        self.found.wait(60)
        return socket.getaddrinfo("127.0.0.1", *args, **kwargs)


@pytest.fixture
async def names(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Names]:
    """A name, slow.test, that takes its time."""
    loop, made = asyncio.get_running_loop(), Names("slow.test")

    def getaddrinfo(*args: Any, **kwargs: Any) -> Any:  # as asyncio does it
        return loop.run_in_executor(None, functools.partial(made.getaddrinfo, *args, **kwargs))

    monkeypatch.setattr(loop, "getaddrinfo", getaddrinfo)
    yield made
    made.found.set()
    await loop.shutdown_default_executor()


@contextlib.asynccontextmanager
async def refused(_path: Path) -> AsyncIterator[dict[str, Any]]:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        yield {"base_url": f"http://127.0.0.1:{closed.getsockname()[1]}/v1"}


@contextlib.asynccontextmanager
async def unreachable(_path: Path) -> AsyncIterator[dict[str, Any]]:
    yield {"base_url": "http://255.255.255.255:9/v1"}  # the kernel connects to no broadcast


@contextlib.asynccontextmanager
async def unknown(_path: Path) -> AsyncIterator[dict[str, Any]]:
    loop = asyncio.get_running_loop()
    real = loop.getaddrinfo

    async def getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
        if host == "no-such-provider.test":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return await real(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "getaddrinfo", getaddrinfo)
        yield {"base_url": "http://no-such-provider.test/v1"}


@contextlib.asynccontextmanager
async def full(_path: Path) -> AsyncIterator[dict[str, Any]]:
    async with full_listener() as port:
        yield {"base_url": f"http://127.0.0.1:{port}/v1"}


@contextlib.asynccontextmanager
async def silent_handshake(_path: Path) -> AsyncIterator[dict[str, Any]]:
    async with ScriptedProvider(Peer.left) as server:
        yield {"base_url": f"https://127.0.0.1:{server.port}/v1"}


@contextlib.asynccontextmanager
async def certified(path: Path, name: str, **more: Any) -> AsyncIterator[dict[str, Any]]:
    async def serving(peer: Peer) -> None:
        while True:
            await peer.request()
            await peer.send(OK)

    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(path / "ca.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(name, **more).configure_cert(context)
    async with ScriptedProvider(serving, ssl=context) as server:
        yield {"base_url": server.url, "ca_file": str(path / "ca.pem")}
        assert server.open == 0


def expired(path: Path) -> Any:
    return certified(path, "127.0.0.1", not_after=dt.datetime(2020, 1, 1, tzinfo=dt.UTC))


def misnamed(path: Path) -> Any:
    return certified(path, "elsewhere.test")


# Where it is, what a client is told, what became of the try.
OUT_OF_REACH = {
    "refused": (refused, 502, "connect_error", "connect_error"),
    "unreachable": (unreachable, 502, "connect_error", "connect_error"),
    "no such name": (unknown, 502, "connect_error", "connect_error"),
    "full accept queue": (full, 504, "connect_timeout", "timeout"),
    "silent TLS handshake": (silent_handshake, 504, "connect_timeout", "timeout"),
    "TLS certificate expired": (expired, 502, "provider_auth_error", "tls"),
    "TLS certificate of another": (misnamed, 502, "provider_auth_error", "tls"),
}


def patience(code: str) -> dict[str, float]:
    """Limits with a short connect_timeout where a test waits for it.

    Elsewhere a busy machine would take longer than that to be refused.
    """
    return {"connect_timeout": 0.3} if code == "connect_timeout" else {}


def far(entry_changes: dict[str, Any], **limits: Any) -> dict[str, Any]:
    """The changes that make `far` the first provider that is asked."""
    entry = provider_entry("", "far-model", **limits) | entry_changes
    return {"llm.active": "far", "llm.providers.far": entry}


@pytest.mark.virtual_time
@pytest.mark.parametrize("where", OUT_OF_REACH)
async def test_a_provider_out_of_reach_is_an_error_on_every_face(
    where: str, make_server: MakeServer, tmp_path: Path
) -> None:
    place, status, code, outcome = OUT_OF_REACH[where]
    async with place(tmp_path) as entry_changes:
        server = await make_server(**far(entry_changes, **patience(code)))

        ws, sse, v1, whole = await ask_every_face(server, "m")
        other = await over_openai(server, "sim")

        assert {answer.code for answer in (ws, sse, v1, whole)} == {code}
        assert v1.status == whole.status == status
        for answer in (ws, sse, v1, whole):
            for detail in (b"certificate verify", b"expired", b"elsewhere", b"Errno", b"name or"):
                assert detail not in answer.raw.replace(b"does not hold", b"")
        assert other.end == "complete", "the others are no worse for it"
        tries = await server.counted("provider_attempts", "provider", "outcome")
        # One that refuses us is left alone, perhaps before all have asked it.
        assert tries.pop(("far", outcome)) in ((1, 2, 3, 4) if outcome == "tls" else (4,))
        assert tries == {("sim", "ok"): 1}
        ends = await server.counted("requests", "face", "provider", "code")
        assert {face: ends[face, "far", code] for face in FACES} == FACES
        await server.nothing_held()
        assert server.provider_of("far").stats().pool.open == 0
        assert server.provider_of("far").stats().flagged == (outcome == "tls")


@pytest.mark.virtual_time
@pytest.mark.parametrize("where", OUT_OF_REACH)
async def test_another_provider_answers_in_place_of_one_out_of_reach(
    where: str, make_server: MakeServer, tmp_path: Path
) -> None:
    place, _, code, _ = OUT_OF_REACH[where]
    async with place(tmp_path) as entry_changes:
        server = await make_server(
            **far(entry_changes, **patience(code)), **{"llm.fallbacks": ["sim"]}
        )
        text = await expected_text(server)

        seen = await ask_every_face(server, "m")

        assert [(answer.end, answer.text) for answer in seen] == [("complete", text)] * 4
        assert seen[2].headers["x-aioserver-provider"] == "sim"
        over = await server.counted("failovers", "provider", "reason")
        assert sum(over.values()) == 5
        assert over.keys() <= {("far", code), ("far", "circuit_open")}
        assert (await server.counted("provider_attempts", "provider"))["sim",] == 5
        await server.nothing_held()


@pytest.mark.virtual_time
@pytest.mark.parametrize(
    ("where", "tries"),
    [
        ("refused", 3),
        ("full accept queue", 3),
        ("silent TLS handshake", 3),
        ("TLS certificate expired", 1),
    ],
)
async def test_only_faults_that_may_pass_are_tried_again(
    where: str, tries: int, make_server: MakeServer, tmp_path: Path
) -> None:
    place, status, code, outcome = OUT_OF_REACH[where]
    limits = {"max_retries": 2, "backoff_factor": 0.001, **patience(code)}
    async with place(tmp_path) as entry_changes:
        server = await make_server(**far(entry_changes, **limits))

        seen = await over_openai(server, "m")

        assert (seen.status, seen.code) == (status, code)
        assert seen.headers["x-aioserver-attempts"] == str(tries)
        assert seen.headers.get("x-should-retry") == "false"
        attempts = await server.counted("provider_attempts", "provider", "outcome")
        assert attempts == {("far", outcome): tries}
        again = await server.counted("retries", "reason")
        assert again == ({(code,): tries - 1} if tries > 1 else {})
        await server.nothing_held()


async def test_a_name_that_is_found_late_holds_up_nobody(
    make_server: MakeServer, names: Names
) -> None:
    server = await make_server()
    port = server.simulator.port
    server = await make_server(
        **far({"base_url": f"http://slow.test:{port}/v1"}, connect_timeout=30.0)
    )
    waits = asyncio.create_task(ask_every_face(server, "m"))
    await until(lambda: server.held()["far busy"] == 4)

    others = await ask_every_face(server, "sim")
    still = not waits.done()
    names.found.set()

    assert still
    assert [answer.end for answer in others] == ["complete"] * 4
    assert [answer.end for answer in await waits] == ["complete"] * 4
    assert names.asked == 1, "one look-up, and so one thread, for all who ask for a name"
    await server.nothing_held()


@pytest.mark.virtual_time
async def test_a_name_that_is_not_found_in_time_is_a_connect_timeout(
    make_server: MakeServer, names: Names
) -> None:
    slow = {"base_url": "http://slow.test/v1"}
    server = await make_server(**far(slow, **patience("connect_timeout")))

    seen = await ask_every_face(server, "m")

    assert [answer.code for answer in seen] == ["connect_timeout"] * 4
    assert (seen[2].status, seen[3].status) == (504, 504)
    assert names.asked == 1
    assert await server.counted("provider_attempts", "outcome") == {("timeout",): 4}
    await server.nothing_held()
