"""Paths that are not there: 404 below `/v1`, with the path that a wrong base URL should have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import openai
import pytest
from openai import AsyncOpenAI

from tests.support.raw import Raw

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.support.server import RunningServer

METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "QUERY")


async def message_of(server: RunningServer, method: str, path: str) -> tuple[int, str]:
    async with Raw(server) as raw:
        await raw.send(f"{method} {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        answer = await raw.answer()
        return answer.status, answer.json()["error"]["message"]


async def test_an_unknown_path_below_v1_is_404_by_every_method(server: RunningServer) -> None:
    for path in [
        *("/v1", "/v1/", "/v1/files", "/v1/nothing", "/v1/organization/users", "/v1/batches"),
        *("/v1/chat", "/v1/chat/completions/x", "/v1/responses/", "/v1/messages/", "/v1/%2e%2e"),
    ]:
        for method in METHODS:
            assert (await message_of(server, method, path))[0] == 404, method


async def test_a_path_that_only_matches_as_an_id_is_404(server: RunningServer) -> None:
    for method, path in [
        *(("POST", "/v1/responses/compact/x"), ("POST", "/v1/responses/x")),
        *(("POST", "/v1/models/x"), ("DELETE", "/v1/models/ft:x"), ("PUT", "/v1/responses/x")),
        ("GET", "/v1/responses/x/cancel"),
    ]:
        async with server.session.request(method, server.base + path) as response:
            assert response.status == 404, method
            assert "Allow" not in response.headers, method
            error = (await response.json())["error"]
        assert error["code"] == "not_found", method
        assert f"{method}: {path}" in error["message"], method


async def test_a_path_that_is_there_is_405_by_another_method(server: RunningServer) -> None:
    for path in [
        "/v1/chat/completions",
        "/v1/embeddings",
        "/v1/responses",
        "/v1/moderations",
        "/v1/audio/x",
    ]:
        async with server.session.get(server.base + path) as response:
            assert response.status == 405, path
            assert response.headers["Allow"] == "POST", path


async def test_the_message_names_the_path_of_a_right_base_url(server: RunningServer) -> None:
    calls: list[tuple[str, Callable[[AsyncOpenAI], Awaitable[Any]]]] = [
        ("chat/completions", lambda sdk: sdk.chat.completions.create(model="sim", messages=[])),
        ("embeddings", lambda sdk: sdk.embeddings.create(model="sim", input="x")),
        ("responses", lambda sdk: sdk.responses.create(model="sim", input="x")),
        ("models/sim", lambda sdk: sdk.models.retrieve("sim")),
        ("responses/r/cancel", lambda sdk: sdk.responses.cancel("r")),
    ]
    for prefix in ("", "/v1/v1", "/api/v1", "/api", "/openai/v1", "/v1/chat/completions"):
        base_url = server.base + prefix
        async with AsyncOpenAI(api_key="unused", base_url=base_url, max_retries=0) as sdk:
            for path, call in calls:
                with pytest.raises(openai.NotFoundError) as caught:
                    await call(sdk)
                assert isinstance(caught.value.body, dict)
                message = caught.value.body["message"]
                method = "GET" if "models" in path else "POST"
                assert f"path for {method}: {prefix}/{path};" in message
                assert message.endswith(
                    f"; the base URL must end in /v1, so that the path is /v1/{path}"
                )


async def test_a_slash_too_many_and_azures_path_are_wrong_base_urls(server: RunningServer) -> None:
    for path in [
        "/v1//chat/completions",
        "//v1/chat/completions",
        "/v1/chat/completions/",
        "/openai/deployments/gpt-4o/chat/completions",
    ]:
        status, message = await message_of(server, "POST", path)

        assert status == 404, path
        assert message.endswith("so that the path is /v1/chat/completions"), path


async def test_another_path_is_no_wrong_base_url(server: RunningServer) -> None:
    for path in [
        "/nothing",
        "/v1/nothing",
        "/" + "a/" * 3000 + "models",
        "/a/b/c/d/e/models",
        "/%ED%A0%80",
    ]:
        for method in ("GET", "POST"):
            status, message = await message_of(server, method, path)
            assert status == 404, path
            assert "base URL" not in message, path
            assert len(message) < 300, path
