"""`POST /v1/responses/compact`: a conversation becomes a summary, which later turns have in its
place.
"""

from __future__ import annotations

import base64
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import openai
import orjson
import pytest
from openai.types.responses import CompactedResponse

from tests.support.keys import bearer, keys_of
from tests.support.response_events import check_shape
from tests.support.server import QUICK

if TYPE_CHECKING:
    from openai import AsyncOpenAI

    from tests.support.server import MakeServer, RunningServer

BRIDGED = {"llm.providers.sim.responses": False}
SAID: list[Any] = [
    {"type": "message", "role": "user", "content": "We launch on Tuesday."},
    {"type": "message", "role": "assistant", "content": "Understood."},
]


@pytest.fixture
async def server(make_server: MakeServer) -> RunningServer:
    return await make_server(QUICK, **BRIDGED)


async def compact(server: RunningServer, body: Any, **headers: str) -> tuple[int, Any]:
    url = f"{server.v1}/responses/compact"
    async with server.session.post(url, json=body, headers=headers) as response:
        return response.status, orjson.loads(await response.read())


def last_messages(server: RunningServer) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = server.simulator.bodies[-1]["messages"]
    return messages


@pytest.mark.parametrize("changes", [BRIDGED, {**BRIDGED, **keys_of("ann")}])
async def test_the_summary_of_a_conversation_stands_for_it_in_the_next_turn(
    make_server: MakeServer, changes: dict[str, Any]
) -> None:
    server = await make_server(QUICK, **changes)
    headers = bearer("ann") if "auth.keys" in changes else {}

    status, answer = await compact(
        server, {"model": "m", "input": SAID, "instructions": "Be brief."}, **headers
    )

    assert status == 200
    check_shape(CompactedResponse, answer)
    asked = last_messages(server)
    assert asked[0] == {"role": "system", "content": "Be brief."}
    assert [message["content"] for message in asked[1:3]] == [
        "We launch on Tuesday.",
        "Understood.",
    ]
    assert "summary" in asked[3]["content"]
    assert answer["usage"]["output_tokens"] > 0
    (item,) = answer["output"]
    summary = base64.b64decode(item["encrypted_content"].rpartition(":")[2]).decode()

    question = {"type": "message", "role": "user", "content": "When?"}
    async with server.session.post(
        f"{server.v1}/responses", json={"model": "m", "input": [item, question]}, headers=headers
    ) as response:
        assert response.status == 200

    (told,) = last_messages(server)
    assert told["role"] == "user"
    assert told["content"].endswith(f"{summary}\n\nWhen?")
    await server.nothing_held()


async def test_a_conversation_is_compacted_that_is_known_by_its_response(
    server: RunningServer, sdk: AsyncOpenAI
) -> None:
    first = await sdk.responses.create(model="m", input="We launch on Tuesday.")

    answer = await sdk.responses.compact(model="m", previous_response_id=first.id)

    assert [item.type for item in answer.output] == ["compaction"]
    contents = [message["content"] for message in last_messages(server)]
    assert contents[:2] == ["We launch on Tuesday.", first.output_text]
    with pytest.raises(openai.BadRequestError) as caught:
        await sdk.responses.compact(model="m", previous_response_id="resp_none")
    assert caught.value.code == "previous_response_not_found"


async def test_a_provider_with_responses_compacts_by_itself(make_server: MakeServer) -> None:
    server = await make_server(QUICK)
    async with server.session.post(
        f"{server.v1}/responses", json={"model": "m", "input": "Hello"}
    ) as response:
        assert response.status == 200

    status, answer = await compact(server, {"model": "m", "input": SAID})

    # The simulated provider has no such path.
    assert (status, answer["error"]["message"]) == (
        404,
        "Invalid URL (POST /v1/responses/compact)",
    )


async def test_the_model_is_asked_where_the_path_is_found_to_be_missing(
    make_server: MakeServer,
) -> None:
    server = await make_server(replace(QUICK, responses=False))

    for _ in range(2):
        status, answer = await compact(server, {"model": "m", "input": SAID})

        assert (status, answer["object"]) == (200, "response.compaction")
    paths = [request.path.removeprefix("/v1/") for request in server.simulator.requests]
    assert paths == ["chat/completions", "chat/completions"]
    await server.nothing_held()


@pytest.mark.parametrize("body", [{"input": SAID}, {"model": 7, "input": SAID}, [], {"model": ""}])
async def test_what_names_no_model_is_refused(server: RunningServer, body: Any) -> None:
    status, answer = await compact(server, body)

    assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
    assert not server.simulator.requests
    await server.nothing_held()


@pytest.mark.parametrize(
    "content",
    ["", "gAAAAAB", "aioserver:1:", "aioserver:1:%%", "aioserver:1:/w==", "aioserver:2:eA=="],
)
async def test_an_item_that_was_not_made_here_is_refused_by_name(
    server: RunningServer, content: str
) -> None:
    item = {"type": "compaction", "id": "cmp_1", "encrypted_content": content}

    async with server.session.post(
        f"{server.v1}/responses", json={"model": "m", "input": [item, *SAID]}
    ) as response:
        error = orjson.loads(await response.read())["error"]

    if content == "aioserver:1:":
        assert response.status == 200
        return
    assert (response.status, error["param"]) == (400, "input[0].type")
    assert not server.simulator.requests


async def test_a_model_without_a_summary_is_a_fault_of_its_provider(server: RunningServer) -> None:
    status, answer = await compact(server, {"model": "fault-empty", "input": SAID})

    assert (status, answer["error"]["code"]) == (502, "provider_bad_response")
    await server.nothing_held()
