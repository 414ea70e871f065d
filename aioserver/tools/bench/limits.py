"""Finds which limit was met: from refusals, `queued` frames, and the server's own numbers."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from aioserver.tools import remote

if TYPE_CHECKING:
    import aiohttp

    from aioserver.tools.bench.results import Results

# Seconds before the first reading: the server updates its numbers once a second, and earlier ones
# are older than the run.
FIRST_READING = 1.0
# Seconds between two readings.
READING_INTERVAL = 0.5
# Seconds for one reading.
READING_TIMEOUT = 5.0
# The second path has the queues, too, and needs no admin key.
PATHS = ("/stats", "/")

MEANINGS = {
    "server_at_capacity": "the server was full",
    "server_shutdown": "the server was stopping",
    "rate_limit_exceeded": "this client's own rate limit was met",
    "concurrency_exceeded": "this client had as many requests running as it may",
    "provider_queue_full": "the provider's queue was full",
    "provider_queue_timeout": "requests waited too long at the provider",
    "provider_rate_limited": "the provider's rate limit was met",
    "pool_timeout": "the provider's connection pool was full",
    "circuit_open": "the provider was dead",
    "no_provider": "no provider was usable",
}


@dataclass
class Peaks:
    """The server's own numbers from the moment when most requests were waiting.

    *connections* and each of *providers*, by name, have a moment of their own.
    """

    connections: dict[str, Any] = field(default_factory=dict)
    providers: dict[str, dict[str, Any]] = field(default_factory=dict)

    def update(self, state: dict[str, Any]) -> None:
        """Take a reading into account: the JSON of `/stats`, or of `/`."""
        connections = state.get("connections", {})
        if _waiting(connections) >= _waiting(self.connections):
            self.connections = connections
        for name, provider in state.get("providers", {}).items():
            if _waiting(provider) >= _waiting(self.providers.get(name, {})):
                self.providers[name] = provider

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
        text = (
            f"{MEANINGS.get(code, 'refused')}: {count} of {results.begun} refused with {code}"
            f"{_in_brackets(results.messages.get(code))}"
        )
        if others:
            text += "; also " + ", ".join(f"{count} with {code}" for code, count in others)
        return {"code": code, "text": text}
    admission, providers = peaks.connections, peaks.providers
    queues = (
        (
            "connections_waiting",
            "clients waited for admission",
            results.admission_waits,
            {f"max_connections={admission.get('limit')}": _waiting(admission)},
        ),
        (
            "provider_waiting",
            "requests waited at the provider",
            results.provider_waits,
            {_limit_of(name, state): _waiting(state) for name, state in providers.items()},
        ),
    )
    met = []
    for code, what, waits, limits in queues:
        full = {limit: waiting for limit, waiting in limits.items() if waiting}
        reached = _in_brackets(f"{', '.join(full)} reached" if full else "")
        if waits.count:
            # The clients' `queued` frames say more than the numbers of the server.
            extent = f"{waits.count} of {results.begun}, the longest for {waits.longest:.2f} s"
            met.append((code, f"{what}: {extent}{reached}"))
        elif full:
            met.append((code, f"{what}: {sum(full.values())} at once{reached}"))
    if met:
        return {"code": met[0][0], "text": "; ".join(text for _code, text in met)}
    return {"code": None, "text": "no limit was met"}


def _limit_of(name: str, state: dict[str, Any]) -> str:
    """Return the limit of the provider *name* for which requests waited: its pace, if places were
    free in *state*.
    """
    places, pace = state.get("limit"), state.get("pace", {}).get("per_minute")
    if pace is not None and places is not None and state.get("in_flight", places) < places:
        return f"{name}: requests_per_minute={pace}"
    return f"{name}: concurrent_requests={places}"


def _in_brackets(text: str | None) -> str:
    """Return *text* in brackets. If it ends with brackets, return the limit in these in
    brackets.
    """
    if text and text.endswith(")"):
        text = text[:-1].rpartition("(")[2]
    return f" ({text})" if text else ""
