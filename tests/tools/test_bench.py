"""The `bench` command against real servers, and against servers that break their word."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import subprocess
import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import web
from click.testing import CliRunner
from rich.console import Console

from aioserver.__main__ import cli
from aioserver.client import AnswerError
from aioserver.provider_errors import CircuitOpen, ProviderQueueFull, ProviderQueueTimeout
from aioserver.tools import remote
from aioserver.tools.bench import command, table
from aioserver.tools.bench.clients import Question
from aioserver.tools.bench.limits import Peaks, find_limit
from aioserver.tools.bench.load import Plan, Run
from aioserver.tools.bench.results import Attempt, Results, Samples
from tests.support.process import WITHOUT_RICH, Process, run_command
from tests.support.scripted_provider import DONE
from tests.support.server import CONCURRENCY, MakeServer
from tests.support.simulator import Behaviour
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from aiohttp.typedefs import Handler

    from tests.support.server import RunningServer

FACES = ("websocket", "sse", "openai", "responses_ws", "anthropic")
ONE_PLACE = {f"{CONCURRENCY}.max_connections": 1, f"{CONCURRENCY}.queue_timeout": 0}
SLOW = Behaviour(ttft=0.3, interval=0.01, tokens=5)


def planned(url: str, **fields: Any) -> Plan:
    question = fields.pop("question", Question(prompt="Hello"))
    defaults: dict[str, Any] = {"face": "websocket", "clients": 4, "requests": 2, "timeout": 20.0}
    return Plan(url=url, question=question, **{**defaults, **fields})


async def ran(url: str, **fields: Any) -> dict[str, Any]:
    """The report of a run to its end."""
    run = Run(planned(url, **fields))
    await run.execute()
    return run.report()


@asynccontextmanager
async def saying(path: str, handler: Handler) -> AsyncIterator[str]:
    """A server of which only *path* is there, and its base URL."""
    app = web.Application()
    app.router.add_route("*", path, handler)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    try:
        yield f"http://{host}:{port}"
    finally:
        await runner.cleanup()


# The faces.


@pytest.mark.parametrize("face", FACES)
async def test_every_answer_is_complete(server: RunningServer, face: str) -> None:
    report = await ran(server.base, face=face)

    assert report["requests"]["total"] == report["requests"]["ok"] == 8
    assert report["complete"]
    assert report["refused"] == report["incomplete"] == {}
    assert report["limit"] == {"code": None, "text": "no limit was met"}
    assert report["latency"]["count"] == report["first_token"]["count"] == 8
    assert 0 < report["gap"]["count"] <= report["events"]["total"] - 8
    assert 0 < report["first_token"]["p50"] <= report["latency"]["p50"]
    assert server.simulator.stats().requests == 8


@pytest.mark.parametrize("face", ["openai", "anthropic"])
async def test_a_whole_answer_is_complete_too(server: RunningServer, face: str) -> None:
    question = Question(prompt="Hello", streamed=False, max_tokens=3)

    report = await ran(server.base, face=face, question=question)

    assert report["requests"]["ok"] == 8
    assert report["first_token"] is None
    assert report["events"]["total"] == 0


async def test_endpoints_are_where_the_server_says(
    make_server: MakeServer,
) -> None:
    server = await make_server(
        **{"chat.sse.endpoint": "/elsewhere", "chat.websocket.endpoint": "/there"}
    )

    for face in FACES:
        assert (await ran(server.base, face=face))["requests"]["ok"] == 8


async def test_a_duration_ends_the_run(server: RunningServer) -> None:
    report = await ran(server.base, requests=None, duration=0.2)

    assert report["complete"]
    assert report["requests"]["ok"] >= 4


async def test_the_key_goes_with_every_request() -> None:
    seen = []

    async def handler(request: web.Request) -> web.Response:
        seen.append(request.headers.get("Authorization"))
        return await told(request, PROPER)

    async with saying("/{any:.*}", handler) as base:
        report = await ran(base, face="sse", clients=1, requests=1, key="k")

    assert report["complete"]
    assert len(seen) >= 2, "the one for the endpoints and the chat"
    assert set(seen) == {"Bearer k"}


# Limits.


def test_every_refusal_is_known_in_a_process_that_has_loaded_nothing_else() -> None:
    script = "from aioserver.tools.bench.results import REFUSALS; print(*REFUSALS)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert set(done.stdout.split()) >= {
        error.code for error in (ProviderQueueFull, ProviderQueueTimeout, CircuitOpen)
    }


@pytest.mark.parametrize("face", FACES)
async def test_the_full_limit_is_named(make_server: MakeServer, face: str) -> None:
    server = await make_server(SLOW, **ONE_PLACE)

    report = await ran(server.base, face=face, requests=1)

    assert report["requests"]["ok"] == 1
    assert report["refused"] == {"server_at_capacity": 3}
    assert report["complete"]
    assert report["limit"] == {
        "code": "server_at_capacity",
        "text": "the server was full: 3 of 4 refused with server_at_capacity"
        " (chat.websocket.concurrency.max_connections=1 reached)",
    }


@pytest.mark.parametrize("face", ["websocket", "sse"])
async def test_waiting_at_the_provider_is_named(make_server: MakeServer, face: str) -> None:
    server = await make_server(SLOW, **{"llm.providers.sim.http_client.concurrent_requests": 1})

    report = await ran(server.base, face=face, clients=3, requests=1)

    assert report["requests"]["ok"] == 3
    assert report["limit"]["code"] == "provider_waiting"
    assert report["limit"]["text"].startswith(
        "requests waited at the provider: 2 of 3, the longest"
    )


async def test_waiting_for_admission_is_named(
    make_server: MakeServer,
) -> None:
    server = await make_server(SLOW, **{f"{CONCURRENCY}.max_connections": 1})

    report = await ran(server.base, clients=3, requests=1)

    assert report["requests"]["ok"] == 3
    assert report["limit"]["code"] == "connections_waiting"
    assert report["limit"]["text"].startswith("clients waited for admission: 2 of 3, the longest")


async def test_waiting_that_no_frame_tells_is_read_from_the_server(
    make_server: MakeServer,
) -> None:
    """Takes over 2 s: the server makes its numbers once a second."""
    behaviour = Behaviour(ttft=0.6, interval=0)
    server = await make_server(
        behaviour, **{"llm.providers.sim.http_client.concurrent_requests": 1}
    )

    report = await ran(server.base, face="openai", requests=1)

    assert report["limit"]["code"] == "provider_waiting"
    assert report["limit"]["text"].startswith("requests waited at the provider: ")
    assert report["limit"]["text"].endswith(" at once (sim: concurrent_requests=1 reached)")


@pytest.mark.parametrize(
    ("in_flight", "limit"), [(2, "requests_per_minute=3500"), (25, "concurrent_requests=25")]
)
def test_requests_that_wait_while_places_are_free_wait_for_the_pace(
    in_flight: int, limit: str
) -> None:
    peaks = Peaks()
    state = {"in_flight": in_flight, "limit": 25, "waiting": 40, "pace": {"per_minute": 3500}}
    peaks.update({"providers": {"openai": state}})

    assert find_limit(Results(begun=90), peaks)["text"] == (
        f"requests waited at the provider: 40 at once (openai: {limit} reached)"
    )


def test_several_codes_are_told_the_most_frequent_first() -> None:
    results = Results(begun=9)
    for code in ("provider_queue_full", "provider_queue_full", "server_at_capacity"):
        results.count(results.refused, code, "so it is")

    assert find_limit(results, Peaks())["text"] == (
        "the queue of a provider was full: 2 of 9 refused with provider_queue_full (so it is);"
        " also 1 with server_at_capacity"
    )


# What is not complete.


@pytest.mark.parametrize("face", FACES)
async def test_an_answer_that_was_cut_is_incomplete(make_server: MakeServer, face: str) -> None:
    server = await make_server(Behaviour(ttft=0, interval=0, tokens=10, cut_after=3))

    report = await ran(server.base, face=face)

    assert report["requests"]["ok"] == 0
    assert report["incomplete"] == {"provider_disconnected": 8}
    assert not report["complete"]


async def test_a_provider_that_fails_is_no_refusal(
    make_server: MakeServer,
) -> None:
    server = await make_server(Behaviour(ttft=0, interval=0, fail_rate=1.0, fail_status=500))

    report = await ran(server.base, face="openai", requests=1)

    assert report["incomplete"] == {"provider_error": 4}


async def test_an_answer_that_does_not_end_in_time_is_incomplete(
    make_server: MakeServer,
) -> None:
    server = await make_server(
        Behaviour(ttft=0, interval=0, stall_after=2), **{"chat.streams.resume_window": 0}
    )

    report = await ran(server.base, requests=1, timeout=0.2)

    assert report["incomplete"] == {"timeout": 4}


async def told(request: web.Request, body: list[bytes]) -> web.Response:
    """A response with *body*, whose events are those of the request's answer."""
    asked = json.loads(await request.read() or b"{}").get("request_id", "")
    text = b"".join(body).replace(b"ASKED", asked.encode())
    return web.Response(body=text, content_type="text/event-stream")


def event(number: int, status: bytes) -> bytes:
    chunk = b'"chunk":{"type":"text","data":"Hi"}' if status == b"chunk" else b'"chunk":{}'
    frame = b'{"request_id":"ASKED","event_id":%d,"status":"%b",%b}' % (number, status, chunk)
    return b"id: %d\nevent: %b\ndata: %b\n\n" % (number, status, frame)


PROPER = [event(n, s) for n, s in enumerate((b"processing", b"chunk", b"complete"), 1)]
SAID = b'data: {"choices":[{"index":0,"delta":{"content":"Hi"}}]}\n\n'
STOPPED = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'

WROTE = b'data: {"type":"content_block_delta"}\n\n'
REASON = b'data: {"type":"message_delta","delta":{"stop_reason":"end_turn"}}\n\n'
STOP = b'data: {"type":"message_stop"}\n\n'


@pytest.mark.parametrize(
    ("face", "body", "reason"),
    [
        ("sse", PROPER[:2], "connect_error"),
        ("sse", [PROPER[0], PROPER[2]], "protocol_error"),
        ("sse", [PROPER[0], *PROPER], "protocol_error"),
        ("sse", [b"data: what\n\n"], "protocol_error"),
        ("openai", [SAID, DONE], "no_finish_reason"),
        ("openai", [SAID, STOPPED.replace(b"stop", b""), DONE], "no_finish_reason"),
        ("openai", [SAID, STOPPED], "no_done"),
        ("openai", [SAID, STOPPED, DONE, SAID], "events_after_the_end"),
        ("openai", [b"data: what\n\n"], "not_understood"),
        ("openai", [SAID, b'data: {"error":{"code":"read_timeout"}}\n\n'], "read_timeout"),
        ("anthropic", [WROTE], "no_message_stop"),
        ("anthropic", [WROTE, STOP], "no_stop_reason"),
        ("anthropic", [WROTE, REASON, STOP, WROTE], "events_after_the_end"),
        ("anthropic", [b"data: what\n\n"], "not_understood"),
        ("anthropic", [b"data: []\n\n"], "not_understood"),
        (
            "anthropic",
            [WROTE, b'data: {"type":"error","error":{"code":"read_timeout"}}\n\n'],
            "read_timeout",
        ),
    ],
)
async def test_a_server_that_breaks_its_word_is_seen(
    face: str, body: list[bytes], reason: str
) -> None:
    async def handler(request: web.Request) -> web.Response:
        return await told(request, body)

    path = {
        "sse": "/sse/chat",
        "openai": "/v1/chat/completions",
        "anthropic": "/v1/messages",
    }[face]
    async with saying(path, handler) as base:
        report = await ran(base, face=face, clients=1, requests=1)

    assert report["incomplete"] == {reason: 1}


@pytest.mark.parametrize(
    ("frames", "reason"),
    [
        ([{"type": "response.created"}], "closed"),
        (
            [
                {"type": "response.created", "sequence_number": 0},
                {"type": "response.completed", "sequence_number": 2},
            ],
            "events_missing",
        ),
        (
            [
                {"type": "response.created", "sequence_number": 0},
                {"type": "response.failed", "error": {"code": "read_timeout"}},
            ],
            "read_timeout",
        ),
        (
            [{"type": "error", "status": 404, "error": {"code": "model_not_found"}}],
            "model_not_found",
        ),
        ([[]], "not_understood"),
    ],
)
async def test_a_response_that_has_no_good_end_is_seen(frames: list[Any], reason: str) -> None:
    async def handler(request: web.Request) -> web.WebSocketResponse:
        ws = web.WebSocketResponse()
        await ws.prepare(request)
        assert (await ws.receive_json())["type"] == "response.create"
        for frame in frames:
            await ws.send_json(frame)
        return ws

    async with saying("/v1/responses", handler) as base:
        report = await ran(base, face="responses_ws", clients=1, requests=1)

    assert report["incomplete"] == {reason: 1}


@pytest.mark.parametrize(
    ("status", "field", "code"),
    [(503, "refused", "server_at_capacity"), (404, "incomplete", "not_found")],
)
@pytest.mark.parametrize(
    ("face", "path"), [("websocket", "/ws/chat"), ("responses_ws", "/v1/responses")]
)
async def test_a_refused_handshake_has_the_code_of_its_status(
    status: int, field: str, code: str, face: str, path: str
) -> None:
    asked = []

    async def handler(request: web.Request) -> web.Response:
        asked.append(request.headers.get("Upgrade"))
        return web.Response(status=status)

    async with saying(path, handler) as base:
        report = await ran(base, clients=1, requests=1, face=face)

    assert report[field] == {code: 1}
    assert report["requests"][field] == 1
    assert asked.count("websocket") == 1, "nothing is asked again"


def test_only_what_says_not_now_before_the_first_token_is_a_refusal() -> None:
    results = Results()
    early, late = Attempt(results), Attempt(results)
    late.event(token=True)

    for attempt in (early, late):
        attempt.fail(AnswerError("server_shutdown", "the server is\x1b stopping"))

    assert results.refused == {"server_shutdown": 1}
    assert results.incomplete == {"server_shutdown": 1}
    assert results.messages == {"server_shutdown": "the server is  stopping"}


# The numbers.


def test_percentiles_are_those_of_the_nearest_rank() -> None:
    samples = Samples()
    for number in range(100, 0, -1):
        samples.add(number)

    assert samples.summary() == {"p50": 50, "p95": 95, "p99": 99, "count": 100}


def test_no_more_samples_are_kept_than_allowed_and_it_is_reported() -> None:
    samples = Samples(limit=100)
    for number in range(10_000):
        samples.add(float(number))

    summary = samples.summary()
    assert samples.thinned
    assert summary is not None
    assert summary["count"] == 10_000
    assert 3000 < summary["p50"] < 7000

    results = Results(gap=samples)
    assert results.thinned() == ["gap"]


def test_a_flood_of_codes_is_bounded() -> None:
    results = Results()
    for number in range(1000):
        results.count(results.incomplete, f"code_{number}", "")

    assert len(results.incomplete) <= 51
    assert results.incomplete["other"] == 950


async def test_the_table_shows_the_numbers_of_the_report(
    make_server: MakeServer,
) -> None:
    server = await make_server(SLOW, **ONE_PLACE)
    report = await ran(server.base, requests=1)
    console = Console(width=80)

    with console.capture() as capture:
        table.show(report, console)

    text = capture.get()
    assert "server_at_capacity 3" in text
    assert table.duration(report["latency"]["p50"]) in text
    assert "complete: 1 of 1 answers have their end, every event, once, in order" in text
    assert f"limit: {report['limit']['text']}\n" in text


async def test_the_table_says_why_answers_are_incomplete(
    make_server: MakeServer,
) -> None:
    server = await make_server(Behaviour(ttft=0, interval=0, stall_after=2))
    report = await ran(server.base, face="openai", requests=1, timeout=0.2)
    console = Console(width=80)

    with console.capture() as capture:
        table.show(report, console)

    assert "incomplete: 4 of 4 answers\n  timeout: no end within 0.2 s\n" in capture.get()


# The command.


def test_bad_usage_is_exit_2() -> None:
    for arguments in (
        ["--requests", "1", "--duration", "1"],
        ["--no-stream"],
        ["--face", "carrier-pigeon"],
        ["ftp://somewhere"],
        ["http://me:secret@somewhere"],
        ["--clients", "0"],
    ):
        assert CliRunner().invoke(cli, ["bench", *arguments]).exit_code == 2, arguments


def test_clients_that_do_not_fit_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = [(64, 264)]
    monkeypatch.setattr(resource, "getrlimit", lambda _which: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _which, limit: limits.append(limit))

    assert command.bench(planned("http://x", clients=1000), as_json=True) == 2
    assert limits[-1] == (264, 264)
    error = capsys.readouterr().err
    assert error.startswith("--clients 1000 is too many: ")
    assert "are enough for 200 clients" in error


async def test_the_table_goes_to_stdout_and_the_bar_to_stderr(server: RunningServer) -> None:
    code, out, err = await run_command("bench", server.base, "--clients", "3", "--requests", "2")

    assert code == 0, err
    assert "limit: no limit was met" in out
    assert "100 %" not in out
    assert "100 %" in err
    assert "6 ok" in err


async def test_a_bar_that_nobody_reads_does_not_cost_the_report(server: RunningServer) -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "aioserver", "bench", server.base, "--clients", "2"),
        stdout=asyncio.subprocess.PIPE,
        stderr=theirs,
    )
    os.close(theirs)
    out, _ = await process.communicate()

    assert process.returncode == 0
    assert b"limit: no limit was met" in out


async def test_incomplete_answers_are_exit_1_also_as_json(
    make_server: MakeServer,
) -> None:
    server = await make_server(Behaviour(ttft=0, interval=0, tokens=10, cut_after=3))

    code, out, _ = await run_command(
        "bench", server.base, "--json", "--clients", "2", "--requests", "1"
    )

    report = json.loads(out)
    assert code == 1
    assert report["incomplete"] == {"provider_disconnected": 2}


async def test_without_rich_there_is_json(server: RunningServer) -> None:
    refused = await run_command("bench", server.base, program=WITHOUT_RICH)
    code, out, err = await run_command(
        "bench", server.base, "--json", "--clients", "2", "--requests", "1", program=WITHOUT_RICH
    )

    assert refused == (2, "", f"{remote.RICH_MISSING}\n")
    assert (code, err) == (0, "")
    assert json.loads(out)["requests"]["ok"] == 2


async def test_a_server_that_is_not_there_is_one_line() -> None:
    code, out, err = await run_command("bench", "127.0.0.1:1")

    assert (code, out) == (1, "")
    assert err == "http://127.0.0.1:1 cannot be reached: Connection refused\n"


async def test_ctrl_c_prints_what_there_is(make_server: MakeServer) -> None:
    server = await make_server(
        Behaviour(ttft=0, interval=0.05, tokens=10_000), **{"chat.streams.resume_window": 0}
    )
    arguments = ("bench", server.base, "--json", "--clients", "2")
    async with await Process.start("-m", "aioserver", *arguments) as process:
        await until(lambda: server.simulator.stats().active == 2, 20.0)

        process.signal(signal.SIGINT)
        code = await process.ended()

    report = json.loads(process.out)
    assert code == 0, process.log
    assert report["requests"]["unfinished"] == 2
    assert report["notes"] == ["stopped early, with 2 requests under way"]
