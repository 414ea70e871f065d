"""Turns of two calls on three APIs, a provider that cuts the first attempt of each behind some
event, and what a client sees of a turn on each face.

Each attempt has names of its own for its calls and its answer, so that a test sees whose a piece
is. A provider entry `pN` is asked at `/pN/v1`, and cuts behind N events.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from aioserver.protocol.eventstream import parse
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
    from collections.abc import AsyncIterator, Callable, Sequence

CHAT, MESSAGES, RESPONSES = "chat/completions", "messages", "responses"
# By the name of a face: its path, and whether its provider has chat completions alone.
FACES = {
    "chat completions": (CHAT, False),
    "Messages": (MESSAGES, False),
    "Messages, bridged": (MESSAGES, True),
    "Responses": (RESPONSES, False),
    "Responses, bridged": (RESPONSES, True),
}
# The arguments of each call, in pieces and whole.
PIECES = ('{"pa', 'th": ', '"a"}')
ARGUMENTS = "".join(PIECES)
REASONING, TEXT = ("I ", "think "), ("Let me ", "look. ")
_ENDS = {"response.completed", "response.incomplete", "response.failed"}
_ENTRY = re.compile(rb"POST /(\w+)/v1/([a-z/]+)")


@dataclass(frozen=True)
class Turn:
    """What comes in front of two calls, and whether these come."""

    reasoning: Sequence[str] = ()
    text: Sequence[str] = ()
    calls: int = 2

    def events(self, path: str, attempt: int) -> list[bytes]:
        """Return the events of *attempt* to answer a request for *path*, the end mark last."""
        return {CHAT: self._chat, MESSAGES: self._messages, RESPONSES: self._response}[path](
            attempt
        )

    def _chat(self, attempt: int) -> list[bytes]:
        def event(delta: dict[str, Any], finish: str | None = None) -> bytes:
            choices = [{"index": 0, "delta": delta, "finish_reason": finish}]
            return _data({"id": f"c-{attempt}", "created": attempt, "choices": choices})

        events = [event({"role": "assistant", "content": None})]
        events += [event({"reasoning_content": piece}) for piece in self.reasoning]
        events += [event({"content": piece}) for piece in self.text]
        for number in range(self.calls):
            head = {"id": f"call_{attempt}_{number}", "type": "function"}
            opening = {**head, "function": {"name": "read", "arguments": ""}}
            events.append(event({"tool_calls": [{"index": number, **opening}]}))
            events += [
                event({"tool_calls": [{"index": number, "function": {"arguments": piece}}]})
                for piece in PIECES
            ]
        usage = {"prompt_tokens": attempt, "completion_tokens": 9, "total_tokens": 9 + attempt}
        events.append(event({}, "tool_calls" if self.calls else "stop"))
        return [*events, _data({"id": f"c-{attempt}", "choices": [], "usage": usage}), DONE]

    def _messages(self, attempt: int) -> list[bytes]:
        def event(kind: str, **members: Any) -> bytes:
            return _data({"type": kind, **members}, kind)

        def block(opening: dict[str, Any], deltas: Sequence[dict[str, Any]]) -> list[bytes]:
            index = next(indexes)
            return [
                event("content_block_start", index=index, content_block=opening),
                *(event("content_block_delta", index=index, delta=delta) for delta in deltas),
                event("content_block_stop", index=index),
            ]

        indexes = iter(range(9))
        usage = {"input_tokens": attempt, "output_tokens": 1}
        message = {"id": f"msg-{attempt}", "type": "message", "role": "assistant", "content": []}
        events = [event("message_start", message={**message, "usage": usage}), event("ping")]
        if self.reasoning:
            deltas = [{"type": "thinking_delta", "thinking": piece} for piece in self.reasoning]
            deltas.append({"type": "signature_delta", "signature": f"sig-{attempt}"})
            events += block({"type": "thinking", "thinking": ""}, deltas)
        if self.text:
            deltas = [{"type": "text_delta", "text": piece} for piece in self.text]
            events += block({"type": "text", "text": ""}, deltas)
        for number in range(self.calls):
            opening = {"type": "tool_use", "id": f"call_{attempt}_{number}", "name": "read"}
            deltas = [{"type": "input_json_delta", "partial_json": piece} for piece in PIECES]
            events += block({**opening, "input": {}}, deltas)
        stop = {"stop_reason": "tool_use", "stop_sequence": None}
        events.append(event("message_delta", delta=stop, usage={"output_tokens": 9}))
        return [*events, event("message_stop")]

    def _response(self, attempt: int) -> list[bytes]:
        events: list[bytes] = []

        def add(kind: str, **members: Any) -> None:
            name = f"response.{kind}"
            events.append(_data({"type": name, "sequence_number": len(events), **members}, name))

        response = {"id": f"resp-{attempt}", "object": "response", "output": []}
        add("created", response={**response, "status": "in_progress"})
        place = 0
        if self.reasoning:
            item = {"id": f"rs-{attempt}", "type": "reasoning", "summary": []}
            add("output_item.added", output_index=place, item=item)
            for piece in self.reasoning:
                add("reasoning_text.delta", item_id=item["id"], delta=piece)
            add("output_item.done", output_index=place, item=item)
            place += 1
        if self.text:
            message = {"id": f"m-{attempt}", "type": "message", "role": "assistant", "content": []}
            add("output_item.added", output_index=place, item=message)
            for piece in self.text:
                add("output_text.delta", item_id=message["id"], delta=piece)
            add("output_item.done", output_index=place, item=message)
            place += 1
        for number in range(self.calls):
            ids = {"id": f"fc-{attempt}-{number}", "call_id": f"call_{attempt}_{number}"}
            call = {"type": "function_call", **ids, "name": "read", "arguments": ""}
            add("output_item.added", output_index=place, item=call)
            for piece in PIECES:
                add("function_call_arguments.delta", item_id=ids["id"], delta=piece)
            add(
                "output_item.done", output_index=place, item={**call, "arguments": "".join(PIECES)}
            )
            place += 1
        usage = {"input_tokens": attempt, "output_tokens": 9, "total_tokens": 9 + attempt}
        add("completed", response={**response, "status": "completed", "usage": usage})
        return events


def _data(content: dict[str, Any], name: str = "") -> bytes:
    head = f"event: {name}\n".encode() if name else b""
    return b"%bdata: %b\n\n" % (head, json.dumps(content, separators=(",", ":")).encode())


@dataclass
class CuttingProvider:
    """A provider of *turn* that cuts the first attempts of each entry `pN` behind N events; or, if
    *behind* is set, the first attempts at any entry behind so many.

    *cuts* is how many attempts are cut, and *asked* counts the requests of each entry. Those behind
    them are of *later*, if it is set. *first* is the number of the first attempt. *ending* does what
    ends an attempt that is cut.
    """

    turn: Turn
    cuts: int = 1
    later: Turn | None = None
    first: int = 1
    behind: int | None = None
    ending: Callable[[Peer], Any] | None = None
    asked: Counter[str] = field(default_factory=Counter)
    bodies: list[bytes] = field(default_factory=list)

    async def play(self, peer: Peer) -> None:
        while True:
            request = await peer.request()
            head, _, body = request.partition(b"\r\n\r\n")
            match = _ENTRY.match(head)
            assert match is not None, head
            entry, path = match[1].decode(), match[2].decode()
            self.asked[entry] += 1
            self.bodies.append(body)
            anywhere = self.behind is not None
            number = self.asked.total() if anywhere else self.asked[entry]
            cut = number <= self.cuts and (anywhere or entry.startswith("p"))
            turn = self.turn if cut else self.later or self.turn
            events = turn.events(path, number + self.first - 1)
            if cut:
                shown = events[: int(entry[1:]) if self.behind is None else self.behind]
                # One read each, so that each is met alone.
                await peer.send(EVENT_STREAM, *map(chunk, shown))
                if self.ending is not None:
                    await self.ending(peer)
                await peer.writer.drain()
                peer.close()
                return
            peer.write(EVENT_STREAM + chunk(b"".join(events)) + LAST_CHUNK)


@asynccontextmanager
async def cutting(
    make_server: MakeServer,
    provider: CuttingProvider,
    count: int,
    changes: dict[str, Any] | None = None,
    *,
    bridged: bool = False,
    continuation: str = "none",
    spare: bool = False,
    **limits: Any,
) -> AsyncIterator[RunningServer]:
    """A server with *count* entries of *provider*; *spare*: and one more, which is asked where they
    fail, in groups `tN`.
    """
    async with ScriptedProvider(provider.play) as scripted:
        base = scripted.url.removesuffix("/v1")
        names = [f"p{number}" for number in range(count)]
        entries: dict[str, Any] = {
            f"llm.providers.{name}": {
                **provider_entry(
                    f"{base}/{name}/v1", **{"max_retries": 2, "backoff_factor": 0.0, **limits}
                ),
                "messages": "bridge" if bridged else True,
                "responses": not bridged,
                "continuation": continuation,
            }
            for name in (*names, *(["spare"] if spare else []))
        }
        if spare:
            entries["llm.models"] = {
                f"t{number}": {"members": [f"{name}/m", "spare/m"], "choose": "ordered"}
                for number, name in enumerate(names)
            }
        server = await make_server(**entries, **(changes or {}))
        yield server
        await server.nothing_held()


@dataclass
class SeenTurn:
    """A turn as a client has seen it: its texts, its calls by their ids, and its end."""

    raw: bytes
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    reasoning: str = ""
    text: str = ""
    calls: dict[str, str] = field(default_factory=dict)
    # "complete", or the code of an error.
    end: str = ""

    @property
    def plain(self) -> bytes:
        """Its bytes, of a bridged answer without what is made at random, times, and tokens, which
        are estimated where the provider has not said them.
        """
        raw = re.sub(rb"(resp|msg|rs|fc|call|toolu)_[0-9a-f]{16,}", rb"\1", self.raw)
        return re.sub(rb'"(created_at|completed_at|\w+_tokens)":[0-9]+', b"", raw)


BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "Go"}]},
    MESSAGES: {"messages": [{"role": "user", "content": "Go"}], "max_tokens": 4096},
    RESPONSES: {"input": "Go", "tools": [{"type": "function", "name": "read", "parameters": {}}]},
}


async def ask(
    server: RunningServer,
    path: str,
    entry: str,
    hold: str = "calls",
    headers: dict[str, str] | None = None,
    **members: Any,
) -> SeenTurn:
    """Ask *entry* for a turn on the face of *path*, and read it to its end."""
    body = {
        "model": entry if entry.startswith("t") else f"{entry}/m",
        "stream": True,
        **BODIES[path],
        **members,
    }
    sent = {"x-aioserver-hold": hold} if hold else {}
    async with server.session.post(
        f"{server.v1}/{path}", json=body, headers=sent | (headers or {})
    ) as response:
        raw = await response.read()
        fields = {name.lower(): value for name, value in response.headers.items()}
        seen = SeenTurn(raw, response.status, fields)
    if seen.status != 200:
        error = json.loads(raw)["error"]
        seen.end = error.get("code") or error["type"]
        return seen
    {CHAT: _read_chat, MESSAGES: _read_message, RESPONSES: _read_response}[path](seen)
    assert seen.end, "never a silent end"
    return seen


def _contents(raw: bytes) -> list[Any]:
    return [
        event.data if event.data == b"[DONE]" else json.loads(event.data) for event in parse(raw)
    ]


def _read_chat(seen: SeenTurn) -> None:
    names: dict[int, str] = {}
    idents, roles, finishes = set(), 0, 0
    for event in _contents(seen.raw):
        assert not seen.end, "nothing comes behind the end"
        if event == b"[DONE]":
            assert finishes == 1
            seen.end = "complete"
        elif "error" in event:
            seen.end = event["error"]["code"]
        else:
            idents.add(event["id"])
            for choice in event["choices"]:
                delta = choice["delta"]
                roles += "role" in delta
                finishes += choice["finish_reason"] is not None
                seen.reasoning += delta.get("reasoning_content") or ""
                seen.text += delta.get("content") or ""
                for call in delta.get("tool_calls") or ():
                    name = names.setdefault(call["index"], call.get("id"))
                    piece = call["function"]["arguments"]
                    seen.calls[name] = seen.calls.get(name, "") + piece
    assert len(idents) <= 1
    assert roles <= 1


def _read_message(seen: SeenTurn) -> None:
    opened: dict[int, str] = {}
    block, starts, stops = -1, 0, 0
    for event in _contents(seen.raw):
        assert not seen.end, "nothing comes behind the end"
        match event["type"]:
            case "message_start":
                starts += 1
            case "content_block_start":
                assert block < 0, "one block is open at a time"
                block = event["index"]
                assert block == len(opened)
                opened[block] = event["content_block"].get("id", "")
                if opened[block]:
                    seen.calls[opened[block]] = ""
            case "content_block_delta":
                assert block == event["index"]
                delta = event["delta"]
                seen.text += delta.get("text", "")
                seen.reasoning += delta.get("thinking", "")
                if "partial_json" in delta:
                    seen.calls[opened[block]] += delta["partial_json"]
            case "content_block_stop":
                block = -1
            case "message_delta":
                stops += 1
            case "message_stop":
                assert stops == 1
                seen.end = "complete"
            case "error":
                seen.end = event["error"]["code"]
    assert starts <= 1


def _read_response(seen: SeenTurn) -> None:
    events = _contents(seen.raw)
    ends = [event["type"] in _ENDS for event in events]
    assert True not in ends[:-1], "nothing comes behind the end"
    numbers = [event["sequence_number"] for event in events if "sequence_number" in event]
    assert numbers == list(range(len(numbers)))
    items: dict[str, str] = {}
    for event in events:
        kind = event["type"].removeprefix("response.")
        if kind == "output_item.added" and event["item"]["type"] == "function_call":
            items[event["item"]["id"]] = event["item"]["call_id"]
            seen.calls[event["item"]["call_id"]] = ""
        elif kind == "function_call_arguments.delta":
            seen.calls[items[event["item_id"]]] += event["delta"]
        elif kind == "output_text.delta":
            seen.text += event["delta"]
        elif kind.startswith("reasoning") and kind.endswith("text.delta"):
            seen.reasoning += event["delta"]
    last = events[-1]
    completed = last["type"] == "response.completed"
    seen.end = "complete" if completed else last["error"]["code"]
