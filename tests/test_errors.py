"""Every error's appearance, against the table of CONTRACT 7."""

from __future__ import annotations

import itertools
import json
from typing import TYPE_CHECKING

import pytest

from aioserver import errors, provider_errors
from aioserver.errors import (
    AioserverError,
    InternalError,
    RateLimitExceeded,
    RequestConflict,
    ServerAtCapacity,
    ServerShutdown,
    TokenRefused,
    public,
)
from aioserver.provider_errors import (
    CircuitOpen,
    ProviderError,
    ProviderFault,
    ProviderRateLimited,
    ProviderRefused,
    ReadTimeout,
)
from aioserver.telemetry.outcome import Outcome

if TYPE_CHECKING:
    from collections.abc import Iterator

TABLE = {
    400: {
        *("invalid_json", "invalid_request", "previous_response_not_found"),
        *("invalid_stream_id", "websocket_stream_limit_reached"),
    },
    401: {"missing_api_key", "invalid_api_key"},
    403: {
        *("origin_not_allowed", "permission_denied", "host_not_allowed"),
        *("request_refused", "answer_refused"),
    },
    404: {
        *("not_found", "model_not_found", "stream_not_found", "conversation_not_found"),
        "request_not_found",
    },
    405: {"method_not_allowed"},
    408: {"request_timeout", "slow_client"},
    409: {"resume_gap", "request_conflict"},
    413: {"request_too_large"},
    414: {"uri_too_long"},
    415: {"unsupported_media_type"},
    417: {"expectation_failed"},
    426: {"upgrade_required"},
    429: {"rate_limit_exceeded", "concurrency_exceeded", "provider_rate_limited"},
    431: {"headers_too_large"},
    500: {"internal_error"},
    501: {"unsupported_transfer_coding"},
    502: {
        *("connect_error", "provider_disconnected", "provider_bad_response"),
        *("provider_auth_error", "provider_error"),
    },
    503: {
        *("server_at_capacity", "provider_queue_full", "provider_queue_timeout", "pool_timeout"),
        *("circuit_open", "no_provider", "server_shutdown", "history_unavailable"),
        *("instance_unavailable", "hook_unavailable", "auth_unavailable"),
    },
    504: {
        *("connect_timeout", "read_timeout", "write_timeout", "first_token_timeout"),
        "deadline_exceeded",
    },
    505: {"http_version_not_supported"},
    508: {"loop_detected"},
}
TYPES = {
    401: "authentication_error",
    403: "permission_error",
    409: "conflict_error",
    429: "rate_limit_error",
    500: "server_error",
    502: "provider_error",
    503: "service_unavailable_error",
    504: "provider_error",
    508: "provider_error",
}


def descendants(cls: type[AioserverError]) -> Iterator[type[AioserverError]]:
    for child in cls.__subclasses__():
        if child.__module__ in {errors.__name__, provider_errors.__name__}:
            yield child
            yield from descendants(child)


ALL = sorted(
    # The status and the body of a refusal are the provider's own.
    {*descendants(AioserverError)}
    - {ProviderFault, ProviderRefused, *descendants(ProviderRefused)},
    key=lambda cls: cls.__name__,
)


def test_there_are_errors_of_every_kind() -> None:
    assert len(ALL) > 25


def test_each_class_has_the_status_of_the_contract() -> None:
    for cls in ALL:
        assert cls.code in TABLE[cls.status]
        assert cls("what happened").http_status == cls.status


def test_each_body_is_openais_error_object() -> None:
    for cls in ALL:
        error = cls("what happened", param="field")

        assert json.loads(error.body()) == {
            "error": {
                "message": "what happened",
                "type": cls.kind or TYPES.get(cls.status, "invalid_request_error"),
                "param": "field",
                "code": cls.code,
            }
        }


def test_each_chunk_says_what_a_client_may_do() -> None:
    for cls in ALL:
        assert cls("what happened").as_chunk() == {
            "error": "what happened",
            "code": cls.code,
            "retryable": cls.retryable,
        }
        assert cls("what happened", retry_after=2.00049).as_chunk()["retry_after"] == 2.0


def test_each_503_says_when_to_come_back() -> None:
    for cls in ALL:
        assert ("Retry-After" in cls("what happened").headers()) == (cls.status == 503)


def test_each_close_fits_a_close_frame() -> None:
    for cls in ALL:
        assert cls.close is None or cls.close == 1000 or 1001 <= cls.close <= 1014
        assert len(cls.close_reason) <= 123
        assert cls.close is not None or not cls.close_reason


def test_each_fault_that_can_be_repeated_says_so() -> None:
    for cls in ALL:
        if issubclass(cls, ProviderFault) and cls.retry:
            assert cls.failover
            assert cls.retryable


def test_the_close_codes_are_those_of_the_contract() -> None:
    assert (ServerAtCapacity.close, ServerAtCapacity.close_reason) == (
        1013,
        b"Server at maximum capacity, try again later",
    )
    assert ServerShutdown.close == 1012
    assert errors.RequestTooLarge.close == 1009
    assert RateLimitExceeded.close == 1008


@pytest.mark.parametrize(
    ("seconds", "header"), [(0.0, "1"), (0.2, "1"), (1.4, "2"), (2.6, "3"), (60.0, "60")]
)
def test_retry_after_is_in_whole_seconds_from_1_on_and_never_too_early(
    seconds: float, header: str
) -> None:
    full = ServerAtCapacity("full", retry_after=seconds).headers()

    assert full["Retry-After"] == header
    assert "retry-after-ms" not in full


@pytest.mark.parametrize(
    ("seconds", "whole", "milliseconds"),
    [(0.0, "1", "1"), (0.2, "1", "200"), (1.4, "2", "1400"), (1.40001, "2", "1401")],
)
def test_a_429_never_says_too_soon(seconds: float, whole: str, milliseconds: str) -> None:
    for cls in (
        RateLimitExceeded,
        errors.ConcurrencyExceeded,
        provider_errors.ProviderRateLimited,
    ):
        headers = cls("slow", retry_after=seconds).headers()

        assert (headers["Retry-After"], headers["retry-after-ms"]) == (whole, milliseconds)


@pytest.mark.parametrize("seconds", [120.0, 132.0, 86_400.0, float("inf")])
def test_nobody_is_told_to_wait_for_more_than_two_minutes(seconds: float) -> None:
    error = provider_errors.ProviderRateLimited("slow", retry_after=seconds)

    headers = error.headers()

    assert (headers["Retry-After"], headers["retry-after-ms"]) == ("120", "120000")
    assert error.as_chunk()["retry_after"] == 120.0


def test_a_401_names_the_scheme_and_nothing_else_does() -> None:
    for cls in ALL:
        expected = "Bearer" if cls.status == 401 else None
        if issubclass(cls, TokenRefused):
            expected = 'Bearer error="invalid_token"'

        assert cls("what happened").headers().get("WWW-Authenticate") == expected


def test_each_denial_has_its_reason() -> None:
    for cls in [cls for cls in ALL if issubclass(cls, errors.Denied)]:
        assert cls.reason or cls is errors.Denied


def test_sdks_are_told_not_to_repeat_what_was_sent_to_a_provider() -> None:
    for error in (ReadTimeout("slow"), ProviderError("500"), RequestConflict("known")):
        assert error.headers()["x-should-retry"] == "false"
    for other in (ServerAtCapacity("full"), InternalError("bug"), RateLimitExceeded("slow")):
        assert "x-should-retry" not in other.headers()
        # A provider has answered, and what came then is no fault of the provider.
        other.paid = True
        told = other.headers()
        assert ("x-should-retry" in told) is ("Retry-After" not in told)
        assert other.as_chunk()["retryable"] is False


@pytest.mark.parametrize(
    ("error", "final"),
    [
        (ProviderRateLimited("wait", retry_after=60.0), False),
        (ProviderRateLimited("wait", retry_after=61.0), True),
        (ProviderRateLimited("wait"), True),
        (CircuitOpen("dead", retry_after=1.0), False),
        (ProviderError("500", retry_after=1.0), True),
    ],
)
def test_who_says_when_to_come_back_never_forbids_it(error: ProviderFault, *, final: bool) -> None:
    """Claude Code ends its run at once on a 429 that does."""
    error.request_outcome = Outcome("sim", "m", attempts=3)
    assert (error.headers().get("x-should-retry") == "false") is final


def test_a_providers_refusal_passes_body_and_all() -> None:
    refused = ProviderRefused("refused", 422, b'{"error": {"message": "theirs"}}')

    assert refused.http_status == 422
    assert refused.body() == b'{"error": {"message": "theirs"}}'
    assert refused.as_object()["type"] == "invalid_request_error"
    assert "theirs" not in json.dumps(refused.as_chunk())
    shown = ProviderRefused("refused", 422, b'{"error": {"message": "theirs"}}', "theirs")
    assert shown.as_chunk()["error"] == shown.as_object()["message"] == "refused: theirs"
    # What is logged is without it.
    assert "theirs" not in str(shown) + repr(shown)
    assert not refused.retry
    assert not refused.failover
    assert not refused.breaker_failure


@pytest.mark.parametrize(
    "fault", [KeyError("sk-secret"), TypeError("sk-secret"), ExceptionGroup("g", [OSError()])]
)
def test_an_unknown_exception_shows_nothing_of_itself(fault: BaseException) -> None:
    shown = public(fault)

    assert type(shown) is InternalError
    assert shown.message == "internal error"
    assert b"secret" not in shown.body()
    assert "secret" not in str(shown)


def test_a_known_error_is_shown_as_it_is() -> None:
    error = ServerAtCapacity("full")

    assert public(error) is error


def test_codes_of_different_statuses_are_different() -> None:
    for (status, codes), (other, others) in itertools.combinations(TABLE.items(), 2):
        assert not codes & others, (status, other)
