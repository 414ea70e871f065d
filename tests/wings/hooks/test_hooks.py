"""Hooks behind a URL: what they are asked on each face, and what comes of what they say."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import aiohttp

from aioserver.wings.hooks import http_hook
from tests.support.chat import CHAT, chat, resume, to_end
from tests.support.faces import (
    ask_every_face,
    expected_text,
    over_anthropic,
    over_openai,
    over_sse,
    over_websocket,
)
from tests.support.hook_program import entry, hook_program, refuse
from tests.support.keys import bearer, keys_of
from tests.support.server import ENDLESS, NOWHERE, PACED, QUICK, provider_entry
from tests.support.simulator import Behaviour
from tests.support.waiting import until

if TYPE_CHECKING:
    import pytest

    from tests.support.faces import Seen
    from tests.support.server import MakeServer, RunningServer

SECRET = "the-code-word-of-the-day"


def hooked(*entries: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"hooks": list(entries), **changes}


async def calls(server: RunningServer) -> dict[tuple[str, ...], int]:
    return dict(await server.counted("hook_calls", "event", "outcome"))


async def over_responses(server: RunningServer, *, stream: bool, **more: Any) -> tuple[int, Any]:
    body = {"model": "m", "input": "Hello", "stream": stream, **more}
    async with server.session.post(f"{server.v1}/responses", json=body) as response:
        return response.status, await response.read()


async def test_each_face_shows_its_request_once_as_a_provider_would_get_it(
    make_server: MakeServer,
) -> None:
    async with hook_program() as program:
        server = await make_server(QUICK, **hooked(entry(program, headers={"X-Word": "w"})))

        text = await expected_text(server)
        seen = await ask_every_face(server, "m")
        messages = [await over_anthropic(server, "m", stream=stream) for stream in (True, False)]
        responses = [await over_responses(server, stream=stream) for stream in (True, False)]
        for path, body in (
            ("completions", {"prompt": "Hello"}),
            ("embeddings", {"input": "Hello"}),
            ("messages/count_tokens", {"messages": CHAT["messages"]}),
            ("moderations", {"input": "Hello"}),
        ):
            async with server.session.post(f"{server.v1}/{path}", json={"model": "m", **body}):
                pass

        assert all(answer.end == "complete" and answer.text == text for answer in seen)
        assert all(answer.end == "complete" for answer in messages)
        assert [status for status, _ in responses] == [200, 200]
        paths = sorted((asked["path"], asked["stream"]) for asked in program.requests)
        assert paths == sorted(
            [
                ("/ws/chat", True),
                ("/sse/chat", True),
                ("/v1/chat/completions", True),
                ("/v1/chat/completions", True),
                ("/v1/chat/completions", False),
                ("/v1/messages", True),
                ("/v1/messages", False),
                ("/v1/responses", True),
                ("/v1/responses", False),
                ("/v1/completions", False),
                ("/v1/embeddings", False),
                ("/v1/messages/count_tokens", False),
                ("/v1/moderations", False),
            ]
        )
        for asked in program.requests:
            assert list(asked) == [
                *("event", "id", "hook", "caller", "path", "model", "stream", "body"),
            ]
            assert (asked["event"], asked["hook"], asked["model"]) == (
                "request",
                "guard",
                "m",
            ) or (asked["model"] == "plain")
            assert "Hello" in json.dumps(asked["body"])
        for chats in (asked for asked in program.requests if "chat" in asked["path"]):
            assert chats["body"]["messages"][-1] == {"role": "user", "content": "Hello"}
            assert chats["body"]["model"] == chats["model"]
        assert {headers["x-word"] for headers in program.headers} == {"w"}
        assert not program.answers
        assert not program.whole
        assert await calls(server) == {("request", "passed"): len(program.requests)}
        await server.nothing_held()


async def test_nothing_of_the_client_but_its_body_and_its_name_is_shown(
    make_server: MakeServer,
) -> None:
    async with hook_program() as program:
        server = await make_server(
            **hooked(entry(program, on=["request", "answer"])), **keys_of("web", "root")
        )
        headers = {**bearer("web"), "X-Private": SECRET, "Cookie": f"c={SECRET}"}
        for stream in (True, False):
            seen = await over_openai(server, "m", stream=stream, headers=headers)
            assert seen.end == "complete"

        assert [asked["caller"] for asked in program.requests] == ["web", "web"]
        await until(lambda: program.ended == 1)
        told = json.dumps([program.requests, program.answers, program.whole, program.headers])
        assert SECRET not in told
        assert bearer("web")["Authorization"].split()[-1] not in told
        assert "127.0.0.1" not in told.replace(program.url.removeprefix("http://")[:-5], "")


async def test_a_refusal_costs_nothing_and_has_its_words(make_server: MakeServer) -> None:
    status = 0

    async def decide(_asked: Any) -> Any:
        return refuse("no such words here", status=status, retry_after=2)

    async with hook_program(decide=decide) as program:
        server = await make_server(**hooked(entry(program)))
        for status in (403, 400, 429):
            seen = [*await ask_every_face(server, "m"), await over_anthropic(server, "m")]
            code, raw = await over_responses(server, stream=True)

            for answer in seen:
                assert answer.code == "request_refused"
                assert "no such words here" in answer.raw.decode()
            assert {answer.status for answer in seen if answer.status} == {status} == {code}
            assert json.loads(raw)["error"]["code"] == "request_refused"
            for answer in seen[:2]:
                assert answer.error["retryable"] is (status == 429)
        assert await server.counted("provider_attempts", "provider") == {}
        assert await calls(server) == {("request", "refused"): 3 * 6}
        await server.nothing_held()


async def test_another_body_goes_on_in_place_of_the_clients(make_server: MakeServer) -> None:
    async def decide(asked: Any) -> Any:
        text = json.dumps(asked["body"]).replace("Hello", "Something else")
        body = {**json.loads(text), "stream": not asked["stream"]}
        return {"body": body}

    async with hook_program(decide=decide) as first, hook_program() as second:
        server = await make_server(**hooked(entry(first), entry(second, "next", on=["request"])))
        plain = await make_server()
        body = {"model": "m", "messages": [{"role": "user", "content": "Something else"}]}
        async with plain.session.post(f"{plain.v1}/chat/completions", json=body) as response:
            answer = await response.json()
        text = answer["choices"][0]["message"]["content"]

        seen = await ask_every_face(server, "m")

        assert [(answer.end, answer.text) for answer in seen] == [("complete", text)] * 4
        for asked in second.requests:
            assert "Hello" not in json.dumps(asked["body"])
            assert bool(asked["body"].get("stream")) is asked["stream"]
        outcomes = await server.counted("hook_calls", "hook", "outcome")
        assert outcomes == {("guard", "changed"): 4, ("next", "passed"): 4}


NO_DECISIONS: list[Any] = [
    500,
    404,
    302,
    b"",
    b"[]",
    b"{",
    b"null",
    {"refuse": {"message": "m", "status": 500}},
    {"refuse": {"message": 5}},
    {"refuse": {"message": "m", "retry_after": -1}},
    {"refusal": {"message": "m"}},
    {"body": "text"},
    {"body": None},
    {"body": {"model": 5}},
    {"body": {}, "refuse": {"message": "m"}},
    b" " * (1 << 21),
]


async def test_what_is_no_decision_lets_nothing_pass_a_closed_hook(
    make_server: MakeServer,
) -> None:
    said: Any = None

    async def decide(_asked: Any) -> Any:
        return said

    limit = {"chat.websocket.max_message_size": 1 << 20}
    async with hook_program(decide=decide) as program:
        server = await make_server(**hooked(entry(program), **limit))
        for said in NO_DECISIONS:
            seen = await over_openai(server, "m")
            assert (seen.status, seen.code) == (503, "hook_unavailable"), said
            assert seen.headers["retry-after"] == "1"
            assert (await over_websocket(server, "m")).code == "hook_unavailable", said
        assert await server.counted("provider_attempts", "provider") == {}
        assert await server.change(**hooked(entry(program, fail="open"), **limit))
        for said in NO_DECISIONS:
            assert (await over_openai(server, "m")).end == "complete", said
        assert await calls(server) == {("request", "failed"): 3 * len(NO_DECISIONS)}


async def test_a_hook_that_is_away_or_says_nothing(make_server: MakeServer) -> None:
    silent = asyncio.Event()

    async def decide(_asked: Any) -> Any:
        await silent.wait()

    async with hook_program(decide=decide) as program:
        for url in (NOWHERE, program.url):
            for fail, status in (("closed", 503), ("open", 200)):
                server = await make_server(**hooked(entry(url, timeout=0.05, fail=fail)))
                seen = await over_openai(server, "m")
                assert seen.status == status
                assert seen.code == ("hook_unavailable" if status == 503 else None)
                await server.nothing_held()
        silent.set()


async def test_a_caller_that_keeps_a_hook_busy_leaves_some_of_its_places_to_others(
    make_server: MakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_hook, "MAX_DECISIONS", 6)
    monkeypatch.setattr(http_hook, "MAX_ANSWERS", 6)
    decides, reads = asyncio.Event(), asyncio.Event()

    async def decide(asked: dict[str, Any]) -> Any:
        if asked["caller"] == "alice":
            await decides.wait()
        return {}

    async def read(line: dict[str, Any]) -> None:
        if line.get("caller") == "alice":
            await reads.wait()

    async with hook_program(decide=decide, read=read) as program:
        server = await make_server(
            QUICK,
            **hooked(entry(program, on=["request", "answer"])),
            **keys_of("alice", "bob"),
        )

        def ask(caller: str) -> asyncio.Task[Seen]:
            return asyncio.create_task(over_openai(server, "m", headers=bearer(caller)))

        asked = [ask("alice") for _ in range(10)]
        await until(lambda: len(program.requests) == 4)
        assert (await ask("bob")).end == "complete"
        assert [each["caller"] for each in program.requests].count("alice") == 4
        await until(lambda: program.ended == 1)

        decides.set()
        assert {(await each).end for each in asked} == {"complete"}
        await until(lambda: len(program.answers) == 5)
        assert (await ask("bob")).end == "complete"
        await until(lambda: program.ended == 2)
        assert len(program.answers) == 6, "the others of the first caller wait"
        reads.set()
        await until(lambda: program.ended == 12)
        await server.nothing_held()


async def test_nobody_but_the_first_request_of_an_id_is_shown(make_server: MakeServer) -> None:
    async with hook_program() as program:
        server = await make_server(PACED, **hooked(entry(program, on=["request", "answer"])))

        async with server.connect() as ws, server.connect() as other:
            await ws.send_json(chat("r"))
            first = await ws.receive_json()
            assert first["status"] in {"processing", "queued"}
            await other.send_json(resume("r"))
            await asyncio.gather(to_end(ws, "r"), to_end(other, "r"))
            await other.send_json(chat("r"))
            await to_end(other, "r")
        headers = {"Idempotency-Key": "k"}
        for _ in range(3):
            assert (await over_openai(server, "m", headers=headers)).end == "complete"
            assert (await over_openai(server, "w", stream=False)).end == "complete"

        assert len(program.requests) == 1 + 1 + 3
        assert len(program.answers) == 2
        assert len(program.whole) == 3


async def test_retries_and_other_providers_are_not_shown(make_server: MakeServer) -> None:
    async with hook_program() as program:
        server = await make_server(
            **hooked(entry(program, on=["request", "answer"])),
            **{
                "llm.active": "away",
                "llm.fallbacks": ["sim"],
                "llm.providers.away": provider_entry(NOWHERE, max_retries=2),
            },
        )
        assert (await over_openai(server, "m")).end == "complete"

        assert len(program.requests) == 1
        await until(lambda: program.ended == 1)
        assert program.answers[0][0]["provider"] == "sim"


async def test_a_body_that_streams_through_is_unseen(make_server: MakeServer) -> None:
    async with hook_program() as program:
        server = await make_server(**hooked(entry(program)))

        async def upload() -> tuple[int, Any]:
            form = aiohttp.FormData()
            form.add_field("model", "m")
            form.add_field("file", b"sound", filename="a.wav")
            url = f"{server.v1}/audio/transcriptions"
            async with server.session.post(url, data=form) as response:
                return response.status, await response.json()

        status, body = await upload()
        assert (status, body["error"]["code"]) == (403, "request_refused")
        assert await server.counted("provider_attempts", "provider") == {}
        assert await server.change(**hooked(entry(program, fail="open")))
        status, body = await upload()
        assert body.get("error", {}).get("code") != "request_refused"
        assert program.requests == []
        assert await calls(server) == {("request", "unseen"): 2}


async def test_a_streamed_answer_is_shown_event_by_event(make_server: MakeServer) -> None:
    async with hook_program() as program:
        server = await make_server(**hooked(entry(program, on=["answer"])))

        text = await expected_text(server)
        await until(lambda: program.ended == 1)
        opening, *events, end = program.answers[0]

        assert list(opening) == ["event", "id", "hook", "caller", "path", "provider", "model"]
        assert (opening["event"], opening["provider"]) == ("answer", "sim")
        assert program.texts() == text
        numbers = [event["n"] for event in events]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        assert events[-1]["data"] == "[DONE]"
        assert end == {"end": "complete"}
        assert program.requests == []

        seen = await over_websocket(server, "m")
        await until(lambda: program.ended == 2)
        frames = [
            json.loads(part) for part in seen.raw.decode().replace("}{", "}\n{").splitlines()
        ]
        assert [line["data"] for line in program.answers[1][1:-1]] == frames
        assert [line["n"] for line in program.answers[1][1:-1]] == [
            frame["event_id"] for frame in frames
        ]

        assert (await over_anthropic(server, "m")).end == "complete"
        await until(lambda: program.ended == 3)
        kinds = [line["data"]["type"] for line in program.answers[2][1:-1]]
        assert (kinds[0], kinds[-1]) == ("message_start", "message_stop")

        whole = await over_openai(server, "m", stream=False)
        assert [asked["body"]["choices"][0]["message"]["content"] for asked in program.whole] == [
            whole.text
        ]
        counted = await calls(server)
        assert counted == {("answer", "passed"): 4}


async def test_a_refusal_ends_an_answer_for_all_and_closes_its_provider(
    make_server: MakeServer,
) -> None:
    async def read(line: dict[str, Any]) -> Any:
        return refuse("enough", status=400) if line.get("n", 0) > 5 else None

    async with hook_program(read=read) as program:
        server = await make_server(ENDLESS, **hooked(entry(program, on=["answer"])))
        faces = (over_websocket, over_sse, over_openai, over_anthropic)
        for over in faces:
            seen = await over(server, "m")

            assert (seen.end, seen.code) == ("error", "answer_refused")
            assert b"enough" in seen.raw or seen.error["message"] == "enough"
            await server.nothing_held()
            await until(lambda: server.provider.stats().pool.open == 0)
        assert await calls(server) == {("answer", "refused"): len(faces)}
        ends = await server.counted("requests", "code", "outcome")
        assert ends == {("answer_refused", "client_error"): len(faces)}


async def test_stats_say_of_each_hook_what_came_of_its_calls_and_which_are_open(
    make_server: MakeServer,
) -> None:
    held = asyncio.Event()

    async def decide(asked: dict[str, Any]) -> Any:
        if asked["body"]["model"] == "held":
            await held.wait()
        return refuse() if asked["body"]["model"] == "bad" else {}

    async def hooks() -> Any:
        async with server.session.get(f"{server.base}/stats") as response:
            return (await response.json())["hooks"]

    async with hook_program(decide=decide) as program:
        server = await make_server(QUICK, **hooked(entry(program), entry(program, "log")))
        assert {each["open"] for each in (await hooks())["by_name"].values()} == {0}
        for model in ("good", "bad"):
            await over_openai(server, model)
        waiting = asyncio.create_task(over_openai(server, "held"))
        await until(lambda: len(program.requests) == 4)
        server.context.monitor.tick()

        state = await hooks()

        held.set()
        assert (await waiting).end == "complete"
        assert list(state["by_name"]) == ["guard", "log"]
        guard, log = (each["outcomes"] for each in state["by_name"].values())
        assert (guard["passed"], guard["refused"], guard["failed"]) == (1, 1, 0)
        assert (log["passed"], log["refused"]) == (1, 0)
        assert [each["open"] for each in state["by_name"].values()] == [1, 0]
        assert state["behind_bytes"] == 0
        # A hook that is configured no more is shown no more.
        assert await server.change(hooks=[])
        server.context.monitor.tick()
        assert (await hooks())["by_name"] == {}


async def test_a_whole_answer_is_refused_before_it_is_sent(make_server: MakeServer) -> None:
    async def decide(asked: Any) -> Any:
        return refuse("not this", status=400) if asked["event"] == "answer" else {}

    async with hook_program(decide=decide) as program:
        server = await make_server(**hooked(entry(program, on=["request", "answer"])))

        for headers in (None, {"Idempotency-Key": "k"}):
            seen = await over_openai(server, "m", stream=False, headers=headers)
            assert (seen.status, seen.code) == (400, "answer_refused")
            assert seen.headers["x-should-retry"] == "false"
        message = await over_anthropic(server, "m", stream=False)
        assert (message.status, message.code) == (400, "answer_refused")
        status, _ = await over_responses(server, stream=False)
        assert status == 400
        assert len(program.whole) == 4
        await server.nothing_held()


async def test_a_hook_that_has_seen_enough_hears_no_more(make_server: MakeServer) -> None:
    async def read(line: dict[str, Any]) -> Any:
        return 204 if "n" in line else None

    async with hook_program(read=read) as program:
        server = await make_server(PACED, **hooked(entry(program, on=["answer"])))

        seen = await over_openai(server, "m")

        assert seen.end == "complete"
        assert await calls(server) == {("answer", "passed"): 1}
        assert len(program.answers[0]) == 2


async def test_a_reload_changes_who_is_asked(make_server: MakeServer) -> None:
    async with hook_program() as first, hook_program() as second:
        server = await make_server(PACED)
        assert (await over_openai(server, "m")).end == "complete"
        assert await server.change(**hooked(entry(first, on=["request", "answer"])))
        running = asyncio.create_task(over_openai(server, "m"))
        await until(lambda: bool(first.answers))
        assert await server.change(**hooked(entry(second)))
        assert (await over_openai(server, "m")).end == "complete"
        assert (await running).end == "complete"
        await until(lambda: first.ended == 1)
        assert not await server.change(**hooked({"name": "x", "python": "nowhere.at_all:Here"}))
        assert (await over_openai(server, "m")).end == "complete"

        assert (len(first.requests), len(second.requests)) == (1, 2)


async def test_a_reload_before_the_first_content_changes_nothing_for_an_answer(
    make_server: MakeServer,
) -> None:
    async with hook_program() as first, hook_program() as second:
        slow = Behaviour(ttft=0.5, interval=0, tokens=5)
        server = await make_server(slow, **hooked(entry(first, on=["request", "answer"])))
        running = asyncio.create_task(over_openai(server, "m"))
        await until(lambda: server.simulator.stats().requests == 1)
        assert await server.change(**hooked(entry(second, on=["answer"])))
        await asyncio.sleep(0)

        assert (await running).end == "complete"
        await until(lambda: first.ended == 1)
        assert not second.answers


async def test_a_stop_lets_a_hook_see_the_end(make_server: MakeServer) -> None:
    async with hook_program() as program:
        server = await make_server(QUICK, **hooked(entry(program, on=["answer"])))
        seen = await over_openai(server, "m")
        assert seen.end == "complete"
        (wing,) = (wing for wing in server.owners.wings if wing.name == "hooks")
        await wing.leave()

        assert program.answers[0][-1] == {"end": "complete"}
