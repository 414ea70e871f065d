"""Silence: how long a provider has sent nothing, in the answers that are under way now.

An answer that has ended is measured in its record (telemetry/request_log.py). A stalled answer has
no end yet, so the exchanges under way are measured once a second, and an event costs nothing. If
there are many exchanges, an exchange that sent something just before a check is skipped for some
seconds.

Only streamed answers count: an answer in one piece sends nothing until it is complete.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Set as AbstractSet

    from aioserver.providers.connections import Receiver
    from aioserver.telemetry.counters import Histogram

# Seconds after which a silence is reported: within an answer, since a model sends several tokens a
# second; and before its first content. The latter is longer, since the model may have to be
# loaded, or to read a long prompt.
IN_ANSWER, BEFORE_ANSWER = 5.0, 10.0
# A silence before the first content is not reported before this multiple of the 95th percentile of
# the times to first contents.
USUAL = 2.0


# Up to so many exchanges are all checked.
FEW = 100
# If there are more than FEW, an exchange that received something in the last HEARD seconds before
# a check is skipped for REST seconds. It is checked again before it has been silent for IN_ANSWER.
HEARD, REST = 1.0, 3.5
# The carrier of an exchange.
C = TypeVar("C")


class Silence(NamedTuple):
    """A provider's silence at one moment.

    *longest* is the seconds since the last byte of the answer that has been silent for longest, or
    since its request was sent. Of the answers *under_way*, *stalled* have begun and then stopped,
    and *unanswered* have not begun, both for so long that the silence should be reported.

    With more than FEW exchanges, *longest* may be too low below IN_ANSWER, and *under_way* up to
    REST seconds old.
    """

    longest: float = 0.0
    stalled: int = 0
    unanswered: int = 0
    under_way: int = 0


class _Look(NamedTuple, Generic[C]):
    """The carriers heard at one check: those of streamed *answers*, and those of *others*."""

    time: float
    answers: set[C]
    others: set[C]


class SilenceMeter(Generic[C]):
    """Measures the silence of one provider, whose exchanges are carried by connections.

    *heard_at* returns when a connection has forwarded an event of a streamed answer, in the loop's
    time; 0.0 if only its exchange knows, which *exchange_of* returns.

    Always: a carrier that is no longer in use is released at the next measurement.
    """

    def __init__(
        self, exchange_of: Callable[[C], Receiver | None], heard_at: Callable[[C], float]
    ) -> None:
        self._exchange_of, self._heard_at = exchange_of, heard_at
        self._looks: list[_Look[C]] = []

    def measure(self, in_use: AbstractSet[C], now: float, first_tokens: Histogram) -> Silence:
        """Return the silence in the exchanges of the carriers *in_use* at *now*, the loop's time.

        *first_tokens* has the provider's times to the first content so far.
        """
        patience = max(BEFORE_ANSWER, USUAL * first_tokens.quantile(0.95))
        longest, stalled, unanswered = 0.0, 0, 0
        due, many = in_use, len(in_use) > FEW
        if not many:
            self._looks.clear()
        else:
            # Sets compare by stored hashes: an object that is not due is not touched.
            self._looks = [
                _Look(look.time, look.answers & in_use, look.others & in_use)
                for look in self._looks
                if now - look.time < REST
            ]
            due = in_use - set().union(*(calm for look in self._looks for calm in look[1:]))
        under_way = sum(len(look.answers) for look in self._looks)
        answers, others = set(), set()
        for carrier in due:
            # Most of many streams receive events all the time, and this touches the fewest objects.
            if many and now - (heard_at := self._heard_at(carrier)) < HEARD:
                under_way += 1
                answers.add(carrier)
                longest = max(longest, now - heard_at)
                continue
            exchange = self._exchange_of(carrier)
            if exchange is None:
                continue
            record, seconds = exchange.record, exchange.silence(now)
            if seconds is None:
                continue
            if not record.streamed:
                others.add(carrier)
                continue
            under_way += 1
            if seconds < HEARD:
                answers.add(carrier)
            longest = max(longest, seconds)
            if record.first_event_at:
                stalled += seconds >= IN_ANSWER
            else:
                unanswered += seconds >= patience
        if many and (answers or others):
            self._looks.append(_Look(now, answers, others))
        return Silence(longest, stalled, unanswered, under_way)
