"""Every error, and how it looks on every face.

A class states its whole appearance once: code, HTTP status, whether trying again can help, and the
close code that ends a WebSocket (None: the socket lives on). Faces only render it. The body is
OpenAI's error object, so that every SDK reads it:

    {"error": {"message": "…", "type": "…", "param": null, "code": "connect_timeout"}}
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import orjson

if TYPE_CHECKING:
    from collections.abc import Sequence

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    409: "conflict_error",
    429: "rate_limit_error",
    500: "server_error",
    502: "provider_error",
    503: "service_unavailable_error",
    504: "provider_error",
}


class ConfigurationError(Exception):
    """The configuration cannot be used. *faults* has one line for each fault, all of them."""

    def __init__(self, faults: Sequence[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = tuple(faults)


class AioserverError(Exception):
    """What a client may be told. *retry_after* is in seconds; None: no promise is made."""

    code: ClassVar[str] = "internal_error"
    status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False
    close: ClassVar[int | None] = None
    close_reason: ClassVar[bytes] = b""
    force_close: ClassVar[bool] = False  # the HTTP connection ends with this answer
    outcome: ClassVar[str] = "client_error"  # of a request that ends with it, in metrics and logs

    def __init__(
        self, message: str, *, retry_after: float | None = None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after = retry_after
        self.param = param
        self.counted = False  # among the rejections, with the request that ended with it

    @property
    def http_status(self) -> int:
        """The status of the HTTP answer; a provider's own refusal brings its own."""
        return self.status

    def headers(self) -> dict[str, str]:
        """The headers that an HTTP answer with it carries beside its body."""
        headers: dict[str, str] = {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if self.retry_after is not None:
            # Up, and to the millisecond: who comes a little too soon is refused again.
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after)))
            if self.http_status == 429:
                headers["retry-after-ms"] = str(max(1, math.ceil(1000 * self.retry_after)))
        elif self.http_status == 503:
            headers["Retry-After"] = "1"
        if self.http_status == 409:
            headers["x-should-retry"] = "false"
        return headers

    def body(self) -> bytes:
        """The JSON body of an HTTP answer."""
        return orjson.dumps({"error": self.as_object()})

    def as_object(self) -> dict[str, object]:
        """OpenAI's error object."""
        return {
            "message": self.message,
            "type": TYPES.get(self.http_status, "invalid_request_error"),
            "param": self.param,
            "code": self.code,
        }

    def as_chunk(self) -> dict[str, object]:
        """The `chunk` of a WebSocket or SSE `error` frame."""
        chunk: dict[str, object] = {
            "error": self.message,
            "code": self.code,
            "retryable": self.retryable,
        }
        if self.retry_after is not None:
            chunk["retry_after"] = round(self.retry_after, 3)
        return chunk


# The caller's faults.


class InvalidJson(AioserverError):
    """The text is no JSON."""

    code, status = "invalid_json", 400


class InvalidRequest(AioserverError):
    """JSON, but not a request that we understand."""

    code, status = "invalid_request", 400


class Denied(AioserverError):
    """Not let in. *reason*: for the metric `auth_failures_total` and the log."""

    reason: ClassVar[str] = ""


class MissingApiKey(Denied):
    """The server wants a key, and none came."""

    code, status, reason = "missing_api_key", 401, "missing_key"


class InvalidApiKey(Denied):
    """A key that is not known, or no longer."""

    code, status, reason = "invalid_api_key", 401, "invalid_key"
    close = 1008
    close_reason = b"key revoked"


class SessionEnded(InvalidApiKey):
    """A cookie that is not ours, has expired, or whose key is gone."""

    reason = "session"


class PermissionDenied(Denied):
    """The key is good, but no `admin`."""

    code, status, reason = "permission_denied", 403, "not_admin"


class OriginNotAllowed(Denied):
    """A browser on a page that is not in `allow_origins`."""

    code, status, reason = "origin_not_allowed", 403, "origin"


class HostNotAllowed(Denied):
    """Asked under a name that is not this machine's, where nobody needs a key (DNS rebinding)."""

    code, status, reason = "host_not_allowed", 403, "host"


class NotFound(AioserverError):
    """No such path."""

    code, status = "not_found", 404


class ModelNotFound(AioserverError):
    """A provider that is not configured, or not usable."""

    code, status = "model_not_found", 404


class StreamNotFound(AioserverError):
    """No such stream: never seen, expired, or another caller's."""

    code, status = "stream_not_found", 404


class MethodNotAllowed(AioserverError):
    """The path exists; not with this method."""

    code, status = "method_not_allowed", 405


class RequestTimeout(AioserverError):
    """The body did not come in time."""

    code, status, retryable, force_close = "request_timeout", 408, True, True


class ResumeGap(AioserverError):
    """The events asked for are no longer kept, or never were."""

    code, status = "resume_gap", 409


class RequestConflict(AioserverError):
    """A known request id with another body."""

    code, status = "request_conflict", 409


class RequestTooLarge(AioserverError):
    """A body or message over `max_message_size`."""

    code, status, force_close = "request_too_large", 413, True
    close = 1009


class UriTooLong(AioserverError):
    """A request line over `h11_max_request_line_size`."""

    code, status, force_close = "uri_too_long", 414, True


class UnsupportedMediaType(AioserverError):
    """Not JSON, or compressed."""

    code, status, force_close = "unsupported_media_type", 415, True


class ExpectationFailed(AioserverError):
    """An `Expect` that is not `100-continue`."""

    code, status = "expectation_failed", 417


class HeadersTooLarge(AioserverError):
    """A header block over `h11_max_header_size`."""

    code, status, force_close = "headers_too_large", 431, True


class RateLimitExceeded(AioserverError):
    """The caller's own rate limit; on a WebSocket a flood of frames."""

    outcome = "rejected"
    code, status, retryable = "rate_limit_exceeded", 429, True
    close = 1008
    close_reason = b"too many messages"


class ConcurrencyExceeded(AioserverError):
    """The caller runs as many answers as it may."""

    outcome = "rejected"
    code, status, retryable = "concurrency_exceeded", 429, True


# Ours.


class ServerAtCapacity(AioserverError):
    """No place, and no room to wait for one."""

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


class InternalError(AioserverError):
    """A bug: no detail outside, a traceback in the log."""

    outcome = "internal_error"
    code, status, force_close = "internal_error", 500, True
    close = 1011
    close_reason = b"internal error"


def public(fault: BaseException) -> AioserverError:
    """What a client may see of *fault*: an unknown one shows nothing of itself."""
    if isinstance(fault, AioserverError):
        return fault
    return InternalError("internal error")
