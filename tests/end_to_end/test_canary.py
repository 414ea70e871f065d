"""A key, a session and a prompt are in no log, no metric, no state, no page and no error."""

from __future__ import annotations

import hashlib
import json
import logging
import signal
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from aioserver.server import reload
from aioserver.telemetry.logs import ConsoleFormatter, JsonFormatter
from tests.support.chat import cancel, chat, resume, to_end, until_status
from tests.support.keys import COOKIE, auth_of, bearer, cookie, keys_of, log_in
from tests.support.process import serving
from tests.support.raw import Raw
from tests.support.scripted_provider import ScriptedProvider
from tests.support.simulator import Behaviour
from tests.support.waiting import patience

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.support.scripted_provider import Peer
    from tests.support.server import MakeServer, RunningServer


KEY, PROMPT = "CANARYKEY", "CANARYPROMPT"
NAME = f"app-{KEY}"  # the caller's name is no secret: what is looked for is its key, made of it


class Heard:
    """Everything that the server has written for others than the caller: logs, metrics, state,
    pages.
    """

    def __init__(self) -> None:
        self.texts: list[str] = []

    async def take(self, server: RunningServer, method: str, path: str, **request: Any) -> None:
        async with server.session.request(method, server.base + path, **request) as response:
            self.texts.append(f"{response.headers} {await response.text()}")
        server.session.cookie_jar.clear()


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Callable[[], str]:
    """All that was logged from INFO on, as both formats write it."""
    caplog.set_level(logging.INFO)
    formats = (JsonFormatter("aioserver", ""), ConsoleFormatter())
    return lambda: "\n".join(each.format(record) for each in formats for record in caplog.records)


async def tried_out(server: RunningServer, heard: Heard, session: str, secret: str) -> None:
    """Questions on every face, well and badly; the answers themselves are the caller's own."""
    mine, prompt = {"Authorization": f"Bearer {secret}"}, {"role": "user", "content": PROMPT}
    offer = ("aioserver", f"aioserver.key.{secret}")
    for handshake in (
        *({"headers": mine}, {"headers": cookie(session)}, {"protocols": offer}),
        *({"headers": {"x-api-key": secret}}, {"headers": {"api-key": secret}}),
    ):
        async with server.connect(**handshake) as ws:
            await ws.send_json(chat("r", PROMPT, conversation_id="c"))
            await until_status(ws, "processing")
            await ws.send_json(cancel("r"))
            await to_end(ws, "r")
            await ws.send_json(chat("r", f"{PROMPT} other"))
            await ws.send_json(resume("r", 999))
            await ws.send_str(f'{{"action": "{PROMPT}"')
            await ws.send_json({"action": PROMPT, "request_id": "x", "payload": {"text": PROMPT}})
            await ws.send_json(chat("y", PROMPT, model=f"nobody/{PROMPT[:6]}"))
            for _ in range(5):
                heard.texts.append(str(await ws.receive_json(timeout=patience(20))))
    for body in (
        {"messages": [prompt], "stream": True},
        {"messages": [prompt]},
        {"messages": PROMPT, "stream": PROMPT},
        {"messages": [prompt], "model": 7},
    ):
        async with server.session.post(
            f"{server.v1}/chat/completions", json=body, headers=mine
        ) as response:
            text = await response.text()
            if response.status != 200:
                heard.texts.append(text)
    async with server.session.post(
        server.sse, json={"request_id": "s", "text": PROMPT}, headers=mine
    ) as response:
        await response.read()
    for data in (f'{{"messages": "{PROMPT}', f"[{PROMPT}]"):
        await heard.take(
            server,
            "POST",
            "/v1/chat/completions",
            data=data,
            headers={**mine, "Content-Type": "application/json"},
        )


async def turned_away(server: RunningServer, heard: Heard, session: str) -> None:
    """Every way not to be let in, with the canary as the key."""
    wrong = [
        {"Authorization": f"Bearer {KEY}"},
        {"Authorization": f"Basic {KEY}"},
        {"Authorization": KEY},
        {"x-api-key": KEY},
        {"api-key": KEY, **bearer("root")},
        {"Cookie": f"{COOKIE}={KEY}.1.{KEY}"},
        {"Cookie": f"{COOKIE}={session}x"},
        {"Sec-WebSocket-Protocol": f"aioserver, aioserver.key.{KEY}"},
        {"Sec-WebSocket-Protocol": f"aioserver.key.{KEY}"},
        {"Origin": "https://evil.example", **cookie(session)},
    ]
    for headers in wrong:
        for path in ("/v1/models", "/ws/chat", "/stats", "/session", "/"):
            await heard.take(server, "GET", path, headers=headers)
    for body in ({"key": KEY}, {"key": [KEY]}, {KEY: 1}, [KEY], KEY):
        await heard.take(server, "POST", "/session", json=body)
    async with Raw(server) as raw:
        await raw.send(
            f"GET / HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\x00\r\n\r\n".encode()
        )
        heard.texts.append(repr(await raw.to_the_end()))


@pytest.mark.parametrize(
    "behaviour",
    [
        Behaviour(ttft=0, interval=0.001),
        Behaviour(ttft=0, interval=0, cut_after=3),
        Behaviour(fail_rate=1.0, fail_status=500),
        Behaviour(fail_rate=1.0, fail_status=401),
    ],
)
async def test_a_key_and_a_prompt_are_heard_by_nobody_else(
    make_server: MakeServer, behaviour: Behaviour, logged: Callable[[], str]
) -> None:
    server = await make_server(
        behaviour, **keys_of("root", NAME), **{"logging.level": "INFO", "auth.allowed_hosts": []}
    )
    heard = Heard()
    secret = bearer(NAME)["Authorization"].removeprefix("Bearer ")
    session = await log_in(server, NAME)

    await tried_out(server, heard, session, secret)
    await turned_away(server, heard, session)
    await server.nothing_held()
    server.context.monitor.tick()
    async with server.session.get(f"{server.base}/events", headers=bearer("root")) as response:
        heard.texts.append((await response.content.readuntil(b"event: stats\n")).decode())
    for path in ("/", "/dashboard", "/health", "/ready", "/session", "/stats", "/metrics"):
        await heard.take(server, "GET", path, headers=bearer("root"))
    server.context.monitor.tick()
    await reload.apply_auth(server.owners, auth_of("root"))
    await heard.take(server, "GET", "/stats", headers={"Authorization": f"Bearer {secret}"})

    log, everything = logged(), "\n".join(heard.texts)
    digest = hashlib.sha256(secret.encode()).hexdigest()
    assert "request finished" in log
    assert "access refused" in log
    assert f'"caller":"{NAME}"' in log, "by its name it is known"
    for canary in (secret, secret.removeprefix("aio-" + NAME), session, digest):
        assert canary not in log
        assert canary not in everything
    for canary in (KEY, PROMPT):
        assert canary not in log.replace(NAME, "")
        assert canary not in everything.replace(NAME, "")


# After the last of them a provider is not asked again.
ECHOED = (b"500 Oops", b"404 Not Found", b"200 OK", b"401 Unauthorized")


async def test_a_process_shows_neither_key_nor_prompt_not_even_when_it_is_aborted(
    tmp_path: Path,
) -> None:
    """The provider's key as well, although this provider repeats all that it is sent in its
    answers.
    """
    statuses = iter(ECHOED)

    async def play(peer: Peer) -> None:
        request = await peer.request()
        assert KEY.encode() in request
        assert PROMPT.encode() in request
        head = b"HTTP/1.1 %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        echo = b'{"error": {"message": %b}}' % json.dumps(request.decode()).encode()
        await peer.send(head % (next(statuses), len(echo)) + echo)

    responses = ""
    async with (
        ScriptedProvider(play) as provider,
        serving(
            tmp_path / "c.yaml",
            provider.url,
            changes={"llm.providers.sim.api_key_env": "CANARY", "logging.format": "json"},
            environ={"CANARY": KEY},
        ) as process,
        aiohttp.ClientSession() as session,
    ):
        await process.ready()
        for status in ECHOED:
            body = {"messages": [{"role": "user", "content": PROMPT}]}
            url = f"{process.base}/v1/chat/completions"
            async with session.post(url, json=body) as response:
                # The caller's own fault passes as the provider has told it.
                if not status.startswith(b"404"):
                    responses += f"{response.headers} {await response.text()}"
        for path in ("/stats", "/metrics", "/health", "/", "/dashboard"):
            async with session.get(process.base + path) as response:
                responses += f"{response.headers} {await response.text()}"

        process.signal(signal.SIGABRT)
        await process.ended()

    assert next(statuses, None) is None, "all of it was asked for"
    assert "request finished" in process.log
    assert "Current thread" in process.log
    for canary in (KEY, PROMPT):
        assert canary not in process.log
        assert canary not in process.out
        assert canary not in responses
