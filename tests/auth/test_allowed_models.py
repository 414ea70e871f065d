"""The models that a key or a role may ask for, on every way in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from uuid import uuid4

import aiohttp
import pytest

from aioserver.auth.callers import Caller
from aioserver.server.reload import apply_auth
from tests.support import responses
from tests.support.chat import CHAT, chat, to_end, until_status
from tests.support.keys import auth_of, bearer, code_of, entry, keys_of
from tests.support.passing import Account
from tests.support.server import QUICK, provider_entry
from tests.support.simulator import Simulator

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.support.server import MakeServer, RunningServer

    # Asks with the key web for a model, None for no name; the code of the refusal, or "".
    Way = Callable[[RunningServer, str | None], Awaitable[str]]

REFUSED = "model_not_found"
# With the provider of a chat: a model of its own, whatever it is; a group has those of its members.
SIM = {("sim", model) for model in ("sim", "x", "fast")}
FAST = {("fast", model) for model in ("sim", "x", "fast")}
MODELS = {"llm.models": {"fast": "sim/small", "same": "fast"}}


def with_model(body: dict[str, Any], model: str | None) -> dict[str, Any]:
    return body if model is None else {**body, "model": model}


def posts(path: str, **body: Any) -> Way:
    async def ask(server: RunningServer, model: str | None) -> str:
        async with server.session.post(
            f"{server.v1}/{path}", json=with_model(body, model), headers=bearer("web")
        ) as response:
            if response.status == 404:
                return await code_of(response)
            assert response.status == 200, await response.text()
            await response.read()
            return ""

    return ask


async def by_websocket(server: RunningServer, model: str | None) -> str:
    async with server.connect(headers=bearer("web")) as ws:
        await ws.send_json(chat(uuid4().hex, **with_model({}, model)))
        frame = (await to_end(ws))[-1]
        return "" if frame["status"] == "complete" else str(frame["chunk"]["code"])


async def by_sse(server: RunningServer, model: str | None) -> str:
    body = with_model({"request_id": uuid4().hex, **CHAT}, model)
    async with server.session.post(server.sse, json=body, headers=bearer("web")) as response:
        if response.status != 200:
            return await code_of(response)
        await response.read()
        return ""


def by_responses_socket(**fields: Any) -> Way:
    async def ask(server: RunningServer, model: str | None) -> str:
        async with responses.connect(server, headers=bearer("web")) as ws:
            await ws.send_json(responses.create(**with_model(fields, model)))
            event = (await responses.to_end(ws))[-1]
            return "" if event["type"] == "response.completed" else str(event["error"]["code"])

    return ask


async def by_its_page(server: RunningServer, model: str | None) -> str:
    async with server.session.get(
        f"{server.v1}/models/{model}", headers=bearer("web")
    ) as response:
        return "" if response.status == 200 else await code_of(response)


ASK = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 9}
WAYS: dict[str, Way] = {
    "websocket": by_websocket,
    "sse": by_sse,
    "chat": posts("chat/completions", **ASK),
    "stream": posts("chat/completions", **ASK, stream=True),
    "completion": posts("completions", prompt="Hello"),
    "embeddings": posts("embeddings", input="Hello"),
    "messages": posts("messages", **ASK),
    "count": posts("messages/count_tokens", **ASK),
    "responses": posts("responses", input="Hello"),
    "background": posts("responses", input="Hello", background=True),
    "responses websocket": by_responses_socket(),
    "nothing generated": by_responses_socket(generate=False),
    "page": by_its_page,
}


async def test_a_key_asks_for_its_models_only_on_every_way_in(make_server: MakeServer) -> None:
    server = await make_server(**MODELS, **keys_of("web", models=["fast", "gpt-*"]))
    for way, ask in WAYS.items():
        for model in ("fast", "gpt-5"):
            assert await ask(server, model) == "", way
        asked = len(server.simulator.requests)
        names = ["sim", "sim/small", "sim/gpt-5", "small", "same", "unknown", "fas", "faster"]
        for refused in (*names, *([None] if way != "page" else [])):
            assert await ask(server, refused) == REFUSED, way
        assert len(server.simulator.requests) == asked, way


# The models of a key, and each provider and model of a chat that pass.
PASSES: list[tuple[list[str], set[tuple[str | None, ...]]]] = [
    (["sim"], {(None, None), ("sim", None), ("sim", "sim-model"), (None, "sim")}),
    (["sim/*"], {(None, None), ("sim", None), ("sim", "sim-model"), *SIM}),
    (["sim/x"], {("sim", "x")}),
    (["fast"], {("fast", None), ("fast", "sim-model"), *FAST, (None, "fast")}),
    (["x"], {(None, "x")}),
]


async def test_the_provider_of_a_chat_counts_with_its_model(make_server: MakeServer) -> None:
    keys = [entry(f"key{number}", models=models) for number, (models, _) in enumerate(PASSES)]
    server = await make_server(**MODELS, **{"auth.keys": keys})
    chats = [
        (provider, model)
        for provider in (None, "sim", "fast")
        for model in (None, "sim", "sim-model", "x", "fast")
    ]
    for number, (models, passes) in enumerate(PASSES):
        headers = bearer(f"key{number}")
        async with server.connect(headers=headers) as ws:
            for provider, model in chats:
                fields = with_model({} if provider is None else {"provider": provider}, model)
                await ws.send_json(chat(uuid4().hex, **fields))
                passed = (await to_end(ws))[-1]["status"] == "complete"
                assert passed == ((provider, model) in passes), (models, provider, model)
                body = {"request_id": uuid4().hex, **CHAT, **fields}
                async with server.session.post(server.sse, json=body, headers=headers) as response:
                    assert passed == (response.status == 200), (models, provider, model)


# Bodies that some engine reads as one for another model: it takes the first of several keys, looks
# at letters in any case, or knows a list of models.
DOUBTFUL = (
    '"model": "other", "model": "fast"',
    '"mode\\u006c": "other", "model": "fast"',
    '"model": "fast", "Model": "other"',
    '"MODEL": "other", "model": "fast"',
    '"model": "fast", "models": ["other"]',
    '"model": "fast", "Model\\u0073": ["other"]',
)
BODIES = {
    "chat/completions": '{%s, "messages": [{"role": "user", "content": "x"}]}',
    "completions": '{%s, "prompt": "x"}',
    "embeddings": '{%s, "input": "x"}',
    "messages": '{%s, "messages": [{"role": "user", "content": "x"}], "max_tokens": 9}',
    "messages/count_tokens": '{%s, "messages": [{"role": "user", "content": "x"}]}',
    "responses": '{%s, "input": "x"}',
    "responses/compact": '{%s, "input": "x"}',
    "moderations": '{%s, "input": "x"}',
}


async def test_a_body_that_may_be_read_as_one_for_another_model_is_refused(
    make_server: MakeServer,
) -> None:
    changes = {"auth.keys": [entry("web", models=["fast"]), entry("all")]}
    server = await make_server(**MODELS, **changes)

    async def status(name: str, path: str, members: str) -> int:
        async with server.session.post(
            f"{server.v1}/{path}",
            data=(BODIES[path] % members).encode(),
            headers=bearer(name) | {"Content-Type": "application/json"},
        ) as response:
            await response.read()
            return response.status

    for path in BODIES:
        for doubtful in DOUBTFUL:
            assert await status("web", path, doubtful) == 400, (path, doubtful)
    assert not server.simulator.requests
    for path in BODIES:
        # What stands below is no key of the body, and a key for all models may ask as it likes.
        below = '"model": "fast", "metadata": {"model": "x", "Models": "y"}'
        assert await status("web", path, below) != 400, path
        assert await status("all", path, DOUBTFUL[0]) != 400, path


@pytest.mark.parametrize("name", ["Model", "MODELS", "models"])
async def test_neither_the_options_of_a_chat_nor_a_lane_name_another_model(
    make_server: MakeServer, name: str
) -> None:
    server = await make_server(**MODELS, **keys_of("web", models=["fast"]))
    more = {name: "other"}

    async with server.connect(headers=bearer("web")) as ws:
        await ws.send_json(chat("r1", model="fast", options=more))
        assert (await to_end(ws))[-1]["chunk"]["code"] == "invalid_request"
    for generate in ({}, {"generate": False}):
        ask = by_responses_socket(**generate, **more)
        assert await ask(server, "fast") == "invalid_request"
    assert not server.simulator.requests


async def test_what_an_account_keeps_may_name_any_model(make_server: MakeServer) -> None:
    async with Account() as account:
        keys = [
            entry("web", models=["sim/x", "sim"], admin=True),
            entry("owner", models=["sim/*"], admin=True),
        ]
        changes = {
            "llm.providers.sim.base_url": account.url,
            "llm.providers.sim.account_paths": True,
            "auth.keys": keys,
        }
        server = await make_server(**changes)
        for key, status in (("web", 404), ("owner", 200)):
            async with server.session.post(
                f"{server.v1}/batches",
                json={"model": "sim/x", "input_file_id": "f"},
                headers=bearer(key),
            ) as response:
                assert response.status == status, await response.text()
        assert len(account.passed) == 1


# The models of a key, the provider and the model of a request that is passed on, and its status.
PASSED_ON: list[tuple[list[str], str | None, str | None, int]] = [
    # By JSON the model is read.
    (["sim/x"], "sim", "x", 200),
    (["sim/x"], "sim", "y", 404),
    (["fast"], "fast", "y", 200),
    (["fast"], None, "fast", 200),
    (["fast"], None, "sim/x", 404),
    # Nobody has read it in an upload, nor is it known where there is none.
    (["sim/x"], "sim", None, 404),
    (["sim"], "sim", None, 404),
    (["fast"], "fast", None, 404),
    (["fast", "sim"], None, None, 404),
    (["sim/*"], "sim", None, 200),
    (["sim/*"], "fast", None, 200),
    (["si*"], None, None, 200),
    (["sim/*"], "other", None, 404),
]


@pytest.mark.parametrize("kind", ["json", "upload"])
async def test_what_is_passed_on_goes_where_its_model_is_known_to_be_allowed(
    make_server: MakeServer, kind: str
) -> None:
    async with Account() as account, Account() as other:
        keys = [entry(f"key{number}", models=row[0]) for number, row in enumerate(PASSED_ON)]
        server = await make_server(
            **MODELS,
            **{
                "llm.providers.sim.base_url": account.url,
                "llm.providers.other": provider_entry(other.url),
                "auth.keys": keys,
            },
        )
        for number, (models, provider, body_model, by_json) in enumerate(PASSED_ON):
            # Whatever is written in an upload, it may be another model.
            status = 404 if kind == "upload" and body_model is not None else by_json
            form = aiohttp.FormData(with_model({"input": "x"}, body_model))
            form.add_field("file", b"x" * 99, filename="a.wav")
            body: dict[str, Any] = {"data": form}
            if kind == "json":
                body = {"json": with_model({"input": "x"}, body_model)}
            named = {} if provider is None else {"x-aioserver-provider": provider}
            before = len(account.passed)
            async with server.session.post(
                f"{server.v1}/audio/transcriptions",
                headers=bearer(f"key{number}") | named,
                **body,
            ) as response:
                text = await response.text()
            row = models, provider, body_model, text
            assert ("this key may not use" in text) == (status == 404), row
            assert (len(account.passed) > before) == (status == 200), row
        assert not other.passed


async def test_the_models_of_a_key_are_all_that_it_is_shown(make_server: MakeServer) -> None:
    changes = {
        "auth.keys": [
            entry("web", models=["fast", "gpt-5", "sim/*"]),
            entry("none", models=["nobody/x"]),
            entry("all"),
        ],
        "llm.unknown_models": "refuse",
        "llm.providers.sim.models": ["gpt-5", "gpt-6"],
    }
    server = await make_server(**MODELS, **changes)

    async def shown(name: str, **headers: str) -> set[str]:
        async with server.session.get(
            f"{server.v1}/models", headers=bearer(name) | headers
        ) as response:
            return {model["id"] for model in (await response.json())["data"]}

    own = {"fast", "gpt-5", "sim/sim-model", "sim/gpt-5", "sim/gpt-6"}
    assert await shown("web") == await shown("web", **{"anthropic-version": "x"}) == own
    assert await shown("none") == set()
    assert own | {"same", "sim"} <= await shown("all")


async def test_the_fallbacks_of_a_group_answer_for_its_name(make_server: MakeServer) -> None:
    async with Simulator(QUICK) as spare:
        server = await make_server(
            **{
                "llm.models": {"best": {"members": ["down"], "fallbacks": ["spare"]}},
                "llm.providers.down": provider_entry("http://127.0.0.1:9/v1"),
                "llm.providers.spare": provider_entry(spare.base_url),
            },
            **keys_of("web", models=["best"]),
        )
        ask = posts("chat/completions", **CHAT)
        assert await ask(server, "best") == ""
        assert await ask(server, "spare") == REFUSED
        assert len(spare.requests) == 1


async def test_a_reload_changes_what_an_open_socket_may_ask_for(make_server: MakeServer) -> None:
    server = await make_server(**MODELS, **keys_of("web"))
    async with server.connect(headers=bearer("web")) as ws:
        await apply_auth(server.owners, auth_of("web", models=("fast",)))
        await ws.send_json(chat("r1", model="sim"))
        frame = (await to_end(ws))[-1]
        assert frame["chunk"]["code"] == REFUSED
        assert frame["chunk"]["error"] == 'this key may not use "sim": it may use fast'
        await ws.send_json(chat("r2", model="fast"))
        await until_status(ws, "complete")


@pytest.mark.parametrize(
    ("start", "models", "all_of_them"),
    [
        ("sim/", None, True),
        ("sim/", ("sim/*",), True),
        ("sim/", ("s*",), True),
        ("sim/", ("sim/x*", "sim", "sim/"), False),
    ],
)
def test_every_model_of_a_provider_is_a_star(
    start: str, models: tuple[str, ...] | None, *, all_of_them: bool
) -> None:
    assert Caller("a", models=models).may_ask_all(start) == all_of_them
