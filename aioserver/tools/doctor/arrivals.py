"""Checks of streams: whether a proxy buffers their events, and how long a silent one stays open.

Two measurements find a proxy that buffers, and neither compares the clocks of two machines. An
answer of the simulated provider takes more than a second, and its events are evenly spread. Behind
a proxy that buffers, they arrive in few **bursts**. The snapshots of `/events` have the time at
which they were made. The **delay** of each, minus the smallest delay, is what the proxy has added.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from typing import TYPE_CHECKING

import aiohttp
import orjson

from aioserver.protocol.eventstream import EventTooLong
from aioserver.tools import remote
from aioserver.tools.bench.clients import FaceClient, Question
from aioserver.tools.bench.results import Attempt, Results
from aioserver.tools.doctor.results import Result, fail, ok, skip, warn

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from aioserver.tools.doctor.facts import Facts

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
# Snapshots that are compared, and the seconds between two of them.
SNAPSHOTS, INTERVAL = 3, 1.0
# Seconds that the network may add to a snapshot. A buffered snapshot is an interval late at least.
MAX_DELAY = 0.8
# Seconds for all snapshots together.
EVENTS_TIMEOUT = SNAPSHOTS * INTERVAL + 5.0
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


def noting(encodings: set[str]) -> aiohttp.TraceConfig:
    """Return a trace that adds the `Content-Encoding` of each streamed answer to *encodings*."""

    async def note(
        _session: object, _context: object, params: aiohttp.TraceRequestEndParams
    ) -> None:
        encoding = params.response.headers.get("Content-Encoding", "identity")
        if params.response.content_type == "text/event-stream" and encoding != "identity":
            encodings.add(encoding)

    trace = aiohttp.TraceConfig()
    trace.on_request_end.append(note)
    return trace


def bursts(times: Sequence[float]) -> int:
    """Return the number of bursts in which events arrived; *times* are seconds, in order."""
    gaps = (later - earlier for earlier, later in itertools.pairwise(times))
    return sum(gap > TOGETHER for gap in gaps) + bool(times)


def gathered(times: Sequence[float]) -> bool:
    """Return whether something has buffered an answer whose events arrived at *times*.

    The events of the answer must have been sent evenly.
    """
    return len(times) >= MIN_EVENTS and bursts(times) <= MAX_BURSTS


def answer(face: str) -> Callable[[Facts], AsyncIterator[Result]]:
    """Return the check that the events of an answer on *face* arrive one by one.

    If every model costs money, only SSE is checked.
    """

    async def look(facts: Facts) -> AsyncIterator[Result]:
        question = COSTLY
        if facts.simulated is not None:
            question = Question(prompt="Hello", model=facts.simulated, max_tokens=SIMULATED_TOKENS)
        elif face != "sse":
            return
        elif not facts.ask:
            yield skip("no answer was asked for: --no-ask, and no model is simulated")
            return
        attempt = TimedAttempt()
        client = FaceClient(facts.session, face, facts.url, facts.paths[face], question)
        try:
            error = await client.request(attempt, ANSWER_TIMEOUT)
        finally:
            await client.close()
        times = attempt.times
        came = f"{len(times)} events in {bursts(times)} bursts"
        if error is not None:
            code = remote.printable(error.code)
            yield fail(f"an answer failed: {code}", "docs/errors.md explains its codes")
        elif not gathered(times):
            took = times[-1] - times[0] if times else 0.0
            yield ok(f"an answer came whole, each event as it was said: {came}", seconds=took)
        elif facts.simulated is not None:
            yield fail(f"an answer came whole, but something on the way gathers it: {came}")
        else:
            yield warn(f"an answer came whole, in few pieces, unless the model did that: {came}")

    return look


async def snapshots(facts: Facts) -> AsyncIterator[Result]:
    """Compare the delays of several snapshots of `/events`."""
    delays: list[float] = []
    try:
        async with (
            asyncio.timeout(EVENTS_TIMEOUT),
            facts.session.get(
                f"{facts.url}/events",
                params={"interval": f"{INTERVAL:g}"},
                headers={"Accept": "text/event-stream"},
                allow_redirects=False,
            ) as response,
        ):
            if response.status != 200 or response.content_type != "text/event-stream":
                hint = "it wants an admin key, and a proxy that passes it"
                yield skip(f"not followed: HTTP {response.status}", hint)
                return
            async for event in remote.events(response):
                if event.event == b"stats":
                    match orjson.loads(event.data):
                        case {"time": int(made) | float(made)}:
                            delays.append(time.time() - made)
                if len(delays) > SNAPSHOTS:
                    break
    except TimeoutError:
        # A wait without an event says more than the events before it.
        delays = [0.0, 0.0, EVENTS_TIMEOUT]
    except (aiohttp.ClientError, OSError, EventTooLong, orjson.JSONDecodeError) as error:
        yield skip(f"not followed: {remote.describe(error)}")
        return
    # The first snapshot was made before the request, and may be an interval old.
    late = max(delays[1:], default=0.0) - min(delays[1:], default=0.0)
    if late > MAX_DELAY:
        yield fail(f"something on the way gathers events: one was {late:.1f} s late")
    elif len(delays) <= SNAPSHOTS:
        yield fail("the connection ended early")
    else:
        yield ok("each event arrives as it comes", seconds=late)


async def compression(facts: Facts) -> AsyncIterator[Result]:
    """Report the encodings of compressed streams."""
    yield warn(f"the proxy compresses streams ({', '.join(sorted(facts.encodings))})")


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
