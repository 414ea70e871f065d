"""The arrivals of streamed events: each as it comes, or many at once because something on the road
gathers them.

There are two measures, and neither compares the clocks of two machines. An answer of the simulated
provider takes more than a second, and its events are evenly spread: a proxy that gathers them lets
them come in few **bursts**. The snapshots of `/events` have the time at which they were made: the
**delay** of each, less that of the quickest, is what the road has added.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from typing import TYPE_CHECKING, NamedTuple

import aiohttp
import orjson

from aioserver.protocol.eventstream import EventTooLong
from aioserver.tools import remote
from aioserver.tools.bench.clients import FaceClient, Question
from aioserver.tools.bench.results import Attempt, Results

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aioserver.tools.doctor.findings import Report

# Seconds for one answer, whose provider may be slow.
ANSWER_TIMEOUT = 60.0
# Seconds between two events of one burst at most.
TOGETHER = 0.005
# Events from which on an answer says something, and the bursts in which it comes if it is
# gathered.
MIN_EVENTS = 12
MAX_BURSTS = 3
# Tokens of an answer of the simulated provider: a second and a bit.
SIMULATED_TOKENS = 40
# An answer long enough for that, of a model that costs money.
PROMPT = "Count from 1 to 40, with a space between."
MAX_TOKENS = 120
# Snapshots that are compared, and the seconds between two of them.
SNAPSHOTS = 3
INTERVAL = 1.0
# Seconds that the road may add to a snapshot. A gathered one is late by an interval at least.
MAX_DELAY = 0.8
# Seconds for all of them.
EVENTS_TIMEOUT = SNAPSHOTS * INTERVAL + 5.0
GATHERED = (
    "switch buffering off for this path in the proxy (nginx: proxy_buffering off; "
    "docs/proxies.md has the others)"
)
FACES = {"WebSocket": "websocket", "SSE": "sse", "OpenAI": "openai"}


class Road(NamedTuple):
    """The way to a server: its URL, the paths of its faces, and a client's key."""

    url: str
    paths: dict[str, str]
    key: str | None


class TimedAttempt(Attempt):
    """An attempt that also notes when each event of its answer came."""

    def __init__(self) -> None:
        self.times: list[float] = []
        # The code of what went wrong; empty for a complete answer.
        self.failure = ""
        super().__init__(Results())

    def event(self, *, token: bool = False) -> None:
        """Note an event."""
        self.times.append(time.perf_counter())
        super().event(token=token)


def noting(encodings: set[str]) -> aiohttp.TraceConfig:
    """Return what makes a session note the `Content-Encoding` of each streamed answer."""

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
    """Return in how many bursts events came at *times*, in seconds, which are in order."""
    gaps = (later - earlier for earlier, later in itertools.pairwise(times))
    return sum(gap > TOGETHER for gap in gaps) + bool(times)


def gathered(times: Sequence[float]) -> bool:
    """Return whether the events of an even answer, come at *times*, were gathered."""
    return len(times) >= MIN_EVENTS and bursts(times) <= MAX_BURSTS


async def examine(
    report: Report, road: Road, simulated: str | None, *, websocket: bool, ask: bool
) -> None:
    """Follow an answer on each face, and the snapshots of `/events`.

    *simulated*: a model whose answers cost nothing. Without one an answer is asked for on one face
    only, and none with *ask* False. *websocket*: whether WebSockets can be opened.
    """
    faces = [face for face in FACES if websocket or face != "WebSocket"]
    question = Question(prompt="Hello", model=simulated, max_tokens=SIMULATED_TOKENS)
    if simulated is None:
        faces = ["SSE"] if ask else []
        question = Question(prompt=PROMPT, max_tokens=MAX_TOKENS)
    encodings: set[str] = set()
    async with remote.session(road.key, noting(encodings)) as session:
        async with asyncio.TaskGroup() as tasks:
            answers = {
                face: tasks.create_task(_follow(session, road, face, question)) for face in faces
            }
            snapshots = tasks.create_task(_delays(session, road))
        for face, answer in answers.items():
            _tell_answer(report, face, answer.result(), even=simulated is not None)
        if simulated is None:
            reason = "only one face was asked" if ask else "--no-ask, and no model is simulated"
            report.skip("answers", f"not every face was asked for an answer: {reason}")
        _tell_delays(report, snapshots.result())
    if encodings:
        report.warn(
            "streams",
            f"the proxy compresses streams ({', '.join(sorted(encodings))})",
            "a compressor may hold events back: leave text/event-stream out (nginx: gzip off)",
        )


async def _follow(
    session: aiohttp.ClientSession, road: Road, face: str, question: Question
) -> TimedAttempt:
    """Ask *question* on *face*, and read the answer to its end."""
    attempt, name = TimedAttempt(), FACES[face]
    client = FaceClient(session, name, road.url, road.paths[name], question)
    try:
        if error := await client.request(attempt, ANSWER_TIMEOUT):
            attempt.failure = remote.printable(error.code)
    finally:
        await client.close()
    return attempt


def _tell_answer(report: Report, face: str, attempt: TimedAttempt, *, even: bool) -> None:
    times = attempt.times
    if attempt.failure:
        report.fail(
            face, f"an answer failed: {attempt.failure}", "docs/errors.md explains its codes"
        )
        return
    came = f"{len(times)} events in {bursts(times)} bursts"
    took = times[-1] - times[0] if times else 0.0
    if not gathered(times):
        report.ok(face, f"an answer came whole, each event as it was said: {came}", took)
    elif even:
        report.fail(
            face, f"an answer came whole, but something on the road gathers it: {came}", GATHERED
        )
    else:
        report.warn(
            face,
            f"an answer came whole, in few pieces: {came}",
            f"maybe the model did that; else {GATHERED}",
        )


async def _delays(session: aiohttp.ClientSession, road: Road) -> list[float] | str:
    """Return how much later than the quickest each snapshot of `/events` was, or why not."""
    delays: list[float] = []
    try:
        async with (
            asyncio.timeout(EVENTS_TIMEOUT),
            session.get(
                f"{road.url}/events",
                params={"interval": f"{INTERVAL:g}"},
                headers={"Accept": "text/event-stream"},
                allow_redirects=False,
            ) as response,
        ):
            if response.status != 200 or response.content_type != "text/event-stream":
                return f"HTTP {response.status}"
            async for event in remote.events(response):
                if event.event == b"stats":
                    match orjson.loads(event.data):
                        case {"time": int(made) | float(made)}:
                            delays.append(time.time() - made)
                if len(delays) > SNAPSHOTS:
                    break
    except TimeoutError:
        # A wait without an event says more than the events before it.
        return [0.0, EVENTS_TIMEOUT]
    except (aiohttp.ClientError, OSError, EventTooLong, orjson.JSONDecodeError) as error:
        return remote.describe(error)
    # The first of them is the newest that there was, and up to an interval old.
    del delays[:1]
    return [delay - min(delays) for delay in delays]


def _tell_delays(report: Report, delays: list[float] | str) -> None:
    if isinstance(delays, str):
        report.skip(
            "/events",
            f"not followed: {delays}",
            "it wants an admin key, and a proxy that passes it",
        )
    elif len(delays) < SNAPSHOTS and max(delays, default=0.0) < EVENTS_TIMEOUT:
        report.fail("/events", "the connection ended early")
    elif max(delays) > MAX_DELAY:
        report.fail(
            "/events",
            f"something on the road gathers events: one was {max(delays):.1f} s late",
            GATHERED,
        )
    else:
        report.ok("/events", "each event arrives as it comes", max(delays))
