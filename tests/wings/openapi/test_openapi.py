"""`/openapi.json` says what is there: each path and method in it is served, and each route of ours
is in it, or left out with a reason.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jsonschema
import pytest

from aioserver import __version__, provider_errors
from aioserver.auth.guard import Policy
from aioserver.errors import AioserverError
from aioserver.protocol import client_frames
from aioserver.wings.openapi import document
from tests.support.keys import bearer, keys_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.server import MakeServer, RunningServer

PLACES = {"chat.websocket.endpoint": "/own/socket", "chat.sse.endpoint": "/own/sse"}


async def description(server: RunningServer, **headers: str) -> Any:
    async with server.session.get(f"{server.base}/openapi.json", headers=headers) as response:
        assert response.status == 200
        assert response.headers["Cache-Control"] == "no-cache"
        return await response.json()


async def test_each_path_and_method_is_served(make_server: MakeServer) -> None:
    open_to_admins = {"llm.providers.sim.account_paths": True}
    server = await make_server(**PLACES, **open_to_admins, **keys_of("root"))
    described = await description(server)
    bodies = {"/v1/{path}": {"model": "m", "input": "Hello"}, "/session": {"key": "none"}}
    asked = 0

    for path, methods in described["paths"].items():
        url = path.replace("{path}", "moderations").replace("{request_id}", "none")
        for method, operation in methods.items():
            asked += 1
            if path == "/events":
                async with server.session.get(server.base + path, headers=bearer("root")) as got:
                    assert got.status == 200
                continue
            if operation.get("x-websocket"):
                async with server.session.ws_connect(server.base + url, headers=bearer("root")):
                    continue
            address = server.base + url.replace("{id}", "none")
            if path == "/v1/{path}" and method != "post":
                address = f"{server.v1}/files/none"
            body = bodies.get(path, {"model": "m"}) if method == "post" else None
            async with server.session.request(
                method, address, json=body, headers=bearer("root")
            ) as response:
                text = await response.text()
                assert response.status != 405, (method, path)
                if response.status == 404 and path != "/v1/{path}":
                    # Of a thing, and not of the path.
                    assert '"not_found"' not in text, (method, path, text)

    assert asked > 30
    assert {"/own/socket", "/own/sse", "/own/sse/{request_id}", "/v1/{path}"} <= set(
        described["paths"]
    )


async def test_each_route_stands_in_it_or_is_left_out_with_a_reason(
    make_server: MakeServer,
) -> None:
    server = await make_server()
    described = await description(server)
    policies = server.context.guard.policies
    used = set()

    for route in server.app.router.routes():
        if route.method == "HEAD":
            continue
        assert route.resource is not None
        path = route.resource.canonical
        left_out = next((start for start in document.LEFT_OUT if path.startswith(start)), None)
        if left_out is not None:
            used.add(left_out)
            assert path not in described["paths"]
            continue
        operation = described["paths"][path][route.method.lower()]
        assert (operation["security"] == []) is (policies[route] is Policy.OPEN)
        assert operation.get("x-websocket", False) is (route in server.context.guard.websockets)
        assert operation["summary"] != path, "each has its sentence"

    assert used == set(document.LEFT_OUT)
    known = {
        (method.upper(), path)
        for path, methods in described["paths"].items()
        for method in methods
    }
    words = {"WS": "/ws/chat", "SSE": "/sse/chat"}
    for method, path in document.OPERATIONS:
        first, slash, rest = path.partition("/")
        assert (method, words.get(first, first) + slash + rest) in known, (
            "none is described for nothing"
        )


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for name, inner in value.items():
            if name == "$ref":
                yield inner
            else:
                yield from references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from references(inner)


async def test_its_components_are_those_of_the_code(server: RunningServer) -> None:
    described = await description(server)
    components = described["components"]

    assert described["openapi"].startswith("3.1.")
    assert described["info"]["version"] == __version__
    codes = {error.code for error in provider_errors.subclasses(AioserverError)}
    assert set(components["responses"]) == codes
    error = components["schemas"]["Error"]["properties"]["error"]["properties"]
    assert set(error["code"]["examples"]) == codes
    assert tuple(components["schemas"]["Payload"]["properties"]) == client_frames.PAYLOAD_FIELDS
    assert set(components["schemas"]["Frame"]["required"]) == {"status", "chunk"}
    for reference in references(described):
        kind, name = reference.removeprefix("#/components/").split("/")
        assert name in components[kind]


async def test_a_client_that_has_it_gets_304(make_server: MakeServer) -> None:
    server = await make_server(**keys_of("web"))
    url = f"{server.base}/openapi.json"
    async with server.session.get(url) as first:
        tag = first.headers["ETag"]
        body = await first.read()

    async with server.session.get(url, headers={"If-None-Match": tag}) as again:
        assert (again.status, await again.read()) == (304, b"")
    async with server.session.get(url, headers={"If-None-Match": '"other"'}) as other:
        assert (other.status, await other.read()) == (200, body)
    async with server.session.head(url) as head:
        assert head.status == 200


@pytest.mark.parametrize("path", ["/docs", "/redoc"])
async def test_any_viewer_opens_it_and_none_is_served(server: RunningServer, path: str) -> None:
    async with server.session.get(server.base + path) as response:
        assert response.status == 404


# Method, path, body, and the status of the answer.
REQUESTS: list[tuple[str, str, dict[str, Any] | None, int]] = [
    ("post", "/v1/chat/completions", {"model": "m"}, 400),
    ("post", "/v1/chat/completions", {"model": ""}, 400),
    ("post", "/v1/responses", {"model": "m"}, 400),
    ("post", "/v1/messages", {"model": "m"}, 400),
    ("post", "/v1/messages/count_tokens", {"model": ""}, 400),
    ("get", "/sse/chat/{request_id}", None, 404),
    ("delete", "/sse/chat/{request_id}", None, 404),
    ("post", "/sse/chat", {"text": "Hello"}, 400),
    ("post", "/sse/chat", {"request_id": "r", "text": "Hello", "hold": None}, 200),
    ("post", "/sse/chat", {"request_id": "r", "text": "a", "messages": []}, 400),
    ("post", "/sse/chat", {"request_id": "r" * 257, "text": "Hello"}, 400),
    ("post", "/sse/chat", {"request_id": "r", "text": "", "messages": None}, 400),
    ("post", "/sse/chat", {"request_id": "r", "messages": [{}]}, 400),
    ("post", "/sse/chat", {"request_id": "r", "text": "a", "options": {"model": "m"}}, 400),
    ("post", "/sse/chat", {"request_id": "r", "text": "a", "deadline": 0}, 400),
    ("post", "/session", None, 200),
    ("delete", "/session", None, 204),
    ("delete", "/conversations/{id}", None, 404),
]


@pytest.mark.parametrize("key", [None, "root"])
async def test_the_answers_are_those_that_it_describes(
    make_server: MakeServer, key: str | None
) -> None:
    server = await make_server(**(keys_of(key) if key else {}))
    described = await description(server)
    headers = bearer(key) if key else {}
    for method, path, body, status in REQUESTS:
        operation = described["paths"][path][method]
        url = server.base + path.replace("{request_id}", "none").replace("{id}", "none")
        async with server.session.request(method, url, json=body, headers=headers) as response:
            text = await response.text()
            kind = response.content_type

        assert response.status == status, (path, body, text)
        answers = operation["responses"].get(str(status), operation["responses"]["default"])
        assert bool(text) is ("content" in answers), (path, body)
        if text:
            assert kind in answers["content"], (path, body)
        if status >= 400:
            schema = answers["content"]["application/json"]["schema"]
            jsonschema.validate(await response.json(), {**described, **schema})
        if body is None:
            assert not operation.get("requestBody", {}).get("required"), path
        elif path == "/sse/chat":
            question = {**described, "$ref": "#/components/schemas/Question"}
            valid = jsonschema.Draft202012Validator(question).is_valid(body)
            assert valid is (status == 200), body


async def test_a_key_is_optional_where_the_server_has_none(make_server: MakeServer) -> None:
    server = await make_server()
    assert {} in (await description(server))["paths"]["/stats"]["get"]["security"]
    assert await server.change(**keys_of("root"))
    assert {} not in (await description(server))["paths"]["/stats"]["get"]["security"]
    async with server.session.get(f"{server.base}/stats") as response:
        assert response.status == 401
