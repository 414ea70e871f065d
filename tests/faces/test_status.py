"""Health, readiness, and the state in short."""

from __future__ import annotations

import asyncio
import logging
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import orjson
import pytest
from prometheus_client.parser import text_string_to_metric_families

from aioserver import __version__
from aioserver.monitoring import incidents, monitor
from aioserver.protocol import eventstream
from aioserver.telemetry.metrics import FACES
from tests.support.chat import CHAT, chat, to_end
from tests.support.jumping_loop import block
from tests.support.keys import bearer, keys_of
from tests.support.raw import SMALL, Raw
from tests.support.server import CONCURRENCY, SILENT, MakeServer
from tests.support.simulator import Behaviour
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.support.server import RunningServer


@pytest.mark.parametrize("path", ["/health", "/healthz", "/livez"])
async def test_a_living_process_is_healthy(server: RunningServer, path: str) -> None:
    async with server.connect(), server.session.get(server.base + path) as response:
        assert response.status == 200
        assert await response.json() == {
            "status": "healthy",
            "version": __version__,
            "connections": {"active": 1, "limit": 50, "waiting": 0},
        }


@pytest.mark.parametrize("path", ["/ready", "/readyz"])
async def test_readiness_ends_before_the_server_does(server: RunningServer, path: str) -> None:
    async with server.session.get(server.base + path) as response:
        assert (response.status, await response.json()) == (200, {"status": "ready"})

    server.context.lifecycle.ready = False

    async with server.session.get(server.base + path) as response:
        assert response.status == 503
        assert "Retry-After" in response.headers
        assert (await response.json())["status"] == "not ready"
    async with server.session.get(server.base + "/health") as response:
        assert response.status == 200


async def test_without_a_usable_provider_the_server_is_not_ready(make_server: MakeServer) -> None:
    server = await make_server(**{"llm.providers.sim.api_key_env": "NO_SUCH_KEY"})
    async with server.session.get(server.base + "/ready") as response:
        assert response.status == 503
        assert "provider" in (await response.json())["reason"]
    async with server.session.post(server.v1 + "/chat/completions", json=CHAT) as response:
        assert response.status == 503
        assert (await response.json())["error"]["code"] == "no_provider"
        assert "Retry-After" in response.headers
    async with server.session.get(server.v1 + "/models") as response:
        assert (await response.json())["data"] == []


async def shown(server: RunningServer, path: str = "/stats") -> dict[str, Any]:
    """The state of this very moment."""
    server.context.monitor.tick()
    async with server.session.get(server.base + path) as response:
        assert response.content_type == "application/json"
        state: dict[str, Any] = await response.json()
    return state


@pytest.mark.parametrize("path", ["/", "/stats"])
async def test_the_state_shows_connections_and_pools(make_server: MakeServer, path: str) -> None:
    server = await make_server(SILENT)
    async with Raw(server) as raw:
        await raw.post("/v1/chat/completions", CHAT)
        await server.simulator.until(lambda stats: stats.active == 1)
        state = await shown(server, path)

    assert (state["name"], state["active_provider"], state["ready"]) == ("aioserver", "sim", True)
    connections = state["connections"]
    assert (connections["active"], connections["limit"]) == (1, 50)
    assert (connections["waiting"], connections["queue_size"]) == (0, 50)
    by_face = dict.fromkeys(FACES, 0) | {"openai": 1}
    assert connections["active_by_face"] == by_face
    sim = state["providers"]["sim"]
    assert (sim["usable"], sim["active"], sim["in_flight"], sim["limit"]) == (True, True, 1, 20)
    assert sim["pool"] == {"open": 1, "idle": 0, "limit": 20, "waiting": 0}
    assert state["requests"]["running"] == 1
    assert state["endpoints"] == {
        "websocket": "/ws/chat",
        "sse": "/sse/chat",
        "openai": "/v1",
        "anthropic": "/v1",
        "conversations": "/conversations",
    }
    assert state["process"]["open_fds"] > 3
    await until(lambda: server.held()["places"] == 0)


async def test_an_answer_that_nobody_reads_is_shown(make_server: MakeServer) -> None:
    server = await make_server(Behaviour(ttft=0, interval=60))
    async with server.connect() as ws:
        await ws.send_json({"action": "chat", "request_id": "r1", "payload": {"text": "hi"}})
        await server.simulator.until(lambda stats: stats.active == 1)
    await until(lambda: server.held()["detached"] == 1)

    streams = (await shown(server))["streams"]
    async with server.session.delete(f"{server.sse}/r1") as response:
        assert response.status == 204
    await until(lambda: server.held()["detached"] == 0)

    assert (streams["detached"], streams["max_detached"]) == (1, 100)
    assert 0 < streams["bytes"] < streams["max_bytes"]


async def test_requests_and_their_ends_are_counted(server: RunningServer) -> None:
    async with server.connect() as ws:
        await ws.send_json(chat("a"))
        await to_end(ws)
        await ws.send_json(chat("b", model="nobody/else", provider="none"))
        await to_end(ws)
    body = {**CHAT, "stream": True}
    async with server.session.post(f"{server.v1}/chat/completions", json=body) as response:
        await response.read()
    async with server.session.post(f"{server.v1}/chat/completions", json=CHAT) as response:
        await response.read()
    async with server.session.post(f"{server.v1}/chat/completions", json=[]) as response:
        assert response.status == 400
    async with server.session.get(f"{server.sse}/unknown") as response:
        assert response.status == 404
    await server.nothing_held()

    state = await shown(server)
    assert state["requests"]["outcomes"]["ok"] == 3
    assert state["requests"]["total"] == 3
    assert state["first_token"]["count"] == 2
    assert 0 < state["first_token"]["p50"] <= state["first_token"]["p99"]
    assert state["providers"]["sim"]["requests"] == 3
    values = samples(await scrape(server))
    labels = {"face": "openai", "provider": "sim", "code": "", "outcome": "ok"}
    assert values["aioserver_requests_total", *sorted(labels.items())] == 2
    assert values["aioserver_bad_requests_total", ("code", "invalid_request")] == 1
    assert values["aioserver_bad_requests_total", ("code", "model_not_found")] == 1
    assert values["aioserver_bad_requests_total", ("code", "stream_not_found")] == 1
    assert values["aioserver_resumes_total", ("outcome", "not_found")] == 1
    assert values["aioserver_provider_attempts_total", ("outcome", "ok"), ("provider", "sim")] == 3
    assert values["aioserver_first_token_seconds_count", ("face", "websocket")] == 1
    assert (
        values["aioserver_connections_closed_total", ("code", "1000"), ("face", "websocket")] == 1
    )
    tokens = {"provider": "sim", "model": "sim-model", "type": "output", "source": "provider"}
    assert values["aioserver_tokens_total", *sorted(tokens.items())] > 0


async def test_refusals_of_a_full_server_are_counted_by_code_and_logged_once(
    make_server: MakeServer,
) -> None:
    server = await make_server(
        SILENT,
        **{f"{CONCURRENCY}.max_connections": 1, f"{CONCURRENCY}.queue_timeout": 0},
    )
    async with Raw(server) as raw, watching(server) as notes:
        await raw.post("/v1/chat/completions", CHAT)
        await server.simulator.until(lambda stats: stats.active == 1)
        for _ in range(3):
            async with server.session.post(f"{server.v1}/chat/completions", json=CHAT) as response:
                assert response.status == 503
        async with server.connect() as ws:
            await ws.receive()
        state = await shown(server)
        await shown(server)
        await until(lambda: any(note.get("kind") == "rejections" for _, note in notes))

        assert state["rejections"]["server_at_capacity"] == 4
        assert state["connections"]["rejected"] == 4
        assert state["connections"]["rejected_per_second"] > 0
        # On a busy machine the loop may have been late, which is an incident, too.
        incidents = [
            incident
            for kind, incident in notes
            if kind == "incident" and incident["kind"] != "loop_lag"
        ]
        (text,) = (incident["text"] for incident in incidents)
        assert text.startswith("4 requests were rejected in ")
        assert text.endswith(": the server was full (server_at_capacity)")
        assert incidents[0]["kind"] == "rejections"


async def test_a_providers_faults_are_reported(make_server: MakeServer) -> None:
    server = await make_server(Behaviour(fail_rate=1.0, fail_status=500))
    async with server.session.post(f"{server.v1}/chat/completions", json=CHAT) as response:
        assert response.status == 502

    state = await shown(server)

    assert state["providers"]["sim"]["faults"]["http_5xx"] == 1
    assert state["requests"]["outcomes"]["provider_error"] == 1
    (incident,) = server.incidents()
    assert (incident["kind"], incident["provider"]) == ("provider_faults", "sim")
    text = "sim answered with server errors (5xx): 1 attempt failed in "
    assert incident["text"].startswith(text)


async def test_refused_callers_are_counted_and_a_burst_is_an_incident(
    make_server: MakeServer,
) -> None:
    server = await make_server(**keys_of("web", "root"))
    root, tick = bearer("root"), server.context.monitor.tick
    tries: list[dict[str, str]] = [
        *({}, {"Authorization": "Bearer x"}, {"Cookie": "aioserver_session=x.1.y"}, bearer("web")),
        {"Cookie": "aioserver_session=x", "Origin": "http://evil.example"},
    ]
    for headers in tries:
        async with server.session.get(f"{server.base}/stats", headers=headers) as response:
            assert response.status in {401, 403}
    tick()
    async with server.session.get(f"{server.base}/stats", headers=root) as response:
        state = await response.json()
    expected = {"missing_key": 1, "invalid_key": 1, "session": 1, "not_admin": 1, "origin": 1}
    assert state["auth_failures"] == {**expected, "host": 0, "token": 0}
    async with server.session.get(f"{server.base}/metrics", headers=root) as response:
        values = samples(await response.text())
    for reason, number in state["auth_failures"].items():
        assert values["aioserver_auth_failures_total", ("reason", reason)] == number
    assert not server.incidents(), "five are no burst"

    for _ in range(incidents.DENIED_BURST):
        async with server.session.get(f"{server.base}/stats") as response:
            assert response.status == 401
    tick()
    tick()
    (incident,) = server.incidents()
    assert (incident["kind"], incident["severity"]) == ("auth", "warning")
    assert incident["text"].startswith("15 requests were denied")


async def test_a_few_now_and_then_are_no_burst(make_server: MakeServer) -> None:
    server = await make_server(**keys_of("web"))
    for _ in range(2 * incidents.DENIED_TICKS):
        for _ in range(incidents.DENIED_BURST // incidents.DENIED_TICKS - 1):
            async with server.session.get(f"{server.base}/stats"):
                pass
        server.context.monitor.tick()
    for _ in range(incidents.DENIED_BURST - 1):
        async with server.session.get(f"{server.base}/stats"):
            pass
    server.context.monitor.tick()
    for _ in range(incidents.DENIED_TICKS):
        server.context.monitor.tick()
    async with server.session.get(f"{server.base}/stats"):
        pass
    server.context.monitor.tick()

    assert not server.incidents()


async def test_a_callers_name_is_in_the_lines_of_its_requests(
    make_server: MakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    server = await make_server(**keys_of("web"))
    async with server.connect(headers=bearer("web")) as ws:
        await ws.send_json(chat("r"))
        await to_end(ws)
    for streamed in (True, False):
        async with server.session.post(
            f"{server.v1}/chat/completions",
            json={**CHAT, "stream": streamed},
            headers=bearer("web"),
        ) as response:
            await response.read()
    await server.nothing_held()

    records = [record for record in caplog.records if hasattr(record, "fields")]
    lines = [record.getMessage() for record in records]
    assert lines.count("request finished") == 3
    assert lines.count("connection opened") == lines.count("connection closed") == 3
    assert {line.fields["caller"] for line in records} == {"web"}


# The event stream.


@asynccontextmanager
async def watching(server: RunningServer, query: str = "") -> AsyncIterator[list[tuple[str, Any]]]:
    """The events that a client of `/events` gets, as (event, data)."""
    notes: list[tuple[str, Any]] = []

    async def read(response: Any) -> None:
        splitter = eventstream.Splitter()
        async for data in response.content.iter_any():
            notes.extend(
                (event.event.decode(), orjson.loads(event.data))
                for event in eventstream.parse(splitter.feed(data))
            )

    async with server.session.get(f"{server.base}/events{query}") as response:
        assert (response.status, response.content_type) == (200, "text/event-stream")
        task = asyncio.create_task(read(response))
        try:
            yield notes
        finally:
            task.cancel()
            await asyncio.wait((task,))
    await until(lambda: not server.watchers)


async def test_a_watcher_gets_the_history_then_the_state_each_second(
    server: RunningServer,
) -> None:
    for _ in range(3):
        server.context.monitor.tick()
    async with watching(server) as notes:
        await until(lambda: len([kind for kind, _ in notes if kind == "stats"]) >= 2)

    notes = [note for note in notes if note[0] != "incident"]  # of a busy machine
    assert [kind for kind, _ in notes[:3]] == ["history", "stats", "stats"]
    history = notes[0][1]
    assert len(history["time"]) >= 4
    for series in (*history["series"].values(), *history["providers"]["sim"].values()):
        assert len(series) == len(history["time"])
    assert notes[2][1]["watchers"] == 1
    assert notes[2][1].keys() == server.context.monitor.snapshot.keys()


async def test_a_watcher_may_ask_for_less(server: RunningServer) -> None:
    async with watching(server, "?interval=5") as notes:
        await until(lambda: bool(notes))
        ticks = len(server.history()["time"])
        for _ in range(10):
            server.context.monitor.tick()
        ran = len(server.history()["time"]) - ticks
        server.context.monitor.incident("test", "now")

        def last() -> int | None:
            return next(
                (n for n, (_, note) in enumerate(notes) if note.get("kind") == "test"), None
            )

        await until(lambda: last() is not None)
        told_of = [
            kind for kind, _ in notes[: last()]
        ]  # a busy machine may add incidents of its own
    assert told_of[0] == "history"
    assert told_of.count("stats") == 1 + len([n for n in range(ticks, ticks + ran) if n % 5 == 0])


async def test_an_interval_that_cannot_be(server: RunningServer) -> None:
    for interval in ["0", "61", "-1", "nan", "inf", "x", ""]:
        async with server.session.get(f"{server.base}/events?interval={interval}") as response:
            assert response.status == 400, interval
            assert (await response.json())["error"]["param"] == "interval", interval


async def test_watchers_are_bounded(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitor, "MAX_WATCHERS", 1)
    async with (
        watching(server) as notes,
        server.session.get(f"{server.base}/events") as response,
    ):
        assert response.status == 503
        assert "Retry-After" in response.headers
        await until(lambda: bool(notes))


async def test_a_watcher_who_takes_nothing_is_dropped(
    make_server: MakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = await make_server(**{"chat.streams.send_timeout": 0.2})
    mine = server.context.monitor
    drops: list[str] = []
    monkeypatch.setattr(
        server.context.admission, "dropped", lambda face, why: drops.append(f"{face}: {why}")
    )
    async with Raw(server, receive_buffer=SMALL) as raw:
        await raw.get("/events")
        await until(lambda: server.watchers == 1)
        while server.watchers:
            mine.incident("test", "x" * 10_000)
            await asyncio.sleep(0.001)

    assert len(drops) == 1
    assert drops[0].startswith("events: ")


async def test_watchers_are_sent_home_when_the_server_ends(server: RunningServer) -> None:
    async with watching(server) as notes:
        await until(lambda: bool(notes))
        server.context.monitor.incident("shutdown", "the server is stopping", severity="info")
        server.owners.retire()
        await until(lambda: not server.watchers)
        await until(lambda: notes[-1][0] == "incident")


async def test_a_loop_that_is_late_is_reported(server: RunningServer) -> None:
    mine = server.context.monitor
    async with watching(server) as notes:
        await until(lambda: bool(notes))
        block(0.35)
        await until(lambda: server.owners.lag.longest(0.0) >= 0.2)
        mine.tick()
        worst = mine.snapshot["loop"]["lag_max"]
        await until(lambda: any(kind == "incident" for kind, _ in notes))

    (incident,) = [incident for kind, incident in notes if kind == "incident"]
    assert (incident["kind"], incident["severity"]) == ("loop_lag", "warning")
    assert worst >= 0.2
    values = samples(await scrape(server))
    late = values["aioserver_loop_lag_seconds_count",]
    assert late > values["aioserver_loop_lag_seconds_bucket", ("le", "0.1")]


# The metrics.


async def scrape(server: RunningServer) -> str:
    async with server.session.get(f"{server.base}/metrics") as response:
        assert response.status == 200
        assert response.headers["Content-Type"].startswith("text/plain; version=")
        return await response.text()


def samples(text: str) -> dict[tuple[Any, ...], float]:
    """Every sample, by its name and labels; the parser is the client library's."""
    values: dict[tuple[Any, ...], float] = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation, family.name
        for sample in family.samples:
            key = (sample.name, *sorted(sample.labels.items()))
            assert key not in values
            values[key] = sample.value
    return values


async def test_the_metrics_are_there_from_the_start_and_stay_the_same(
    server: RunningServer,
) -> None:
    before = samples(await scrape(server))
    async with server.connect() as ws:
        await ws.send_json(chat("a"))
        await to_end(ws)
    after = samples(await scrape(server))

    assert before.keys() <= after.keys()
    # What callers have spent has a child for each once it counts: all of them would be many.
    new = {name for name, *_ in after.keys() - before.keys()}
    assert new == {"aioserver_usage_tokens_total", "aioserver_usage_estimated_tokens_total"}
    ours = {name: value for name, value in before.items() if "_total" in name[0]}
    ours.pop(("aioserver_log_lines_dropped_total",))  # of the process, other tests included
    assert not any(value for (name, *_), value in ours.items() if name.startswith("aioserver"))
    assert before["aioserver_ready",] == 1
    assert before["aioserver_connections_limit",] == 50
    assert before["aioserver_listen_queue",] == 0
    assert before["aioserver_listen_queue_limit",] > 0
    assert all(name[0].startswith(("aioserver_", "process_")) for name in before)


async def test_histograms_grow_to_their_count(server: RunningServer) -> None:
    for _ in range(5):
        async with server.session.post(f"{server.v1}/chat/completions", json=CHAT) as response:
            await response.read()

    values = samples(await scrape(server))

    buckets = [
        value
        for (name, *labels), value in values.items()
        if name == "aioserver_request_duration_seconds_bucket" and ("face", "openai") in labels
    ]
    assert buckets == sorted(buckets)
    assert buckets[-1] == 5
    assert values["aioserver_request_duration_seconds_count", ("face", "openai")] == 5
    assert values["aioserver_request_duration_seconds_sum", ("face", "openai")] > 0


async def test_no_label_comes_from_a_client(server: RunningServer) -> None:
    body = {**CHAT, "model": "evil\n} 1", "user": "evil-user", "stream": True}
    async with server.session.post(
        f"{server.v1}/chat/completions", json=body, headers={"X-Request-Id": "evil-id"}
    ) as response:
        await response.read()

    text = await scrape(server)

    assert "evil" not in text
    assert 'model="other"' in text
