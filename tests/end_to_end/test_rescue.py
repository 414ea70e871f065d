"""What is made good where a provider fails: each fault on each face, streamed and whole, with what
the caller sees, and how often each provider is asked.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from tests.support.faces import Seen, over_anthropic, over_openai, over_sse
from tests.support.scripted_provider import (
    DONE,
    EVENT_STREAM,
    LAST_CHUNK,
    Peer,
    ScriptedProvider,
    chunk,
)
from tests.support.server import MakeServer, RunningServer, provider_entry

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

WORDS = [f"w{number} " for number in range(60)]
TEXT = "".join(WORDS)
JSON_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
)


class Answer(NamedTuple):
    """A good answer as it is sent: its head, what comes before the first word, the words, and what
    comes behind them, the end mark apart.
    """

    head: bytes
    opening: list[bytes]
    words: list[bytes]
    closing: list[bytes]
    mark: bytes


def _event(content: dict[str, Any]) -> bytes:
    name = b"event: %b\n" % content["type"].encode() if "type" in content else b""
    return b"%bdata: %b\n\n" % (name, json.dumps(content).encode())


def _chat(delta: dict[str, Any], finish: str | None = None) -> bytes:
    return _event({"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})


def _answer_to(request: bytes) -> Answer:
    """The answer that *request* asks for: of one of two APIs, streamed or not."""
    messages = request.startswith(b"POST /v1/messages")
    usage = {"prompt_tokens": 5, "completion_tokens": 60, "total_tokens": 65}
    if not json.loads(request.partition(b"\r\n\r\n")[2]).get("stream"):
        whole: dict[str, Any] = {
            "object": "chat.completion",
            "choices": [{"index": 0, "message": {"content": TEXT}, "finish_reason": "stop"}],
            "usage": usage,
        }
        if messages:
            content = [{"type": "text", "text": TEXT}]
            whole = {"type": "message", "content": content, "stop_reason": "end_turn"}
        body = json.dumps(whole).encode()
        cut = body.index(b"w0")
        parts = [body[at : at + 4] for at in range(cut, len(body), 4)]
        return Answer(JSON_HEAD, [body[:cut]], parts, [], b"")
    if not messages:
        return Answer(
            EVENT_STREAM,
            [_chat({"role": "assistant", "content": ""})],
            [_chat({"content": word}) for word in WORDS],
            [_chat({}, "stop"), _event({"choices": [], "usage": usage})],
            DONE,
        )
    start = {"id": "msg_1", "type": "message", "usage": {"input_tokens": 5, "output_tokens": 1}}
    stop = {"delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 60}}
    block = {"type": "text", "text": ""}
    return Answer(
        EVENT_STREAM,
        [
            _event({"type": "message_start", "message": start}),
            _event({"type": "ping"}),
            _event({"type": "content_block_start", "index": 0, "content_block": block}),
        ],
        [
            _event(
                {
                    "type": "content_block_delta",
                    "index": 0,
                    "delta": {"type": "text_delta", "text": word},
                }
            )
            for word in WORDS
        ],
        [
            _event({"type": "content_block_stop", "index": 0}),
            _event({"type": "message_delta", **stop}),
        ],
        _event({"type": "message_stop"}),
    )


# One answer of a provider; it returns whether the connection goes on.
Step = Callable[[Peer, Answer], Awaitable[bool]]


async def good(peer: Peer, answer: Answer) -> bool:
    parts = (*answer.opening, *answer.words, *answer.closing, answer.mark)
    peer.writer.write(answer.head + b"".join(chunk(part) for part in parts if part) + LAST_CHUNK)
    return True


async def reset(peer: Peer, _answer: Answer) -> bool:
    peer.abort()
    return False


async def silent(peer: Peer, _answer: Answer) -> bool:
    await peer.left()
    return False


async def no_done(peer: Peer, answer: Answer) -> bool:
    return await good(peer, answer._replace(mark=b""))


def status(number: int, *headers: bytes, **error: Any) -> Step:
    body = json.dumps({"type": "error", "error": {"message": "No.", **error}}).encode()
    lines = [b"HTTP/1.1 %d No" % number, b"Content-Type: application/json", *headers]
    head = b"\r\n".join([*lines, b"Content-Length: %d" % len(body), b"", b""])

    async def play(peer: Peer, _answer: Answer) -> bool:
        peer.writer.write(head + body)
        return True

    return play


def after(words: int | None, then: Step) -> Step:
    """Say so many words, and then do something else; None: not even what comes before them."""

    async def play(peer: Peer, answer: Answer) -> bool:
        parts = [] if words is None else [*answer.opening, *answer.words[:words]]
        await peer.send(answer.head, *(chunk(part) for part in parts[:2]))
        peer.writer.write(b"".join(map(chunk, parts[2:])))
        return await then(peer, answer)

    return play


async def nonsense(peer: Peer, answer: Answer) -> bool:
    rest = (*answer.words[20:], *answer.closing, answer.mark)
    garbage = b"data: {nonsense\n\n"
    peer.writer.write(b"".join(chunk(part) for part in (garbage, *rest) if part) + LAST_CHUNK)
    return True


async def cut(peer: Peer, _answer: Answer) -> bool:
    await peer.writer.drain()
    # An orderly end of the connection, so that what was said before it arrives.
    peer.close()
    return False


def error_event(**error: Any) -> Step:
    async def play(peer: Peer, answer: Answer) -> bool:
        named = {"type": "error"} if b"event: " in answer.mark else {}
        peer.writer.write(chunk(_event({**named, "error": error})) + LAST_CHUNK)
        return True

    return play


class Scripted:
    """A provider that answers by *steps*, the last one for ever."""

    def __init__(self, *steps: Step) -> None:
        self._steps = list(steps)
        self.asked = 0

    async def play(self, peer: Peer) -> None:
        while True:
            request = await peer.request()
            self.asked += 1
            step = self._steps.pop(0) if len(self._steps) > 1 else self._steps[0]
            if not await step(peer, _answer_to(request)):
                return


@asynccontextmanager
async def two(
    make_server: MakeServer, first: Scripted, second: Scripted, **limits: Any
) -> AsyncIterator[RunningServer]:
    """A server whose first provider is *first*, and the next one *second*."""
    async with ScriptedProvider(first.play) as a, ScriptedProvider(second.play) as b:
        limits = {"max_retries": 1, "backoff_factor": 0.0, **limits}
        entry = provider_entry(a.url, "first-model", **limits)
        server = await make_server(
            **{
                "llm.providers.first": {**entry, "messages": True},
                "llm.providers.second": {
                    **provider_entry(b.url, "second-model", read_timeout=30.0),
                    "messages": True,
                },
                "llm.active": "first",
                "llm.fallbacks": ["second"],
            }
        )
        yield server
        await server.nothing_held()


Ask = Callable[[RunningServer], Awaitable[Seen]]
FACES: dict[str, tuple[bool, Ask]] = {
    # whether it is streamed, and how it is asked
    "v1 streamed": (True, lambda server: over_openai(server, "m")),
    "v1 whole": (False, lambda server: over_openai(server, "m", stream=False)),
    "sse streamed": (True, lambda server: over_sse(server, "m")),
    "sse whole": (False, lambda server: over_sse(server, "m", streaming=False)),
    "messages streamed": (True, lambda server: over_anthropic(server, "m")),
    "messages whole": (False, lambda server: over_anthropic(server, "m", stream=False)),
}
LIMITED = status(429)
LIMITED_FOR = status(429, b"Retry-After: 7")
UNAVAILABLE = status(503)
FILTERED = status(400, code="content_policy_violation")
SILENCE = {"read_timeout": 0.3}
CUT, MUTE, BAD = "provider_disconnected", "read_timeout", "provider_bad_response"


class Row(NamedTuple):
    """One fault: what the first provider does, how often each is asked, and with what code the
    answer ends ("": well), streamed and whole.
    """

    steps: tuple[Step, ...]
    asked: tuple[int, int]
    code: str = ""
    whole: tuple[tuple[int, int], str] | None = None
    limits: Mapping[str, Any] = MappingProxyType({})


FAULTS: dict[str, Row] = {
    "429 with Retry-After": Row((LIMITED_FOR,), (1, 1)),
    "429 without": Row((LIMITED,), (1, 1)),
    "500 once": Row((status(500), good), (2, 0)),
    "503 always": Row((UNAVAILABLE,), (2, 1)),
    "reset before the head, a new connection, once": Row((reset, good), (2, 0)),
    "reset before the head, new connections, always": Row((reset,), (2, 1)),
    "no answer": Row((silent,), (1, 1), limits=SILENCE),
    "no answer, a head": Row((after(None, silent),), (1, 1), limits=SILENCE),
    "no answer, a role": Row((after(0, silent),), (1, 1), limits=SILENCE),
    "cut before the first word": Row((after(0, cut),), (1, 1)),
    "an error before the first word": Row(
        (after(0, error_event(message="overloaded", code=503)),), (2, 1), whole=((1, 1), "")
    ),
    "a verdict before the first word": Row(
        (after(0, error_event(type="invalid_request_error", message="No.")),),
        (1, 0),
        "provider_error",
        whole=((1, 1), ""),
    ),
    "no JSON before the first word": Row((after(0, nonsense),), (1, 1)),
    "cut after 40 of 60 words": Row((after(40, cut),), (1, 0), CUT, ((1, 1), "")),
    "silent after 20 words": Row((after(20, silent),), (1, 0), MUTE, ((1, 1), ""), SILENCE),
    "an event that is no JSON": Row((after(20, nonsense),), (1, 0), BAD, ((1, 1), "")),
    "no [DONE]": Row((no_done,), (1, 0)),
    "context too long": Row((status(400, code="context_length_exceeded"),), (1, 1)),
    "content policy": Row((FILTERED,), (1, 0), "provider_error"),
}


@pytest.mark.one_loop
@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("name", FAULTS)
async def test_each_fault_on_each_face(name: str, face: str, make_server: MakeServer) -> None:
    row, (streamed, ask) = FAULTS[name], FACES[face]
    asked, code = (row.asked, row.code) if streamed or row.whole is None else row.whole
    first, second = Scripted(*row.steps), Scripted(good)
    async with two(make_server, first, second, **row.limits) as server:
        seen = await ask(server)
        await server.nothing_held()
        attempts = await server.counted("provider_attempts", "provider")

    assert (first.asked, second.asked) == asked
    assert attempts == +Counter({("first",): first.asked, ("second",): second.asked})
    if not code:
        assert (seen.end, seen.text, seen.error) == ("complete", TEXT, {})
    else:
        assert seen.end == "error"
        assert TEXT.startswith(seen.text)
        assert bool(seen.text) == (code in {CUT, MUTE, BAD})
        # The caller's own fault passes as the provider said it.
        assert seen.code == code or "No." in json.dumps(seen.error)


@pytest.mark.one_loop
@pytest.mark.parametrize("face", FACES)
async def test_a_kept_connection_that_is_reset_is_seen_by_nobody(
    face: str, make_server: MakeServer
) -> None:
    first, second = Scripted(good, reset, good), Scripted(good)
    async with two(make_server, first, second, max_retries=0) as server:
        await over_openai(server, "m")
        seen = await FACES[face][1](server)

    assert (seen.end, seen.text) == ("complete", TEXT)
    assert (first.asked, second.asked) == (3, 0)
