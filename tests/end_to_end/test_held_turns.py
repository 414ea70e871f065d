"""A turn of calls that breaks off is made good: cut at every event, on every face, its client gets
all calls of one attempt, or none and an honest error.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from itertools import product
from typing import TYPE_CHECKING, Any

import pytest

from aioserver.protocol.eventstream import parse
from tests.support.held_turns import (
    ARGUMENTS,
    CHAT,
    FACES,
    MESSAGES,
    REASONING,
    RESPONSES,
    TEXT,
    CuttingProvider,
    Turn,
    ask,
    cutting,
)
from tests.support.scripted_provider import (
    DONE,
    EVENT_STREAM,
    LAST_CHUNK,
    Peer,
    ScriptedProvider,
    chunk,
)
from tests.support.server import provider_entry
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from tests.support.held_turns import SeenTurn
    from tests.support.server import MakeServer, RunningServer

CALLS = Turn()


class EscapedTurn(Turn):
    """A turn whose provider writes a letter of each word that makes a call, or a finish, as an
    escape.
    """

    def events(self, path: str, attempt: int) -> list[bytes]:
        words = rb'"(tool|function|finish|stop|message)_(calls?|use|reason|delta|stop)"'
        return [re.sub(words, rb'"\1\\u005f\2"', event) for event in super().events(path, attempt)]


def _count(turn: Turn, path: str, *, bridged: bool) -> tuple[int, int]:
    """How many events a turn has, and behind how many it is whole."""
    asked = CHAT if bridged else path
    count = len(turn.events(asked, 1))
    return count, count - {CHAT: 2, MESSAGES: 1, RESPONSES: 0}[asked]


def _first_call(events: list[bytes]) -> int:
    """Where the first call of a turn begins."""
    return next(number for number, event in enumerate(events) if b"call_1_0" in event)


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("hold", ["calls", "turn"])
async def test_turn_of_calls_cut_at_each_event_is_that_of_one_attempt(
    make_server: MakeServer, face: str, hold: str
) -> None:
    path, bridged = FACES[face]
    count, whole = _count(CALLS, path, bridged=bridged)
    provider = CuttingProvider(CALLS)
    async with cutting(make_server, provider, count, bridged=bridged) as server:
        uncut = {}
        for first in (1, 2):
            provider.cuts, provider.first = 0, first
            uncut[first] = (await ask(server, path, "p0", hold)).plain
            provider.asked.clear()
        provider.cuts, provider.first = 1, 1

        for cut in range(count):
            seen = await ask(server, path, f"p{cut}", hold)

            attempts = 1 if cut >= whole else 2
            assert provider.asked[f"p{cut}"] == attempts
            assert seen.end == "complete"
            assert list(seen.calls.values()) == [ARGUMENTS] * 2
            assert seen.plain == uncut[attempts], cut
            assert seen.headers["x-aioserver-hold"] == hold
            assert seen.headers["x-aioserver-attempts"] == str(attempts)


@pytest.mark.parametrize("face", ["chat completions", "Messages, bridged", "Responses, bridged"])
async def test_turn_cut_behind_reasoning_goes_on_with_the_calls_of_another_attempt(
    make_server: MakeServer, face: str
) -> None:
    path, bridged = FACES[face]
    turn = Turn(reasoning=REASONING)
    count, whole = _count(turn, path, bridged=bridged)
    provider = CuttingProvider(turn)
    # Without it a message has no reasoning.
    thinks: dict[str, Any] = {"thinking": {"type": "enabled", "budget_tokens": 1024}}
    async with cutting(make_server, provider, count, bridged=bridged) as server:
        for cut in range(count):
            seen = await ask(server, path, f"p{cut}", **(thinks if path == MESSAGES else {}))

            assert provider.asked[f"p{cut}"] == (1 if cut >= whole else 2)
            assert provider.bodies[-1] == provider.bodies[-2] or cut >= whole
            assert seen.end == "complete"
            # What was shown of it stays, and no second reasoning comes.
            shown = "I " if cut == 2 else "I think "
            assert seen.reasoning == shown
            assert list(seen.calls.values()) == [ARGUMENTS] * 2
            comment = f": seam at=0 from=p{cut} to=p{cut} code=provider_disconnected"
            assert (comment.encode() in seen.raw) == (1 < cut < whole)


@pytest.mark.parametrize("face", ["Messages", "Responses"])
async def test_signed_reasoning_and_its_calls_are_of_one_attempt(
    make_server: MakeServer, face: str
) -> None:
    path, _ = FACES[face]
    turn = Turn(reasoning=REASONING)
    count, whole = _count(turn, path, bridged=False)
    provider = CuttingProvider(turn)
    async with cutting(make_server, provider, count) as server:
        for cut in range(count):
            seen = await ask(server, path, f"p{cut}")

            attempt = 1 if cut >= whole else 2
            assert provider.asked[f"p{cut}"] == attempt
            assert seen.raw == b"".join(turn.events(path, attempt))


@pytest.mark.parametrize("face", ["chat completions", "Messages", "Messages, bridged"])
async def test_calls_cut_behind_text_come_once_where_the_text_is_continued(
    make_server: MakeServer, face: str
) -> None:
    path, bridged = FACES[face]
    turn = Turn(text=TEXT)
    count, whole = _count(turn, path, bridged=bridged)
    first = _first_call(turn.events(CHAT if bridged else path, 1))
    provider = CuttingProvider(turn)
    async with cutting(
        make_server, provider, count, bridged=bridged, continuation="prefill"
    ) as server:
        for cut in range(first + 1, count):
            provider.turn = turn
            # The rest has no text any more.
            provider.later = Turn()
            seen = await ask(server, path, f"p{cut}")

            assert seen.end == "complete"
            assert seen.text == "Let me look. "
            assert list(seen.calls.values()) == [ARGUMENTS] * 2
            assert provider.asked[f"p{cut}"] == (1 if cut >= whole else 2)
            assert b"call_1_" not in seen.raw or cut >= whole


@pytest.mark.parametrize("face", FACES)
async def test_turn_cut_behind_text_shows_no_piece_of_a_call_and_an_error(
    make_server: MakeServer, face: str
) -> None:
    path, bridged = FACES[face]
    turn = Turn(text=TEXT)
    count, whole = _count(turn, path, bridged=bridged)
    first = _first_call(turn.events(CHAT if bridged else path, 1))
    provider = CuttingProvider(turn)
    async with cutting(make_server, provider, count, bridged=bridged) as server:
        for cut in range(first, whole):
            seen = await ask(server, path, f"p{cut}")

            assert provider.asked[f"p{cut}"] == 1
            assert (seen.text, seen.end) == ("Let me look. ", "provider_disconnected")
            assert not seen.calls
            assert b"call_1_" not in seen.raw


@pytest.mark.parametrize("face", FACES)
async def test_calls_wait_for_their_finish_where_the_letters_of_both_are_escaped(
    make_server: MakeServer, face: str
) -> None:
    path, bridged = FACES[face]
    asked = CHAT if bridged else path
    turn = EscapedTurn(text=TEXT)
    count, whole = _count(turn, path, bridged=bridged)
    first = _first_call(turn.events(asked, 1))
    assert b"\\u005f" in turn.events(asked, 1)[first]
    provider = CuttingProvider(turn)
    async with cutting(make_server, provider, count, bridged=bridged) as server:
        for cut in range(first, count):
            seen = await ask(server, path, f"p{cut}")

            assert provider.asked[f"p{cut}"] == 1
            assert seen.text == "Let me look. "
            assert list(seen.calls.values()) == ([ARGUMENTS] * 2 if cut >= whole else [])
            assert (b"call_1_" in seen.raw) == (cut >= whole)
            assert seen.end == ("complete" if cut >= whole else "provider_disconnected")


@pytest.mark.parametrize("face", FACES)
async def test_without_a_hold_a_turn_comes_as_it_came(make_server: MakeServer, face: str) -> None:
    path, bridged = FACES[face]
    count, whole = _count(CALLS, path, bridged=bridged)
    provider = CuttingProvider(CALLS)
    async with cutting(make_server, provider, count, bridged=bridged) as server:
        for cut in (3, whole - 1):
            seen = await ask(server, path, f"p{cut}", "preamble")

            assert provider.asked[f"p{cut}"] == 1
            assert seen.end == "provider_disconnected"
            assert "x-aioserver-hold" not in seen.headers
            # The first call is there, as far as it came.
            assert (
                next(iter(seen.calls.values()))
                == ARGUMENTS[: len(next(iter(seen.calls.values())))]
            )


@pytest.mark.parametrize("face", FACES)
async def test_turn_that_is_cut_is_asked_of_the_next_provider_when_the_first_cuts_it_again(
    make_server: MakeServer, face: str
) -> None:
    path, bridged = FACES[face]
    provider = CuttingProvider(CALLS, cuts=2)
    changes = {"llm.active": "p4", "llm.fallbacks": ["p0"]}
    async with cutting(
        make_server, provider, 5, changes, bridged=bridged, max_retries=1
    ) as server:
        provider.cuts = 2
        provider.asked["p0"] = 2
        seen = await ask(server, path, "", model="some-model")

        assert provider.asked == {"p4": 2, "p0": 3}
        assert seen.end == "complete"
        assert list(seen.calls.values()) == [ARGUMENTS] * 2
        assert seen.headers["x-aioserver-provider"] == "p0"
        assert seen.headers["x-aioserver-attempts"] == "3"


@pytest.mark.parametrize("reasoning", [(), REASONING])
async def test_turn_is_asked_for_once_without_retries(
    make_server: MakeServer, reasoning: tuple[str, ...]
) -> None:
    provider = CuttingProvider(Turn(reasoning))
    async with cutting(make_server, provider, 4, max_retries=0) as server:
        seen = await ask(server, CHAT, "p3")

        assert provider.asked == {"p3": 1}
        assert (seen.status, seen.end) == (200 if reasoning else 502, "provider_disconnected")


@pytest.mark.parametrize("face", FACES)
async def test_a_verdict_ends_a_held_turn_and_drops_what_was_held(
    make_server: MakeServer, face: str
) -> None:
    path, bridged = FACES[face]

    async def refuse(peer: Peer) -> None:
        error = {"type": "invalid_request_error", "message": "No.", "code": "content_filter"}
        data = json.dumps({"type": "error", "error": error}).encode()
        peer.write(chunk(b"event: error\ndata: %b\n\n" % data))

    provider = CuttingProvider(CALLS, ending=refuse)
    async with cutting(make_server, provider, 7, bridged=bridged) as server:
        seen = await ask(server, path, "p6")

        assert provider.asked == {"p6": 1}
        assert seen.status == 400
        assert b"call_1_" not in seen.raw


async def _garbage(peer: Peer) -> None:
    peer.write(chunk(b"data: {nonsense\n\n"))


async def _overloaded(peer: Peer) -> None:
    error = {"type": "overloaded_error", "message": "No.", "code": 503}
    peer.write(chunk(b'event: error\ndata: {"type":"error","error":%b}\n\n' % _json(error)))


async def _reset(peer: Peer) -> None:
    peer.abort()


async def _silence(peer: Peer) -> None:
    await peer.left()


def _json(content: Any) -> bytes:
    return json.dumps(content).encode()


@pytest.mark.virtual_time
@pytest.mark.parametrize(
    ("face", "ending"),
    [
        *((face, _reset) for face in FACES),
        *(("chat completions", ending) for ending in (_garbage, _overloaded, _silence)),
        ("Messages", _overloaded),
        ("Responses", _overloaded),
    ],
)
async def test_turn_that_breaks_off_in_any_way_is_asked_for_again_and_counted(
    make_server: MakeServer, face: str, ending: Callable[[Peer], Awaitable[None]]
) -> None:
    path, bridged = FACES[face]
    provider = CuttingProvider(CALLS, ending=ending)
    async with cutting(make_server, provider, 7, bridged=bridged, read_timeout=0.5) as server:
        seen = await ask(server, path, "p6")

        assert provider.asked == {"p6": 2}
        assert seen.end == "complete"
        assert list(seen.calls.values()) == [ARGUMENTS] * 2
        turns = await server.counted("held_turns", "hold", "result")
        assert turns["calls", "rescued"] == 1
        assert sum(turns.values()) == 1


@pytest.mark.parametrize("face", ["chat completions", "Messages", "Responses"])
async def test_what_is_too_much_to_be_held_comes_as_it_comes(
    make_server: MakeServer, face: str
) -> None:
    path, _ = FACES[face]
    _, whole = _count(CALLS, path, bridged=False)
    events = CALLS.events(path, 1)
    changes = {"chat.streams.max_stream_bytes": 2 * max(map(len, events)) + 200}
    provider = CuttingProvider(CALLS)
    async with cutting(make_server, provider, whole, changes) as server:
        seen = await ask(server, path, f"p{whole - 1}")

        assert provider.asked == {f"p{whole - 1}": 1}
        assert seen.end == "provider_disconnected"
        assert seen.calls["call_1_0"] == ARGUMENTS


def _event(kind: str, **members: Any) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), _json({"type": kind, **members}))


def _choice(index: int, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "finish_reason": finish}


def _chunks(*events: list[dict[str, Any]]) -> list[bytes]:
    return [b"data: %b\n\n" % _json({"id": "c", "choices": choices}) for choices in events]


def _piece(index: int, arguments: str, **head: str) -> dict[str, Any]:
    function = {"arguments": arguments, **({"name": "read"} if head else {})}
    return _choice(index, {"tool_calls": [{"index": 0, **head, "function": function}]})


_BEGUN = [[_choice(0, {"role": "assistant"}), _choice(1, {"role": "assistant"})]]
_CALLED = [*_BEGUN, [_piece(0, "{", id="a")], [_piece(1, "{", id="b")], [_piece(0, "}")]]
_ALONE = [[_choice(0, {"role": "assistant"})], [_piece(0, "{}", id="a")]]
_USAGE = b'data: {"id":"c","choices":[],"usage":{"prompt_tokens":1,"completion_tokens":1}}\n\n'


# Turns of two choices, and whether each of them is whole.
_TURNS: list[tuple[list[list[dict[str, Any]]], bool]] = [
    ([*_CALLED, [_choice(0, {}, "tool_calls"), _choice(1, {}, "tool_calls")]], True),
    ([*_CALLED, [_choice(1, {}, "tool_calls")], [_choice(0, {}, "tool_calls")]], True),
    (
        [
            *_BEGUN,
            [_choice(0, {"content": "No."})],
            [_choice(0, {}, "stop")],
            [_piece(1, "{}", id="b")],
            [_choice(1, {}, "tool_calls")],
        ],
        True,
    ),
    # An engine that makes one, whatever is asked for.
    ([*_ALONE, [_choice(0, {}, "tool_calls")]], True),
    ([*_ALONE, [_choice(0, {}, "tool_calls")], [_choice(0, {}, "tool_calls")]], True),
    ([*_CALLED, [_choice(0, {}, "tool_calls")]], False),
    ([*_CALLED, [_choice(0, {}, "tool_calls")], [_choice(0, {}, "tool_calls")]], False),
    ([*_CALLED, [_choice(0, {}, "tool_calls")], [_piece(1, "}")]], False),
]


@pytest.mark.parametrize("hold", ["preamble", "calls", "turn"])
async def test_turn_of_several_choices_is_whole_when_each_that_has_begun_has_its_finish(
    make_server: MakeServer, hold: str
) -> None:
    asked, first, ending = 0, list[bytes](), ""
    again = [*_chunks(*_CALLED, [_choice(0, {}, "stop"), _choice(1, {}, "stop")]), DONE]

    async def play(peer: Peer) -> None:
        nonlocal asked
        while True:
            await peer.request()
            asked += 1
            await peer.send(EVENT_STREAM, *map(chunk, first if asked == 1 else again))
            if asked == 1 and ending == "cut":
                peer.abort()
                return
            if ending == "usage":
                peer.write(chunk(_USAGE))
            peer.write(LAST_CHUNK)

    async with ScriptedProvider(play) as scripted:
        limits: dict[str, Any] = {"max_retries": 2, "backoff_factor": 0.0}
        # Providers of their own, so that none of them is found to be sick.
        cases = [*product(_TURNS, ("end", "usage", "cut"))]
        server = await make_server(
            **{
                f"llm.providers.p{number}": provider_entry(scripted.url, **limits)
                for number in range(len(cases))
            }
        )
        for number, ((events, whole), how) in enumerate(cases):
            asked, first, ending = 0, _chunks(*events), how
            body = {"model": f"p{number}/m", "stream": True, "messages": [], "n": 2}
            url, headers = f"{server.v1}/chat/completions", {"x-aioserver-hold": hold}
            async with server.session.post(url, json=body, headers=headers) as response:
                raw = await response.read()

            if whole:
                assert (asked, raw) == (1, b"".join([*first, DONE])), (number, how)
            elif hold == "preamble":
                assert asked == 1
                assert raw.startswith(b"".join(first))
                assert not raw.endswith(DONE)
                assert b'"code":"provider_disconnected"' in raw
            else:
                assert (asked, raw) == (2, b"".join(again)), (number, how)


async def test_json_that_was_asked_for_is_asked_for_again(make_server: MakeServer) -> None:
    turn = Turn(text=('{"a"', ": 1", "}"), calls=0)
    provider = CuttingProvider(turn)
    async with cutting(make_server, provider, 5, continuation="prefill") as server:
        for cut in range(1, 4):
            wish: dict[str, Any] = {"response_format": {"type": "json_object"}}
            seen = await ask(server, CHAT, f"p{cut}", **wish)

            assert (seen.text, seen.end) == ('{"a": 1}', "complete")
            assert b'"id":"c-1"' not in seen.raw
            assert provider.bodies[-1] == provider.bodies[-2]


async def test_text_in_front_of_a_call_comes_at_once(make_server: MakeServer) -> None:
    turn, goes_on = Turn(text=TEXT), asyncio.Event()

    async def wait(peer: Peer) -> None:
        await goes_on.wait()
        peer.write(chunk(b"".join(turn.events(CHAT, 1)[5:])) + LAST_CHUNK)

    provider = CuttingProvider(turn, ending=wait)
    async with cutting(make_server, provider, 6) as server:
        body = {"model": "p5/m", "stream": True, "messages": [{"role": "user", "content": "Go"}]}
        headers = {"x-aioserver-hold": "calls"}
        url = f"{server.v1}/chat/completions"
        async with server.session.post(url, json=body, headers=headers) as response:
            raw = b""
            while b"look. " not in raw:
                raw += await response.content.readany()
            assert b"tool_calls" not in raw
            goes_on.set()
            raw += await response.content.read()
        whole = turn.events(CHAT, 1)
        assert raw == b"".join((*whole[:-2], whole[-1]))


async def test_an_agents_turn_is_held_by_the_headers_that_it_sends(
    make_server: MakeServer,
) -> None:
    provider = CuttingProvider(CALLS, cuts=0)
    async with cutting(make_server, provider, 1, {"chat.streams.hold": "agents"}) as server:
        for headers, word in (
            ({}, None),
            ({"x-session-id": "s"}, "calls"),
            ({"x-claude-code-session-id": "s"}, "calls"),
            ({"session-id": "s", "x-codex-parent-thread-id": "t"}, "turn"),
            ({"x-session-id": "s", "x-parent-session-id": "t"}, "turn"),
            ({"x-session-id": "s", "x-aioserver-hold": "preamble"}, None),
        ):
            seen = await ask(server, CHAT, "p0", "", headers)

            assert seen.headers.get("x-aioserver-hold") == word, headers


async def test_a_word_that_is_none_is_refused_and_nobody_is_asked(
    make_server: MakeServer,
) -> None:
    provider = CuttingProvider(CALLS)
    async with cutting(make_server, provider, 1) as server:
        for word in ("agents", "all", ""):
            headers = {"x-aioserver-hold": word}
            url, body = f"{server.v1}/chat/completions", {"model": "p0/m"}
            async with server.session.post(url, json=body, headers=headers) as response:
                assert response.status == 400
                error = (await response.json())["error"]
            assert (error["code"], error["param"]) == ("invalid_request", "x-aioserver-hold")
            question = {"request_id": "q", "text": "Go", "model": "p0/m", "hold": word}
            async with server.session.post(server.sse, json=question) as response:
                assert response.status == 400
                assert (await response.json())["error"]["param"] == "hold"
        assert not provider.asked


@pytest.mark.parametrize("word", ["calls", "turn"])
async def test_turn_on_our_own_faces_is_asked_for_again(
    make_server: MakeServer, word: str
) -> None:
    turn = Turn(reasoning=REASONING)
    count, whole = _count(turn, CHAT, bridged=False)
    provider = CuttingProvider(turn)
    async with cutting(make_server, provider, count) as server:
        for cut in range(count):
            question = {"request_id": f"q{cut}", "text": "Go", "model": f"p{cut}/m", "hold": word}
            async with server.session.post(server.sse, json=question) as response:
                frames = [json.loads(event.data) for event in parse(await response.read())]

            attempts = 1 if cut >= whole else 2
            assert provider.asked[f"p{cut}"] == attempts
            assert [frame["event_id"] for frame in frames] == list(range(1, len(frames) + 1))
            assert frames[-1]["status"] == "complete"
            told = frames[-1]["chunk"]["metadata"].get("attempts")
            assert told == (2 if attempts == 2 else None)
            chunks = [frame["chunk"] for frame in frames[1:-1]]
            pieces = [
                piece for each in chunks if each["type"] == "tool_calls" for piece in each["data"]
            ]
            assert "".join(piece["function"]["arguments"] for piece in pieces) == 2 * ARGUMENTS
            named = [piece["id"] for piece in pieces if "id" in piece]
            assert named == [f"call_{attempts}_0", f"call_{attempts}_1"]
            thoughts = "".join(each["data"] for each in chunks if each["type"] == "reasoning")
            assert thoughts == ("I " if (word, cut) == ("calls", 2) else "I think ")


@pytest.mark.virtual_time
@pytest.mark.parametrize(
    ("face", "heartbeat"),
    [
        ("chat completions", b": keep-alive\n\n"),
        ("Messages", b'event: ping\ndata: {"type":"ping"}\n\n'),
        ("Responses", b": keep-alive\n\n"),
    ],
)
@pytest.mark.parametrize("text", [(), TEXT])
async def test_heartbeats_go_out_while_calls_are_held(
    make_server: MakeServer, face: str, heartbeat: bytes, text: tuple[str, ...]
) -> None:
    path, _ = FACES[face]
    turn = Turn(text=text)
    count, whole = _count(turn, path, bridged=False)
    events = turn.events(path, 1)

    async def wait(peer: Peer) -> None:
        await asyncio.sleep(1.0)
        peer.write(chunk(b"".join(events[whole - 1 :])) + LAST_CHUNK)

    provider = CuttingProvider(turn, ending=wait)
    changes = {"chat.websocket.ping_interval": 0.2}
    async with cutting(make_server, provider, count, changes) as server:
        seen = await ask(server, path, f"p{whole - 1}")

        assert seen.end == "complete"
        assert provider.asked == {f"p{whole - 1}": 1}
        # Between the text and the calls.
        before = seen.raw[seen.raw.index(b"look") :] if text else seen.raw
        before = before[: before.index(b"call_1_0")]
        assert before.count(heartbeat) >= 3


@pytest.mark.virtual_time
@pytest.mark.parametrize("face", FACES)
async def test_a_client_with_heartbeats_is_told_that_a_turn_is_asked_for_again(
    make_server: MakeServer, face: str
) -> None:
    path, bridged = FACES[face]
    events = CALLS.events(CHAT if bridged else path, 1)[:7]
    first = _first_call(events)

    async def wait(_peer: Peer) -> None:
        await asyncio.sleep(0.5)

    provider = CuttingProvider(CALLS, ending=wait)
    changes = {"chat.websocket.ping_interval": 0.2}
    async with cutting(make_server, provider, 8, changes, bridged=bridged) as server:
        seen = await ask(server, path, "p7")

        assert provider.asked == {"p7": 2}
        assert seen.end == "complete"
        held = sum(map(len, events[first:]))
        told = f": again from=p7 to=p7 code=provider_disconnected held={held}\n\n"
        assert seen.raw.count(told.encode()) == seen.raw.count(b": again") == 1
        assert b"call_1_" not in seen.raw
        # Before the head is out it has no one to tell.
        provider.ending = None
        assert b": again" not in (await ask(server, path, "p6")).raw


async def test_a_keys_own_word_counts_before_that_of_the_server(make_server: MakeServer) -> None:
    provider = CuttingProvider(CALLS, cuts=0)
    keys = {
        "auth.keys": [
            {"name": "a", "sha256": hashlib.sha256(b"sk-a").hexdigest(), "hold": "turn"},
            {"name": "b", "sha256": hashlib.sha256(b"sk-b").hexdigest()},
        ],
        "chat.streams.hold": "calls",
    }
    async with cutting(make_server, provider, 1, keys) as server:
        for key, hold, word in (("a", "", "turn"), ("a", "calls", "calls"), ("b", "", "calls")):
            headers = {"Authorization": f"Bearer sk-{key}"}
            seen = await ask(server, CHAT, "p0", hold, headers)

            assert seen.headers["x-aioserver-hold"] == word


async def test_what_is_held_counts_for_the_bytes_that_are_kept(make_server: MakeServer) -> None:
    turn, goes_on = Turn(calls=30), asyncio.Event()
    events = turn.events(CHAT, 1)

    async def wait(peer: Peer) -> None:
        await goes_on.wait()
        peer.write(chunk(b"".join(events[100:])) + LAST_CHUNK)

    provider = CuttingProvider(turn, ending=wait)
    async with cutting(make_server, provider, 101) as server:
        asked = asyncio.ensure_future(ask(server, CHAT, "p100"))
        store = server.context.gateway.lifetime.store
        held = sum(map(len, events[1:100]))
        await until(lambda: store.stats().bytes > held - 4096)
        goes_on.set()
        assert len((await asked).calls) == 30
        await until(lambda: not store.stats().bytes)


async def test_a_tool_of_the_provider_is_never_run_twice(make_server: MakeServer) -> None:
    use = {"type": "server_tool_use", "id": "srv_1", "name": "web_search", "input": {}}
    hosted = _event("content_block_start", index=1, content_block=use)

    async def search(peer: Peer) -> None:
        peer.write(chunk(hosted))

    for word in ("calls", "turn"):
        provider = CuttingProvider(CALLS, ending=search)
        async with cutting(make_server, provider, 8) as server:
            seen = await ask(server, MESSAGES, "p7", word)

            assert provider.asked == {"p7": 1}
            assert hosted in seen.raw
            assert seen.end == "provider_disconnected"


async def test_whole_answer_that_is_cut_is_asked_for_again(make_server: MakeServer) -> None:
    asked = 0
    message = {"role": "assistant", "content": "Whole"}
    body = _json({"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"

    async def play(peer: Peer) -> None:
        nonlocal asked
        await peer.request()
        asked += 1
        await peer.send(head % len(body), body[: 20 if asked in (1, 3) else None])

    async with ScriptedProvider(play) as scripted:
        entry = provider_entry(scripted.url, max_retries=2, backoff_factor=0.0)
        server = await make_server(**{"llm.providers.p": entry})
        url, question = f"{server.v1}/chat/completions", {"model": "p/m", "messages": []}
        for word, status, times in (("calls", 200, 2), ("preamble", 502, 3)):
            headers = {"x-aioserver-hold": word}
            async with server.session.post(url, json=question, headers=headers) as response:
                assert response.status == status
            assert asked == times


async def _held(
    server: RunningServer, entry: str, events: asyncio.Event, **members: Any
) -> tuple[asyncio.Task[SeenTurn], float]:
    """Begin to ask *entry* for a turn, of which calls are held from then on; return the answer to
    come, and the bytes that are kept then.
    """
    asked = asyncio.create_task(ask(server, CHAT, entry, **members))
    await events.wait()
    return asked, server.context.gateway.lifetime.store.stats().bytes


async def test_held_calls_are_shown_where_another_request_needs_the_room_of_the_question(
    make_server: MakeServer,
) -> None:
    goes_on, held = asyncio.Event(), asyncio.Event()

    async def wait(_peer: Peer) -> None:
        held.set()
        await goes_on.wait()

    provider = CuttingProvider(CALLS, ending=wait)
    changes = {"chat.websocket.concurrency.max_body_bytes": 20_000}
    async with cutting(make_server, provider, 7, changes, read_timeout=1000.0) as server:
        provider.asked["p0"] = 1
        asked, _ = await _held(server, "p6", held, user="x" * 15_000)
        other = await ask(server, CHAT, "other", user="y" * 15_000, model="p0/m")
        goes_on.set()
        seen = await asked

        assert other.end == "complete"
        # It could not be asked for again.
        assert provider.asked["p6"] == 1
        assert seen.end == "provider_disconnected"
        assert seen.calls["call_1_0"] == ARGUMENTS
        turns = await server.counted("held_turns", "hold", "result")
        assert turns["calls", "let_go"] == 1


async def test_what_is_held_is_shown_before_others_are_refused_for_want_of_room(
    make_server: MakeServer,
) -> None:
    goes_on, held = asyncio.Event(), asyncio.Event()
    # The head is out, so that what is let go is written at once.
    turn = Turn(text=TEXT, calls=60)

    async def wait(peer: Peer) -> None:
        held.set()
        await goes_on.wait()

    provider = CuttingProvider(turn, ending=wait)
    changes = {"chat.streams.max_kept_bytes": 45_000, "chat.streams.max_stream_bytes": 90_000}
    async with cutting(make_server, provider, 230, changes, read_timeout=1000.0) as server:
        asked, kept = await _held(server, "p229", held)
        assert kept > 30_000
        provider.asked["p0"] = 1
        store = server.context.gateway.lifetime.store
        # As somebody else's answers would.
        with store.hold() as bytes_of_others:
            bytes_of_others.grow(20_000)
            assert store.stats().bytes < kept
            other = await ask(server, CHAT, "p0", "preamble")
        goes_on.set()
        seen = await asked

        assert other.end == "complete"
        assert seen.end == "provider_disconnected"
        assert len(seen.calls) > 50


async def test_tokens_of_a_turn_that_is_dropped_are_estimated_by_what_has_come(
    make_server: MakeServer, tmp_path: Path
) -> None:
    provider = CuttingProvider(Turn(calls=10))
    changes = {"usage.path": str(tmp_path)}
    async with cutting(make_server, provider, 39, changes) as server:
        seen = await ask(server, CHAT, "p38")
        assert seen.end == "complete"

        def lines() -> list[str]:
            texts = [file.read_text() for file in tmp_path.glob("*.jsonl")]
            return [line for text in texts for line in text.splitlines()]

        await until(lambda: len(lines()) == 2)
        cut, whole = map(json.loads, lines())
        # 38 events came, the first of which has no content.
        assert (cut["outcome"], cut["source"], cut["out"]) == ("cut", "estimate", 37)
        assert (whole["outcome"], whole["source"], whole["out"]) == ("ok", "provider", 9)


async def test_text_after_a_turn_of_calls_that_was_cut_has_made_it_good(
    make_server: MakeServer,
) -> None:
    provider = CuttingProvider(CALLS, later=Turn(text=TEXT, calls=0))
    async with cutting(make_server, provider, 7) as server:
        seen = await ask(server, CHAT, "p6")

        assert (seen.text, seen.end, seen.calls) == ("Let me look. ", "complete", {})
        turns = await server.counted("held_turns", "hold", "result")
        assert turns["calls", "rescued"] == 1
        stats = server.context.monitor.snapshot
        await until(lambda: server.context.monitor.snapshot is not stats)
        shown = server.context.monitor.snapshot
        assert shown["providers"]["p6"]["rescued"] == 1
        assert shown["streams"]["held"] == {"answers": 0, "bytes": 0}


async def test_calls_behind_a_tool_of_the_provider_are_held(make_server: MakeServer) -> None:
    def block(index: int, start: dict[str, Any], *deltas: dict[str, Any]) -> list[bytes]:
        return [
            _event("content_block_start", index=index, content_block=start),
            *(_event("content_block_delta", index=index, delta=delta) for delta in deltas),
            _event("content_block_stop", index=index),
        ]

    use = {"type": "server_tool_use", "id": "srv_1", "name": "web_search", "input": {}}
    result = {"type": "web_search_tool_result", "tool_use_id": "srv_1", "content": []}
    call = {"type": "tool_use", "id": "call_1", "name": "read", "input": {}}
    piece = {"type": "input_json_delta", "partial_json": '{"query": '}
    shown = [*block(0, use, piece), *block(1, result)]

    async def search(peer: Peer) -> None:
        peer.write(b"".join(map(chunk, [*shown, *block(2, call, piece)])))

    provider = CuttingProvider(Turn(), ending=search)
    async with cutting(make_server, provider, 2) as server:
        seen = await ask(server, MESSAGES, "p1")

        assert provider.asked == {"p1": 1}
        assert seen.raw.endswith(b"".join(shown) + seen.raw[seen.raw.rindex(b"event: error") :])
        assert b"call_1" not in seen.raw


@pytest.mark.parametrize("bridged", [True, False])
async def test_a_response_in_the_background_is_held_where_it_is_translated(
    make_server: MakeServer, *, bridged: bool
) -> None:
    provider = CuttingProvider(CALLS)
    async with cutting(make_server, provider, 9, bridged=bridged) as server:
        seen = await ask(server, RESPONSES, "p8", background=True, store=True)

        # Its client waits for the id of its provider.
        assert provider.asked == {"p8": 1 + bridged}
        assert seen.end == ("complete" if bridged else "provider_disconnected")
        assert seen.headers.get("x-aioserver-hold") == ("calls" if bridged else None)
        assert (list(seen.calls.values()) == [ARGUMENTS] * 2) is bridged


async def test_the_handshake_of_a_websocket_and_its_questions_say_what_is_held(
    make_server: MakeServer,
) -> None:
    provider = CuttingProvider(CALLS)
    async with cutting(make_server, provider, 8) as server:
        headers = {"x-aioserver-hold": "calls"}
        async with server.session.ws_connect(server.ws, headers=headers) as ws:
            for entry, payload, end in (
                ("p6", {}, "complete"),
                ("p7", {"hold": "preamble"}, "error"),
            ):
                question = {"text": "Go", "model": f"{entry}/m", **payload}
                await ws.send_json({"action": "chat", "request_id": entry, "payload": question})
                status = ""
                while status not in ("complete", "error"):
                    status = (await ws.receive_json())["status"]

                assert status == end
        assert provider.asked == {"p6": 2, "p7": 1}
