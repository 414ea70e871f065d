"""`aioserver why`: where the time of one request went, and what it cost.

A request is the fields of its log line: those that `GET /requests/{id}` answers with, or those of
`request finished` and `attempt finished` in logs of JSON lines. A field that is missing, since it
does not apply or an older version has written the line, is left out.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import sys
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

import aiohttp
import click
from yarl import URL

from aioserver.commands import options
from aioserver.tools import remote
from aioserver.tools.remote import printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

WIDTH = 40
# Characters of a request's id in its log line.
MAX_NAME = 200
FINISHED, PART = "request finished", "attempt finished"
HOMES = {
    "home": "the member whose cache has its conversation",
    "other": "another member than the one whose cache has its conversation",
    "new": "a new conversation",
}
GAPS = {
    "provider_gap_ms": "the provider sent nothing for",
    "our_gap_ms": "aioserver passed an event on late, by",
    "client_gap_ms": "the client took nothing for",
}


class Row(NamedTuple):
    """A step that *began* at so many milliseconds after the admission, and took *ms*."""

    name: str
    began: float
    ms: float
    words: str = ""


@click.command("why")
@click.argument("request_id", metavar="ID")
@click.argument("logs", metavar="[LOG]...", nargs=-1, type=click.Path(allow_dash=True))
@remote.url_option
@remote.key_option
@options.version
def command(request_id: str, logs: tuple[str, ...], *, url: str, key: str | None) -> int:
    """Show where the time of one request went.

    It also shows what the request cost. The server at --url is asked, which remembers the last
    1,000 requests. With LOGs, files of JSON lines (also .gz; `-` is stdin), these are read, and no
    server is asked.
    """
    try:
        if logs:
            found = list(_in_logs(request_id[:MAX_NAME], logs))
            where = ", ".join(logs)
        else:
            found, where = asyncio.run(_at_server(request_id, url, key)), url
    except remote.Unreachable as error:
        print(error, file=sys.stderr)
        print("a log has it too: aioserver why ID LOG", file=sys.stderr)
        return 1
    except (OSError, EOFError, zlib.error) as error:
        print(f"a log cannot be read: {error}", file=sys.stderr)
        return 1
    for fields in found:
        print("\n".join(picture(fields)))
    if not found:
        print(
            f"the request {printable(request_id)} was not found: looked in {where}",
            file=sys.stderr,
        )
        if not logs:
            last = "the last 1,000 requests, of your own key unless it is an admin's"
            print(f"the server knows {last}; for others: aioserver why ID LOG", file=sys.stderr)
    return 0 if found else 1


async def _at_server(request_id: str, url: str, key: str | None) -> list[dict[str, Any]]:
    """Return the request at the server, if it has it.

    Raises:
        Unreachable: the server cannot be asked, or refuses.
    """
    name = quote(request_id, safe="", errors="replace")
    path = URL(f"{url}/requests/{name}", encoded=True)
    try:
        async with (
            remote.session(key) as session,
            asyncio.timeout(remote.CONNECT_TIMEOUT),
            session.get(path) as response,
        ):
            if response.status == 200:
                fields = await response.json()
                return [fields] if isinstance(fields, dict) else []
            fault = await remote.read_error(response)
    except (aiohttp.ClientError, OSError, ValueError) as error:
        raise remote.Unreachable(f"{url} cannot be reached: {remote.describe(error)}") from None
    if fault.code == "request_not_found":
        return []
    raise remote.Unreachable(f"{url} has refused: {fault.code}: {fault.message}")


def _in_logs(request_id: str, paths: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Yield each request of this id in the logs, with its attempts in `parts`."""
    parts: list[dict[str, Any]] = []
    skipped = 0
    for path in paths:
        for text in _lines(path):
            try:
                line = json.loads(text)
            except ValueError:
                skipped += 1
                continue
            if not isinstance(line, dict) or line.get("request_id") != request_id:
                continue
            if line.get("event") == PART:
                parts.append(line)
            elif line.get("event") == FINISHED:
                # The lines of attempts stand in front of it, perhaps among those of another caller.
                own = [part for part in parts if part.get("caller") == line.get("caller")]
                parts = [part for part in parts if part not in own]
                yield line | {"parts": own}
    if skipped:
        print(f"skipped {skipped} lines that are torn, or no JSON", file=sys.stderr)


def _lines(path: str) -> Iterator[bytes]:
    """Yield the lines of a log."""
    if path == "-":
        yield from sys.stdin.buffer
        return
    with gzip.open(path) if path.endswith(".gz") else Path(path).open("rb") as file:
        yield from file


def picture(fields: dict[str, Any]) -> Iterator[str]:
    """Yield the lines that show a request."""
    shown = {name: _text(fields.get(name)) for name in ("request_id", "outcome", "status")}
    yield " ".join(
        [
            f"{shown['request_id']}: {shown['outcome'] or 'ended'}",
            *([f"({_text(fields['code'])})"] if fields.get("code") else []),
            f"after {_seconds(_ms(fields, 'duration_ms'))}, status {shown['status']}",
        ]
    )
    yield "  " + ", ".join(
        f"{name.replace('_', ' ')} {_text(fields[name])}"
        for name in ("face", "target", "caller", "class", "provider", "model", "trace_id")
        if fields.get(name)
    )
    rows = list(_rows(fields))
    first = min((row.began for row in rows), default=0.0)
    end = max((row.began + row.ms for row in rows), default=0.0)
    scale = WIDTH / ((end - first) or 1.0)
    for row in rows:
        indent = min(round((row.began - first) * scale), WIDTH - 1)
        bar = " " * indent + "#" * max(1, min(round(row.ms * scale), WIDTH - indent))
        yield f"  {row.name:<12}|{bar:<{WIDTH}}| {_seconds(row.ms):>9}  {row.words}".rstrip()
    for name, words in _notes(fields):
        yield f"  {name:<12} {words}"


def _rows(fields: dict[str, Any]) -> Iterator[Row]:
    """Yield the steps of a request in their order, as far as its fields tell them."""
    key, wait = _ms(fields, "key_wait_ms"), _ms(fields, "wait_ms")
    connect, prefill = _ms(fields, "connect_ms"), _ms(fields, "prefill_ms")
    first, end = _ms(fields, "first_token_ms"), _ms(fields, "duration_ms")
    if door := _ms(fields, "door_ms"):
        yield Row("door", -door, door, "waited for a place in front of the handlers")
    if key:
        place, waiting = _count(fields, "key_place"), _count(fields, "key_waiting")
        yield Row("key", 0, key, f"place {place} of {waiting}" if place else "")
    if wait:
        yield Row("queue", key, wait, f"of {_text(fields.get('provider'))}")
    # The end of the steps so far, except attempts that failed after the first content.
    at = key + wait
    for fault in _objects(fields, "faults"):
        began, ms = _ms(fault, "at_ms"), _ms(fault, "ms")
        yield Row(
            "failed", began, ms, f"{_text(fault.get('provider'))}: {_text(fault.get('code'))}"
        )
        if not first or began < first - prefill:
            at = max(at, began + ms)
    if connect:
        at = max(at, first - prefill - connect) if prefill else at
        yield Row("connection", at, connect, "new connections")
        at += connect
    if not first:
        if (rest := end - at) > 0:
            yield Row("answer", at, rest, "whole, or none: no event was shown")
        return
    if prefill:
        yield Row("prefill", first - prefill, prefill, _prompt(fields))
    elif first > at:
        yield Row("first token", at, first - at, _prompt(fields))
    yield Row("stream", first, end - first, "")
    if held := _ms(fields, "held_ms"):
        hold = _text(fields.get("hold"))
        yield Row(
            "held", max(0.0, first - held), held, f"{hold}: at most so long, before it was shown"
        )


def _notes(fields: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the facts about a request that are no steps of it."""
    if fields.get("group"):
        home = HOMES.get(_text(fields.get("home")), "")
        yield "home", f"{_text(fields['group'])}{home and ': ' + home}"
    for seam in _objects(fields, "continued"):
        at, code = _count(seam, "at"), _text(seam.get("code"))
        names = f"{_text(seam.get('from'))} by {_text(seam.get('to'))}"
        yield "continued", f"after {at} characters of {names}: {code}"
    if not fields.get("continued") and fields.get("seams"):
        yield "continued", f"{_count(fields, 'seams')} times"
    if _count(fields, "attempts") > 1:
        yield "attempts", str(_count(fields, "attempts"))
    for name, words in GAPS.items():
        if gap := _ms(fields, name):
            yield "gap", f"{words} {_seconds(gap)}"
    if lost := _text(fields.get("cache_lost")):
        where, tokens = _text(fields.get("cache_lost_at")), _count(fields, "cache_lost_tokens")
        words = f"lost: {lost} ({where})" if where else f"lost: {lost}"
        yield "cache", f"{words}, {tokens:,} tokens read again" if tokens else words
    if "tokens_in" in fields:
        guess = " (estimated)" if fields.get("tokens_source") else ""
        written = f"{_count(fields, 'tokens_out'):,} tokens written"
        yield "cost", f"{_prompt(fields)}, {written}{guess}"
    parts = _objects(fields, "parts")
    for part in parts if len(parts) > 1 else ():
        guess = " (estimated)" if part.get("estimated") else ""
        asked = " ".join(_text(part.get(name)) for name in ("provider", "model", "outcome"))
        read, answered = _count(part, "tokens_in"), _count(part, "tokens_out")
        words = f"{asked}: {read:,} tokens read, {answered:,} written{guess}"
        yield f"attempt {_count(part, 'attempt')}", words


def _prompt(fields: dict[str, Any]) -> str:
    if "tokens_in" not in fields:
        return ""
    whole, cached = _count(fields, "tokens_in"), _count(fields, "cached_tokens")
    if "cached_tokens" not in fields:
        return f"{whole:,} tokens read"
    return f"{whole - cached:,} tokens read anew, {cached:,} from the cache"


def _objects(fields: dict[str, Any], name: str) -> list[dict[str, Any]]:
    value = fields.get(name)
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def _ms(fields: dict[str, Any], name: str) -> float:
    value = fields.get(name)
    return float(value) if isinstance(value, int | float) and value > 0 else 0.0


def _count(fields: dict[str, Any], name: str) -> int:
    return int(_ms(fields, name))


def _text(value: object) -> str:
    return "" if value is None else printable(value)


def _seconds(ms: float) -> str:
    return f"{ms / 1000:,.2f} s" if ms >= 1000 else f"{ms:,.1f} ms"
