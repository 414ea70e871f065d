"""Tokens at a whole server: where they come, what they may do, and when their time is over."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from aioserver.auth.callers import SKEW
from tests.support.chat import CHAT, chat, until_status
from tests.support.issuer import (
    AUDIENCE,
    SigningKey,
    claims,
    issuer_server,
    jwks,
    jwt_settings,
)
from tests.support.keys import COOKIE, bearer, code_of, cookie, keys_of
from tests.support.raw import CLOSE, TEXT, Raw, closing
from tests.support.simulator import Behaviour
from tests.support.waiting import patience, until, until_result

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from aiohttp import ClientWebSocketResponse

    from tests.support.issuer import IssuerServer
    from tests.support.server import MakeServer, RunningServer

KEY = SigningKey("EdDSA")
# An answer that is under way for long, and says little.
LONG = Behaviour(ttft=0, interval=2.0, tokens=1000)
LIMITS: dict[str, Any] = {
    "operator": {"admin": True},
    "staff": {"max_concurrent": 2, "tokens_per_day": 100_000},
    "default": {"max_concurrent": 1},
}


@asynccontextmanager
async def issued(
    make_server: MakeServer, *args: Any, jwt: dict[str, Any] | None = None, **changes: Any
) -> AsyncIterator[tuple[IssuerServer, RunningServer]]:
    """Run an issuer, and a server that takes its tokens."""
    async with issuer_server(KEY) as issuer:
        section = jwt_settings(issuer.url, limits=LIMITS, **(jwt or {}))
        server = await make_server(*args, **{"auth.jwt": section, **changes})
        yield issuer, server


def headers(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


async def ask(server: RunningServer, token: str, **fields: Any) -> tuple[int, str]:
    """The status of an answer, and the code of its error."""
    url = f"{server.v1}/chat/completions"
    async with server.session.post(url, json=CHAT | fields, headers=headers(token)) as response:
        return response.status, "" if response.status == 200 else await code_of(response)


async def status_of(server: RunningServer, who: dict[str, str], path: str = "/v1/models") -> int:
    async with server.session.get(server.base + path, headers=who) as response:
        return response.status


async def session_of(server: RunningServer, who: dict[str, str]) -> dict[str, str]:
    """Exchange a key or a token; return the headers of the session."""
    async with server.session.post(f"{server.base}/session", headers=who) as response:
        session = cookie(response.cookies[COOKIE].coded_value)
    server.session.cookie_jar.clear()
    return session


async def end_of(socket: ClientWebSocketResponse) -> tuple[int, str | None]:
    """Read *socket* to its end; return the code and the reason of its close."""
    while (message := await socket.receive()).type.name == "TEXT":
        pass
    return message.data, message.extra


async def test_a_token_comes_wherever_a_key_may(make_server: MakeServer) -> None:
    async with issued(make_server) as (issuer, server):
        token = issuer.token()
        for header in (
            {"Authorization": f"Bearer {token}"},
            {"x-api-key": token},
            {"api-key": token},
        ):
            assert await status_of(server, header) == 200
        async with server.connect(protocols=("aioserver", f"aioserver.key.{token}")) as ws:
            assert ws.protocol == "aioserver"
            await ws.send_json(chat("r"))
            await until_status(ws, "complete")
        async with server.session.post(f"{server.base}/session", json={"key": token}) as response:
            assert response.status == 200
            assert await response.json() == {
                "key_required": True,
                "name": "jwt:alice",
                "admin": False,
            }
            morsel = response.cookies[COOKIE]
        server.session.cookie_jar.clear()
        assert 3500 < int(morsel["max-age"]) <= 3600
        headers_of_session = cookie(morsel.coded_value)
        assert await status_of(server, headers_of_session) == 200
        async with server.session.get(
            f"{server.base}/session", headers=headers_of_session
        ) as response:
            assert (await response.json())["name"] == "jwt:alice"
        async with server.session.get(f"{server.v1}/models") as response:
            assert (response.status, await code_of(response)) == (401, "missing_api_key")


async def test_a_session_of_one_server_is_none_of_another_with_the_same_settings(
    make_server: MakeServer, tmp_path: Path
) -> None:
    """All that both have is public, or a word of a manual: the keys of providers, the settings."""
    key = tmp_path / "engine.key"
    key.write_text("EMPTY")
    changes = {**keys_of("root"), "llm.providers.sim.api_key_file": str(key)}
    async with issued(make_server, **changes) as (issuer, server):
        section = jwt_settings(issuer.url, limits=LIMITS)
        other = await make_server(**{"auth.jwt": section, **changes})
        for who in (headers(issuer.token(roles=["operator"])), bearer("root")):
            session = await session_of(server, who)
            assert await status_of(server, session, "/stats") == 200
            assert await status_of(other, session, "/stats") == 401


async def test_keys_and_tokens_stand_side_by_side_and_share_nothing(
    make_server: MakeServer,
) -> None:
    async with issued(make_server, **keys_of("web", "root")) as (issuer, server):
        token = issuer.token(sub="web")
        for who in (headers(token), bearer("web")):
            async with server.session.post(
                server.sse, json={"request_id": "mine", **CHAT}, headers=who
            ) as response:
                assert response.status == 200
                await response.read()
        assert server.simulator.stats().requests == 2
        both = {
            "Authorization": f"Bearer {token}",
            "x-api-key": bearer("web")["Authorization"][7:],
        }
        assert await status_of(server, both) == 401


async def test_a_role_says_what_a_token_may(make_server: MakeServer) -> None:
    async with issued(make_server, LONG) as (issuer, server):
        admin = issuer.token(sub="root", roles=["operator"])
        token = issuer.token()
        for who, status in ((token, 403), (admin, 200)):
            assert await status_of(server, headers(who), "/stats") == status
        async with server.connect(headers=headers(token)) as ws:
            await ws.send_json(chat("one"))
            await until_status(ws, "chunk")
            assert await ask(server, issuer.token(more=1)) == (429, "concurrency_exceeded")
            await ws.send_json({"action": "cancel", "request_id": "one"})
            await until_status(ws, "cancelled")
        staff = issuer.token(sub="bob", roles=["staff"])
        async with server.session.get(f"{server.base}/usage", headers=headers(staff)) as response:
            (budget,) = (await response.json())["budgets"]
        assert budget["caller"] == "jwt:bob"
        assert budget["tokens_per_day"]["limit"] == 100_000


async def test_a_refusal_names_its_rule_and_nothing_shows_the_token(
    make_server: MakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "aioserver")
    async with issued(make_server) as (issuer, server):
        expired = issuer.token(exp=time.time() - 40)
        async with server.session.get(f"{server.v1}/models", headers=headers(expired)) as response:
            assert response.status == 401
            assert response.headers["WWW-Authenticate"] == 'Bearer error="invalid_token"'
            error = (await response.json())["error"]
        assert error["code"] == "invalid_api_key"
        assert error["message"].startswith("the token is refused: expired 4")
        good = issuer.token(sub="somebody@example.com", roles=["staff"])
        assert (await ask(server, good))[0] == 200
        await until(lambda: any(r.getMessage() == "request finished" for r in caplog.records))
        lines = [str(vars(record)) for record in caplog.records]
        assert any("jwt:somebody@example.com" in line for line in lines)
        for token in (expired, good):
            for part in token.split("."):
                assert not any(part in line for line in lines)
        admin = issuer.token(sub="root", roles=["operator"])
        async with server.session.get(
            f"{server.base}/metrics", headers=headers(admin)
        ) as response:
            text = await response.text()
        assert 'caller="jwt:staff"' in text
        assert "somebody" not in text
        assert 'aioserver_auth_failures_total{reason="token"} 1.0' in text
        (request,) = server.simulator.requests
        assert good not in str(request)


async def test_a_new_key_of_the_issuer_is_fetched_and_a_made_up_one_refused(
    make_server: MakeServer,
) -> None:
    async with issued(make_server) as (issuer, server):
        assert (await ask(server, issuer.token()))[0] == 200
        new = SigningKey("ES256", "new")
        issuer.keys.append(new)

        assert (await ask(server, new.sign(claims())))[0] == 200
        assert issuer.asked == 2
        for number in range(3):
            evil = SigningKey("ES256", f"evil{number}").sign(claims())
            for _ in range(2):
                assert await ask(server, evil) == (401, "invalid_api_key")
            async with server.session.post(
                f"{server.base}/session", json={"key": evil}
            ) as response:
                assert response.status == 401
        assert issuer.asked == 2
        assert (await ask(server, issuer.token()))[0] == 200


async def test_an_issuer_that_is_away_costs_no_token_that_is_known_and_no_key(
    make_server: MakeServer,
) -> None:
    async with issuer_server(KEY) as issuer:
        issuer.status = 500
        section = jwt_settings(issuer.url)
        server = await make_server(**{"auth.jwt": section, **keys_of("web")})
        token = issuer.token()

        assert await ask(server, token) == (503, "auth_unavailable")
        assert await status_of(server, bearer("web")) == 200
        async with server.session.get(f"{server.base}/ready") as response:
            assert response.status == 200
        texts = [each["text"] for each in server.incidents() if each["kind"] == "jwt"]
        assert texts == [
            "the keys of the issuer cannot be fetched: status 500; no token can be checked"
        ]

        issuer.status = 200
        await until_result(
            partial(status_of, server, headers(token)), lambda status: status == 200, 60
        )
        issuer.status = 500
        assert (await ask(server, token))[0] == 200


async def test_a_redirect_is_not_followed(make_server: MakeServer) -> None:
    async with issued(make_server) as (issuer, server):
        issuer.status = 302
        assert (await ask(server, SigningKey("ES256", "x").sign(claims()))) == (
            503,
            "auth_unavailable",
        )
        assert issuer.asked == 2


async def test_keys_in_a_file_are_seen_when_they_change(
    make_server: MakeServer, tmp_path: Path
) -> None:
    file = tmp_path / "jwks.json"
    file.write_bytes(jwks(KEY))
    section = {"issuer": claims()["iss"], "audience": AUDIENCE, "jwks_file": str(file)}
    server = await make_server(**{"auth.jwt": section})
    assert (await ask(server, KEY.sign(claims())))[0] == 200
    new = SigningKey("EdDSA", "new")

    file.write_bytes(b"half")
    await server.owners.watched.look()
    assert (await ask(server, KEY.sign(claims())))[0] == 200
    file.write_bytes(jwks(KEY, new))
    await server.owners.watched.look()

    assert (await ask(server, new.sign(claims())))[0] == 200
    file.write_bytes(b"half")
    assert not await server.change(**{"auth.jwt": {**section, "jwks_file": str(tmp_path / "no")}})
    assert (await ask(server, new.sign(claims(more=1))))[0] == 200


@pytest.mark.parametrize("successor", ["another name", "the same name"])
async def test_a_withdrawn_key_ends_its_tokens_and_what_they_have_open(
    make_server: MakeServer, tmp_path: Path, successor: str
) -> None:
    old, other = SigningKey("ES256", "old"), SigningKey("EdDSA", "other")
    new = SigningKey("ES256", "old" if successor == "the same name" else "new")
    file = tmp_path / "jwks.json"
    file.write_bytes(jwks(old, other))
    section = {"issuer": claims()["iss"], "audience": AUDIENCE, "jwks_file": str(file)}
    server = await make_server(LONG, **{"auth.jwt": {**section, "limits": LIMITS}})
    # One person with two tokens: what one has open is not the other's.
    said = claims(roles=["operator"])
    withdrawn, good = headers(old.sign(said)), headers(other.sign(said))
    sessions = [await session_of(server, who) for who in (withdrawn, good)]

    async with AsyncExitStack() as stack:
        sockets, watchers = [], []
        for who in (withdrawn, sessions[0], good, sessions[1]):
            sockets.append(await stack.enter_async_context(server.connect(headers=who)))
            watching = server.session.get(f"{server.base}/events?interval=60", headers=who)
            watchers.append(await stack.enter_async_context(watching))
        await sockets[0].send_json(chat("running"))
        await until_status(sockets[0], "chunk")

        file.write_bytes(jwks(new, other))
        await server.owners.watched.look()

        for socket in sockets[:2]:
            assert await end_of(socket) == (1008, "key revoked")
        for watcher in watchers[:2]:
            assert "invalid_api_key" in await watcher.text()
        for socket in sockets[2:]:
            await socket.send_json({"action": "ping"})
            assert (await socket.receive_json())["status"] == "pong"
        assert not any(watcher.content.at_eof() for watcher in watchers[2:])
        # The answer is the person's.
        await sockets[2].send_json({"action": "cancel", "request_id": "running"})
        await until_status(sockets[2], "cancelled")
    for who, status in (
        (withdrawn, 401),
        (sessions[0], 401),
        (good, 200),
        (sessions[1], 200),
        (headers(new.sign(said)), 200),
    ):
        assert await status_of(server, who) == status
    async with server.session.post(f"{server.base}/session", headers=withdrawn) as response:
        assert response.status == 401


async def test_a_session_waits_for_the_keys_of_its_token_as_the_token_does(
    make_server: MakeServer,
) -> None:
    async with issued(make_server) as (issuer, server):
        # It has the first keys.
        assert await status_of(server, headers(issuer.token())) == 200
        new = SigningKey("ES256", "new")
        secret = server.owners.context.access.sessions.secret
        issuer.keys.append(new)
        section = jwt_settings(issuer.url, limits=LIMITS)
        # This one has fetched the newest key; the other one has not.
        sibling = await make_server(**{"auth.jwt": section})
        server.owners.context.access.sessions.use(secret)
        sibling.owners.context.access.sessions.use(secret)
        session = await session_of(sibling, headers(new.sign(claims())))

        async with server.session.get(f"{server.base}/session", headers=session) as response:
            assert (await response.json())["name"] == "jwt:alice"
        assert await status_of(server, session) == 200


async def test_a_reload_takes_other_tokens(make_server: MakeServer) -> None:
    async with issued(make_server, LONG, **keys_of("root")) as (issuer, server):
        token = issuer.token()
        async with Raw(server) as raw:
            await raw.upgrade(f"Authorization: Bearer {token}")
            await raw.send_json(chat("mine"))
            while (await raw.json_frame())["status"] != "chunk":
                pass
            section = jwt_settings(issuer.url, audience="other")

            assert await server.change(**{"auth.jwt": section, **keys_of("root")})

            texts = []
            while (frame := await raw.frame())[0] == TEXT:
                texts.append(json.loads(frame[1]))
            assert texts[-1]["chunk"]["code"] == "invalid_api_key"
            assert frame[0] == CLOSE
            assert closing(frame[1]) == (1008, b"key revoked")
            raw.close()
        assert (await ask(server, token))[0] == 401
        good = issuer.token(aud="other")
        async with server.session.get(f"{server.v1}/models", headers=headers(good)) as response:
            assert response.status == 200
        assert await server.change(**keys_of("root"))
        assert await status_of(server, headers(good)) == 401


# Expiry.


@pytest.mark.virtual_time
@pytest.mark.timeout(600)
async def test_an_idle_socket_closes_when_its_token_has_expired(make_server: MakeServer) -> None:
    async with issued(make_server) as (issuer, server):
        loop = asyncio.get_running_loop()
        token, began = issuer.token(exp=time.time() + 1), loop.time()
        for path in ("/ws/chat", "/v1/responses"):
            async with server.session.ws_connect(server.base + path, headers=headers(token)) as ws:
                while not (message := await ws.receive()).type.name.startswith("CLOS"):
                    assert json.loads(message.data)[
                        "status" if path == "/ws/chat" else "type"
                    ] == ("error")
                assert ws.close_code == 1008
                assert (message.data, message.extra) == (1008, "token expired")
            if path == "/ws/chat":
                assert SKEW <= loop.time() - began < SKEW + 10
            token = issuer.token(exp=time.time() + 1)


@pytest.mark.virtual_time
@pytest.mark.timeout(600)
async def test_a_socket_with_an_answer_takes_no_new_question_and_closes_after_it(
    make_server: MakeServer,
) -> None:
    answer = Behaviour(ttft=0, interval=2.0, tokens=22)
    async with issued(make_server, answer) as (issuer, server):
        loop = asyncio.get_running_loop()
        began = loop.time()
        staff = issuer.token(exp=time.time() + 1, roles=["staff"])
        async with server.connect(headers=headers(staff)) as ws:
            await ws.send_json(chat("first"))
            await until_status(ws, "chunk")
            # Pings are answered only while somebody reads.
            while loop.time() - began < 1 + SKEW + 1:
                await ws.receive_json(timeout=patience(30))
            await ws.send_json(chat("second"))
            frame = await ws.receive_json(timeout=patience(30))
            while frame["request_id"] != "second":
                frame = await ws.receive_json(timeout=patience(30))
            assert frame["chunk"]["code"] == "invalid_api_key"
            await until_status(ws, "complete")
            assert await end_of(ws) == (1008, "token expired")
        assert server.simulator.stats().requests == 1


@pytest.mark.virtual_time
@pytest.mark.timeout(600)
async def test_an_answer_that_does_not_end_has_a_minute(make_server: MakeServer) -> None:
    async with issued(make_server, LONG) as (issuer, server):
        loop = asyncio.get_running_loop()
        token, began = issuer.token(exp=time.time() + 1), loop.time()
        async with server.connect(headers=headers(token)) as ws:
            await ws.send_json(chat("r"))
            assert await end_of(ws) == (1008, "token expired")
        passed = loop.time() - began
        assert SKEW + 59 <= passed <= SKEW + 71
        # A fresh token reads on: the stream is the caller's.
        async with server.connect(headers=headers(issuer.token())) as ws:
            await ws.send_json({"action": "resume", "request_id": "r", "payload": {}})
            await until_status(ws, "chunk")
            await ws.send_json({"action": "cancel", "request_id": "r"})
            await until_status(ws, "cancelled")


@pytest.mark.virtual_time
@pytest.mark.timeout(600)
async def test_a_watcher_is_shown_out_when_its_token_has_expired(make_server: MakeServer) -> None:
    async with issued(make_server) as (issuer, server):
        token = issuer.token(exp=time.time() + 5, roles=["operator"])
        async with server.session.get(
            f"{server.base}/events?interval=60", headers=headers(token)
        ) as response:
            body = await response.text()
        assert body.rstrip().splitlines()[-1].startswith('data: {"error"') or "error" in body
        assert "the token has expired" in body


@pytest.mark.virtual_time
@pytest.mark.timeout(600)
async def test_an_http_answer_goes_on_after_its_token(make_server: MakeServer) -> None:
    async with issued(make_server, Behaviour(ttft=0, interval=2.0, tokens=20)) as (issuer, server):
        token = issuer.token(exp=time.time() + 5)
        async with server.session.post(
            f"{server.v1}/chat/completions", json=CHAT | {"stream": True}, headers=headers(token)
        ) as response:
            assert (await response.text()).rstrip().endswith("data: [DONE]")
