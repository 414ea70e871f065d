"""The simulated provider, over real sockets: shapes, counts, and each of its faults."""

from __future__ import annotations

import asyncio
import re
import zlib
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import aiohttp
import openai
import orjson
import pytest

from aioserver.wings.simulator import faults as simulator_faults
from aioserver.wings.simulator import server as provider
from aioserver.wings.simulator.model import speech, tokens
from tests.support.server import QUICK
from tests.support.simulator import Behaviour, Simulator
from tests.support.waiting import patience, ticks

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        },
    },
}


@pytest.fixture
async def simulator() -> AsyncIterator[Simulator]:
    async with Simulator(QUICK, seed=1) as simulator:
        yield simulator


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(auto_decompress=False) as session:
        yield session


@pytest.fixture
async def sdk(simulator: Simulator) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=simulator.base_url, api_key="sk-test", max_retries=0
    ) as sdk:
        yield sdk


def chat(model: str = "simulated", text: str = "Hello", **more: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": text}], **more}


@dataclass
class Client:
    """A client of *simulator*."""

    simulator: Simulator
    session: aiohttp.ClientSession

    @asynccontextmanager
    async def post(self, body: object) -> AsyncIterator[aiohttp.ClientResponse]:
        url = f"{self.simulator.base_url}/chat/completions"
        async with self.session.post(url, json=body, allow_redirects=False) as response:
            yield response

    async def streamed(self, model: str) -> bytes:
        async with self.post(chat(model, stream=True)) as response:
            return await response.read()

    async def whole(self, model: str) -> bytes:
        async with self.post(chat(model)) as response:
            return await response.read()


@pytest.fixture
def client(simulator: Simulator, session: aiohttp.ClientSession) -> Client:
    return Client(simulator, session)


async def until_tokens(response: aiohttp.ClientResponse, count: int) -> bytes:
    """Read until *count* tokens have come."""
    text = b""
    while text.count(b'"delta":{"content":') < count:
        text += await response.content.readany()
    return text


async def raw(simulator: Simulator, model: str, *, stream: bool = True) -> bytes:
    """Everything that comes over a connection that only the simulator closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", simulator.port)
    body = orjson.dumps(chat(model, stream=stream))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    try:
        return await reader.read()
    finally:
        writer.close()
        await writer.wait_closed()


def events(text: bytes) -> list[Any]:
    """The `data:` of each event, parsed; `[DONE]` as text."""
    parts = [part.removeprefix(b"data: ") for part in text.split(b"\n\n") if part]
    return [part.decode() if part == b"[DONE]" else orjson.loads(part) for part in parts]


def text_of_chunk(text: bytes) -> str:
    choices = [e["choices"][0] for e in events(text) if e != "[DONE]" and e["choices"]]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


# What it says.


def test_tokens_joined_are_the_text() -> None:
    text = "  Hello,  wörld!\n\nIt's “fine” … 漢字 e.g. x=1 "

    assert "".join(tokens(text)) == text


def test_speech_has_markdown_for_who_asks_and_now_and_then() -> None:
    whole = speech("Show me Markdown", 1)
    for part in ("## ", "1. The **", "| --- |", "```sh", "> ", "<https://"):
        assert part in whole
    assert len(whole) < 2000
    answers = [speech(f"message {n}", 1) for n in range(200)]
    some = [
        answer for answer in answers if "\n## " in answer or "\n| " in answer or "```" in answer
    ]
    assert 20 < len(some) < 60


def test_speech_quotes_and_differs_with_the_message() -> None:
    assert "“What is this?”" in speech("What is this?", 1)
    assert "simulated" in speech("What is this?", 1)
    assert speech("What is this?", 1) == speech("What is this?", 1)
    assert len({speech(f"message {n}", 1)[:40] for n in range(50)}) == 4
    assert len(speech("x" * 1_000_000, 1)) < 1000


async def test_stream_begins_with_the_role_and_ends_with_usage_and_done(client: Client) -> None:
    body = chat(stream=True, stream_options={"include_usage": True})
    async with client.post(body) as response:
        text = await response.read()

    first, *chunks, finish, usage, done = events(text)
    assert response.content_type == "text/event-stream"
    assert first["choices"][0]["delta"]["role"] == "assistant"
    assert text_of_chunk(text) == speech("Hello", 1)
    assert {chunk["choices"][0]["finish_reason"] for chunk in chunks} == {None}
    assert finish["choices"][0]["finish_reason"] == "stop"
    assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], len(chunks))
    assert done == "[DONE]"


async def test_every_token_is_a_chunk_of_its_own(client: Client) -> None:
    async with client.post(chat(stream=True)) as response:
        chunks = [data async for data, _ in response.content.iter_chunks()]

    assert all(chunk.count(b"data: ") == 1 for chunk in chunks)


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
async def test_max_tokens_cuts_the_answer(client: Client, name: str) -> None:
    async with client.post(chat() | {name: 4}) as response:
        answer = await response.json()

    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["choices"][0]["message"]["content"] == "".join(tokens(speech("Hello", 1))[:4])
    assert answer["usage"]["completion_tokens"] == 4


async def test_behaviour_tokens_sets_the_length(client: Client) -> None:
    client.simulator.behaviour = Behaviour(ttft=0, interval=0, tokens=1000)
    text = await client.streamed("m")

    assert len(events(text)) == 1 + 1000 + 2
    assert client.simulator.stats().tokens_sent == 1000


# The official SDK.


async def test_sdk_chat(sdk: openai.AsyncOpenAI) -> None:
    messages: Any = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
    ]
    answer = await sdk.chat.completions.create(model="m", messages=messages)
    stream = await sdk.chat.completions.create(
        model="m", messages=messages, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]

    assert answer.choices[0].message.content == speech("Hello", 1)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == speech("Hello", 1)
    assert chunks[-1].usage == answer.usage
    assert chunks[-2].choices[0].finish_reason == "stop"


async def test_sdk_chat_calls_a_tool(sdk: openai.AsyncOpenAI) -> None:
    asked: Any = chat("m", "Please call a tool for Rome", tools=[TOOL])
    answer = await sdk.chat.completions.create(**asked)
    async with sdk.chat.completions.stream(**asked) as stream:
        final = await stream.get_final_completion()

    assert answer.choices[0].finish_reason == final.choices[0].finish_reason == "tool_calls"
    (call,) = answer.choices[0].message.tool_calls or []
    (same,) = final.choices[0].message.tool_calls or []
    assert call.type == same.type == "function"
    assert call.function.name == same.function.name == "weather"
    assert orjson.loads(call.function.arguments) == orjson.loads(same.function.arguments)
    assert set(orjson.loads(call.function.arguments)) == {"city", "days"}


async def test_sdk_completions(sdk: openai.AsyncOpenAI) -> None:
    answer = await sdk.completions.create(model="m", prompt="Hello", max_tokens=5)
    stream = await sdk.completions.create(model="m", prompt="Hello", max_tokens=5, stream=True)
    text = "".join([chunk.choices[0].text async for chunk in stream])

    assert answer.choices[0].text == text
    assert answer.choices[0].finish_reason == "length"


async def test_sdk_responses(sdk: openai.AsyncOpenAI) -> None:
    answer = await sdk.responses.create(model="m", input="Hello")
    async with sdk.responses.stream(model="m", input="Hello") as stream:
        seen = [event async for event in stream]
        final = await stream.get_final_response()

    assert answer.output_text == final.output_text == speech("Hello", 1)
    assert [event.sequence_number for event in seen] == list(range(len(seen)))
    assert (seen[0].type, seen[-1].type) == ("response.created", "response.completed")
    assert answer.usage == final.usage


async def test_sdk_responses_cut_short_is_incomplete(sdk: openai.AsyncOpenAI) -> None:
    stream = await sdk.responses.create(
        model="m", input=[{"role": "user", "content": "Hi"}], max_output_tokens=3, stream=True
    )
    last = [event async for event in stream][-1]

    assert last.type == "response.incomplete"
    assert last.response.incomplete_details is not None
    assert last.response.incomplete_details.reason == "max_output_tokens"


async def test_sdk_responses_call_a_tool(sdk: openai.AsyncOpenAI) -> None:
    tool: Any = {"type": "function", **TOOL["function"], "strict": False}
    async with sdk.responses.stream(model="m", input="call a tool", tools=[tool]) as stream:
        final = await stream.get_final_response()

    (call,) = final.output
    assert call.type == "function_call"
    assert (call.name, orjson.loads(call.arguments)["days"]) == ("weather", 1)


async def test_a_response_is_continued_by_the_simulator_that_has_made_it() -> None:
    request: Any = {"model": "simulated", "input": "Hello"}
    output = {"type": "function_call_output", "output": "sunny"}
    tool: Any = {"type": "function", **TOOL["function"]}
    async with (
        provider.Simulator(QUICK, seed=1) as simulator,
        openai.AsyncOpenAI(base_url=simulator.base_url, api_key="k", max_retries=0) as sdk,
    ):
        first = await sdk.responses.create(**request, tools=[tool], tool_choice="required")
        (call,) = first.output
        assert call.type == "function_call"
        answered: Any = [{**output, "call_id": call.call_id}]
        second = await sdk.responses.create(
            model="simulated", input=answered, previous_response_id=first.id
        )
        third = await sdk.responses.create(**request, previous_response_id=second.id, store=False)
        assert third.previous_response_id == second.id

        missing: Any = [{**output, "call_id": "call_none"}]
        for given, previous_id, code in (
            ("Hello", "resp_none", "previous_response_not_found"),
            ("Hello", third.id, "previous_response_not_found"),
            (missing, first.id, None),
            (missing, None, None),
        ):
            with pytest.raises(openai.BadRequestError) as caught:
                await sdk.responses.create(
                    model="simulated", input=given, previous_response_id=previous_id
                )
            assert caught.value.code == code


async def test_sdk_embeddings(sdk: openai.AsyncOpenAI) -> None:
    plain = await sdk.embeddings.create(model="m", input=["a", "b"], encoding_format="float")
    packed = await sdk.embeddings.create(model="m", input=["a", "b"])
    short = await sdk.embeddings.create(model="m", input="a", dimensions=3)

    assert packed.data[0].embedding == pytest.approx(plain.data[0].embedding)
    assert plain.data[0].embedding != plain.data[1].embedding
    assert len(short.data[0].embedding) == 3


async def test_sdk_models(sdk: openai.AsyncOpenAI) -> None:
    listed = [model.id async for model in sdk.models.list()]
    retrieved = await sdk.models.retrieve("simulated")

    assert retrieved.id in listed


async def test_sdk_raises_the_error_in_the_stream(sdk: openai.AsyncOpenAI) -> None:
    asked: Any = chat("fault-error-event-2")
    stream = await sdk.chat.completions.create(**asked, stream=True)

    with pytest.raises(openai.APIError, match="had an error"):
        _ = [chunk async for chunk in stream]


# What it refuses.


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"{", None),
        (b"[]", None),
        (b'{"messages": []}', "model"),
        (b'{"model": "m"}', "messages"),
        (b'{"model": "m", "messages": []}', "messages"),
        (b'{"model": "m", "messages": "Hello"}', "messages"),
        (b'{"model": "m", "messages": ["Hello"]}', "messages[0]"),
        (b'{"model": "m", "messages": [{}]}', "messages[0].role"),
        (b'{"model": "m", "messages": [{"role": "user"}], "max_tokens": 0}', "max_tokens"),
        (b'{"model": "m", "messages": [{"role": "user"}], "stream": "yes"}', "stream"),
    ],
)
async def test_bad_body_is_400(client: Client, body: bytes, param: str | None) -> None:
    url = f"{client.simulator.base_url}/chat/completions"
    async with client.session.post(url, data=body) as response:
        fault = (await response.json())["error"]

    assert response.status == 400
    assert (fault["type"], fault["param"]) == ("invalid_request_error", param)


@pytest.mark.parametrize("depth", [200, 500, 1000])
async def test_deeply_nested_body_is_answered_or_400(client: Client, depth: int) -> None:
    # A response repeats its metadata, and an embedding is made of its input as a text.
    deep = "[" * depth + "]" * depth
    for path, body in (
        ("responses", f'{{"model":"m","input":"x","metadata":{deep}}}'),
        ("responses", f'{{"model":"m","input":"x","metadata":{deep},"stream":true}}'),
        ("embeddings", f'{{"model":"m","input":[{deep}]}}'),
    ):
        async with client.session.post(
            f"{client.simulator.base_url}/{path}", data=body
        ) as response:
            answer = await response.text()

        assert response.status == 200 or (response.status, depth > 200) == (400, True)
        assert response.status == 200 or "nested too deeply" in answer


CITED = {"type": "text", "text": "a", "citations": [{"type": "char_location"}]}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        *(({name: 1}, name) for name in ("temperature", "top_p", "top_k")),
        ({"messages": [{"role": "user", "content": [CITED]}]}, "messages.0.content.0.citations"),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "document"}]}]},
            "messages.0.content.0",
        ),
    ],
)
async def test_the_simulator_of_a_server_refuses_what_anthropic_does_in_its_newest_version(
    session: aiohttp.ClientSession, changes: dict[str, Any], named: str
) -> None:
    body = chat(max_tokens=5) | changes
    async with provider.Simulator(QUICK) as simulator:
        answers = []
        for version in ("2023-06-01", "2026-10-21"):
            url, headers = f"{simulator.base_url}/messages", {"anthropic-version": version}
            async with session.post(url, json=body, headers=headers) as response:
                answers.append((response.status, await response.json()))

    (older, _), (newer, refused) = answers
    assert (older, newer) == (200, 400)
    assert refused["error"]["type"] == "invalid_request_error"
    assert refused["error"]["message"].startswith(named)


async def test_unknown_path_method_and_fault(client: Client) -> None:
    base = client.simulator.base_url
    async with client.session.get(f"{base}/nowhere") as missing:
        assert (await missing.json())["error"]["message"] == "Invalid URL (GET /v1/nowhere)"
    async with client.session.get(f"{base}/embeddings") as wrong:
        pass
    async with client.post(chat("fault-typo-3")) as typo:
        pass

    assert (missing.status, wrong.status, typo.status) == (404, 405, 404)
    assert wrong.headers["Allow"] == "POST"


# What it counts.


async def test_requests_are_kept_as_they_came(client: Client) -> None:
    body = chat(unknown={"field": 1})
    headers = {"Authorization": "Bearer sk-1"}
    url = f"{client.simulator.base_url}/chat/completions"
    async with client.session.post(url, json=body, headers=headers):
        pass

    (seen,) = client.simulator.requests
    assert (seen.path, seen.headers["authorization"]) == ("/v1/chat/completions", "Bearer sk-1")
    assert orjson.loads(seen.body) == client.simulator.bodies[0] == body


async def test_a_kept_connection_is_counted_once(client: Client) -> None:
    for _ in range(3):
        await client.streamed("m")
    before = client.simulator.stats()
    await client.session.close()
    after = await client.simulator.until(lambda stats: stats.open_connections == 0)

    assert (before.requests, before.streams, before.completed) == (3, 3, 3)
    assert (before.connections_accepted, before.open_connections) == (1, 1)
    assert (after.peak_connections, after.peak_active, after.active) == (1, 1, 0)


async def test_a_client_that_leaves_is_counted_as_aborted(client: Client) -> None:
    client.simulator.behaviour = Behaviour(ttft=0, interval=60)
    async with client.post(chat(stream=True)) as response:
        await until_tokens(response, 1)
        response.close()
        stats = await client.simulator.until(lambda stats: stats.aborted == 1, within=patience(1))

    assert (stats.active, stats.completed) == (0, 0)


async def test_close_is_prompt_with_running_streams(session: aiohttp.ClientSession) -> None:
    simulator = Simulator(Behaviour(ttft=0, interval=60))
    await simulator.start()
    async with Client(simulator, session).post(chat(stream=True)) as response:
        await until_tokens(response, 1)
        simulator.behaviour = QUICK
        async with Client(simulator, session).post(chat("fault-endless", stream=True)) as two:
            await until_tokens(two, 5)  # and then nobody reads
            async with asyncio.timeout(patience(0.5)):
                await simulator.close()

    assert (simulator.stats().open_connections, simulator.stats().aborted) == (0, 0)


async def test_a_taken_port_is_an_error(simulator: Simulator) -> None:
    with pytest.raises(OSError, match="in use"):
        await Simulator().start(port=simulator.port)


async def test_same_seed_same_ids_and_failures(session: aiohttp.ClientSession) -> None:
    runs = []
    for _ in range(2):
        async with Simulator(Behaviour(ttft=0, interval=0, fail_rate=0.5), seed=7) as simulator:
            bodies = [orjson.loads(await Client(simulator, session).whole("m")) for _ in range(20)]
        runs.append([body.get("id") for body in bodies])

    assert runs[0] == runs[1]
    assert 4 < runs[0].count(None) < 16


# Behaviour.


async def test_fail_rate(client: Client) -> None:
    client.simulator.behaviour = Behaviour(fail_rate=1.0, fail_status=529)
    async with client.post(chat()) as response:
        assert response.status == 529


@pytest.mark.parametrize("stream", [True, False])
async def test_cut_after(client: Client, *, stream: bool) -> None:
    client.simulator.behaviour = Behaviour(ttft=0, interval=0, cut_after=5)
    async with client.post(chat(stream=stream)) as response:
        with pytest.raises(aiohttp.ClientError):
            await response.read()

    assert client.simulator.stats().tokens_sent == 5


@pytest.mark.parametrize(("rate", "least", "most"), [(0.0, 0, 0), (0.5, 5, 15), (1.0, 20, 20)])
async def test_a_fault_by_name_for_a_share_of_all_models(
    client: Client, rate: float, least: int, most: int
) -> None:
    behaviour = Behaviour(ttft=0, interval=0, fail_rate=rate, fault="status-418")
    client.simulator.behaviour = behaviour
    statuses = []
    for _ in range(20):
        async with client.post(chat("m")) as response:
            statuses.append(response.status)

    assert set(statuses) <= {200, 418}
    assert least <= statuses.count(418) <= most


async def test_a_models_fault_yields_only_to_one_for_all_requests(client: Client) -> None:
    client.simulator.behaviour = Behaviour(ttft=0, interval=0, fail_rate=1.0, fault="status-418")
    async with client.post(chat("fault-status-500")) as for_all:
        pass
    client.simulator.behaviour = Behaviour(ttft=0, interval=0, fault="status-418")
    async with client.post(chat("fault-status-500")) as by_its_name:
        pass

    assert (for_all.status, by_its_name.status) == (418, 500)


async def test_stall_after(client: Client) -> None:
    client.simulator.behaviour = Behaviour(ttft=0, interval=0, stall_after=5)
    async with client.post(chat(stream=True)) as response:
        await until_tokens(response, 5)

    await client.simulator.until(lambda stats: stats.aborted == 1)
    assert client.simulator.stats().tokens_sent == 5


async def test_headers_of_the_behaviour_are_sent(client: Client) -> None:
    limit = ("x-ratelimit-remaining-requests", "0")
    client.simulator.behaviour = Behaviour(ttft=0, interval=0, headers=(limit,))
    async with client.post(chat(stream=True)) as response:
        assert response.headers[limit[0]] == limit[1]


# Faults.


def test_the_table_of_faults_is_whole() -> None:
    table = re.sub(r"-<\w+>", "", simulator_faults.TABLE)
    named = re.findall(r"^    (fault-\S+)(?: (fault-\S+))?", table, re.MULTILINE)

    assert {name.removeprefix("fault-") for pair in named for name in pair if name} == set(
        simulator_faults.FAULTS
    )


@pytest.mark.parametrize("stream", [True, False])
async def test_no_fault_leaves_anything_behind(client: Client, *, stream: bool) -> None:
    for number, name in enumerate(simulator_faults.FAULTS):
        request = asyncio.create_task(raw(client.simulator, f"fault-{name}", stream=stream))
        await client.simulator.until(lambda stats: stats.requests > number)  # noqa: B023
        await ticks(20)  # somewhere in the answer
        request.cancel()
        await asyncio.wait([request])
        await client.simulator.until(lambda stats: not stats.open_connections and not stats.active)
        stats = client.simulator.stats()

        assert stats.completed + stats.aborted == stats.requests == number + 1, name
    assert await client.whole("m")


@pytest.mark.parametrize(
    ("model", "status", "retry_after", "code"),
    [
        ("fault-status-500", 500, None, None),
        ("fault-status-401", 401, None, "invalid_api_key"),
        ("fault-status-429", 429, "1", "rate_limit_exceeded"),
        ("fault-status-503", 503, "1", None),
        ("fault-status-529", 529, None, None),
        ("fault-status-200", 200, None, None),
        ("fault-quota", 429, None, "insufficient_quota"),
        ("fault-credits", 402, None, 402),
        ("fault-retry-after-30", 429, "30", "rate_limit_exceeded"),
        ("fault-day-over", 429, "2", "rate_limit_exceeded"),
        ("fault-capacity", 498, None, "capacity_exceeded"),
        ("fault-slow-down", 503, "1", "slow_down"),
        ("fault-retry-after-absurd", 429, "31536000", "rate_limit_exceeded"),
        ("fault-json-under-200-stream", 200, None, None),
    ],
)
async def test_refusals(
    client: Client,
    model: str,
    status: int,
    retry_after: str | None,
    code: str | int | None,
) -> None:
    async with client.post(chat(model, stream=True)) as response:
        fault = (await response.json())["error"]

    assert (response.status, response.content_type) == (status, "application/json")
    assert (response.headers.get("Retry-After"), fault["code"]) == (retry_after, code)


async def test_answers_of_another_kind(client: Client) -> None:
    async with client.post(chat("fault-html")) as page:
        assert (page.status, page.content_type) == (200, "text/html")
    async with client.post(chat("fault-empty", stream=True)) as empty:
        assert (empty.status, await empty.read()) == (200, b"")
    async with client.post(chat("fault-redirect")) as redirect:
        assert (redirect.status, redirect.headers["Location"]) == (302, "/elsewhere")
    async with client.post(chat("fault-cookie")) as cookie:
        assert "Set-Cookie" in cookie.headers
    async with client.post(chat("fault-retry-after-date")) as date:
        assert date.headers["Retry-After"].endswith("GMT")
    async with client.post(chat("fault-retry-after-ms")) as ms:
        assert ms.headers["retry-after-ms"] == "700"


@pytest.mark.parametrize("kind", ["text/html", "text/plain"])
async def test_a_good_stream_of_another_type(client: Client, kind: str) -> None:
    model = f"fault-type-{'html' if kind == 'text/html' else 'text'}"
    async with client.post(chat(model, stream=True)) as response:
        text = await response.read()

    assert response.content_type == kind
    assert (text_of_chunk(text), events(text)[-1]) == ("Hello", "[DONE]")


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("fault-limits-spent", ("0", "17ms", None)),
        ("fault-limits-spent-1000", ("0", "1s", None)),
        ("fault-limits-spent-360000", ("0", "6m0s", None)),
        ("fault-limits-day", ("14370", "2m59.56s", "7.66s")),
        ("fault-limits-nonsense", ("-1", "-1", "soon")),
        ("fault-day-over", ("0", "23h51m7.2s", None)),
    ],
)
async def test_limits_in_the_head(
    client: Client,
    model: str,
    expected: tuple[str, str, str | None],
) -> None:
    async with client.post(chat(model, stream=True)) as response:
        headers = response.headers

    names = ("remaining-requests", "reset-requests", "reset-tokens")
    assert tuple(headers.get(f"x-ratelimit-{name}") for name in names) == expected


async def test_flapping_fails_and_answers_by_turns(client: Client) -> None:
    statuses = []
    for _ in range(8):
        async with client.post(chat("fault-flap-2")) as response:
            statuses.append(response.status)

    assert statuses == [502, 502, 200, 200] * 2


async def test_comments_and_then_an_answer_or_none(client: Client) -> None:
    comment = b": OPENROUTER PROCESSING\n\n"
    thinking = await client.streamed("fault-thinking-4")
    for model in ("fault-comments-stall-4", "fault-comments-endless"):
        async with client.post(chat(model, stream=True)) as response:
            text = b""
            while text.count(comment) < 4:
                text += await response.content.readany()
        assert set(text.split(b"\n\n")) == {comment.strip(), b""}

    assert thinking.startswith(4 * comment + b"data: ")
    assert text_of_chunk(thinking[4 * len(comment) :]) == speech("Hello", 1)


async def test_where_the_usage_is_reported(client: Client) -> None:
    async def last(model: str) -> Any:
        body = chat(model, stream=True, stream_options={"include_usage": True})
        async with client.post(body) as response:
            return events(await response.read())[-2]

    nowhere, groqs = await last("fault-no-usage"), await last("fault-usage-x-groq")
    whole_without = orjson.loads(await client.whole("fault-no-usage"))
    whole_groqs = orjson.loads(await client.whole("fault-usage-x-groq"))

    assert "usage" not in nowhere
    assert "usage" not in whole_without
    assert nowhere["choices"][0]["finish_reason"] == "stop"
    for chunk in (groqs, whole_groqs):
        assert "usage" not in chunk
        assert chunk["x_groq"]["usage"]["completion_tokens"] > 20


async def test_half_line(client: Client) -> None:
    async with client.post(chat("fault-half-line-2", stream=True)) as response:
        text = await until_tokens(response, 2)
        while text.endswith(b"\n\n"):
            text += await response.content.readany()

    *_, last, half = text.split(b"\n\n")
    assert b"delta" in last
    assert half.startswith(b"data: {")
    assert not half.endswith(b"\n")


async def test_cut_is_a_reset(simulator: Simulator) -> None:
    with pytest.raises(ConnectionResetError):
        await raw(simulator, "fault-cut-2")


async def test_dropped_and_no_http(simulator: Simulator) -> None:
    assert (await raw(simulator, "fault-bad-chunk-2")).endswith(b"}\n\n\r\nno size\r\n")
    assert await raw(simulator, "fault-drop") == b""
    assert await raw(simulator, "fault-not-http") == b"220 mail.example ESMTP ready\r\n"


async def test_ends_around_done(client: Client) -> None:
    without = events(await client.streamed("fault-no-done"))
    beyond = events(await client.streamed("fault-after-done"))
    early = events(await client.streamed("fault-early-done-2"))
    async with client.post(chat("fault-open-done", stream=True)) as response:
        text = b""
        while not text.endswith(b"data: [DONE]\n\n"):
            text += await response.content.readany()
        assert not response.content.at_eof()

    assert without[-1]["choices"][0]["finish_reason"] == "stop"
    assert beyond[-2] == "[DONE]"
    assert (len(early), early[-1]) == (4, "[DONE]")


async def test_errors_inside_the_stream(client: Client) -> None:
    error = events(await client.streamed("fault-error-event-2"))
    chunk = events(await client.streamed("fault-error-chunk-2"))
    comment, _, first = (await client.streamed("fault-error-first-429")).partition(b"\n\n")

    assert (len(error), error[-1]["error"]["type"]) == (4, "server_error")
    assert (len(chunk), chunk[-1]["error"]["code"]) == (4, 502)
    assert chunk[-1]["choices"][0]["finish_reason"] == "error"
    assert comment == b": OPENROUTER PROCESSING"
    assert [event["error"]["code"] for event in events(first)] == [429]


async def test_slow_paces_the_tokens(client: Client) -> None:
    loop = asyncio.get_running_loop()
    started = loop.time()
    body = chat("fault-slow-20", stream=True, max_tokens=4)
    async with client.post(body) as response:
        await response.read()

    assert loop.time() - started >= 0.059


@pytest.mark.parametrize("line_end", [b"\r\n", b"\r"])
async def test_other_line_ends(client: Client, line_end: bytes) -> None:
    name = "fault-crlf" if line_end == b"\r\n" else "fault-cr"
    text = await client.streamed(name)

    assert text.endswith(b"data: [DONE]" + 2 * line_end)
    assert text_of_chunk(text.replace(line_end, b"\n")) == speech("Hello", 1)


async def test_bom_comments_and_several_data_lines(client: Client) -> None:
    bom = await client.streamed("fault-bom")
    comments = await client.streamed("fault-comments")
    several = await client.streamed("fault-multi-data")

    assert text_of_chunk(bom.removeprefix(b"\xef\xbb\xbf")) == speech("Hello", 1)
    assert comments.startswith(b": OPENROUTER PROCESSING\n\ndata: ")
    assert text_of_chunk(comments.replace(b": OPENROUTER PROCESSING\n\n", b"")) == speech(
        "Hello", 1
    )
    assert several.startswith(b"data: {\ndata: ")
    joined = several.replace(b"data: {\ndata: ", b"data: {").replace(b"\ndata:}", b"}")
    assert text_of_chunk(joined) == speech("Hello", 1)


async def test_slices_are_a_good_short_answer(client: Client) -> None:
    text = await client.streamed("fault-slices")

    assert text_of_chunk(text) == "".join(tokens(speech("Hello", 1))[:8])
    assert orjson.loads(await client.whole("fault-slices"))["object"]


async def test_heads_of_another_kind(simulator: Simulator) -> None:
    http10 = await raw(simulator, "fault-http10")
    hints = asyncio.create_task(raw(simulator, "fault-1xx"))
    await simulator.until(lambda stats: stats.completed == 2)
    await simulator.close()

    assert http10.startswith(b"HTTP/1.0 200 OK\r\n")
    assert text_of_chunk(http10.partition(b"\r\n\r\n")[2]) == speech("Hello", 1)
    assert (await hints).startswith(b"HTTP/1.1 103 Early Hints\r\n")
    assert b"\r\n\r\nHTTP/1.1 200 OK\r\n" in await hints


async def test_much_in_the_head(simulator: Simulator) -> None:
    async with (
        aiohttp.ClientSession(max_field_size=2000, max_headers=1000) as session,
        Client(simulator, session).post(chat("fault-headers")) as response,
    ):
        assert sum(map(len, response.headers.values())) > 100_000


async def test_gzip_that_nobody_asked_for(client: Client) -> None:
    body = chat("fault-gzip", stream=True)
    async with client.post(body) as response:
        text = zlib.decompress(await response.read(), wbits=31)

    assert response.headers["Content-Encoding"] == "gzip"
    assert text_of_chunk(text) == speech("Hello", 1)


async def test_kept_connection_that_is_closed(simulator: Simulator) -> None:
    assert (await raw(simulator, "fault-close-idle")).endswith(b"0\r\n\r\n")


async def test_kept_connection_that_is_dead_when_it_is_used(client: Client) -> None:
    await client.streamed("fault-close-next")
    open_before = client.simulator.stats().open_connections
    with pytest.raises(aiohttp.ClientOSError):
        await client.streamed("m")
    await client.streamed("m")
    stats = client.simulator.stats()

    assert open_before == 1
    assert (stats.requests, stats.connections_accepted) == (2, 2)
