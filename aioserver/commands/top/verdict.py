"""The state of a server in one line, from one snapshot: its most serious finding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from aioserver.commands.remote import printable

if TYPE_CHECKING:
    from collections.abc import Iterator

# Seconds; clients notice an event loop that is later than this.
MAX_LAG = 0.1
# The share of the allowed open files from which on they run out.
MAX_FILES = 0.9

# Kinds of troubles, the worst first.
KINDS = ("key_refused", "dead", "silent", "sick", "failing")

Level = Literal["ok", "warning", "error"]


def verdict(stats: dict[str, Any], previous: dict[str, Any] | None) -> tuple[Level, str]:
    """Return how serious the finding is, and the finding; *previous* is the snapshot before."""
    active = stats.get("connections", {}).get("active", 0)
    running = stats.get("requests", {}).get("running", 0)
    all_is_well = f"all is well: {active} connected, {running} requests running"
    return next(_findings(stats, previous), ("ok", all_is_well))


def _findings(
    stats: dict[str, Any], previous: dict[str, Any] | None
) -> Iterator[tuple[Level, str]]:
    """Yield every finding, the most serious first."""
    if not stats.get("ready", True):
        yield "error", "not ready: starting, stopping, or without a usable provider"
    connections = stats.get("connections", {})
    providers = stats.get("providers", {})
    troubles = [trouble for provider in providers.values() if (trouble := provider.get("trouble"))]
    troubles.sort(key=_rank)
    if grown := grown_rejections(stats, previous):
        refused = "refusing: " + ", ".join(f"{code} {count}" for code, count in grown.items())
        yield "error", "; ".join((refused, *map(_trouble_line, troubles[:1])))
    for trouble in troubles:
        yield "error", _trouble_line(trouble)
    for name, provider in providers.items():
        if provider.get("active") and not provider.get("usable", True):
            yield "error", f"the active provider {printable(name)} is not usable"
    process = stats.get("process", {})
    fds, max_fds = process.get("open_fds"), process.get("max_fds")
    if fds and max_fds and fds > MAX_FILES * max_fds:
        yield "error", f"descriptors run out: {fds} of {max_fds}"
    if waiting := connections.get("waiting"):
        full = f"full: {connections.get('active')} of {connections.get('limit')} connections"
        yield "warning", f"{full}, {_queue(waiting, connections)}"
    for name, provider in providers.items():
        if waiting := provider.get("waiting"):
            yield "warning", f"{printable(name)} is full: {_queue(waiting, provider)}"
    lag = stats.get("loop", {}).get("lag_max") or 0.0
    if lag > MAX_LAG:
        yield "warning", f"the event loop lags: {lag * 1000:.0f} ms"


def _rank(trouble: dict[str, Any]) -> int:
    kind = trouble.get("kind")
    return KINDS.index(kind) if kind in KINDS else len(KINDS)


def _trouble_line(trouble: dict[str, Any]) -> str:
    """Return a provider's trouble, in the server's words, as one line."""
    return printable(". ".join(filter(None, (trouble.get("text"), trouble.get("detail")))))


def _queue(waiting: int, gate: dict[str, Any]) -> str:
    return f"{waiting} waiting, the longest for {gate.get('oldest_wait') or 0.0:.1f} s"


def grown_rejections(stats: dict[str, Any], previous: dict[str, Any] | None) -> dict[str, int]:
    """Return the codes of the refusals since the snapshot before, and how often each was sent."""
    if previous is None:
        return {}
    before = previous.get("rejections", {})
    now = stats.get("rejections", {})
    return {
        printable(code): count - before.get(code, 0)
        for code, count in now.items()
        if count > before.get(code, 0)
    }
