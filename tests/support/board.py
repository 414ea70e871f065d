"""Sixteen faults of a provider, each asked for on each face, streamed and whole, with a fallback,
two retries, and `continuation` on; and how the answer is scored that the client sees:

    pass      the whole right answer; of a verdict, that verdict, which nobody else is asked about
    partial   the beginning of it, and an honest error
    safe      an honest error
    fail      anything else: a wrong text, a false end, a lost answer, a wrong account

Times are those of virtual time (jumping_loop.py).

    python -m tests.support.board        prints the table of docs/rescue.md
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import aiohttp

from tests.support.faces import over_openai
from tests.support.jumping_loop import JumpingLoop
from tests.support.scripted_faults import (
    FACES,
    TEXT,
    Answer,
    Ask,
    Scripted,
    Step,
    after,
    counted,
    cut,
    good,
    no_done,
    nonsense,
    reset,
    silent,
    status,
    two,
)
from tests.support.scripted_provider import LAST_CHUNK, Peer, chunk
from tests.support.server import QUICK, running

if TYPE_CHECKING:
    from tests.support.server import MakeServer, RunningServer
    from tests.support.simulator import Behaviour

PASS, PARTIAL, SAFE, FAIL = "pass", "partial", "safe", "fail"
# A native response is not continued.
ASKED = {name: face for name, face in FACES.items() if name != "responses"}
LIMITS = {
    "max_retries": 2,
    "backoff_factor": 0.5,
    "read_timeout": 6.0,
    "first_token_timeout": 4.0,
}
SETTINGS = {
    "llm.providers.first.continuation": "prefill",
    "llm.providers.second.continuation": "prefill",
}
# Seconds of an outage, between two questions, and after the outage until its end is noticed.
OUTAGE, BETWEEN, AFTERWARDS = 60.0, 3.0, 12.0


class Line(NamedTuple):
    """What came of one fault on one face: how it is scored, and how often the first provider and
    its fallback were asked; None: that is not said.
    """

    score: str
    asked: tuple[int, int] | None

    def __str__(self) -> str:
        return (
            self.score
            if self.asked is None
            else f"{self.score}, {self.asked[0]} + {self.asked[1]}"
        )


def _slow(seconds: float) -> Step:
    """Say nothing for so many seconds, and then the whole answer."""

    async def play(peer: Peer, answer: Answer) -> bool:
        if answer.mark:
            await peer.send(answer.head, *map(chunk, answer.opening))
            answer = answer._replace(head=b"", opening=[])
        left = asyncio.ensure_future(peer.left())
        await asyncio.wait([left], timeout=seconds)
        if left.done():
            return False
        left.cancel()
        parts = (*answer.opening, *answer.words, *answer.closing, answer.mark)
        peer.write(answer.head + b"".join(chunk(part) for part in parts if part) + LAST_CHUNK)
        return False

    return play


def _refusing(step: Step) -> Step:
    """Do *step*, but refuse a request that says the beginning of the answer."""
    refuse = status(400, code="invalid_request_error")

    async def play(peer: Peer, answer: Answer) -> bool:
        return await (refuse if answer.said else step)(peer, answer)

    return play


class _Outage:
    """A provider that is away for a while from its first request on."""

    def __init__(self) -> None:
        self._back_at = 0.0

    async def play(self, peer: Peer, answer: Answer) -> bool:
        now = asyncio.get_running_loop().time()
        self._back_at = self._back_at or now + OUTAGE
        return await (reset if now < self._back_at else good)(peer, answer)


class Fault(NamedTuple):
    """What the first provider does, and its fallback; *asked* is how often each is asked where the
    answer is streamed, and where it is *whole*, if that differs; None: that is not said.
    """

    first: tuple[Step, ...]
    asked: tuple[int, int] | None
    whole: tuple[int, int] | None = None
    second: Step = good
    # How the streamed answer is scored.
    score: str = PASS


POLICY, KEPT = "content policy", "reset before the head, a kept connection"
BROKEN = ("cut after 40 of 60 words", "cut, and the fallback takes no beginning")
AWAY, ACCOUNTS = "away for 60 s, and back", "503, by the accounts"
FAULTS: dict[str, Fault] = {
    "429 with `Retry-After`": Fault((status(429, b"Retry-After: 7"),), (1, 1)),
    "429 without": Fault((status(429),), (1, 1)),
    "500 once": Fault((status(500), good), (2, 0)),
    "503 always": Fault((status(503),), (3, 1)),
    "reset before the head, a new connection": Fault((reset, good), (2, 0)),
    KEPT: Fault((good, reset, good), (3, 0)),
    "no answer for 120 s": Fault((_slow(120.0),), (1, 1)),
    "the first word after 20 s": Fault((_slow(20.0),), (1, 1)),
    BROKEN[0]: Fault((after(40, cut),), (2, 1), (1, 1)),
    "silent after 20 words": Fault((after(20, silent),), (1, 1)),
    "an event that is no JSON": Fault((after(20, nonsense),), (2, 1), (1, 1)),
    "no `[DONE]`": Fault((no_done,), (1, 0)),
    "the context is too long": Fault((status(400, code="context_length_exceeded"),), (1, 1)),
    POLICY: Fault((status(400, code="content_policy_violation"),), (1, 0)),
    BROKEN[1]: Fault((after(40, cut),), (2, 1), (1, 1), _refusing(good), PARTIAL),
    AWAY: Fault((), None),
    ACCOUNTS: Fault((status(503),), (3, 1)),
}


async def run(name: str, face: str, make_server: MakeServer) -> Line:
    """Ask a server with the fault *name* on *face*, and score what came of it."""
    fault, (_, ask) = FAULTS[name], ASKED[face]
    away = name == AWAY
    steps = (_Outage().play,) if away else fault.first
    first, second = Scripted(*steps, anew=True), Scripted(fault.second)
    bridged = {f"llm.providers.{each}.responses": False for each in ("first", "second")}
    changes = {**SETTINGS, **(bridged if face == "responses bridged" else {})}
    async with two(make_server, first, second, changes, **LIMITS) as server:
        if name == KEPT:
            # It leaves the connection that is reset.
            await over_openai(server, "m")
        scores = [await _scored(server, ask, name, 0)]
        if away:
            for number in range(1, round((OUTAGE + AFTERWARDS) / BETWEEN)):
                await asyncio.sleep(BETWEEN)
                scores.append(await _scored(server, ask, name, number))
            elsewhere = second.asked
            scores.append(await _scored(server, ask, name, len(scores)))
            if second.asked != elsewhere:
                # The first one is back, and not asked yet.
                scores.append(FAIL)
        await server.nothing_held()
        asked = first.asked, second.asked
        if not await _accounts_right(server, name, asked):
            scores.append(FAIL)
    worst = max(scores, key=(PASS, PARTIAL, SAFE, FAIL).index)
    return Line(worst, None if away else asked)


async def _scored(server: RunningServer, ask: Ask, name: str, number: int) -> str:
    try:
        seen = await ask(server, f"m{number}")
    except (aiohttp.ClientError, AssertionError, ValueError, TimeoutError):
        # Lost, or not what it should be.
        return FAIL
    if seen.end == "complete":
        return PASS if seen.text == TEXT and name != POLICY else FAIL
    if not seen.error or not TEXT.startswith(seen.text):
        return FAIL
    if name == POLICY:
        return PASS if "No." in json.dumps(seen.error) else SAFE
    return PARTIAL if seen.text else SAFE


async def _accounts_right(server: RunningServer, name: str, asked: tuple[int, int]) -> bool:
    """Return whether each attempt is counted where it was made, and each token where it was paid
    for.
    """
    attempts = {each: counted(server, each) for each in ("first", "second")}
    if tuple(sum(attempts[each].values()) for each in attempts) != asked:
        return False
    if name != ACCOUNTS:
        return True
    tokens = await server.counted("tokens", "provider", "type")
    return (
        attempts == {"first": {"http_5xx": asked[0]}, "second": {"ok": 1}}
        and set(tokens) <= {("second", "input"), ("second", "output")}
        and (tokens["second", "input"], tokens["second", "output"]) == (5, 60)
        and sum((await server.counted("failovers", "provider")).values()) == 1
        and sum((await server.counted("retries", "provider")).values()) == asked[0] - 1
    )


def expected(name: str, *, streamed: bool) -> Line:
    """Return what must come of the fault *name*, on each face."""
    fault = FAULTS[name]
    if streamed:
        return Line(fault.score, fault.asked)
    return Line(PASS, fault.whole or fault.asked)


def row(name: str, streamed: object, whole: object) -> str:
    """Return the row of the fault *name* in the table of docs/rescue.md."""
    return f"| {name} | {streamed} | {whole} |"


async def _alone(name: str, face: str) -> Line:
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())

        async def make_server(behaviour: Behaviour = QUICK, /, **changes: Any) -> RunningServer:
            path = Path(folder) / "config.yaml"
            return await stack.enter_async_context(running(path, behaviour, changes))

        return await run(name, face, make_server)


def _cell(name: str, *, streamed: bool) -> str:
    """Return what comes of the fault *name*: one result, or those of faces that differ."""
    lines = {}
    for face in (face for face, (kind, _) in ASKED.items() if kind is streamed):
        with asyncio.Runner(loop_factory=JumpingLoop) as runner:
            lines[face] = str(runner.run(_alone(name, face)))
    if len(set(lines.values())) == 1:
        return lines.popitem()[1]
    return "; ".join(f"{face}: {line}" for face, line in lines.items())


def _print_table() -> None:
    print("| fault | streamed | whole |\n| --- | --- | --- |")
    for name in FAULTS:
        cells = _cell(name, streamed=True), _cell(name, streamed=False)
        print(row(name, *cells), flush=True)


if __name__ == "__main__":
    _print_table()
