"""Which fault is asked again, and when. No I/O, no clock: seconds are returned, and the caller waits.

All waits have full jitter: a random part of a span that doubles with each failure (Marc Brooker, "Exponential
Backoff And Jitter", 2015), on top of what the server asks for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from aioserver.client.errors import Fault

# The longest span of a wait by chance, in seconds.
MAX_SPAN = 30.0
# A server that stops is left alone for 1 to 10 s: its successor has to start, and all its clients come.
RESTART_LEAST, RESTART_SPAN = 1.0, 9.0
# Tries to reach a server that has never been reached: a wrong address is told soon.
FIRST_TRIES = 3
# How often a question is asked again after a fault that is the provider's, though nothing was paid for.
MAX_UNPAID = 2

# Codes that say "not now".
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
# Codes of faults before a provider has had the question.
UNPAID = frozenset({"request_timeout", "connect_error", "connect_timeout"})
SHUTDOWN = "server_shutdown"
# Close codes (RFC 6455, 7.4.1) after which a client must not come back with the same.
FINAL_CLOSE_CODES = frozenset({1002, 1003, 1007, 1010})
# The socket was idle, or the server goes away: nothing is wrong.
QUIET_CLOSE_CODES = frozenset({1000, 1001})
POLICY, RESTART, TRY_AGAIN_LATER = 1008, 1012, 1013


def span(failures: int, first: float) -> float:
    """Return the span of the wait after so many *failures* before the last one, at most MAX_SPAN."""
    return float(min(MAX_SPAN, first * 2.0 ** min(failures, 16)))


def after_restart(random: Callable[[], float]) -> float:
    """Return the seconds after which to come back to a server that stops: 1 to 10, by chance."""
    return RESTART_LEAST + RESTART_SPAN * random()


class Retries:
    """The decisions of one answer about the faults that it meets.

    Always: a question is asked again only if nobody has paid for an answer to it.
    """

    def __init__(self, random: Callable[[], float]) -> None:
        self._random = random
        self._refusals = 0
        self._unpaid = 0

    def after_refusal(self, fault: Fault) -> float | None:
        """Return the seconds after which to send the same again; None if that is of no use.

        The fault is one without a number: nothing has begun, and the id is still free.
        """
        if not fault.retryable:
            return None
        if fault.code == SHUTDOWN:
            return max(fault.retry_after or 0.0, after_restart(self._random))
        return self._wait(fault)

    def after_end(self, fault: Fault, *, shown: bool, began: bool) -> float | None:
        """Return the seconds after which to ask under a new id; None if the fault is the end.

        *shown*: some of the answer has come. *began*: a provider has had the question, or may have.
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
        wait = max(1.0, fault.retry_after or 0.0) + span(self._refusals, 1.0) * self._random()
        self._refusals += 1
        return wait


class Reconnection:
    """When a transport connects again.

    Always: the first try after an event has come is at once, unless the server has said otherwise.
    """

    def __init__(self, random: Callable[[], float]) -> None:
        self._random = random
        self._failures = 0
        # Whether the server has ever answered as one of ours.
        self.reached = False

    @property
    def hopeless(self) -> bool:
        """Whether the address looks wrong: no server was ever there."""
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
            return max(1.0, retry_after or 0.0) + span(failures, 1.0) * self._random()
        if not failures:
            return 0.0
        return span(failures - 1, 0.5) * self._random()
