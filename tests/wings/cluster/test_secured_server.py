"""A server that is secured as docs/scaling.md says: over TLS, and with a user who may do no more
than is needed.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trustme

from aioserver.gateway.contracts.commands import Commands
from aioserver.wings.cluster.answers.claims import Claims
from aioserver.wings.cluster.connection import CallFailed, Connection
from aioserver.wings.cluster.limits.leases import Leases
from aioserver.wings.cluster.limits.renewer import Renewer
from aioserver.wings.cluster.redis_commands import RedisCommands
from aioserver.wings.conversations.redis import Listed, RedisTurns
from aioserver.wings.conversations.turn import Position
from aioserver.workers.private_server import find_program
from tests.support.redis_server import RedisServer, program_of_server
from tests.support.tools import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.real_time
PAGE = (Path(__file__).parents[3] / "docs/scaling.md").read_text()


@pytest.fixture
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def tls_port(tmp_path: Path, authority: trustme.CA) -> Iterator[int]:
    """The port of a server whose certificate *authority* has signed, in `tmp_path/ca.pem`."""
    if program_of_server() == find_program({"PATH": "/nowhere"}):
        pytest.skip(
            "the server of the extra `cluster` has no TLS; install valkey-server or redis-server"
        )
    certificate, port = authority.issue_cert("localhost"), free_port()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    certificate.private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "server.pem"))
    with RedisServer(
        tmp_path,
        *("--tls-port", str(port), "--tls-auth-clients", "no"),
        *("--tls-cert-file", str(tmp_path / "server.pem")),
        *("--tls-key-file", str(tmp_path / "server.pem")),
        *("--tls-ca-cert-file", str(tmp_path / "ca.pem")),
    ):
        yield port


async def test_a_server_is_reached_over_tls(tls_port: int, tmp_path: Path) -> None:
    connection = Connection(f"rediss://localhost:{tls_port}?ssl_ca_certs={tmp_path / 'ca.pem'}")
    await connection.open()

    assert await connection.execute("PING") == b"PONG"

    await connection.close()


@pytest.mark.parametrize("fault", ["unknown authority", "other host"])
async def test_a_certificate_that_is_not_valid_is_refused(
    fault: str, tls_port: int, tmp_path: Path
) -> None:
    query = "" if fault == "unknown authority" else f"?ssl_ca_certs={tmp_path / 'ca.pem'}"
    host = "localhost" if fault == "unknown authority" else "127.0.0.1"
    connection = Connection(f"rediss://{host}:{tls_port}{query}")

    with pytest.raises(CallFailed, match=r"(?i)certificate"):
        await connection.open()

    await connection.close()


async def test_the_user_that_the_page_shows_may_do_what_is_needed_and_no_more(
    tmp_path: Path,
) -> None:
    rules = re.search(r"ACL SETUSER aioserver on >PASSWORD (.+?)\n\n", PAGE, re.DOTALL)
    assert rules is not None
    with RedisServer(tmp_path) as server:
        server.call("ACL", "SETUSER", "aioserver", "on", ">secret", *rules[1].split())
        url = f"unix://aioserver:secret@{server.path}"
        renewer = Renewer(lambda on_due: Leases("host-1", on_due=on_due), url, "aioserver")
        connection = RedisCommands(url)
        commands = Commands(connection, renewer.prefix)
        claims, turns = Claims(commands, "host-1"), RedisTurns(commands)

        assert await renewer.open() is None
        assert (await claims.take("n")).owner == "host-1"
        await claims.renew({"n": 30})
        await claims.put_log("n", b"log", 30)
        assert await claims.get_log("n") == b"log"
        await turns.keep_turn("c", b"turn", (1000, 4, 60.0))
        assert (await turns.turns("c"))[:2] == ([b"turn"], False)
        await turns.keep_turn("d", b"turn", (1000, 4, 60.0), Listed("o", "id", 4e9, 4e9))
        assert await turns.conversations("o", 10, None) == [Position(4e9, "id")]
        assert await turns.first_turns(["d"]) == [(1, b"turn")]
        assert await turns.delete_turns("o", {"id": "d"}, 60.0) == 1
        assert await turns.note_deletion("o", 60.0)
        assert (await turns.turns("d"))[:2] == ([], True)
        assert await claims.members() == ["host-1"]
        denied = server.call("ACL", "LOG")
        for command in (("GET", "other"), ("FLUSHALL",), ("CONFIG", "GET", "*")):
            with pytest.raises(CallFailed, match="NOPERM"):
                await connection.execute(*command)
        await renewer.close()
        await connection.close()

    assert denied == []
