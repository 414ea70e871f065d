"""The files of the ledger: whole lines, by day, that nobody waits for, and what is lost is told."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from msgspec.structs import replace

from aioserver.telemetry.outcome import NOBODY, CacheLoss
from aioserver.usage.ledger import MAX_LINES, Ledger
from tests.support.ledgers import DAY, NOON, PART, line, lines_of, wait_until
from tests.support.waiting import LATE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[..., Ledger]]:
    """Opens ledgers in `usage`, and closes them."""
    made: list[Ledger] = []

    def make(worker: int | None = None, wall: Callable[[], float] = lambda: NOON) -> Ledger:
        made.append(Ledger(tmp_path / "usage", "9f3c2a71", worker, wall))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_an_attempt_is_one_line_with_all_that_is_known(
    opened: Callable[..., Ledger], tmp_path: Path
) -> None:
    ledger = opened()

    ledger.put(line(394))
    ledger.close()

    assert lines_of(tmp_path / "usage") == {
        "usage-2026-11-28.jsonl": [
            {
                "ts": "2026-11-28T12:00:00.000Z",
                "id": "9f3c2a71-18a",
                "attempt": 1,
                "request_id": "r",
                "caller": "web",
                "face": "openai",
                "path": "chat/completions",
                "provider": "openai",
                "model": "gpt",
                "class": "interactive",
                "outcome": "ok",
                "in": 1200,
                "cached": 1024,
                "cache_write": 0,
                "out": 340,
                "reasoning": 128,
                "audio_in": 0,
                "audio_out": 0,
                "source": "provider",
                "wait_ms": 12.1,
                "first_ms": 310.0,
                "ms": 2200.0,
            }
        ]
    }


def test_what_nobody_knows_is_absent(opened: Callable[..., Ledger], tmp_path: Path) -> None:
    ledger = opened()

    ledger.put(line(cost=replace(PART, source=NOBODY, first=0.0)))
    ledger.close()

    [[only]] = lines_of(tmp_path / "usage").values()
    assert only["source"] == "none"
    assert not only.keys() & {"in", "out", "cached", "reasoning", "first_ms"}


def test_a_tier_and_writes_by_their_lifetime_are_in_the_line_if_they_are_known(
    opened: Callable[..., Ledger], tmp_path: Path
) -> None:
    ledger = opened()
    tokens = replace(PART.tokens, cache_write=6, lifetimes=(("5m", 4), ("1h", 2)))

    ledger.put(line(1, cost=replace(PART, tokens=tokens, tier='fl"ex\n')))
    ledger.put(line(2, cost=replace(PART, source=NOBODY, tokens=tokens, tier="flex")))
    ledger.close()

    [[one, unknown]] = lines_of(tmp_path / "usage").values()
    assert (one["cache_write"], one["cache_write_5m"], one["cache_write_1h"]) == (6, 4, 2)
    assert one["service_tier"] == 'fl"ex\n'
    assert not one.keys() & {"cache_write_30m", "cache_write_12h"}
    assert unknown["service_tier"] == "flex"
    assert not unknown.keys() & {"cache_write", "cache_write_5m"}


def test_a_lost_cache_is_in_the_line_of_its_attempt(
    opened: Callable[..., Ledger], tmp_path: Path
) -> None:
    ledger = opened()

    ledger.put(line(lost=CacheLoss("moved", "full", None, 4485)))
    ledger.close()

    [[only]] = lines_of(tmp_path / "usage").values()
    assert (only["cache_lost"], only["cache_lost_tokens"]) == ("moved", 4485)


def test_names_of_clients_are_cut_and_cannot_begin_a_line(
    opened: Callable[..., Ledger], tmp_path: Path
) -> None:
    ledger = opened()
    odd = 'x"\n{"id":"y"}\udcff'

    ledger.put(line(request_id=odd + "z" * 1000, cost=replace(PART, model="m" * 1000)))
    ledger.close()

    [[only]] = lines_of(tmp_path / "usage").values()
    assert only["request_id"] == (odd + "z" * 1000)[:200]
    assert only["model"] == "m" * 200


def test_every_name_may_have_any_characters(opened: Callable[..., Ledger], tmp_path: Path) -> None:
    ledger = opened()
    odd = 'a"b\\c\x1b\x7f\u2028ü\udcff\n'

    for number in (1, 2):
        part = replace(PART, provider=odd, model=odd, first=0.0, wait=1e9, source="estimate")
        ledger.put(line(number, NOON + 0.9996, part, caller=odd, face=odd, path=odd, batch=True))
    ledger.close()

    [lines] = lines_of(tmp_path / "usage").values()
    assert [each["id"] for each in lines] == ["9f3c2a71-1", "9f3c2a71-2"]
    for each in lines:
        assert {each[name] for name in ("caller", "face", "path", "provider", "model")} == {odd}
        assert (each["ts"], each["class"]) == ("2026-11-28T12:00:00.999Z", "batch")


def test_only_its_user_may_read_it(opened: Callable[..., Ledger], tmp_path: Path) -> None:
    opened()

    [file] = (tmp_path / "usage").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "usage").stat().st_mode) == 0o700


def test_each_day_and_each_worker_has_its_file(
    opened: Callable[..., Ledger], tmp_path: Path
) -> None:
    alone, worker = opened(), opened(3)

    alone.put(line(1))
    alone.put(line(2, NOON + DAY))
    alone.put(line(3))
    worker.put(line(4))
    for ledger in (alone, worker):
        ledger.close()

    ids = {
        name: [each["id"] for each in lines]
        for name, lines in lines_of(tmp_path / "usage").items()
    }
    assert ids == {
        "usage-2026-11-28.jsonl": ["9f3c2a71-1", "9f3c2a71-3"],
        "usage-2026-11-28.w3.jsonl": ["9f3c2a71-4"],
        "usage-2026-11-29.jsonl": ["9f3c2a71-2"],
    }


def test_a_torn_line_does_not_tear_the_next(opened: Callable[..., Ledger], tmp_path: Path) -> None:
    (tmp_path / "usage").mkdir()
    file = tmp_path / "usage" / "usage-2026-11-28.jsonl"
    file.write_bytes(b'{"ts":"2026-11-28T1')
    ledger = opened()

    ledger.put(line(7))
    ledger.close()

    torn, whole = file.read_bytes().splitlines()
    assert torn == b'{"ts":"2026-11-28T1'
    assert json.loads(whole)["id"] == "9f3c2a71-7"


def test_a_file_that_was_moved_away_is_begun_anew(
    opened: Callable[..., Ledger], tmp_path: Path
) -> None:
    ledger = opened()
    ledger.put(line(1))
    wait_until(lambda: ledger.written == 1)

    (tmp_path / "usage").rename(tmp_path / "moved")
    ledger.put(line(2))
    ledger.close()

    [[only]] = lines_of(tmp_path / "usage").values()
    assert only["id"] == "9f3c2a71-2"


def test_lines_wait_for_a_directory_that_is_away(
    opened: Callable[..., Ledger], tmp_path: Path
) -> None:
    ledger = opened()
    (tmp_path / "usage").rename(tmp_path / "away")
    (tmp_path / "usage").write_text("no directory")

    ledger.put(line(1))
    wait_until(lambda: ledger.trouble is not None)
    ledger.put(line(2))
    (tmp_path / "usage").unlink()
    (tmp_path / "away").rename(tmp_path / "usage")
    wait_until(lambda: ledger.written == 2)

    assert ledger.trouble is None
    assert ledger.lost == ledger.waiting == 0
    [lines] = lines_of(tmp_path / "usage").values()
    assert [each["id"] for each in lines] == ["9f3c2a71-1", "9f3c2a71-2"]


def test_beyond_its_room_lines_are_lost_counted_and_the_file_says_so(
    opened: Callable[..., Ledger], tmp_path: Path
) -> None:
    ledger = opened()
    (tmp_path / "usage").rename(tmp_path / "away")
    (tmp_path / "usage").write_text("no directory")
    ledger.put(line(1))
    wait_until(lambda: ledger.trouble is not None)

    for number in range(2, MAX_LINES + 19):
        ledger.put(line(number))
    lost = ledger.lost
    (tmp_path / "usage").unlink()
    (tmp_path / "away").rename(tmp_path / "usage")
    wait_until(lambda: not ledger.waiting)

    assert lost == ledger.lost == 17
    assert ledger.written == MAX_LINES + 1
    [lines] = lines_of(tmp_path / "usage").values()
    assert [each["lost"] for each in lines if "lost" in each] == [17]
    assert len(lines) == MAX_LINES + 2


def test_an_end_is_not_held_up_by_a_disk(opened: Callable[..., Ledger], tmp_path: Path) -> None:
    ledger = opened()
    (tmp_path / "usage").rename(tmp_path / "away")
    (tmp_path / "usage").write_text("no directory")
    ledger.put(line(1))
    wait_until(lambda: ledger.trouble is not None)

    ledger.close()

    wait_until(lambda: ledger.lost == 1)
    assert ledger.waiting == 0


# A file that may grow no further is a full disk for its process.
FULL = """
import json, resource, signal, sys
from pathlib import Path
from aioserver.usage.ledger import Ledger
from tests.support.ledgers import NOON, line, wait_until
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
ledger = Ledger(Path(sys.argv[1]) / "usage", "9f3c2a71", wall=lambda: NOON)
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, most))
for number in range(1, 11):
    ledger.put(line(number))
wait_until(lambda: ledger.trouble is not None)
resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
wait_until(lambda: not ledger.waiting)
ledger.close()
print(json.dumps([ledger.written, ledger.lost, ledger.trouble is None]))
"""


def test_a_line_that_a_full_disk_has_cut_is_written_again(tmp_path: Path) -> None:
    program = [sys.executable, "-c", FULL, str(tmp_path)]

    ran = subprocess.run(program, capture_output=True, check=True, timeout=LATE)

    assert json.loads(ran.stdout) == [10, 0, True]
    file = tmp_path / "usage" / "usage-2026-11-28.jsonl"
    whole = [text for text in file.read_bytes().splitlines() if text.endswith(b"}")]
    assert [json.loads(text)["id"] for text in whole] == [f"9f3c2a71-{n:x}" for n in range(1, 11)]


def test_nobody_waits_for_a_write(opened: Callable[..., Ledger], tmp_path: Path) -> None:
    (tmp_path / "usage").mkdir()
    file = tmp_path / "usage" / "usage-2026-11-28.jsonl"
    # A pipe takes 64 KiB, and then holds up whoever writes, until somebody reads.
    os.mkfifo(file)
    ledger = opened()

    for number in range(1, 1001):
        ledger.put(line(number))
    with file.open("rb") as pipe:
        ids = [json.loads(pipe.readline())["id"] for _ in range(1000)]

    assert ids == [f"9f3c2a71-{number:x}" for number in range(1, 1001)]
    wait_until(lambda: ledger.written == 1000)
