"""A turn of calls that breaks off is made good: cut at every event, on every face, its client gets
all calls of one attempt, or none and an honest error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.held_turns import (
    CHAT,
    MESSAGES,
    PIECES,
    RESPONSES,
    CuttingProvider,
    Turn,
    ask,
    cutting,
)

if TYPE_CHECKING:
    from tests.support.server import MakeServer

FACES = {
    "chat completions": (CHAT, False),
    "Messages": (MESSAGES, False),
    "Messages, bridged": (MESSAGES, True),
    "Responses": (RESPONSES, False),
    "Responses, bridged": (RESPONSES, True),
}
CALLS = Turn()
ARGUMENTS = "".join(PIECES)


def _count(turn: Turn, path: str, *, bridged: bool) -> tuple[int, int]:
    """How many events a turn has, and behind how many it is whole."""
    asked = CHAT if bridged else path
    count = len(turn.events(asked, 1))
    return count, count - {CHAT: 2, MESSAGES: 1, RESPONSES: 0}[asked]


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
