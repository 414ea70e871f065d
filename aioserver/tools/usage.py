"""`aioserver usage`: add up the ledger by caller, model, day, and the other fields of a bill.

It reads files, and asks no server. Of the package it needs only the reader of ledgers, and the
configuration if no file is named.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import click

from aioserver.commands import options
from aioserver.usage.ledger_reader import (
    CACHE_LOST_TOKENS,
    COLUMNS,
    LIFETIME_COLUMNS,
    Reading,
    files_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from aioserver.usage.ledger_reader import Sums

KEYS = (
    *("caller", "provider", "model", "day", "face", "path", "class", "service_tier", "outcome"),
    "cache_lost",
)
DEFAULT_KEYS = "caller,model"
SPANS = {"d": timedelta(days=1), "h": timedelta(hours=1)}
# Characters that a spreadsheet takes for the beginning of a formula (CWE-1236): a model's name may
# come from a client.
FORMULAS = ("=", "+", "-", "@", "\t", "\r")


def _check_keys(
    _context: click.Context, _parameter: click.Parameter, text: str
) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in KEYS:
            raise click.BadParameter(f"{name!r} is none of {', '.join(KEYS)}")
    if len(set(names)) < len(names):
        raise click.BadParameter("a name occurs twice")
    return names


def _check_moment(
    _context: click.Context, _parameter: click.Parameter, text: str | None
) -> datetime | None:
    """Return the moment in *text*, in UTC: a day, a time of a day, or how long ago."""
    if text is None:
        return None
    try:
        if ago := re.fullmatch(r"(\d{1,6})([dh])", text):
            return datetime.now(UTC) - int(ago[1]) * SPANS[ago[2]]
        moment = datetime.fromisoformat(text)
        return moment.replace(tzinfo=moment.tzinfo or UTC).astimezone(UTC)
    except (ValueError, OverflowError):
        message = f"{text!r} is neither a day such as 2026-11-01 nor a span such as 7d or 24h"
        raise click.BadParameter(message) from None


@click.command("usage")
@click.argument("files", nargs=-1, type=click.Path(exists=True, allow_dash=True, path_type=Path))
@click.option(
    "--by",
    metavar="KEYS",
    callback=_check_keys,
    default=DEFAULT_KEYS,
    show_default=True,
    help=f"What a row is for: names of {', '.join(KEYS)}, with commas between them.",
)
@click.option(
    "--since",
    metavar="MOMENT",
    callback=_check_moment,
    help="Only what has ended since then: a day as 2026-11-01 (UTC), a moment, or 7d or 24h ago.",
)
@click.option(
    "--until", metavar="MOMENT", callback=_check_moment, help="Only what has ended before then."
)
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV, for a spreadsheet.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for a program.")
@options.config
@options.version
def command(
    files: tuple[Path, ...],
    *,
    by: tuple[str, ...],
    since: datetime | None,
    until: datetime | None,
    as_csv: bool,
    as_json: bool,
    config: Path | None,
) -> int:
    """Add up what callers have spent, as the ledger has it.

    FILES are those of the ledger, or folders with them; `-` is stdin. Without any they are those
    in the directory that `usage.path` of the configuration names. Each attempt is counted once, at
    the moment of its end; what ran when its process was killed counts with an estimate, as `lost`.
    """
    if as_csv and as_json:
        raise click.UsageError("choose one of --csv and --json")
    if since is not None and until is not None and since >= until:
        raise click.UsageError("--since must be before --until")
    first = "" if since is None else f"{since - timedelta(days=1):%Y-%m-%d}"
    last = "~" if until is None else f"{until + timedelta(days=1):%Y-%m-%d}"
    paths: list[Path] = []
    for path in files or (_configured(config),):
        paths += files_of(path, first, last) if path.is_dir() else [path]
    names = ["class_" if name == "class" else name for name in by]
    reading = Reading(names, _text(since) or "", _text(until) or "")
    for path in paths:
        try:
            _read(reading, path)
        except OSError as error:
            print(f"{path} cannot be read: {error.strerror}", file=sys.stderr)
            return 1
    reading.finish()
    rows, columns = sorted(reading.rows.items()), _columns(by, reading.total)
    if as_json:
        _print_json(by, columns, rows, reading, _text(since), _text(until))
    elif as_csv:
        _print_csv(by, columns, rows)
    else:
        _print_table(by, columns, rows, reading.total)
    if reading.skipped:
        print(f"skipped {reading.skipped} lines that are torn, or no JSON", file=sys.stderr)
    if reading.lost:
        print(f"{reading.lost} lines could not be written, and are missing", file=sys.stderr)
    return 0


def _read(reading: Reading, path: Path) -> None:
    if str(path) == "-":
        reading.read(sys.stdin.buffer)
        return
    with path.open("rb") as file:
        reading.read(file)


def _configured(config: Path | None) -> Path:
    """Return the directory that the configuration names.

    Raises:
        UsageError: it names none, or is none.
    """
    from aioserver.config import Configuration  # noqa: PLC0415 - most need none of it
    from aioserver.config.faults import ConfigurationError  # noqa: PLC0415

    try:
        configuration = Configuration.load(config)
    except ConfigurationError as error:
        raise click.UsageError("\n".join(error.faults)) from None
    path = configuration.settings.usage.path
    if path is None:
        raise click.UsageError(
            f"{configuration.source} has no usage.path: name the files, or set it"
        )
    if not Path(path).is_dir():
        raise click.UsageError(f"usage.path: {path} is no directory here")
    return Path(path)


def _text(moment: datetime | None) -> str | None:
    """Return *moment* in the format of the ledger."""
    if moment is None:
        return None
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _columns(by: Sequence[str], total: Sums) -> list[str]:
    """Return the columns of rows for *by* whose sum is *total*."""
    lost = [CACHE_LOST_TOKENS] if "cache_lost" in by else []
    return [*COLUMNS, *lost, *(name for name in LIFETIME_COLUMNS if getattr(total, name))]


def _numbers(columns: Sequence[str], sums: Sums) -> list[int]:
    return [getattr(sums, column) for column in columns]


def _print_json(
    by: Sequence[str],
    columns: Sequence[str],
    rows: Iterable[tuple[tuple[str, ...], Sums]],
    reading: Reading,
    since: str | None,
    until: str | None,
) -> None:
    answer = {
        "from": since,
        "until": until,
        "by": list(by),
        "rows": [
            dict(zip((*by, *columns), (*names, *_numbers(columns, sums)), strict=True))
            for names, sums in rows
        ],
        "skipped_lines": reading.skipped,
        "lost_lines": reading.lost,
    }
    print(json.dumps(answer, indent=2))


def _print_csv(
    by: Sequence[str], columns: Sequence[str], rows: Iterable[tuple[tuple[str, ...], Sums]]
) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow((*by, *columns))
    for names, sums in rows:
        cells = [f"'{name}" if name.startswith(FORMULAS) else name for name in names]
        writer.writerow((*cells, *_numbers(columns, sums)))


def _print_table(
    by: Sequence[str],
    columns: Sequence[str],
    rows: Sequence[tuple[tuple[str, ...], Sums]],
    total: Sums,
) -> None:
    head = [*by, *(column.removesuffix("_tokens") for column in columns)]
    table = [head]
    for names, sums in rows:
        shown = [_printable(name) or "-" for name in names]
        table.append([*shown, *(f"{number:,}" for number in _numbers(columns, sums))])
    totals = [f"{number:,}" for number in _numbers(columns, total)]
    table.append(["total", *([""] * (len(by) - 1)), *totals])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        texts = [cell.ljust(width) for cell, width in zip(cells[: len(by)], widths, strict=False)]
        texts += [
            cell.rjust(width)
            for cell, width in zip(cells[len(by) :], widths[len(by) :], strict=True)
        ]
        print("  ".join(texts).rstrip())


def _printable(name: str) -> str:
    """Return *name*, which may come from a client, for a terminal."""
    return name if name.isprintable() else repr(name)[1:-1]
