"""Silence: how long a provider has sent nothing, in the answers that are under way now.

An answer that has ended is measured in its record (telemetry/request_log.py). An answer that has
stalled has no end yet, so the exchanges under way are measured once a second: there are at most
`max_connections` of them, and an event costs nothing.

Only streamed answers count: an answer in one piece sends nothing until it is complete.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

    from aioserver.providers.connections import Receiver
    from aioserver.telemetry.counters import Histogram

# Seconds after which a silence is reported: within an answer, where a model sends several tokens a
# second, and before its first content, since the model may have to be loaded, or to read a long
# prompt.
IN_ANSWER, BEFORE_ANSWER = 5.0, 10.0
# A silence before the first content is not reported before this multiple of the time in which 95 of
# 100 first contents came.
USUAL = 2.0


class Silence(NamedTuple):
    """A provider's silence at one moment.

    *longest* is the seconds since the last byte of the answer that has been silent for longest, or
    since its request was sent. Of the answers *under_way*, *stalled* have begun and then stopped,
    and *unanswered* have not begun, both for so long that the silence should be reported.
    """

    longest: float = 0.0
    stalled: int = 0
    unanswered: int = 0
    under_way: int = 0


def measure(exchanges: Iterable[Receiver], now: float, first_tokens: Histogram) -> Silence:
    """Return the silence in *exchanges* at *now*, the loop's time.

    *first_tokens* has the times to the first content that the provider has needed so far.
    """
    patience = max(BEFORE_ANSWER, USUAL * first_tokens.quantile(0.95))
    longest, stalled, unanswered, under_way = 0.0, 0, 0, 0
    for exchange in exchanges:
        record = exchange.record
        seconds = exchange.silence(now)
        if seconds is None or not record.streamed:
            continue
        under_way += 1
        longest = max(longest, seconds)
        if record.first_event_at:
            stalled += seconds >= IN_ANSWER
        else:
            unanswered += seconds >= patience
    return Silence(longest, stalled, unanswered, under_way)
