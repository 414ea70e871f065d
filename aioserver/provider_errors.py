"""The provider's errors: what lies between us and its answer. How they are shown is told in errors.py.

What follows from each is told here once, too: another try, another provider, what the breaker thinks.
"""

from __future__ import annotations

from typing import ClassVar

from aioserver.errors import AioserverError


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
    provider: str = ""  # whose fault it is, and how often one was asked
    attempts: int = 0

    def headers(self) -> dict[str, str]:
        """As of every error, with who was asked, how often, and whether that was paid for."""
        headers = super().headers()
        if self.provider:
            headers["x-aioserver-provider"] = self.provider
            headers["x-aioserver-attempts"] = str(self.attempts)
        if self.attempts > 1 or (self.status in {502, 504} and not self.again):
            headers["x-should-retry"] = "false"
        return headers


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


class ProviderForbidden(ProviderAuthError):
    """403: our key may not do this; or this one request may not be made (a moderated text)."""


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
