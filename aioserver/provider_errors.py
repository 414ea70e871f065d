"""The faults between us and a provider's answer, and the next attempts that each fault allows.

How errors look on the faces is described in errors.py. A fault also states whether the same
provider may be asked again (retry), whether the next one may be (failover), and whether the
breaker counts it:

    ProviderFault
        ConnectError                502  connect_error           retry  failover  breaker
        ConnectTimeout              504  connect_timeout         retry  failover  breaker
        CertificateFault            502  provider_auth_error            failover
        PoolTimeout                 503  pool_timeout                   failover
        WriteTimeout                504  write_timeout                  failover  breaker
        ReadTimeout                 504  read_timeout                   failover  breaker
        FirstTokenTimeout           504  first_token_timeout            failover  breaker
        ProviderDisconnected        502  provider_disconnected          failover  breaker
            ConnectionBroken        502  provider_disconnected   once   failover  breaker
            StaleConnection         502  provider_disconnected   retry  failover
        ProviderBadResponse         502  provider_bad_response          failover  breaker
            ContinuationFailed      502  provider_bad_response          failover
        ProviderAuthError           502  provider_auth_error            failover
            ProviderForbidden       502  provider_auth_error            failover
            ProviderFlagged         502  provider_auth_error            failover
        ProviderLeadsBack           508  loop_detected                  failover
            LoopFlagged             508  loop_detected                  failover
        CircuitOpen                 503  circuit_open                   failover
        ProviderRateLimited         429  provider_rate_limited   retry  failover
            ProviderPaced           429  provider_rate_limited          failover
        ProviderError               502  provider_error          retry  failover  breaker
        ProviderRefused             400  provider_error
            ContextTooLong          400  provider_error                 failover
        RequestNotBridged           400  invalid_request                failover
        ProviderQueueFull           503  provider_queue_full            failover
        ProviderQueueTimeout        503  provider_queue_timeout         failover
        NoProvider                  503  no_provider                    failover

Once there is content of an answer, neither a retry nor a failover happens, whatever the fault
allows. Before it some of them may cost an answer twice: the provider that was silent, or broke
off, may have worked, and may ask for its price.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Protocol, TypeVar

from aioserver.errors import AioserverError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

ErrorClass = TypeVar("ErrorClass", bound=AioserverError)


class RequestOutcome(Protocol):
    """The outcome of a request (telemetry/outcome.py), as its faults see it."""

    provider: str
    attempts: int
    headers: Mapping[str, str]


class ProviderFault(AioserverError):
    """There is no good answer, because of the provider or of the network between it and us."""

    outcome = "provider_error"
    # The outcome of the attempt, a metric label; empty if no attempt was made.
    attempt_outcome: ClassVar[str] = ""
    # The same provider may be asked again.
    retry: bool = False
    # The provider is asked again only once, and at once: a second fault like it is not chance.
    once: ClassVar[bool] = False
    # The next provider may be asked.
    failover: ClassVar[bool] = False
    # The breaker counts the fault as a failure.
    breaker_failure: ClassVar[bool] = True
    # Nothing was sent, and trying again may help: an SDK may repeat the request, and
    # still pays once.
    unsent: ClassVar[bool] = False
    # It does not know what the request continues, and another member of its group may.
    unknown_there: bool = False
    # The provider's own event, by which it has reported the fault of an answer that had begun.
    event: bytes = b""
    # The provider cannot be reached, or says that it is not ready.
    unreachable: bool = False
    # For how many seconds the request would have to wait for its next attempt, which is more than
    # its deadline leaves; 0.0 if that is not the reason why there is none.
    backoff: float = 0.0
    # The outcome of the request that it has ended; None if it went to no provider.
    request_outcome: RequestOutcome | None = None

    def headers(self) -> dict[str, str]:
        """Return the error's headers, with the provider's, the attempts, and whether an SDK may
        retry.
        """
        headers, attempts = super().headers(), 0
        if (outcome := self.request_outcome) is not None:
            attempts = outcome.attempts
            headers = {**outcome.headers, **headers}
            headers["x-aioserver-provider"] = outcome.provider
            headers["x-aioserver-attempts"] = str(attempts)
        repeated = attempts > 1 or (self.status in {502, 504} and not self.unsent)
        if repeated and not self.invites:
            headers["x-should-retry"] = "false"
        return headers


class ConnectError(ProviderFault):
    """No connection: it was refused, the name did not resolve, or TLS failed."""

    attempt_outcome = "connect_error"
    code, status, retryable = "connect_error", 502, True
    retry = failover = unsent = unreachable = True


class ConnectTimeout(ProviderFault):
    """DNS, TCP and TLS together took longer than `connect_timeout`."""

    attempt_outcome = "timeout"
    code, status, retryable = "connect_timeout", 504, True
    retry = failover = unsent = unreachable = True


class CertificateFault(ProviderFault):
    """The provider's certificate is not valid."""

    attempt_outcome = "tls"
    code, status = "provider_auth_error", 502
    failover, breaker_failure = True, False


class PoolTimeout(ProviderFault):
    """No pooled connection became free within `pool_timeout`, or no descriptor was free for a new
    one.
    """

    outcome = "rejected"
    code, status, retryable = "pool_timeout", 503, True
    failover, breaker_failure = True, False


class WriteTimeout(ProviderFault):
    """The provider accepted nothing of the request for `write_timeout`."""

    attempt_outcome = "timeout"
    code, status, retryable = "write_timeout", 504, True
    failover = True


class ReadTimeout(ProviderFault):
    """The provider sent nothing for `read_timeout`."""

    attempt_outcome = "timeout"
    code, status, retryable = "read_timeout", 504, True
    failover = True


class FirstTokenTimeout(ProviderFault):
    """The provider sent no content of a streamed answer for `first_token_timeout`."""

    attempt_outcome = "timeout"
    code, status, retryable = "first_token_timeout", 504, True
    failover = True


class ProviderDisconnected(ProviderFault):
    """The provider closed the connection before its answer was complete."""

    attempt_outcome = "disconnected"
    code, status, retryable = "provider_disconnected", 502, True
    failover = True


class ConnectionBroken(ProviderDisconnected):
    """A new connection broke before a byte of the answer came."""

    retry = once = True


class StaleConnection(ProviderDisconnected):
    """A pooled connection was dead before a byte of the answer came: the request may be
    repeated.
    """

    attempt_outcome = "stale"
    retry, breaker_failure = True, False


class ProviderBadResponse(ProviderFault):
    """The answer is not HTTP, not JSON or no event stream, or exceeds a bound."""

    attempt_outcome = "bad_response"
    code, status, retryable = "provider_bad_response", 502, True
    failover = True


class ContinuationFailed(ProviderBadResponse):
    """The continuation is not the rest of the answer that broke off."""

    breaker_failure = False


class ProviderAuthError(ProviderFault):
    """The provider refuses our key; its message is never shown."""

    attempt_outcome = "http_4xx"
    code, status = "provider_auth_error", 502
    failover, breaker_failure = True, False


class ProviderForbidden(ProviderAuthError):
    """The provider answered 403, 402, or a 401 about a model: our key may not do this, or this
    request may not be made (moderation, the credit that is left).

    """

    # It says that another request would do.
    of_request = False


class ProviderFlagged(ProviderAuthError):
    """The provider refused our key a moment ago, and is not asked again yet."""

    attempt_outcome = ""


class ProviderLeadsBack(ProviderFault):
    """The provider's address leads back to this server, or to others in a circle."""

    attempt_outcome = "loop"
    code, status = "loop_detected", 508
    failover, breaker_failure = True, False

    def headers(self) -> dict[str, str]:
        """Return the headers: the same request would go the same way."""
        return {**super().headers(), "x-should-retry": "false"}


class LoopFlagged(ProviderLeadsBack):
    """The provider has led back to this server a moment ago, and is not asked again yet."""

    attempt_outcome = ""


class CircuitOpen(ProviderFault):
    """The provider is dead: it has answered nothing lately, and is left alone but for trials."""

    outcome, timed = "rejected", True
    code, status, retryable = "circuit_open", 503, True
    failover, breaker_failure = True, False


class ProviderRateLimited(ProviderFault):
    """The provider answered 429 or 498."""

    attempt_outcome, timed = "http_429", True
    code, status, retryable = "provider_rate_limited", 429, True
    retry, failover, breaker_failure = True, True, False


class ProviderPaced(ProviderRateLimited):
    """Our pace for the provider (`requests_per_minute`) cannot start the request before its
    deadline.
    """

    outcome, attempt_outcome = "rejected", ""
    retry = False


class ProviderError(ProviderFault):
    """The provider answered 5xx, or its event stream has an error object."""

    attempt_outcome = "http_5xx"
    code, status, retryable = "provider_error", 502, True
    retry = failover = True


class ProviderRefused(ProviderFault):
    """The provider calls the request faulty (4xx): its status and body pass unchanged.

    *reason*: what the provider says, for the caller alone: it may repeat what the caller has
    written, so the text of this exception, which may be logged, is without it.
    """

    outcome, attempt_outcome = "client_error", "http_4xx"
    code, status = "provider_error", 400
    breaker_failure = False

    def __init__(self, message: str, status: int, content: bytes, reason: str = "") -> None:
        super().__init__(message)
        if reason:
            self.message = f"{message}: {reason}"
        self.reason = reason
        self.provider_status = status
        self.provider_body = content

    @property
    def http_status(self) -> int:
        """The HTTP status of the provider's answer."""
        return self.provider_status

    def body(self) -> bytes:
        """Return the body of the provider's answer, unchanged."""
        return self.provider_body


class ContextTooLong(ProviderRefused):
    """The request is longer than the context of the provider's model; that of another may do."""

    failover = True


class RequestNotBridged(ProviderFault):
    """The provider has chat completions only, and the request has no form there."""

    outcome = "client_error"
    code, status = "invalid_request", 400
    failover, breaker_failure = True, False


class ProviderQueueFull(ProviderFault):
    """`queue_size` requests are waiting for this provider already."""

    outcome = "rejected"
    code, status, retryable = "provider_queue_full", 503, True
    failover, breaker_failure = True, False


class ProviderQueueTimeout(ProviderFault):
    """No place at this provider became free within its `queue_timeout`."""

    outcome = "rejected"
    code, status, retryable = "provider_queue_timeout", 503, True
    failover, breaker_failure = True, False


class NoProvider(ProviderFault):
    """No provider is usable, or the request's provider was removed from the configuration."""

    outcome = "rejected"
    code, status, retryable = "no_provider", 503, True
    failover, breaker_failure = True, False


def subclasses(root: type[ErrorClass]) -> Iterator[type[ErrorClass]]:
    """Yield every class that is derived from *root*, at any depth.

    This stands in the file that is loaded last of the two with error classes, so that no class is
    missing.
    """
    for subclass in root.__subclasses__():
        yield subclass
        yield from subclasses(subclass)
