"""Every error, and how it looks on every face.

A class states its whole appearance once: code, HTTP status, whether trying again can help, and the
close code that ends a WebSocket (None: the socket lives on). Faces only render it. The body is
OpenAI's error object, so that every SDK reads it:

    {"error": {"message": "…", "type": "…", "param": null, "code": "connect_timeout"}}
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import orjson

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

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


class OriginNotAllowed(AioserverError):
    """A browser on a page that is not in `allow_origins`."""

    code, status = "origin_not_allowed", 403


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


# The provider's.


class ProviderFault(AioserverError):
    """Something between us and the provider's answer.

    *retry*: the same provider may be asked again; *failover*: the next one may be; *failure*: the
    breaker counts it; *attempt*: what became of the request that was sent, empty where none was.
    """

    outcome = "provider_error"
    attempt: ClassVar[str] = ""
    retry: ClassVar[bool] = False
    failover: ClassVar[bool] = False
    failure: ClassVar[bool] = True
    again: ClassVar[bool] = False  # the client may: nothing was sent, so nothing is paid twice
    provider: str = ""  # whose fault it is, and how often it was asked
    attempts: int = 0


class ConnectError(ProviderFault):
    """Refused, DNS, TLS."""

    attempt = "connect_error"
    code, status, retryable = "connect_error", 502, True
    retry = failover = again = True


class ConnectTimeout(ProviderFault):
    """DNS, TCP and TLS together took longer than `connect_timeout`."""

    attempt = "timeout"
    code, status, retryable = "connect_timeout", 504, True
    retry = failover = again = True


class CertificateFault(ProviderFault):
    """The provider's certificate does not hold."""

    attempt = "tls"
    code, status = "provider_auth_error", 502
    failover, failure = True, False


class PoolTimeout(ProviderFault):
    """No pooled connection became free within `pool_timeout`."""

    outcome = "rejected"
    code, status, retryable = "pool_timeout", 503, True
    failover, failure = True, False


class WriteTimeout(ProviderFault):
    """The provider took nothing of the request for `write_timeout`."""

    attempt = "timeout"
    code, status, retryable = "write_timeout", 504, True


class ReadTimeout(ProviderFault):
    """The provider sent nothing for `read_timeout`."""

    attempt = "timeout"
    code, status, retryable = "read_timeout", 504, True


class ProviderDisconnected(ProviderFault):
    """The provider closed before its answer was whole."""

    attempt = "disconnected"
    code, status, retryable = "provider_disconnected", 502, True


class StaleConnection(ProviderDisconnected):
    """A pooled connection that proved dead before a byte of the answer came: safe to repeat."""

    attempt = "stale"
    retry, failover, failure = True, True, False


class ProviderBadResponse(ProviderFault):
    """Not HTTP, not JSON, not an event stream, or a line over the bound."""

    attempt = "bad_response"
    code, status, retryable = "provider_bad_response", 502, True


class ProviderAuthError(ProviderFault):
    """The provider refuses our key; its text is never shown."""

    attempt = "http_4xx"
    code, status = "provider_auth_error", 502
    failover, failure = True, False


class ProviderFlagged(ProviderAuthError):
    """The provider has refused our key a moment ago, and is not asked again yet."""

    attempt = ""


class CircuitOpen(ProviderFault):
    """The provider fails, and is left alone for a while."""

    outcome = "rejected"
    code, status, retryable = "circuit_open", 503, True
    failover, failure = True, False


class ProviderRateLimited(ProviderFault):
    """The provider said 429 or 498."""

    attempt = "http_429"
    code, status, retryable = "provider_rate_limited", 429, True
    retry, failover, failure = True, True, False


class ProviderPaced(ProviderRateLimited):
    """Our pace for the provider (`requests_per_minute`) cannot start it before its deadline."""

    outcome, attempt = "rejected", ""
    retry = False


class ProviderError(ProviderFault):
    """The provider's 5xx, or an error object inside its stream."""

    attempt = "http_5xx"
    code, status, retryable = "provider_error", 502, True
    retry = failover = True


class ProviderRefused(ProviderFault):
    """The provider calls the request faulty (4xx): its status and body pass as they are."""

    outcome, attempt = "client_error", "http_4xx"
    code, status = "provider_error", 400
    failure = False

    def __init__(self, message: str, status: int, content: bytes) -> None:
        super().__init__(message)
        self.given_status = status
        self.content = content

    @property
    def http_status(self) -> int:
        """The provider's own status."""
        return self.given_status

    def body(self) -> bytes:
        """The provider's own body."""
        return self.content


class ProviderQueueFull(ProviderFault):
    """`queue_size` requests wait for this provider already."""

    outcome = "rejected"
    code, status, retryable = "provider_queue_full", 503, True
    failover, failure = True, False


class ProviderQueueTimeout(ProviderFault):
    """No place at this provider within its `queue_timeout`."""

    outcome = "rejected"
    code, status, retryable = "provider_queue_timeout", 503, True
    failover, failure = True, False


class NoProvider(ProviderFault):
    """No provider is usable, or this one was taken out of the configuration."""

    outcome = "rejected"
    code, status, retryable = "no_provider", 503, True
    failover, failure = True, False


def public(fault: BaseException) -> AioserverError:
    """What a client may see of *fault*: an unknown one shows nothing of itself."""
    if isinstance(fault, AioserverError):
        return fault
    return InternalError("internal error")


def http_headers(error: AioserverError) -> Mapping[str, str]:
    """The headers an HTTP answer with *error* carries beside its body."""
    headers: dict[str, str] = {}
    if isinstance(error, ProviderFault) and error.provider:
        headers["x-aioserver-provider"] = error.provider
        headers["x-aioserver-attempts"] = str(error.attempts)
    if error.retry_after is not None:
        headers["Retry-After"] = str(max(1, round(error.retry_after)))
    elif error.http_status == 503:
        headers["Retry-After"] = "1"
    sent = isinstance(error, ProviderFault) and (
        error.attempts > 1 or (error.status in {502, 504} and not error.again)
    )
    if error.http_status == 409 or sent:
        headers["x-should-retry"] = "false"
    return headers
