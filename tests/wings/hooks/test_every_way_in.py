"""Every way to a provider, with a closed hook on it: what the hook refuses goes to no provider, in
whatever form it would.
"""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import uuid4

import aiohttp
import pytest

from tests.support.chat import chat, to_end
from tests.support.hook_program import entry, hook_program, refuse
from tests.support.responses import connect, create
from tests.support.responses import to_end as to_response_end
from tests.support.server import QUICK
from tests.support.simulator import Behaviour
from tests.support.waiting import until, until_result

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.support.server import MakeServer, RunningServer

WORD = "the-forbidden-word"
FORGETFUL = Behaviour(ttft=0, interval=0, forgets=(404, "Response with id 'x' not found."))
NATIVE: dict[str, Any] = {}
BRIDGED: dict[str, Any] = {"llm.providers.sim.responses": False}
MESSAGES: dict[str, Any] = {"llm.providers.sim.messages": True}
MESSAGES_BRIDGED: dict[str, Any] = {"llm.providers.sim.messages": "bridge"}
PASSED: dict[str, Any] = {"llm.providers.sim.account_paths": True}


class Way(NamedTuple):
    """A way in: *ask* says a text; after *begin*, which has said the word, any text brings it."""

    ask: Callable[..., Awaitable[Any]]
    begin: Callable[..., Awaitable[Any]] | None = None
    changes: dict[str, Any] = NATIVE
    behaviour: Behaviour = QUICK


async def post(server: RunningServer, path: str, body: Any) -> Any:
    kind = {"data" if isinstance(body, aiohttp.FormData | bytes) else "json": body}
    if isinstance(body, bytes):
        kind["headers"] = {"Content-Type": "application/json"}
    async with server.session.post(f"{server.base}{path}", **kind) as response:
        content = await response.read()
        is_json = response.content_type == "application/json"
        return json.loads(content) if is_json else content


def posted(path: str, **body: Any) -> Callable[[RunningServer, str, Any], Awaitable[Any]]:
    """A way by HTTP; `TEXT` in *body* stands for what is said, PREVIOUS for what goes before."""

    async def ask(server: RunningServer, text: str, previous: Any = None) -> Any:
        filled = json.dumps({"model": "m", **body}).replace("TEXT", text)
        return await post(server, path, json.loads(filled.replace("PREVIOUS", str(previous))))

    return ask


def messages_of(text: str = "TEXT") -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


async def over_websocket(server: RunningServer, text: str, previous: Any = None) -> Any:
    more = {} if previous is None else {"conversation_id": previous}
    async with server.connect() as ws:
        await ws.send_json(chat(uuid4().hex, text, **more))
        await to_end(ws)


async def over_sse(server: RunningServer, text: str, previous: Any = None) -> Any:
    more = {} if previous is None else {"conversation_id": previous}
    await post(server, "/sse/chat", {"request_id": uuid4().hex, "text": text, **more})


async def said_in_conversation(server: RunningServer) -> str:
    name = uuid4().hex
    await over_websocket(server, f"{WORD} in {name}", name)
    return name


async def said_as_response(server: RunningServer) -> str:
    body = {"model": "m", "input": WORD}
    return str((await post(server, "/v1/responses", body))["id"])


class Lane:
    """A WebSocket of responses, on which the last one is continued."""

    def __init__(self, **first: Any) -> None:
        self._first = first

    async def begin(self, server: RunningServer) -> Any:
        socket = await connect(server)
        await socket.send_json(create(WORD, model="m", **self._first))
        end = (await to_response_end(socket))[-1]
        assert end["type"] == "response.completed"
        return [socket, end["response"]["id"]]

    @staticmethod
    async def ask(server: RunningServer, text: str, previous: Any = None) -> Any:
        if previous is None:
            async with connect(server) as socket:
                await socket.send_json(create(text, model="m"))
                return await to_response_end(socket)
        socket, name = previous
        await socket.send_json(create(text, model="m", previous_response_id=name))
        end = (await to_response_end(socket))[-1]
        if "response" in end:
            # A lane holds the last one alone.
            previous[1] = end["response"]["id"]
        return end


async def prepared_twice(server: RunningServer) -> Any:
    """The word in the first of two responses for which nothing was generated."""
    socket, name = await Lane(generate=False).begin(server)
    frame = create("more", model="m", previous_response_id=name, generate=False)
    await socket.send_json(frame)
    return [socket, (await to_response_end(socket))[-1]["response"]["id"]]


async def in_a_form(server: RunningServer, text: str, _previous: Any = None) -> Any:
    form = aiohttp.FormData()
    form.add_field("model", "m")
    form.add_field("prompt", text)
    form.add_field("file", b"sound", filename="a.wav")
    await post(server, "/v1/audio/transcriptions", form)


async def in_a_long_body(server: RunningServer, text: str, _previous: Any = None) -> Any:
    most = server.settings.chat.websocket.max_message_size
    body = json.dumps({"model": "m", "input": text, "more": "x" * most}).encode()
    await post(server, "/v1/moderations", body)


async def attempts(server: RunningServer) -> int:
    """How often providers were asked for anything."""
    return sum((await server.counted("provider_attempts", "provider")).values())


CONTINUED = posted("/v1/responses", input="TEXT", previous_response_id="PREVIOUS")
CONTINUED_STREAM = posted(
    "/v1/responses", input="TEXT", previous_response_id="PREVIOUS", stream=True
)
CONTINUED_LATER = posted(
    "/v1/responses", input="TEXT", previous_response_id="PREVIOUS", background=True
)
WAYS: dict[str, Way] = {
    "websocket": Way(over_websocket),
    "websocket, history": Way(over_websocket, said_in_conversation),
    "sse": Way(over_sse),
    "sse, history": Way(over_sse, said_in_conversation),
    "chat completion": Way(posted("/v1/chat/completions", messages=messages_of())),
    "chat completion, streamed": Way(
        posted("/v1/chat/completions", messages=messages_of(), stream=True)
    ),
    "completion": Way(posted("/v1/completions", prompt="TEXT")),
    "embedding": Way(posted("/v1/embeddings", input="TEXT")),
    "moderation, passed on": Way(posted("/v1/moderations", input="TEXT")),
    "form, passed on": Way(in_a_form),
    "long body, passed on": Way(in_a_long_body, changes={"chat.websocket.max_message_size": 4096}),
    "batch, passed on": Way(posted("/v1/batches", input_file_id="TEXT"), changes=PASSED),
    "compact": Way(posted("/v1/responses/compact", input="TEXT")),
    "input tokens": Way(posted("/v1/responses/input_tokens", input="TEXT")),
    "message": Way(posted("/v1/messages", messages=messages_of(), max_tokens=9), changes=MESSAGES),
    "message, bridged": Way(
        posted("/v1/messages", messages=messages_of(), max_tokens=9), changes=MESSAGES_BRIDGED
    ),
    "count of tokens": Way(
        posted("/v1/messages/count_tokens", messages=messages_of()), changes=MESSAGES
    ),
}
for kind, changes, behaviour in (
    ("native", NATIVE, QUICK),
    ("forgetful", NATIVE, FORGETFUL),
    ("bridged", BRIDGED, QUICK),
):
    responses: dict[str, Way] = {
        "response": Way(posted("/v1/responses", input="TEXT")),
        "response in the background": Way(posted("/v1/responses", input="TEXT", background=True)),
        "response on a lane": Way(Lane.ask),
        "continuation": Way(CONTINUED, said_as_response),
        "continuation, streamed": Way(CONTINUED_STREAM, said_as_response),
        "continuation in the background": Way(CONTINUED_LATER, said_as_response),
        "continuation on a lane": Way(Lane.ask, Lane().begin),
        "continuation on a lane, kept there alone": Way(Lane.ask, Lane(store=False).begin),
        "prepared": Way(Lane.ask, Lane(generate=False).begin),
        "prepared twice": Way(Lane.ask, prepared_twice),
    }
    for name, way in responses.items():
        WAYS[f"{name}, {kind}"] = way._replace(changes=changes, behaviour=behaviour)


def together() -> dict[str, list[str]]:
    """The names of the ways that need the same server, by the first of them."""
    servers: list[list[str]] = []
    for name, way in WAYS.items():
        for names in servers:
            first = WAYS[names[0]]
            if (first.changes, first.behaviour) == (way.changes, way.behaviour):
                names.append(name)
                break
        else:
            servers.append([name])
    return {names[0]: names for names in servers}


SERVERS = together()


@pytest.mark.real_time
@pytest.mark.parametrize("first", SERVERS)
async def test_what_a_closed_hook_refuses_goes_to_no_provider_by_any_way(
    make_server: MakeServer, first: str
) -> None:
    refusing = False

    async def decide(asked: Any) -> Any:
        bad = WORD in json.dumps(asked["body"])
        return refuse() if refusing and bad else {}

    async with hook_program(decide=decide) as program:
        changes = WAYS[first].changes
        server = await make_server(WAYS[first].behaviour, hooks=[entry(program)], **changes)
        for number, name in enumerate(SERVERS[first]):
            way, refusing = WAYS[name], False
            # What a hook cannot see passes an open one only.
            unseen = name in {"form, passed on", "long body, passed on"}
            if unseen:
                assert await server.change(hooks=[entry(program, fail="open")], **changes)
            previous = None if way.begin is None else await way.begin(server)
            text = f"{WORD} {number}" if way.begin is None else f"more {number}"

            before = await attempts(server)
            await way.ask(server, text, previous)
            # One in the background goes on when its client has its answer.
            await until_result(partial(attempts, server), lambda count: count > before)  # noqa: B023
            await until(lambda: not server.held()["running"])
            refusing = True
            if unseen:
                assert await server.change(hooks=[entry(program)], **changes)
            before, shown = await attempts(server), len(program.requests)
            await way.ask(server, f"{text} again", previous)

            await until(lambda: not server.held()["running"])
            assert await attempts(server) == before, name
            assert unseen or len(program.requests) == shown + 1, name
            if isinstance(previous, list):
                await previous[0].close()
            await server.nothing_held()


@pytest.mark.real_time
@pytest.mark.parametrize(
    ("changes", "behaviour"),
    [(NATIVE, QUICK), (NATIVE, FORGETFUL), (BRIDGED, QUICK)],
    ids=["native", "forgetful", "bridged"],
)
@pytest.mark.parametrize("generate", [True, False], ids=["answered", "prepared"])
async def test_what_a_hook_changes_in_a_conversation_stays_changed(
    make_server: MakeServer,
    changes: dict[str, Any],
    behaviour: Behaviour,
    *,
    generate: bool,
) -> None:
    changing = False

    async def decide(asked: Any) -> Any:
        body = json.dumps(asked["body"])
        changed = json.loads(body.replace(WORD, "***"))
        return {"body": changed} if changing and WORD in body else {}

    async with hook_program(decide=decide) as program:
        server = await make_server(behaviour, hooks=[entry(program)], **changes)
        first = {} if generate else {"generate": False}
        previous = await Lane(**first).begin(server)
        changing = True
        for text in ("second", "third"):
            end = await Lane.ask(server, text, previous)
            assert end["type"] == "response.completed"
        await previous[0].close()

        second, third = (questions(asked["body"]) for asked in program.requests[-2:])
        assert second == [WORD, "second"]
        assert third == ["***", "second", "third"]
        asked = [questions(body) for body in server.simulator.bodies]
        assert asked[int(generate)] == ["***", "second"]
        # What made the second one keeps it, and goes on with it by its id, if it keeps any.
        by_id = [["third"]] if behaviour is FORGETFUL or not changes else []
        whole = [third] if behaviour is FORGETFUL or changes else []
        assert asked[1 + int(generate) :] == by_id + whole
        await server.nothing_held()


def questions(body: dict[str, Any]) -> list[str]:
    """What the user says in *body*, of a response or a chat completion."""
    said = body.get("messages") or body["input"]
    if isinstance(said, str):
        return [said]
    texts: list[str] = []
    for item in said:
        content = item.get("content")
        if item.get("role") == "user":
            text = content if isinstance(content, str) else content[0]["text"]
            # A bridge joins what nobody has answered.
            texts += text.split("\n\n")
    return texts
