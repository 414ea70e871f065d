"""The listener's certificate: renewed while it serves, asked of clients, and watched."""

from __future__ import annotations

import asyncio
import logging
import re
import socket
import ssl
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from aioserver.files.watched_files import LOOK, PATIENCE
from aioserver.files.x509 import certificates
from aioserver.server.certificates import KIND
from aioserver.server.tls import outlived
from tests.support import chat as frames
from tests.support.server import PACED, running
from tests.support.tls import TLS, TlsClient, authority, pair, put, trusting

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.server import MakeServer, RunningServer

GET = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


async def shown(server: RunningServer) -> bytes | None:
    """The certificate that a new connection is shown."""
    async with TlsClient(server.port) as client:
        return client.tls.getpeercert(binary_form=True)


def der_of(path: Path) -> bytes:
    return certificates(path.read_bytes())[0].der


def said(server: RunningServer, kind: str) -> list[str]:
    return [entry["text"] for entry in server.incidents() if entry["kind"] == kind]


# Renewal.


async def test_renewed_certificate_is_for_new_connections_and_drops_none(
    make_server: MakeServer, tmp_path: Path
) -> None:
    server = await make_server(PACED, **{TLS: pair(tmp_path)})
    first = await shown(server)
    loaded = server.context.monitor.fresh()["tls"]["loaded"]  # type: ignore[typeddict-item]
    async with server.connect() as ws, TlsClient(server.port) as kept:
        await ws.send_json(frames.chat("r"))
        await frames.until_status(ws, "chunk")

        pair(tmp_path)
        await server.owners.watched.look()

        assert await shown(server) == der_of(tmp_path / "tls.pem") != first
        assert (await frames.to_end(ws))[-1]["status"] == "complete"
        await kept.send(GET)
        await kept.until(b"200 OK")
        assert kept.tls.getpeercert(binary_form=True) == first
    assert server.context.monitor.fresh()["tls"]["loaded"] > loaded  # type: ignore[typeddict-item]


async def test_same_certificate_keeps_its_sessions(
    make_server: MakeServer, tmp_path: Path
) -> None:
    server = await make_server(**{TLS: pair(tmp_path)})
    assert server.owners.tls is not None
    loaded = server.owners.tls.loaded

    put(tmp_path / "tls.pem", (tmp_path / "tls.pem").read_bytes())
    await server.owners.watched.look(again=True)

    assert server.owners.tls.loaded is loaded


async def test_other_files_come_by_a_reload_and_whether_there_is_tls_by_a_restart(
    make_server: MakeServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    server = await make_server(**{TLS: pair(tmp_path)})
    other = pair(tmp_path, "other.pem")

    assert await server.change(**{TLS: other})
    assert await shown(server) == der_of(tmp_path / "other.pem")
    assert f"{TLS} has changed, and stays as it was until a restart" not in caplog.messages

    assert await server.change()
    assert f"{TLS} has changed, and stays as it was until a restart" in caplog.messages
    assert await shown(server) == der_of(tmp_path / "other.pem")

    assert not await server.change(**{TLS: {"cert_file": str(tmp_path / "none.pem")}})
    assert await shown(server) == der_of(tmp_path / "other.pem")


@pytest.mark.virtual_time
async def test_half_of_a_pair_changes_nothing_and_is_told_once(
    make_server: MakeServer, tmp_path: Path
) -> None:
    section = pair(tmp_path)
    server = await make_server(**{TLS: section})
    first = await shown(server)
    await asyncio.sleep(2 * LOOK)

    whole = (tmp_path / "tls.pem").read_bytes()
    pair(tmp_path)
    renewed = (tmp_path / "tls.pem").read_bytes()
    for content in (renewed[:300], b"", whole[:200] + renewed[200:], renewed[:-200]):
        put(tmp_path / "tls.pem", content)
        await asyncio.sleep(PATIENCE / 4)
        assert await shown(server) == first
    await asyncio.sleep(PATIENCE)
    assert len(said(server, KIND)) == 1
    assert str(tmp_path) in said(server, KIND)[0]

    put(tmp_path / "tls.pem", renewed)
    await asyncio.sleep(2 * LOOK)
    assert await shown(server) == der_of(tmp_path / "tls.pem") != first


# Certificates of clients.


def client(of: str = "ours", **options: Any) -> ssl.SSLContext:
    """The context of a client whose certificate the authority *of* has signed."""
    context = trusting(**options)
    authority(of).issue_cert("client").configure_cert(context)
    return context


async def get(server: RunningServer, context: ssl.SSLContext) -> bool:
    """Whether a client with *context* gets an answer, to the request that anybody may make."""
    try:
        async with TlsClient(server.port, context) as tls:
            await tls.send(GET)
            await tls.until(b"200 OK")
    except (ssl.SSLError, ConnectionError):
        return False
    return True


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_certificate_is_asked_of_every_client(
    make_server: MakeServer, tmp_path: Path, version: ssl.TLSVersion
) -> None:
    section = pair(tmp_path) | {"client_ca_file": str(tmp_path / "ca.pem")}
    server = await make_server(**{TLS: section})

    assert not await get(server, trusting(maximum_version=version))
    assert not await get(server, client("others", maximum_version=version))
    assert await get(server, client(maximum_version=version))
    assert server.context.metrics.handshakes["failed"].value == 2


async def test_authority_that_is_taken_away_holds_for_new_connections(
    make_server: MakeServer, tmp_path: Path
) -> None:
    both = authority("ours").cert_pem.bytes() + authority("others").cert_pem.bytes()
    put(tmp_path / "clients.pem", both)
    section = pair(tmp_path) | {"client_ca_file": str(tmp_path / "clients.pem")}
    server = await make_server(**{TLS: section})
    async with TlsClient(server.port, client("others")) as kept:
        assert await get(server, client("others"))

        put(tmp_path / "clients.pem", authority("ours").cert_pem.bytes())
        await server.owners.watched.look()

        assert not await get(server, client("others"))
        assert await get(server, client())
        await kept.send(GET)
        await kept.until(b"200 OK")


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_certificate_is_checked_each_time(
    make_server: MakeServer, tmp_path: Path, version: ssl.TLSVersion
) -> None:
    """A session that is resumed shows no certificate."""
    section = pair(tmp_path) | {"client_ca_file": str(tmp_path / "ca.pem")}
    server = await make_server(**{TLS: section})
    context = client(maximum_version=version)
    async with TlsClient(server.port, context) as first:
        await first.send(GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        await first.to_the_end()
        session = first.tls.session

    async with TlsClient(server.port, context, session=session) as second:
        await second.send(GET)
        await second.until(b"200 OK")
        # TLS 1.2 resumes by the session's number, and its certificate is looked at again.
        assert not second.tls.session_reused or version == ssl.TLSVersion.TLSv1_2


@pytest.mark.parametrize("days", [1, -1])
async def test_resumed_session_ends_with_its_certificate(tmp_path: Path, days: float) -> None:
    pair(tmp_path, days=days)
    der = der_of(tmp_path / "tls.pem")

    class Session:
        def getpeercert(self, *, binary_form: bool) -> bytes | None:
            return der if binary_form else None

    assert outlived(Session()) == (days < 0)  # type: ignore[arg-type]


async def test_unix_socket_stays_plain(tmp_path: Path) -> None:
    path = str(tmp_path / "aioserver.sock")
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(path)
    listening.listen()
    port = socket.create_server(("127.0.0.1", 0))
    section = pair(tmp_path) | {"client_ca_file": str(tmp_path / "ca.pem")}
    changes = {TLS: section, "auth": {"allowed_hosts": ["x"]}}
    async with (
        running(tmp_path / "config.yaml", changes=changes, inherited=[port, listening]) as server,
        aiohttp.ClientSession(connector=aiohttp.UnixConnector(path)) as session,
        session.get("http://x/health") as response,
    ):
        assert response.status == 200
        assert not await get(server, trusting())
        assert await get(server, client())


# What operators see.


def about(server: RunningServer) -> str | None:
    return server.context.monitor.fresh()["verdict"]["about"]


async def test_state_and_metrics_tell_of_the_certificate(
    make_server: MakeServer, tmp_path: Path
) -> None:
    server = await make_server(**{TLS: pair(tmp_path, days=40)})
    expires = certificates((tmp_path / "tls.pem").read_bytes())[0].expires

    async with server.session.get(server.base + "/health") as response:
        assert response.status == 200
    server.context.monitor.tick()
    async with server.session.get(server.base + "/stats") as response:
        state = (await response.json())["tls"]
    async with server.session.get(server.base + "/metrics") as response:
        text = await response.text()

    assert state["expires"] == expires
    assert state["unfinished"] == 0
    assert state["outcomes"]["done"] >= 1
    gauge = re.search(r"^aioserver_tls_certificate_expires_seconds (\S+)$", text, re.MULTILINE)
    assert gauge is not None
    assert float(gauge[1]) == expires
    assert 'aioserver_tls_handshakes_total{outcome="done"}' in text
    assert about(server) != "tls"


@pytest.mark.parametrize(("days", "words"), [(10, "in 10 days"), (-1, "has expired")])
async def test_end_of_the_certificate_is_an_incident_and_its_renewal_another(
    make_server: MakeServer, tmp_path: Path, days: float, words: str
) -> None:
    server = await make_server(**{TLS: pair(tmp_path, days=days)})
    server.context.monitor.tick()
    assert said(server, "tls") == [entry for entry in said(server, "tls") if words in entry]
    assert len(said(server, "tls")) == 1
    assert about(server) == "tls"

    pair(tmp_path)
    await server.owners.watched.look()
    server.context.monitor.tick()

    assert len(said(server, "tls")) == 2
    assert "valid again" in " ".join(said(server, "tls"))
    assert about(server) != "tls"
