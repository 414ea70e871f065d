"""A hook behind a URL: a POST for each decision, and one for each streamed answer, which lasts as
long as the answer.

Its connections are in two pools of its own (providers/pool.py), one for decisions and one for
answers. So a request never waits for an answer, however many of these run. Owners share the places
of each pool (limits/shares.py): a caller whose requests keep the hook busy leaves some to the
others. A wait for a place is a part of the hook's `timeout`.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import orjson
from yarl import URL

from aioserver import __version__
from aioserver.config.settings import ANSWER, REQUEST, HttpClient
from aioserver.errors import AioserverError
from aioserver.limits.shares import Places
from aioserver.provider_errors import StaleConnection
from aioserver.providers.exchange import Exchange
from aioserver.providers.http1 import FRAMING_HEADERS
from aioserver.providers.pool import Pool
from aioserver.providers.sinks import BodySink
from aioserver.wings.hooks import decisions
from aioserver.wings.hooks.decisions import HookFault
from aioserver.wings.hooks.hook_client import HookClient

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping

    from aioserver.config import settings
    from aioserver.hook import Call, Refuse
    from aioserver.providers.http1 import Sink
    from aioserver.wings.hooks.tap import Tap

# Connections for decisions, and for streamed answers; a single caller may have two thirds of them.
MAX_DECISIONS, MAX_ANSWERS = 192, 1536
# Seconds for which an idle connection is kept.
KEPT = 30.0
# Seconds of the exchange's own bounds, a day: the bounds of the hook are tighter, or depend on the
# answer.
LONG = 86_400.0
JSON, LINES = "application/json", "application/x-ndjson"
OWN_HEADERS = FRAMING_HEADERS | {"host", "content-type", "accept-encoding"}


class HttpHook(HookClient):
    """The hook of these *settings*, whose answers have at most *max_answer* bytes.

    Always: it has at most MAX_DECISIONS and MAX_ANSWERS connections.
    """

    def __init__(self, settings: settings.Hook, max_answer: int) -> None:
        super().__init__(settings)
        assert settings.url is not None
        self._url = URL(settings.url)
        self._timeout, self._max_answer = settings.timeout, max_answer
        self._decisions = Pool(settings.url, _limits(MAX_DECISIONS, MAX_DECISIONS, self._timeout))
        # A connection on which an answer was streamed is not reused: should it prove dead, the
        # events on it would be lost.
        self._answers = Pool(settings.url, _limits(MAX_ANSWERS, 0, self._timeout))
        self._places: dict[Pool, Places[Hashable]] = {
            self._decisions: Places(MAX_DECISIONS),
            self._answers: Places(MAX_ANSWERS),
        }

    @property
    def connections(self) -> int:
        """The number of its connections in use."""
        pools = self._decisions.stats(), self._answers.stats()
        return sum(pool.open - pool.idle for pool in pools)

    def retire(self) -> None:
        """Close idle connections, and keep none in future."""
        self._decisions.retire()
        self._answers.retire()

    async def close(self) -> None:
        """Close its connections."""
        await self._decisions.close()
        await self._answers.close()

    async def decide(self, call: Call, owner: Hashable) -> Refuse | bytes | None:
        """Return the decision about the request in *call*, as `HookClient.decide`."""
        body = await decisions.member(call.body) if call.body else b""
        content = decisions.with_body(REQUEST, call, body)
        return decisions.verdict(*await self._ask(content, owner))

    async def decide_answer(self, call: Call, body: bytes, owner: Hashable) -> Refuse | None:
        """Return the decision about *body*, a whole answer, as `HookClient.decide_answer`."""
        content = decisions.with_body(ANSWER, call, await decisions.member(body))
        return decisions.verdict_on_answer(*await self._ask(content, owner))

    async def follow(self, call: Call, shown: Tap, owner: Hashable) -> Refuse | None:
        """Show the events in *shown*, as `HookClient.follow`: the hook has its time from their
        end.
        """
        head = self._head(LINES, "Transfer-Encoding: chunked")
        try:
            return decisions.verdict_on_answer(
                *await self._post(self._answers, owner, head, Lines(call, shown), shown)
            )
        finally:
            shown.at_end(None)

    async def _ask(self, content: bytes, owner: Hashable) -> tuple[int, bytes]:
        head = self._head(JSON, f"Content-Length: {len(content)}")
        return await self._post(self._decisions, owner, head + content)

    async def _post(
        self,
        pool: Pool,
        owner: Hashable,
        request: bytes,
        body: Lines | None = None,
        shown: Tap | None = None,
    ) -> tuple[int, bytes]:
        """Post *request* on a place of *owner*, followed by *body*, which lasts until *shown* has
        ended; return the status and the body of the answer.

        Raises:
            HookFault: there is no answer in time.
        """
        loop, places, placed = asyncio.get_running_loop(), self._places[pool], False
        try:
            async with asyncio.timeout(self._timeout) as bound:

                def decide_soon() -> None:
                    bound.reschedule(loop.time() + self._timeout)

                await places.take(owner)
                placed = True
                while True:
                    connection = pool.take() or await pool.connect()
                    try:
                        if shown is not None:
                            bound.reschedule(None)
                            shown.at_end(decide_soon)
                        answer = _HookAnswer(self._max_answer)
                        running = Exchange(
                            connection,
                            read_timeout=LONG,
                            write_timeout=LONG,
                            on_head=answer.head_received,
                        ).run((request,), body)
                    except BaseException:
                        connection.close()
                        raise
                    try:
                        await running
                    except StaleConnection:
                        # The hook had closed an idle connection, so it has not seen the request.
                        pool.drop_idle()
                        continue
                    return answer.status, answer.body
        except TimeoutError:
            raise HookFault("no decision in time") from None
        except AioserverError as fault:
            raise HookFault(type(fault).__name__) from None
        finally:
            if placed:
                places.give_back(owner)

    def _head(self, content_type: str, framing: str) -> bytes:
        """Return the head of a request with a body of *content_type*."""
        url, forwarded = self._url, self._decisions.forwards
        configured = {
            name: value
            for name, value in {**self.settings.headers, **self._decisions.proxy_headers()}.items()
            if name.lower() not in OWN_HEADERS
        }
        headers = {
            "Host": url.authority.rpartition("@")[2],
            "User-Agent": f"aioserver/{__version__}",
            "Accept": JSON,
            "Accept-Encoding": "identity",
            "Content-Type": content_type,
        }
        replaced = {name.lower() for name in configured}
        headers = {name: value for name, value in headers.items() if name.lower() not in replaced}
        lines = [
            f"POST {url if forwarded else url.raw_path_qs} HTTP/1.1",
            *(f"{name}: {value}" for name, value in (headers | configured).items()),
            framing,
        ]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


class Lines:
    """The body of a POST that shows an answer: a line about the answer, one for each event, and
    one for its end.
    """

    chunked = True

    def __init__(self, call: Call, shown: Tap) -> None:
        self._shown = shown
        self._opening = decisions.opening(ANSWER, call) + b"}\n"
        self._ended = False

    async def begin(self) -> None:
        """Do nothing: the first line needs no preparation."""

    async def read(self) -> bytes:
        """Return the next lines; empty at the end. Cancelling is safe."""
        opening, self._opening = self._opening, b""
        if opening:
            return opening
        if self._ended:
            return b""
        events = await self._shown.events()
        if events:
            return b"".join([decisions.line(number, data) for number, data in events])
        self._ended = True
        return orjson.dumps({"end": self._shown.end_status.decode() or "error"}) + b"\n"

    def rewind(self) -> bool:
        """Return False: the earlier events are not kept."""
        return False


class _HookAnswer(BodySink):
    """The answer of a hook."""

    status = 0

    def head_received(self, status: int, _headers: Mapping[str, str]) -> Sink:
        self.status = status
        return self


def _limits(connections: int, idle: int, timeout: float) -> HttpClient:
    """Return the limits of a pool."""
    return HttpClient(
        max_connections=connections,
        max_keepalive=idle,
        keepalive_expiry=KEPT,
        connect_timeout=timeout,
        read_timeout=timeout,
        write_timeout=timeout,
        pool_timeout=timeout,
        requests_per_minute=1,
        concurrent_requests=1,
        max_retries=0,
        backoff_factor=0.0,
    )
