"""Which limit was met: from refusals, from `queued` frames, and from the server's own numbers."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import aiohttp

if TYPE_CHECKING:
    from aioserver.commands.bench.results import Results, Waits

LOOK_AFTER = (
    1.0  # seconds: the server makes its numbers once a second, older ones are not of this run
)
LOOK_EVERY = 0.5
LOOK_TIMEOUT = 5.0
PATHS = ("/stats", "/")  # the second has the queues, too, and needs no key

MEANINGS = {
    "server_at_capacity": "the house was full",
    "http_503": "the house was full",
    "server_shutdown": "the server was stopping",
    "rate_limit_exceeded": "this client's own rate limit was met",
    "concurrency_exceeded": "this client ran as many answers as it may",
    "provider_queue_full": "the queue at the provider was full",
    "provider_queue_timeout": "requests waited too long at the provider",
    "provider_rate_limited": "the provider's rate limit was met",
    "pool_timeout": "the pool of the provider was full",
    "circuit_open": "the provider's breaker was open",
    "no_provider": "no provider was usable",
}


@dataclass
class Peaks:
    """The fullest that the server said it was."""

    door: dict[str, Any] = field(default_factory=dict)  # `connections`, when most were waiting
    providers: dict[str, dict[str, Any]] = field(default_factory=dict)  # by name, likewise

    def see(self, state: dict[str, Any]) -> None:
        """One look: `/stats`, or `/` as JSON."""
        connections = state.get("connections", {})
        if _waiting(connections) >= _waiting(self.door):
            self.door = connections
        for name, provider in state.get("providers", {}).items():
            if _waiting(provider) >= _waiting(self.providers.get(name, {})):
                self.providers[name] = provider

    async def watch(self, session: aiohttp.ClientSession, url: str) -> None:
        """Look again and again, until cancelled; ends by itself where nothing can be read."""
        await asyncio.sleep(LOOK_AFTER)
        for path in PATHS:
            while (state := await _look(session, url + path)) is not None:
                self.see(state)
                await asyncio.sleep(LOOK_EVERY)


async def _look(session: aiohttp.ClientSession, url: str) -> dict[str, Any] | None:
    try:
        async with (
            asyncio.timeout(LOOK_TIMEOUT),
            session.get(url, headers={"Accept": "application/json"}) as response,
        ):
            state = await response.json() if response.status == 200 else None
    except (aiohttp.ClientError, OSError, ValueError):
        return None
    return state if isinstance(state, dict) else None


def _waiting(gate: dict[str, Any]) -> int:
    return int(gate.get("waiting", 0))


def met(results: Results, peaks: Peaks) -> dict[str, str | None]:
    """The limit in one line, and its code; None: no limit was met."""
    if results.refused:
        (code, count), *others = results.refused.most_common()
        text = (
            f"{MEANINGS.get(code, 'refused')}: {count} of {results.begun} refused with {code}"
            f"{_in_brackets(results.messages.get(code))}"
        )
        if others:
            text += "; also " + ", ".join(f"{count} with {code}" for code, count in others)
        return {"code": code, "text": text}
    waited = [*_at_the_door(results, peaks), *_at_the_provider(results, peaks)]
    if waited:
        return {"code": waited[0][0], "text": "; ".join(text for _code, text in waited)}
    return {"code": None, "text": "no limit was met"}


def _at_the_door(results: Results, peaks: Peaks) -> list[tuple[str, str]]:
    door = peaks.door
    known = f"max_connections={door.get('limit')} reached" if _waiting(door) else None
    if not results.at_the_door.count and known is None:
        return []
    what = _told(results.at_the_door, results.begun, _waiting(door))
    return [("connections_waiting", f"clients waited at the door: {what}{_in_brackets(known)}")]


def _at_the_provider(results: Results, peaks: Peaks) -> list[tuple[str, str]]:
    full = {name: one for name, one in peaks.providers.items() if _waiting(one)}
    known = ", ".join(
        f"{name}: concurrent_requests={one.get('limit')}" for name, one in full.items()
    )
    if not results.at_the_provider.count and not full:
        return []
    waiting = sum(_waiting(one) for one in full.values())
    what = _told(results.at_the_provider, results.begun, waiting)
    known = f"{known} reached" if known else ""
    return [("provider_waiting", f"requests waited at the provider: {what}{_in_brackets(known)}")]


def _told(waits: Waits, total: int, seen: int) -> str:
    """From the clients' own frames, where they got some; else from the server's numbers."""
    if waits.count:
        return f"{waits.count} of {total}, the longest for {waits.longest:.2f} s"
    return f"{seen} at once"


def _in_brackets(text: str | None) -> str:
    return f" ({text})" if text else ""
