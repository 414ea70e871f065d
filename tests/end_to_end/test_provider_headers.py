"""The headers of a provider's response that clients may see, on faults as on answers."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.chat import CHAT
from tests.support.scripted_provider import EVENT_STREAM, LAST_CHUNK, Peer, ScriptedProvider, chunk
from tests.support.server import NOWHERE, SIM_HTTP_CLIENT, MakeServer, provider_entry

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.support.server import RunningServer


VISIBLE = {
    "x-ratelimit-remaining-requests": "7",
    "x-ratelimit-limit-tokens": "1000",
    "openai-processing-ms": "12",
}
HIDDEN = {"set-cookie": "a=b", "openai-organization": "org-1", "x-secret": "s", "server": "nginx"}
HEADERS = VISIBLE | HIDDEN
ORIGIN = "https://page.example"
QUESTIONS: dict[str, dict[str, Any]] = {
    "chat/completions": CHAT,
    "completions": {"prompt": "Hello"},
    "embeddings": {"input": "Hello"},
    "responses": {"input": "Hello"},
}


def lines(headers: dict[str, str]) -> bytes:
    return "".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode()


def refusing(
    status: int, headers: dict[str, str], *more: bytes
) -> Callable[[Peer], Awaitable[None]]:
    """A provider that answers its first request with *status*, and the next ones with *more*."""
    body = b'{"error":{"message":"no"}}'
    head = b"HTTP/1.1 %d No\r\nContent-Type: application/json\r\nContent-Length: %d\r\n%b\r\n"
    answers = [head % (status, len(body), lines(headers)) + body, *more]

    async def play(peer: Peer) -> None:
        while True:
            await peer.request()
            await peer.send(answers.pop(0) if len(answers) > 1 else answers[0])

    return play


async def refused(server: RunningServer, path: str, body: Any, **headers: str) -> dict[str, str]:
    """The headers of the refusal, their names in lower case."""
    question = server.session.post(
        f"{server.v1}/{path}", json=body, headers={"Origin": ORIGIN, **headers}
    )
    async with question as response:
        assert response.status >= 400
        await response.read()
        return {name.lower(): value for name, value in response.headers.items()}


def check_visible(headers: dict[str, str], visible: dict[str, str] = VISIBLE) -> None:
    """Check that *visible*, and nothing else of the provider's, is there for a page to read."""
    exposed = headers["access-control-expose-headers"].split(", ")
    for name, value in visible.items():
        assert headers[name] == value
        assert name in exposed
    assert headers["server"] == "aioserver"
    assert not (HIDDEN.keys() - {"server"}) & headers.keys()
    passed = {name for name in headers if name.startswith("x-ratelimit-")}
    assert passed == {name for name in visible if name.startswith("x-ratelimit-")}


@pytest.mark.parametrize(
    ("path", "status"),
    [
        *product(["chat/completions"], [302, 400, 401, 429, 503]),
        *((path, 422) for path in [*QUESTIONS][1:]),
    ],
)
async def test_a_fault_has_the_headers_of_its_response(
    make_server: MakeServer, path: str, status: int
) -> None:
    async with ScriptedProvider(refusing(status, HEADERS)) as provider:
        server = await make_server(**{"llm.providers.sim.base_url": provider.url})

        headers = await refused(server, path, QUESTIONS[path])

    check_visible(headers)


@pytest.mark.parametrize("kept", [False, True], ids=["", "kept"])
@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
async def test_a_fault_that_is_kept_has_them_again(
    make_server: MakeServer, streamed: bool, kept: bool
) -> None:
    key = {"Idempotency-Key": "k"} if kept else {}
    async with ScriptedProvider(refusing(422, HEADERS)) as provider:
        server = await make_server(**{"llm.providers.sim.base_url": provider.url})
        body = {**CHAT, "stream": streamed}

        check_visible(await refused(server, "chat/completions", body, **key))
        check_visible(await refused(server, "chat/completions", body, **key))


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 3\r\n%b\r\nno!",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: br\r\nContent-Length: 2\r\n%b\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: 20\r\n%b\r\n{",
        EVENT_STREAM.removesuffix(b"\r\n")
        + b"%b\r\n"
        + chunk(b'data: {"error":{"message":"no","code":500}}\n\n')
        + LAST_CHUNK,
    ],
    ids=["not JSON", "compressed", "cut", "an error event"],
)
async def test_a_head_that_promised_an_answer_counts_as_well(
    make_server: MakeServer, answer: bytes
) -> None:
    async def play(peer: Peer) -> None:
        await peer.request()
        await peer.send(answer % lines(HEADERS))

    async with ScriptedProvider(play) as provider:
        server = await make_server(**{"llm.providers.sim.base_url": provider.url})

        headers = await refused(server, "chat/completions", {**CHAT, "stream": True})

    check_visible(headers)


async def test_the_headers_are_those_of_the_last_try(make_server: MakeServer) -> None:
    second = {"x-ratelimit-remaining-requests": "6"}
    last = b"HTTP/1.1 400 No\r\nContent-Length: 2\r\n%b\r\n{}" % lines(second)
    async with ScriptedProvider(refusing(500, HEADERS, last)) as provider:
        changes = {f"{SIM_HTTP_CLIENT}.max_retries": 1, f"{SIM_HTTP_CLIENT}.backoff_factor": 0.01}
        server = await make_server(**{"llm.providers.sim.base_url": provider.url}, **changes)

        headers = await refused(server, "chat/completions", CHAT)

    assert headers["x-aioserver-attempts"] == "2"
    check_visible(headers, second)


@pytest.mark.parametrize(("status", "left"), [(503, "2"), (429, "7")])
async def test_of_several_providers_those_of_the_fault_that_is_told(
    make_server: MakeServer, status: int, left: str
) -> None:
    # A 429 is told only if all say so: the fault of the first provider is told instead.
    others = {"x-ratelimit-remaining-requests": "2"}
    async with (
        ScriptedProvider(refusing(500, HEADERS)) as first,
        ScriptedProvider(refusing(status, others)) as second,
    ):
        server = await make_server(
            **{
                "llm.providers.sim.base_url": first.url,
                "llm.fallbacks": ["other"],
                "llm.providers.other": provider_entry(second.url),
            }
        )

        headers = await refused(server, "chat/completions", CHAT)

    check_visible(headers, VISIBLE if left == "7" else others)


async def test_a_fault_without_a_response_has_none(make_server: MakeServer) -> None:
    async with ScriptedProvider(refusing(500, HEADERS)) as provider:
        server = await make_server(
            **{
                "llm.providers.sim.base_url": provider.url,
                "llm.fallbacks": ["other"],
                "llm.providers.other": provider_entry(NOWHERE),
            }
        )

        headers = await refused(server, "chat/completions", CHAT)

    assert headers["x-aioserver-provider"] == "other"
    check_visible(headers, {})
