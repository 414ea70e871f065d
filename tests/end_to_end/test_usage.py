"""What each attempt has cost, from a client's request to the line of the ledger."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest

from aioserver.limits.estimate import TOKENS_PER_BYTE
from aioserver.limits.fixed_share import Scope
from tests.support.chat import CHAT, chat
from tests.support.faces import ask_every_face, over_anthropic, over_openai, over_websocket
from tests.support.keys import bearer, key_of, keys_of
from tests.support.ledgers import entries_of, lines_of, wait_until, written
from tests.support.responses import connect, create
from tests.support.responses import to_end as response_to_end
from tests.support.scripted_provider import (
    DONE,
    EVENT_STREAM,
    LAST_CHUNK,
    Peer,
    ScriptedProvider,
    chunk,
)
from tests.support.server import ENDLESS, NOWHERE, QUICK, provider_entry
from tests.support.simulator import Behaviour, Simulator

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    from tests.support.server import MakeServer, RunningServer

    MakeLedger = Callable[..., Awaitable[RunningServer]]

SIM = "llm.providers.sim"


@pytest.fixture
def make_ledger(make_server: MakeServer, tmp_path: Path) -> MakeLedger:
    """Makes a server with a ledger in `usage`."""

    def make(behaviour: Behaviour = QUICK, **changes: Any) -> Awaitable[RunningServer]:
        return make_server(behaviour, **{"usage.path": str(tmp_path / "usage"), **changes})

    return make


async def test_each_answer_on_each_face_is_one_line(
    make_ledger: MakeLedger,
) -> None:
    server = await make_ledger(Behaviour(ttft=0, interval=0, tokens=20))

    await ask_every_face(server, "sim-model")
    await over_anthropic(server, "sim-model")
    async with connect(server) as ws:
        await ws.send_json(create())
        await response_to_end(ws)

    lines = written(server)
    assert sorted((line["face"], line["path"], line["outcome"]) for line in lines) == [
        ("anthropic", "messages", "ok"),
        ("openai", "chat/completions", "ok"),
        ("openai", "chat/completions", "ok"),
        ("responses_ws", "responses", "ok"),
        ("sse", "chat/completions", "ok"),
        ("websocket", "chat/completions", "ok"),
    ]
    assert {(line["provider"], line["model"]) for line in lines} == {("sim", "sim-model")}
    assert len({line["id"] for line in lines}) == 6
    assert all(line["in"] > 0 and line["out"] > 0 for line in lines)
    tiers = {(line["path"], line.get("service_tier")) for line in lines}
    assert tiers == {
        ("chat/completions", None),
        ("messages", "standard"),
        ("responses", "default"),
    }


async def test_the_tier_of_a_chat_is_in_the_line_and_the_events_stay_as_they_are(
    make_ledger: MakeLedger,
) -> None:
    usage = {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}
    said = {"index": 0, "delta": {"content": "Hello"}, "finish_reason": "stop"}
    base = {"id": "c", "object": "chat.completion.chunk", "service_tier": "flex"}
    answer = [{**base, "choices": [said]}, {**base, "choices": [], "usage": usage}]
    texts = [b"data: %b\n\n" % json.dumps(each).encode() for each in answer]
    message = {"role": "assistant", "content": "Hello"}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    whole = json.dumps({**base, "choices": [choice], "usage": usage}).encode()

    async def play(peer: Peer) -> None:
        while b"POST" in (request := await peer.request()):
            if b'"stream": true' in request or b'"stream":true' in request:
                await peer.send(EVENT_STREAM, chunk(b"".join(texts) + DONE), LAST_CHUNK)
            else:
                head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
                await peer.send(head + b"Content-Length: %d\r\n\r\n%b" % (len(whole), whole))

    async with ScriptedProvider(play) as provider:
        server = await make_ledger(**{f"{SIM}.base_url": provider.url})
        for stream in (True, False):
            seen = await over_openai(server, "sim-model", stream=stream)
            assert seen.text == "Hello"
            assert (texts[0] if stream else whole) in seen.raw
            # Nobody has asked for the usage of the stream.
            assert (texts[1] in seen.raw) is False
        await over_websocket(server, "sim-model")
        lines = written(server)

    assert [(line["service_tier"], line["in"], line["out"]) for line in lines] == [
        ("flex", 9, 3)
    ] * 3


@asynccontextmanager
async def messages_provider(
    begun: dict[str, Any], last: dict[str, Any], whole: dict[str, Any], *, stream: bool
) -> AsyncIterator[ScriptedProvider]:
    """Run a provider that answers "Hello" over Messages: a stream with the usage *begun* in its first
    event and *last* near its end, or an answer with the usage *whole*.
    """
    message: dict[str, Any] = {"id": "m", "type": "message", "role": "assistant", "model": "m"}
    block = {"type": "text", "text": "Hello"}
    delta = {"type": "text_delta", "text": "Hello"}
    events: list[dict[str, Any]] = [
        {"type": "message_start", "message": {**message, "content": [], "usage": begun}},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 0, "delta": delta},
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": last},
        {"type": "message_stop"},
    ]
    ended = {"content": [block], "stop_reason": "end_turn", "usage": whole}
    body = json.dumps(message | ended).encode()

    async def play(peer: Peer) -> None:
        while b"POST" in await peer.request():
            if stream:
                texts = [f"event: {e['type']}\ndata: {json.dumps(e)}\n\n" for e in events]
                await peer.send(EVENT_STREAM, chunk("".join(texts).encode()), LAST_CHUNK)
            else:
                head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
                await peer.send(head + b"Content-Length: %d\r\n\r\n%b" % (len(body), body))

    async with ScriptedProvider(play) as provider:
        yield provider


@pytest.mark.parametrize("stream", [True, False])
async def test_what_was_written_to_a_cache_is_in_the_line_by_its_lifetime(
    make_ledger: MakeLedger, stream: bool
) -> None:
    counts = {"input_tokens": 3, "cache_read_input_tokens": 0, "cache_creation_input_tokens": 6}
    lifetimes = {"ephemeral_5m_input_tokens": 4, "ephemeral_1h_input_tokens": 2}
    begun = {**counts, "cache_creation": lifetimes, "service_tier": "priority"}
    started, whole = {**begun, "output_tokens": 1}, {**begun, "output_tokens": 5}
    # At the end come the counts so far, and neither a lifetime nor a tier.
    last = {**counts, "output_tokens": 5}

    async with messages_provider(started, last, whole, stream=stream) as provider:
        server = await make_ledger(
            **{f"{SIM}.base_url": provider.url, f"{SIM}.messages": True, f"{SIM}.model": "m"}
        )
        seen = await over_anthropic(server, "m", stream=stream)
        assert (seen.end, seen.text) == ("complete", "Hello")
        [line] = written(server)

    assert (line["in"], line["cache_write"], line["out"]) == (9, 6, 5)
    assert (line["cache_write_5m"], line["cache_write_1h"]) == (4, 2)
    assert line["service_tier"] == "priority"


async def test_a_known_answer_is_not_paid_for_again(
    make_ledger: MakeLedger,
) -> None:
    server = await make_ledger()
    headers = {"Idempotency-Key": "once"}

    first = await over_openai(server, "sim-model", headers=headers)
    again = await over_openai(server, "sim-model", headers=headers)

    assert first.text == again.text
    assert len(written(server)) == 1


async def test_a_refusal_costs_nothing_and_the_answer_behind_it_does(
    make_ledger: MakeLedger,
) -> None:
    server = await make_ledger(
        **{f"{SIM}.http_client.max_retries": 3, f"{SIM}.http_client.backoff_factor": 0.0}
    )

    seen = await over_openai(server, "fault-flap-2")

    assert seen.end == "complete"
    [line] = written(server)
    assert (line["attempt"], line["outcome"]) == (3, "ok")
    assert await server.counted("usage_tokens", "caller") != {}


@pytest.mark.parametrize(
    ("model", "outcome"),
    [
        ("fault-cut-3", "cut"),
        ("fault-error-event-3", "cut"),
        ("fault-drop", "failed"),
        ("fault-html", "cut"),
    ],
)
async def test_what_breaks_off_has_an_estimate(
    make_ledger: MakeLedger, model: str, outcome: str
) -> None:
    server = await make_ledger()

    await over_openai(server, model)

    [line] = written(server)
    assert (line["outcome"], line["source"]) == (outcome, "estimate")
    assert line["in"] > 0


async def test_an_answer_that_is_continued_has_a_line_for_each_of_its_attempts(
    make_ledger: MakeLedger,
) -> None:
    async with Simulator(QUICK) as other:
        server = await make_ledger(
            **{
                "llm.fallbacks": ["other"],
                "llm.providers.other": {
                    **provider_entry(other.base_url, "other-model"),
                    "continuation": "prefill",
                },
                f"{SIM}.continuation": "none",
            }
        )

        seen = await over_websocket(server, "fault-cut-9")

        assert seen.end == "complete"
        cut, rest = written(server)
        assert cut["id"] == rest["id"]
        assert [(line["attempt"], line["provider"], line["outcome"]) for line in (cut, rest)] == [
            (1, "sim", "cut"),
            (2, "other", "ok"),
        ]
        rows = server.context.usage.sums.days()[0]["rows"]
        assert [(row["provider"], row["requests"], row["attempts"]) for row in rows] == [
            ("other", 1, 1),
            ("sim", 1, 1),
        ]


def pass_of(kind: str, read: int, cached: int, written: int, said: int) -> dict[str, Any]:
    """An entry of `usage.iterations`."""
    return {
        "type": kind,
        "model": "m",
        "input_tokens": read,
        "output_tokens": said,
        "cache_read_input_tokens": cached,
        "cache_creation_input_tokens": written,
    }


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("counts", "passes", "expected"),
    [
        # A compaction before the answer; and one alone.
        (
            (23, 0, 0, 10),
            [("compaction", 180, 5, 7, 35), ("message", 23, 0, 0, 10)],
            (215, 5, 7, 45),
        ),
        ((0, 0, 0, 0), [("compaction", 180, 0, 0, 35)], (180, 0, 0, 35)),
        # A model that declined within its answer, one that declined at once, and the next one.
        (
            (2, 79, 0, 136),
            [
                ("message", 2, 72, 10, 5),
                ("message", 2, 72, 10, 0),
                ("fallback_message", 2, 79, 0, 136),
            ],
            (165, 151, 10, 141),
        ),
        # An advisor; a tool of the provider's own, whose passes are in the counts.
        (
            (9, 0, 0, 4),
            [("message", 9, 0, 0, 4), ("advisor_message", 50, 0, 0, 6)],
            (59, 0, 0, 10),
        ),
        ((9, 0, 0, 4), [("message", 4, 0, 0, 1), ("message", 5, 0, 0, 3)], (9, 0, 0, 4)),
        ((9, 1, 2, 4), [("message", 9, 1, 2, 0)], (12, 1, 2, 4)),
        ((9, 1, 2, 4), [], (12, 1, 2, 4)),
    ],
)
async def test_all_passes_of_a_message_are_paid_for(
    make_ledger: MakeLedger,
    counts: tuple[int, ...],
    passes: list[tuple[str, int, int, int, int]],
    expected: tuple[int, ...],
    stream: bool,
) -> None:
    usage = pass_of("", *counts) | {"iterations": [pass_of(*each) for each in passes]}
    del usage["type"], usage["model"]
    begun = {"input_tokens": counts[0], "output_tokens": 1}

    async with messages_provider(begun, usage, usage, stream=stream) as provider:
        server = await make_ledger(
            **{f"{SIM}.base_url": provider.url, f"{SIM}.messages": True, f"{SIM}.model": "m"}
        )
        seen = await over_anthropic(server, "m", stream=stream)
        assert (seen.end, seen.text) == ("complete", "Hello")
        # The client gets the provider's own count.
        assert json.dumps(usage).encode() in seen.raw
        learned = server.context.router.providers["sim"].costs.tokens_per_byte("m")
        assert (learned == TOKENS_PER_BYTE) is (len(passes) > 1)

        [line] = written(server)
    assert tuple(line[name] for name in ("in", "cached", "cache_write", "out")) == expected
    assert line["source"] == "provider"


async def test_what_its_client_has_cancelled_is_paid_for(
    make_ledger: MakeLedger,
) -> None:
    server = await make_ledger(ENDLESS)

    async with server.connect() as ws:
        await ws.send_json(chat("a"))
        while (await ws.receive_json())["status"] != "chunk":
            pass
        await ws.send_json({"action": "cancel", "request_id": "a"})
        while (await ws.receive_json())["status"] not in {"cancelled", "error", "complete"}:
            pass
    await server.nothing_held()

    [line] = written(server)
    assert (line["outcome"], line["source"]) == ("cancelled", "estimate")
    assert line["out"] >= 1


async def test_what_nobody_is_asked_for_has_no_line(
    make_ledger: MakeLedger,
) -> None:
    server = await make_ledger(**{f"{SIM}.base_url": NOWHERE})

    await over_openai(server, "sim-model")

    assert written(server) == []
    assert server.context.usage.sums.days()[0]["rows"] == []


@pytest.mark.virtual_time
async def test_a_line_says_that_an_attempt_runs_and_another_one_how_it_has_ended(
    make_ledger: MakeLedger, tmp_path: Path
) -> None:
    """The time of 35 seconds is virtual."""
    server = await make_ledger(
        Behaviour(ttft=35.0, interval=0, tokens=5), **{f"{SIM}.http_client.read_timeout": 100.0}
    )

    await over_openai(server, "sim-model")

    assert len(written(server)) == 1
    [lines] = lines_of(tmp_path / "usage").values()
    assert [line["outcome"] for line in lines] == ["running", "running", "ok"]
    assert {(line["id"], line["attempt"]) for line in lines} == {(lines[0]["id"], 1)}
    assert {line["source"] for line in lines[:2]} == {"estimate"}


@pytest.mark.virtual_time
async def test_a_line_that_an_attempt_runs_is_taken_back_if_it_is_refused(
    make_ledger: MakeLedger, tmp_path: Path
) -> None:
    """The time of two seconds is virtual."""

    async def play(peer: Peer) -> None:
        await peer.request()
        await asyncio.sleep(2)
        await peer.send(b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n")

    async with ScriptedProvider(play) as scripted:
        server = await make_ledger(**{f"{SIM}.base_url": f"{scripted.url}/v1"})

        await over_openai(server, "sim-model")

        assert [line["outcome"] for line in written(server)] == ["refused"]
        [lines] = lines_of(tmp_path / "usage").values()
        assert [line["outcome"] for line in lines] == ["running", "refused"]
        assert server.context.usage.sums.days()[0]["rows"] == []


async def test_nothing_that_is_nobodys_business_is_in_it(
    make_ledger: MakeLedger, tmp_path: Path
) -> None:
    server = await make_ledger(**keys_of("web"))
    body = {
        "model": "sim-model",
        "messages": [{"role": "user", "content": "a confession"}],
        "user": "someone@example.com",
        "stream": True,
    }

    async with server.session.post(
        f"{server.v1}/chat/completions", json=body, headers=bearer("web")
    ) as response:
        answer = await response.text()

    [line] = written(server)
    assert line["caller"] == "web"
    [file] = (tmp_path / "usage").iterdir()
    text = file.read_text()
    events = [json.loads(event[6:]) for event in answer.split("\n\n") if event[6:7] == "{"]
    choices = [choice for event in events for choice in event["choices"]]
    said = "".join(choice["delta"].get("content") or "" for choice in choices)
    assert len(said) > 20
    for secret in ("confession", "someone", key_of("web"), "127.0.0.1", said[:20]):
        assert secret not in text


async def test_a_reload_names_another_directory_or_changes_nothing(
    make_ledger: MakeLedger, tmp_path: Path
) -> None:
    server = await make_ledger(ENDLESS)
    async with server.connect() as ws:
        await ws.send_json(chat("a"))
        while (await ws.receive_json())["status"] != "chunk":
            pass

        (tmp_path / "file").write_text("")
        refused = await server.change(**{"usage.path": str(tmp_path / "file" / "usage")})
        path = server.context.usage.path
        assert await server.change(**{"usage.path": str(tmp_path / "other")})
        await ws.send_json({"action": "cancel", "request_id": "a"})
        while (await ws.receive_json())["status"] not in {"cancelled", "error", "complete"}:
            pass
    await server.nothing_held()

    assert not refused
    assert path == str(tmp_path / "usage")
    # It was sent when the old one was in use, and has ended since.
    assert [line["outcome"] for line in written(server)] == ["cancelled"]
    assert await server.change(**{"usage.path": None})
    await over_openai(server, "fault-cut-3")
    assert len(entries_of(tmp_path / "other")) == 1


async def test_the_end_of_the_server_ends_what_runs_and_then_the_ledger(
    make_server: MakeServer, tmp_path: Path
) -> None:
    server = await make_server(ENDLESS, **{"usage.path": str(tmp_path / "usage")})
    async with server.connect() as ws:
        await ws.send_json(chat("a"))
        while (await ws.receive_json())["status"] != "chunk":
            pass

        server.owners.drain()
        await server.context.gateway.close()
    usage = server.context.usage
    usage.close()

    assert usage.ledger is not None
    assert (usage.ledger.waiting, usage.ledger.lost) == (0, 0)
    # Not by its client.
    assert [line["outcome"] for line in entries_of(tmp_path / "usage")] == ["cut"]


async def test_a_disk_that_fails_is_a_trouble_and_costs_no_answer(
    make_ledger: MakeLedger, tmp_path: Path
) -> None:
    server = await make_ledger()
    monitor, ledger = server.context.monitor, server.context.usage.ledger
    assert ledger is not None
    (tmp_path / "usage").rename(tmp_path / "away")
    (tmp_path / "usage").write_text("no directory")

    seen = await over_openai(server, "plain")
    wait_until(lambda: ledger.trouble is not None)
    monitor.tick()
    state: Any = monitor.snapshot
    (tmp_path / "usage").unlink()
    (tmp_path / "away").rename(tmp_path / "usage")
    wait_until(lambda: not ledger.waiting)
    monitor.tick()

    assert seen.end == "complete"
    assert state["usage"]["queue"] == 1
    assert state["usage"]["trouble"]
    assert [
        (incident["severity"], incident["text"].partition(" in ")[0])
        for incident in server.incidents()
        if incident["kind"] == "usage"
    ] == [("error", "the ledger"), ("info", "the ledger is written again")]
    assert len(written(server)) == 1


async def test_a_caller_sees_its_own_rows_and_an_admin_those_of_all(
    make_server: MakeServer,
) -> None:
    server = await make_server(**keys_of("web", "app", "root"))
    for name in ("web", "app", "web"):
        await over_openai(server, "sim-model", headers=bearer(name))

    async def asked(name: str) -> dict[str, int]:
        async with server.session.get(f"{server.base}/usage", headers=bearer(name)) as response:
            assert response.status == 200
            assert response.headers["Cache-Control"] == "no-store"
            answer = await response.json()
        today, yesterday = answer["days"]
        assert yesterday["rows"] == answer["budgets"] == []
        return {row["caller"]: row["requests"] for row in today["rows"]}

    assert await asked("web") == {"web": 2}
    assert await asked("app") == {"app": 1}
    assert await asked("root") == {"web": 2, "app": 1}
    async with server.session.get(f"{server.base}/usage") as response:
        assert response.status == 401


async def test_budgets_are_shown_and_a_day_begins_at_what_the_ledger_knows(
    make_server: MakeServer, tmp_path: Path
) -> None:
    today = datetime.now(UTC)
    spent = {
        "ts": f"{today:%Y-%m-%dT%H:%M:%S}.000Z",
        "id": "00000000-1",
        "attempt": 1,
        "caller": "web",
        "outcome": "ok",
        "in": 900,
        "out": 50,
        "source": "provider",
    }
    (tmp_path / f"usage-{today:%Y-%m-%d}.w0.jsonl").write_text(json.dumps(spent) + "\n")
    limits = {"tokens_per_minute": 10_000, "tokens_per_day": 50_000}
    server = await make_server(**keys_of("web", **limits), **{"usage.path": str(tmp_path)})

    async with server.session.get(f"{server.base}/usage", headers=bearer("web")) as response:
        answer = await response.json()

    [budget] = answer["budgets"]
    assert budget["caller"] == "web"
    assert budget["tokens_per_minute"].keys() == {
        "limit",
        "used",
        "reserved",
        "remaining",
        "reset",
    }
    day = budget["tokens_per_day"]
    assert (day["limit"], day["used"], day["remaining"]) == (50_000, 950, 49_050)


async def test_a_worker_with_a_part_of_each_limit_begins_at_its_part_of_the_day(
    make_server: MakeServer, tmp_path: Path
) -> None:
    changes = {**keys_of("web", tokens_per_day=50_000), "usage.path": str(tmp_path)}
    server = await make_server(**changes)
    today = datetime.now(UTC)
    for worker in range(2):
        spent = {"ts": f"{today:%Y-%m-%dT%H:%M:%S}.000Z", "id": f"{worker}-1", "attempt": 1}
        spent |= {"caller": "web", "outcome": "ok", "in": 900, "out": 50, "source": "provider"}
        path = tmp_path / f"usage-{today:%Y-%m-%d}.w{worker}.jsonl"
        path.write_text(json.dumps(spent) + "\n")
    context = server.context

    context.access.part_of = Scope("", 1, 2).share
    assert await server.change(**changes)

    quota = context.access.keys.quotas()["web"]
    assert quota.budgets()["tokens_per_day"].used == 950


async def test_looks_of_a_key_count_in_its_rate(make_server: MakeServer) -> None:
    server = await make_server(**keys_of("web", requests_per_minute=2))

    statuses = []
    for _ in range(3):
        async with server.session.get(f"{server.base}/usage", headers=bearer("web")) as response:
            statuses.append(response.status)

    assert statuses == [200, 200, 429]


PICTURE = "data:image/png;base64," + "iVBORw0KGgo=" * 500
WITH_PICTURES: dict[str, dict[str, Any]] = {
    "chat/completions": {
        "messages": [
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": PICTURE}}]}
        ]
    },
    "responses": {
        "input": [
            {"role": "user", "content": [{"type": "input_image", "image_url": PICTURE}]},
        ]
    },
    "messages": {
        "max_tokens": 9,
        "messages": [
            {
                "role": "user",
                "content": [
                    {
                        "type": "image",
                        "source": {
                            "type": "base64",
                            "media_type": "image/png",
                            "data": PICTURE.partition(",")[2],
                        },
                    }
                ],
            }
        ],
    },
}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("bridged", [True, False])
@pytest.mark.parametrize("path", WITH_PICTURES)
async def test_a_picture_does_not_teach_how_many_tokens_a_text_has(
    make_server: MakeServer, path: str, bridged: bool, stream: bool
) -> None:
    server = await make_server(
        **{f"{SIM}.messages": "bridge" if bridged else True, f"{SIM}.responses": not bridged}
    )
    provider = server.context.router.providers["sim"]

    async def ask(body: dict[str, Any]) -> float:
        asked = {"model": "sim-model", "stream": stream, **body}
        async with server.session.post(f"{server.v1}/{path}", json=asked) as response:
            assert response.status == 200, await response.text()
            await response.read()
        return provider.costs.tokens_per_byte("sim-model")

    assert await ask(WITH_PICTURES[path]) == TOKENS_PER_BYTE
    text = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 9}
    assert await ask({"input": "Hello"} if path == "responses" else text) != TOKENS_PER_BYTE


async def test_white_space_of_one_key_makes_the_bytes_of_no_other_cheaper(
    make_server: MakeServer,
) -> None:
    server = await make_server(
        **keys_of("spaces", "web", requests_per_minute=1000), **{f"{SIM}.messages": "bridge"}
    )
    asked = {"model": "sim-model", "max_tokens": 9}
    counted = {**asked, "messages": [{"role": "user", "content": "word " * 1000}]}

    async def post(path: str, caller: str, body: str) -> Any:
        headers = {**bearer(caller), "Content-Type": "application/json"}
        async with server.session.post(f"{server.v1}/{path}", data=body, headers=headers) as said:
            assert said.status == 200, await said.text()
            return await said.json()

    before = await post("messages/count_tokens", "web", json.dumps(counted))
    blank = json.dumps({**asked, **CHAT}) + 200_000 * " "
    for _ in range(40):
        await post("chat/completions", "spaces", blank)
    after = await post("messages/count_tokens", "web", json.dumps(counted))
    own = await post("messages/count_tokens", "spaces", json.dumps(counted))

    assert after == before
    assert before["input_tokens"] / 4 <= own["input_tokens"] < before["input_tokens"]
