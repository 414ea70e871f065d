"""A turn has one end, however its provider writes the end: with letters as escapes (RFC 8259, 7),
with other spaces, with its members in another order, and with another form of the event's name. A
deadline or a stop in front of its end mark is no error.
"""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from aioserver.protocol.request_headers import DEADLINE
from tests.support.held_turns import (
    ARGUMENTS,
    CHAT,
    FACES,
    MESSAGES,
    RESPONSES,
    TEXT,
    CuttingProvider,
    Turn,
    ask,
    cutting,
)
from tests.support.scripted_provider import Peer
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.server import MakeServer


def _escaped(content: Any) -> str:
    """Return *content* as JSON with each second letter of its strings as an escape."""
    letter = re.compile(r"([\w.])([a-z_.])")
    return re.sub(
        r'"([^"\\]*)"',
        lambda text: letter.sub(lambda pair: f"{pair[1]}\\u{ord(pair[2]):04x}", text[0]),
        json.dumps(content),
    )


def _upside_down(content: Any) -> Any:
    """Return *content* with the members of each object in the reverse order."""
    if isinstance(content, dict):
        return {name: _upside_down(content[name]) for name in reversed(content)}
    return [_upside_down(each) for each in content] if isinstance(content, list) else content


def _in_lines(content: Any) -> str:
    """Return *content* as JSON of several lines."""
    return "\ndata: ".join(json.dumps(content, indent=1).splitlines())


def _named(name: str, data: str) -> str:
    return f"event: {name}\ndata: {data}" if name else f"data: {data}"


def _named_behind(name: str, data: str) -> str:
    return f"data:{data}\nevent:{name}" if name else f"data:{data}"


# How the content of an event is written, and the lines of an event with a name and this data.
STYLES: dict[str, tuple[Callable[[Any], str], Callable[[str, str], str]]] = {
    "escapes": (_escaped, _named),
    "escapes without a name": (_escaped, lambda _name, data: f"data: {data}"),
    "spaces": (lambda content: json.dumps(content, separators=(" ,\t", " :  ")), _named),
    "upside down": (lambda content: json.dumps(_upside_down(content)), _named),
    "lines": (_in_lines, _named),
    "name behind": (json.dumps, _named_behind),
}


@dataclass(frozen=True)
class OddTurn(Turn):
    """A turn that is written in a *style*."""

    style: str = ""

    def events(self, path: str, attempt: int) -> list[bytes]:
        write, line = STYLES[self.style]
        events = []
        for event in super().events(path, attempt):
            name, _, data = event.decode().strip().rpartition("data: ")
            name = name.strip().removeprefix("event: ")
            odd = line(name, data if data == "[DONE]" else write(json.loads(data)))
            events.append(f"{odd}\n\n".encode())
        return events


@pytest.mark.both_loops
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("face", FACES)
async def test_turn_has_one_end_however_it_is_written(
    make_server: MakeServer, face: str, style: str
) -> None:
    path, bridged = FACES[face]
    asked = CHAT if bridged else path
    for turn in (
        OddTurn(style=style),
        OddTurn(text=TEXT, style=style),
        OddTurn(text=TEXT, calls=0, style=style),
    ):
        count = len(turn.events(asked, 1))
        # Behind so many events nothing is missing but the end mark.
        whole = count - {CHAT: 2, MESSAGES: 1, RESPONSES: 0}[asked]
        provider = CuttingProvider(turn)
        async with cutting(make_server, provider, count + 1, bridged=bridged) as server:
            for hold in ("preamble", "calls", "turn"):
                for cut in (whole // 2 + 1, whole - 1, *range(whole, count + 1)):
                    provider.asked.clear()

                    seen = await ask(server, path, f"p{cut}", hold)

                    where = hold, cut, seen.raw
                    if cut < whole and (hold == "preamble" or (hold == "calls" and turn.text)):
                        assert seen.end == "provider_disconnected", where
                        continue
                    attempts = 2 if cut < whole else 1
                    assert provider.asked == {f"p{cut}": attempts}, where
                    assert seen.end == "complete", where
                    assert seen.text == "".join(turn.text), where
                    assert list(seen.calls.values()) == [ARGUMENTS] * turn.calls, where


@pytest.mark.virtual_time
@pytest.mark.parametrize("hold", ["preamble", "calls", "turn"])
@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("ended_by", ["deadline", "stop"])
async def test_answer_that_lacks_its_end_mark_alone_is_complete(
    make_server: MakeServer, face: str, hold: str, ended_by: str
) -> None:
    path, bridged = FACES[face]
    turn = Turn(text=TEXT)
    asked = CHAT if bridged else path
    count = len(turn.events(asked, 1))
    # Behind so many events nothing is missing but the end mark; native responses have none.
    whole = count - {CHAT: 2, MESSAGES: 1, RESPONSES: 0}[asked]
    provider = CuttingProvider(turn, ending=Peer.left)
    stop = {"chat.websocket.shutdown_timeout": 5.0, "chat.websocket.drain_delay": 0}
    headers = {DEADLINE: "5"} if ended_by == "deadline" else {}
    async with cutting(make_server, provider, count, stop, bridged=bridged) as server:
        cuts = range(whole - 1, count)
        answers = asyncio.gather(*(ask(server, path, f"p{n}", hold, headers) for n in cuts))
        if ended_by == "stop":
            await until(lambda: provider.asked.total() == len(cuts))
            await server.runner.end()

        for cut, seen in zip(cuts, await answers, strict=True):
            where = cut, seen.raw
            if cut < whole:
                error = "deadline_exceeded" if ended_by == "deadline" else "server_shutdown"
                assert seen.end == error, where
                continue
            assert seen.end == "complete", where
            assert seen.text == "".join(turn.text), where
            assert list(seen.calls.values()) == [ARGUMENTS] * turn.calls, where
