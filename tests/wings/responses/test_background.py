"""Responses in the background (`background: true`): asked for, left, polled, read on, cancelled."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import openai
import orjson
import pytest

from aioserver.protocol import eventstream
from aioserver.protocol.model_body import ModelBody
from aioserver.protocol.request_headers import NO_REQUEST_OPTIONS, RequestOptions
from aioserver.wings.responses.attempt import ResponsesCapabilities
from aioserver.wings.responses.background import options_of
from tests.support.keys import key_of, keys_of
from tests.support.ledgers import written
from tests.support.scripted_provider import Peer, ScriptedProvider
from tests.support.sdk import openai_of
from tests.support.server import (
    PACED,
    QUICK,
    SILENT,
    SIM_HTTP_CLIENT,
    SLOW,
    MakeServer,
    provider_entry,
)
from tests.support.simulator import Behaviour, Simulator
from tests.support.waiting import patience, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from openai import AsyncOpenAI
    from openai.types.responses import Response

    from tests.support.server import RunningServer

BRIDGED: dict[str, Any] = {"llm.providers.sim.responses": False}
PLACES = f"{SIM_HTTP_CLIENT}.concurrent_requests"
RUNNING = ("queued", "in_progress")


@pytest.fixture
async def bridged(make_server: MakeServer) -> RunningServer:
    """A server whose provider has chat completions only, and 4 places."""
    return await make_server(QUICK, **BRIDGED, **{PLACES: 4})


@pytest.fixture
async def sdk(bridged: RunningServer) -> AsyncIterator[AsyncOpenAI]:
    async with openai_of(bridged.v1) as client:
        yield client


async def ask(sdk: AsyncOpenAI, **changes: Any) -> Response:
    """A response in the background, as it is when its client hears of it."""
    response: Response = await sdk.responses.create(
        **{"model": "sim", "input": "Hello", "background": True, **changes}
    )
    return response


async def polled(sdk: AsyncOpenAI, name: str, *statuses: str) -> Response:
    """The response *name* once it has one of *statuses*, by default once it has ended."""
    async with asyncio.timeout(patience(30)):
        while True:
            response = await sdk.responses.retrieve(name)
            if response.status in statuses or not (statuses or response.status in RUNNING):
                return response
            await asyncio.sleep(0.02)


async def ended(sdk: AsyncOpenAI, *responses: Response) -> None:
    for response in responses:
        await sdk.responses.cancel(response.id)


async def test_a_response_is_there_at_once_and_polled_to_its_end(
    bridged: RunningServer, sdk: AsyncOpenAI
) -> None:
    whole = await sdk.responses.create(model="sim", input="Hello")
    bridged.simulator.behaviour = PACED

    asked = await ask(sdk, metadata={"a": "b"}, instructions="Be brief.")
    waiting = await sdk.responses.retrieve(asked.id)
    final = await polled(sdk, asked.id)

    assert (asked.status in RUNNING, asked.background, asked.output) == (True, True, [])
    assert (asked.metadata, asked.instructions) == ({"a": "b"}, "Be brief.")
    assert (waiting.id, waiting.status) == (asked.id, "in_progress")
    assert (final.status, final.background) == ("completed", True)
    assert final.output_text
    assert final.output_text[:5] == whole.output_text[:5]
    # The chunks are streamed, though nobody reads them.
    assert bridged.simulator.bodies[-1]["stream"] is True
    assert (await sdk.responses.retrieve(asked.id)).model_dump() == final.model_dump()


@pytest.mark.parametrize("streamed", [False, True])
async def test_the_simulator_in_the_process_runs_in_the_background_too(
    make_server: MakeServer, *, streamed: bool
) -> None:
    demo = {**provider_entry(""), "simulated": True}
    server = await make_server(**{"llm.providers.demo": demo, "llm.active": "demo"})
    async with openai_of(server.v1) as sdk:
        if streamed:
            stream: Any = await ask(sdk, model="demo", stream=True, max_output_tokens=2)
            async with stream as events:
                asked = (await anext(aiter(events))).response
        else:
            asked = await ask(sdk, model="demo", max_output_tokens=2)
        assert (asked.status in RUNNING, asked.background, asked.output) == (True, True, [])
        final = await polled(sdk, asked.id)
        assert (final.status, final.background) == ("incomplete", True)


async def test_a_response_runs_to_its_end_without_a_reader(make_server: MakeServer) -> None:
    server = await make_server(
        PACED, **BRIDGED, **{"chat.streams.resume_window": 0.05, "chat.streams.max_detached": 1}
    )
    async with openai_of(server.v1) as sdk:
        asked = await ask(sdk)
        await server.simulator.until(lambda stats: stats.requests == 1)
        # One that waits for a place costs it nothing either.
        await until(lambda: not server.held()["running"])

        assert (await polled(sdk, asked.id)).status == "completed"
    assert server.simulator.stats().aborted == 0


async def test_half_of_the_places_are_for_the_background(
    bridged: RunningServer, sdk: AsyncOpenAI
) -> None:
    bridged.simulator.behaviour = SLOW
    first, second = [await ask(sdk) for _ in range(2)]
    await bridged.simulator.until(lambda stats: stats.active == 2)

    third = await ask(sdk)
    assert (await sdk.responses.retrieve(third.id)).status == "queued"
    assert bridged.provider.stats().background == (2, 1)
    bridged.simulator.behaviour = QUICK
    # There are places for anybody else, and nothing is ended for them.
    other = await sdk.responses.create(model="sim", input="Hello")
    assert other.status == "completed"
    assert (await sdk.responses.retrieve(third.id)).status == "queued"
    await sdk.responses.cancel(first.id)
    final = await polled(sdk, third.id)

    assert final.status == "completed"
    assert (await polled(sdk, second.id, "in_progress")).id == second.id
    await ended(sdk, second)


async def test_one_place_is_for_the_background_and_is_not_taken_away(
    make_server: MakeServer,
) -> None:
    server = await make_server(PACED, **BRIDGED, **{PLACES: 1})
    async with openai_of(server.v1) as sdk:
        asked = await ask(sdk)
        await server.simulator.until(lambda stats: stats.active == 1)
        other = await sdk.responses.create(model="sim", input="Hello")

        assert other.status == "completed"
        assert (await polled(sdk, asked.id)).status == "completed"


@pytest.mark.parametrize("status", ["queued", "in_progress"])
async def test_a_response_is_cancelled(
    bridged: RunningServer, sdk: AsyncOpenAI, status: str
) -> None:
    bridged.simulator.behaviour = SILENT
    responses = [await ask(sdk) for _ in range(3 if status == "queued" else 1)]
    await polled(sdk, responses[-1].id, status)

    cancelled = await sdk.responses.cancel(responses[-1].id)

    assert cancelled.status == "cancelled"
    assert (await polled(sdk, cancelled.id)).status == "cancelled"
    assert (await sdk.responses.cancel(cancelled.id)).status == "cancelled"
    await ended(sdk, *responses)
    await bridged.nothing_held()


async def test_a_response_is_deleted_while_it_runs(
    bridged: RunningServer, sdk: AsyncOpenAI
) -> None:
    bridged.simulator.behaviour = SLOW
    asked = await ask(sdk)
    await bridged.simulator.until(lambda stats: stats.active == 1)

    await sdk.responses.delete(asked.id)

    with pytest.raises(openai.NotFoundError):
        await sdk.responses.retrieve(asked.id)
    await bridged.simulator.until(lambda stats: stats.aborted == 1)
    await bridged.nothing_held()


async def test_its_events_are_read_from_the_start_and_read_on(
    bridged: RunningServer, sdk: AsyncOpenAI
) -> None:
    bridged.simulator.behaviour = PACED
    stream: Any = await ask(sdk, stream=True)
    seen = [await anext(aiter(stream)) for _ in range(6)]
    await stream.close()

    again = await sdk.responses.retrieve(
        seen[0].response.id, stream=True, starting_after=seen[-1].sequence_number
    )
    events = [*seen, *[event async for event in again]]

    assert [event.type for event in seen[:3]] == [
        "response.created",
        "response.queued",
        "response.in_progress",
    ]
    assert [event.response.status for event in seen[:3]] == ["queued", "queued", "in_progress"]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[-1].type == "response.completed"
    assert events[-1].response.background
    text = "".join(part.delta for part in events if part.type == "response.output_text.delta")
    assert text == events[-1].response.output_text


async def test_the_events_of_one_that_failed_are_there(
    bridged: RunningServer, sdk: AsyncOpenAI
) -> None:
    bridged.simulator.behaviour = Behaviour(ttft=0, fail_rate=1.0)
    asked = await ask(sdk)
    await polled(sdk, asked.id)

    # The SDK raises the last one.
    url = f"{bridged.v1}/responses/{asked.id}?stream=true"
    async with bridged.session.get(url) as response:
        parts = eventstream.parse(await response.read())
    events = [orjson.loads(part.data) for part in parts]

    types = ["response.created", "response.queued", "response.in_progress", "response.failed"]
    assert [event["type"] for event in events] == types
    assert [event["sequence_number"] for event in events] == [0, 1, 2, 3]
    assert events[-1]["response"]["error"]["code"] == "server_error"


async def test_a_response_in_the_background_is_continued(
    bridged: RunningServer, sdk: AsyncOpenAI
) -> None:
    first = await ask(sdk)
    await polled(sdk, first.id)

    second = await ask(sdk, input="And then?", previous_response_id=first.id)

    assert second.previous_response_id == first.id
    assert (await polled(sdk, second.id)).status == "completed"
    roles = [message["role"] for message in bridged.simulator.bodies[-1]["messages"]]
    assert roles == ["user", "assistant", "user"]


async def test_one_that_shall_not_be_stored_is_refused(
    bridged: RunningServer, sdk: AsyncOpenAI
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        await ask(sdk, store=False)

    assert refused.value.param == "store"
    assert not bridged.simulator.requests


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"completion_window": "24h"}, "background_options.completion_window"),
        ({"completion_window": ""}, "background_options.completion_window"),
        ({"completion_window": 7200}, "background_options.completion_window"),
        ({"completion_window": ["2h"]}, "background_options.completion_window"),
        (["2h"], "background_options"),
        ("2h", "background_options"),
    ],
    ids=str,
)
async def test_a_window_that_is_none_is_refused_by_its_name(
    bridged: RunningServer, sdk: AsyncOpenAI, options: object, param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        await ask(sdk, background_options=options)

    assert refused.value.param == param
    assert not bridged.simulator.requests


@pytest.mark.parametrize("background", [False, None])
async def test_a_window_needs_the_background(
    bridged: RunningServer, sdk: AsyncOpenAI, *, background: bool | None
) -> None:
    with pytest.raises(openai.BadRequestError, match="needs background: true") as refused:
        await ask(sdk, background=background, background_options={"completion_window": "2h"})
    soon = await ask(
        sdk, background=background, background_options={"completion_window": "soonest"}
    )

    assert refused.value.param == "background_options.completion_window"
    assert soon.status == "completed"
    assert len(bridged.simulator.bodies) == 1


def test_a_window_is_a_class_and_a_deadline() -> None:
    def options(window: object) -> RequestOptions:
        asked = {"background": True, "background_options": {"completion_window": window}}
        return options_of(ModelBody(orjson.dumps(asked)))

    assert options("2h") == RequestOptions(deadline=7200.0, batch=True, patient=True)
    assert options("8h") == RequestOptions(deadline=28_800.0, batch=True, patient=True)
    assert options("soonest") is options(None) is NO_REQUEST_OPTIONS
    # A header may still shorten it.
    header = RequestOptions(deadline=60.0)
    assert header.joined(options("8h")) == RequestOptions(deadline=60.0, batch=True, patient=True)


async def test_a_window_waits_longer_than_the_queue_and_is_batch(
    make_server: MakeServer, tmp_path: Path
) -> None:
    queue = {f"{SIM_HTTP_CLIENT}.queue_timeout": 0.05, "usage.path": str(tmp_path / "usage")}
    server = await make_server(SILENT, **BRIDGED, **queue, **{PLACES: 1})
    window: Any = {"completion_window": "2h", "continuation_id": "c"}
    async with openai_of(server.v1) as sdk:
        running = await ask(sdk)
        patient = await ask(sdk, background_options=window)
        late = await ask(
            sdk, background_options=window, extra_headers={"x-aioserver-start-within": "1"}
        )
        plain = await ask(sdk)
        failed = await polled(sdk, plain.id)
        refused = await polled(sdk, late.id)
        waiting = await sdk.responses.retrieve(patient.id)
        server.simulator.behaviour = QUICK
        await ended(sdk, running)
        final = await polled(sdk, patient.id)

    assert (failed.status, refused.status) == ("failed", "failed")
    assert "no place for an answer in the background" in str(failed.error)
    assert "could not start within 1 s" in str(refused.error)
    assert (waiting.status, final.status) == ("queued", "completed")
    classes = [(line["class"], line["outcome"]) for line in written(server)]
    assert sorted(classes) == [("batch", "ok"), ("interactive", "cancelled")]


async def test_what_cannot_be_asked_is_refused_at_once(
    bridged: RunningServer, sdk: AsyncOpenAI
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        await ask(sdk, input=[{"type": "item_reference", "id": "x"}])

    assert refused.value.param == "input[0].type"


async def test_there_are_half_as_many_as_answers_without_a_reader(
    make_server: MakeServer,
) -> None:
    server = await make_server(SILENT, **BRIDGED, **{"chat.streams.max_detached": 4})
    async with openai_of(server.v1) as sdk:
        asked = [await ask(sdk) for _ in range(2)]
        with pytest.raises(openai.InternalServerError) as refused:
            await ask(sdk)

        assert refused.value.status_code == 503
        assert refused.value.code == "server_at_capacity"
        assert int(refused.value.response.headers["Retry-After"]) >= 1
        await ended(sdk, asked[0])
        await server.simulator.until(lambda stats: stats.aborted == 1)
        asked.append(await ask(sdk))
        await ended(sdk, *asked)


async def test_one_key_leaves_some_of_them_to_another(make_server: MakeServer) -> None:
    server = await make_server(
        SILENT, **BRIDGED, **keys_of("alice", "bob"), **{"chat.streams.max_detached": 12}
    )
    async with (
        openai_of(server.v1, key_of("alice")) as alice,
        openai_of(server.v1, key_of("bob")) as bob,
    ):
        many = [await ask(alice) for _ in range(4)]
        with pytest.raises(openai.InternalServerError) as refused:
            await ask(alice)
        assert refused.value.code == "server_at_capacity"
        few = [await ask(bob) for _ in range(2)]
        with pytest.raises(openai.InternalServerError, match="2 of them yours"):
            await ask(bob)

        await ended(bob, *few)
        many.append(await ask(bob))
        await ended(alice, *many[:4])
        await ended(bob, many[4])
        await until(lambda: not server.context.gateway.lifetime.background)
        many = [await ask(alice) for _ in range(4)]
        await ended(alice, *many)


async def test_a_queue_that_is_full_refuses_at_once(make_server: MakeServer) -> None:
    queue = {f"{SIM_HTTP_CLIENT}.queue_size": 2}
    server = await make_server(SILENT, **BRIDGED, **queue, **{PLACES: 2})
    async with openai_of(server.v1) as sdk:
        asked = [await ask(sdk) for _ in range(2)]
        with pytest.raises(openai.InternalServerError) as refused:
            await ask(sdk)

        assert refused.value.code == "provider_queue_full"
        await ended(sdk, *asked)


async def test_another_key_does_not_see_it_and_it_counts_for_its_own(
    make_server: MakeServer,
) -> None:
    server = await make_server(SLOW, **BRIDGED, **keys_of("alice", "bob", max_concurrent=1))
    async with (
        openai_of(server.v1, key_of("alice")) as alice,
        openai_of(server.v1, key_of("bob")) as bob,
    ):
        asked = await ask(alice)
        for call in (bob.responses.retrieve, bob.responses.cancel, bob.responses.delete):
            with pytest.raises(openai.NotFoundError):
                await call(asked.id)
        with pytest.raises(openai.RateLimitError) as refused:
            await ask(alice)

        assert refused.value.code == "concurrency_exceeded"
        assert (await alice.responses.retrieve(asked.id)).status in RUNNING
        await ended(alice, asked)


async def test_a_provider_that_turns_out_to_have_no_responses(make_server: MakeServer) -> None:
    # Nothing is known of it before the first request.
    server = await make_server(Behaviour(ttft=0, interval=0, responses=False))
    async with openai_of(server.v1) as sdk:
        for _ in range(2):
            asked = await ask(sdk)
            assert asked.background
            assert (await polled(sdk, asked.id)).status == "completed"
    assert server.provider.capabilities(ResponsesCapabilities).lacking


async def test_a_native_provider_runs_it_by_itself(make_server: MakeServer) -> None:
    body = {"id": "resp_theirs", "object": "response", "status": "queued", "output": []}
    asked: list[dict[str, Any]] = []
    more: dict[str, Any] = {
        "input": "Hello",
        "background": True,
        "prompt_cache_key": "k",
        "background_options": {"completion_window": "8h"},
    }

    async def answer(peer: Peer) -> None:
        request = await peer.request()
        asked.append(orjson.loads(request.partition(b"\r\n\r\n")[2]))
        data = orjson.dumps(body)
        await peer.send(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
            % (len(data), data)
        )

    async with ScriptedProvider(answer) as provider:
        server = await make_server(
            **{
                "llm.active": "native",
                "llm.providers.native": provider_entry(provider.url, concurrent_requests=1),
            }
        )
        async with openai_of(server.v1) as sdk:
            responses = [await sdk.responses.create(model="native", **more) for _ in range(3)]
    assert [response.id for response in responses] == ["resp_theirs"] * 3
    assert asked == [{"model": "other-model", **more}] * 3


async def test_a_fallback_answers_under_the_same_id(make_server: MakeServer) -> None:
    async with Simulator(PACED) as other:
        server = await make_server(
            Behaviour(ttft=0, fail_rate=1.0),
            **BRIDGED,
            **{"llm.fallbacks": ["other"], "llm.providers.other": provider_entry(other.base_url)},
        )
        async with openai_of(server.v1) as sdk:
            asked = await sdk.responses.create(model="sim-model", input="Hello", background=True)
            final = await polled(sdk, asked.id)

    assert (final.status, final.id) == ("completed", asked.id)
    assert final.output_text


async def test_members_of_a_group_have_half_of_their_places_each(make_server: MakeServer) -> None:
    async with Simulator(SLOW) as other:
        entry = {**provider_entry(other.base_url, concurrent_requests=2), "responses": False}
        members = {"llm.models": {"both": ["sim", "other"]}}
        server = await make_server(
            SLOW, **BRIDGED, **members, **{PLACES: 2, "llm.providers.other": entry}
        )
        async with openai_of(server.v1) as sdk:
            asked = [await ask(sdk, model="both") for _ in range(3)]
            await until(lambda: other.stats().active == server.simulator.stats().active == 1)
            third = await sdk.responses.retrieve(asked[2].id)
            assert third.status == "queued"
            await sdk.responses.cancel(asked[1].id)
            await polled(sdk, asked[2].id, "in_progress")
            assert (await sdk.responses.retrieve(asked[0].id)).status == "in_progress"

            await ended(sdk, *asked)


async def test_a_reload_changes_how_many_may_run(bridged: RunningServer, sdk: AsyncOpenAI) -> None:
    bridged.simulator.behaviour = SLOW
    asked = [await ask(sdk) for _ in range(3)]
    await bridged.simulator.until(lambda stats: stats.active == 2)

    assert await bridged.change(**BRIDGED, **{PLACES: 6})

    await bridged.simulator.until(lambda stats: stats.active == 3)
    await ended(sdk, *asked)


async def test_a_key_of_a_request_leads_to_the_same_response(
    bridged: RunningServer, sdk: AsyncOpenAI
) -> None:
    bridged.simulator.behaviour = PACED
    headers = {"Idempotency-Key": "k1"}

    first, second = [await ask(sdk, extra_headers=headers) for _ in range(2)]

    assert first.id == second.id
    assert (await polled(sdk, first.id)).status == "completed"
    assert bridged.simulator.stats().requests == 1


async def test_what_drains_has_its_time_and_then_says_why_it_ends(
    bridged: RunningServer, sdk: AsyncOpenAI
) -> None:
    bridged.simulator.behaviour = SLOW
    asked = await ask(sdk)
    await bridged.simulator.until(lambda stats: stats.active == 1)

    bridged.context.gateway.drain()
    assert (await sdk.responses.retrieve(asked.id)).status == "in_progress"
    await bridged.context.gateway.close()
    final = await sdk.responses.retrieve(asked.id)

    assert final.status == "failed"
    assert final.error is not None
    assert "stopping" in final.error.message


@pytest.mark.parametrize("streamed", [True, False])
async def test_one_that_waits_for_its_own_key_has_its_id(
    make_server: MakeServer, streamed: bool
) -> None:
    keys = keys_of("alice", max_concurrent=1, queue_size=4)
    server = await make_server(SLOW, **BRIDGED, **keys)
    async with openai_of(server.v1, key_of("alice")) as alice:
        first = await ask(alice)
        second: Any = await ask(alice, stream=streamed)
        if streamed:
            events = aiter(second)
            response = (await anext(events)).response
            await second.close()
        else:
            response = second

        assert response.status == "queued"
        await server.simulator.until(lambda stats: stats.requests == 1)
        await ended(alice, first)
        await polled(alice, response.id, "in_progress")
        await ended(alice, response)
