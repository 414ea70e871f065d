"""Every error that a client may see, and how it looks on every face.

This file is one concept: the errors are one tree, and each of its classes is a table row of the
same columns.

A face is a protocol that clients speak to us: WebSocket, SSE, OpenAI's API. Faces only render an
error; its class states its whole appearance once: its code and HTTP status, whether the client may
try again, and the close code (RFC 6455, 7.4.1) that ends a WebSocket. An error without a close
code leaves the WebSocket open. The body of an HTTP answer is OpenAI's error object, so that every
SDK reads it:

    {"error": {"message": "…", "type": "…", "param": null, "code": "connect_timeout"}}

The tree, with HTTP status, code and close code:

    AioserverError
        InvalidJson                 400  invalid_json
        InvalidRequest              400  invalid_request
            InvalidStreamId         400  invalid_stream_id
            StreamLimitReached      400  websocket_stream_limit_reached
            ResponseNotFound        400  previous_response_not_found
        Denied
            MissingApiKey           401  missing_api_key
            InvalidApiKey           401  invalid_api_key         1008
                KeyExpired          401  invalid_api_key         1008
                SessionEnded        401  invalid_api_key         1008
                TokenRefused        401  invalid_api_key         1008
                    TokenExpired    401  invalid_api_key         1008
            PermissionDenied        403  permission_denied
            OriginNotAllowed        403  origin_not_allowed
            HostNotAllowed          403  host_not_allowed
        RequestRefused              403  request_refused
            AnswerRefused           403  answer_refused
        NotFound                    404  not_found
        ModelNotFound               404  model_not_found
        StreamNotFound              404  stream_not_found
        ConversationNotFound        404  conversation_not_found
        RequestNotFound             404  request_not_found
        MethodNotAllowed            405  method_not_allowed
        RequestTimeout              408  request_timeout         1008
        SlowClient                  408  slow_client
        ResumeGap                   409  resume_gap
        RequestConflict             409  request_conflict
        RequestTooLarge             413  request_too_large       1009
        UriTooLong                  414  uri_too_long
        UnsupportedMediaType        415  unsupported_media_type
        ExpectationFailed           417  expectation_failed
        UpgradeRequired             426  upgrade_required
        RateLimitExceeded           429  rate_limit_exceeded     1008
            TokensExceeded          429  rate_limit_exceeded     1008
        ConcurrencyExceeded         429  concurrency_exceeded
        HeadersTooLarge             431  headers_too_large
        InternalError               500  internal_error          1011
        UnsupportedCoding           501  unsupported_transfer_coding
        ServerAtCapacity            503  server_at_capacity      1013
        ServerShutdown              503  server_shutdown         1012
        InstanceUnavailable         503  instance_unavailable
        HistoryUnavailable          503  history_unavailable
        HookUnavailable             503  hook_unavailable
        AuthUnavailable             503  auth_unavailable
        DeadlineExceeded            504  deadline_exceeded
            AnswerTooLate           504  deadline_exceeded
        VersionNotSupported         505  http_version_not_supported
        LoopDetected                508  loop_detected
        ProviderFault               faults of a provider, in provider_errors.py
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import orjson

if TYPE_CHECKING:
    from collections.abc import Sequence

# OpenAI's error types by HTTP status; any other is an invalid_request_error.
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
# The largest `Retry-After` in seconds: SDKs ignore a value above a minute or two, and the reason to
# wait may end long before.
MAX_RETRY_AFTER = 120.0
# Statuses after which a request soon succeeds, and the seconds for which SDKs wait for that.
BUSY, SOON = frozenset({429, 503, 529}), 60.0


class AioserverError(Exception):
    """An error that a client may see.

    *retry_after*: the seconds after which to try again, None if they are unknown; an answer names
    `max_retry_after` at most. *param*: the faulty field of the request.
    """

    code: ClassVar[str] = "internal_error"
    status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False
    # The close code and reason that end a WebSocket; with None it stays open.
    close: ClassVar[int | None] = None
    close_reason: ClassVar[bytes] = b""
    # Whether the HTTP connection is closed after the answer.
    force_close: ClassVar[bool] = False
    max_retry_after: ClassVar[float] = MAX_RETRY_AFTER
    # OpenAI's type of this error; "" for that of its status.
    kind: ClassVar[str] = ""
    # Whether `retry_after` is known, and no estimate: nothing starts before.
    timed: ClassVar[bool] = False
    # The outcome of a request that ends with this error, in metrics and logs.
    outcome: ClassVar[str] = "client_error"
    # The status and the body with which a provider has refused, where clients get them unchanged:
    # on the face of Anthropic's API, and not if they are about our key.
    provider_answer: tuple[int, bytes] | None = None

    def __init__(
        self, message: str, *, retry_after: float | None = None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        most = self.max_retry_after
        self.retry_after = None if retry_after is None else min(retry_after, most)
        self.param = param
        # True once the request that this error ended has been counted, so that no face counts it
        # again.
        self.counted = False
        # True if a provider has worked on the request: a client that repeats it pays again.
        self.paid = False

    @property
    def http_status(self) -> int:
        """The status of the HTTP answer; `ProviderRefused` has the provider's own."""
        return self.status

    @property
    def size(self) -> int:
        """The bytes that it keeps, about."""
        return len(self.body()) + len(self.provider_answer[1] if self.provider_answer else b"")

    def headers(self) -> dict[str, str]:
        """Return the headers of the HTTP answer that belong to this error."""
        headers: dict[str, str] = {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if self.retry_after is not None:
            # Rounded up: a client that comes back a millisecond too soon is refused again.
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after)))
            if self.http_status == 429:
                headers["retry-after-ms"] = str(max(1, math.ceil(1000 * self.retry_after)))
        elif self.http_status == 503:
            headers["Retry-After"] = "1"
        if self.http_status in {409, 501} or (self.paid and not self.invites):
            headers["x-should-retry"] = "false"
        return headers

    @property
    def invites(self) -> bool:
        """Whether the answer names a short delay: agents wait for that, and end their run otherwise."""
        seconds = 1.0 if self.retry_after is None and self.status == 503 else self.retry_after
        status = self.http_status if self.provider_answer is None else self.provider_answer[0]
        return status in BUSY and seconds is not None and seconds <= SOON

    def body(self) -> bytes:
        """Return the JSON body of the HTTP answer."""
        return orjson.dumps({"error": self.as_object()})

    def as_object(self) -> dict[str, object]:
        """Return OpenAI's error object."""
        return {
            "message": self.message,
            "type": self.kind or TYPES.get(self.http_status, "invalid_request_error"),
            "param": self.param,
            "code": self.code,
        }

    def as_chunk(self) -> dict[str, object]:
        """Return the `chunk` of a WebSocket or SSE `error` frame."""
        chunk: dict[str, object] = {
            "error": self.message,
            "code": self.code,
            "retryable": self.retryable and not self.paid,
        }
        if self.retry_after is not None:
            chunk["retry_after"] = round(self.retry_after, 3)
        return chunk


class InvalidJson(AioserverError):
    """The text is not JSON."""

    code, status = "invalid_json", 400


class InvalidRequest(AioserverError):
    """The text is JSON, but not a valid request."""

    code, status = "invalid_request", 400


class InvalidStreamId(InvalidRequest):
    """The name of a lane on a WebSocket of the Responses API is not one."""

    code = "invalid_stream_id"


class StreamLimitReached(InvalidRequest):
    """A WebSocket of the Responses API has as many named lanes as it may have."""

    code = "websocket_stream_limit_reached"


class ResponseNotFound(InvalidRequest):
    """The response that a request continues does not exist, is no longer kept, or is another
    caller's.
    """

    code, status = "previous_response_not_found", 400


class Denied(AioserverError):
    """Access is denied. *reason* is a label of the metric `auth_failures_total`, and logged.

    *setting*, which is logged too, is the setting that would admit the request, if there is one.
    """

    reason: ClassVar[str] = ""
    setting: ClassVar[str] = ""


class MissingApiKey(Denied):
    """The server requires an API key, and the request has none."""

    code, status, reason = "missing_api_key", 401, "missing_key"


class InvalidApiKey(Denied):
    """The API key is unknown, or was revoked."""

    code, status, reason = "invalid_api_key", 401, "invalid_key"
    close = 1008
    close_reason = b"key revoked"


class KeyExpired(InvalidApiKey):
    """The time until which the API key is valid is over."""

    close_reason = b"key expired"


class SessionEnded(InvalidApiKey):
    """The session cookie is not ours or has expired, or its key was revoked."""

    reason = "session"


class TokenRefused(InvalidApiKey):
    """The token cannot be accepted; the message names the rule, and no value of it."""

    reason = "token"

    def headers(self) -> dict[str, str]:
        """Return the headers, with the error of RFC 6750, 3.1: another token is needed."""
        return {**super().headers(), "WWW-Authenticate": 'Bearer error="invalid_token"'}


class TokenExpired(TokenRefused):
    """The token with which a WebSocket was opened has expired."""

    close_reason = b"token expired"


class PermissionDenied(Denied):
    """The key is valid, but not an `admin` key."""

    code, status, reason = "permission_denied", 403, "not_admin"


class OriginNotAllowed(Denied):
    """The browser's page has an origin that is not in `allow_origins`."""

    code, status, reason = "origin_not_allowed", 403, "origin"
    setting = "chat.websocket.allow_origins"


class HostNotAllowed(Denied):
    """The Host is not a name of this machine, and no key is required (DNS rebinding)."""

    code, status, reason = "host_not_allowed", 403, "host"
    setting = "auth.allowed_hosts"


class RequestRefused(AioserverError):
    """A hook of the operator has refused the request, or refuses all requests that it cannot see.

    *http_status* is the status that the hook has named: 403, 400 or 429.
    """

    code, status = "request_refused", 403

    def __init__(
        self,
        message: str,
        *,
        http_status: int = 403,
        param: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message, param=param, retry_after=retry_after)
        self._http_status = http_status

    @property
    def http_status(self) -> int:
        """The HTTP status that the hook has named."""
        return self._http_status

    def as_chunk(self) -> dict[str, object]:
        """Return the `chunk` of an `error` frame."""
        later = self._http_status == 429 and not self.paid
        return {**super().as_chunk(), "retryable": later}


class AnswerRefused(RequestRefused):
    """A hook of the operator's has ended the answer, which was paid for."""

    code = "answer_refused"


class NotFound(AioserverError):
    """There is no such path."""

    code, status = "not_found", 404


class ModelNotFound(AioserverError):
    """The model's provider is not configured, or not usable."""

    code, status = "model_not_found", 404


class StreamNotFound(AioserverError):
    """The stream does not exist, has expired, or belongs to another caller."""

    code, status = "stream_not_found", 404


class ConversationNotFound(AioserverError):
    """The conversation does not exist, is forgotten, or belongs to another caller."""

    code, status = "conversation_not_found", 404


class RequestNotFound(AioserverError):
    """The request is not among the last ones that have ended, or belongs to another caller."""

    code, status = "request_not_found", 404


class MethodNotAllowed(AioserverError):
    """The path exists, but not with this method.

    *allowed*: the methods that it has, where that is known here.
    """

    code, status = "method_not_allowed", 405

    allowed: Sequence[str] = ()

    def headers(self) -> dict[str, str]:
        """Return the headers, among them the methods (RFC 9110, 15.5.6)."""
        allow = {"Allow": ", ".join(self.allowed)} if self.allowed else {}
        return {**super().headers(), **allow}


class RequestTimeout(AioserverError):
    """The body, or a WebSocket message, did not arrive before its deadline."""

    code, status, retryable, force_close = "request_timeout", 408, True, True
    close = 1008
    close_reason = b"message too slow"


class SlowClient(AioserverError):
    """The client fell behind the events that are kept.

    The stream ends with this error, and the client may resume it.
    """

    outcome = "slow_client"
    code, status, retryable = "slow_client", 408, True


class ResumeGap(AioserverError):
    """The requested events are no longer kept, or never existed."""

    code, status = "resume_gap", 409


class RequestConflict(AioserverError):
    """An earlier request had the same id and another body."""

    code, status = "request_conflict", 409


class RequestTooLarge(AioserverError):
    """A body or a message exceeds `max_message_size`."""

    code, status, force_close = "request_too_large", 413, True
    close = 1009


class UriTooLong(AioserverError):
    """The request line exceeds `h11_max_request_line_size`."""

    code, status, force_close = "uri_too_long", 414, True


class UnsupportedMediaType(AioserverError):
    """The body is not declared as JSON, or is compressed."""

    code, status, force_close = "unsupported_media_type", 415, True


class ExpectationFailed(AioserverError):
    """The `Expect` header is not `100-continue`."""

    code, status = "expectation_failed", 417


class UpgradeRequired(AioserverError):
    """An upgrade to a WebSocket where there is none, or none where there is one.

    Clients that can do without one fall back at once. *protocol* is what to use instead.
    """

    code, status, force_close = "upgrade_required", 426, True
    protocol = "HTTP/1.1"

    def headers(self) -> dict[str, str]:
        """Return the headers, among them the protocol to use instead (RFC 9110, 15.5.22)."""
        return {**super().headers(), "Upgrade": self.protocol}


class RateLimitExceeded(AioserverError):
    """The caller's own rate limit is reached, or a WebSocket is flooded with frames."""

    outcome, timed = "rejected", True
    code, status, retryable = "rate_limit_exceeded", 429, True
    close = 1008
    close_reason = b"too many messages"


class TokensExceeded(RateLimitExceeded):
    """A budget of the caller's key has too little left for the request.

    *retry_after* is exact: a request of that size that comes then finds room, unless another took
    it.
    """

    kind = "tokens"

    # The setting of the budget.
    period = ""
    # A month's budget may be that far away.
    max_retry_after = 31 * 86400.0

    def headers(self) -> dict[str, str]:
        """Return the headers of the HTTP answer; SDKs wait for no more than SOON, and would try
        again at once.
        """
        headers = super().headers()
        if not self.invites:
            headers["x-should-retry"] = "false"
        return headers


class ConcurrencyExceeded(AioserverError):
    """The caller has as many answers under way as its key allows."""

    outcome = "rejected"
    code, status, retryable = "concurrency_exceeded", 429, True


class HeadersTooLarge(AioserverError):
    """The header block exceeds `h11_max_header_size`."""

    code, status, force_close = "headers_too_large", 431, True


class InternalError(AioserverError):
    """A bug: the client sees no detail, and the log has the traceback."""

    outcome = "internal_error"
    code, status, force_close = "internal_error", 500, True
    close = 1011
    close_reason = b"internal error"


class UnsupportedCoding(AioserverError):
    """The body has a transfer coding other than `chunked` (RFC 9112, 6.1)."""

    code, status, force_close = "unsupported_transfer_coding", 501, True


class ServerAtCapacity(AioserverError):
    """No place is free, and there is no room to wait for one."""

    outcome = "rejected"
    code, status, retryable, force_close = "server_at_capacity", 503, True, True
    close = 1013
    close_reason = b"Server at maximum capacity, try again later"


class ServerShutdown(AioserverError):
    """The server is stopping."""

    outcome = "rejected"
    code, status, retryable, force_close = "server_shutdown", 503, True, True
    close = 1012
    close_reason = b"server is stopping"


class InstanceUnavailable(AioserverError):
    """It is not known now whether another instance has the requested object."""

    outcome = "rejected"
    code, status, retryable = "instance_unavailable", 503, True


class HistoryUnavailable(AioserverError):
    """The storage of conversations cannot be reached, so what was asked of it is not known, or not
    done for certain.
    """

    outcome = "rejected"
    code, status, retryable = "history_unavailable", 503, True


class HookUnavailable(AioserverError):
    """A hook that must decide has made no decision: it cannot be reached, is too slow, or its
    answer is not a decision.
    """

    outcome = "rejected"
    code, status, retryable = "hook_unavailable", 503, True


class AuthUnavailable(AioserverError):
    """Whether a token is valid is not known now: the keys of its issuer, or perhaps the newest
    one, are not there. The token may be good, and is to be tried again.
    """

    outcome = "rejected"
    code, status, retryable = "auth_unavailable", 503, True
    timed = True


class DeadlineExceeded(AioserverError):
    """The request could not start by the time that its client has set.

    *bound* is the label `kind` of the metric `deadlines_total`.
    """

    outcome = "rejected"
    code, status = "deadline_exceeded", 504
    bound: str = "start"

    def headers(self) -> dict[str, str]:
        """Return the headers: an SDK must not wait behind its caller's back."""
        return {**super().headers(), "x-should-retry": "false"}


class AnswerTooLate(DeadlineExceeded):
    """The answer has not ended by the time that its client has set, or the request could not start
    by then.
    """

    outcome = "cancelled"
    bound = "whole"


class VersionNotSupported(AioserverError):
    """The request line names a version of HTTP other than 1.0 and 1.1 (RFC 9110, 15.6.6)."""

    code, status, force_close = "http_version_not_supported", 505, True


class LoopDetected(AioserverError):
    """The request comes from this server, by way of a provider: no provider is asked again."""

    outcome = "rejected"
    code, status = "loop_detected", 508

    def headers(self) -> dict[str, str]:
        """Return the headers: the same request would go the same way."""
        return {**super().headers(), "x-should-retry": "false"}


def public(fault: BaseException) -> AioserverError:
    """Return *fault* if clients may see it; otherwise an `InternalError` without any detail."""
    if isinstance(fault, AioserverError):
        return fault
    return InternalError("internal error")
