"""Held turns that break off at any byte, by seeds: each is whole, and of one attempt. The mark
`stress` has ten thousand of them.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from aioserver.protocol.eventstream import parse
from tests.support.held_turns import (
    ARGUMENTS,
    FACES,
    RESPONSES,
    CuttingProvider,
    SeenTurn,
    Turn,
    ask,
    cutting,
)
from tests.support.scripted_provider import EVENT_STREAM, LAST_CHUNK, Peer, chunk

if TYPE_CHECKING:
    from tests.support.server import MakeServer, RunningServer

# Our own face has no path. A native response is never continued, so its text is held.
ALL_FACES = {**FACES, "SSE": ("", True)}
# Turns of a piece, each of which has a provider of its own, so that none is found to be sick.
PIECE = 40
_SEED = re.compile(rb"turn ([0-9]+)")


def drawn(seed: int, *, text: bool) -> Turn:
    """Return the turn of *seed*, with a text in front of its calls perhaps."""
    dice = random.Random(f"turn {seed}")
    reasoning = [f"thought{number} " for number in range(dice.choice((0, 0, 3)))]
    words = [f"word{number} " for number in range(dice.choice((0, 2, 12)))] if text else []
    return Turn(reasoning, words, dice.choice((1, 2, 5)))


@dataclass
class AnywhereProvider(CuttingProvider):
    """Cuts the first attempt of each turn at some byte, and says the rest of a text."""

    turn: Turn = field(default_factory=Turn)
    text: bool = True
    attempts: Counter[int] = field(default_factory=Counter)

    async def play(self, peer: Peer) -> None:
        while True:
            head, _, body = (await peer.request()).partition(b"\r\n\r\n")
            match = re.match(rb"POST /\w+/v1/([a-z/]+)", head)
            seed = _SEED.search(body)
            assert match is not None
            assert seed is not None
            number = int(seed[1])
            self.attempts[number] += 1
            attempt, dice = self.attempts[number], random.Random(f"cut {number}")
            turn = drawn(number, text=self.text)
            said = _said(json.loads(body))
            if said:
                whole = "".join(turn.text)
                assert whole.startswith(said)
                turn = Turn((), [whole[len(said) :]] if whole != said else (), turn.calls)
            stream = b"".join(turn.events(match[1].decode(), attempt))
            if attempt > 1:
                peer.write(EVENT_STREAM + chunk(stream) + LAST_CHUNK)
                continue
            shown = stream[: dice.randrange(1, len(stream))]
            size = dice.choice((7, 100, 400, len(stream)))
            pieces = [shown[start : start + size] for start in range(0, len(shown), size)]
            await peer.send(EVENT_STREAM, *map(chunk, pieces))
            peer.abort() if dice.random() < 0.5 else peer.close()
            return


def _said(body: dict[str, Any]) -> str:
    """Return what the model is told to go on with."""
    last = (body.get("messages") or [{}])[-1]
    if last.get("role") != "assistant":
        return ""
    content = last["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


async def _over_sse(server: RunningServer, entry: str, hold: str, text: str) -> SeenTurn:
    question = {"request_id": text, "text": text, "model": entry, "hold": hold}
    async with server.session.post(server.sse, json=question) as response:
        seen = SeenTurn(await response.read())
    names: dict[int, str] = {}
    for event in parse(seen.raw):
        frame = json.loads(event.data)
        match frame["status"], frame["chunk"].get("type"):
            case "chunk", "text":
                seen.text += frame["chunk"]["data"]
            case "chunk", "reasoning":
                seen.reasoning += frame["chunk"]["data"]
            case "chunk", "tool_calls":
                for call in frame["chunk"]["data"]:
                    name = names.setdefault(call["index"], call.get("id"))
                    piece = call["function"]["arguments"]
                    seen.calls[name] = seen.calls.get(name, "") + piece
            case ("complete" | "error") as status, _:
                seen.end = status
    return seen


@pytest.mark.parametrize(
    "first",
    [
        0,
        *(
            pytest.param(first, marks=[pytest.mark.stress, pytest.mark.timeout(600)])
            for first in range(1, 21)
        ),
    ],
)
@pytest.mark.parametrize("hold", ["calls", "turn"])
@pytest.mark.parametrize("face", ALL_FACES)
async def test_turn_that_is_cut_anywhere_is_whole_and_of_one_attempt(
    make_server: MakeServer, face: str, hold: str, first: int
) -> None:
    path, bridged = ALL_FACES[face]
    provider = AnywhereProvider(text=path != RESPONSES or bridged or hold == "turn")
    async with cutting(
        make_server, provider, PIECE, bridged=bridged, continuation="prefill", spare=True
    ) as server:
        for entry in range(PIECE):
            seed = first * PIECE + entry
            text, turn = f"turn {seed}", drawn(seed, text=provider.text)
            question = [{"role": "user", "content": text}]

            if not path:
                seen = await _over_sse(server, f"t{entry}", hold, text)
            elif path == RESPONSES:
                seen = await ask(server, path, f"t{entry}", hold, input=text)
            else:
                seen = await ask(server, path, f"t{entry}", hold, messages=question)

            where = seed, seen
            assert seen.end == "complete", where
            assert seen.text == "".join(turn.text), where
            assert "".join(turn.reasoning).startswith(seen.reasoning), where
            assert list(seen.calls.values()) == [ARGUMENTS] * turn.calls, where
            assert provider.attempts[seed] <= 2, where
