"""Finds which limit was met: from refusals, `queued` frames, and the server's own numbers."""

from __future__ import annotations

import asyncio
import re
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from aioserver.monitoring.findings import REJECTED
from aioserver.tools import remote

if TYPE_CHECKING:
    import aiohttp

    from aioserver.tools.bench.results import Results

# Seconds before the first reading: the server updates its numbers once a second, and earlier ones
# are older than the run. Seconds between two readings, and for one.
FIRST_READING, READING_INTERVAL, READING_TIMEOUT = 1.0, 0.5, 5.0
# The second path has the queues, too, and needs no admin key.
PATHS = ("/stats", "/")


class Peaks:
    """The server's own numbers from the moment when most requests were waiting: those of the
    *connections*, and of each of *providers* by its name.
    """

    def __init__(self) -> None:
        self.connections: dict[str, Any] = {}
        self.providers: dict[str, dict[str, Any]] = {}

    def update(self, state: dict[str, Any]) -> None:
        """Take a reading into account: the JSON of `/stats`, or of `/`."""
        self.connections = max(state.get("connections", {}), self.connections, key=_waiting)
        for name, provider in state.get("providers", {}).items():
            self.providers[name] = max(provider, self.providers.get(name, {}), key=_waiting)

    async def watch(self, session: aiohttp.ClientSession, url: str) -> None:
        """Read the numbers until cancelled; returns early if the server does not publish them."""
        await asyncio.sleep(FIRST_READING)
        for path in PATHS:
            while True:
                answer = await remote.get(
                    session, url + path, READING_TIMEOUT, redirects=True, headers=remote.JSON
                )
                # Another content than an object is no reading.
                if answer.status != HTTPStatus.OK or not answer.content:
                    break
                self.update(answer.content)
                await asyncio.sleep(READING_INTERVAL)


def _waiting(gate: dict[str, Any]) -> int:
    return int(gate.get("waiting", 0))


def find_limit(results: Results, peaks: Peaks) -> dict[str, str | None]:
    """Return the limit that was met: `text` in one line, and `code`, None if none was met."""
    if results.refused:
        (code, count), *others = results.refused.most_common()
        meaning = REJECTED[code].text if code in REJECTED else "refused"
        message = results.messages.get(code, "")
        # The message of a full server has its limit in brackets.
        limit = re.search(r"\(([^()]*)\)$", message)
        text = (
            f"{meaning}: {count} of {results.begun} refused with {code}"
            f"{_in_brackets(limit[1] if limit else message)}"
        )
        if others:
            text += "; also " + ", ".join(f"{count} with {code}" for code, count in others)
        return {"code": code, "text": text}
    met: dict[str, str] = {}
    for code, what, waits, limits in (
        (
            "connections_waiting",
            "clients waited for admission",
            results.admission_waits,
            {f"max_connections={peaks.connections.get('limit')}": peaks.connections},
        ),
        (
            "provider_waiting",
            "requests waited at the provider",
            results.provider_waits,
            {_limit_of(name, state): state for name, state in peaks.providers.items()},
        ),
    ):
        full = {limit: waiting for limit, state in limits.items() if (waiting := _waiting(state))}
        # The clients' `queued` frames say more than the numbers of the server.
        extent = f"{sum(full.values())} at once" if full else ""
        if waits.count:
            extent = f"{waits.count} of {results.begun}, the longest for {waits.longest:.2f} s"
        if extent:
            met[code] = f"{what}: {extent}" + _in_brackets(full and f"{', '.join(full)} reached")
    return {"code": next(iter(met), None), "text": "; ".join(met.values()) or "no limit was met"}


def _limit_of(name: str, state: dict[str, Any]) -> str:
    """Return the limit of the provider *name* for which requests waited: its pace, if places were
    free in *state*.
    """
    places, pace = state.get("limit"), state.get("pace", {}).get("per_minute")
    if pace is not None and places is not None and state.get("in_flight", places) < places:
        return f"{name}: requests_per_minute={pace}"
    return f"{name}: concurrent_requests={places}"


def _in_brackets(text: object) -> str:
    return f" ({text})" if text else ""
