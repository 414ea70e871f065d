"""The fault that a provider's answer means, by its status, its headers and its body (RFC 9110,
15).

401, insufficient_quota           our key or our account is refused: ProviderAuthError
402, 403, a 401 about a model     our key, or this one request, is refused: ProviderForbidden
429, 498                          we ask too much at the moment: ProviderRateLimited
408, 5xx                          the provider failed: ProviderError
508 of another aioserver          it leads back to this server: ProviderLeadsBack
another 4xx                       the caller is at fault: ProviderRefused; a JSON body passes,
                                  and its reason where bodies do not
the same, as it is too long       ContextTooLong: another provider may take it
a redirect, not JSON, compressed  ProviderBadResponse
"""

from __future__ import annotations

import re
from email.utils import parsedate_to_datetime
from time import time
from typing import TYPE_CHECKING

import orjson

from aioserver.errors import InvalidRequest, LoopDetected
from aioserver.protocol.bridging.refusals import upstream
from aioserver.protocol.openai import BadEvent, ErrorEvent, error_codes, load_with_surrogates
from aioserver.provider_errors import (
    ContextTooLong,
    ProviderAuthError,
    ProviderBadResponse,
    ProviderError,
    ProviderFault,
    ProviderForbidden,
    ProviderLeadsBack,
    ProviderRateLimited,
    ProviderRefused,
)
from aioserver.providers.capacity import MAX_COOLING
from aioserver.providers.rate_headers import number

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aioserver.protocol.eventstream import EventTooLong

# Bytes of a body that are parsed to check that it is JSON; a longer one is not checked.
MAX_CHECKED_BYTES = 1 << 20
# The most characters of the reason of a refusal; the sign of a text about a key; and the status of
# a proxy that asks for one.
MAX_REASON = 500
ABOUT_KEYS = re.compile("api[ _-]?key", re.IGNORECASE)
PROXY_STATUS = 407
KEY_STATUS, CREDIT_STATUS = 401, 402
KEY_STATUSES = frozenset({KEY_STATUS, CREDIT_STATUS})
OF_MODEL = re.compile(r"\bmodels?\b", re.IGNORECASE)
BUSY_STATUSES = frozenset({429, 498})
QUOTA = "insufficient_quota"
# The values of Content-Encoding for a body that is not compressed.
IDENTITY = frozenset({"", "identity"})
# The codes in an error object that are equivalent to these statuses. OpenRouter's codes are the
# statuses that it would have sent.
KEY_CODES = KEY_STATUSES | {QUOTA, "invalid_api_key"}
# The codes of a verdict on a text or a request: another provider would get the same text that this
# one refuses.
FILTERS = frozenset({"content_filter", "content_policy_violation", "invalid_prompt"})
VERDICTS = FILTERS | {"invalid_request_error"}
BUSY_CODES = BUSY_STATUSES | {"rate_limit_exceeded"}
# The ways in which providers say that a request exceeds their model's context: by a code, or in
# words under one of these statuses, in a body of so many bytes at most.
TOO_LONG_CODES = {"context_length_exceeded", "exceed_context_size_error"}
TOO_LONG_STATUSES = frozenset({400, 413, 422})
# The words, also under 429, for a request with more tokens than a minute of our account allows: it
# would never fit, and no other request has to wait for that.
TOO_LARGE = "request too large for"
MAX_READ_BYTES = 1 << 16
TOO_LONG = (
    "maximum context length|prompt is too long|context size|model's context length"
    "|maximum prompt length|exceeded model token limit|range of input length|prompt too long"
    "|(?:exceed|greater than|overflow|longer than)[^.]{0,40} context (?:window|length|size)"
    "|context length of only|context window exceeds|input token count[^.]{0,40} exceed"
    "|prompt exceeds max length|token count of \\d+ exceeds|input is too long"
    "|`inputs` tokens \\+|input tokens exceed|reduce the length of the messages"
    f"|{TOO_LARGE}"
)
# Prefixes of the names of the headers that clients may see.
VISIBLE_HEADERS = (
    *("x-ratelimit-", "openai-processing-ms", "openai-version", "x-generation-id"),
    *("anthropic-ratelimit-", "request-id"),
)


def check_status(name: str, status: int, headers: Mapping[str, str], body: bytes) -> None:
    """Raise the fault that a *status* of the provider *name* means.

    Raises:
        ProviderFault: the status is not between 200 and 299; see the table above.
    """
    if 200 <= status < 300:
        return
    if status < 400:
        raise ProviderBadResponse(f"{name} answered {status}, a redirect")
    if status in KEY_STATUSES or (status == 429 and _quota_used_up(body)):
        raise key_fault(name, status, error_in(body))
    if status == 403:
        raise ProviderForbidden(f"{name} does not allow this")
    wait = retry_after(headers)
    error = error_in(body) if 400 <= status < 500 else None
    said = error or body.decode("utf-8", "replace")
    too_long = len(body) <= MAX_READ_BYTES and says_too_long(status, said)
    if status in BUSY_STATUSES and not too_long:
        wait = 1.0 if wait is None else wait
        raise ProviderRateLimited(f"{name} limits our rate", retry_after=wait)
    if status == LoopDetected.status and LoopDetected.code in error_codes(error_in(body)):
        raise ProviderLeadsBack(f"llm.providers.{name}.base_url leads back to this server")
    if status >= 500 or status == 408:
        fault = ProviderError(f"{name} answered {status}", retry_after=wait)
        # An engine that loads its model answers so, and so does a proxy in front of one that is
        # away.
        fault.unreachable = status == 503
        raise fault
    reason = ""
    if error is None:
        # The body may be a proxy's page, for example, which our clients must not see.
        shown = InvalidRequest(f"{name} answered {status}").body()
    else:
        shown, reason = body, _reason(status, error)
    refusal = ContextTooLong if too_long else ProviderRefused
    raise refusal(f"{name} answered {status}", status, shown, reason)


def key_fault(name: str, status: int, error: object) -> ProviderAuthError:
    """Return the fault of a refusal of our key, or of our account, by the provider *name* with
    this *status* and *error*; the request may be at fault, too.

    A 402 may be about an answer of more tokens than our credit covers, and a 401 about a model
    that our key may not use, which the client has named.
    """
    shown = f"{name} refuses our key or its quota is used up"
    texts = [error.get("message"), upstream(error)] if isinstance(error, dict) else [error]
    text = " ".join(text[:MAX_REASON] for text in texts if isinstance(text, str))
    if status == CREDIT_STATUS:
        fault = ProviderForbidden(shown)
        fault.of_request = "max_tokens" in text
        return fault
    if status == KEY_STATUS and OF_MODEL.search(text):
        return ProviderForbidden(shown)
    return ProviderAuthError(shown)


def says_too_long(status: int, error: object) -> bool:
    """Return whether *error*, an object or a text that a provider has sent under *status*, says
    that the request exceeds its model's context.
    """
    if not error_codes(error).isdisjoint(TOO_LONG_CODES):
        return True
    pattern = TOO_LONG if status in TOO_LONG_STATUSES else TOO_LARGE
    texts = [error.get("message"), upstream(error)] if isinstance(error, dict) else [error]
    return any(isinstance(text, str) and re.search(pattern, text, re.IGNORECASE) for text in texts)


def error_in(body: bytes) -> object:
    """Return the error in *body*: an object or a text, or else the whole content; None if it is
    not JSON.
    """
    try:
        answer: object = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    if isinstance(answer, list) and answer:
        # Gemini's form.
        answer = answer[0]
    return answer.get("error") or answer if isinstance(answer, dict) else ""


def reason_of(status: int, body: bytes) -> str:
    """Return the reason for which a provider has refused a request, from *body*, as `_reason`."""
    return _reason(status, error_in(body)) if len(body) <= MAX_READ_BYTES else ""


def _reason(status: int, error: object) -> str:
    """Return the provider's own words for its refusal; "" if there are none, or if they mention
    our key or our proxy.
    """
    text = error.get("message") if isinstance(error, dict) else error
    if not isinstance(text, str) or status == PROXY_STATUS:
        return ""
    if not error_codes(error).isdisjoint(KEY_CODES) or ABOUT_KEYS.search(text):
        return ""
    return text[:MAX_REASON]


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
        status = CREDIT_STATUS if CREDIT_STATUS in codes else KEY_STATUS
        return key_fault("the provider", status, error)
    if 403 in codes:
        return ProviderForbidden("the provider does not allow this")
    number = next((code for code in codes if isinstance(code, int)), None)
    too_long = says_too_long(number or 400, error)
    if not (too_long or codes.isdisjoint(BUSY_CODES)):
        return ProviderRateLimited("the provider limits our rate", retry_after=1.0)
    text = error.get("message") if isinstance(error, dict) else error
    text = text[:200] if isinstance(text, str) else "the provider reported an error"
    # A lone surrogate cannot be encoded as UTF-8.
    text = text.encode("utf-8", "replace").decode()
    message = f"the provider reported an error: {text}"
    verdict = too_long or not codes.isdisjoint(VERDICTS)
    status = number or (400 if verdict else 500)
    if not 400 <= status < 500 or status == 408:
        return ProviderError(message)
    refusal = ContextTooLong if too_long else ProviderRefused
    public_error = {
        "message": text,
        "type": "invalid_request_error",
        "param": None,
        # Clients know this error by its code.
        "code": next(iter(codes & TOO_LONG_CODES), status),
    }
    body = orjson.dumps({"error": public_error})
    return refusal("the provider reported an error", status, body, text)


def visible_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """Return those of the provider's headers that clients may see."""
    return {
        name: value
        for name, value in headers.items()
        if name.startswith(VISIBLE_HEADERS) and value.isascii() and value.isprintable()
    }


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds of `retry-after-ms`, or of `retry-after` (RFC 9110, 10.2.3: seconds or a
    date).

    A longer time becomes MAX_COOLING. None if neither header has a plausible value: a negative
    number has none, nor has a date that is past for more than a day.
    """
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        seconds = number(headers.get(name, ""))
        if seconds is not None:
            return min(seconds / unit, MAX_COOLING)
    try:
        date = parsedate_to_datetime(headers.get("retry-after", ""))
        seconds = date.timestamp() - time()
    except (ValueError, OverflowError):
        # OverflowError: no calendar has this year, or this zone.
        return None
    return min(max(0.0, seconds), MAX_COOLING) if seconds > -86_400 else None


def matches_type(headers: Mapping[str, str], content_type: str) -> bool:
    """Return whether the body is of *content_type*, a media type without parameters."""
    value = headers.get("content-type", "")
    return value == content_type or value.partition(";")[0].strip().lower() == content_type


def check_uncompressed(headers: Mapping[str, str]) -> None:
    """Refuse a compressed body: every request asks for `identity`.

    Raises:
        ProviderBadResponse: the body is compressed.
    """
    if headers.get("content-encoding", "").lower() not in IDENTITY:
        raise ProviderBadResponse("the provider compressed its answer, which was not asked for")


def _quota_used_up(body: bytes) -> bool:
    """Return whether the error in *body* has the code QUOTA.

    The same text elsewhere in *body* may be the caller's, such as a model's name.
    """
    if QUOTA.encode() not in body:
        return False
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError:
        return False
    return isinstance(content, dict) and QUOTA in error_codes(content.get("error", content))


def parses(body: bytes) -> bool:
    """Return whether *body* is JSON."""
    try:
        orjson.loads(body)
    except orjson.JSONDecodeError:
        return False
    return True


def check_json(headers: Mapping[str, str], body: bytes) -> object:
    """Return the content of *body*; None if it is longer than MAX_CHECKED_BYTES.

    Raises:
        ProviderBadResponse: the body is not JSON, or is an error under a good status.
    """
    if not matches_type(headers, "application/json") or not body:
        raise ProviderBadResponse("the provider's answer is not JSON")
    if len(body) > MAX_CHECKED_BYTES:
        return None
    try:
        answer = orjson.loads(body)
    except orjson.JSONDecodeError:
        try:
            answer = load_with_surrogates(body)
        except BadEvent:
            raise ProviderBadResponse("the provider's answer is not JSON") from None
    # A failed response has an `error`, too, but it is an answer, with its `object`.
    if isinstance(answer, dict) and answer.get("error") and "object" not in answer:
        raise ProviderBadResponse("the provider reported an error as if it were an answer")
    return answer
