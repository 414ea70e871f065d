"""Log lines: bounded, never waited for, and without what is nobody's business."""

from __future__ import annotations

import asyncio
import errno
import io
import itertools
import json
import logging
import os
import re
import threading
import time
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from aioserver.telemetry import logs
from tests.support.chat import CHAT, chat, to_end
from tests.support.faces import over_openai
from tests.support.failing import kill
from tests.support.keys import bearer, keys_of
from tests.support.logs import fields_of
from tests.support.raw import Raw
from tests.support.server import PACED
from tests.support.simulator import Behaviour
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

    from tests.support.clock import FakeClock
    from tests.support.server import MakeServer, RunningServer


@pytest.fixture
def blocked() -> Iterator[tuple[logs.BackgroundHandler, threading.Event, io.StringIO]]:
    """A handler whose stream takes nothing before the event is set."""
    free, written = threading.Event(), io.StringIO()

    class Stopped(io.StringIO):
        def write(self, line: str) -> int:
            free.wait(30)
            return written.write(line)

    handler = logs.BackgroundHandler(Stopped())
    handler.setFormatter(logging.Formatter("%(message)s"))
    yield handler, free, written
    free.set()
    handler.close()


def record(level: int, text: str, **fields: Any) -> logging.LogRecord:
    made = logging.LogRecord("test", level, "x.py", len(text), text, (), None)
    if fields:
        made.fields = fields
    return made


def wait_until(holds: Callable[[], bool]) -> None:
    """Wait for another thread."""
    end = time.monotonic() + 30.0
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_a_stream_that_takes_nothing_blocks_nobody(
    blocked: tuple[logs.BackgroundHandler, threading.Event, io.StringIO],
) -> None:
    handler, free, written = blocked
    for number in range(logs.MAX_LINES + 100):
        handler.emit(record(logging.INFO, f"line {number}"))
    dropped = handler.dropped
    free.set()
    handler.close()

    assert 90 <= dropped <= 100  # the thread may hold one of them
    assert written.getvalue().startswith("line 0\nline 1\n")
    assert written.getvalue().count("\n") == logs.MAX_LINES + 100 - dropped


def test_a_closed_stream_is_no_fault() -> None:
    stream = io.StringIO()
    stream.close()
    handler = logs.BackgroundHandler(stream)
    handler.emit(record(logging.INFO, "lost"))
    handler.close()
    assert handler.dropped == 1


class Disk(io.RawIOBase):
    """A file on a disk that is full for as long as `full` says."""

    def __init__(self) -> None:
        self.full = False
        self.written = b""

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.written += bytes(data)
        return len(data)


def test_a_log_on_a_full_disk_goes_on_with_whole_lines_when_there_is_room_again() -> None:
    disk = Disk()
    # as Python makes stderr
    stream = io.TextIOWrapper(io.BufferedWriter(disk), line_buffering=True)
    handler = logs.BackgroundHandler(stream)
    handler.setFormatter(logging.Formatter("%(message)s"))
    handler.emit(record(logging.INFO, "before"))
    wait_until(lambda: disk.written == b"before\n")
    disk.full = True
    for number in range(1000):
        handler.emit(record(logging.INFO, f"lost {number:040}"))
    wait_until(lambda: handler.dropped >= 1000)
    disk.full = False
    handler.emit(record(logging.INFO, "after"))
    handler.close()

    first, *middle, last = disk.written.decode().splitlines()
    assert (first, last) == ("before", "after")
    assert all(re.fullmatch(r"lost \d{40}", line) for line in middle)


def test_an_error_that_repeats_is_written_once_and_counted(clock: FakeClock) -> None:
    stream = io.StringIO()
    handler = logs.BackgroundHandler(stream, clock)
    handler.setFormatter(logs.JsonFormatter("aioserver", ""))
    for _ in range(7):
        handler.emit(record(logging.ERROR, "bug", request_id="r"))
    handler.emit(record(logging.ERROR, "another"))
    clock.now += logs.SAME_ERROR
    handler.emit(record(logging.ERROR, "bug", request_id="s"))
    for _ in range(3):
        handler.emit(record(logging.WARNING, "warning"))
    handler.close()

    lines = [orjson.loads(line) for line in stream.getvalue().splitlines()]
    assert [line["event"] for line in lines] == ["bug", "another", "bug", *["warning"] * 3]
    assert "suppressed" not in lines[0]
    assert (lines[2]["suppressed"], lines[2]["request_id"]) == (6, "s")


def test_an_error_that_is_thinned_out_at_its_source_is_written_each_time(clock: FakeClock) -> None:
    stream = io.StringIO()
    handler = logs.BackgroundHandler(stream, clock)
    handler.setFormatter(logs.JsonFormatter("aioserver", ""))
    for text in ("groq is silent", "other is silent"):
        incident = record(logging.ERROR, text)
        incident.__dict__["thinned"] = True
        handler.emit(incident)
    handler.close()

    lines = [orjson.loads(line)["event"] for line in stream.getvalue().splitlines()]
    assert lines == ["groq is silent", "other is silent"]


async def finished(caplog: pytest.LogCaptureFixture, number: int) -> list[dict[str, Any]]:
    """The lines of *number* requests."""

    await until(lambda: len(fields_of(caplog)) >= number)
    return fields_of(caplog)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "aioserver")
    return caplog


async def test_each_finished_request_is_one_line(
    make_server: MakeServer, log: pytest.LogCaptureFixture
) -> None:
    server = await make_server(Behaviour(ttft=0.01, interval=0))
    async with server.connect() as ws:
        await ws.send_json(chat("r1"))
        await to_end(ws)
    headers = {"X-Request-Id": "mine"}
    url = f"{server.v1}/chat/completions"
    async with server.session.post(url, json=CHAT, headers=headers) as response:
        await response.read()
    async with server.session.post(url, json={**CHAT, "stream": True}) as response:
        await response.read()

    websocket, whole, stream = await finished(log, 3)

    assert (websocket["request_id"], websocket["face"]) == ("r1", "websocket")
    assert (whole["request_id"], whole["face"]) == ("mine", "openai")
    for line in (websocket, whole, stream):
        assert (line["provider"], line["model"], line["status"]) == ("sim", "sim-model", 200)
        assert (line["outcome"], line["attempts"]) == ("ok", 1)
        assert line["duration_ms"] >= line["wait_ms"] >= 0
        assert "code" not in line
    assert websocket["duration_ms"] >= websocket["first_token_ms"] > 0
    assert stream["first_token_ms"] > 0
    assert websocket["tokens_out"] > 0
    assert whole["tokens_in"] > 0


async def test_how_a_request_ended_is_reported(
    make_server: MakeServer, log: pytest.LogCaptureFixture
) -> None:
    server = await make_server(
        Behaviour(ttft=0, interval=60), **{"chat.streams.resume_window": 30.0}
    )
    async with server.connect() as ws:
        await ws.send_json(chat("stopped"))
        await server.simulator.until(lambda stats: stats.active == 1)
        await ws.send_json({"action": "cancel", "request_id": "stopped"})
        await to_end(ws)
    async with Raw(server) as raw:
        await raw.post("/v1/chat/completions", {**CHAT, "stream": True})
        await server.simulator.until(lambda stats: stats.active == 1)
    await server.nothing_held()
    server.simulator.behaviour = Behaviour(fail_rate=1.0, fail_status=500)
    async with server.session.post(f"{server.v1}/chat/completions", json=CHAT) as response:
        assert response.status == 502

    lines = await finished(log, 3)

    assert [line["outcome"] for line in lines] == ["cancelled", "client_left", "provider_error"]
    assert [line["status"] for line in lines] == [499, 499, 502]
    assert lines[2]["code"] == "provider_error"


async def test_the_class_and_the_wait_at_the_key_are_told_where_they_are_not_the_usual(
    make_server: MakeServer, log: pytest.LogCaptureFixture
) -> None:
    limits: dict[str, Any] = {"max_concurrent": 1, "queue_size": 5, "class": "batch"}
    server = await make_server(PACED, **keys_of("web", **limits))

    await asyncio.gather(
        *(over_openai(server, "sim-model", headers=bearer("web")) for _ in range(2))
    )

    first, second = await finished(log, 2)
    assert first["class"] == second["class"] == "batch"
    assert "key_wait_ms" not in first
    assert second["key_wait_ms"] > 0


async def ask(server: RunningServer, face: str, name: str) -> None:
    """One request of the caller `web`, which may be refused."""
    if face == "websocket":
        async with server.connect(headers=bearer("web")) as ws:
            await ws.send_json(chat(name))
            await to_end(ws)
        return
    url, body = {
        "sse": (server.sse, {"request_id": name, "text": "Hello"}),
        "openai": (f"{server.v1}/chat/completions", CHAT),
        "anthropic": (f"{server.v1}/messages", {**CHAT, "max_tokens": 9}),
    }[face]
    async with server.session.post(url, json=body, headers=bearer("web")) as response:
        await response.read()


@pytest.mark.parametrize("face", ["websocket", "sse", "openai", "anthropic"])
@pytest.mark.parametrize(
    ("cause", "event", "code"),
    [
        ("the key's own limit", "request refused", "rate_limit_exceeded"),
        ("no provider", "request finished", "circuit_open"),
    ],
)
async def test_requests_that_are_refused_for_now_are_warnings_and_thinned_out(
    make_server: MakeServer,
    log: pytest.LogCaptureFixture,
    clock: FakeClock,
    face: str,
    cause: str,
    event: str,
    code: str,
) -> None:
    log.set_level(logging.WARNING, "aioserver")
    limits = {"requests_per_minute": 1} if cause == "the key's own limit" else {}
    server = await make_server(**keys_of("web", **limits))
    server.context.metrics.refusal_lines = logs.RateLimit(1, logs.SAME_ERROR, clock)
    if limits:
        await ask(server, face, "first")
    else:
        server.simulator.behaviour = Behaviour(fail_rate=1.0, fail_status=500)
        kill(server.provider.health.breaker)
    counter = server.context.metrics.rejections[code]
    names = itertools.count()

    async def ask_until(refused: int) -> None:
        # A request that is a trial is not refused.
        while counter.value < refused:
            await ask(server, face, f"r{next(names)}")

    await ask_until(5)
    refused = int(counter.value)
    clock.now += logs.SAME_ERROR
    await ask_until(refused + 1)

    lines: list[Any] = [line for line in log.records if line.getMessage() == event]
    assert [line.levelno for line in lines] == [logging.WARNING] * 2
    assert [line.fields["code"] for line in lines] == [code] * 2
    assert "suppressed" not in lines[0].fields
    assert lines[1].fields["suppressed"] == refused - 1 >= 3


# A line feed, a colour, C1's CSI, a reversal of the text, a lone surrogate, and a field of its
# own.
HOSTILE = 'x\n00:00:00 ERROR   forged \x1b[31m \x9b2J \u202e \x7f \u2028 \udc80 outcome="ok"'


@pytest.mark.parametrize("format_", ["console", "json"])
def test_what_is_not_printable_is_escaped_in_every_part_of_a_line(format_: str) -> None:
    formatter = (
        logs.ConsoleFormatter() if format_ == "console" else logs.JsonFormatter("aioserver", "")
    )
    hostile = record(logging.ERROR, HOSTILE, model=HOSTILE)
    try:
        raise ValueError(HOSTILE)
    except ValueError as error:
        hostile.exc_info = (type(error), error, error.__traceback__)

    first, *others = formatter.format(hostile).split("\n")

    assert all(line.isprintable() for line in (first, *others))
    assert "forged" in first
    if format_ == "json":
        assert not others
        line = json.loads(first)
        assert line["event"] == line["model"] == HOSTILE
        assert HOSTILE in line["traceback"]
    else:
        assert r"x\n00:00:00 ERROR   forged \x1b[31m \x9b2J \u202e \x7f \u2028 \udc80" in first
        assert r'outcome=\"ok\""' in first, "a value is no further field"
        assert others
        assert all(line.startswith("    ") for line in others), "a traceback begins no line"


async def test_a_model_on_any_face_begins_no_line_and_steers_no_terminal(
    server: RunningServer, log: pytest.LogCaptureFixture
) -> None:
    model = "m\n00:00:00 INFO forged\x1b[2J"
    async with server.connect() as ws:
        await ws.send_json(chat("r1", model=model))
        await to_end(ws)
    body = {"request_id": "r2", "text": "x", "model": model}
    async with server.session.post(server.sse, json=body) as response:
        await response.read()
    for stream in (True, False):
        await over_openai(server, model, stream=stream)
    await finished(log, 4)

    console = logs.ConsoleFormatter()
    lines = [console.format(record) for record in log.records]
    assert all(line.isprintable() for line in lines)
    assert sum(r"m\n00:00:00 INFO forged\x1b[2J" in line for line in lines) == 4


def failed(
    depth: int, word: str
) -> tuple[type[BaseException], BaseException, TracebackType | None]:
    """An exception with *word*, and a traceback of *depth* different lines or more."""

    def fail(left: int) -> None:
        if left:
            fail_otherwise(left - 1)
        raise ValueError(word)

    def fail_otherwise(left: int) -> None:
        if left:
            fail(left - 1)
        raise ValueError(word)

    try:
        fail(depth)
    except ValueError as exc:
        return ValueError, exc, exc.__traceback__
    raise AssertionError


@pytest.mark.parametrize("format_", ["json", "console"])
@pytest.mark.parametrize("word", ["x", "x" * 9000, "\u202e" * 3000, "ä\ud800" * 2000])
def test_of_several_processes_each_says_which_it_is_in_lines_that_no_pipe_tears(
    format_: str, word: str
) -> None:
    formatter: logging.Formatter
    if format_ == "json":
        formatter = logs.JsonFormatter("aioserver", "", worker=3)
    else:
        formatter = logs.ConsoleFormatter(worker=3)
    plain, broken, wide = (record(logging.INFO, f"said {word}") for _ in range(3))
    broken.exc_info = failed(60, word)
    wide.fields = {f"field{number}": word for number in range(20)}

    texts = [formatter.format(record) for record in (plain, broken, wide)]

    for text in texts:
        assert len(text.encode(errors="backslashreplace")) < logs.MAX_WHOLE
        if format_ == "json":
            assert json.loads(text)["worker"] == 3
        else:
            assert " worker 3: said" in text
    if len(word) == 1:
        assert texts[1].rstrip('"}').endswith("ValueError: x"), "the end of a traceback says most"


def test_a_program_that_embeds_us_may_show_where_a_line_was_logged() -> None:
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(
        logging.Formatter(
            "%(pathname)s %(filename)s:%(lineno)d %(module)s %(funcName)s %(message)s"
        )
    )
    logger = logging.getLogger("tests.embedding")
    logger.addHandler(handler)

    logs.write(logger, logging.WARNING, "request finished", {"face": "sse"})

    file, function = "(unknown file)", "(unknown function)"
    assert written.getvalue() == f"{file} {file}:0 {file} {function} request finished\n"


def test_a_line_of_one_process_has_no_worker_and_its_whole_traceback() -> None:
    broken = record(logging.INFO, "said")
    broken.exc_info = failed(60, "x")

    json_line = logs.JsonFormatter("aioserver", "").format(broken)
    console_line = logs.ConsoleFormatter().format(broken)

    assert "worker" not in orjson.loads(json_line)
    assert "worker" not in console_line
    for text in (json_line, console_line):
        assert len(text) > logs.MAX_WHOLE


def test_a_process_without_threads_drops_what_would_have_to_wait() -> None:
    reading, writing = os.pipe()
    try:
        handler = logs.DirectHandler(writing)
        handler.setFormatter(logging.Formatter("%(message)s"))
        handler.emit(record(logging.INFO, "x" * 9000))
        line = os.read(reading, 9000)
        assert len(line) <= logs.MAX_WHOLE
        assert line.endswith(b"\n")

        while not handler.dropped:
            handler.emit(record(logging.INFO, "y" * 4000))
        os.read(reading, 1 << 20)
        handler.emit(record(logging.INFO, "z"))

        assert os.read(reading, 9000) == b"z\n"
    finally:
        os.close(writing)
        os.close(reading)
    handler.emit(record(logging.INFO, "closed"))
    assert handler.dropped == 2
