"""An answer that breaks off after text, and whose rest another attempt says.

That the text is whole wherever it breaks off is in tests/simulation, and which provider is asked,
and how often, in tests/support/board.py.
"""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from aioserver.protocol import eventstream
from aioserver.providers.attempt import Attempt
from tests.support.chat import CHAT
from tests.support.faces import over_anthropic, over_openai, over_sse, over_websocket
from tests.support.logs import fields_of
from tests.support.messages_of_2026 import NO_MORE, STILL, VERSION_OF_2026
from tests.support.scripted_provider import (
    DONE,
    EVENT_STREAM,
    LAST_CHUNK,
    Peer,
    ScriptedProvider,
    chunk,
)
from tests.support.server import QUICK, MakeServer, provider_entry
from tests.support.simulator import Simulator
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from tests.support.faces import Seen
    from tests.support.server import RunningServer

    Face = Callable[[RunningServer, str], Awaitable[Seen]]

FACES: dict[str, Face] = {
    "websocket": over_websocket,
    "sse": over_sse,
    "openai": over_openai,
    "anthropic": over_anthropic,
}
NONE = {"continuation": "none"}


@asynccontextmanager
async def two(
    make_server: MakeServer, form: str = "prefill", *, own: str = "none", **changes: Any
) -> AsyncIterator[tuple[RunningServer, Simulator]]:
    """A server whose provider's answers break off, and the simulator of another provider."""
    async with Simulator(QUICK) as other:
        entry = provider_entry(other.base_url, "other-model")
        server = await make_server(
            QUICK,
            **{
                "llm.fallbacks": ["other"],
                "llm.providers.other": {**entry, "continuation": form, "messages": True},
                "llm.providers.sim.continuation": own,
                "llm.providers.sim.messages": True,
                **changes,
            },
        )
        yield server, other
        await server.nothing_held()


def transcript(simulator: Simulator, index: int = -1) -> str:
    """Return the beginning of an answer that *simulator* was asked to go on with."""
    last = simulator.bodies[index]["messages"][-1]
    assert last["role"] == "assistant"
    return str(last["content"])


async def response(
    server: RunningServer, model: str, headers: dict[str, str] | None = None, **more: Any
) -> tuple[str, list[Any], bytes]:
    """Return the text of a streamed response, its events, and its bytes."""
    body = {"model": model, "input": "Hello", "stream": True, **more}
    url = f"{server.v1}/responses"
    async with server.session.post(url, json=body, headers=headers) as answer:
        assert answer.status == 200
        raw = await answer.read()
    events = [json.loads(event.data) for event in eventstream.parse(raw)]
    deltas = [each["delta"] for each in events if each["type"] == "response.output_text.delta"]
    return "".join(deltas), events, raw


@pytest.mark.parametrize("face", FACES)
async def test_other_provider_says_the_rest(make_server: MakeServer, face: str) -> None:
    async with two(make_server) as (server, other):
        whole = (await FACES[face](server, "plain")).text
        seen = await FACES[face](server, "fault-cut-9")

        assert seen.end == "complete"
        assert seen.text == whole
        assert other.stats().requests == 1
        beginning = transcript(other)
        assert whole.startswith(beginning)
        assert 0 < len(beginning) < len(whole)
        comment = f": seam at={len(beginning)} from=sim to=other code=".encode()
        assert (comment in seen.raw) is (face != "websocket")
        metadata = b'"seams":[{"at":%d,"from":"sim","to":"other"' % len(beginning)
        assert (metadata in seen.raw) is (face in {"websocket", "sse"})


@pytest.mark.parametrize("form", ["prefill", "prefix", "final_message", "instruct"])
async def test_each_form_asks_for_the_rest_in_its_way(make_server: MakeServer, form: str) -> None:
    async with two(make_server, form) as (server, other):
        whole = (await over_openai(server, "plain")).text
        # Enough of it that an engine which writes it again would be noticed.
        seen = await over_openai(server, "fault-cut-12")

        assert seen.text == whole
        body = other.bodies[-1]
        first, *added = body["messages"]
        assert first["content"] == "Hello"
        assert added[0]["role"] == "assistant"
        assert whole.startswith(added[0]["content"])
        assert added[0].get("prefix", False) is (form == "prefix")
        flags = {"continue_final_message": True, "add_generation_prompt": False}
        assert flags.items() <= body.items() or form != "final_message"
        assert len(added) == (2 if form == "instruct" else 1)


async def test_same_provider_is_asked_first(make_server: MakeServer) -> None:
    changes: dict[str, Any] = {"llm.providers.sim.http_client.max_retries": 0}
    async with two(make_server, own="prefill", **changes) as (server, other):
        server.simulator.behaviour = replace(QUICK, cut_after=9)
        other.behaviour = replace(QUICK, prefill="refuses")
        seen = await over_websocket(server, "plain")

        # It says nine tokens more, and breaks off again.
        assert server.simulator.stats().requests == 2
        assert seen.end == "error"
        assert seen.code == "provider_disconnected"
        assert seen.error["retryable"] is True
        assert other.stats().requests == 1


async def test_refused_hop_shows_nothing_and_the_next_provider_is_asked(
    make_server: MakeServer,
) -> None:
    async with two(make_server, own="prefill") as (server, other):
        whole = (await over_openai(server, "plain")).text
        for number in range(2):
            server.simulator.behaviour = replace(QUICK, cut_after=9, prefill="refuses")
            seen = await over_openai(server, "plain")

            assert seen.end == "complete"
            assert seen.text == whole
            # A model for which it has refused once is not asked for again.
            assert server.simulator.stats().requests == 1 + 2 + number
        assert other.stats().requests == 2


async def test_engine_that_begins_anew_is_cut_at_the_seam(make_server: MakeServer) -> None:
    async with two(make_server) as (server, other):
        whole = (await over_openai(server, "plain")).text
        other.behaviour = replace(QUICK, prefill="repeats")

        assert (await over_openai(server, "fault-cut-12")).text == whole


async def test_short_rest_that_reads_like_a_new_beginning_is_shown_whole(
    make_server: MakeServer,
) -> None:
    async def go_on(peer: Peer) -> None:
        body = (await peer.request()).partition(b"\r\n\r\n")[2]
        word = json.loads(body)["messages"][-1]["content"][:5]
        choice = {"index": 0, "delta": {"content": word}, "finish_reason": None}
        end = {"index": 0, "delta": {}, "finish_reason": "stop"}
        events = [b"data: %b\n\n" % orjson.dumps({"choices": [each]}) for each in (choice, end)]
        await peer.send(EVENT_STREAM, *map(chunk, (*events, DONE)), LAST_CHUNK)

    async with two(make_server) as (server, _), ScriptedProvider(go_on) as other:
        whole = (await over_openai(server, "plain")).text
        entry = provider_entry(other.url, "other-model") | {"continuation": "prefill"}
        assert await server.change(
            **{"llm.fallbacks": ["other"], "llm.providers.other": entry, "llm.active": "sim"}
        )
        seen = await over_openai(server, "fault-cut-12")

        shown = seen.text[:-5]
        assert (seen.end, seen.text) == ("complete", shown + whole[:5])
        assert whole.startswith(shown)


@pytest.mark.parametrize(("form", "habit"), [("prefill", "anew"), ("instruct", "turn")])
async def test_rest_that_is_none_is_not_shown(
    make_server: MakeServer, form: str, habit: str
) -> None:
    async with two(make_server, form) as (server, other):
        other.behaviour = replace(QUICK, prefill=habit)
        seen = await over_openai(server, "fault-cut-12")

        assert seen.end == "error"
        assert seen.code == "provider_disconnected"
        assert seen.text
        assert b"seam" not in seen.raw
        assert other.stats().requests == 1


async def test_event_that_reports_an_error_ends_the_answer_where_nobody_says_the_rest(
    make_server: MakeServer,
) -> None:
    async with two(make_server, "none", own="prefill") as (server, _):
        server.simulator.behaviour = replace(QUICK, prefill="refuses")
        seen = await over_openai(server, "fault-error-event-9")

        # It is the provider's own.
        assert seen.end == "error"
        assert b'"server_error"' in seen.raw


TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {}}}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        # More than one free text.
        ({"n": 2}, 9),
        ({"logprobs": True}, 9),
        ({"response_format": {"type": "json_object"}}, 9),
        ({"guided_regex": ".*"}, 9),
        ({"structured_outputs": {"regex": ".*"}}, 9),
        ({"add_generation_prompt": False}, 9),
        # A beginning of the client's own.
        ({"messages": [*CHAT["messages"], {"role": "assistant", "content": "Well, "}]}, 9),
        # A call of a tool.
        ({"tools": [TOOL], "tool_choice": "required"}, 1),
    ],
)
async def test_what_is_not_one_free_text_is_not_continued(
    make_server: MakeServer, options: dict[str, Any], words: int
) -> None:
    async with two(make_server) as (server, other):
        body = {**CHAT, "model": f"fault-cut-{words}", "stream": True, **options}
        async with server.session.post(f"{server.v1}/chat/completions", json=body) as response:
            raw = await response.read()

        assert b'"provider_disconnected"' in raw
        assert (b'"tool_calls"' in raw) is ("tools" in options)
        assert other.stats().requests == 0


async def test_response_over_the_bridge_goes_on_as_it_began(make_server: MakeServer) -> None:
    changes: dict[str, Any] = {
        "llm.providers.sim.responses": False,
        "llm.providers.other.responses": False,
    }
    async with two(make_server, **changes) as (server, other):
        responses = [await response(server, model) for model in ("plain", "fault-cut-9")]
        (whole, *_), (text, events, raw) = responses

        assert text == whole
        assert [event["sequence_number"] for event in events] == list(range(len(events)))
        types = [event["type"] for event in events]
        for once in ("response.created", "response.output_item.added", "response.completed"):
            assert types.count(once) == 1
        final = events[-1]["response"]
        assert final["output"][0]["content"][0]["text"] == whole
        assert (
            final["usage"]["total_tokens"]
            > responses[0][1][-1]["response"]["usage"]["total_tokens"]
        )
        assert b": seam at=" in raw
        assert transcript(other)


@pytest.mark.parametrize("learned", ["from its own answer", "while it waits"])
async def test_rest_of_a_message_is_nothing_for_a_provider_that_is_found_to_have_chats_alone(
    make_server: MakeServer, learned: str
) -> None:
    changes: dict[str, Any] = {
        "llm.providers.other.messages": "auto",
        "llm.providers.other.http_client.concurrent_requests": 1,
    }
    async with two(make_server, **changes) as (server, other):
        other.behaviour = replace(QUICK, messages=False, ttft=0.5)
        others = []
        if learned == "while it waits":
            others = [asyncio.ensure_future(over_anthropic(server, "other/plain"))]
            # It asks for a chat completion now, in the only place.
            await other.until(lambda stats: stats.requests == 1)

        seen = await over_anthropic(server, "fault-cut-9")

        assert seen.code == "provider_disconnected"
        assert seen.text
        assert [(await each).end for each in others] == ["complete"] * len(others)
        # A refusal for want of the path is no request there.
        assert other.stats().connections_accepted
        assert other.stats().requests == len(others)


async def message_of(
    server: RunningServer, model: str, version: str = VERSION_OF_2026, **more: Any
) -> tuple[str, bytes]:
    """Return the text of a streamed message, and its bytes."""
    said = [{"role": "user", "content": "Hello"}]
    body = {"model": model, "max_tokens": 4096, "messages": said, "stream": True, **more}
    headers = {"anthropic-version": version}
    async with server.session.post(f"{server.v1}/messages", json=body, headers=headers) as answer:
        assert answer.status == 200
        raw = await answer.read()
    deltas = [json.loads(event.data).get("delta", {}) for event in eventstream.parse(raw)]
    return "".join(delta.get("text", "") for delta in deltas), raw


@pytest.mark.parametrize("kind", ["enabled", "disabled"])
async def test_model_that_thinks_gets_no_beginning_of_its_message(
    make_server: MakeServer, kind: str
) -> None:
    thinking = {"type": kind, "budget_tokens": 1024}
    async with two(make_server) as (server, other):
        whole, _ = await message_of(server, "plain", thinking=thinking)
        text, raw = await message_of(server, "fault-cut-9", thinking=thinking)

        assert (text, raw.count(b"message_stop")) == (whole, 2)
        roles = [message["role"] for message in other.bodies[-1]["messages"]]
        assert roles == ["user", "assistant", "user"][: 3 if kind == "enabled" else 2]
        assert other.requests[-1].headers["anthropic-version"] == VERSION_OF_2026
        assert other.stats().requests == 1


VERSIONS = ["2023-06-01", VERSION_OF_2026]


@pytest.mark.parametrize("version", VERSIONS)
async def test_rest_is_not_requested_where_its_version_refuses_the_request(
    make_server: MakeServer, version: str
) -> None:
    # This provider reads no version.
    changes: dict[str, Any] = {"llm.providers.sim.headers": {"anthropic-version": "2023-06-01"}}
    async with two(make_server, **changes) as (server, other):
        for number, (more, where) in enumerate(NO_MORE, 1):
            _, raw = await message_of(server, "fault-cut-9", version, **more)

            assert (b"event: error" in raw) is (version == VERSION_OF_2026), where
            assert other.stats().requests == number * (version == "2023-06-01")

        asked = other.stats().requests
        _, raw = await message_of(server, "fault-cut-9", version, messages=STILL)
        assert b"event: error" not in raw
        assert other.stats().requests == asked + 1


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("face", ["messages", "responses"])
async def test_rest_over_a_bridge_is_said_whatever_the_version(
    make_server: MakeServer, face: str, version: str
) -> None:
    changes: dict[str, Any] = {
        f"llm.providers.{name}.{key}": value
        for name in ("sim", "other")
        for key, value in (("messages", "bridge"), ("responses", False))
    }
    async with two(make_server, **changes) as (server, other):
        texts, raw = [], b""
        for model in ("plain", "fault-cut-9"):
            if face == "messages":
                text, raw = await message_of(server, model, version, temperature=0.5)
            else:
                headers = {"anthropic-version": version}
                text, _, raw = await response(server, model, headers, temperature=0.5)
            texts.append(text)

        assert texts[0] == texts[1]
        assert raw.count(b"seam at=") == 1
        assert transcript(other)
        for simulator in (server.simulator, other):
            assert simulator.bodies[-1]["temperature"] == 0.5
            assert simulator.requests[-1].path.endswith("/chat/completions")
            assert "anthropic-version" not in simulator.requests[-1].headers


async def test_native_response_is_not_continued(make_server: MakeServer) -> None:
    async with two(make_server) as (server, other):
        _, events, _ = await response(server, "fault-cut-9")

        assert events[-1]["type"] == "response.failed"
        assert other.stats().requests == 0


async def test_pinned_request_is_continued_by_its_own_provider_alone(
    make_server: MakeServer,
) -> None:
    async with two(make_server) as (server, other):
        seen = await over_openai(server, "sim/fault-cut-9")

        assert seen.code == "provider_disconnected"
        assert other.stats().requests == 0


async def test_bound_of_tokens_and_usage_are_those_of_one_answer(make_server: MakeServer) -> None:
    async with two(make_server) as (server, other):
        body = {
            **CHAT,
            "stream": True,
            "max_tokens": 20,
            "stream_options": {"include_usage": True},
        }
        url = f"{server.v1}/chat/completions"
        raws = []
        for model in ("plain", "fault-cut-9"):
            async with server.session.post(url, json={**body, "model": model}) as response:
                raws.append(await response.read())
        events = [json.loads(each.data) for each in eventstream.parse(raws[1])[:-1]]
        usage = events[-1]["usage"]

        assert other.bodies[-1]["max_tokens"] == 20 - 9
        # The role came in an event, too, which counts as a token where no usage was reported.
        assert usage["completion_tokens"] == 20 + 1
        assert usage["prompt_tokens"] > 2
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        assert len({event["id"] for event in events}) == 1
        assert sum("role" in choice["delta"] for e in events for choice in e["choices"]) == 1


async def test_conversation_and_idempotency_key_have_the_joined_text(
    make_server: MakeServer,
) -> None:
    async with two(make_server) as (server, _):
        whole = (await over_openai(server, "plain")).text
        texts = []
        for _number in range(2):
            headers = {"Idempotency-Key": "k1"}
            seen = await over_openai(server, "fault-cut-9", headers=headers)
            texts.append(seen.text)
        assert texts == [whole, whole]
        body = {
            "request_id": "r1",
            "text": "Hello",
            "model": "fault-cut-9",
            "conversation_id": "c",
        }
        async with server.session.post(server.sse, json=body) as response:
            await response.read()
        async with server.session.get(f"{server.base}/conversations/c") as response:
            conversation = await response.json()

        assert conversation["messages"][-1]["text"] == whole


async def test_long_answer_on_the_fast_path_is_kept_and_goes_on(make_server: MakeServer) -> None:
    # Its events have more bytes than are kept before they are read.
    paced = replace(QUICK, interval=0.0005, tokens=900)
    async with two(make_server) as (server, other):
        other.behaviour = replace(QUICK, tokens=900)
        server.simulator.behaviour = paced
        whole = (await over_openai(server, "plain")).text
        server.simulator.behaviour = replace(paced, cut_after=600)
        seen = await over_openai(server, "plain")

        assert seen.end == "complete"
        assert seen.text == whole
        assert whole.startswith(transcript(other))
        assert len(transcript(other)) > len(whole) / 3


async def test_kept_body_is_let_go_before_a_new_request_is_refused_for_it(
    make_server: MakeServer,
) -> None:
    changes: dict[str, Any] = {
        "chat.websocket.concurrency.max_body_bytes": 100_000,
        "llm.providers.sim.http_client.read_timeout": 60.0,
    }
    async with two(make_server, **changes) as (server, other):
        server.simulator.behaviour = replace(QUICK, stall_after=9)
        body = {"messages": [{"role": "user", "content": "y" * 60_000}], "stream": True}
        url = f"{server.v1}/chat/completions"
        async with server.session.post(url, json=body) as first:
            await first.content.readuntil(b'"content":"')
            assert server.context.admission.body_bytes > 60_000
            elsewhere = {**body, "model": "other/plain"}
            async with server.session.post(url, json=elsewhere) as second:
                assert second.status == 200
                assert (await second.read()).endswith(b"[DONE]\n\n")

            await until(lambda: not server.context.admission.body_bytes)
            # Without the body the answer ends as it has ended before.
            await server.simulator.close()
            raw = await first.read()
        assert b'"provider_disconnected"' in raw
        assert other.stats().requests == 1


async def test_kept_body_stays_while_the_rest_waits_for_a_place(make_server: MakeServer) -> None:
    changes: dict[str, Any] = {
        "chat.websocket.concurrency.max_body_bytes": 100_000,
        "llm.providers.sim.http_client.read_timeout": 60.0,
        "llm.providers.other.http_client.concurrent_requests": 1,
    }
    async with two(make_server, **changes) as (server, other):
        server.simulator.behaviour = other.behaviour = replace(QUICK, stall_after=9)
        large = {"messages": [{"role": "user", "content": "y" * 60_000}], "stream": True}
        elsewhere = {**CHAT, "model": "other/plain", "stream": True}
        url = f"{server.v1}/chat/completions"
        async with server.session.post(url, json=large) as first:
            await first.content.readuntil(b'"content":"')
            async with server.session.post(url, json=elsewhere) as second:
                await second.content.readuntil(b'"content":"')
                await server.simulator.close()
                provider = server.provider_of("other")
                await until(lambda: provider.stats().queue.waiting == 1)

                async with server.session.post(url, json=large) as third:
                    assert third.status == 503
                    assert (await third.json())["error"]["code"] == "server_at_capacity"
                other.behaviour = QUICK
            raw = await first.read()
        assert raw.endswith(b"[DONE]\n\n")
        assert b'"error"' not in raw


async def test_body_is_not_kept_where_nobody_continues(make_server: MakeServer) -> None:
    async with two(make_server, "none") as (server, _):
        server.simulator.behaviour = replace(QUICK, stall_after=9)
        url = f"{server.v1}/chat/completions"
        async with server.session.post(url, json={**CHAT, "stream": True}) as answer:
            await answer.content.readuntil(b'"content":"')

            await until(lambda: not server.context.admission.body_bytes)


async def test_what_was_said_is_let_go_where_there_is_no_room(make_server: MakeServer) -> None:
    async with two(make_server, own="prefill") as (server, _):
        server.simulator.behaviour = replace(QUICK, stall_after=9)
        url = f"{server.v1}/chat/completions"
        async with server.session.post(url, json={**CHAT, "stream": True}) as answer:
            await answer.content.readuntil(b'"content":"')
            store = server.context.gateway.lifetime.store
            (stream,) = store.running()
            kept_text = stream.transcript
            assert kept_text is not None
            await until(lambda: kept_text.text() is not None)
            kept = store.stats().bytes
            store.apply(max_stream_bytes=1 << 20, max_kept_bytes=kept - 1)

            assert kept_text.text() is None
            assert kept_text.size == 0


async def test_client_that_leaves_while_the_rest_is_said_ends_it(make_server: MakeServer) -> None:
    async with two(make_server) as (server, other):
        other.behaviour = replace(QUICK, interval=0.01, tokens=10_000)
        url = f"{server.v1}/chat/completions"
        body = {**CHAT, "model": "fault-cut-9", "stream": True}
        async with server.session.post(url, json=body) as answer:
            await answer.content.readuntil(b": seam ")
        await other.until(lambda stats: stats.aborted == 1, within=30.0)


class Holding:
    """A provider that answers one question at a time: to `break` it says a beginning, waits for
    `go`, and breaks off; it says the rest of that at once, and anything else after `free`.
    """

    def __init__(self) -> None:
        self.go, self.free = asyncio.Event(), asyncio.Event()
        self.asked: list[str] = []

    async def play(self, peer: Peer) -> None:
        while True:
            request = orjson.loads((await peer.request()).partition(b"\r\n\r\n")[2])
            last = request["messages"][-1]
            self.asked.append(last["role"])
            if last["content"] == "break":
                await peer.send(EVENT_STREAM, chunk(said_chunk("One, two, ")))
                await self.go.wait()
                peer.abort()
                return
            rest = last["role"] == "assistant"
            await peer.send(EVENT_STREAM, chunk(said_chunk("three." if rest else "Well.")))
            if not rest:
                await self.free.wait()
            await peer.send(chunk(said_chunk("", "stop") + b"data: [DONE]\n\n") + LAST_CHUNK)


def said_chunk(text: str, finish: str | None = None) -> bytes:
    """Return the event of a *text*."""
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish}
    return b"data: %b\n\n" % orjson.dumps({"choices": [choice]})


async def asked(server: RunningServer, text: str, until_text: str = "") -> tuple[Any, bytes]:
    """Ask for a stream; return the answer, and what has come of it up to *until_text*."""
    body = {"model": "m", "messages": [{"role": "user", "content": text}], "stream": True}
    answer = await server.session.post(f"{server.v1}/chat/completions", json=body)
    raw = await answer.content.readuntil(until_text.encode()) if until_text else b""
    return answer, raw


@pytest.mark.parametrize("waits", [False, True])
async def test_answer_that_breaks_off_while_the_server_stops_is_continued(
    make_server: MakeServer, *, waits: bool
) -> None:
    provider = Holding()
    async with ScriptedProvider(provider.play) as scripted:
        entry = provider_entry(scripted.url, concurrent_requests=1, max_retries=1)
        entry["continuation"] = "prefill"
        server = await make_server(**{"llm.providers.first": entry, "llm.active": "first"})
        answer, raw = await asked(server, "break", "two, ")
        other: asyncio.Task[tuple[Any, bytes]] | None = None
        if waits:
            other = asyncio.ensure_future(asked(server, "another", "Well."))
            await until(lambda: waiting(server) == 1)
            # It gets the place of the answer that breaks off.
            provider.go.set()
            await until(lambda: provider.asked == ["user", "user"] and waiting(server) == 1)

        server.context.gateway.drain()

        refused, _ = await asked(server, "new")
        assert refused.status == 503
        assert b'"server_shutdown"' in await refused.read()
        provider.go.set()
        provider.free.set()
        raw += await answer.read()
        assert b"three." in raw
        assert raw.endswith(b"[DONE]\n\n")
        if other is not None:
            assert (await (await other)[0].read()).endswith(b"[DONE]\n\n")
        await server.nothing_held()


def waiting(server: RunningServer) -> int:
    """Return how many requests wait for the provider `first`."""
    return int(server.provider_of("first").stats().queue.waiting)


async def test_stop_ends_the_rest_that_takes_too_long(make_server: MakeServer) -> None:
    quick: dict[str, Any] = {
        "chat.websocket.shutdown_timeout": 0.5,
        "chat.websocket.drain_delay": 0,
    }
    async with two(make_server, **quick) as (server, other):
        other.behaviour = replace(QUICK, ttft=60.0)
        body = {**CHAT, "model": "fault-cut-9", "stream": True}
        url = f"{server.v1}/chat/completions"
        async with server.session.post(url, json=body) as answer:
            await other.until(lambda stats: stats.active == 1, within=30.0)
            await server.runner.end()
            raw = await answer.read()

    assert b'"server_shutdown"' in raw


async def test_each_attempt_has_its_line_and_is_counted_where_it_was_sent(
    make_server: MakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with two(make_server) as (server, _):
        with caplog.at_level("INFO", logger="aioserver.requests"):
            await over_websocket(server, "fault-cut-9")
            await until(lambda: "request finished" in caplog.messages)
        parts, (request,) = fields_of(caplog, "attempt finished"), fields_of(caplog)

        assert [part["attempt"] for part in parts] == [1, 2]
        assert [part["provider"] for part in parts] == ["sim", "other"]
        assert [part["outcome"] for part in parts] == ["cut", "ok"]
        assert [part["estimated"] for part in parts] == [True, False]
        assert request["seams"] == 1
        assert request["attempts"] == 2
        assert request["provider"] == "other"
        for name in ("tokens_in", "tokens_out"):
            assert request[name] == sum(part[name] for part in parts)
        tokens = await server.counted("tokens", "provider", "type")
        for part in parts:
            assert tokens[part["provider"], "output"] == part["tokens_out"]
        continued = await server.counted("continuations", "provider", "result")
        assert continued == {("other", "continued"): 1}
        server.context.monitor.tick()
        async with server.session.get(f"{server.base}/stats") as response:
            stats = await response.json()
        assert stats["providers"]["other"]["continued"] == {"total": 1, "last_minute": 1}
        (incident,) = (each for each in server.incidents() if each["kind"] == "seams")
        assert incident["provider"] == "sim"
        assert "provider_disconnected" in incident["text"]


async def test_rest_that_is_not_shown_is_paid_for(
    make_server: MakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with two(make_server) as (server, other):
        other.behaviour = replace(QUICK, prefill="anew")
        with caplog.at_level("INFO", logger="aioserver.requests"):
            seen = await over_openai(server, "fault-cut-12")
            await until(lambda: "request finished" in caplog.messages)

    assert seen.end == "error"
    first, second = fields_of(caplog, "attempt finished")
    assert (first["provider"], first["outcome"]) == ("sim", "cut")
    assert (second["provider"], second["outcome"]) == ("other", "cut")
    assert second["tokens_out"] > 0


async def test_refusal_costs_nothing_that_comes_while_the_client_leaves(
    make_server: MakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    head = b"HTTP/1.1 503 No\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n"

    async def play(peer: Peer) -> None:
        await peer.request()
        await peer.send(head + b"{}")
        await peer.request()
        await peer.send(head + b"{")
        await peer.left()

    async with ScriptedProvider(play) as provider:
        entry = provider_entry(provider.url, max_retries=1, backoff_factor=0.0)
        server = await make_server(**{"llm.providers.first": entry, "llm.active": "first"})
        store = server.context.gateway.lifetime.store
        with caplog.at_level("INFO", logger="aioserver.requests"):
            url = f"{server.v1}/chat/completions"
            asking = asyncio.ensure_future(server.session.post(url, json={**CHAT, "stream": True}))

            def refused_twice() -> bool:
                return any(
                    (stream.outcome.attempts, stream.attempt.status) == (2, 503)
                    for stream in store.running()
                    if isinstance(stream.attempt, Attempt)
                )

            await until(refused_twice)
            asking.cancel()
            await until(lambda: "request finished" in caplog.messages)

    assert not fields_of(caplog, "attempt finished")
    (line,) = fields_of(caplog)
    assert line["attempts"] == 2
    assert not {"tokens_in", "tokens_out", "tokens_source"} & line.keys()


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        ({"message": "x", "type": "content_filter"}, 0),
        ({"message": "x", "code": "content_policy_violation"}, 0),
        ({"message": "x", "type": "invalid_request_error", "code": None}, 0),
        ({"message": "x", "code": 400}, 0),
        ({"message": "x", "code": 503}, 1),
        ({"message": "x", "code": "rate_limit_exceeded"}, 1),
        ({"message": "x", "type": "server_error"}, 1),
    ],
)
async def test_verdict_of_a_provider_is_not_routed_around(
    make_server: MakeServer, error: dict[str, Any], asked: int
) -> None:
    text = {"choices": [{"index": 0, "delta": {"content": "One, "}, "finish_reason": None}]}
    events = [b"data: %b\n\n" % orjson.dumps(each) for each in (text, {"error": error})]

    async def play(peer: Peer) -> None:
        await peer.request()
        await peer.send(EVENT_STREAM + b"".join(map(chunk, events)) + LAST_CHUNK)

    async with ScriptedProvider(play) as provider:
        changes: dict[str, Any] = {
            "llm.providers.first": provider_entry(provider.url),
            "llm.active": "first",
        }
        async with two(make_server, **changes) as (server, other):
            seen = await over_openai(server, "plain")

            assert seen.text.startswith("One, ")
            assert seen.end == ("complete" if asked else "error")
            assert other.stats().requests == asked
