"""What a provider's answer means, from its status, its headers and its body.

401, 402, insufficient_quota          our key or our account: ProviderAuthError
403                                   the same, or this one request: ProviderForbidden
429, 498                              too much at the moment: ProviderRateLimited
408, 5xx                              its own fault: ProviderError
other 4xx                             the caller's: ProviderRefused, a JSON body passes as it is
a redirect, no JSON, compressed ...   ProviderBadResponse
"""

from __future__ import annotations

from email.utils import parsedate_to_datetime
from time import time
from typing import TYPE_CHECKING

import orjson

from aioserver.errors import InvalidRequest
from aioserver.protocol.openai import BadEvent, ErrorEvent, error_codes
from aioserver.provider_errors import (
    ProviderAuthError,
    ProviderBadResponse,
    ProviderError,
    ProviderFault,
    ProviderForbidden,
    ProviderRateLimited,
    ProviderRefused,
)
from aioserver.providers.pace import MAX_COOLING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aioserver.protocol.eventstream import EventTooLong

MAX_CHECKED_BYTES = 1 << 20  # of a body that is parsed to see that it is JSON
KEY_STATUSES = frozenset({401, 402})
BUSY_STATUSES = frozenset({429, 498})
QUOTA = "insufficient_quota"
# The codes in an error object that mean the same; OpenRouter's are the statuses it would have sent.
KEY_CODES = KEY_STATUSES | {QUOTA, "invalid_api_key"}
BUSY_CODES = BUSY_STATUSES | {"rate_limit_exceeded"}
PASSING = ("x-ratelimit-", "openai-processing-ms", "openai-version", "x-generation-id")


def judge(name: str, status: int, headers: Mapping[str, str], body: bytes) -> None:
    """Raise what a status other than 200 of provider *name* means."""
    if 200 <= status < 300:
        return
    if status < 400:
        raise ProviderBadResponse(f"{name} answered {status}, a redirect")
    if status in KEY_STATUSES or (status == 429 and _quota_used_up(body)):
        raise ProviderAuthError(f"{name} refuses our key or its quota is used up")
    if status == 403:
        raise ProviderForbidden(f"{name} does not allow this")
    wait = retry_after(headers)
    if wait is not None:
        wait = min(wait, MAX_COOLING)
    if status in BUSY_STATUSES:
        wait = 1.0 if wait is None else wait
        raise ProviderRateLimited(f"{name} limits our rate", retry_after=wait)
    if status >= 500 or status == 408:
        raise ProviderError(f"{name} answered {status}", retry_after=wait)
    if not _is_json(body):  # a proxy's page, say: not for our clients
        body = InvalidRequest(f"{name} answered {status}").body()
    raise ProviderRefused(f"{name} answered {status}", status, body)


def event_fault(exc: BadEvent | ErrorEvent | EventTooLong) -> ProviderFault:
    """Return the fault of a provider whose event cannot be read, or is an error object."""
    if isinstance(exc, ErrorEvent):
        return error_object_fault(exc.error)
    return ProviderBadResponse(str(exc))


def error_object_fault(error: object) -> ProviderFault:
    """Return the fault that an error object under HTTP 200 means.

    At most 200 characters of its text pass, and none of a text about our key.
    """
    codes = error_codes(error)
    if not codes.isdisjoint(KEY_CODES):
        return ProviderAuthError("the provider refuses our key or its quota is used up")
    if 403 in codes:
        return ProviderForbidden("the provider does not allow this")
    if not codes.isdisjoint(BUSY_CODES):
        return ProviderRateLimited("the provider limits our rate", retry_after=1.0)
    text = error.get("message") if isinstance(error, dict) else error
    text = text[:200] if isinstance(text, str) else "the provider reported an error"
    message = f"the provider reported an error: {text}"
    status = next((code for code in codes if isinstance(code, int)), 500)
    if not 400 <= status < 500 or status == 408:
        return ProviderError(message)
    shown = {"message": text, "type": "invalid_request_error", "param": None, "code": status}
    return ProviderRefused(message, status, orjson.dumps({"error": shown}))


def passing(headers: Mapping[str, str]) -> dict[str, str]:
    """The headers of a provider's that clients see."""
    return {
        name: value
        for name, value in headers.items()
        if name.startswith(PASSING) and value.isascii() and value.isprintable()
    }


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds, from `retry-after-ms` or from `retry-after` in seconds or as a date.

    None where neither is sane: negative, or more than a day.
    """
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) / unit
        except ValueError:
            continue
        if 0 <= seconds < 86_400:
            return seconds
    try:
        then = parsedate_to_datetime(headers.get("retry-after", ""))
        seconds = then.timestamp() - time()
    except (ValueError, OverflowError):  # a year or a zone that no calendar has
        return None
    return max(0.0, seconds) if abs(seconds) < 86_400 else None


def is_of(headers: Mapping[str, str], content_type: str) -> bool:
    """Whether the body is of *content_type*."""
    given = headers.get("content-type", "")
    return given == content_type or given.partition(";")[0].strip().lower() == content_type


def check_plain(headers: Mapping[str, str]) -> None:
    """Raise where the body is compressed."""
    if headers.get("content-encoding", "identity").lower() not in {"", "identity"}:
        raise ProviderBadResponse("the provider compressed its answer, which nobody asked for")


def _quota_used_up(body: bytes) -> bool:
    """Whether it says so itself: a text in it may be the caller's, the model's name for one."""
    if QUOTA.encode() not in body:
        return False
    try:
        said = orjson.loads(body)
    except orjson.JSONDecodeError:
        return False
    return isinstance(said, dict) and QUOTA in error_codes(said.get("error", said))


def _is_json(body: bytes) -> bool:
    try:
        orjson.loads(body)
    except orjson.JSONDecodeError:
        return False
    return True


def check_json(headers: Mapping[str, str], body: bytes) -> object:
    """What *body* says; None where it is too long to be parsed.

    Raises:
        ProviderBadResponse: it is no JSON, or an error as if it were an answer.
    """
    if not is_of(headers, "application/json") or not body:
        raise ProviderBadResponse("the provider's answer is not JSON")
    if len(body) > MAX_CHECKED_BYTES:
        return None
    try:
        answer = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise ProviderBadResponse("the provider's answer is not JSON") from None
    # A response that has failed has `error`, too, but is an answer.
    if isinstance(answer, dict) and answer.get("error") and "object" not in answer:
        raise ProviderBadResponse("the provider reported an error as if it were an answer")
    return answer
