"""How is it? One line from one snapshot: the worst that is true."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from aioserver.commands.remote import plain

if TYPE_CHECKING:
    from collections.abc import Iterator

LAG = 0.1  # seconds; from there on clients feel the event loop
FILES = 0.9  # of the open files that are allowed

Level = Literal["ok", "warning", "error"]


def verdict(stats: dict[str, Any], previous: dict[str, Any] | None) -> tuple[Level, str]:
    """How bad it is, and why. *previous*: the snapshot before, for what has grown since."""
    active = stats.get("connections", {}).get("active", 0)
    running = stats.get("requests", {}).get("running", 0)
    well = f"all is well: {active} connected, {running} requests running"
    return next(_worst_first(stats, previous), ("ok", well))


def _worst_first(
    stats: dict[str, Any], previous: dict[str, Any] | None
) -> Iterator[tuple[Level, str]]:
    if not stats.get("ready", True):
        yield "error", "not ready: starting, stopping, or without a usable provider"
    connections = stats.get("connections", {})
    providers = stats.get("providers", {})
    if grown := grown_rejections(stats, previous):
        yield "error", "refusing: " + ", ".join(f"{code} {count}" for code, count in grown.items())
    for name, provider in providers.items():
        if provider.get("active") and not provider.get("usable", True):
            yield "error", f"the active provider {plain(name)} is not usable"
        if provider.get("breaker", "closed") != "closed":
            yield "error", f"the breaker of {plain(name)} is {plain(provider['breaker'])}"
    process = stats.get("process", {})
    fds, max_fds = process.get("open_fds"), process.get("max_fds")
    if fds and max_fds and fds > FILES * max_fds:
        yield "error", f"descriptors run out: {fds} of {max_fds}"
    if waiting := connections.get("waiting"):
        full = f"full: {connections.get('active')} of {connections.get('limit')} connections"
        yield "warning", f"{full}, {_line(waiting, connections)}"
    for name, provider in providers.items():
        if waiting := provider.get("waiting"):
            yield "warning", f"{plain(name)} is full: {_line(waiting, provider)}"
    lag = stats.get("loop", {}).get("lag_max") or 0.0
    if lag > LAG:
        yield "warning", f"the event loop lags: {lag * 1000:.0f} ms"


def _line(waiting: int, gate: dict[str, Any]) -> str:
    return f"{waiting} waiting, the longest for {gate.get('oldest_wait') or 0.0:.1f} s"


def grown_rejections(stats: dict[str, Any], previous: dict[str, Any] | None) -> dict[str, int]:
    """The codes that were refused with since the snapshot before, and how often."""
    if previous is None:
        return {}
    before = previous.get("rejections", {})
    now = stats.get("rejections", {})
    return {
        plain(code): count - before.get(code, 0)
        for code, count in now.items()
        if count > before.get(code, 0)
    }
