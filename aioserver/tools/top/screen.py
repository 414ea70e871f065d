"""Draws the state of a server, with rich; 80 columns are enough.

Text from the server is drawn as it is: markup has no effect, and control characters are removed.

This file is one concept: the layout of one screen.
"""

from __future__ import annotations

import time
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from aioserver.files.certificates import ends_soon
from aioserver.monitoring.alerts import count, still_run
from aioserver.tools.remote import printable

if TYPE_CHECKING:
    from aioserver.tools.top.feed import State

STYLES = {"ok": "bold green", "warning": "bold yellow", "error": "bold red", "info": "cyan"}
# For readers who see no colours.
MARKS = {"ok": "+", "warning": "!", "error": "x"}
# Columns of a bar.
BAR_WIDTH = 24
NEARLY_FULL = 0.8
UNKNOWN = "-"
# The most groups that have a row.
MAX_GROUPS = 10
# The most callers that are shown: those that have spent most today.
MAX_CALLERS = 10
# The used share of a budget above which it is shown as a warning.
MUCH = 0.9
UNKNOWN_VERDICT = {"level": "warning", "word": "Unknown", "text": "the server sends no verdict"}


class Screen:
    """Takes the whole terminal inside a `with`, and restores it at the end."""

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
        self._live.update(render(self._state), refresh=True)


def show(state: State) -> None:
    """Print the state once."""
    Console().print(render(state))


def terminal() -> bool:
    """Return whether stdout is a terminal."""
    return Console().is_terminal


def render(state: State) -> RenderableType:
    """Lay out the state, the most important on top: rows that do not fit are cut off below."""
    stats = state.stats
    parts: list[RenderableType] = [_title(state), _verdict(state), ""]
    if stats is not None:
        parts += [
            _bars(stats.get("connections", {})),
            "",
            _providers(stats.get("providers", {})),
            *_guards(stats.get("providers", {})),
            *_groups(stats.get("groups") or {}),
            *_callers(stats.get("keys") or {}),
            *_instances(stats.get("instances") or {}),
            *_former(stats.get("former") or []),
            "",
            _facts(stats),
            "",
        ]
    parts += [_incident(incident) for incident in reversed(state.incidents)]
    return Group(*parts)


def _title(state: State) -> Text:
    stats = state.stats or {}
    text = Text(
        printable(f"{stats.get('name', 'aioserver')} {stats.get('version', '')}"), style="bold"
    )
    text.append(f"  {state.url}", style="not bold")
    if "uptime" in stats:
        text.append(f"  up {_span(stats['uptime'])}", style="not bold")
    return text


def _verdict(state: State) -> RenderableType:
    if state.problem:
        now = time.monotonic()
        text = (
            f"no server for {_span(now - state.lost_at)}: {state.problem};"
            f" next try in {max(0.0, state.retry_at - now):.0f} s"
        )
        if state.stats is not None:
            text += "; below are its last numbers"
        return Text(f"x {text}", style=STYLES["error"])
    if state.stats is None:
        return Text("connecting", style=STYLES["info"])
    verdict = state.stats.get("verdict") or UNKNOWN_VERDICT
    level = verdict.get("level", "warning")
    head = printable(f"{MARKS.get(level, '!')} {verdict.get('word')}: {verdict.get('text')}")
    lines: list[RenderableType] = [Text(head, style=STYLES.get(level, "none"))]
    for key, label in (("detail", ""), ("advice", "To do: ")):
        if verdict.get(key):
            lines.append(Padding(Text(label + printable(verdict[key])), (0, 0, 0, 2)))
    return Group(*lines)


def _bars(connections: dict[str, Any]) -> Table:
    faces = connections.get("active_by_face", {})
    wait = connections.get("oldest_wait") or 0.0
    rows = (
        (
            "connections",
            "active",
            "limit",
            ", ".join(f"{printable(k)} {v}" for k, v in faces.items()),
        ),
        ("queue", "waiting", "queue_size", f"longest {wait:.1f} s" if wait else ""),
    )
    grid = Table.grid(padding=(0, 1))
    for label, key, limit_key, details in rows:
        value, limit = connections.get(key, 0), connections.get(limit_key, 0)
        full = value / max(limit, 1)
        colour = "red" if full >= 1 else "yellow" if full >= NEARLY_FULL else "green"
        bar = ProgressBar(
            total=max(limit, 1),
            completed=value,
            width=BAR_WIDTH,
            style="dim",
            complete_style=colour,
            # rich would draw a full bar green.
            finished_style=colour,
        )
        text = Text(f"{value} of {limit}")
        if details:
            text.append(f"  {details}", style="dim")
        grid.add_row(label, bar, text)
    return grid


def _table(first: str, width: int) -> Table:
    """Return a table whose *first* column, of names, has *width* columns of the screen at most."""
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column(first, no_wrap=True, max_width=width, overflow="ellipsis")
    return table


def _below(table: Table, more: int, noun: str) -> list[RenderableType]:
    """Return *table* below a blank line, and how many rows *more* there would be."""
    return ["", table, *([Text(f" and {count(more, noun)} more", style="dim")] * (more > 0))]


def _providers(providers: dict[str, Any]) -> Table:
    table = _table("provider", 14)
    # One column less, if no answer was continued, keeps the table within 80.
    seams = {
        name: total
        for name, provider in providers.items()
        if (total := (provider.get("continued") or {}).get("total"))
    }
    columns = ("places", "pool", "queue", "wait", "tokens/s", "first p50", "p95", "faults")
    for name in (*columns, "seams") if seams else columns:
        table.add_column(name, justify="right", no_wrap=True)
    for name, provider in providers.items():
        pool, first = provider.get("pool", {}), provider.get("first_token") or {}
        if _unused(provider):
            continue
        style = None if provider.get("usable", True) else "red"
        if provider.get("waiting"):
            style = "yellow"
        table.add_row(
            Text(f"{'*' if provider.get('active') else ' '}{printable(name)}"),
            f"{provider.get('in_flight', 0)}/{provider.get('limit', 0)}",
            f"{pool.get('open', 0)}/{pool.get('limit', 0)}",
            f"{provider.get('waiting', 0)}/{provider.get('queue_size', 0)}",
            _time(provider.get("oldest_wait") or None),
            f"{provider.get('tokens_per_second', 0.0):.0f}",
            _time(first.get("p50")),
            _time(first.get("p95")),
            str(sum(provider.get("faults", {}).values())),
            *([str(seams.get(name, 0))] if seams else []),
            style=style,
        )
    return table


def _groups(groups: dict[str, Any]) -> list[RenderableType]:
    """Return a table of *groups*, whose members have their places and their faults."""
    if not groups:
        return []
    table = _table("group", 14)
    table.add_column("members: places")
    for name in ("waiting", "cached"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, group in list(groups.items())[:MAX_GROUPS]:
        cells = Text()
        for member in group.get("members", []):
            state = str(member.get("state", "well"))
            cell = f"{member.get('provider')} {member.get('in_flight')}/{member.get('limit')}"
            if state != "well":
                cell += f" {state.replace('_', ' ')}"
            style = "none" if state == "well" else "yellow" if state == "sick" else "red"
            cells.append(", " if cells else "").append(printable(cell), style=style)
        waiting = group.get("waiting", 0)
        table.add_row(
            Text(printable(name)),
            cells,
            Text(str(waiting), style="yellow" if waiting else "none"),
            _share(group.get("cached_share")),
        )
    return _below(table, len(groups) - MAX_GROUPS, "group")


def _callers(keys: dict[str, Any]) -> list[RenderableType]:
    """Return a table of callers: usage today, budgets, running and waiting requests."""
    if not keys:
        return []
    table = _table("caller", 20)
    for name in ("tokens today", "of budget", "left of the minute", "running", "waiting"):
        table.add_column(name, justify="right", no_wrap=True)
    most = sorted(keys.items(), key=lambda item: -item[1].get("tokens_today", 0))
    for name, key in most[:MAX_CALLERS]:
        budgets = key.get("budgets", {})
        used, period = _fullest(budgets)
        minute = budgets.get("tokens_per_minute")
        left = None if minute is None else minute["remaining"]
        waiting = key.get("waiting", 0)
        table.add_row(
            Text(printable(name)),
            f"{key.get('tokens_today', 0):,}",
            Text("-" if used is None else f"{used:.0%} {period}", style=_use_style(used)),
            Text("-" if left is None else f"{left:,}", style="none" if left != 0 else "yellow"),
            f"{key.get('running', 0)}/{key.get('limit', 0)}",
            Text(str(waiting), style="yellow" if waiting else "none"),
        )
    return _below(table, len(keys) - MAX_CALLERS, "caller")


def _fullest(budgets: dict[str, Any]) -> tuple[float | None, str]:
    """Return the largest used share of the budgets of a day and longer, and its period.

    None: there is no such budget.
    """
    shares = [
        ((budget["used"] + budget["reserved"]) / budget["limit"], period)
        for period in ("day", "week", "month")
        if (budget := budgets.get(f"tokens_per_{period}"))
    ]
    return max(shares, key=itemgetter(0), default=(None, ""))


def _use_style(used: float | None) -> str:
    """Return the color of a budget of which this share is used."""
    if used is None or used < MUCH:
        return "none"
    return "red" if used >= 1 else "yellow"


def _instances(instances: dict[str, Any]) -> list[Text]:
    """Return a line for each instance of a cluster, with its share of the numbers above."""
    lines = []
    for name, instance in instances.items():
        if instance is None:
            lines.append(Text(f"{printable(name)}: does not answer", style=STYLES["warning"]))
            continue
        text = Text(f"{printable(name)}: ")
        text.append(
            f"{instance.get('connections', 0)} of {instance.get('connections_limit', 0)} "
            f"connections, {count(instance.get('running', 0), 'answer')}, "
            f"{instance.get('tokens_per_second', 0.0):.0f} tokens/s, CPU "
            f"{100 * instance.get('cpu', 0.0):.0f} %",
            style="dim",
        )
        lines.append(text)
    return [Text(""), *lines] if lines else []


def _former(former: list[dict[str, Any]]) -> list[Text]:
    """Return a line about the processes that were replaced, and still have answers."""
    if not former:
        return []
    answers, longest, until = (
        [each.get(key, 0) for each in former] for key in ("answers", "longest", "until")
    )
    text = still_run(sum(answers), max(longest), len(former), max(until))
    return [Text(""), Text(text, style=STYLES["info"])]


def _unused(provider: dict[str, Any]) -> bool:
    """Return whether *provider* is only configured: usually it has no key."""
    return not (provider.get("usable", True) or provider.get("active") or provider.get("requests"))


def _guards(providers: dict[str, Any]) -> list[Text]:
    """Return a line for each provider with more to show, and one for all that are not usable."""
    lines = []
    for name, provider in providers.items():
        notes = [] if provider.get("usable", True) else ["not usable"]
        if provider.get("state", "well") != "well":
            notes.append(str(provider["state"]))
        if trial := provider.get("trial"):
            notes.append(
                f"{trial.get('row')} of {trial.get('needed')} trials good in a row, "
                f"{_time(trial.get('interval'))} apart"
            )
        if batch := (provider.get("waiting_by_class") or {}).get("batch"):
            notes.append(f"{batch} of {provider.get('waiting', 0)} in its queue are batch")
        if (messages := (provider.get("learned") or {}).get("messages", "no")) != "no":
            notes.append(f"messages: {messages}")
        if silent := _silent(provider.get("silent") or {}):
            notes.append(silent)
        if pace := provider.get("pace"):
            notes.append(f"pace {pace.get('per_minute')} a minute, {pace.get('left')} now")
        if provider.get("retries"):
            retries = provider["retries"]
            notes.append(f"{retries} {'retry' if retries == 1 else 'retries'}")
        if (budget := provider.get("retry_budget") or {}).get("used"):
            notes.append(f"{budget['used']} of {budget.get('limit')} affordable retries in 10 s")
        if budget.get("refused"):
            notes.append(f"{budget['refused']} retries not affordable")
        notes += [
            f"{fault} {count}" for fault, count in provider.get("faults", {}).items() if count
        ]
        if notes and not _unused(provider):
            lines.append(f" {name}: {', '.join(notes)}")
    if unused := ", ".join(name for name, provider in providers.items() if _unused(provider)):
        lines.append(f" not usable: {unused}")
    return [Text(printable(line), style="dim") for line in lines]


def _silent(silent: dict[str, int]) -> str:
    """Return the current silence of a provider; "" if no answer is under way."""
    if not silent.get("under_way"):
        return ""
    number = silent.get("stalled", 0) + silent.get("unanswered", 0)
    return f"silent for {_time(silent.get('longest'))}, {number} of {silent['under_way']} stalled"


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
        "streams": f"{streams.get('detached', 0)} without a "
        f"reader, {streams.get('finished', 0)} kept, {streams.get('responses', 0)} stored, "
        f"{_bytes(streams.get('bytes'))} of {_bytes(streams.get('max_bytes'))}; "
        f"{count(stats.get('slow_clients', 0), 'slow client')} dropped",
        "rejections": total + codes if rejected else "none",
        "loop": f"lag {_time(loop.get('lag'))}, worst {_time(loop.get('lag_max'))}; "
        f"cpu {_share(process.get('cpu'))}, {_counted(process.get('tasks'), 'task')}",
        "process": f"{_or_unknown(process.get('open_fds'))} of "
        f"{_or_unknown(process.get('max_fds'))} descriptors, {_bytes(process.get('rss_bytes'))}",
    }
    expires = (stats.get("tls") or {}).get("expires")
    if expires is not None and (soon := ends_soon(expires)) is not None:
        rows["certificate"] = soon.removeprefix("the certificate ")
    grid = Table.grid(padding=(0, 1))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column()
    for label, text in rows.items():
        grid.add_row(label, Text(printable(text)))
    return grid


def _incident(incident: dict[str, Any]) -> Text:
    clock = time.strftime("%H:%M:%S", time.localtime(incident.get("time", 0)))
    text = Text(f"{clock} ", style="dim", no_wrap=True, overflow="ellipsis")
    style = STYLES.get(str(incident.get("severity")), "none")
    return text.append(printable(incident.get("text", incident.get("kind", ""))), style=style)


def _time(seconds: float | None) -> str:
    if seconds is None:
        return UNKNOWN
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
        return UNKNOWN
    if size < 1 << 20:
        return f"{size / 1024:.0f} KiB"
    return f"{size / (1 << 20):.0f} MiB"


def _share(share: float | None) -> str:
    return UNKNOWN if share is None else f"{share:.0%}"


def _counted(number: int | None, noun: str) -> str:
    return f"{UNKNOWN} {noun}s" if number is None else count(number, noun)


def _or_unknown(value: object) -> str:
    return UNKNOWN if value is None else str(value)
