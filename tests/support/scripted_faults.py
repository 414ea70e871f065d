"""Providers that answer by a script, whole or with a fault of every kind, on three APIs; and the
same question to a server on each face, streamed and whole.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from aioserver.protocol.eventstream import parse
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

    *said* is what the request says of it already, so that the words are the rest.
    """

    head: bytes
    opening: list[bytes]
    words: list[bytes]
    closing: list[bytes]
    mark: bytes
    said: str = ""


def _event(content: dict[str, Any]) -> bytes:
    name = b"event: %b\n" % content["type"].encode() if "type" in content else b""
    return b"%bdata: %b\n\n" % (name, json.dumps(content).encode())


def _chat(delta: dict[str, Any], finish: str | None = None) -> bytes:
    return _event({"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})


def answer_to(request: bytes, *, anew: bool = False) -> Answer:
    """The answer that *request* asks for: of one of three APIs, streamed or not; the rest of it,
    where it says the beginning, or the whole of it *anew*.
    """
    if request.startswith(b"POST /v1/responses"):
        return RESPONSE
    messages = request.startswith(b"POST /v1/messages")
    usage = {"prompt_tokens": 5, "completion_tokens": 60, "total_tokens": 65}
    body = json.loads(request.partition(b"\r\n\r\n")[2])
    if not body.get("stream"):
        whole: dict[str, Any] = {
            "object": "chat.completion",
            "choices": [{"index": 0, "message": {"content": TEXT}, "finish_reason": "stop"}],
            "usage": usage,
        }
        if messages:
            content = [{"type": "text", "text": TEXT}]
            usage = {"input_tokens": 5, "output_tokens": 60}
            whole = {"type": "message", "content": content, "stop_reason": "end_turn"}
            whole["usage"] = usage
        data = json.dumps(whole).encode()
        cut = data.index(b"w0")
        parts = [data[at : at + 4] for at in range(cut, len(data), 4)]
        return Answer(JSON_HEAD, [data[:cut]], parts, [], b"")
    last = (body.get("messages") or [{"role": "user"}])[-1]
    said = last["content"] if last["role"] == "assistant" else ""
    words = WORDS if anew else WORDS[len(said.split()) :]
    assert anew or said + "".join(words) == TEXT, "it is the beginning of the answer"
    if not messages:
        return Answer(
            EVENT_STREAM,
            [_chat({"role": "assistant", "content": ""})],
            [_chat({"content": word}) for word in words],
            [_chat({}, "stop"), _event({"choices": [], "usage": usage})],
            DONE,
            said,
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
            for word in words
        ],
        [
            _event({"type": "content_block_stop", "index": 0}),
            _event({"type": "message_delta", **stop}),
        ],
        _event({"type": "message_stop"}),
        said,
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
    peer.write(answer.head + b"".join(chunk(part) for part in parts if part) + LAST_CHUNK)
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
        peer.write(head + body)
        return True

    return play


def after(words: int | None, then: Step) -> Step:
    """Say so many words, and then do something else; None: not even what comes before them."""

    async def play(peer: Peer, answer: Answer) -> bool:
        parts = [] if words is None else [*answer.opening, *answer.words[:words]]
        await peer.send(answer.head, *(chunk(part) for part in parts[:2]))
        peer.write(b"".join(map(chunk, parts[2:])))
        return await then(peer, answer)

    return play


async def nonsense(peer: Peer, answer: Answer) -> bool:
    rest = (*answer.words[20:], *answer.closing, answer.mark)
    garbage = b"data: {nonsense\n\n"
    peer.write(b"".join(chunk(part) for part in (garbage, *rest) if part) + LAST_CHUNK)
    return True


async def cut(peer: Peer, _answer: Answer) -> bool:
    await peer.writer.drain()
    # An orderly end of the connection, so that what was said before it arrives.
    peer.close()
    return False


def error_event(**error: Any) -> Step:
    async def play(peer: Peer, answer: Answer) -> bool:
        named = {"type": "error"} if b"event: " in answer.mark else {}
        peer.write(chunk(_event({**named, "error": error})) + LAST_CHUNK)
        return True

    return play


class Scripted:
    """A provider that answers by *steps*, the last one for ever; *anew*: it does not know how to
    go on with an answer, and begins it anew.
    """

    def __init__(self, *steps: Step, anew: bool = False) -> None:
        self._steps = list(steps)
        self._anew = anew
        self.asked = 0

    async def play(self, peer: Peer) -> None:
        while True:
            request = await peer.request()
            self.asked += 1
            step = self._steps.pop(0) if len(self._steps) > 1 else self._steps[0]
            if not await step(peer, answer_to(request, anew=self._anew)):
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


async def over_responses(server: RunningServer, model: str) -> Seen:
    body = {"model": model, "input": "Hello", "stream": True}
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


Ask = Callable[[RunningServer, str], Awaitable[Seen]]
FACES: dict[str, tuple[bool, Ask]] = {
    # Whether it is streamed, and how it is asked for a model.
    "v1 streamed": (True, over_openai),
    "v1 whole": (False, functools.partial(over_openai, stream=False)),
    "sse streamed": (True, over_sse),
    "sse whole": (False, functools.partial(over_sse, streaming=False)),
    "websocket": (True, over_websocket),
    "responses": (True, over_responses),
    "responses bridged": (True, over_responses),
    "messages streamed": (True, over_anthropic),
    "messages whole": (False, functools.partial(over_anthropic, stream=False)),
}
