"""`aioserver usage`: the ledger added up, for people, spreadsheets and programs."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner

from aioserver.tools.usage import command
from aioserver.usage.ledger_reader import COLUMNS
from tests.support.waiting import LATE

if TYPE_CHECKING:
    from pathlib import Path

    from click.testing import Result


def entry(number: int, day: str = "2026-11-28", **changes: Any) -> str:
    fields = {
        "ts": f"{day}T11:00:00.000Z",
        "id": f"9f3c2a71-{number:x}",
        "attempt": 1,
        "caller": "web",
        "face": "openai",
        "path": "chat/completions",
        "provider": "openai",
        "model": "gpt-4o-mini",
        "class": "interactive",
        "outcome": "ok",
        "in": 1200,
        "cached": 1024,
        "out": 340,
        "reasoning": 128,
        "source": "provider",
    }
    return json.dumps(fields | changes) + "\n"


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    """Two days, one of which has the files of two workers."""
    (tmp_path / "usage-2026-11-27.jsonl").write_text(entry(1, "2026-11-27"))
    (tmp_path / "usage-2026-11-28.w0.jsonl").write_text(
        entry(2) + entry(3, caller="", **{"class": "batch"}) + entry(4)[:50]
    )
    (tmp_path / "usage-2026-11-28.w1.jsonl").write_text(
        entry(5, outcome="cut", source="estimate", out=7)
        + '{"ts":"2026-11-28T12:00:00.000Z","lost":17}\n'
    )
    return tmp_path


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(command, [str(arg) for arg in args], standalone_mode=True)


def test_a_table_has_a_row_for_each_caller_and_model_and_a_total(ledger: Path) -> None:
    result = run(ledger)

    assert [" ".join(line.split()) for line in result.stdout.splitlines()] == [
        "caller model requests attempts input cached cache_write output reasoning audio estimated",
        "- gpt-4o-mini 1 1 1,200 1,024 0 340 128 0 0",
        "web gpt-4o-mini 3 3 3,600 3,072 0 687 384 0 1,207",
        "total 4 4 4,800 4,096 0 1,027 512 0 1,207",
    ]
    assert result.stderr == (
        "skipped 1 lines that are torn, or no JSON\n"
        "17 lines could not be written, and are missing\n"
    )


def test_csv_has_all_columns_and_no_total(ledger: Path) -> None:
    rows = list(csv.reader(io.StringIO(run(ledger, "--csv", "--by", "day,class").stdout)))

    assert rows[0] == ["day", "class", *COLUMNS]
    assert [row[:3] for row in rows[1:]] == [
        ["2026-11-27", "interactive", "1"],
        ["2026-11-28", "batch", "1"],
        ["2026-11-28", "interactive", "2"],
    ]


def test_the_tokens_that_caches_have_lost_have_a_column_by_verdict(tmp_path: Path) -> None:
    lost: list[dict[str, Any]] = [
        {"cache_lost": name, "cache_lost_tokens": 1000} for name in ("moved", "changed")
    ]
    entries = [entry(number, **fields) for number, fields in enumerate([{}, *lost, lost[1]])]
    (tmp_path / "usage-2026-11-28.jsonl").write_text("".join(entries))
    asked = (tmp_path, "--by", "caller,cache_lost")

    table = [" ".join(line.split()) for line in run(*asked).stdout.splitlines()]
    rows = json.loads(run(*asked, "--json").stdout)["rows"]
    head = run(*asked, "--csv").stdout.splitlines()[0].split(",")

    assert table[0].endswith("audio estimated cache_lost")
    assert [(row.split()[1], row.split()[-1]) for row in table[1:-1]] == [
        ("-", "0"),
        ("changed", "2,000"),
        ("moved", "1,000"),
    ]
    assert table[-1].endswith(" 3,000")
    assert [row["cache_lost_tokens"] for row in rows] == [0, 2000, 1000]
    assert head == ["caller", "cache_lost", *COLUMNS, "cache_lost_tokens"]


def test_writes_by_lifetime_have_columns_where_a_provider_reports_them(tmp_path: Path) -> None:
    entries = [
        entry(1, service_tier="flex", cache_write=6, cache_write_5m=4, cache_write_1h=2),
        entry(2, cache_write=5),
        entry(3, service_tier="flex", cache_write=2, cache_write_1h=2),
    ]
    (tmp_path / "usage-2026-11-28.jsonl").write_text("".join(entries))
    asked = (tmp_path, "--by", "service_tier")

    rows = json.loads(run(*asked, "--json").stdout)["rows"]
    table = [" ".join(line.split()) for line in run(*asked).stdout.splitlines()]
    head = run(*asked, "--csv").stdout.splitlines()[0].split(",")
    plain = run(*asked, "--csv", "--until", "2026-11-01").stdout.splitlines()[0].split(",")

    known = ["cache_write_5m_tokens", "cache_write_1h_tokens"]
    assert head == ["service_tier", *COLUMNS, *known]
    assert plain == ["service_tier", *COLUMNS]
    names = ("service_tier", "cache_write_tokens", *known)
    assert [[row[name] for name in names] for row in rows] == [["", 5, 0, 0], ["flex", 8, 4, 4]]
    assert table[0].endswith("estimated cache_write_5m cache_write_1h")
    assert table[-1].endswith(" 4 4")


def test_json_says_what_it_is_of(ledger: Path) -> None:
    asked = ("--json", "--by", "outcome", "--since", "2026-11-28", "--until", "2026-11-29")

    answer = json.loads(run(ledger, *asked).stdout)

    assert answer["from"] == "2026-11-28T00:00:00.000Z"
    assert answer["until"] == "2026-11-29T00:00:00.000Z"
    assert answer["by"] == ["outcome"]
    assert [(row["outcome"], row["attempts"]) for row in answer["rows"]] == [("cut", 1), ("ok", 2)]
    assert (answer["skipped_lines"], answer["lost_lines"]) == (1, 17)


def test_a_span_counts_back_from_now(tmp_path: Path) -> None:
    now = datetime.now(UTC)
    file = tmp_path / "lines.jsonl"
    file.write_text(
        "".join(
            entry(hours, ts=f"{now - timedelta(hours=hours):%Y-%m-%dT%H:%M:%S}.000Z")
            for hours in (1, 30, 300)
        )
    )

    counts = [
        json.loads(run(file, "--json", "--since", span).stdout)["rows"][0]["attempts"]
        for span in ("24h", "7d", "99d")
    ]

    assert counts == [1, 2, 3]


def test_no_name_is_a_formula_in_a_spreadsheet_or_moves_the_cursor(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    file.write_text(entry(1, model='=HYPERLINK("x")') + entry(2, model="\x1b[2J"))

    cells = [row[0] for row in csv.reader(io.StringIO(run(file, "--csv", "--by", "model").stdout))]
    table = run(file, "--by", "model").stdout

    assert '\'=HYPERLINK("x")' in cells
    assert "\x1b" not in table


def test_the_configured_directory_is_read_where_no_file_is_named(
    ledger: Path, tmp_path: Path
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        "llm: {active: p, providers: {p: {simulated: true, model: m}}}\n"
        f"usage: {{path: {json.dumps(str(ledger))}}}\n"
    )

    result = run("--config", config, "--csv")

    assert result.exit_code == 0, result.stderr
    assert len(result.stdout.splitlines()) == 3


@pytest.mark.parametrize(
    "args",
    [
        ("--by", "price"),
        ("--by", "caller,caller"),
        ("--since", "yesterday"),
        ("--since", "2026-11-28", "--until", "2026-11-28"),
        ("--csv", "--json"),
        ("nowhere.jsonl",),
        ("--config", "nowhere.yaml"),
    ],
)
def test_what_cannot_be_meant_is_a_usage_error(args: tuple[str, ...]) -> None:
    assert run(*args).exit_code == 2


def test_an_empty_ledger_is_an_empty_table(tmp_path: Path) -> None:
    result = run(tmp_path)

    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1].split() == ["total", *("0" for _ in COLUMNS)]


def test_it_reads_stdin_and_imports_nothing_of_the_server() -> None:
    program = (
        "import sys\nfrom aioserver.tools.usage import command\n"
        "command(['-', '--csv'], standalone_mode=False)\n"
        "print(*sorted(name for name in sys.modules if name.startswith('aioserver.')))"
    )

    ran = subprocess.run(
        [sys.executable, "-c", program],
        input=entry(1).encode(),
        capture_output=True,
        check=True,
        timeout=LATE,
    )

    lines = ran.stdout.decode().splitlines()
    assert lines[1].startswith("web,gpt-4o-mini,1,1,1200")
    assert lines[2].split() == [
        "aioserver.commands",
        "aioserver.commands.options",
        "aioserver.tools",
        "aioserver.tools.usage",
        "aioserver.usage",
        "aioserver.usage.ledger_reader",
    ]
