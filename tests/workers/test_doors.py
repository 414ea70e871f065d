"""Two workers with every door at once: TLS, a file of keys, tokens of an issuer, and a hook."""

from __future__ import annotations

import asyncio
import signal
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import ClientSession, TCPConnector

from aioserver.commands.key import add_key, revoke_key
from aioserver.config.settings import ClientKey
from tests.support.hook_program import hook_program, refuse
from tests.support.issuer import SigningKey, issuer_server, jwt_settings
from tests.support.keys import COOKIE, bearer, cookie, entry
from tests.support.process import serving
from tests.support.server import UVICORN
from tests.support.simulator import Behaviour, Simulator
from tests.support.tls import TLS, pair, trusting
from tests.support.waiting import until, until_result
from tests.support.worker_processes import gone, workers

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.process import ServerProcess

pytestmark = pytest.mark.real_time
QUESTION: dict[str, Any] = {"model": "sim", "messages": [{"role": "user", "content": "Hello"}]}
ASKED = 6


async def statuses(
    process: ServerProcess, headers: dict[str, str], text: str = "Hello"
) -> set[int]:
    """The statuses of some requests, each on a connection of its own, so that workers take turns."""
    body = {**QUESTION, "messages": [{"role": "user", "content": text}]}
    url = f"{process.base}/v1/chat/completions"

    async def ask() -> int:
        connector = TCPConnector(ssl=trusting(), force_close=True)
        async with (
            ClientSession(connector=connector) as session,
            session.post(url, json=body, headers=headers) as response,
        ):
            await response.read()
            return response.status

    return set(await asyncio.gather(*(ask() for _ in range(ASKED))))


async def session_of(process: ServerProcess, headers: dict[str, str]) -> str:
    """The session of the key or token in *headers*."""
    connector = TCPConnector(ssl=trusting(), force_close=True)
    async with (
        ClientSession(connector=connector) as session,
        session.post(f"{process.base}/session", headers=headers) as response,
    ):
        assert response.status == 200
        return response.cookies[COOKIE].coded_value


async def test_two_workers_keep_every_door_and_a_replacement_changes_nothing(
    tmp_path: Path,
) -> None:
    async def decide(asked: Any) -> Any:
        return refuse() if "forbidden" in str(asked["body"]) else {}

    keys = tmp_path / "keys.yaml"
    assert add_key(ClientKey(**entry("web", max_concurrent=20)), "", keys) == 0
    async with (
        Simulator(Behaviour(ttft=0, interval=0, tokens=3)) as simulator,
        issuer_server(SigningKey("ES256")) as issuer,
        hook_program(decide=decide) as hook,
        serving(
            tmp_path / "config.yaml",
            simulator.base_url,
            changes={
                f"{UVICORN}.workers": 2,
                TLS: pair(tmp_path),
                "auth.keys_file": str(keys),
                "auth.jwt": jwt_settings(issuer.url, limits={"default": {"max_concurrent": 20}}),
                "hooks": [{"name": "guard", "url": hook.url, "timeout": 30.0}],
            },
        ) as process,
    ):
        await process.ready()
        token = {"Authorization": f"Bearer {issuer.token()}"}
        for headers in (bearer("web"), token):
            assert await statuses(process, headers) == {200}
            assert await statuses(process, headers, "forbidden") == {403}
        assert await statuses(process, {}) == {401}
        assert await statuses(process, {"Authorization": "Bearer a.b.c"}) == {401}
        assert {asked["caller"] for asked in hook.requests} == {"web", "jwt:alice"}

        # Each worker looks for itself.
        assert add_key(ClientKey(**entry("app", max_concurrent=20)), "", keys) == 0
        assert revoke_key("web", keys) == 0
        await until_result(partial(statuses, process, bearer("app")), {200}.__eq__)
        await until_result(partial(statuses, process, bearer("web")), {401}.__eq__)

        sessions = [await session_of(process, token), await session_of(process, bearer("app"))]
        former = workers(process)
        process.signal(signal.SIGUSR2)
        await until(lambda: all(map(gone, former)), 60.0, lambda: process.log)
        assert await statuses(process, bearer("app")) == {200}
        assert await statuses(process, bearer("web")) == {401}
        assert await statuses(process, token) == {200}
        assert await statuses(process, token, "forbidden") == {403}
        # Sessions are those of the parent, and of no process that has gone.
        for session in sessions:
            assert await statuses(process, cookie(session)) == {200}
        process.signal()
        assert await process.ended() == 0
    assert "Traceback" not in process.log
    assert issuer.token() not in process.log
