"""`aioserver why`: where the time of one request went, by a server and by logs."""

from __future__ import annotations

import gzip
import json
import re
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner

from aioserver.__main__ import cli
from tests.support.keys import bearer, key_of, keys_of
from tests.support.process import run_command
from tests.support.waiting import until

if TYPE_CHECKING:
    from pathlib import Path

    from click.testing import Result

    from tests.support.server import MakeServer

# A line of a version that knew none of the newer fields.
OLD = {
    "ts": "2026-11-24T21:35:07.120Z",
    "event": "request finished",
    "request_id": "r1",
    "face": "websocket",
    "provider": "demo",
    "model": "demo",
    "status": 200,
    "outcome": "ok",
    "duration_ms": 812.4,
    "wait_ms": 0.0,
    "attempts": 1,
    "first_token_ms": 203.9,
    "tokens_in": 9,
    "tokens_out": 31,
}
NEW: dict[str, Any] = OLD | {
    "caller": "web",
    "trace_id": "4bf92f3577b34da6a3ce929d0e0e4736",
    "group": "big",
    "home": "home",
    "duration_ms": 2000.0,
    "door_ms": 100.0,
    "key_wait_ms": 200.0,
    "key_place": 7,
    "key_waiting": 12,
    "wait_ms": 300.0,
    "faults": [{"provider": "groq", "code": "connect_timeout", "at_ms": 500.0, "ms": 100.0}],
    "connect_ms": 50.0,
    "prefill_ms": 350.0,
    "first_token_ms": 1000.0,
    "attempts": 2,
    "held_ms": 20.0,
    "hold": "calls",
    "seams": 1,
    "continued": [{"at": 812, "from": "demo", "to": "groq", "code": "provider_disconnected"}],
    "cached_tokens": 1024,
    "tokens_in": 1200,
    "cache_lost": "changed",
    "cache_lost_at": "messages[3]",
    "cache_lost_tokens": 31200,
}


def line(fields: dict[str, Any], **changes: Any) -> str:
    return json.dumps(fields | changes) + "\n"


def run(*args: str | Path, **kwargs: Any) -> Result:
    return CliRunner().invoke(cli, ["why", *map(str, args)], **kwargs)


def words(result: Result) -> list[str]:
    """The lines, without their bars."""
    return [
        " ".join(re.sub(r"\|[ #]{40}\|", "", text).split()) for text in result.stdout.splitlines()
    ]


def test_a_log_shows_each_step_and_the_cost(tmp_path: Path) -> None:
    parts: list[dict[str, Any]] = [
        {"request_id": "r1", "caller": "web", "event": "attempt finished", "attempt": n}
        | {"provider": "demo", "model": "demo", "outcome": "cut", "tokens_in": 9, "tokens_out": n}
        for n in (1, 2)
    ]
    log = tmp_path / "log"
    log.write_text("".join(line(each) for each in [*parts, {**parts[0], "caller": "app"}, NEW]))

    result = run("r1", log)

    assert result.exit_code == 0
    assert words(result) == [
        "r1: ok after 2.00 s, status 200",
        "face websocket, caller web, provider demo, model demo, trace id " + NEW["trace_id"],
        "door 100.0 ms waited for a place in front of the handlers",
        "key 200.0 ms place 7 of 12",
        "queue 300.0 ms of demo",
        "failed 100.0 ms groq: connect_timeout",
        "connection 50.0 ms new connections",
        "prefill 350.0 ms 176 tokens read anew, 1,024 from the cache",
        "stream 1.00 s",
        "held 20.0 ms calls: at most so long, before it was shown",
        "home big: the member whose cache has its conversation",
        "continued after 812 characters of demo by groq: provider_disconnected",
        "attempts 2",
        "cache lost: changed (messages[3]), 31,200 tokens read again",
        "cost 176 tokens read anew, 1,024 from the cache, 31 tokens written",
        "attempt 1 demo demo cut: 9 tokens read, 1 written",
        "attempt 2 demo demo cut: 9 tokens read, 2 written",
    ]


def test_each_bar_begins_where_its_step_began(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(line(NEW))

    bars = dict(re.findall(r"^  (\w+) +\|([ #]{40})\|", run("r1", log).stdout, re.MULTILINE))

    assert [name for name in bars if bars[name].startswith("#")] == ["door"]
    begun = [bars[name].index("#") for name in ("door", "key", "queue", "failed", "connection")]
    assert begun == sorted(begun)
    assert bars["stream"].endswith("#")
    assert bars["prefill"].rindex("#") + 1 == bars["stream"].index("#")


def test_a_log_of_an_older_version_shows_what_it_has(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(line(OLD))

    assert words(run("r1", log)) == [
        "r1: ok after 812.4 ms, status 200",
        "face websocket, provider demo, model demo",
        "first token 203.9 ms 9 tokens read",
        "stream 608.5 ms",
        "cost 9 tokens read, 31 tokens written",
    ]


def test_torn_lines_and_lines_that_are_no_json_are_counted(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(
        line(OLD)[:70].encode() + b"\n12:00:00 INFO request finished\n[1]\n\xff\xfe\n"
        b'{"request_id":["r1"],"event":"request finished"}\n' + line(OLD).encode()
    )

    result = run("r1", log)

    assert result.exit_code == 0
    assert result.stdout.count("r1: ok") == 1
    assert result.stderr == "skipped 3 lines that are torn, or no JSON\n"


def test_fields_of_the_wrong_types_are_left_out(tmp_path: Path) -> None:
    odd = {name: ["x"] for name in NEW} | {"request_id": "r1", "event": "request finished"}
    log = tmp_path / "log"
    log.write_text(line(odd) + line({"request_id": "r1", "event": "request finished"}))

    result = run("r1", log)

    assert (result.exit_code, result.exception) == (0, None)


@pytest.mark.parametrize(
    "request_id", ["a b", "a/b", "ä€😀", "new\nline", "\x1b[2J", "-", "x" * 256]
)
def test_a_strange_id_is_found_and_steers_no_terminal(tmp_path: Path, request_id: str) -> None:
    log = tmp_path / "log"
    log.write_text(line(OLD, request_id=request_id[:200]))

    result = run("--", request_id, log)

    assert result.exit_code == 0
    assert "\x1b" not in result.stdout
    assert len(words(result)) == 5


def test_compressed_logs_several_logs_and_stdin_are_read(tmp_path: Path) -> None:
    (tmp_path / "log.1.gz").write_bytes(gzip.compress(line(OLD, status=201).encode()))
    (tmp_path / "log").write_text(line(OLD, status=202))
    args = ("r1", tmp_path / "log.1.gz", tmp_path / "log", "-")

    result = run(*args, input=line(OLD, status=203))

    assert re.findall(r"status (\d+)", result.stdout) == ["201", "202", "203"]


@pytest.mark.parametrize("content", [None, b"no gzip", gzip.compress(b"x" * 999, mtime=0)[:20]])
def test_a_log_that_cannot_be_read_is_one_line(tmp_path: Path, content: bytes | None) -> None:
    log = tmp_path / "log.gz"
    if content is not None:
        log.write_bytes(content)

    result = run("r1", log)

    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("a log cannot be read: ")
    assert result.stderr.count("\n") == 1


def test_an_id_that_no_log_has_names_the_logs(tmp_path: Path) -> None:
    (tmp_path / "log").write_text(line(OLD))

    result = run("r2", tmp_path / "log")

    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == f"the request r2 was not found: looked in {tmp_path / 'log'}\n"


async def test_a_server_shows_a_request_to_its_caller_alone(make_server: MakeServer) -> None:
    server = await make_server(**keys_of("web", "app"))
    question = {"request_id": "a b/ü", "text": "hi"}
    async with server.session.post(server.sse, json=question, headers=bearer("web")) as response:
        await response.read()
    await until(lambda: len(server.context.monitor.ended) == 1)

    args = ("why", "a b/ü", "--url", server.base, "--key")
    code, out, err = await run_command(*args, key_of("web"))
    assert (code, err) == (0, "")
    assert out.startswith("a b/ü: ok after ")
    assert "prefill" in out
    assert "tokens written" in out
    code, out, err = await run_command(*args, key_of("app"))
    assert (code, out) == (1, "")
    assert err.startswith(f"the request a b/ü was not found: looked in {server.base}\n")
    code, out, err = await run_command(*args, "aio-nobody")
    assert (code, out) == (1, "")
    assert "invalid_api_key" in err


async def test_without_a_server_it_says_where_it_looked() -> None:
    code, out, err = await run_command("why", "r1", "--url", "http://127.0.0.1:1")

    assert (code, out) == (1, "")
    assert "http://127.0.0.1:1 cannot be reached" in err
    assert "aioserver why ID LOG" in err
