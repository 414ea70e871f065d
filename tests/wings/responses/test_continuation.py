"""Refusals of a request that continues a response, as engines and proxies write them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from aioserver.config.settings import Provider
from aioserver.wings.responses.attempt import MAX_READ, ResponsesCapabilities
from tests.support.scripted_provider import LIMITS


def learned() -> ResponsesCapabilities:
    base_url = "http://127.0.0.1:9/v1"
    return ResponsesCapabilities(
        Provider(name="sim", base_url=base_url, model="m", http_client=LIMITS)
    )


def error(message: str, **fields: Any) -> bytes:
    return json.dumps({"error": {"message": message, **fields}}).encode()


# A response is not there: that says nothing of others.
MISSING = [
    (404, error("Response with id 'resp_1' not found.", code=404)),
    (400, error("Previous response with id 'resp_1' not found.", code="x")),
    (400, error("not there", param="previous_response_id")),
    (404, b'{"error": "no response found for resp_1"}'),
]
# None is there, ever.
UNSUPPORTED = [
    (400, error("llama.cpp does not support 'previous_response_id'.", code=400)),
    (400, error("previous_response_id is not supported; send the full conversation in input")),
    (400, b'{"detail":"Unsupported parameter: previous_response_id"}'),
    (
        422,
        b'{"detail":[{"loc":["body","previous_response_id"],"msg":"Extra inputs are not permitted"}]}',
    ),
    (501, error("previous_response_id")),
    (400, b"unknown field previous_response_id"),
]
OTHERS = [
    (404, error("The model `m` does not exist", code="model_not_found")),
    (400, error("Unsupported parameter: temperature", param="temperature")),
    (401, error("previous_response_id is not supported")),
    (500, error("Previous response with id 'resp_1' not found.")),
    (404, b"<html>404</html>"),
    (400, b"[" * 10_000),
    (400, b"\xff\xfe"),
    (400, error("previous_response_id is not supported" + "x" * MAX_READ)),
]


@pytest.mark.parametrize(("status", "body"), [*MISSING, *UNSUPPORTED])
def test_a_provider_that_refuses_a_response_of_its_own_keeps_none(
    status: int, body: bytes
) -> None:
    capabilities = learned()

    assert capabilities.learn(status, body, previous_id="resp_1", by_id=True)
    assert not capabilities.keeps


@pytest.mark.parametrize(("status", "body"), MISSING)
def test_that_another_response_is_missing_says_nothing(status: int, body: bytes) -> None:
    capabilities = learned()

    assert not capabilities.learn(status, body, previous_id="resp_1", by_id=False)
    assert capabilities.keeps


@pytest.mark.parametrize(("status", "body"), UNSUPPORTED)
def test_a_provider_that_continues_nothing_says_so_of_any_response(
    status: int, body: bytes
) -> None:
    capabilities = learned()

    assert not capabilities.learn(status, body, previous_id="resp_1", by_id=False)
    assert not capabilities.keeps


@pytest.mark.parametrize(("status", "body"), OTHERS)
def test_another_refusal_is_none_of_a_continuation(status: int, body: bytes) -> None:
    capabilities = learned()

    assert not capabilities.learn(status, body, previous_id="resp_1", by_id=True)
    assert capabilities.keeps


@pytest.mark.parametrize(
    ("message", "previous_id"),
    [
        # The words are those of a client.
        ("Previous response with id 'resp_unsupported' not found.", "resp_unsupported"),
        ("Unknown parameter: 'no_previous_response_id'.", "resp_1"),
        ("previous_response_id is not supported", None),
    ],
)
def test_a_refusal_that_a_client_has_worded_says_nothing_of_the_provider(
    message: str, previous_id: str | None
) -> None:
    capabilities = learned()

    assert not capabilities.learn(400, error(message), previous_id=previous_id, by_id=False)
    assert capabilities.keeps
