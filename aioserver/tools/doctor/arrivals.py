"""Checks of streams: whether a proxy buffers their events, and how long a silent one stays open.

An answer of the simulated provider takes more than a second, and its events are evenly spread.
Behind a proxy that buffers, they arrive in few **bursts**.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from typing import TYPE_CHECKING

import aiohttp

from aioserver.tools import remote
from aioserver.tools.bench.clients import FaceClient, Question
from aioserver.tools.bench.results import Attempt, Results
from aioserver.tools.doctor.results import Result, fail, ok, skip, warn

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from aioserver.tools.doctor.facts import Facts

# The faces on which an answer is asked for, each with the subject of its result.
SUBJECTS = {"websocket": "WebSocket", "sse": "SSE", "openai": "OpenAI"}
# Seconds for one answer, whose provider may be slow.
ANSWER_TIMEOUT = 60.0
# Seconds between two events of one burst at most.
TOGETHER = 0.005
# Events without which an answer proves nothing, and the bursts in which a buffered answer comes at
# most.
MIN_EVENTS, MAX_BURSTS = 12, 3
# Tokens of a simulated answer, which then takes more than a second. The question for a model that
# costs money has a long enough answer, too.
SIMULATED_TOKENS = 40
COSTLY = Question(prompt="Count from 1 to 40, with a space between.", max_tokens=120)
# Seconds to open or to close a silent connection; and the seconds in which the server pings twice
# with the default of chat.websocket.ping_interval.
SILENCE_TIMEOUT, TWO_PINGS = 10.0, 41.0


class TimedAttempt(Attempt):
    """An attempt that also notes when each event of its answer came."""

    def __init__(self) -> None:
        self.times: list[float] = []
        super().__init__(Results())

    def event(self, *, token: bool = False) -> None:
        """Note an event."""
        self.times.append(time.perf_counter())
        super().event(token=token)


def bursts(times: Sequence[float]) -> int:
    """Return the number of bursts in which events arrived; *times* are seconds, in order."""
    gaps = (later - earlier for earlier, later in itertools.pairwise(times))
    return sum(gap > TOGETHER for gap in gaps) + bool(times)


def gathered(times: Sequence[float]) -> bool:
    """Return whether something has buffered an answer whose events arrived at *times*.

    The events of the answer must have been sent evenly.
    """
    return len(times) >= MIN_EVENTS and bursts(times) <= MAX_BURSTS


async def answers(facts: Facts) -> AsyncIterator[Result]:
    """Check on each face, at the same time, that the events of an answer arrive one by one.

    If every model costs money, only SSE is checked.
    """
    if facts.simulated is not None:
        question = Question(prompt="Hello", model=facts.simulated, max_tokens=SIMULATED_TOKENS)
        faces = [face for face in SUBJECTS if face != "websocket" or facts.upgraded]
    elif facts.ask:
        question, faces = COSTLY, ["sse"]
    else:
        yield skip("no answer was asked for: --no-ask, and no model is simulated")
        return
    for result in await asyncio.gather(*(_answer(facts, face, question) for face in faces)):
        yield result


async def _answer(facts: Facts, face: str, question: Question) -> Result:
    attempt, subject = TimedAttempt(), SUBJECTS[face]
    client = FaceClient(facts.session, face, facts.url, facts.paths[face], question)
    try:
        error = await client.request(attempt, ANSWER_TIMEOUT)
    finally:
        await client.close()
    times = attempt.times
    came = f"{len(times)} events in {bursts(times)} bursts"
    if error is not None:
        text = f"an answer failed: {remote.printable(error.code)}"
        return fail(text, "docs/errors.md explains its codes", subject=subject)
    if not gathered(times):
        took = times[-1] - times[0] if times else 0.0
        text = f"an answer came whole, each event as it was said: {came}"
        return ok(text, seconds=took, subject=subject)
    if facts.simulated is not None:
        text = f"an answer came whole, but something on the way gathers it: {came}"
        return fail(text, subject=subject)
    text = f"an answer came whole, in few pieces, unless the model did that: {came}"
    return warn(text, subject=subject)


async def silence(facts: Facts) -> AsyncIterator[Result]:
    """Keep a silent WebSocket open, and count the server's pings (RFC 6455, 5.5.2)."""
    seconds = facts.idle
    if not seconds:
        yield skip("not tested", "--idle 90 keeps one open for so many seconds")
        return
    began, pings = time.monotonic(), 0
    try:
        async with (
            asyncio.timeout(seconds + 2 * SILENCE_TIMEOUT),
            facts.session.ws_connect(
                f"{facts.url}{facts.paths['websocket']}",
                autoping=False,
                timeout=aiohttp.ClientWSTimeout(ws_close=SILENCE_TIMEOUT),
            ) as ws,
        ):
            while (left := began + seconds - time.monotonic()) > 0:
                try:
                    message = await ws.receive(timeout=left)
                except TimeoutError:
                    break
                if message.type is aiohttp.WSMsgType.PING:
                    pings += 1
                    await ws.pong(message.data)
                elif message.type is not aiohttp.WSMsgType.TEXT:
                    lived = time.monotonic() - began
                    yield fail(f"was closed after {lived:.0f} s, and {pings} pings of the server")
                    return
    except (aiohttp.ClientError, OSError) as error:
        yield fail(f"cannot be kept open: {remote.describe(error)}")
        return
    if seconds >= TWO_PINGS and not pings:
        yield warn(
            f"no ping of the server arrived in {seconds:g} s",
            "something on the way swallows them, or chat.websocket.ping_interval is long",
        )
    else:
        yield ok(f"lives for {seconds:g} s of silence, with {pings} pings of the server")
