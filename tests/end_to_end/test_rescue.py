"""What is made good where a provider fails: each fault on each face, streamed and whole, with what
the caller sees, and how often each provider is asked.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from aioserver.protocol.eventstream import HEARTBEAT, parse
from tests.support.faces import Seen, over_anthropic, over_openai, over_sse, over_websocket
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
    """The answer that *request* asks for: of one of three APIs, streamed or not."""
    if request.startswith(b"POST /v1/responses"):
        return RESPONSE
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


def _response_event(number: int, kind: str, **fields: Any) -> bytes:
    return _event({"type": f"response.{kind}", "sequence_number": number, **fields})


def _response(status: str) -> dict[str, Any]:
    return {"id": "resp_1", "object": "response", "status": status, "output": []}


_MESSAGE = {"id": "msg_1", "type": "message", "role": "assistant", "content": []}
_PART = {"type": "output_text", "text": "", "annotations": []}
RESPONSE = Answer(
    EVENT_STREAM,
    [
        _response_event(0, "created", response=_response("in_progress")),
        _response_event(1, "in_progress", response=_response("in_progress")),
        _response_event(2, "output_item.added", output_index=0, item=_MESSAGE),
        _response_event(3, "content_part.added", item_id="msg_1", content_index=0, part=_PART),
    ],
    [
        _response_event(number, "output_text.delta", item_id="msg_1", delta=word)
        for number, word in enumerate(WORDS, 4)
    ],
    [_response_event(64, "output_text.done", item_id="msg_1", text=TEXT)],
    _response_event(65, "completed", response=_response("completed")),
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
    make_server: MakeServer,
    first: Scripted,
    second: Scripted,
    changes: Mapping[str, Any] | None = None,
    **limits: Any,
) -> AsyncIterator[RunningServer]:
    """A server whose first provider is *first*, and the next one *second*; *limits* are those of
    the first.
    """
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
                **(changes or {}),
            }
        )
        yield server
        await server.nothing_held()


async def over_responses(server: RunningServer) -> Seen:
    body = {"model": "m", "input": "Hello", "stream": True}
    async with server.session.post(f"{server.v1}/responses", json=body) as response:
        raw = await response.read()
        seen = Seen(status=response.status, raw=raw)
    if seen.status != 200:
        seen.end, seen.error = "error", json.loads(raw)["error"]
        return seen
    contents = [json.loads(event.data) for event in parse(raw)]
    kinds = [content["type"].removeprefix("response.") for content in contents]
    assert [content["sequence_number"] for content in contents] == [*range(len(contents))]
    assert kinds[0] == "created"
    assert kinds.count("created") == 1
    seen.text = "".join(content["delta"] for content in contents if "delta" in content)
    seen.end = "complete" if kinds[-1] == "completed" else "error"
    seen.error = contents[-1].get("error") or {}
    return seen


def counted(server: RunningServer, provider: str) -> dict[str, int]:
    """The attempts at *provider* by their outcome."""
    attempts = server.provider_of(provider).meter.attempts
    return {name: counter.value for name, counter in attempts.items() if counter.value}


Ask = Callable[[RunningServer], Awaitable[Seen]]
FACES: dict[str, tuple[bool, Ask]] = {
    # whether it is streamed, and how it is asked
    "v1 streamed": (True, lambda server: over_openai(server, "m")),
    "v1 whole": (False, lambda server: over_openai(server, "m", stream=False)),
    "sse streamed": (True, lambda server: over_sse(server, "m")),
    "sse whole": (False, lambda server: over_sse(server, "m", streaming=False)),
    "websocket": (True, lambda server: over_websocket(server, "m")),
    "responses": (True, over_responses),
    "responses bridged": (True, over_responses),
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
    if face == "responses" and name == "no [DONE]":
        pytest.skip("a response has no point behind which nothing is missing")
    asked, code = (row.asked, row.code) if streamed or row.whole is None else row.whole
    first, second = Scripted(*row.steps), Scripted(good)
    bridged = {f"llm.providers.{name}.responses": False for name in ("first", "second")}
    changes = bridged if face == "responses bridged" else {}
    async with two(make_server, first, second, changes, **row.limits) as server:
        seen = await ask(server)
        await server.nothing_held()
        attempts = [sum(counted(server, each).values()) for each in ("first", "second")]

    assert (first.asked, second.asked) == asked
    assert attempts == [first.asked, second.asked]
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


@pytest.mark.one_loop
@pytest.mark.parametrize("face", [face for face in FACES if not face.startswith("responses")])
async def test_an_outage_costs_nobody_an_answer_and_who_has_worked_is_paid(
    face: str, make_server: MakeServer
) -> None:
    first, second = Scripted(UNAVAILABLE, UNAVAILABLE, good), Scripted(good)
    async with two(make_server, first, second) as server:
        seen = await FACES[face][1](server)
        back = await FACES["v1 streamed"][1](server)
        attempts = [counted(server, each) for each in ("first", "second")]
        tokens = await server.counted("tokens", "provider", "type")

    assert (seen.text, back.text) == (TEXT, TEXT)
    assert (first.asked, second.asked) == (3, 1)
    assert attempts == [{"http_5xx": 2, "ok": 1}, {"ok": 1}]
    # Nothing of the two attempts that were refused.
    assert tokens["first", "input"] == 5
    assert tokens["first", "output"] == 60


@pytest.mark.one_loop
async def test_a_slow_first_word_is_waited_for_and_comes_with_its_preamble(
    make_server: MakeServer,
) -> None:
    said = asyncio.Event()

    async def slow(peer: Peer, answer: Answer) -> bool:
        await peer.send(answer.head, *map(chunk, answer.opening))
        await said.wait()
        rest = (*answer.words, *answer.closing, answer.mark)
        peer.writer.write(b"".join(map(chunk, rest)) + LAST_CHUNK)
        return True

    first, second = Scripted(slow), Scripted(good)
    quick = {"chat.websocket.ping_interval": 0.1}
    async with two(make_server, first, second, quick, read_timeout=30.0) as server:
        body = {"model": "m", "messages": [], "stream": True}
        async with server.session.post(f"{server.v1}/chat/completions", json=body) as response:
            # The head, and a heartbeat: nothing of the answer.
            assert await response.content.readuntil(b"\n\n") == HEARTBEAT
            said.set()
            raw = await response.read()

    answer = _answer_to(b'POST /v1/chat/completions\r\n\r\n{"stream":true}')
    sent = b"".join((*answer.opening, *answer.words, *answer.closing, answer.mark))
    assert raw.replace(HEARTBEAT, b"") == sent
    assert (first.asked, second.asked) == (1, 0)


@pytest.mark.one_loop
@pytest.mark.parametrize("background", [True, False])
async def test_the_id_of_a_response_comes_when_its_client_needs_it(
    background: bool, make_server: MakeServer
) -> None:
    first, second = Scripted(after(0, silent)), Scripted(good)
    # Long, where it must not be the reason; and short, where it is.
    quick = {"chat.websocket.ping_interval": 20.0 if background else 0.1}
    async with two(make_server, first, second, quick, read_timeout=30.0) as server:
        body = {"model": "m", "input": "Hello", "stream": True, "store": True}
        body["background"] = background
        async with server.session.post(f"{server.v1}/responses", json=body) as response:
            seen = b""
            while b"content_part.added" not in seen:
                seen += await response.content.readany()
        async with server.session.post(f"{server.v1}/responses/resp_1/cancel") as response:
            assert response.status == 200

    assert seen.replace(HEARTBEAT, b"") == b"".join(RESPONSE.opening)
    assert (first.asked, second.asked) == (1, 0)
