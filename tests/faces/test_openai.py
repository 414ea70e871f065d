"""The OpenAI face: the official SDK unchanged, and the provider's bytes as they came."""

from __future__ import annotations

import asyncio
import copy
import json
import re
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import openai
import pytest
from openai import AsyncOpenAI
from yarl import URL

from tests.support.chat import CHAT, STREAMED
from tests.support.commands import TOO_DEEP
from tests.support.raw import Raw
from tests.support.server import HTTP_CLIENT, NOWHERE, QUICK, SILENT, MakeServer, provider_entry
from tests.support.simulator import Behaviour, Simulator
from tests.support.waiting import patience, until

if TYPE_CHECKING:
    from tests.support.server import RunningServer


MESSAGES: list[Any] = [{"role": "user", "content": "Hello"}]
BEAT = b": keep-alive\n\n"


def post(server: RunningServer, body: object, path: str = "chat/completions") -> Any:
    return server.session.post(f"{server.v1}/{path}", json=body)


async def error_of(response: Any) -> dict[str, Any]:
    body = await response.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    return dict(body["error"])


# The SDK.


async def test_chat_completions(sdk: AsyncOpenAI) -> None:
    whole = await sdk.chat.completions.create(model="sim", messages=MESSAGES)
    stream = await sdk.chat.completions.create(
        model="sim", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    parts = [part async for part in stream]

    text = "".join([part.choices[0].delta.content or "" for part in parts if part.choices])
    assert text == whole.choices[0].message.content
    assert parts[-1].usage is not None
    assert parts[-1].usage.completion_tokens > 0


async def test_completions(sdk: AsyncOpenAI) -> None:
    whole = await sdk.completions.create(model="sim", prompt="Hello")
    stream = await sdk.completions.create(model="sim", prompt="Hello", stream=True)

    text = "".join([part.choices[0].text async for part in stream])
    assert text == whole.choices[0].text
    assert text


async def test_embeddings(sdk: AsyncOpenAI) -> None:
    answer = await sdk.embeddings.create(model="sim", input=["a", "b"])

    assert [embedding.index for embedding in answer.data] == [0, 1]
    assert len(answer.data[0].embedding) == 8


async def test_responses(sdk: AsyncOpenAI) -> None:
    whole = await sdk.responses.create(model="sim", input="Hello")
    kinds, text = [], ""
    async for event in await sdk.responses.create(model="sim", input="Hello", stream=True):
        kinds.append(event.type)
        if event.type == "response.output_text.delta":
            text += event.delta

    assert text == whole.output_text
    assert (kinds[0], kinds[-1]) == ("response.created", "response.completed")


async def test_models(make_server: MakeServer) -> None:
    other = {
        "base_url": NOWHERE,
        "model": "org/own",
        "models": ["more"],
        "http_client": HTTP_CLIENT,
    }
    keyless = copy.deepcopy({**other, "api_key_env": "NO_SUCH_KEY"})  # YAML aliases are refused
    server = await make_server(**{"llm.providers.other": other, "llm.providers.keyless": keyless})
    async with AsyncOpenAI(api_key="unused", base_url=server.v1, max_retries=0) as sdk:
        listed = {model.id: model.owned_by async for model in sdk.models.list()}

    assert listed == {
        "sim": "sim",
        "sim/sim-model": "sim",
        "other": "other",
        "other/org/own": "other",
        "other/more": "other",
        # A name that a provider lists leads there.
        "more": "other",
    }


# Names that lead to a provider which is not known to have the model.
UNLISTED = {
    *("sim/", "other/any", "org/own", "more", "nobody", "nobody/x", "a b", "other/x/keyless"),
}


NAMES = UNLISTED | {
    *("sim", "sim/sim-model", "sim-model", "other", "other/org/own", "keyless", "keyless/x")
}


async def test_a_model_is_there_if_a_chat_with_it_is_not_refused(make_server: MakeServer) -> None:
    async with Simulator(QUICK) as simulator:
        keyed = {"api_key_env": "NO_SUCH_KEY"}
        server = await make_server(
            **{
                "llm.providers.other": provider_entry(simulator.base_url, "org/own"),
                "llm.providers.keyless": {**provider_entry(simulator.base_url), **keyed},
            }
        )
        for name in NAMES:
            async with post(server, {"model": name, "messages": MESSAGES}) as response:
                status, provider = response.status, response.headers.get("x-aioserver-provider")
                refusal = await response.json()
            assert status == (404 if name.startswith("keyless") else 200), name
            for path in (quote(name), quote(name, safe="")):
                url = URL(f"{server.v1}/models/{path}", encoded=True)
                async with server.session.get(url) as response:
                    described = await response.json()
                    assert response.status == status, name
                if status == 200:
                    assert (described["id"], described["owned_by"]) == (name, provider)
                    assert described.get("listed") == (False if name in UNLISTED else None), name
                else:
                    assert described == refusal
                    assert described["error"]["code"] == "model_not_found"


async def test_the_sdk_raises_its_own_errors_with_our_codes(sdk: AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError):
        await sdk.chat.completions.create(model="sim", messages=[])
    with pytest.raises(openai.InternalServerError) as caught:
        await sdk.chat.completions.create(model="fault-status-500", messages=MESSAGES)
    assert (caught.value.status_code, caught.value.code) == (502, "provider_error")
    stream = await sdk.chat.completions.create(model="fault-end-3", messages=MESSAGES, stream=True)
    with pytest.raises(openai.APIError) as broken:
        async for _ in stream:
            pass
    assert broken.value.code == "provider_disconnected"


async def test_the_sdk_does_not_repeat_what_was_sent_already(server: RunningServer) -> None:
    async with AsyncOpenAI(api_key="unused", base_url=server.v1, max_retries=2) as sdk:
        for model in ("fault-status-500", "fault-html"):
            before = server.simulator.stats().requests
            with pytest.raises(openai.InternalServerError):
                await sdk.chat.completions.create(model=model, messages=MESSAGES)
            assert server.simulator.stats().requests == before + 1


# Byte for byte.


def alike(body: bytes) -> bytes:
    """Without what differs from answer to answer: ids and times."""
    body = body.replace(b"\r\n", b"\n").replace(b"\r", b"\n")  # a [DONE] put to it has LF
    body = re.sub(rb"(chatcmpl-|cmpl-|resp_|msg_|fc_|call_)[0-9a-f]{24}", rb"\1", body)
    return re.sub(rb'"(created|created_at|completed_at)":\d+', rb'"\1":0', body)


BODIES: dict[str, dict[str, Any]] = {
    "chat/completions": {"messages": MESSAGES, "stream_options": {"include_usage": True}},
    "completions": {"prompt": "Hello"},
    "responses": {"input": "Hello"},
    "embeddings": {"input": "Hello"},
}


@pytest.mark.parametrize(
    ("path", "streamed"),
    [
        *((path, True) for path in BODIES if path != "embeddings"),
        *((path, False) for path in BODIES),
    ],
)
async def test_the_providers_answer_comes_byte_for_byte(
    server: RunningServer, path: str, streamed: bool
) -> None:
    body = {"model": "any", **BODIES[path], "stream": streamed}
    async with server.session.post(f"{server.simulator.base_url}/{path}", json=body) as response:
        straight = await response.read()
        kind = response.headers["Content-Type"]
    async with post(server, body, path) as response:
        through = await response.read()

    assert alike(through) == alike(straight)
    assert response.headers["Content-Type"] == kind
    assert response.headers["x-aioserver-provider"] == "sim"
    assert response.headers["x-aioserver-attempts"] == "1"
    assert response.headers["x-request-id"]


async def test_unusual_answers_pass_as_they_are(server: RunningServer) -> None:
    straight_to = f"{server.simulator.base_url}/chat/completions"
    for kind in ("crlf", "cr", "multi-data", "comments", "slices", "1xx"):
        # Who asks for the usage gets all that comes.
        asking = {"stream_options": {"include_usage": True}}
        body = {**STREAMED, **asking, "model": f"fault-{kind}", "max_tokens": 6}
        async with server.session.post(straight_to, json=body) as response:
            straight = await response.read()
        async with post(server, body) as response:
            through = await response.read()
        assert alike(through) == alike(straight), kind


@pytest.mark.virtual_time
async def test_each_event_comes_as_soon_as_the_provider_sends_it(make_server: MakeServer) -> None:
    server = await make_server(Behaviour(ttft=0, interval=60, tokens=5))
    async with asyncio.timeout(patience(5)), post(server, STREAMED) as response:
        first = await response.content.readuntil(b"\n\n")
        second = await response.content.readuntil(b"\n\n")

    assert b'"role":"assistant"' in first
    assert b'"content"' in second
    await server.simulator.until(lambda stats: stats.aborted == 1)


async def test_the_providers_own_headers_pass_and_no_others(make_server: MakeServer) -> None:
    headers = (
        ("x-ratelimit-remaining-requests", "59"),
        ("openai-processing-ms", "12"),
        ("Set-Cookie", "a=b"),
        ("openai-organization", "secret"),
        ("x-request-id", "theirs"),
    )
    server = await make_server(Behaviour(ttft=0, interval=0, headers=headers))
    for body in (CHAT, STREAMED):
        async with post(server, body) as response:
            await response.read()
        assert response.headers["x-ratelimit-remaining-requests"] == "59"
        assert response.headers["openai-processing-ms"] == "12"
        assert "Set-Cookie" not in response.headers
        assert "openai-organization" not in response.headers
        assert response.headers["x-request-id"] != "theirs"
        assert response.headers["Server"] == "aioserver"


# What is sent to the provider.


ODD = b'{ "messages" : [{"role":"user","content":"h\\u00e9 \xc3\xa9"}],"x":{"deep":[1.50, 1e2]},%b "y":null}'


async def sent(server: RunningServer, body: bytes) -> bytes:
    headers = {"Content-Type": "application/json"}
    async with server.session.post(
        server.v1 + "/chat/completions", data=body, headers=headers
    ) as response:
        await response.read()
        assert response.status == 200
    seen = server.simulator.requests[-1]
    assert "unused" not in seen.headers.get("authorization", "")
    return seen.body


async def test_a_body_whose_model_is_not_replaced_goes_on_as_it_came(
    server: RunningServer,
) -> None:
    for model in ("sim-model", "org/name", "gpt-4o", "sim2", "sim-model/x"):
        body = ODD % f'"model": "{model}" ,'.encode()
        assert await sent(server, body) == body


async def test_a_replaced_model_changes_nothing_else(server: RunningServer) -> None:
    for before, expected in (
        (b"", "sim-model"),
        (b'"model":null,', "sim-model"),
        (b'"model":"sim",', "sim-model"),
        (b'"model":"sim/other",', "other"),
        (b'"model":"sim/org/other",', "org/other"),
    ):
        body = json.loads(await sent(server, ODD % before))
        assert body.pop("model") == expected
        assert body == json.loads(ODD % b"")


async def test_a_model_of_a_provider_that_cannot_be_asked_is_not_found(
    make_server: MakeServer,
) -> None:
    keyless = {
        "base_url": NOWHERE,
        "model": "m",
        "api_key_env": "NO_SUCH_KEY",
        "http_client": HTTP_CLIENT,
    }
    server = await make_server(**{"llm.providers.keyless": keyless})
    for model in ("keyless", "keyless/m"):
        async with post(server, {**CHAT, "model": model}) as response:
            assert response.status == 404
            error = await error_of(response)
            assert (error["code"], error["type"]) == ("model_not_found", "invalid_request_error")


async def test_another_providers_model_goes_to_it(make_server: MakeServer) -> None:
    other = provider_entry(NOWHERE, "m")
    server = await make_server(**{"llm.providers.other": other})
    async with post(server, {**CHAT, "model": "other/x"}) as response:
        assert response.status == 502
        assert (await error_of(response))["code"] == "connect_error"
    assert server.simulator.stats().requests == 0


# Faulty requests and faulty providers.


FAULTY: list[tuple[bytes, str, str | None]] = [
    (b"", "invalid_json", None),
    (b"{", "invalid_json", None),
    (b'{"x": NaN}', "invalid_json", None),
    (b'{"x": "\\ud800}', "invalid_json", None),
    (b"\xef\xbb\xbf{}", "invalid_json", None),
    (b"\xff", "invalid_json", None),
    (b"[" * TOO_DEEP, "invalid_json", None),
    (b"[]", "invalid_request", None),
    (b'{"model": 7}', "invalid_request", "model"),
    (b'{"model": ""}', "invalid_request", "model"),
    (b'{"model": 1e999}', "invalid_request", "model"),
    (b'{"model": "' + b"x" * 5000 + b'"}', "invalid_request", "model"),
    (b'{"x": ' + b"[" * TOO_DEEP + b"]" * TOO_DEEP + b"}", "invalid_json", None),
    (b'{"stream": "yes"}', "invalid_request", "stream"),
]


async def test_a_faulty_body_is_400_and_asks_nobody(server: RunningServer) -> None:
    headers = {"Content-Type": "application/json"}
    url = server.v1 + "/chat/completions"
    for data, code, param in FAULTY:
        async with server.session.post(url, data=data, headers=headers) as response:
            assert response.status == 400, data[:50]
            error = await error_of(response)
            assert (error["code"], error["param"]) == (code, param), data[:50]
            assert error["type"] == "invalid_request_error"
    assert server.simulator.stats().requests == 0


async def test_a_lone_surrogate_becomes_the_replacement_character(server: RunningServer) -> None:
    before = rb'{"model": "m", "messages": [{"role": "user", "content": "\ud83d \ud83d\ude00 \\ud83d"}]}'
    after = rb'{"model": "m", "messages": [{"role": "user", "content": "\ufffd \ud83d\ude00 \\ud83d"}]}'

    assert await sent(server, before) == after


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("model", ["", "any"])
async def test_a_deeply_nested_body_is_no_bug(
    server: RunningServer, model: str, streamed: bool
) -> None:
    deep = "[" * 600 + "]" * 600
    named = f'"model":"{model}",' if model else ""
    data = f'{{{named}"messages":[{{"role":"user","content":"x"}}],"stream":{str(streamed).lower()},"x":{deep}}}'
    headers = {"Content-Type": "application/json"}
    async with server.session.post(
        server.v1 + "/chat/completions", data=data, headers=headers
    ) as response:
        await response.read()

    assert response.status == 200


@pytest.mark.parametrize("key", ["", "x" * 257])
async def test_a_faulty_idempotency_key_is_an_invalid_request(
    server: RunningServer, key: str
) -> None:
    async with server.session.post(
        server.v1 + "/chat/completions", json=CHAT, headers={"Idempotency-Key": key}
    ) as response:
        assert response.status == 400
        assert (await error_of(response))["code"] == "invalid_request"


# Silence and leaving.


@pytest.mark.virtual_time
async def test_comments_come_while_the_provider_is_silent(make_server: MakeServer) -> None:
    server = await make_server(
        Behaviour(ttft=1.1, interval=0, tokens=3), **{"chat.websocket.ping_interval": 0.2}
    )
    async with post(server, STREAMED) as response:
        assert not server.simulator.stats().tokens_sent, "the head goes out alone"
        body = await response.read()

    assert body.count(BEAT) == 4
    assert body.replace(BEAT, b"").startswith(b"data: {")
    assert body.endswith(b"data: [DONE]\n\n")


async def test_an_answer_that_is_cancelled_ends_with_an_error_for_its_readers(
    make_server: MakeServer,
) -> None:
    server = await make_server(Behaviour(ttft=0, interval=0.05, tokens=1000))
    url, headers = f"{server.v1}/chat/completions", {"Idempotency-Key": "mine"}
    async with server.session.post(url, json=STREAMED, headers=headers) as response:
        while b"content" not in await response.content.readline():
            pass
        async with server.session.delete(f"{server.sse}/mine") as cancelled:
            assert cancelled.status < 300
        body = await response.content.read()
    # Whoever comes back for it learns of it as well.
    async with server.session.post(url, json=STREAMED, headers=headers) as again:
        repeated = await again.read()

    for text in (body, repeated):
        last = text.strip().rpartition(b"data: ")[2]
        assert json.loads(last)["error"]["code"] == "stream_not_found"
        assert b"[DONE]" not in text


async def test_the_providers_full_queue_is_503_with_retry_after(make_server: MakeServer) -> None:
    server = await make_server(
        SILENT,
        **{
            "llm.providers.sim.http_client.concurrent_requests": 1,
            "llm.providers.sim.http_client.queue_size": 1,
        },
    )
    async with Raw(server) as first, Raw(server) as second:
        for raw in (first, second):
            await raw.post("/v1/chat/completions", STREAMED)
        await until(lambda: server.held()["sim waiting"] == 1)
        for body in (CHAT, STREAMED):
            async with post(server, body) as response:
                assert response.status == 503
                assert (await error_of(response))["code"] == "provider_queue_full"
                assert 1 <= int(response.headers["Retry-After"]) <= 60
    await server.nothing_held()


async def test_a_connection_is_used_again_after_an_answer(server: RunningServer) -> None:
    async with Raw(server) as raw:
        for body in (STREAMED, CHAT, {**STREAMED, "model": "fault-end-3"}, STREAMED):
            await raw.post("/v1/chat/completions", body)
            assert (await raw.answer()).status == 200


@pytest.mark.parametrize("line", ["Connection: keep-alive", "X: y"])
async def test_an_http_10_client_gets_a_plain_body_that_ends(
    server: RunningServer, line: str
) -> None:
    async with Raw(server) as raw:
        await raw.post("/v1/chat/completions", STREAMED, line, version="1.0")
        head = await raw.head()
        body = await raw.to_the_end()

    assert "transfer-encoding" not in head.headers
    assert body.startswith(b"data: {")
    assert body.endswith(b"data: [DONE]\n\n")


async def test_headers_that_steer_other_gateways_steer_nothing_here(server: RunningServer) -> None:
    evil = "http://127.0.0.1:1/evil"
    names = ("api_base", "base_url", "api_key", "user_config", "extra_headers")
    async with post(server, {**CHAT, "model": "any", **dict.fromkeys(names, evil)}) as response:
        assert response.status == 200

    assert [server.simulator.bodies[-1][name] for name in names] == [evil] * len(names)
    assert "evil" not in str(server.simulator.requests[-1].headers)
