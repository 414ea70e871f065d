"""Anthropic's Messages API: whose answers have its form, and how errors look in it."""

from __future__ import annotations

import json

import pytest

from aioserver import errors, provider_errors
from aioserver.errors import AioserverError, ServerAtCapacity
from aioserver.provider_errors import ProviderRefused
from aioserver.wings.anthropic import wire as anthropic

VERSION = {"anthropic-version": "2023-06-01"}


@pytest.mark.parametrize(
    ("path", "headers", "expected"),
    [
        ("/v1/messages", {}, True),
        ("/v1/messages/count_tokens", {}, True),
        ("/v1/messages/", {}, True),
        ("/v1/messages\n", {}, False),
        ("/v1/messagesx", {}, False),
        ("/v1/models", {}, False),
        ("/v1/models", VERSION, True),
        ("/v1/files", VERSION, True),
        ("/sse/chat", VERSION, False),
        ("/", VERSION, False),
    ],
)
def test_a_client_is_known_by_its_path_or_its_version(
    path: str, headers: dict[str, str], expected: bool
) -> None:
    assert anthropic.speaks(path, headers) == expected


@pytest.mark.parametrize(
    "cls",
    [
        cls
        for cls in provider_errors.subclasses(AioserverError)
        if not issubclass(cls, ProviderRefused)
    ],
    ids=lambda cls: cls.__name__,
)
def test_each_error_has_its_form_and_a_type_that_fits_its_status(
    cls: type[AioserverError],
) -> None:
    error = cls("what happened")

    body = json.loads(anthropic.error_body(error, "r1"))

    assert body["type"] == "error"
    assert body["request_id"] == "r1"
    assert body["error"]["message"] == "what happened"
    assert body["error"]["code"] == error.code
    status = anthropic.http_status(error)
    assert status == (529 if error.status == 503 else error.status)
    kind = body["error"]["type"]
    assert kind in {*anthropic.STATUSES, "api_error"}
    assert anthropic.STATUSES.get(kind, status) == status or kind == "invalid_request_error"
    assert (kind == "invalid_request_error") <= (status < 500)


def test_what_the_provider_has_said_passes_with_its_status() -> None:
    error = ServerAtCapacity("ours")
    error.provider_answer = 418, b"theirs"

    assert anthropic.http_status(error) == 418
    assert anthropic.error_body(error, "r1") == b"theirs"
    assert error.size == len(error.body()) + 6
    assert errors.ServerAtCapacity("ours").provider_answer is None


@pytest.mark.parametrize(
    ("metadata", "user"),
    [
        (b"", ""),
        (b"{", ""),
        (b"null", ""),
        (b"[]", ""),
        (b"{}", ""),
        (b'{"user_id": 7}', ""),
        (b'{"user_id": "u"}', "u"),
    ],
)
def test_the_user_is_that_of_the_metadata(metadata: bytes, user: str) -> None:
    assert anthropic.user_of(metadata) == user
