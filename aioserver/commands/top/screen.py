"""Draws what is known of a server (rich). 80 columns are enough.

Whatever comes from the server is text, never markup, and has no control characters.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from aioserver.commands.remote import plain
from aioserver.commands.top.verdict import verdict

if TYPE_CHECKING:
    from aioserver.commands.top.feed import State

STYLES = {"ok": "bold green", "warning": "bold yellow", "error": "bold red", "info": "cyan"}
MARKS = {"ok": "+", "warning": "!", "error": "x"}  # for who sees no colours
BAR = 24  # columns
NEARLY_FULL = 0.8
NOTHING = "-"


class Screen:
    """The whole terminal while in a `with`, drawn when told to; then it is as it was."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._live = Live(screen=True, auto_refresh=False, console=Console())

    def __enter__(self) -> Self:
        self._live.start()
        self.draw()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._live.stop()

    def draw(self) -> None:
        """Draw the state as it is now."""
        self._live.update(picture(self._state), refresh=True)


def show(state: State) -> None:
    """Print the state once."""
    Console().print(picture(state))


def terminal() -> bool:
    """Whether stdout is one."""
    return Console().is_terminal


def picture(state: State) -> RenderableType:
    """All of it, the most important on top: what does not fit is cut off at the end."""
    stats = state.stats
    parts: list[RenderableType] = [_title(state), _verdict(state), ""]
    if stats is not None:
        parts += [
            _bars(stats.get("connections", {})),
            "",
            _providers(stats.get("providers", {})),
            *_guards(stats.get("providers", {})),
            "",
            _facts(stats),
            "",
        ]
    parts += [_incident(one) for one in reversed(state.incidents)]
    return Group(*parts)


def _title(state: State) -> Text:
    stats = state.stats or {}
    text = Text(
        plain(f"{stats.get('name', 'aioserver')} {stats.get('version', '')}"), style="bold"
    )
    text.append(f"  {state.url}", style="not bold")
    if "uptime" in stats:
        text.append(f"  up {_span(stats['uptime'])}", style="not bold")
    return text


def _verdict(state: State) -> Text:
    if state.problem:
        now = time.monotonic()
        text = (
            f"no server for {_span(now - state.lost_at)}: {state.problem};"
            f" next try in {max(0.0, state.retry_at - now):.0f} s"
        )
        if state.stats is not None:
            text += "; below is what was last heard"
        return Text(f"x {text}", style=STYLES["error"])
    if state.stats is None:
        return Text("connecting", style=STYLES["info"])
    level, text = verdict(state.stats, state.previous)
    return Text(f"{MARKS[level]} {text}", style=STYLES[level])


def _bars(connections: dict[str, Any]) -> Table:
    faces = connections.get("active_by_face", {})
    wait = connections.get("oldest_wait") or 0.0
    rows = (
        ("connections", "active", "limit", ", ".join(f"{plain(k)} {v}" for k, v in faces.items())),
        ("waiting room", "waiting", "queue_size", f"longest {wait:.1f} s" if wait else ""),
    )
    grid = Table.grid(padding=(0, 1))
    for label, key, limit_key, more in rows:
        value, limit = connections.get(key, 0), connections.get(limit_key, 0)
        full = value / max(limit, 1)
        colour = "red" if full >= 1 else "yellow" if full >= NEARLY_FULL else "green"
        bar = ProgressBar(
            total=max(limit, 1),
            completed=value,
            width=BAR,
            style="dim",
            complete_style=colour,
            finished_style=colour,  # rich's own green means well done
        )
        text = Text(f"{value} of {limit}")
        if more:
            text.append(f"  {more}", style="dim")
        grid.add_row(label, bar, text)
    return grid


def _providers(providers: dict[str, Any]) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column("provider", no_wrap=True, max_width=14, overflow="ellipsis")
    for name in ("places", "pool", "queue", "wait", "tokens/s", "first p50", "p95", "faults"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, one in providers.items():
        pool, first = one.get("pool", {}), one.get("first_token") or {}
        if _unused(one):
            continue
        style = "yellow" if one.get("waiting") else None if one.get("usable", True) else "red"
        table.add_row(
            Text(f"{'*' if one.get('active') else ' '}{plain(name)}"),
            f"{one.get('in_flight', 0)}/{one.get('limit', 0)}",
            f"{pool.get('open', 0)}/{pool.get('limit', 0)}",
            f"{one.get('waiting', 0)}/{one.get('queue_size', 0)}",
            _time(one.get("oldest_wait") or None),
            f"{one.get('tokens_per_second', 0.0):.0f}",
            _time(first.get("p50")),
            _time(first.get("p95")),
            str(sum(one.get("faults", {}).values())),
            style=style,
        )
    return table


def _unused(provider: dict[str, Any]) -> bool:
    """Whether it is configured, and no more than that: without a key, as a rule."""
    return not (provider.get("usable", True) or provider.get("active") or provider.get("requests"))


def _guards(providers: dict[str, Any]) -> list[Text]:
    """A line for each provider that has more to say, and one for those that are not used."""
    lines = []
    for name, one in providers.items():
        said = [] if one.get("usable", True) else ["not usable"]
        if "breaker" in one:
            said.append(f"breaker {one['breaker']}")
        if pace := one.get("pace"):
            said.append(f"pace {pace.get('per_minute')} a minute, {pace.get('left')} now")
        if one.get("retries"):
            said.append(f"{one['retries']} retries")
        said += [f"{fault} {count}" for fault, count in one.get("faults", {}).items() if count]
        if said and not _unused(one):
            lines.append(f" {name}: {', '.join(said)}")
    if unused := ", ".join(name for name, one in providers.items() if _unused(one)):
        lines.append(f" not usable: {unused}")
    return [Text(plain(line), style="dim") for line in lines]


def _facts(stats: dict[str, Any]) -> Table:
    requests, streams = stats.get("requests", {}), stats.get("streams", {})
    loop, process = stats.get("loop", {}), stats.get("process", {})
    first = stats.get("first_token") or {}
    rejected = {code: count for code, count in stats.get("rejections", {}).items() if count}
    per_second = stats.get("connections", {}).get("rejected_per_second") or 0.0
    total = f"{sum(rejected.values())} ({per_second:.1f}/s): "
    codes = ", ".join(f"{code} {count}" for code, count in rejected.items())
    rows = {
        "requests": f"{requests.get('total', 0)} ({requests.get('per_second', 0.0):.1f}/s), "
        f"{requests.get('running', 0)} running"
        + "".join(f", {n} {name}" for name, n in requests.get("outcomes", {}).items() if n),
        "answers": f"{stats.get('tokens_per_second', 0.0):.0f} tokens/s; first token p50 "
        f"{_time(first.get('p50'))}, p95 {_time(first.get('p95'))}, p99 {_time(first.get('p99'))}",
        "streams": f"{streams.get('running', 0)} running, {streams.get('detached', 0)} without a "
        f"reader, {streams.get('finished', 0)} kept, {_bytes(streams.get('bytes'))} of "
        f"{_bytes(streams.get('max_bytes'))}; {stats.get('slow_clients', 0)} slow clients dropped",
        "rejections": total + codes if rejected else "none",
        "loop": f"lag {_time(loop.get('lag'))}, worst {_time(loop.get('lag_max'))}; "
        f"cpu {_share(process.get('cpu'))}, {_or_nothing(process.get('tasks'))} tasks",
        "process": f"{_or_nothing(process.get('open_fds'))} of "
        f"{_or_nothing(process.get('max_fds'))} descriptors, {_bytes(process.get('rss_bytes'))}",
    }
    grid = Table.grid(padding=(0, 1))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column()
    for label, text in rows.items():
        grid.add_row(label, Text(plain(text)))
    return grid


def _incident(one: dict[str, Any]) -> Text:
    at = time.strftime("%H:%M:%S", time.localtime(one.get("time", 0)))
    text = Text(f"{at} ", style="dim", no_wrap=True, overflow="ellipsis")
    style = STYLES.get(str(one.get("severity")), "none")
    return text.append(plain(one.get("text", one.get("kind", ""))), style=style)


def _time(seconds: float | None) -> str:
    if seconds is None:
        return NOTHING
    return f"{seconds * 1000:.0f}ms" if seconds < 1 else f"{seconds:.1f}s"


def _span(seconds: float) -> str:
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _bytes(size: int | None) -> str:
    if size is None:
        return NOTHING
    if size < 1 << 20:
        return f"{size / 1024:.0f} KiB"
    return f"{size / (1 << 20):.0f} MiB"


def _share(share: float | None) -> str:
    return NOTHING if share is None else f"{share:.0%}"


def _or_nothing(value: object) -> str:
    return NOTHING if value is None else str(value)
