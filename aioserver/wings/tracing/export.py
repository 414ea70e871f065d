"""The export of spans by OTLP over HTTP: batches that a task of its own sends to a collector.

The spans of a batch are written in several iterations of the event loop, a few in each. A thread
would be worse: it would take the interpreter's lock from the loop for five milliseconds at once.
Spans that the collector cannot accept now are kept, up to a bound, and sent again with growing
pauses; beyond the bound spans are dropped and counted. No request waits for the export.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

import aiohttp

from aioserver.telemetry.logs import SAME_ERROR, RateLimit
from aioserver.wings.tracing import otlp

if TYPE_CHECKING:
    import ssl
    from collections.abc import Mapping

    from aioserver.telemetry.counters import Counter

logger = logging.getLogger("aioserver.tracing")

# The most waiting spans, some 15 MB: the spans of four seconds at 1000 requests a second.
MAX_SPANS = 8192
# Spans of one export, exceeded by those of at most one request: about 250 kB.
BATCH_SPANS = 512
# Requests whose spans are written in one iteration of the event loop, in some 0.1 ms.
TURN = 16
# Seconds for which spans wait for others.
INTERVAL = 1.0
# Seconds for one export.
TIMEOUT = 10.0
# Seconds of the pause after a first failure, and the longest pause.
PAUSE, MAX_PAUSE = 1.0, 30.0
# Seconds that a stop of the server may spend on the remaining spans.
FLUSH_TIMEOUT = 2.0
# Bytes that are read of a collector's answer.
MAX_ANSWER = 1 << 16
# Statuses after which the same spans may be sent again (OTLP/HTTP, "Failures").
RETRYABLE = frozenset({429, 502, 503, 504})
SCOPE = "aioserver"
CONTENT_TYPE = "application/x-protobuf"


class Ended(Protocol):
    """A request that has ended, or a visit (spans.py)."""

    @property
    def number(self) -> int:
        """The number of its spans."""

    def write(self, zero: int) -> bytes:
        """Return its spans.

        *zero*: the nanoseconds of Unix time at which the monotonic clock was at 0.
        """


class Unavailable(Exception):
    """The collector cannot accept spans now.

    *pause*: the seconds that it asks for, 0.0 if it asks for none.
    """

    def __init__(self, reason: str, pause: float = 0.0) -> None:
        super().__init__(reason)
        self.pause = pause


class SpanExporter:
    """Sends spans to the collector at *url*, with *headers*, which may hold a key.

    Always: at most MAX_SPANS spans wait, and those of one request more; each span is counted once,
    as exported or dropped.

    *resource*: the attributes of this process, made by `otlp.key_value`. *counters*: `exported`
    and `dropped`. *interval*: seconds that spans wait for others. *pause*: seconds of the pause
    after a first failure. The caller calls `start` and `close`.
    """

    def __init__(
        self,
        url: str,
        headers: Mapping[str, str],
        resource: list[bytes],
        version: str,
        counters: Mapping[str, Counter],
        context: ssl.SSLContext | None = None,
        interval: float = INTERVAL,
        pause: float = PAUSE,
    ) -> None:
        self._url = url
        own = {"User-Agent": f"{SCOPE}/{version}", "Content-Type": CONTENT_TYPE}
        self._headers = {**headers, **own}
        self._resource = resource
        self._scope = (SCOPE, version)
        self._exported, self._dropped = counters["exported"], counters["dropped"]
        self._tls: ssl.SSLContext | bool = True if context is None else context
        self._interval, self._pause = interval, pause
        self._queue: deque[Ended] = deque()
        # The spans that the collector could not accept, and their number.
        self._batch, self._batch_spans = b"", 0
        # All spans that are neither exported nor dropped.
        self._waiting = 0
        # Set while spans wait; while those of a whole batch do; and once the server stops.
        self._some, self._enough, self._closing = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._lines = RateLimit(1, SAME_ERROR)

    def start(self) -> None:
        """Begin to send."""
        self._task = asyncio.get_running_loop().create_task(self._run())
        self._task.add_done_callback(_log_bug)

    def take(self, ended: Ended) -> None:
        """Take the spans of *ended*, or drop and count them. Never waits."""
        number = ended.number
        if self._waiting >= MAX_SPANS:
            self._dropped.value += number
            return
        self._queue.append(ended)
        self._waiting += number
        self._some.set()
        if self._waiting - self._batch_spans >= BATCH_SPANS:
            self._enough.set()

    def drop(self, number: int) -> None:
        """Count *number* spans that were dropped."""
        self._dropped.value += number

    async def close(self) -> None:
        """Send the waiting spans, within FLUSH_TIMEOUT, and drop the rest."""
        if self._task is None:
            return
        for event in (self._closing, self._some, self._enough):
            event.set()
        _done, late = await asyncio.wait((self._task,), timeout=FLUSH_TIMEOUT)
        for task in late:
            task.cancel()
        await asyncio.wait((self._task,))
        if self._waiting:
            self._dropped.value += self._waiting
            logger.warning("%d spans were not exported before the stop", self._waiting)
            self._queue.clear()
            self._batch, self._batch_spans, self._waiting = b"", 0, 0

    async def _run(self) -> None:
        """Send batch after batch, until `close`; then the remaining spans, as long as the
        collector accepts them.
        """
        async with aiohttp.ClientSession(
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=TIMEOUT),
            connector=aiohttp.TCPConnector(limit=1, ssl=self._tls),
            headers=self._headers,
        ) as session:
            failures = 0
            while self._waiting or not self._closing.is_set():
                if not self._batch:
                    await self._some.wait()
                    if not self._closing.is_set():
                        await _within(self._interval, self._enough)
                    await self._write_batch()
                    continue
                try:
                    await self._send(session)
                except Unavailable as fault:
                    if self._closing.is_set():
                        return
                    failures += 1
                    if (fields := self._fields("away", str(fault))) is not None:
                        logger.warning("the collector cannot be reached", extra={"fields": fields})
                    pause = min(MAX_PAUSE, self._pause * 2.0 ** min(failures - 1, 10))
                    # With jitter, so that many servers do not come back at once.
                    pause *= 0.5 + random.random() / 2  # noqa: S311 - no secret
                    await _within(max(pause, fault.pause), self._closing)
                else:
                    if failures:
                        logger.info("spans are exported again")
                    failures = 0

    async def _write_batch(self) -> None:
        """Write the spans of the next export, in several iterations of the event loop."""
        parts, number = [], 0
        zero = time.time_ns() - int(time.monotonic() * 1e9)
        while self._queue and number < BATCH_SPANS:
            ended = self._queue.popleft()
            number += ended.number
            parts.append(ended.write(zero))
            if len(parts) % TURN == 0:
                await asyncio.sleep(0)
        self._batch, self._batch_spans = b"".join(parts), number
        if not self._queue and not self._closing.is_set():
            self._some.clear()
        if self._waiting - number < BATCH_SPANS and not self._closing.is_set():
            self._enough.clear()

    async def _send(self, session: aiohttp.ClientSession) -> None:
        """Send the batch once.

        Its spans are then exported, or dropped if the collector refuses them.

        Raises:
            Unavailable: they may be sent again.
        """
        body, number = otlp.request(self._resource, self._scope, self._batch), self._batch_spans
        try:
            async with session.post(self._url, data=body, allow_redirects=False) as response:
                answer = await response.content.read(MAX_ANSWER)
                status, retry_after = response.status, response.headers.get("Retry-After", "")
        except (aiohttp.ClientError, OSError) as exc:
            raise Unavailable(type(exc).__name__) from None
        if status in RETRYABLE:
            seconds = (
                float(retry_after) if retry_after.isascii() and retry_after.isdigit() else 0.0
            )
            raise Unavailable(f"status {status}", min(seconds, MAX_PAUSE))
        refused = number
        if 200 <= status < 300:
            refused = min(number, otlp.rejected(answer))
        self._waiting -= number
        self._batch, self._batch_spans = b"", 0
        self._exported.value += number - refused
        self._dropped.value += refused
        if refused and (fields := self._fields("refused", f"status {status}")) is not None:
            logger.warning("the collector has refused spans", extra={"fields": fields})

    def _fields(self, kind: str, reason: str) -> dict[str, object] | None:
        """Return the fields of a line about a fault.

        None if one of its *kind* was written in the last ten seconds.
        """
        if (left_out := self._lines.allow(kind)) is None:
            return None
        return {"reason": reason, "dropped": self._dropped.value, **left_out}


async def _within(seconds: float, event: asyncio.Event) -> None:
    """Wait for *event*, for *seconds* at most."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()


def _log_bug(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (bug := task.exception()) is not None:
        logger.error("bug in the export of spans, which has ended", exc_info=bug)
