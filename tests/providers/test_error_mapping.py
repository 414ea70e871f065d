"""Faults made of what a provider says."""

from __future__ import annotations

import json

import pytest

from aioserver.provider_errors import ContextTooLong, ProviderError, ProviderRefused
from aioserver.providers.error_mapping import MAX_REASON, check_status, error_object_fault


@pytest.mark.parametrize("code", [400, 500])
def test_the_half_of_a_character_in_an_error_can_be_written(code: int) -> None:
    fault = error_object_fault({"code": code, "message": "you said \ud83d"})

    assert b"you said ?" in fault.body()
    assert str(fault.as_chunk()["error"]).encode()


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b'{"error": {"message": "no such model", "code": "model_not_found"}}', "no such model"),
        (b'{"error": "no such model"}', "no such model"),
        (b'{"object": "error", "message": "no such model", "code": 404}', "no such model"),
        (b'[{"error": {"message": "no such model", "status": "NOT_FOUND"}}]', "no such model"),
        (b'{"error": {"message": "%b"}}' % (b"x" * 2000), "x" * MAX_REASON),
        (b'{"error": {"message": ""}}', ""),
        (b'{"error": {"message": ["a"]}}', ""),
        (b'{"detail": [{"loc": ["body"]}]}', ""),
        (b"[]", ""),
        (b"7", ""),
        (b"null", ""),
        (b"<html>a page of a proxy</html>", ""),
        # Of our key nothing is shown.
        (b'{"error": {"message": "sk-1234 is wrong", "code": "invalid_api_key"}}', ""),
        (b'{"error": {"message": "API key not valid: sk-1234", "code": 400}}', ""),
    ],
)
@pytest.mark.parametrize("status", [400, 404, 407, 413, 422])
def test_a_refusal_is_shown_with_its_reason_and_logged_without(
    status: int, body: bytes, reason: str
) -> None:
    with pytest.raises(ProviderRefused) as caught:
        check_status("p", status, {}, body)

    shown = f": {reason}" if reason and status != 407 else ""
    assert caught.value.as_chunk()["error"] == f"p answered {status}{shown}"
    assert caught.value.as_object()["message"] == f"p answered {status}{shown}"
    assert str(caught.value) == f"p answered {status}"


@pytest.mark.parametrize(
    ("status", "body", "too_long"),
    [
        (400, b'{"error": {"message": "no", "code": "context_length_exceeded"}}', True),
        (400, b'{"error": {"message": "no", "type": "exceed_context_size_error"}}', True),
        (422, b'{"error": {"message": "no", "code": "context_length_exceeded"}}', True),
        (
            400,
            b'{"object": "error", "message": "The maximum context length is 9", "code": 400}',
            True,
        ),
        (400, b'[{"error": {"message": "longer than the model\\u0027s Context Length"}}]', True),
        (
            400,
            b'{"error": {"type": "invalid_request_error", "message": "prompt is too long: 9 > 8"}}',
            True,
        ),
        (413, b'{"error": "exceeds the available context size"}', True),
        (413, b"prompt is too long", True),
        # Another status, another code, and what is too long to be an error.
        (404, b'{"error": {"message": "prompt is too long"}}', False),
        (413, b'{"error": {"message": "the body is too large"}}', False),
        (400, b'{"error": {"message": "no", "code": "context_length"}}', False),
        (400, b'{"error": null}', False),
        (400, b"null", False),
        (400, b'{"error": {"message": "prompt is too long%b"}}' % (b" " * 65_536), False),
    ],
)
def test_a_request_that_is_too_long_for_the_model_is_known(
    status: int, body: bytes, too_long: bool
) -> None:
    with pytest.raises(ProviderRefused) as caught:
        check_status("p", status, {}, body)

    assert isinstance(caught.value, ContextTooLong) == too_long
    assert caught.value.failover == too_long
    assert not caught.value.retry
    assert not caught.value.breaker_failure
    if body.startswith((b"{", b"[")):
        assert caught.value.body() == body


@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        ({"message": "no", "code": "context_length_exceeded"}, ContextTooLong, "context_length"),
        (
            {"message": "no", "code": 400, "type": "exceed_context_size_error"},
            ContextTooLong,
            "ex",
        ),
        ({"message": "the maximum context length is 9", "code": 400}, ContextTooLong, "400"),
        ("the maximum context length is 9", ContextTooLong, "400"),
        ({"message": "the maximum context length is 9", "code": 500}, ProviderError, ""),
        ({"message": "no", "code": 400}, ProviderRefused, "400"),
    ],
)
def test_so_is_one_that_an_event_says(error: object, kind: type, code: str) -> None:
    fault = error_object_fault(error)

    assert type(fault) is kind
    if isinstance(fault, ProviderRefused):
        assert str(json.loads(fault.body())["error"]["code"]).startswith(code)
