"""What is made good where a provider fails, and no answer can be continued: what the caller sees, and
how often each provider is asked. tests/support/board.py has the faults with `continuation`.
"""

from __future__ import annotations

import asyncio
import json
from itertools import product
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from aioserver.protocol.eventstream import HEARTBEAT
from tests.support.faces import over_openai
from tests.support.scripted_faults import (
    FACES,
    RESPONSE,
    TEXT,
    Answer,
    Scripted,
    Step,
    after,
    answer_to,
    counted,
    cut,
    error_event,
    good,
    nonsense,
    over_responses,
    reset,
    silent,
    status,
    two,
)
from tests.support.scripted_provider import LAST_CHUNK, Peer, chunk

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.support.server import MakeServer

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
    "500 once": Row((status(500), good), (2, 0)),
    "503 always": Row((status(503),), (2, 1)),
    "reset before the head, new connections, always": Row((reset,), (2, 1)),
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
}


# Every fault on the face that all others stand on, streamed and whole; on each face one of those
# that are told apart there: an error and a verdict before the first word, and an answer that
# breaks off; and on the face that the board lacks a retry and a fallback. The board has faults on
# all other faces, with `continuation`.
SHOWN = (
    "an error before the first word",
    "a verdict before the first word",
    "cut after 40 of 60 words",
)
ONLY_HERE = ("500 once", "503 always")
CELLS = {
    *product([name for name in FAULTS if name not in ONLY_HERE], ("v1 streamed", "v1 whole")),
    *product(SHOWN, FACES),
    *product(ONLY_HERE, ["responses"]),
}


@pytest.mark.parametrize(("name", "face"), sorted(CELLS))
async def test_each_fault_on_each_face(name: str, face: str, make_server: MakeServer) -> None:
    row, (streamed, ask) = FAULTS[name], FACES[face]
    asked, code = (row.asked, row.code) if streamed or row.whole is None else row.whole
    first, second = Scripted(*row.steps), Scripted(good)
    bridged = {f"llm.providers.{name}.responses": False for name in ("first", "second")}
    changes = bridged if face == "responses bridged" else {}
    async with two(make_server, first, second, changes, **row.limits) as server:
        seen = await ask(server, "m")
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


async def test_a_kept_connection_that_is_reset_is_seen_by_nobody(make_server: MakeServer) -> None:
    first, second = Scripted(good, reset, good), Scripted(good)
    async with two(make_server, first, second, max_retries=0) as server:
        await over_openai(server, "m")
        seen = await over_responses(server, "m")

    assert (seen.end, seen.text) == ("complete", TEXT)
    assert (first.asked, second.asked) == (3, 0)


async def test_a_slow_first_word_is_waited_for_and_comes_with_its_preamble(
    make_server: MakeServer,
) -> None:
    transcript = asyncio.Event()

    async def slow(peer: Peer, answer: Answer) -> bool:
        await peer.send(answer.head, *map(chunk, answer.opening))
        await transcript.wait()
        rest = (*answer.words, *answer.closing, answer.mark)
        peer.write(b"".join(map(chunk, rest)) + LAST_CHUNK)
        return True

    first, second = Scripted(slow), Scripted(good)
    quick = {"chat.websocket.ping_interval": 0.1}
    async with two(make_server, first, second, quick, read_timeout=30.0) as server:
        asked = {"stream": True, "stream_options": {"include_usage": True}}
        body = {"model": "m", "messages": [], **asked}
        async with server.session.post(f"{server.v1}/chat/completions", json=body) as response:
            # The head, and a heartbeat: nothing of the answer.
            assert await response.content.readuntil(b"\n\n") == HEARTBEAT
            transcript.set()
            raw = await response.read()

    answer = answer_to(b'POST /v1/chat/completions\r\n\r\n{"stream":true}')
    sent = b"".join((*answer.opening, *answer.words, *answer.closing, answer.mark))
    assert raw.replace(HEARTBEAT, b"") == sent
    assert (first.asked, second.asked) == (1, 0)


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
