"""The faults of an answer: the one error that it may raise, the meaning of a refusal, and the rules
by which a question is asked again.

No I/O, no clock: seconds are returned, and the caller waits. All waits have full jitter: a random
part of a span that doubles with each failure (Marc Brooker, "Exponential Backoff And Jitter",
2015), in addition to the time that the server asks for. A reachable server without room names that
time itself, so the span for it grows less.
"""

from __future__ import annotations

import os
import ssl
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import aiohttp
import orjson

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


class AnswerError(Exception):
    """There is no answer, or not the whole of it. It is the only error that an answer raises.

    *code* is the server's code (see the page on errors), or one of the library's own:

    - `connect_error`: the server cannot be reached.
    - `deadline_exceeded`: the deadline of the answer has passed.
    - `protocol_error`: the bytes are not an aioserver's.
    - `cancelled`: another client or program has cancelled the answer.

    *message* is for people. If *retryable*, the same question may succeed after *retry_after*
    seconds (None: unknown), and would not be paid for twice. *text* is the text of the answer so
    far.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        retryable: bool = False,
        retry_after: float | None = None,
        request_id: str = "",
        text: str = "",
    ) -> None:
        super().__init__(f"{message} ({code})")
        self.code = code
        self.message = message
        self.retryable = retryable
        self.retry_after = retry_after
        self.request_id = request_id
        self.text = text

    def __reduce__(self) -> tuple[Any, ...]:
        """Support pickling: the error may have to cross from one process to another."""
        return AnswerError, (self.code, self.message), vars(self)


@dataclass(frozen=True, slots=True)
class Fault:
    """The reason why a question has no answer yet."""

    code: str
    message: str
    retryable: bool = False
    retry_after: float | None = None


class Interrupted(Exception):
    """A reading cannot continue as it is, because of *fault*."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.message)
        self.fault = fault


class Lost(Interrupted):
    """There is no connection. The reading may continue at the loop's time *until*."""

    def __init__(self, fault: Fault, until: float) -> None:
        super().__init__(fault)
        self.until = until


class Refused(Interrupted):
    """The server has refused the question, or the rest of the answer; nothing has begun."""


class Broken(Interrupted):
    """The server's bytes do not follow our protocol, or it forbids the client to come back."""


def protocol_error(message: str) -> Broken:
    """Return the interruption by bytes that an aioserver does not send."""
    return Broken(Fault("protocol_error", message))


# The report of a certificate that is not trusted.
UNTRUSTED = "its certificate is refused"
# Bytes of an error's body that are read.
MAX_ERROR_BYTES = 1 << 16
# Characters of a server's message that are kept.
MAX_MESSAGE = 1000
# The usual codes of statuses without a readable code in the body, such as that of a refused
# WebSocket handshake.
CODES = {
    401: "invalid_api_key",
    403: "permission_denied",
    404: "not_found",
    426: "upgrade_required",
    429: "concurrency_exceeded",
    503: "server_at_capacity",
}
RETRYABLE = frozenset({408, 429, 503})
# A proxy sends these while the server behind it restarts.
GATEWAY_FAULTS = frozenset({502, 504})


def refusal(status: int, headers: Mapping[str, str], body: bytes) -> tuple[Fault, bool]:
    """Return the fault in an HTTP answer, and whether it is final.

    *headers* are looked up by their names in lower case.
    """
    code, message = error_object(body)
    retry_after = _seconds(headers.get("retry-after-ms"), 1000)
    if retry_after is None:
        retry_after = _seconds(headers.get("retry-after"), 1)
    if status in GATEWAY_FAULTS and not code:
        fault = Fault("connect_error", f"HTTP status {status} of a proxy", True, retry_after)
        return fault, False
    retryable = status in RETRYABLE and headers.get("x-should-retry") != "false"
    if not code:
        code = CODES.get(status, "protocol_error")
        message = message or f"HTTP status {status}"
    return Fault(code, message, retryable, retry_after), not retryable


def closed_fault(close_code: int | None) -> Fault:
    """Return the fault of a connection that ended early; *close_code*: the server's, if any."""
    suffix = "" if close_code in {None, 1006} else f", with close code {close_code}"
    return Fault("connect_error", f"the connection to the server was closed{suffix}", True)


def unreachable_fault(url: str, error: BaseException) -> Fault:
    """Return the fault of a connection to *url* that *error* has prevented or broken."""
    return Fault("connect_error", f"{url} cannot be reached: {describe(error)}", True)


def describe(error: BaseException) -> str:
    """Return in a few words why a server was not reached; aiohttp's own texts are long."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, aiohttp.ClientConnectorError):
        inner = error.os_error
        # A failed look-up of a host name has no positive number, and neither has a refused
        # certificate.
        if not isinstance(inner, ssl.SSLError) and inner.errno and inner.errno > 0:
            return os.strerror(inner.errno)
        if isinstance(inner, ssl.SSLCertVerificationError):
            return f"{UNTRUSTED}: {inner.verify_message}"
        return str(inner.strerror or inner)
    return str(error) or type(error).__name__


async def read_body(response: aiohttp.ClientResponse, limit: int) -> bytes:
    """Read the body of *response*; if it is larger than *limit* bytes, a little more
    than these.
    """
    body = bytearray()
    async for data in response.content.iter_any():
        body += data
        if len(body) > limit:
            break
    return bytes(body)


def error_object(body: bytes) -> tuple[str, str]:
    """Return code and message of an error like OpenAI's in *body*; empty without one."""
    try:
        answer: Any = orjson.loads(body)
    except orjson.JSONDecodeError:
        return "", ""
    error = answer.get("error") if isinstance(answer, dict) else None
    if not isinstance(error, dict):
        return "", ""
    return str(error.get("code") or ""), str(error.get("message") or "")[:MAX_MESSAGE]


def _seconds(text: str | None, per_second: int) -> float | None:
    if text is None or not text.isascii() or not text.isdigit() or len(text) > 9:
        return None
    return int(text) / per_second


# The longest span of a random wait, in seconds; and the longest span after a code of FULL.
MAX_SPAN, MAX_BUSY_SPAN = 30.0, 8.0
# Clients come back to a stopping server after 1 to 10 s: its successor has to start, and all clients
# must not come at once.
RESTART_LEAST, RESTART_SPAN = 1.0, 9.0
# Attempts to reach a server that has never been reached: a wrong address is reported soon.
FIRST_TRIES = 3
# How often a question is asked again after a fault of a provider that has cost nothing.
MAX_UNPAID = 2

# Codes of refusals that may soon pass.
FULL = frozenset(
    {
        "server_at_capacity",
        "provider_queue_full",
        "provider_queue_timeout",
        "pool_timeout",
        "circuit_open",
        "no_provider",
        "provider_rate_limited",
        "rate_limit_exceeded",
        "concurrency_exceeded",
    }
)
# The codes that mean that all places are taken.
NO_ROOM = FULL - {"circuit_open", "no_provider", "provider_rate_limited", "rate_limit_exceeded"}
# Codes of faults that come before a provider has received the question.
UNPAID = frozenset({"request_timeout", "connect_error", "connect_timeout"})
SHUTDOWN = "server_shutdown"
# Close codes (RFC 6455, 7.4.1) after which a client must not repeat the same.
FINAL_CLOSE_CODES = frozenset({1002, 1003, 1007, 1010})
# Close codes of an idle socket, or of a server that goes away: no fault.
QUIET_CLOSE_CODES = frozenset({1000, 1001})
POLICY, RESTART, TRY_AGAIN_LATER = 1008, 1012, 1013


def span(failures: int, first: float, most: float = MAX_SPAN) -> float:
    """Return the span of the wait after *failures* earlier failures, at most *most*."""
    return float(min(most, first * 2.0 ** min(failures, 16)))


def after_restart(random: Callable[[], float]) -> float:
    """Return the seconds after which to come back to a server that stops: 1 to 10, at random."""
    return RESTART_LEAST + RESTART_SPAN * random()


class Retries:
    """The decisions of one answer about the faults that it meets.

    Always: a question is asked again only if no answer to it was paid for.
    """

    def __init__(self, random: Callable[[], float]) -> None:
        self._random = random
        self._refusals = 0
        self._unpaid = 0

    def after_refusal(self, fault: Fault) -> float | None:
        """Return the seconds after which to send the same again; None if that is of no use.

        The fault has no number: nothing has begun, and the id is still free.
        """
        if not fault.retryable:
            return None
        if fault.code == SHUTDOWN:
            return max(fault.retry_after or 0.0, after_restart(self._random))
        return self._wait(fault)

    def after_end(self, fault: Fault, *, shown: bool, began: bool) -> float | None:
        """Return the seconds after which to ask under a new id; None if the fault is final.

        *shown*: some of the answer has come. *began*: a provider has had the question, or may
        have.
        """
        if shown or not fault.retryable:
            return None
        if fault.code in FULL or fault.code in UNPAID:
            return self._wait(fault)
        if fault.code == SHUTDOWN and not began:
            return max(fault.retry_after or 0.0, after_restart(self._random))
        return None

    def _wait(self, fault: Fault) -> float | None:
        if fault.code in UNPAID:
            if self._unpaid >= MAX_UNPAID:
                return None
            self._unpaid += 1
        longest = span(self._refusals, 1.0, MAX_BUSY_SPAN)
        self._refusals += 1
        return max(1.0, fault.retry_after or 0.0) + longest * self._random()


class Reconnection:
    """Decides when a transport connects again.

    Always: the first attempt after an event is immediate, unless the server has said otherwise.
    """

    def __init__(self, random: Callable[[], float]) -> None:
        self._random = random
        self._failures = 0
        # Whether the server has ever answered as an aioserver.
        self.reached = False

    @property
    def hopeless(self) -> bool:
        """Whether the address looks wrong: no server was ever reached there."""
        return not self.reached and self._failures >= FIRST_TRIES

    def progressed(self) -> None:
        """Note that an event has come: the connection is good."""
        self._failures = 0

    def after_loss(self, close_code: int | None = None, retry_after: float | None = None) -> float:
        """Return the seconds after which to connect again.

        *close_code*: the server's, None if no close frame came, or no connection was made.
        """
        failures, self._failures = self._failures, self._failures + 1
        if close_code == RESTART:
            return max(retry_after or 0.0, after_restart(self._random))
        if close_code in {POLICY, TRY_AGAIN_LATER} or retry_after is not None:
            longest = span(failures, 1.0, MAX_BUSY_SPAN)
            return max(1.0, retry_after or 0.0) + longest * self._random()
        if not failures:
            return 0.0
        return span(failures - 1, 0.5) * self._random()
