"""Everything else below `/v1`: what passes, for whom, and how it comes through."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from typing import TYPE_CHECKING, Any

import pytest
from yarl import URL

from aioserver.faces import intake
from tests.support.chat import CHAT
from tests.support.keys import bearer, cookie, keys_of, log_in
from tests.support.logs import errors, fields_of
from tests.support.passing import (
    ANSWER,
    Account,
    Passed,
    answer,
    read_body,
    read_head,
    scripted,
    settings_for,
    silent,
)
from tests.support.raw import SMALL, Raw
from tests.support.scripted_provider import (
    EVENT_STREAM,
    LAST_CHUNK,
    ScriptedProvider,
    answering,
    chunk,
    closing,
    stalling,
)
from tests.support.server import (
    NOWHERE,
    SIM_HTTP_CLIENT,
    MakeServer,
    RunningServer,
    places,
    provider_entry,
)
from tests.support.smuggling import INVALID, VALID
from tests.support.waiting import patience, ticks, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from tests.support.scripted_provider import Peer

QUESTIONS = (
    *("audio/speech", "audio/transcriptions", "audio/translations", "images/edits"),
    *("images/generations", "images/variations", "moderations", "rerank"),
    *("responses/compact", "responses/input_tokens"),
)
ACCOUNT = (
    *("files", "files/file-1/content", "batches", "uploads/u_1/parts", "vector_stores/vs_1/files"),
    *("fine_tuning/checkpoints/ft:gpt-4o:org::id/permissions", "conversations/c_1/items"),
    *("assistants", "threads/t_1/runs", "evals", "containers", "videos", "audio/voices"),
    *(
        "chat/completions/id",
        "Files",
        "AUDIO/speech",
        "moderations/x",
        "unheard-of",
        "models/ft:x",
    ),
)
AUDIO, AS_JSON = {"Content-Type": "audio/mpeg"}, {"Content-Type": "application/json"}
# As much of an upload as the provider's place is taken for.
FIRST = b"x" * intake.FIRST_BYTES
UPLOADING = b"POST /v1/audio/x HTTP/1.1\r\nHost: x\r\nContent-Type: a/b\r\n"
UPLOAD = UPLOADING + b"Content-Length: %d\r\n\r\n"


def key_line(caller: str) -> bytes:
    """The line of a request's head that has the key of *caller*."""
    return f"Authorization: {bearer(caller)['Authorization']}\r\n".encode()


@pytest.fixture
async def account() -> AsyncIterator[Account]:
    async with Account() as provider:
        yield provider


async def send(
    server: RunningServer, method: str, path: str, caller: str = "", **kwargs: Any
) -> tuple[int, bytes, dict[str, str]]:
    """Make a request with the key of *caller*; returns the status, the body, and the headers in
    lower case.
    """
    headers = {**kwargs.pop("headers", {}), **(bearer(caller) if caller else {})}
    url = URL(f"{server.v1}/{path}", encoded=True)
    request = server.session.request(method, url, headers=headers, **kwargs)
    async with request as response:
        shown = {name.lower(): value for name, value in response.headers.items()}
        return response.status, await response.read(), shown


async def refusal(
    server: RunningServer, method: str, path: str, caller: str = "", **kwargs: Any
) -> tuple[int, str]:
    """Make a request that fails; returns the status and the code of the error."""
    status, content, _ = await send(server, method, path, caller, **kwargs)
    return status, json.loads(content)["error"]["code"]


async def pieces(body: bytes, size: int) -> AsyncIterator[bytes]:
    """A body that comes in pieces, so that its length is not known."""
    for start in range(0, len(body), size):
        yield body[start : start + size]


# Who may pass.


async def test_a_question_by_itself_passes_for_every_key(
    make_server: MakeServer, account: Account
) -> None:
    changes = settings_for(account, **{"llm.providers.sim.account_paths": False})
    server = await make_server(**changes, **keys_of("web"))
    for path in QUESTIONS:
        body = json.dumps({"input": path}).encode()
        status, content, headers = await send(
            server, "POST", f"{path}?a=1&b=%2F..", "web", data=body, headers=AS_JSON
        )

        assert (status, content) == (200, ANSWER)
        assert headers["x-aioserver-provider"] == "sim"
        assert headers["x-aioserver-attempts"] == "1"
        passed = account.passed.pop()
        assert passed.target == f"/v1/{path}?a=1&b=%2F.."
        assert (passed.method, passed.body) == ("POST", body)
        assert passed.headers["authorization"] == "Bearer provider-key"


async def test_the_providers_account_is_open_to_admins_alone(
    make_server: MakeServer, account: Account
) -> None:
    server = await make_server(**settings_for(account), **keys_of("web", "root"))
    for path in ACCOUNT:
        assert await refusal(server, "POST", path, "web", json={}) == (403, "permission_denied"), (
            path
        )
        assert (await send(server, "DELETE", path))[0] == 401, path
        assert account.passed == [], path
        assert (await send(server, "DELETE", path, "root"))[:2] == (200, ANSWER), path
        passed = account.passed.pop()
        assert (passed.method, passed.target) == ("DELETE", f"/v1/{path}")
    assert server.context.metrics.auth_failures["not_admin"].value == len(ACCOUNT)


async def test_the_providers_account_is_closed_unless_it_is_configured(
    make_server: MakeServer, account: Account
) -> None:
    other = provider_entry(NOWHERE) | {"account_paths": True}
    closed = settings_for(account, **{"llm.providers.sim.account_paths": False})
    server = await make_server(**closed, **keys_of("web", "root"))
    for path in ACCOUNT:
        for caller in ("web", "root"):
            assert await refusal(server, "POST", path, caller, json={}) == (404, "not_found"), path
    server = await make_server(**closed, **keys_of("root"), **{"llm.providers.other": other})
    for path in ACCOUNT:
        status, content, _ = await send(server, "POST", path, "root", json={})

        assert (status, json.loads(content)["error"]["code"]) == (404, "not_found"), path
        assert "llm.providers.sim.account_paths" in json.loads(content)["error"]["message"]
    assert account.passed == []


async def test_a_path_that_a_provider_opens_passes_for_every_key(
    make_server: MakeServer, account: Account
) -> None:
    opened = {
        "llm.providers.sim.account_paths": False,
        "llm.providers.sim.pass_paths": ["decisions", "videos", "fine_tuning/jobs"],
    }
    server = await make_server(**settings_for(account, **opened), **keys_of("web", "root"))
    for method in ("GET", "POST", "DELETE"):
        for path in (
            "decisions",
            "videos",
            "videos/v_1/content?variant=video",
            "fine_tuning/jobs/j",
        ):
            assert (await send(server, method, path))[0] == 401
            assert (await send(server, method, path, "web"))[:2] == (200, ANSWER), path
            passed = account.passed.pop()
            assert (passed.method, passed.target) == (method, f"/v1/{path}")
            assert passed.headers["authorization"] == "Bearer provider-key"
    # Nothing but these paths, by no other spelling, and nothing beside them.
    for path in (
        *("files", "fine_tuning", "fine_tuning/alpha", "decisions2", "video", "Videos"),
        *("videos/../files", "videos/%2e%2e/files", "videos//x", "organization/videos"),
        *("audio/voices", "chat/completions/c_1", "responses/r/x"),
    ):
        for caller in ("web", "root"):
            assert await refusal(server, "GET", path, caller) == (404, "not_found"), path
    assert account.passed == []


async def test_an_open_path_leads_to_a_provider_that_has_opened_it(
    make_server: MakeServer, account: Account
) -> None:
    async with Account() as second:
        server = await make_server(
            **settings_for(account),
            **keys_of("web", "root"),
            **{
                "llm.providers.plain": provider_entry(NOWHERE),
                "llm.providers.other": provider_entry(second.url, "m")
                | {"pass_paths": ["videos"]},
                "llm.models": {"group": ["other", "sim"]},
            },
        )

        async def asked(caller: str, **kwargs: Any) -> tuple[int, str]:
            status, content, shown = await send(server, "POST", "videos", caller, **kwargs)
            error = json.loads(content).get("error", {}).get("code", "")
            return status, error or shown["x-aioserver-provider"]

        # The active provider has not opened it, to those who are no admins.
        for caller in ("web", "root"):
            assert await asked(caller, data=b"form") == (200, "other")
            assert await asked(caller, json={}) == (200, "other")
            assert await asked(caller, json={"model": "other/sora"}) == (200, "other")
        for model, name in (("sim/sora", "sim"), ("plain/sora", "plain")):
            header = {"x-aioserver-provider": name}
            refused = (403, "permission_denied") if name == "sim" else (404, "not_found")
            assert await asked("web", json={"model": model}) == refused
            assert await asked("web", data=b"form", headers=header) == refused
        assert await asked("root", json={"model": "sim/sora"}) == (200, "sim")
        # Its objects belong to one provider.
        assert await asked("web", json={"model": "group"}) == (400, "invalid_request")
        assert [passed.body for passed in second.passed[-1:]] == [b'{"model": "sora"}']
    assert len(account.passed) == 1


async def test_a_key_for_some_models_gets_of_an_open_path_what_names_one_of_them(
    make_server: MakeServer, account: Account
) -> None:
    opened = {"llm.providers.sim.pass_paths": ["decisions", "videos"]}
    keys = keys_of("web", models=["sim/luna"])
    server = await make_server(**settings_for(account, **opened), **keys)

    async def asked(method: str, path: str, **kwargs: Any) -> int:
        return (await send(server, method, path, "web", **kwargs))[0]

    assert await asked("POST", "decisions", json={"model": "sim/luna"}) == 200
    for method, path, kwargs in (
        ("POST", "decisions", {"json": {"model": "sim/other"}}),
        ("POST", "decisions", {"json": {}}),
        ("POST", "decisions", {"data": b"form"}),
        ("GET", "decisions/d_1", {}),
        # Objects may name any model.
        ("POST", "videos", {"json": {"model": "sim/luna"}}),
        ("GET", "videos/v_1", {}),
    ):
        assert await asked(method, path, **kwargs) == 404, path
    assert len(account.passed) == 1


async def test_a_reload_opens_a_path_and_closes_it(
    make_server: MakeServer, account: Account
) -> None:
    server = await make_server(**settings_for(account), **{"auth.open": True})
    for paths, status in (([], 403), (["videos"], 200), ([], 403)):
        changes = settings_for(account, **{"llm.providers.sim.pass_paths": paths})
        assert await server.change(**changes, **{"auth.open": True})
        assert (await send(server, "GET", "videos"))[0] == status


async def test_without_keys_this_machine_is_admin_and_an_open_server_has_none(
    make_server: MakeServer, account: Account
) -> None:
    server = await make_server(**settings_for(account))
    assert (await send(server, "GET", "files"))[:2] == (200, ANSWER)
    server = await make_server(**settings_for(account), **{"auth.open": True})

    assert await refusal(server, "GET", "files") == (403, "permission_denied")
    assert (await send(server, "POST", "moderations", json={}))[0] == 200
    assert len(account.passed) == 2


async def test_an_admin_may_come_with_a_session_of_our_own_page_alone(
    make_server: MakeServer, account: Account
) -> None:
    server = await make_server(
        **settings_for(account), **keys_of("root"), **{"chat.websocket.allow_origins": []}
    )
    session = cookie(await log_in(server, "root"))
    foreign = {**session, "Origin": "https://evil.example"}

    assert (await send(server, "DELETE", "files/f", headers=foreign))[0] == 403
    assert (await send(server, "GET", "files/f", headers=foreign))[0] == 403
    assert (await send(server, "DELETE", "files/f", headers=session))[0] == 200
    assert len(account.passed) == 1
    assert "cookie" not in account.passed[0].headers


# Spellings.

TAILS = (
    *("files/../organization/users", "audio/../organization/users", "audio/speech/..", ".."),
    *("audio/./speech", "audio//speech", "/audio/speech", "//organization", "audio/speech/"),
    *("%2e%2e/organization/users", "audio/%2e%2e/files", "audio/%2E./files", "audio/.%2e/files"),
    *("audio%2fspeech", "audio/%2Forganization", "organization%2fusers", "audio%5c..%5cfiles"),
    *(
        "audio\\..\\files",
        "audio/speech\\",
        "audio;/../files",
        "audio/speech;x=1",
        ";audio/speech",
    ),
    *("%66iles", "audio/%73peech", "%6frganization", "organi%7aation/users", "audio/speech%00"),
    *(
        "audio/%c0%ae%c0%ae/files",
        "audio/%e2%80%ae",
        "audio/\xff",
        "audio/%ef%bc%8e",
        "%252e%252e",
    ),
    *("audio/speech%20", "audio/speech%0d%0aX:%20y", "audio/spe%61ch", "audio/speech%3fx", "%3f"),
    *("organization", "organization/admin_api_keys", "ORGANIZATION/users", "Organizations"),
    *(
        "responses/resp_1/cancel/x",
        "responses/",
        "Responses/x",
        "responses/compact/input_items",
        "messages/batches",
        "Messages/x",
    ),
    *("v1/files", "V1/files", "audio/speech#x", "audio/speech?x#y", "files?#/../x", "*", "files*"),
    *("audio/...", "audio/..speech", "files/a..b", "files/..;/x", "audio/speech|", "audio/<x>"),
)


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
async def test_no_spelling_of_a_path_passes_that_must_not(
    make_server: MakeServer, account: Account, method: str
) -> None:
    server = await make_server(**settings_for(account), **keys_of("root"))
    key = f"Authorization: {bearer('root')['Authorization']}"
    prefixes = ("/v1/", "http://x/v1/", "//x/v1/", "/%76%31/", "/v1%2f", "/V1/", "/./v1/", "\\v1/")
    for prefix in prefixes:
        for tail in TAILS if prefix in prefixes[:2] else (*TAILS[:4], "audio/speech", "files"):
            async with Raw(server) as raw:
                line = f"{method} {prefix}{tail} HTTP/1.1\r\nHost: x\r\n{key}\r\nContent-Length: 0\r\n"
                await raw.send(f"{line}Connection: close\r\n\r\n".encode("latin-1"))
                status = (await raw.answer()).status
            assert status in {400, 404, 405}, (prefix, tail)
            assert account.passed == [], (prefix, tail)
    # The simulator of this server was not asked either.
    assert account.accepted == 0


async def test_a_target_in_absolute_form_is_its_path(
    make_server: MakeServer, account: Account
) -> None:
    server = await make_server(**settings_for(account))
    async with Raw(server) as raw:
        await raw.send(b"GET http://x/v1/files?limit=2 HTTP/1.1\r\nHost: x\r\n\r\n")

        assert (await raw.answer()).body == ANSWER
    assert account.passed[0].target == "/v1/files?limit=2"
    assert account.passed[0].headers["host"] == f"127.0.0.1:{account.port}"


@pytest.mark.parametrize(
    "query", ["?", "?/../../organization", "?a=b?c", "?%00", "?a=%0d%0aX:y", "?;"]
)
async def test_a_query_goes_on_as_it_came_and_stays_a_query(
    make_server: MakeServer, account: Account, query: str
) -> None:
    server = await make_server(**settings_for(account))
    async with Raw(server) as raw:
        await raw.get(f"/v1/files{query}")

        assert (await raw.answer()).status == 200
    assert account.passed[0].target == f"/v1/files{query if len(query) > 1 else ''}"


async def test_methods_that_openai_does_not_have_do_not_pass(
    make_server: MakeServer, account: Account
) -> None:
    server = await make_server(**settings_for(account))
    for path in ("files", "audio/speech", "unheard-of"):
        for method in ("PUT", "PATCH", "HEAD", "OPTIONS", "TRACE", "CONNECT", "PROPFIND", "QUERY"):
            async with Raw(server) as raw:
                await raw.send(
                    f"{method} /v1/{path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()
                )
                assert (await raw.head()).status in {400, 404, 405}, (method, path)
    for method in ("GET", "DELETE"):
        status, _, headers = await send(server, method, "audio/speech")
        assert (status, headers["allow"]) == (405, "POST")
        assert await refusal(server, method, "files", data=b"x") == (400, "invalid_request")
    assert account.accepted == 0


async def test_an_upgrade_is_refused_where_there_is_no_websocket(
    make_server: MakeServer, account: Account
) -> None:
    server = await make_server(**settings_for(account))
    async with Raw(server) as raw:
        await raw.get("/v1/realtime", "Upgrade: websocket", "Connection: Upgrade")

        assert (await raw.answer()).status == 426
    assert account.accepted == 0


@pytest.mark.parametrize("path", [b"/v1/audio/speech", b"/v1/files"])
async def test_nothing_is_smuggled_to_the_provider(
    make_server: MakeServer, account: Account, path: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    server = await make_server(**settings_for(account))
    passed = [(data, 1) for data, _ in VALID if data.startswith(b"POST /v1")]
    for data, most in [*((data, 0) for data in INVALID), *passed]:
        account.passed.clear()
        async with Raw(server) as raw:
            await raw.send(data.replace(b"/v1/chat/completions", path))
            raw.half_close()
            await asyncio.wait_for(raw.to_the_end(), patience(20))
        await server.nothing_held()
        assert len(account.passed) <= most, data
        assert all(request.target == path.decode() for request in account.passed)
        assert all("smuggled" not in str(request.headers) for request in account.passed)
    assert not errors(caplog.records)


# Which provider is asked.


async def test_a_model_or_a_header_names_the_provider(
    make_server: MakeServer, account: Account
) -> None:
    async with Account() as second:
        other = provider_entry(second.url, "other-model")
        server = await make_server(**settings_for(account), **{"llm.providers.other": other})

        async def asked(body: bytes, **headers: str) -> tuple[str, bytes]:
            headers = AS_JSON | headers
            status, _, shown = await send(
                server, "POST", "moderations", data=body, headers=headers
            )
            assert status == 200
            provider = shown["x-aioserver-provider"]
            return provider, (account if provider == "sim" else second).passed.pop().body

        for body in (b'{"input": 1}', b'{"model":null}', b'{ "model" : "omni" }', b""):
            assert await asked(body) == ("sim", body)
            assert await asked(body, **{"x-aioserver-provider": "other"}) == ("other", body)
        assert await asked(b'{"model":"other/x/y"}') == ("other", b'{"model":"x/y"}')
        assert await asked(b'{"model":"other"}') == ("other", b'{"model":"other-model"}')
        assert await asked(b'{"model":"other/x"}', **{"x-aioserver-provider": "sim"}) == (
            "sim",
            b'{"model":"other/x"}',
        )
        # Only JSON is read.
        form = b'--b\r\ncontent-disposition: form-data; name="model"\r\n\r\nother/x\r\n--b--\r\n'
        multipart = {"Content-Type": "multipart/form-data; boundary=b"}
        assert await asked(form, **multipart) == ("sim", form)
        assert account.passed == second.passed == []

        assert await refusal(
            server, "POST", "moderations", json={}, headers={"x-aioserver-provider": "none"}
        ) == (404, "model_not_found")
        for body in (b"{", b"[]", b'{"model": 3}'):
            got = await send(server, "POST", "moderations", data=body, headers=AS_JSON)
            assert got[0] == 400
    assert account.passed == second.passed == []


@pytest.mark.parametrize("chunked", [False, True])
async def test_json_above_max_message_size_goes_on_unread(
    make_server: MakeServer, account: Account, *, chunked: bool
) -> None:
    server = await make_server(
        **settings_for(account), **{"chat.websocket.max_message_size": 1000}
    )
    body = b'{"model":"none/such","input":"' + b"x" * 300_000 + b'"}'
    data = pieces(body, 50_000) if chunked else body
    status, content, _ = await send(server, "POST", "moderations", data=data, headers=AS_JSON)

    assert (status, content) == (200, ANSWER)
    assert account.passed[0].body == body


# What comes through.


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_passes_byte_for_byte_with_the_framing_that_it_has(
    make_server: MakeServer, account: Account, *, chunked: bool
) -> None:
    server = await make_server(**settings_for(account))
    for size in (0, 1, 65_535, 65_536, 65_537, 700_000):
        body = (bytes(range(256)) * (size // 256 + 1))[:size]
        data = pieces(body, 10_000) if chunked else body
        status, content, _ = await send(server, "POST", "audio/x", data=data, headers=AUDIO)

        assert (status, content) == (200, ANSWER)
        passed = account.passed.pop()
        assert passed.body == body
        if chunked:
            assert passed.headers["transfer-encoding"] == "chunked"
        else:
            assert passed.headers["content-length"] == str(size)
        if size:
            assert passed.headers["content-type"] == "audio/mpeg"


HIDDEN = (
    *("Authorization: Bearer secret", "Cookie: a=b; aioserver_session=x", "Keep-Alive: 5"),
    *("Proxy-Authorization: x", "TE: trailers", "X-Forwarded-For: 1.2.3.4", "Forwarded: for=x"),
    *("Proxy-Connection: keep-alive", "Connection: x-named, keep-alive", "X-Named: y"),
    *("Idempotency-Key: k", "X-Other: z", "OpenAI-Organization: o", "X-Aioserver-Provider: sim"),
    *("Range: bytes=0-1", "If-None-Match: x", "Origin: http://localhost:8000", "Referer: y"),
)


async def test_no_header_of_a_client_passes_but_those_of_its_body_and_those_that_are_named(
    make_server: MakeServer, account: Account
) -> None:
    server = await make_server(
        **settings_for(account),
        **{
            "llm.providers.sim.pass_headers": ["openai-beta", "x-named"],
            "llm.providers.sim.headers": {"X-Ours": "1", "Content-Type": "text/plain"},
        },
    )
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    lines = (*HIDDEN, "OpenAI-Beta: assistants=v2", f"traceparent: {trace}", "Accept: audio/*")
    async with Raw(server) as raw:
        head = "".join(f"{line}\r\n" for line in lines)
        await raw.send(
            f"POST /v1/audio/speech HTTP/1.1\r\nHost: x\r\n{head}"
            "Content-Type: audio/x; a=b\r\nContent-Length: 2\r\n\r\nhi".encode()
        )
        assert (await raw.answer()).status == 200

    headers = account.passed[0].headers
    assert headers.pop("user-agent").startswith("aioserver/")
    assert headers.pop("x-aioserver-hop")
    assert headers == {
        "host": f"127.0.0.1:{account.port}",
        "accept": "audio/*",
        "accept-encoding": "identity",
        "authorization": "Bearer provider-key",
        "content-type": "audio/x; a=b",
        "content-length": "2",
        "openai-beta": "assistants=v2",
        "traceparent": trace,
        "x-ours": "1",
    }


async def test_no_header_of_the_provider_passes_but_harmless_ones(make_server: MakeServer) -> None:
    lines = (
        *("Set-Cookie: a=b", "Location: http://elsewhere", "Server: nginx", "X-Secret: s"),
        *("Keep-Alive: timeout=5", "Proxy-Authenticate: x", "Upgrade: h2c", "Trailer: x"),
        *("Connection: keep-alive, x-secret", "Access-Control-Allow-Origin: *", "Refresh: 0"),
        *("Content-Security-Policy: none", "openai-organization: org", "x-request-id: theirs"),
        *("Content-Type: text/html; charset=utf-8", "Content-Disposition: attachment"),
        *("x-ratelimit-remaining-requests: 7", "openai-processing-ms: 3"),
    )
    async with Account(lambda _passed: answer(b"<p>", 200, *lines)) as account:
        server = await make_server(**settings_for(account))

        status, content, headers = await send(server, "GET", "files/f/content")

    assert (status, content) == (200, b"<p>")
    assert headers.pop("x-request-id") != "theirs"
    del headers["date"]
    assert headers == {
        "server": "aioserver",
        "content-type": "text/html; charset=utf-8",
        "content-disposition": "attachment",
        "content-length": "3",
        "content-security-policy": "default-src 'none'; sandbox",
        "x-content-type-options": "nosniff",
        "cache-control": "no-store",
        "x-aioserver-provider": "sim",
        "x-aioserver-attempts": "1",
        "x-ratelimit-remaining-requests": "7",
        "openai-processing-ms": "3",
    }


async def test_a_success_passes_with_its_own_status(make_server: MakeServer) -> None:
    def reply(_passed: Passed) -> bytes:
        return b"HTTP/1.1 204 X\r\n\r\n" if status == 204 else answer(b"{}", status)

    async with Account(reply) as account:
        server = await make_server(**settings_for(account))
        async with Raw(server) as raw:
            for status in (200, 201, 202, 204, 206) * 2:
                await raw.post("/v1/batches/b/cancel", b"")
                got = await raw.answer()
                assert got.status == status
                assert got.body == (b"" if status == 204 else b"{}")
        assert account.accepted == 1


@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_an_answer_without_a_length_ends_with_its_connection_or_its_chunks(
    make_server: MakeServer, version: str
) -> None:
    script = closing((b"HTTP/1.1 200 X\r\nContent-Type: text/plain\r\n\r\nab", b"cd"))
    async with scripted(script) as provider:
        server = await make_server(**settings_for(provider))
        async with Raw(server) as raw:
            await raw.post("/v1/audio/speech", b"{}", version=version)
            got = await raw.answer()

    assert (got.status, got.body) == (200, b"abcd")
    assert ("transfer-encoding" in got.headers) == (version == "1.1")


async def test_events_come_as_soon_as_the_provider_has_sent_them(make_server: MakeServer) -> None:
    heard = asyncio.Event()
    event = b'data: {"type":"image_generation.partial_image"}\n\n'

    script = answering((EVENT_STREAM, chunk(event), heard, LAST_CHUNK))
    async with scripted(script) as provider:
        server = await make_server(**settings_for(provider))
        async with server.session.post(f"{server.v1}/images/generations", json={}) as response:
            assert response.headers["X-Accel-Buffering"] == "no"
            assert await response.content.readuntil(b"\n\n") == event
            heard.set()
            assert await response.read() == b""


# Faults.


@pytest.mark.parametrize(
    ("status", "shown", "code"),
    [
        *((301, 502, "provider_bad_response"), (302, 502, "provider_bad_response")),
        *((307, 502, "provider_bad_response"), (304, 502, "provider_bad_response")),
        *((400, 400, "theirs"), (404, 404, "theirs"), (409, 409, "theirs"), (422, 422, "theirs")),
        *((413, 413, "theirs"), (401, 502, "provider_auth_error")),
        *((402, 502, "provider_auth_error"), (403, 502, "provider_auth_error")),
        *((429, 429, "provider_rate_limited"), (500, 502, "provider_error")),
        *((503, 502, "provider_error"), (529, 502, "provider_error")),
    ],
)
async def test_a_fault_means_what_it_means_elsewhere_and_is_not_tried_again(
    make_server: MakeServer, status: int, shown: int, code: str
) -> None:
    lines = ("Location: http://127.0.0.1:9/", "Retry-After: 7", "Set-Cookie: a=b")
    body = b"" if status == 304 else b'{"error":{"message":"secret?","code":"theirs"}}'
    async with Account(lambda _passed: answer(body, status, *lines)) as account:
        server = await make_server(
            **settings_for(account),
            **{
                f"{SIM_HTTP_CLIENT}.max_retries": 3,
                "llm.fallbacks": ["other"],
                "llm.providers.other": provider_entry(NOWHERE),
            },
        )

        seen, content, headers = await send(
            server, "POST", "audio/speech", data=b"x", headers=AUDIO
        )

        assert seen == shown
        assert json.loads(content)["error"]["code"] == code
        assert (content == body) == (code == "theirs")
        assert "secret?" not in content.decode() or code == "theirs"
        assert len(account.passed) == 1
        assert not {"location", "set-cookie"} & headers.keys()
        assert headers["x-aioserver-provider"] == "sim"
        if status == 429:
            assert 7 <= int(headers["retry-after"]) <= 9
            # The provider is left alone for as long.
            assert server.provider.stats().pace.cooling > 5


@pytest.mark.parametrize("status", [301, 401, 403, 503])
async def test_a_path_that_a_provider_refuses_costs_no_other_path(
    make_server: MakeServer, status: int
) -> None:
    """A key without the right to make pictures, or an engine without that path, still chats."""
    chat = json.dumps({"choices": [{"message": {"content": "Hi"}}]}).encode()

    def reply(passed: Passed) -> bytes:
        return answer(chat) if "chat" in passed.target else answer(b"{}", status)

    async with Account(reply) as account:
        server = await make_server(**settings_for(account))
        for _ in range(40):
            assert (await send(server, "POST", "images/generations", json={}))[0] == 502
        assert server.provider.health.state == "well"
        assert not server.provider.health.flagged
        status, content, _ = await send(server, "POST", "chat/completions", json=CHAT)

        assert (status, content) == (200, chat)
        # None was left out meanwhile.
        assert len(account.passed) == 41


async def test_a_page_of_a_proxy_is_not_shown(make_server: MakeServer) -> None:
    async with Account(lambda _p: answer(b"<html>", 404, "Content-Type: text/html")) as account:
        server = await make_server(**settings_for(account))

        status, content, headers = await send(server, "GET", "files/none")

    assert (status, json.loads(content)["error"]["code"]) == (404, "invalid_request")
    assert headers["content-type"] == "application/json"


async def test_a_provider_without_the_path_says_so_itself(server: RunningServer) -> None:
    status, content, headers = await send(server, "POST", "images/generations", json={})

    assert status == 404
    assert "error" in json.loads(content)
    assert headers["x-aioserver-provider"] == "sim"


@pytest.mark.parametrize("chunked", [False, True])
async def test_an_answer_that_breaks_off_cuts_the_clients_connection(
    make_server: MakeServer, *, chunked: bool
) -> None:
    framing = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: 10"
    head = b"HTTP/1.1 200 X\r\n" + framing + b"\r\n\r\n"
    async with scripted(closing((head, chunk(b"hello") if chunked else b"hello"))) as provider:
        server = await make_server(**settings_for(provider))
        async with Raw(server) as raw:
            await raw.get("/v1/files/f/content")
            assert (await raw.head()).status == 200
            rest = await raw.to_the_end()

    assert rest in (b"5\r\nhello\r\n", b"hello", b"")
    counts = await server.counted("requests", "face", "code", "outcome")
    assert counts["other", "provider_disconnected", "provider_error"] == 1


async def test_a_compressed_answer_is_refused_and_a_compressed_body_too(
    make_server: MakeServer,
) -> None:
    async with Account(lambda _p: answer(b"zip", 200, "Content-Encoding: gzip")) as account:
        server = await make_server(**settings_for(account))

        assert (await send(server, "GET", "files"))[0] == 502
        headers = {"Content-Encoding": "gzip", **AUDIO}
        assert (await send(server, "POST", "audio/x", data=b"zip", headers=headers))[0] == 415
        assert len(account.passed) == 1


# Slow sides.


async def test_a_client_that_stops_sending_gets_408_and_frees_the_provider(
    make_server: MakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake, "BODY_SILENCE", 0.2)
    async with silent() as (provider, left):
        server = await make_server(**settings_for(provider))
        async with Raw(server) as raw:
            await raw.send(UPLOAD % 1_000_000 + FIRST)
            got = await raw.answer()
            assert (got.status, got.code) == (408, "request_timeout")
            assert got.headers["connection"] == "close"
        await left.wait()
        await server.nothing_held()
    counts = await server.counted("requests", "face", "code", "outcome")
    assert counts == {("other", "request_timeout", "client_error"): 1}
    assert server.provider.health.state == "well"


async def test_a_provider_that_takes_nothing_is_a_write_timeout(make_server: MakeServer) -> None:
    stop = asyncio.Event()
    async with scripted(stalling(stop)) as provider:
        server = await make_server(
            **settings_for(provider), **{f"{SIM_HTTP_CLIENT}.write_timeout": 0.4}
        )
        # More than kernels ever buffer.
        body = io.BytesIO(bytes(48 << 20))
        status, content, _ = await send(server, "POST", "audio/x", data=body, headers=AUDIO)
        stop.set()

    assert (status, json.loads(content)["error"]["code"]) == (504, "write_timeout")


async def test_a_provider_that_says_nothing_is_a_read_timeout(make_server: MakeServer) -> None:
    async with scripted(answering(b"")) as provider:
        server = await make_server(
            **settings_for(provider), **{f"{SIM_HTTP_CLIENT}.read_timeout": 0.3}
        )
        status, content, headers = await send(
            server, "POST", "audio/x", data=b"hello", headers=AUDIO
        )

    assert (status, json.loads(content)["error"]["code"]) == (504, "read_timeout")
    assert headers["x-should-retry"] == "false"


@pytest.mark.parametrize("status", [200, 413])
async def test_an_answer_may_come_before_the_body_is_whole(
    make_server: MakeServer, status: int
) -> None:
    body = b'{"error":{"message":"too large"}}'
    closed = asyncio.Event()

    async def play(peer: Peer) -> None:
        await read_head(peer)
        await peer.send(answer(body, status))
        await peer.left()
        closed.set()

    async with scripted(play) as provider:
        server = await make_server(**settings_for(provider))
        async with Raw(server) as raw:
            await raw.send(UPLOAD % 100_000_000 + FIRST)
            got = await raw.answer()
            assert (got.status, got.body) == (status, body)
            # A connection on which a request is unfinished is never used again.
            await closed.wait()
            await server.nothing_held()
            assert server.provider.stats().pool.open == 0


@pytest.mark.parametrize("whole", [False, True])
async def test_a_client_that_leaves_takes_its_provider_with_it(
    make_server: MakeServer, *, whole: bool
) -> None:
    begun, left = asyncio.Event(), asyncio.Event()

    async def play(peer: Peer) -> None:
        passed = await read_head(peer)
        if whole:
            await read_body(peer, passed)
            await peer.send(b"HTTP/1.1 200 X\r\nContent-Length: 10\r\n\r\nhello")
        begun.set()
        await peer.left()
        left.set()

    async with scripted(play) as provider:
        server = await make_server(**settings_for(provider))
        async with Raw(server) as raw:
            await raw.send(UPLOAD % 10 + b"0123456789" if whole else UPLOAD % 1_000_000 + FIRST)
            await begun.wait()
            if whole:
                await raw.head()
        await left.wait()
        await server.nothing_held()
    counts = await server.counted("requests", "face", "outcome")
    assert counts == {("other", "client_left"): 1}


async def test_a_body_that_is_no_http_ends_its_request(
    make_server: MakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake, "BODY_SILENCE", 0.5)
    async with silent() as (provider, left):
        server = await make_server(**settings_for(provider))
        async with Raw(server) as raw:
            await raw.send(UPLOADING + b"Transfer-Encoding: chunked\r\n\r\n" + chunk(FIRST))
            await until(lambda: provider.accepted == 1)
            await raw.send(b"zz\r\nnonsense\r\n0\r\n\r\nGET /v1/files HTTP/1.1\r\nHost: x\r\n\r\n")
            assert (await raw.answer()).status in {400, 408}
        await left.wait()
        await server.nothing_held()
        assert provider.accepted == 1


# 100 Continue.

EXPECTING = b"POST /v1/audio/x HTTP/1.1\r\nHost: x\r\nContent-Type: %b\r\nExpect: 100-continue\r\n"


@pytest.mark.parametrize("content_type", [b"audio/mpeg", b"application/json"])
async def test_a_body_is_asked_for_when_it_can_be_taken(
    make_server: MakeServer, account: Account, content_type: bytes
) -> None:
    server = await make_server(**settings_for(account))
    async with Raw(server) as raw:
        await raw.send(EXPECTING % content_type + b"Content-Length: 2\r\n\r\n")
        assert await raw.until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        await raw.send(b"{}")
        assert (await raw.answer()).body == ANSWER
        # The connection goes on.
        await raw.get("/v1/files")
        assert (await raw.answer()).status == 200

    assert account.passed[0].body == b"{}"
    assert "expect" not in account.passed[0].headers


async def test_a_body_that_is_not_wanted_is_not_asked_for(
    make_server: MakeServer, account: Account
) -> None:
    server = await make_server(**settings_for(account), **keys_of("web"))
    key = key_line("web")
    requests = {
        401: EXPECTING % b"audio/mpeg",
        403: EXPECTING.replace(b"audio/x", b"files") % b"audio/mpeg" + key,
        404: EXPECTING.replace(b"audio/x", b"organization") % b"audio/mpeg" + key,
        417: EXPECTING.replace(b"100-continue", b"a miracle") % b"audio/mpeg" + key,
    }
    for status, head in requests.items():
        async with Raw(server) as raw:
            await raw.send(head + b"Content-Length: 2\r\n\r\n")
            got = await raw.answer()
            assert got.status == status
            assert got.headers["connection"] == "close"
    assert account.accepted == 0


async def test_an_upload_that_waits_for_a_place_has_been_asked_for(
    make_server: MakeServer,
) -> None:
    free = asyncio.Event()

    async def play(peer: Peer) -> None:
        for _ in range(2):
            passed = await read_head(peer)
            size = await read_body(peer, passed)
            await free.wait()
            await peer.send(answer(b"%d" % size))

    async with scripted(play) as provider:
        server = await make_server(
            **settings_for(provider), **{f"{SIM_HTTP_CLIENT}.concurrent_requests": 1}
        )
        async with Raw(server) as first, Raw(server) as second:
            await first.post("/v1/audio/x", b"{}")
            await until(lambda: server.held()["sim places"] == 1)
            await second.send(EXPECTING % b"a/b" + b"Content-Length: 1000000\r\n\r\n")
            assert await second.until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            await second.send(b"x" * 300_000)
            await until(lambda: server.held()["sim waiting"] == 1)
            free.set()
            assert (await first.answer()).body == b"2"
            await second.send(b"x" * 700_000)
            assert (await second.answer()).body == b"1000000"


@pytest.mark.parametrize("size", [1, 200_000])
async def test_the_first_part_of_an_upload_holds_no_place(
    make_server: MakeServer, account: Account, size: int
) -> None:
    server = await make_server(**settings_for(account))
    async with Raw(server) as raw:
        await raw.send(UPLOAD % (2 * size) + b"x" * size)
        await until(lambda: server.held()["places"] == 1)
        await ticks(100)

        assert server.held()["sim busy"] == 0
        await raw.send(b"x" * size)
        assert (await raw.answer()).status == 200
    await server.nothing_held()


ALONE = {f"{SIM_HTTP_CLIENT}.concurrent_requests": 1, f"{SIM_HTTP_CLIENT}.queue_timeout": 60.0}


# It waits for ten seconds.
@pytest.mark.virtual_time
async def test_an_upload_that_is_too_slow_gives_way_to_a_request_that_waits(
    make_server: MakeServer, account: Account
) -> None:
    server = await make_server(**settings_for(account), **ALONE)
    async with Raw(server) as slow, Raw(server) as other:
        await slow.send(UPLOAD % 1_000_000 + b"x" * 500_000)
        await until(lambda: server.held()["sim busy"] == 1)
        await other.post("/v1/audio/x", b"{}")

        assert (await other.answer()).status == 200
        got = await slow.answer()
        assert (got.status, got.code) == (408, "request_timeout")
        assert "others wait" in got.json()["error"]["message"]
    await server.nothing_held()


@pytest.mark.virtual_time
@pytest.mark.timeout(300)
async def test_an_upload_that_waits_for_nobody_may_take_its_time(
    make_server: MakeServer, account: Account
) -> None:
    server = await make_server(**settings_for(account), **ALONE)
    async with Raw(server) as slow:
        await slow.send(UPLOAD % 500_000 + b"x" * 490_000)
        for _ in range(10):
            await asyncio.sleep(12.0)
            await slow.send(b"x" * 1000)

        assert (await slow.answer()).status == 200


@pytest.mark.virtual_time
async def test_a_download_that_is_too_slow_gives_way_to_a_request_that_waits(
    make_server: MakeServer,
) -> None:
    turns = iter(range(2))

    async def play(peer: Peer) -> None:
        await read_body(peer, await read_head(peer))
        if next(turns):
            await peer.send(answer())
            await peer.left()
            return
        await peer.send(b"HTTP/1.1 200 X\r\nContent-Length: 1000000000\r\n\r\n")
        while True:
            peer.write(bytes(1 << 16))
            await peer.writer.drain()

    async with scripted(play) as provider:
        server = await make_server(
            **settings_for(provider), **ALONE, **{"chat.streams.send_timeout": 60.0}
        )
        async with Raw(server, receive_buffer=SMALL) as slow, Raw(server) as other:
            await slow.get("/v1/files/f/content")
            await slow.head()
            await other.get("/v1/files/g")

            assert (await other.answer()).status == 200
            assert server.context.metrics.slow_clients.value == 1
            assert len(await slow.to_the_end()) < 10_000_000
        await server.nothing_held()


# Connections.


async def dying(peer: Peer) -> None:
    """Answer one request, and close with the second."""
    await read_body(peer, await read_head(peer))
    await peer.send(answer())
    await read_head(peer)
    peer.abort()


@pytest.mark.parametrize(
    ("method", "size", "status"),
    [("GET", 0, 200), ("DELETE", 0, 200), ("POST", 10, 200), ("POST", 8 << 20, 502)],
)
async def test_a_dead_connection_costs_nothing_unless_too_much_was_sent_on_it(
    make_server: MakeServer, method: str, size: int, status: int
) -> None:
    async with ScriptedProvider(dying) as provider:
        server = await make_server(**settings_for(provider))
        assert (await send(server, "GET", "files"))[0] == 200

        data = io.BytesIO(b"x" * size) if size else None
        seen, content, _ = await send(server, method, "files", data=data, headers=AUDIO)

        assert seen == status
        if status != 200:
            assert json.loads(content)["error"]["code"] == "provider_disconnected"
        assert provider.accepted == (2 if status == 200 else 1)


# Limits, and what operators see.


async def test_the_limits_of_a_key_hold(make_server: MakeServer) -> None:
    free = asyncio.Event()
    async with scripted(answering((free, answer()))) as provider:
        server = await make_server(**settings_for(provider), **keys_of("web", max_concurrent=1))
        first = asyncio.ensure_future(send(server, "POST", "moderations", "web", json={}))
        await until(lambda: server.held()["sim places"] == 1)
        refused = await refusal(server, "POST", "moderations", "web", json={})
        assert refused == (429, "concurrency_exceeded")
        free.set()
        assert (await first)[0] == 200


async def test_tokens_are_not_estimated_where_nothing_says_how_many_there_are(
    make_server: MakeServer,
) -> None:
    all_there = asyncio.Barrier(3)

    async def play(peer: Peer) -> None:
        await read_body(peer, await read_head(peer))
        await all_there.wait()
        await peer.send(answer())

    async with scripted(play) as provider:
        paced = {f"{SIM_HTTP_CLIENT}.tokens_per_minute": 10, "llm.providers.sim.max_tokens": 10}
        server = await make_server(**settings_for(provider), **paced)
        requests = [send(server, "POST", "audio/x", data=b"x", headers=AUDIO) for _ in range(3)]

        assert [status for status, _, _ in await asyncio.gather(*requests)] == [200, 200, 200]


SPENT = {"input_tokens": 30, "output_tokens": 12, "total_tokens": 42}
LONG = "x" * 300_000
# What a provider may answer, and the tokens that its client has spent by it.
REPORTS: dict[str, tuple[str, int]] = {
    "at the end": (json.dumps({"output": LONG, "usage": SPENT}), 42),
    "at the beginning": (json.dumps({"usage": SPENT, "results": [LONG]}), 42),
    "alone": (json.dumps({"usage": {"prompt_tokens": 9, "total_tokens": 9}}), 9),
    "the total alone": (json.dumps({"results": [], "usage": {"total_tokens": 8}}, indent=1), 8),
    "the prompt alone": (json.dumps({"usage": {"prompt_tokens": 7}}), 7),
    "of no tokens": (json.dumps({"usage": {"type": "duration", "seconds": 9}}), 0),
    "in what was asked": (json.dumps({"results": [{"document": {"usage": SPENT}}]}), 0),
    "in a text": (json.dumps({"text": json.dumps({"usage": SPENT})}), 0),
    "behind such a text": (
        json.dumps({"text": '{"usage":{"input_tokens":1}', "usage": SPENT}),
        42,
    ),
    "of another type": (json.dumps({"usage": [SPENT]}), 0),
    "cut": (json.dumps({"usage": SPENT})[:-5], 0),
    "in events": (f"data: {LONG}\n\ndata: {json.dumps({'usage': SPENT})}\n\n: end\n", 42),
}


@pytest.mark.parametrize("path", ["responses/compact", "rerank", "images/generations"])
async def test_the_usage_that_an_answer_reports_counts(make_server: MakeServer, path: str) -> None:
    report = ""

    async def play(peer: Peer) -> None:
        await read_body(peer, await read_head(peer))
        body, kind = REPORTS[report][0], "application/json"
        if report == "in events":
            kind = "text/event-stream"
        whole = answer(body.encode(), 200, f"Content-Type: {kind}")
        # In pieces that begin and end anywhere.
        for start in range(0, len(whole), step := 1 + len(whole) // 7):
            await peer.send(whole[start : start + step])

    async with scripted(play) as provider:
        budget = keys_of("web", tokens_per_minute=10**6, tokens_per_day=10**6)
        server = await make_server(**settings_for(provider), **budget)

        quota, before = server.context.access.keys.quotas()["web"], 0
        for report, (body, tokens) in REPORTS.items():
            status, said, _ = await send(server, "POST", path, "web", json={"input": "Hello"})

            assert (status, said) == (200, body.encode()), report
            await until(lambda: quota.running == 0)
            day = quota.budgets()["tokens_per_day"]
            assert day.used == server.context.usage.sums.today("web")
            used, before = day.used - before, day.used
            if path == "images/generations" or tokens > 7:
                assert used == tokens, report
            else:
                assert used > 0, "a model has read it: what is not reported is estimated"


@pytest.mark.parametrize(("path", "least"), [("responses/compact", 1000), ("rerank", 100)])
async def test_what_a_model_has_read_counts_also_where_its_client_does_not_wait(
    make_server: MakeServer, path: str, least: int
) -> None:
    body = json.dumps({"results": [], "usage": SPENT}).encode()
    async with scripted(answering(answer(body)[:-9])) as provider:
        budget = keys_of("web", tokens_per_minute=10**6, tokens_per_day=10**6)
        server = await make_server(**settings_for(provider), **budget)
        quota = server.context.access.keys.quotas()["web"]
        url, asked = f"{server.v1}/{path}", {"input": "word " * 100}

        async with server.session.post(url, json=asked, headers=bearer("web")) as response:
            assert response.status == 200
            response.close()
        await until(lambda: quota.running == 0)

        assert quota.budgets()["tokens_per_day"].used >= least


async def test_a_full_server_refuses(make_server: MakeServer) -> None:
    async with silent() as (provider, _):
        server = await make_server(**settings_for(provider), **places(1, 1, 0))
        async with Raw(server) as raw:
            await raw.send(EXPECTING % b"a/b" + b"Content-Length: 10\r\n\r\n")
            await raw.until(b"\r\n\r\n")
            status, content, headers = await send(server, "POST", "moderations", json={})

    assert (status, json.loads(content)["error"]["code"]) == (503, "server_at_capacity")
    assert int(headers["retry-after"]) >= 1


async def revoke_the_key(server: RunningServer, changes: dict[str, Any]) -> None:
    assert await server.change(**changes, **keys_of("root"))


async def stop(server: RunningServer, _changes: dict[str, Any]) -> None:
    await server.context.gateway.close()


@pytest.mark.parametrize(
    ("end", "expected"),
    [(revoke_the_key, (401, "invalid_api_key")), (stop, (503, "server_shutdown"))],
    ids=["a revoked key", "a stop of the server"],
)
async def test_an_upload_under_way_is_ended_by(
    make_server: MakeServer,
    end: Callable[[RunningServer, dict[str, Any]], Awaitable[None]],
    expected: tuple[int, str],
) -> None:
    async with silent() as (provider, left):
        changes = settings_for(provider)
        server = await make_server(**changes, **keys_of("web", "root"))
        async with Raw(server) as raw:
            head = EXPECTING % b"a/b" + key_line("web")
            await raw.send(head + b"Content-Length: 1000000\r\n\r\n")
            await raw.until(b"\r\n\r\n")
            await raw.send(FIRST)
            await until(lambda: provider.accepted == 1)
            await end(server, changes)
            got = await raw.answer()
            assert (got.status, got.code) == expected
        await left.wait()


async def test_operators_see_one_face_and_what_was_asked(
    make_server: MakeServer, account: Account, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "aioserver.requests")
    server = await make_server(**settings_for(account), **{"logging.level": "INFO"})

    await send(server, "GET", "files/file-1/content?secret=1")
    await send(server, "POST", "moderations", json={"model": "omni"})
    async with server.session.post(f"{server.v1}/chat/completions", json=CHAT) as response:
        await response.read()

    counts = await server.counted("requests", "face")
    assert counts["other",] == 2
    lines = [(line.get("target"), line["model"]) for line in fields_of(caplog)]
    assert lines[:2] == [("GET files/file-1/content", ""), ("POST moderations", "omni")]
    assert "secret" not in caplog.text
