"""Faults made of what a provider says."""

from __future__ import annotations

import pytest

from aioserver.provider_errors import ProviderRefused
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
