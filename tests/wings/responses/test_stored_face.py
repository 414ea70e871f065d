"""Responses that are stored: continued by their ids at any provider, read, listed and deleted by
the official SDK.
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import openai
import pytest

from aioserver.wings.responses.attempt import ResponsesCapabilities
from tests.support.keys import bearer, key_of, keys_of
from tests.support.passing import ANSWER, Account, answer, settings_for
from tests.support.sdk import openai_of
from tests.support.server import CONCURRENCY, ENDLESS, QUICK, provider_entry
from tests.support.simulator import Behaviour
from tests.support.stored_responses import stored_in
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from openai import AsyncOpenAI

    from tests.support.server import MakeServer, RunningServer

# How engines refuse a request that continues a response: test_continuation.py has more of them.
REFUSALS = [
    (404, "Response with id 'resp_1' not found."),
    (400, "previous_response_id is not supported"),
    (501, "previous_response_id: not implemented"),
]
FORGETFUL = Behaviour(ttft=0, interval=0, forgets=REFUSALS[0])


async def ask(sdk: Any, text: Any, *, streamed: bool = False, **fields: Any) -> Any:
    """The response to *text*, once it is complete."""
    fields = {"model": "sim", "input": text, "store": True, **fields}
    if not streamed:
        return await sdk.responses.create(**fields)
    events = [event async for event in await sdk.responses.create(stream=True, **fields)]
    assert events[-1].type == "response.completed"
    return events[-1].response


def inputs(server: RunningServer) -> list[Any]:
    """What the simulated provider was asked: the texts of the input, or the id that stands for
    those before.
    """
    asked = []
    for body in server.simulator.bodies:
        items = body["input"]
        texts = [items] if isinstance(items, str) else [_text(item) for item in items]
        previous = body.get("previous_response_id")
        asked.append((["…"] if previous else []) + texts)
    return asked


def _text(item: dict[str, Any]) -> str:
    content = item["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


async def to_end(events: AsyncIterator[Any]) -> None:
    async for _ in events:
        pass


def stored(server: RunningServer) -> int:
    return len(stored_in(server.owners))


@pytest.mark.parametrize("streamed", [True, False])
async def test_a_provider_that_keeps_a_response_gets_its_id(
    server: RunningServer, sdk: AsyncOpenAI, streamed: bool
) -> None:
    first = await ask(sdk, "one", streamed=streamed)

    await ask(sdk, "two", streamed=streamed, previous_response_id=first.id)

    assert inputs(server) == [["one"], ["…", "two"]]
    assert stored(server) == 2


@pytest.mark.parametrize(("refusal", "streamed"), [(REFUSALS[0], True), (REFUSALS[2], False)])
async def test_a_provider_that_keeps_nothing_gets_the_conversation(
    server: RunningServer, sdk: AsyncOpenAI, streamed: bool, refusal: tuple[int, str]
) -> None:
    server.simulator.behaviour = Behaviour(ttft=0, interval=0, forgets=refusal)
    first = await ask(sdk, "one", streamed=streamed)

    second = await ask(sdk, "two", streamed=streamed, previous_response_id=first.id)
    await ask(sdk, "three", streamed=streamed, previous_response_id=second.id)

    whole = ["one", first.output_text, "two", second.output_text, "three"]
    # Only once is it asked by an id.
    assert inputs(server) == [["one"], ["…", "two"], whole[:3], whole]
    assert "previous_response_id" not in server.simulator.bodies[-1]
    assert not await server.counted("retries")


async def test_a_provider_that_keeps_nothing_is_asked_again_after_a_reload(
    server: RunningServer, sdk: AsyncOpenAI
) -> None:
    server.simulator.behaviour = FORGETFUL
    first = await ask(sdk, "one")
    await ask(sdk, "two", previous_response_id=first.id)
    server.simulator.behaviour = QUICK

    await server.change()
    await ask(sdk, "three", previous_response_id=first.id)

    assert inputs(server)[-1] == ["…", "three"]


async def test_where_nothing_is_kept_a_request_that_says_nothing_is_stored(
    server: RunningServer, sdk: AsyncOpenAI
) -> None:
    server.simulator.behaviour = Behaviour(ttft=0, interval=0, forgets=REFUSALS[1])
    with pytest.raises(openai.BadRequestError):
        await ask(sdk, "x", previous_response_id="resp_9")

    first = await ask(sdk, "one", store=openai.omit)
    other = await ask(sdk, "one", store=False)
    await ask(sdk, "two", previous_response_id=first.id)

    assert inputs(server)[-1] == ["one", first.output_text, "two"]
    with pytest.raises(openai.NotFoundError):
        await sdk.responses.retrieve(other.id)


@pytest.mark.parametrize("streamed", [True, False])
async def test_a_conversation_whose_beginning_its_provider_alone_knows_is_never_told_in_part(
    server: RunningServer, sdk: AsyncOpenAI, streamed: bool
) -> None:
    second = await ask(sdk, "two", streamed=streamed, previous_response_id="resp_of_yesterday")
    third = await ask(sdk, "three", streamed=streamed, previous_response_id=second.id)

    assert inputs(server) == [["…", "two"], ["…", "three"]]
    # Neither its items nor those before are a list that could be taken for all of them.
    for response in (second, third):
        with pytest.raises(openai.NotFoundError):
            await sdk.responses.input_items.list(response.id)
        assert (await sdk.responses.retrieve(response.id)).id == response.id
    server.simulator.behaviour = FORGETFUL
    for _ in range(2):
        # Once the provider refuses the id; then it is known to keep nothing.
        with pytest.raises(openai.BadRequestError, match="not found") as caught:
            await ask(sdk, "four", streamed=streamed, previous_response_id=third.id)
        assert caught.value.code == "previous_response_not_found"
    assert len(inputs(server)) == 3


async def test_an_id_that_nobody_holds_goes_to_the_provider(
    server: RunningServer, sdk: AsyncOpenAI
) -> None:
    await ask(sdk, "two", previous_response_id="resp_of_yesterday")

    assert server.simulator.bodies[-1]["previous_response_id"] == "resp_of_yesterday"
    server.simulator.behaviour = FORGETFUL
    with pytest.raises(openai.NotFoundError, match="not found"):
        await ask(sdk, "two", previous_response_id="resp_of_yesterday")
    # That it has forgotten one of yesterday says nothing of those of today.
    assert server.context.router.active.capabilities(ResponsesCapabilities).keeps


async def test_another_provider_gets_the_conversation(
    server: RunningServer, sdk: AsyncOpenAI
) -> None:
    await server.change(**{"llm.providers.other": provider_entry(server.simulator.base_url)})
    first = await ask(sdk, "one")

    second = await ask(sdk, "two", model="other/m", previous_response_id=first.id)
    await ask(sdk, "three", model="other/m", previous_response_id=second.id)

    assert inputs(server)[1:] == [["one", first.output_text, "two"], ["…", "three"]]


async def test_a_conversation_that_is_too_long_for_a_body_is_refused(
    make_server: MakeServer,
) -> None:
    server = await make_server(FORGETFUL, **{"chat.websocket.max_message_size": 20_000})
    async with openai_of(server.v1) as sdk:
        first = await ask(sdk, "x" * 15_000)

        with pytest.raises(openai.APIStatusError, match="more than 20000 bytes") as caught:
            await ask(sdk, "y" * 15_000, previous_response_id=first.id)

    assert caught.value.status_code == 413
    assert server.held()["running"] == 0


async def test_a_stored_response_is_read_when_its_log_has_gone(make_server: MakeServer) -> None:
    server = await make_server(QUICK, **{"chat.streams.resume_window": 0.01})
    async with openai_of(server.v1) as sdk:
        first = await ask(sdk, "one", streamed=True)
        await until(lambda: not server.owners.streams.finished())

        retrieved = await sdk.responses.retrieve(first.id)

        assert retrieved.model_dump() == first.model_dump()
        with pytest.raises(openai.ConflictError, match="no longer kept"):
            await sdk.responses.retrieve(first.id, stream=True, starting_after=3)


async def test_a_response_whose_provider_names_it_in_braces_is_read_and_deleted(
    make_server: MakeServer,
) -> None:
    name = "{6F9619FF-8B86}"
    response = {"id": name, "object": "response", "status": "completed", "output": []}
    async with Account(lambda _passed: answer(json.dumps(response).encode())) as account:
        server = await make_server(**settings_for(account))
        async with server.session.post(
            f"{server.v1}/responses", json={"model": "sim", "input": "Hello", "store": True}
        ) as created:
            assert created.status == 200
        url = f"{server.v1}/responses/{name}"
        for path in ("", "/input_items"):
            async with server.session.get(url + path) as read:
                assert read.status == 200, await read.text()
        async with server.session.post(url + "/cancel") as cancelled:
            assert (await cancelled.json())["id"] == name
        async with server.session.delete(url) as deleted:
            assert await deleted.json() == {"id": name, "object": "response", "deleted": True}

    assert len(account.passed) == 1


@pytest.mark.parametrize("streamed", [True, False])
async def test_a_stored_response_is_read_though_its_log_goes_while_a_place_is_awaited(
    make_server: MakeServer, streamed: bool
) -> None:
    server = await make_server(
        QUICK,
        **{"chat.streams.resume_window": 60.0, f"{CONCURRENCY}.max_connections": 1},
    )
    streams, gate = server.owners.streams, server.owners.context.admission.gate
    async with openai_of(server.v1) as sdk:
        first = await ask(sdk, "one", streamed=streamed)
        async with server.connect():
            retrieving = asyncio.ensure_future(sdk.responses.retrieve(first.id))
            await until(lambda: gate.waiting == 1)
            for log in streams.finished():
                streams.drop(log)

        assert (await retrieving).model_dump() == first.model_dump()


async def test_a_deleted_response_is_gone_with_its_log(
    server: RunningServer, sdk: AsyncOpenAI
) -> None:
    first = await ask(sdk, "one", streamed=True)
    second = await ask(sdk, "two", previous_response_id=first.id)

    answer = await sdk.delete(f"/responses/{first.id}", cast_to=object)

    assert answer == {"id": first.id, "object": "response", "deleted": True}
    for gone in (sdk.responses.retrieve, sdk.responses.delete, sdk.responses.input_items.list):
        with pytest.raises(openai.NotFoundError):
            await gone(first.id)
    assert len(server.owners.streams.finished()) == 1
    # What went on from it goes on.
    assert await shown(sdk, second.id) == ["one", first.output_text, "two"]


async def test_a_response_that_runs_is_cancelled_by_its_deletion(
    server: RunningServer, sdk: AsyncOpenAI
) -> None:
    server.simulator.behaviour = ENDLESS
    stream = await sdk.responses.create(model="sim", input="Hello", stream=True, store=True)
    events: Any = aiter(stream)
    created = await anext(events)

    await sdk.responses.delete(created.response.id)

    with pytest.raises(openai.APIError, match="cancelled"):
        await to_end(events)
    await stream.close()
    await until(lambda: server.owners.streams.stats().bytes == 0)
    assert stored(server) == 0


async def test_a_full_server_deletes(make_server: MakeServer) -> None:
    server = await make_server(
        QUICK, **{f"{CONCURRENCY}.max_connections": 1, f"{CONCURRENCY}.queue_timeout": 0}
    )
    async with openai_of(server.v1) as sdk:
        first = await ask(sdk, "one")
        async with server.connect():
            with pytest.raises(openai.InternalServerError):
                await sdk.responses.input_items.list(first.id)

            await sdk.responses.delete(first.id)
    assert stored(server) == 0


async def shown(sdk: AsyncOpenAI, response_id: str) -> list[str]:
    listed: Any = await sdk.responses.input_items.list(response_id, order="asc", limit=100)
    return [item.content[0].text for item in listed.data]


async def test_input_items_are_listed_in_pages(server: RunningServer, sdk: AsyncOpenAI) -> None:
    answers = [await ask(sdk, "q0")]
    for number in range(1, 5):
        questions = [{"role": "user", "content": f"q{number}{part}"} for part in "ab"]
        previous = answers[-1].id
        answers.append(await ask(sdk, questions, streamed=True, previous_response_id=previous))
    last = answers[-1].id
    listed = await sdk.responses.input_items.list(last, order="asc", limit=100)
    assert not listed.has_more
    whole = listed.data

    forwards = [item async for item in sdk.responses.input_items.list(last, order="asc", limit=1)]
    backwards = [item async for item in sdk.responses.input_items.list(last, limit=4)]

    texts = await shown(sdk, last)
    assert texts[:3] == ["q0", answers[0].output_text, "q1a"]
    assert texts[-1] == "q4b"
    assert forwards == whole
    assert backwards == whole[::-1]
    assert len({item.id for item in whole}) == len(whole) == 1 + 4 * 3
    assert whole[1].id == answers[0].output[0].id
    raw = await sdk.get(f"/responses/{last}/input_items?limit=1&order=asc", cast_to=object)
    assert isinstance(raw, dict)
    assert raw["data"][0]["content"] == [{"type": "input_text", "text": "q0"}]
    assert raw["first_id"] == raw["last_id"] == whole[0].id
    assert (raw["object"], raw["has_more"]) == ("list", True)


async def test_a_page_that_is_none_is_refused(server: RunningServer, sdk: AsyncOpenAI) -> None:
    for query, param in [
        ("limit=0", "limit"),
        ("limit=101", "limit"),
        ("limit=x", "limit"),
        ("order=up", "order"),
        ("after=nothing", "after"),
    ]:
        first = await ask(sdk, "one")
        with pytest.raises(openai.BadRequestError) as caught:
            await sdk.get(f"/responses/{first.id}/input_items?{query}", cast_to=object)
        assert caught.value.param == param, query


async def test_a_stored_response_is_its_callers_alone(make_server: MakeServer) -> None:
    server = await make_server(FORGETFUL, **keys_of("web", "other"))

    def sdk_of(name: str) -> AsyncOpenAI:
        return openai_of(server.v1, key_of(name))

    async with sdk_of("web") as sdk, sdk_of("other") as other:
        first = await ask(sdk, "one")

        for call in (
            other.responses.retrieve(first.id),
            other.responses.delete(first.id),
            other.responses.input_items.list(first.id),
            ask(other, "two", previous_response_id=first.id),
        ):
            with pytest.raises(openai.NotFoundError):
                await call
        second = await ask(sdk, "two", previous_response_id=first.id)
        assert await shown(sdk, second.id) == ["one", first.output_text, "two"]


async def test_what_is_not_kept_here_is_asked_of_an_open_account(make_server: MakeServer) -> None:
    async with Account() as account:
        server = await make_server(**settings_for(account), **keys_of("root", "web"))

        async def send(name: str, method: str, path: str) -> tuple[int, bytes]:
            url = f"{server.v1}/responses/{path}"
            async with server.session.request(method, url, headers=bearer(name)) as response:
                return response.status, await response.read()

        for method, path in (
            ("GET", "resp_1"),
            ("DELETE", "resp_1"),
            ("GET", "resp_1/input_items?limit=1"),
            ("POST", "resp_1/cancel"),
        ):
            assert await send("root", method, path) == (200, ANSWER)
            passed = account.passed.pop()
            assert (passed.method, passed.target) == (method, f"/v1/responses/{path}")
            status, content = await send("web", method, path)
            assert (status, json.loads(content)["error"]["code"]) == (404, "stream_not_found")
        assert not account.passed
        for method, path in (
            ("GET", "resp_1/cancel"),
            ("POST", "resp_1"),
            ("POST", "compact/cancel"),
        ):
            assert (await send("root", method, path))[0] in {404, 405}
        assert not account.passed


async def test_a_stored_response_that_is_cancelled_stays_as_it_is(make_server: MakeServer) -> None:
    async with Account() as account:
        entry = {**provider_entry(account.url), "account_paths": True}
        server = await make_server(**{"llm.providers.open": entry}, **keys_of("root"))
        request = {"model": "sim", "input": "q", "store": True}
        headers = {**bearer("root"), "x-aioserver-provider": "open"}
        async with server.session.post(
            f"{server.v1}/responses", json=request, headers=headers
        ) as response:
            response_id = (await response.json())["id"]
        for stream in server.owners.streams.finished():
            server.owners.streams.drop(stream)

        url = f"{server.v1}/responses/{response_id}"
        async with server.session.post(f"{url}/cancel", headers=headers) as response:
            assert response.status == 200
            cancelled = await response.json()
        async with server.session.get(url, headers=headers) as response:
            assert cancelled == await response.json()

        assert cancelled["status"] == "completed"
        assert not account.passed


async def test_a_lower_window_holds_after_a_reload_and_a_stop_keeps_nothing(
    server: RunningServer, sdk: AsyncOpenAI
) -> None:
    first = await ask(sdk, "one")
    await until(lambda: not server.owners.streams.running())
    assert await server.counted("stored_responses") == {(): 1}

    await server.change(**{"chat.streams.store_window": 0})

    assert stored(server) == 0
    server.simulator.behaviour = FORGETFUL
    with pytest.raises(openai.NotFoundError):
        await ask(sdk, "two", previous_response_id=first.id)


@pytest.mark.parametrize("streamed", [True, False])
async def test_nothing_is_held_for_a_response_that_fails_or_whose_client_leaves(
    server: RunningServer, sdk: AsyncOpenAI, streamed: bool
) -> None:
    first = await ask(sdk, "one", store=False)
    assert server.owners.streams.stats().bytes == 0
    for model in ("fault-status-500", "fault-cut-3", "fault-bad-json-2"):
        with pytest.raises(openai.APIError):
            await ask(
                sdk, "x" * 5000, model=model, streamed=streamed, previous_response_id=first.id
            )
    await until(lambda: not server.owners.streams.running())

    for stream in server.owners.streams.finished():
        server.owners.streams.drop(stream)

    assert server.owners.streams.stats().bytes == 0
    assert stored(server) == 0
