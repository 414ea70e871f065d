"""HTTP on every route, over raw sockets: limits, faults, keep-alive, ids, CORS."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import logging
import tracemalloc
from itertools import product
from typing import TYPE_CHECKING

import pytest

from aioserver.faces import intake, openai
from tests.support.chat import CHAT, STREAMED
from tests.support.logs import errors
from tests.support.raw import Answer, Raw
from tests.support.server import ENDLESS, UVICORN, MakeServer, places
from tests.support.simulator import Behaviour
from tests.support.smuggling import INVALID, LAST, LOGGED, VALID, accesses, answers_with_ids
from tests.support.waiting import patience, within

if TYPE_CHECKING:
    from tests.support.server import RunningServer


GET = b"GET /health HTTP/1.1\r\nHost: x\r\n"
POST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
BODY = json.dumps(CHAT).encode()


async def all_answers(raw: Raw) -> list[Answer]:
    """Every answer until the server closes."""
    answers = []
    while True:
        try:
            answers.append(await raw.answer())
        except (EOFError, ConnectionError):
            return answers


# Keep-alive.


@pytest.mark.virtual_time
@pytest.mark.parametrize(
    ("answers", "data"),
    [(1, b""), (0, b""), (0, b"GET /health HTTP/1.1\r\nHost: x\r\nX: ")],
    ids=["an answer", "nothing", "half a head"],
)
async def test_a_connection_is_closed_when_it_is_idle_after(
    make_server: MakeServer, answers: int, data: bytes
) -> None:
    server = await make_server(**{f"{UVICORN}.keepalive_timeout": 0.5})
    loop = asyncio.get_running_loop()
    async with Raw(server) as raw:
        for _ in range(answers):
            await raw.get("/health")
            await raw.answer()
        begun = loop.time()
        await raw.send(data)
        assert await raw.to_the_end() == b""

    assert loop.time() - begun > 0.3
    assert within(4.0, begun)


CLOSING: list[tuple[str, object]] = [
    ("/sse/chat", {"request_id": "r1", "text": "Hello"}),
    ("/sse/chat", {"request_id": "r1", "text": 7}),
    ("/sse/chat/kept", None),
    ("/sse/chat/unknown", None),
    ("/v1/chat/completions", STREAMED),
    ("/v1/chat/completions", CHAT),
    ("/v1/responses", {"input": "Hello", "stream": True}),
    ("/v1/models", None),
    ("/ws/chat", None),
    ("/health", None),
    ("/nowhere", None),
]


async def test_a_client_that_closes_after_a_response_is_told_the_same(
    server: RunningServer,
) -> None:
    for (path, body), line in product(CLOSING, ("Connection: close", "Connection: TE, Close")):
        async with Raw(server) as raw:
            await raw.ask_sse("kept", text="Hello")
            await raw.answer()
            await (raw.get(path, line) if body is None else raw.post(path, body, line))
            answer = await raw.answer()

            # A header `Upgrade` must be named, too.
            named = answer.headers["connection"].removeprefix("upgrade, ")
            assert named == "close", (path, line)
            assert await raw.to_the_end() == b"", (path, line)


async def test_a_watcher_and_a_busy_answer_close_as_they_are_asked(
    make_server: MakeServer,
) -> None:
    server = await make_server(ENDLESS, **places(1, 1, 0))
    async with Raw(server) as first, Raw(server) as second, Raw(server) as watcher:
        await first.ask_sse("r1", text="Hello")
        await first.head()
        await second.get("/sse/chat/r1", "Connection: close")
        busy = await second.answer()
        await watcher.get("/events", "Connection: close")
        head = await watcher.head()

        assert b"event: busy" in busy.body
        assert busy.headers["connection"] == "close"
        assert await second.to_the_end() == b""
        assert head.headers["connection"] == "close"

        async with server.session.delete(f"{server.sse}/r1") as response:
            assert response.status == 204


async def test_a_refused_upgrade_names_both_of_its_connection_options(
    server: RunningServer,
) -> None:
    lines = ("Upgrade: websocket", "Connection: Upgrade, close", "Sec-WebSocket-Version: 13")
    async with Raw(server) as raw:
        await raw.get("/v1/models", *lines)
        answer = await raw.answer()

    assert (answer.status, answer.headers["upgrade"]) == (426, "HTTP/1.1")
    assert answer.headers["connection"] == "upgrade, close"


@pytest.mark.virtual_time
async def test_a_dripping_head_does_not_prolong_its_connection(make_server: MakeServer) -> None:
    server = await make_server(**{f"{UVICORN}.keepalive_timeout": 0.5})
    loop = asyncio.get_running_loop()
    async with Raw(server) as raw:
        begun = loop.time()
        ended = asyncio.ensure_future(raw.to_the_end())
        await raw.send(b"GET /health HTTP/1.1\r\nX: ")
        while not ended.done() and loop.time() < begun + 5:
            with contextlib.suppress(ConnectionError):
                await raw.send(b"x")
            await asyncio.sleep(0.05)  # the drip
        assert await ended == b""

    assert within(4.0, begun)


async def test_an_answer_that_takes_longer_than_keepalive_timeout_is_given(
    make_server: MakeServer,
) -> None:
    server = await make_server(**{f"{UVICORN}.keepalive_timeout": 0.3})
    body = {**CHAT, "model": "fault-slow-20", "stream": True, "max_tokens": 40}
    async with Raw(server) as raw:
        await raw.post("/v1/chat/completions", body)
        answer = await raw.answer()

    assert answer.body.endswith(b"data: [DONE]\n\n")


async def test_the_last_answer_of_a_connection_says_so(make_server: MakeServer) -> None:
    server = await make_server(**{f"{UVICORN}.max_keepalive_requests": 3})
    async with Raw(server) as raw:
        for number in range(4):
            await raw.get("/health", f"X: {number}")
        answers = await all_answers(raw)

    assert [answer.status for answer in answers] == [200] * 3
    assert [answer.headers.get("connection") for answer in answers] == [None, None, "close"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/sse/chat", {"request_id": "r1", "text": "x"}),
        ("/v1/chat/completions", {**CHAT, "stream": True}),
        ("/v1/chat/completions", CHAT),
        ("/v1/chat/completions", []),
    ],
)
async def test_a_stream_can_be_the_last_answer(
    make_server: MakeServer, path: str, body: object
) -> None:
    server = await make_server(**{f"{UVICORN}.max_keepalive_requests": 1})
    async with Raw(server) as raw:
        await raw.post(path, body)
        answer = await raw.answer()
        assert await raw.to_the_end() == b""

    assert answer.headers["connection"] == "close"


# Limits.


async def test_a_long_request_line_is_414(make_server: MakeServer) -> None:
    server = await make_server(**{f"{UVICORN}.h11_max_request_line_size": 500})
    longest = 500 - len("GET  HTTP/1.1")
    for size, status in ((longest, 404), (longest + 1, 414), (2000, 414), (100_000, 414)):
        async with Raw(server) as raw:
            await raw.send(f"GET /{'x' * (size - 1)} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            answer = await raw.answer()
        assert answer.status == status, size
        if status == 414:
            assert answer.code == "uri_too_long"
            assert answer.headers["connection"] == "close"
            assert b"xxx" not in answer.body


async def test_many_headers_are_431(make_server: MakeServer) -> None:
    server = await make_server(**{f"{UVICORN}.h11_max_header_size": 4000})
    async with Raw(server) as raw:
        await raw.get("/health", *(f"X-{number}: {'x' * 900}" for number in range(4)))
        assert (await raw.answer()).status == 200
        await raw.get("/health", *(f"X-{number}: {'x' * 900}" for number in range(5)))
        answer = await raw.answer()
        assert await raw.to_the_end() == b""

    assert (answer.status, answer.code) == (431, "headers_too_large")
    assert answer.headers["connection"] == "close"
    assert b"xxx" not in answer.body


HUGE = b"X: " + b"x" * 20_000  # over h11_max_incomplete_event_size
MANY = b"".join(b"X-%d: x\r\n" % number for number in range(200))


@pytest.mark.parametrize(
    "fields",
    [HUGE + b"\r\n\r\n", HUGE, MANY + b"\r\n"],
    ids=["a huge field", "a huge field without an end", "too many fields"],
)
async def test_a_head_is_431_with(server: RunningServer, fields: bytes) -> None:
    async with Raw(server) as raw:
        await raw.send(GET + fields)
        answer = await raw.answer()

    assert (answer.status, answer.code) == (431, "headers_too_large")
    assert b"xxx" not in answer.body
    assert answer.headers["server"] == "aioserver"


async def test_the_limit_of_a_body_is_inclusive(make_server: MakeServer) -> None:
    server = await make_server(**{"chat.websocket.max_message_size": 1000})
    for size, status in ((1000, 200), (1001, 413)):
        for chunked in (False, True):
            body = BODY + b" " * (size - len(BODY))
            async with Raw(server) as raw:
                if chunked:
                    await raw.send(POST + b"Transfer-Encoding: chunked\r\n\r\n")
                    await raw.send(b"%x\r\n%b\r\n0\r\n\r\n" % (size, body))
                else:
                    await raw.post("/v1/chat/completions", body)
                answer = await raw.answer()
            assert answer.status == status, (size, chunked)
            if status == 413:
                assert answer.code == "request_too_large"
                assert answer.headers["connection"] == "close"


@pytest.mark.virtual_time
async def test_an_error_does_not_wait_for_a_body_that_is_not_read(server: RunningServer) -> None:
    loop = asyncio.get_running_loop()
    for path, length in (("/nowhere", 1000), ("/v1/chat/completions", 100_000_000)):
        async with Raw(server) as raw:
            begun = loop.time()
            head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            await raw.send(f"{head}Content-Length: {length}\r\n\r\nx".encode())
            answer = await raw.answer()
            assert within(0.9, begun)
            await raw.to_the_end()
            assert answer.status in {404, 413}
            assert within(5.0, begun)  # not aiohttp's 10 s


async def test_a_client_whose_large_body_is_refused_reads_the_refusal(
    make_server: MakeServer,
) -> None:
    server = await make_server(**{"chat.websocket.max_message_size": 1000})
    async with Raw(server) as raw:
        await raw.post("/v1/chat/completions", b"x" * 3_000_000)
        answer = await raw.answer()

    assert (answer.status, answer.code) == (413, "request_too_large")


async def test_a_client_that_expects_100_continue_is_told_to_go_on(server: RunningServer) -> None:
    async with Raw(server) as raw:
        await raw.send(POST + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(BODY))
        assert (await raw.until(b"\r\n\r\n")).startswith(b"HTTP/1.1 100 ")
        await raw.send(BODY)
        assert (await raw.answer()).status == 200


# Faults.


WRONG: list[tuple[str, str, int, str, str | None]] = [
    ("GET", "/nowhere", 404, "not_found", None),
    ("GET", "/assets/../../etc/passwd", 404, "not_found", None),
    ("GET", "/%00%ff", 404, "not_found", None),
    ("GET", "/v1/chat/completions", 405, "method_not_allowed", "POST"),
    ("PUT", "/sse/chat/r1", 405, "method_not_allowed", "DELETE, GET, HEAD"),
    ("POST", "/health", 405, "method_not_allowed", "GET, HEAD"),
    ("PATCH", "/health", 405, "method_not_allowed", "GET, HEAD"),
]


async def test_a_wrong_path_or_method_gets_our_error(server: RunningServer) -> None:
    async with Raw(server) as raw:
        for method, path, status, code, allow in WRONG:
            await raw.send(f"{method} {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            answer = await raw.answer()
            assert (answer.status, answer.code) == (status, code), path
            assert answer.headers.get("allow") == allow, path
            assert answer.headers["content-type"].startswith("application/json")
            assert answer.headers["server"] == "aioserver"
            assert answer.headers["x-request-id"]


@pytest.mark.parametrize("line", ["Content-Encoding: gzip", "Content-Encoding: identity"])
async def test_a_compressed_body_is_415(server: RunningServer, line: str) -> None:
    async with Raw(server) as raw:
        await raw.post("/v1/chat/completions", CHAT, line)
        answer = await raw.answer()

    assert (answer.status, answer.code) == (415, "unsupported_media_type")


@pytest.mark.parametrize(
    "path",
    [
        *("/v1/chat/completions", "/v1/responses", "/v1/messages", "/v1/audio/speech"),
        *("/v1/moderations", "/sse/chat"),
    ],
)
async def test_a_body_with_another_coding_than_chunked_is_501(
    server: RunningServer, path: str
) -> None:
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    for coding in ("gzip, chunked", "deflate,chunked"):
        async with Raw(server) as raw:
            await raw.send(
                f"{head}Transfer-Encoding: {coding}\r\n\r\n2\r\n{{}}\r\n0\r\n\r\n".encode()
            )
            answer = await raw.answer()

        assert (answer.status, answer.code) == (501, "unsupported_transfer_coding")
        assert answer.headers["connection"] == "close"
        # The SDKs repeat what fails with such a status.
        assert answer.headers["x-should-retry"] == "false"
    assert server.simulator.stats().requests == 0


async def test_a_body_of_another_type_is_415(server: RunningServer) -> None:
    for path in ("/sse/chat", "/v1/embeddings"):
        for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
            async with server.session.post(
                server.base + path,
                data=b"{}",
                headers={"Content-Type": kind} if kind else {},
                skip_auto_headers=("Content-Type",),
            ) as response:
                assert response.status == 415
                assert (await response.json())["error"]["code"] == "unsupported_media_type"


async def test_a_charset_behind_the_type_is_no_other_type(server: RunningServer) -> None:
    headers = {"Content-Type": "application/json; charset=utf-8"}
    async with server.session.post(
        server.v1 + "/chat/completions", data=BODY, headers=headers
    ) as response:
        assert response.status == 200


async def test_an_invalid_request_gets_one_answer_with_our_error(
    server: RunningServer, caplog: pytest.LogCaptureFixture
) -> None:
    for data in INVALID:
        async with Raw(server) as raw:
            await raw.send(data)
            answers = await asyncio.wait_for(all_answers(raw), patience(5))
        assert len(answers) == 1, data
        answer = answers[0]
        assert (answer.status, answer.code) == (400, "invalid_request"), data
        assert answer.headers["connection"] == "close"
        assert answer.headers["content-type"].startswith("application/json")
        assert answer.headers["server"] == "aioserver"
        assert answer.headers["x-request-id"]
        everything = str(answer)
        assert "S3CR3T" not in everything, data
        assert "aiohttp" not in everything.lower()
        assert "python" not in everything.lower()

    assert server.simulator.stats().requests == 0
    assert not errors(caplog.records)


async def test_a_body_is_never_taken_for_a_request(
    make_server: MakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    server = await make_server(**LOGGED)
    caplog.set_level(logging.INFO, "aioserver.access")
    for data, followed in VALID:
        caplog.clear()
        async with Raw(server) as raw:
            await raw.send(data + LAST)
            raw_answers = await asyncio.wait_for(raw.to_the_end(), patience(10))

        seen = [line.fields["path"] for line in accesses(caplog)]
        assert len(seen) == answers_with_ids(raw_answers), data
        assert seen.count("/smuggled") <= followed, data


async def test_many_pipelined_requests_get_one_answer_each(server: RunningServer) -> None:
    async with Raw(server) as raw:
        await raw.send((GET + b"\r\n") * 500)
        for _ in range(500):
            assert (await raw.answer()).status == 200


async def test_each_refused_request_is_counted_by_its_code(
    make_server: MakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake, "BODY_TIMEOUT", 0.1)
    server = await make_server()
    requests = {
        "invalid_request": GET + b": x\r\n\r\n",
        "uri_too_long": b"GET /" + b"x" * 9000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        "headers_too_large": GET + b"X: " + b"x" * 20_000 + b"\r\n\r\n",
        "request_too_large": POST + b"Content-Length: 100000000\r\n\r\n",
        "request_timeout": POST + b"Content-Length: 10\r\n\r\n{",
        "unsupported_media_type": POST + b"Content-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}",
        "invalid_json": POST + b"Content-Length: 1\r\n\r\n{",
        "not_found": b"GET /nowhere HTTP/1.1\r\nHost: x\r\n\r\n",
        "method_not_allowed": b"PUT /health HTTP/1.1\r\nHost: x\r\n\r\n",
        "expectation_failed": GET + b"Expect: a miracle\r\n\r\n",
        "upgrade_required": GET + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
    }
    for code, data in requests.items():
        async with Raw(server) as raw:
            await raw.send(data)
            assert (await raw.answer()).code == code

    assert await server.counted("bad_requests", "code") == {(code,): 1 for code in requests}
    assert server.simulator.stats().requests == 0
    await server.nothing_held()


async def test_a_bomb_of_gzip_is_refused_unread(server: RunningServer) -> None:
    bomb = gzip.compress(bytes(1 << 24))
    async with Raw(server) as raw:
        tracemalloc.start()
        await raw.post("/v1/chat/completions", bomb, "Content-Encoding: gzip")
        answer = await raw.answer()
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()

    assert answer.code == "unsupported_media_type"
    assert most < 1 << 20


async def test_an_unknown_expectation_is_417(server: RunningServer) -> None:
    async with Raw(server) as raw:
        await raw.get("/health", "Expect: a miracle")
        answer = await raw.answer()

    assert answer.status == 417
    assert "aiohttp" not in str(answer).lower()


# Ids.


async def test_a_harmless_request_id_is_kept(server: RunningServer) -> None:
    async with Raw(server) as raw:
        for request_id in ("abc", "A.b_c-9", "x" * 128):
            await raw.get("/health", f"X-Request-Id: {request_id}")
            assert (await raw.answer()).headers["x-request-id"] == request_id


async def test_any_other_request_id_is_replaced(server: RunningServer) -> None:
    seen = set()
    odd = ("", "a b", "x" * 129, "a\tb", "<script>", "é", "a,b", "a;b")
    async with Raw(server) as raw:
        for request_id in odd:
            await raw.get("/health", f"X-Request-Id: {request_id}")
            seen.add((await raw.answer()).headers["x-request-id"])

    assert len(seen) == len(odd)
    assert not seen & {*odd}


# CORS.


async def test_a_page_may_read_every_answer_errors_too(server: RunningServer) -> None:
    async with Raw(server) as raw:
        for path in ("/health", "/nowhere", "/sse/chat/nobody", "/v1/models"):
            await raw.get(path, "Origin: http://page.example")
            headers = (await raw.answer()).headers
            assert headers["access-control-allow-origin"] == "http://page.example"
            assert headers["access-control-allow-credentials"] == "true"
            assert headers["vary"] == "Origin"
            assert "x-request-id" in headers["access-control-expose-headers"]
        await raw.post("/sse/chat", {"request_id": "r1", "text": "x"}, "Origin: http://a.example")
        assert (await raw.answer()).headers["access-control-allow-origin"] == "http://a.example"
        await raw.get("/health")
        assert "access-control-allow-origin" not in (await raw.answer()).headers


@pytest.mark.parametrize("stream", [True, False])
async def test_a_page_may_read_the_headers_of_the_provider_and_a_location(
    make_server: MakeServer, stream: bool
) -> None:
    limits = (("X-RateLimit-Limit-Tokens", "9"), ("x-ratelimit-reset-requests", "1s"))
    server = await make_server(Behaviour(ttft=0, interval=0, headers=(*limits, ("x-other", "1"))))
    headers = {"Origin": "http://page.example"}
    async with server.session.post(
        f"{server.v1}/chat/completions", json={**CHAT, "stream": stream}, headers=headers
    ) as response:
        await response.read()
        limited = response.headers
    async with server.session.post(
        server.sse,
        json={"request_id": "r", **CHAT},
        headers={**headers, "Prefer": "respond-async"},
    ) as response:
        located = response.headers

    exposed = limited["Access-Control-Expose-Headers"].split(", ")
    assert {name.lower() for name, _ in limits} < set(exposed)
    assert len(exposed) == len(set(exposed))
    assert limited["x-ratelimit-limit-tokens"] == "9"
    assert "x-other" not in exposed
    assert located["Location"] == "/sse/chat/r"
    assert "location" in located["Access-Control-Expose-Headers"].split(", ")


async def test_a_preflight_is_answered(server: RunningServer) -> None:
    async with Raw(server) as raw:
        await raw.send(
            b"OPTIONS /v1/chat/completions HTTP/1.1\r\nHost: x\r\nOrigin: http://a.example\r\n"
            b"Access-Control-Request-Method: POST\r\n"
            b"Access-Control-Request-Headers: authorization, content-type\r\n\r\n"
        )
        answer = await raw.answer()

    assert (answer.status, answer.body) == (200, b"")
    assert answer.headers["access-control-allow-origin"] == "http://a.example"
    assert answer.headers["access-control-allow-headers"] == "authorization, content-type"
    assert "POST" in answer.headers["access-control-allow-methods"]
    assert answer.headers["access-control-max-age"] == "600"


async def test_a_foreign_page_is_given_no_permission(make_server: MakeServer) -> None:
    server = await make_server(**{"chat.websocket.allow_origins": ["http://good.example"]})
    async with Raw(server) as raw:
        await raw.get("/health", "Origin: http://evil.example")
        answer = await raw.answer()
        assert answer.status == 200
        assert "access-control-allow-origin" not in answer.headers
        assert answer.headers["vary"] == "Origin"
        await raw.get("/health", "Origin: http://good.example")
        headers = (await raw.answer()).headers
        assert headers["access-control-allow-origin"] == "http://good.example"


# Bugs.


async def test_a_bug_in_a_handler_is_500_without_details(
    make_server: MakeServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_args: object) -> None:
        raise RuntimeError("S3CR3T")

    monkeypatch.setattr(openai, "read_model_body", broken)
    server = await make_server()
    async with Raw(server) as raw:
        await raw.post("/v1/chat/completions", CHAT)
        answer = await raw.answer()

    assert (answer.status, answer.code) == (500, "internal_error")
    assert "S3CR3T" not in str(answer)
    assert answer.headers["x-request-id"]
    # A tick may have found the incident already.
    (line,) = (record for record in caplog.records if record.name != "aioserver.monitoring")
    assert line.levelname == "ERROR"
    assert line.exc_info
    assert vars(line)["fields"] == {"request_id": answer.headers["x-request-id"]}
    assert await server.counted("errors") == {(): 1}
    await server.nothing_held()
