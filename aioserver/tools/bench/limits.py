"""Finds which limit was met: from refusals, `queued` frames, and the server's own numbers."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import aiohttp

if TYPE_CHECKING:
    from aioserver.tools.bench.results import Results, Waits

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
    "http_503": "the server was full",
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
            while (state := await _read(session, url + path)) is not None:
                self.update(state)
                await asyncio.sleep(READING_INTERVAL)


async def _read(session: aiohttp.ClientSession, url: str) -> dict[str, Any] | None:
    try:
        async with (
            asyncio.timeout(READING_TIMEOUT),
            session.get(url, headers={"Accept": "application/json"}) as response,
        ):
            state = await response.json() if response.status == 200 else None
    except (aiohttp.ClientError, OSError, ValueError):
        return None
    return state if isinstance(state, dict) else None


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
    queues = [*_admission_queue(results, peaks), *_provider_queues(results, peaks)]
    if queues:
        return {"code": queues[0][0], "text": "; ".join(text for _code, text in queues)}
    return {"code": None, "text": "no limit was met"}


def _admission_queue(results: Results, peaks: Peaks) -> list[tuple[str, str]]:
    gate = peaks.connections
    limit = f"max_connections={gate.get('limit')} reached" if _waiting(gate) else None
    if not results.admission_waits.count and limit is None:
        return []
    extent = _extent(results.admission_waits, results.begun, _waiting(gate))
    text = f"clients waited for admission: {extent}{_in_brackets(limit)}"
    return [("connections_waiting", text)]


def _provider_queues(results: Results, peaks: Peaks) -> list[tuple[str, str]]:
    full = {name: gate for name, gate in peaks.providers.items() if _waiting(gate)}
    if not results.provider_waits.count and not full:
        return []
    waiting = sum(_waiting(gate) for gate in full.values())
    extent = _extent(results.provider_waits, results.begun, waiting)
    limits = ", ".join(
        f"{name}: concurrent_requests={gate.get('limit')}" for name, gate in full.items()
    )
    limits = f"{limits} reached" if limits else ""
    return [
        ("provider_waiting", f"requests waited at the provider: {extent}{_in_brackets(limits)}")
    ]


def _extent(waits: Waits, total: int, at_once: int) -> str:
    """Describe how many waited: from the clients' `queued` frames if any came, else *at_once*."""
    if waits.count:
        return f"{waits.count} of {total}, the longest for {waits.longest:.2f} s"
    return f"{at_once} at once"


def _in_brackets(text: str | None) -> str:
    """Return *text* in brackets, or of one that ends with brackets, the limit in these."""
    if text and text.endswith(")"):
        text = text[:-1].rpartition("(")[2]
    return f" ({text})" if text else ""
