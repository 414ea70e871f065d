"""The time until which a key is valid: requests, sessions and sockets after it."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest

from aioserver.auth.keys import Keys
from aioserver.auth.sessions import Sessions
from aioserver.config.settings import ClientKey
from aioserver.errors import InvalidApiKey, SessionEnded
from aioserver.server.reload import apply_auth
from tests.support.chat import chat, to_end
from tests.support.keys import auth_of, bearer, code_of, cookie, entry, key_of, keys_of, log_in

if TYPE_CHECKING:
    from tests.support.server import MakeServer, RunningServer


def moment(seconds: float) -> str:
    """The time in so many seconds, as the settings have it."""
    return datetime.fromtimestamp(time.time() + seconds, UTC).isoformat()


async def status_of(server: RunningServer, **headers: str) -> int:
    async with server.session.get(f"{server.v1}/models", headers=headers) as response:
        if response.status == 401:
            assert await code_of(response) in {"invalid_api_key", "session_ended"}
        return response.status


def test_a_key_and_its_sessions_end_at_its_time() -> None:
    now = [1_800_000_000.0]
    keys = Keys(Sessions(clock=lambda: now[0]), clock=lambda: now[0])
    expires = datetime.fromtimestamp(now[0] + 100, UTC).isoformat()
    keys.apply([ClientKey(**entry("web", expires=expires)), ClientKey(**entry("app"))])
    key = key_of("web").encode()
    session, seconds = keys.session(keys.caller(key))
    assert seconds == 100
    caller = keys.resume(session)

    now[0] += 99.9
    assert keys.caller(key) is keys.resume(session) is keys.current(caller) is caller
    now[0] += 0.2
    with pytest.raises(InvalidApiKey, match="this API key has expired"):
        keys.caller(key)
    with pytest.raises(SessionEnded):
        keys.resume(session)
    assert keys.current(caller) is None
    assert keys.caller(key_of("app").encode()).name == "app"


async def test_a_key_that_has_expired_is_401_until_a_reload_extends_it(
    make_server: MakeServer,
) -> None:
    server = await make_server(**keys_of("web", expires=moment(3600)))
    session = await log_in(server, "web")
    assert await status_of(server, **bearer("web")) == await status_of(server, **cookie(session))

    await apply_auth(server.owners, auth_of("web", expires=moment(-1)))
    assert await status_of(server, **bearer("web")) == 401
    assert await status_of(server, **cookie(session)) == 401

    await apply_auth(server.owners, auth_of("web", expires=moment(3600)))
    assert await status_of(server, **bearer("web")) == 200
    assert await status_of(server, **cookie(session)) == 200


@pytest.mark.virtual_time
@pytest.mark.timeout(600)
@pytest.mark.parametrize("path", ["/ws/chat", "/v1/responses"])
async def test_a_socket_closes_when_its_key_has_expired(
    make_server: MakeServer, path: str
) -> None:
    server = await make_server(**keys_of("web", expires=moment(3600)))
    loop = asyncio.get_running_loop()
    async with server.session.ws_connect(server.base + path, headers=bearer("web")) as ws:
        # Another time holds for sockets that are open.
        began = loop.time()
        await apply_auth(server.owners, auth_of("web", expires=moment(9)))
        while (message := await ws.receive()).type.name == "TEXT":
            assert "this API key has expired" in message.data
        assert (message.data, message.extra) == (1008, "key expired")
        assert 7 <= loop.time() - began < 20


@pytest.mark.virtual_time
@pytest.mark.timeout(600)
async def test_a_socket_whose_key_is_extended_stays(make_server: MakeServer) -> None:
    server = await make_server(**keys_of("web", expires=moment(5)))
    async with server.connect(headers=bearer("web")) as ws:
        await apply_auth(server.owners, auth_of("web"))
        # Pings are answered only while somebody reads.
        first = asyncio.create_task(ws.receive_json())
        await asyncio.sleep(15)
        await ws.send_json(chat("r"))
        assert (await first)["status"] == "processing"
        assert (await to_end(ws))[-1]["status"] == "complete"


@pytest.mark.virtual_time
@pytest.mark.timeout(600)
async def test_a_watcher_is_shown_out_when_its_key_has_expired(make_server: MakeServer) -> None:
    server = await make_server(**{"auth.keys": [entry("root", expires=moment(5))]})
    async with server.session.get(
        f"{server.base}/events?interval=60", headers=bearer("root")
    ) as response:
        assert "this API key has expired" in await response.text()
