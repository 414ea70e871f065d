"""OpenAI's own way back into a response: the official SDK's calls, served from the log."""

from __future__ import annotations

import contextlib
import random
from typing import TYPE_CHECKING, Any

import openai
import orjson
import pytest
from openai.types.responses import ResponseFailedEvent

from aioserver.auth.callers import anonymous
from aioserver.errors import SlowClient
from aioserver.protocol import eventstream
from aioserver.protocol.steps import at_once
from aioserver.protocol.whole_answer import final_response
from aioserver.provider_errors import ProviderDisconnected
from aioserver.wings.responses.events import ResponseEvents
from tests.support.chat import CHAT, chat, until_status
from tests.support.raw import Raw
from tests.support.scripted_provider import (
    DONE,
    EVENT_STREAM,
    LAST_CHUNK,
    Peer,
    ScriptedProvider,
    chunk,
)
from tests.support.sdk import openai_of
from tests.support.server import CONCURRENCY, QUICK
from tests.support.simulator import Behaviour
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from openai import AsyncOpenAI

    from tests.support.server import MakeServer, RunningServer


SLOW = Behaviour(ttft=0, interval=0.02)
ASK: dict[str, Any] = {"model": "sim", "input": "Hello", "stream": True, "store": True}
# A provider that has chat completions only.
BRIDGED: dict[str, Any] = {"llm.providers.sim.responses": False}


async def cut(sdk: AsyncOpenAI, events: int, **changes: Any) -> list[Any]:
    """The first *events* of a response whose client has then left."""
    stream = await sdk.responses.create(**{**ASK, **changes})
    seen = []
    async for event in stream:
        seen.append(event)
        if len(seen) == events:
            break
    await stream.close()
    return seen


def text_of(events: list[Any]) -> str:
    return "".join(event.delta for event in events if event.type == "response.output_text.delta")


@pytest.mark.parametrize(
    ("events", "background", "provider"), [(1, False, {}), (4, True, {}), (9, False, BRIDGED)]
)
async def test_a_response_that_was_cut_is_read_on(
    server: RunningServer,
    sdk: AsyncOpenAI,
    events: int,
    background: bool,
    provider: dict[str, Any],
) -> None:
    await server.change(**provider)
    whole = await sdk.responses.create(model="sim", input="Hello")
    asked = server.simulator.stats().requests
    server.simulator.behaviour = SLOW

    seen = await cut(sdk, events, background=background)
    again = await sdk.responses.retrieve(
        seen[0].response.id, stream=True, starting_after=seen[-1].sequence_number
    )
    rest = [event async for event in again]

    numbers = [event.sequence_number for event in (*seen, *rest)]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    assert rest[-1].type == "response.completed"
    assert text_of([*seen, *rest]) == whole.output_text
    assert server.simulator.stats().requests == asked + 1


async def test_all_of_it_comes_again_without_a_number(
    server: RunningServer, sdk: AsyncOpenAI
) -> None:
    server.simulator.behaviour = SLOW
    seen = await cut(sdk, 5)

    again = await sdk.responses.retrieve(seen[0].response.id, stream=True)
    events = [event async for event in again]

    assert events[:5] == seen
    assert events[-1].type == "response.completed"


async def test_neither_a_look_nor_a_resume_reads_the_log(
    server: RunningServer, sdk: AsyncOpenAI
) -> None:
    events = [event async for event in await sdk.responses.create(**ASK)]
    whole = events[-1].response
    (stream,) = server.owners.streams.owned_by(anonymous("127.0.0.1"))
    for entry in stream.entries:
        if entry.data:
            entry.data = b"data: {}\n\n" * entry.count

    assert (await sdk.responses.retrieve(whole.id)).model_dump() == whole.model_dump()
    assert (await sdk.responses.cancel(whole.id)).model_dump() == whole.model_dump()
    for number, event in enumerate(events, 1):
        url = (
            f"{server.v1}/responses/{whole.id}?stream=true&starting_after={event.sequence_number}"
        )
        async with server.session.get(url) as response:
            assert (await response.read()).count(b"{}") == len(events) - number


async def test_an_answer_not_streamed_is_kept_whole(
    server: RunningServer, sdk: AsyncOpenAI
) -> None:
    whole = await sdk.responses.create(model="sim", input="Hello", store=True)

    retrieved = await sdk.responses.retrieve(whole.id)
    cancelled = await sdk.responses.cancel(whole.id)

    assert retrieved.model_dump() == whole.model_dump()
    assert cancelled.status == "completed"
    with pytest.raises(openai.BadRequestError, match="was not streamed"):
        await sdk.responses.retrieve(whole.id, stream=True)
    assert server.simulator.stats().requests == 1
    await server.nothing_held()


@pytest.mark.parametrize(("provider", "streamed"), [({}, True), (BRIDGED, False)])
async def test_a_request_that_says_nothing_has_its_response_kept(
    server: RunningServer, sdk: AsyncOpenAI, provider: dict[str, Any], streamed: bool
) -> None:
    await server.change(**provider)

    async def ask(**fields: Any) -> Any:
        asked = {**ASK, "store": openai.omit, "stream": streamed, **fields}
        answer = await sdk.responses.create(**asked)
        return [event async for event in answer][-1].response if streamed else answer

    whole = await ask()
    further = await ask(previous_response_id=whole.id)
    unkept = await ask(store=False)

    for response in (whole, further):
        assert (await sdk.responses.retrieve(response.id)).output_text == response.output_text
    with pytest.raises(openai.NotFoundError):
        await sdk.responses.retrieve(unkept.id)
    await sdk.responses.delete(whole.id)
    with pytest.raises(openai.NotFoundError):
        await sdk.responses.retrieve(whole.id)


@pytest.mark.parametrize(
    ("body", "name"),
    [
        (b'{"id":"r1","status":"completed"}', "r1"),
        (b'{"id":"r1","status":"incomplete"}', "r1"),
        (b'{"id":"r1","status":"failed"}', "r1"),
        (b'{"id":"r1","status":"queued"}', None),  # in the background: it will change
        (b'{"id":"r1","status":"in_progress"}', None),
        (b'{"id":7,"status":"completed"}', None),
        (b'{"id":"","status":"completed"}', None),
        (b'{"status":"completed"}', None),
        (b"[1]", None),
        (b"nonsense", None),
    ],
)
def test_only_a_response_that_will_not_change_is_found_by_its_id(
    body: bytes, name: str | None
) -> None:
    assert at_once(final_response(body)) == name


async def test_a_running_response_is_shown_in_progress(
    server: RunningServer, sdk: AsyncOpenAI
) -> None:
    server.simulator.behaviour = SLOW
    seen = await cut(sdk, 3)

    answer = await sdk.responses.retrieve(seen[0].response.id)

    assert (answer.id, answer.status) == (seen[0].response.id, "in_progress")


def test_the_error_of_a_late_reader_leads_nobody_past_what_was_missed() -> None:
    remembered = ResponseEvents()
    for sequence in range(5):
        data = orjson.dumps({"type": "response.x", "sequence_number": sequence})
        remembered.note(eventstream.write(data), sequence + 2)

    (late,) = eventstream.parse(remembered.render(SlowClient("late"), 4))
    (last,) = eventstream.parse(remembered.render(SlowClient("late")))

    assert orjson.loads(late.data)["sequence_number"] == 2
    assert orjson.loads(last.data)["sequence_number"] == 5


async def read_into(events: list[Any], reader: AsyncIterator[Any]) -> None:
    async for event in reader:
        events.append(event)  # noqa: PERF401 - those before an error count


@pytest.mark.parametrize("provider", [{}, BRIDGED])
async def test_cancel_ends_it_for_all(
    server: RunningServer, sdk: AsyncOpenAI, provider: dict[str, Any]
) -> None:
    await server.change(**provider)
    server.simulator.behaviour = SLOW
    seen = await cut(sdk, 3)
    name = seen[0].response.id
    reader = await sdk.responses.retrieve(name, stream=True)

    cancelled = await sdk.responses.cancel(name)
    events: list[Any] = []
    with pytest.raises(openai.APIError, match="this answer was cancelled"):
        await read_into(events, reader)
    # Whoever has all but the end is told as well.
    last = events[-1].sequence_number
    rest = await sdk.responses.retrieve(name, stream=True, starting_after=last)
    with pytest.raises(openai.APIError, match="this answer was cancelled"):
        await read_into(events, rest)

    assert events[-1].sequence_number == last
    assert (cancelled.id, cancelled.status) == (name, "cancelled")
    assert (await sdk.responses.retrieve(name)).status == "cancelled"
    assert (await sdk.responses.cancel(name)).status == "cancelled"
    await server.nothing_held()
    await until(lambda: server.simulator.stats().aborted == 1)


@pytest.mark.parametrize("face", ["websocket", "chat/completions"])
async def test_an_answer_of_another_kind_is_no_response(
    make_server: MakeServer, face: str
) -> None:
    server = await make_server(SLOW if face == "websocket" else QUICK)
    async with contextlib.AsyncExitStack() as stack:
        if face == "websocket":
            ws = await stack.enter_async_context(server.connect())
            await ws.send_json(chat("mine"))
            await until_status(ws, "chunk")
        else:
            response = await stack.enter_async_context(
                server.session.post(
                    f"{server.v1}/chat/completions",
                    json={**CHAT, "stream": False},
                    headers={"Idempotency-Key": "mine"},
                )
            )
            await response.read()
        running = server.held()["running"]
        for method, path in (
            *(("GET", "mine"), ("GET", "mine?stream=true"), ("POST", "mine/cancel")),
            ("GET", "mine?stream=true&starting_after=1"),
        ):
            async with server.session.request(method, f"{server.v1}/responses/{path}") as answer:
                assert answer.status == 404, path
                assert (await answer.json())["error"]["code"] == "stream_not_found"

        # Nobody has cancelled it, and its own face still has it.
        assert server.held()["running"] == running
        async with server.session.delete(f"{server.sse}/mine") as gone:
            assert gone.status == 204
    await server.nothing_held()


@pytest.mark.parametrize(("provider", "store"), [({}, openai.omit), (BRIDGED, False)])
async def test_leaving_ends_a_response_whose_request_does_not_say_that_it_stays(
    server: RunningServer, sdk: AsyncOpenAI, provider: dict[str, Any], store: Any
) -> None:
    await server.change(**provider)
    server.simulator.behaviour = SLOW
    seen = await cut(sdk, 3, store=store)

    await server.nothing_held()
    with pytest.raises(openai.NotFoundError) as caught:
        await sdk.responses.retrieve(seen[0].response.id)
    assert caught.value.code == "stream_not_found"
    await until(lambda: server.simulator.stats().aborted == 1)


async def test_a_number_that_cannot_be(server: RunningServer, sdk: AsyncOpenAI) -> None:
    events = [event async for event in await sdk.responses.create(**ASK)]
    url = f"{server.v1}/responses/{events[-1].response.id}?stream=true&starting_after="
    for after, status, code in (
        ("7000", 409, "resume_gap"),
        ("x", 400, "invalid_request"),
        ("-2", 400, "invalid_request"),
    ):
        async with server.session.get(url + after) as answer:
            assert answer.status == status
            assert orjson.loads(await answer.read())["error"]["code"] == code


async def test_events_that_are_kept_no_longer_are_a_gap(make_server: MakeServer) -> None:
    server = await make_server(
        **{"chat.streams.max_stream_bytes": 65536, f"{CONCURRENCY}.max_connections": 1}
    )
    server.simulator.behaviour = Behaviour(ttft=0, interval=0, tokens=600)
    async with openai_of(server.v1) as sdk:
        events = [event async for event in await sdk.responses.create(**ASK)]
        name = events[-1].response.id
        # It is told so before it waits for a place.
        async with server.connect():
            with pytest.raises(openai.ConflictError) as caught:
                await sdk.responses.retrieve(name, stream=True, starting_after=0)
        near = await sdk.responses.retrieve(
            name, stream=True, starting_after=events[-4].sequence_number
        )
        rest = [event async for event in near]

    assert caught.value.code == "resume_gap"
    assert rest == events[-3:]


async def test_head_of_a_response_is_refused_without_a_body(
    server: RunningServer, sdk: AsyncOpenAI
) -> None:
    events = [event async for event in await sdk.responses.create(**ASK)]
    path = f"/v1/responses/{events[-1].response.id}?stream=true"

    async with Raw(server) as raw:
        await raw.send(
            f"HEAD {path} HTTP/1.1\r\nHost: x\r\n\r\n"
            "GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()
        )
        first = await raw.until(b"\r\n\r\n")
        second = await raw.to_the_end()

    assert first.startswith(b"HTTP/1.1 405 ")
    assert second.startswith(b"HTTP/1.1 200 ")
    assert second.endswith(b"}")


BREAKS = {
    "fault-cut-4": "provider_disconnected",
    "fault-end-4": "provider_disconnected",
    "fault-bad-chunk-4": "provider_bad_response",
    "fault-stall-4": "read_timeout",
}


@pytest.mark.parametrize(
    ("stored", "provider"), [(True, {}), (False, BRIDGED)], ids=["stored", "bridged"]
)
@pytest.mark.parametrize("model", BREAKS)
async def test_a_response_that_breaks_off_fails_in_its_own_form(
    make_server: MakeServer, model: str, stored: bool, provider: dict[str, Any]
) -> None:
    server = await make_server(**provider, **{"llm.providers.sim.http_client.read_timeout": 0.3})
    body = {"model": model, "input": "Hello", "stream": True, "store": stored}

    async with server.session.post(f"{server.v1}/responses", json=body) as response:
        raw = await response.read()

    events = [orjson.loads(event.data) for event in eventstream.parse(raw)]
    *_, previous, failed = events
    code = BREAKS[model]
    assert raw.count(b"event: response.failed\n") == 1
    assert b"[DONE]" not in raw
    assert failed["type"] == "response.failed"
    assert failed["sequence_number"] == previous["sequence_number"] + 1
    first = events[0]["response"]
    assert failed["response"]["id"] == first["id"]
    assert failed["response"]["status"] == "failed"
    assert failed["response"]["error"]["code"] == "server_error"
    assert failed["error"]["code"] == code
    assert failed["error"]["type"] == "provider_error"
    ResponseFailedEvent.model_validate(failed)
    if stored:
        async with server.session.get(f"{server.v1}/responses/{first['id']}") as response:
            assert (await response.json())["status"] == "failed"


async def test_an_error_object_within_a_response_is_its_failure(
    make_server: MakeServer,
) -> None:
    created = (
        b'data: {"type":"response.created","sequence_number":0,'
        b'"response":{"id":"resp_x","object":"response","status":"in_progress"}}\n\n'
    )
    text = b'data: {"type":"response.output_text.delta","sequence_number":1,"delta":"x"}\n\n'
    error = b'data: {"error":{"message":"the model has crashed","code":500}}\n\n'

    async def play(peer: Peer) -> None:
        await peer.request()
        await peer.send(EVENT_STREAM, chunk(created + text), chunk(error + DONE) + LAST_CHUNK)

    async with ScriptedProvider(play) as provider:
        server = await make_server(**{"llm.providers.sim.base_url": provider.url})
        async with server.session.post(f"{server.v1}/responses", json=ASK) as response:
            raw = await response.read()
        async with server.session.get(f"{server.v1}/responses/resp_x") as response:
            kept = await response.json()
        after = f"{server.v1}/responses/resp_x?stream=true&starting_after=0"
        async with server.session.get(after) as response:
            rest = await response.read()

    assert raw == created + rest
    _, event = eventstream.parse(rest)
    failed = orjson.loads(event.data)
    assert (failed["type"], failed["sequence_number"]) == ("response.failed", 2)
    assert failed["error"]["code"] == "provider_error"
    assert "the model has crashed" in failed["error"]["message"]
    assert kept == failed["response"]
    assert (kept["id"], kept["status"]) == ("resp_x", "failed")


def test_an_error_without_any_response_before_it_is_whole_all_the_same() -> None:
    errors = ResponseEvents()
    errors.note(b'data: {"type":"x","response":"no object","sequence_number":"7"}\n\n', 2)

    (event,) = eventstream.parse(errors.render(ProviderDisconnected("it is gone")))

    failed = orjson.loads(event.data)
    assert failed["sequence_number"] == 0
    assert failed["response"]["status"] == "failed"
    assert failed["error"]["message"] == "it is gone"


def test_a_text_that_looks_like_a_sequence_number_is_none() -> None:
    errors = ResponseEvents()
    errors.note(b'data: {"sequence_number":3,"delta":"\\"sequence_number\\":9,"}\n\n', 2)

    (event,) = eventstream.parse(errors.render(ProviderDisconnected("it is gone")))

    assert orjson.loads(event.data)["sequence_number"] == 4


async def test_a_response_is_found_whose_first_events_are_kept_no_longer(
    make_server: MakeServer,
) -> None:
    server = await make_server(**{"chat.streams.max_stream_bytes": 65536})
    server.simulator.behaviour = Behaviour(ttft=0, interval=0.0005, tokens=100_000)
    async with openai_of(server.v1) as sdk:
        seen = await cut(sdk, 400)
        answer = await sdk.responses.retrieve(seen[0].response.id)
        cancelled = await sdk.responses.cancel(seen[0].response.id)

    assert (answer.id, answer.status) == (seen[0].response.id, "in_progress")
    assert cancelled.status == "cancelled"
    await server.nothing_held()


@pytest.mark.parametrize("run", range(5))
def test_every_sequence_number_is_found_in_its_place(run: int) -> None:
    dice = random.Random(run)
    events = ResponseEvents()
    places: list[int | None] = []  # the sequence number of each event, from event 2 on
    sequence = 0
    for _ in range(200):
        block, first = b"", 2 + len(places)
        for _ in range(dice.randint(1, 3)):
            if dice.random() < 0.05:
                places.append(None)
                block += b'data: {"type":"odd","metadata":{}}\n\n'
                continue
            sequence += 1 if dice.random() < 0.95 else 3
            places.append(sequence)
            nested = b'"metadata":{"sequence_number":7},' if dice.random() < 0.1 else b""
            block += b'data: {%b"sequence_number":%d}\n\n' % (nested, sequence)
        events.note(block, first)
    last = 1 + len(places)

    for wanted in range(-1, sequence):
        later = [
            at for at, number in enumerate(places, 2) if number is not None and number > wanted
        ]
        assert events.event_before(wanted, last) == later[0] - 1
    assert events.event_before(sequence, last) == last
    assert events.event_before(sequence + 1, last) is None
