"""One request for an answer, from its admission to its end: its times, its numbers, its log line.

The record is made where the request comes in (gateway.py) and goes along with it; who does something
for it notes when. `RequestLog` counts it when it has ended, and writes one line.
"""

from __future__ import annotations

import logging
from time import monotonic
from typing import TYPE_CHECKING, Any

from aioserver.errors import AioserverError
from aioserver.telemetry.loop_lag import WORTH
from aioserver.telemetry.metrics import CANCELLED, CLIENT_LEFT, OK, Metrics

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aioserver.telemetry.loop_lag import LoopLag

logger = logging.getLogger("aioserver.requests")

MAX_NAME = 200  # characters of a name from outside in a log line


class RequestRecord:
    """Times are of the monotonic clock; 0.0: it has not happened.

    *asked*: admitted, and understood. *lined*: asked for its place at the provider. *waited*: seconds
    in that line. *sent*: the first try was sent. *first*: the answer's first event.

    Three gaps, each the longest of its kind, in seconds: *silence*, between two reads of the provider
    once it has begun to answer (and *silent_until*, when it ended, in the loop's time); *delay*, that
    an event which was read had to wait for us; *stuck*, that its client took nothing.
    """

    __slots__ = (
        "asked",
        "attempts",
        "caller",
        "delay",
        "events",
        "face",
        "first",
        "left",
        "lined",
        "model",
        "provider",
        "request_id",
        "sent",
        "silence",
        "silent_until",
        "stuck",
        "usage",
        "waited",
    )

    def __init__(self) -> None:
        self.face = self.request_id = self.provider = self.model = self.caller = ""
        self.asked = 0.0
        self.lined = self.sent = self.first = self.waited = 0.0
        self.silence = self.silent_until = self.delay = self.stuck = 0.0
        self.attempts = 0
        self.events = 0  # of the answer
        self.usage: Mapping[str, Any] | None = None  # as the provider reports it
        self.left = False  # nobody wanted it any more

    def begin(
        self, face: str, request_id: str, provider: str, model: str, caller: str = ""
    ) -> None:
        """The request was understood, and goes to *provider*; *caller*: the name of its key."""
        self.face = face
        self.caller = caller
        self.request_id = request_id
        self.provider = provider
        self.model = model
        self.asked = monotonic()

    def silent(self, since: float, until: float) -> float:
        """The provider was silent between two reads; returns the longest that it was."""
        if until - since > self.silence:
            self.silence, self.silent_until = until - since, until
        return self.silence

    def tokens(self, *names: str) -> int | None:
        """A number in the usage, by one of its *names*; None where there is none that makes sense."""
        if self.usage is not None:
            for name in names:
                number = self.usage.get(name)
                if isinstance(number, int) and number is not True and 0 <= number < 1 << 40:
                    return number
        return None


NO_RECORD = RequestRecord()  # of a log that no request has begun


class RequestLog:
    """Counts what has ended; *lag* knows how much of a silence is ours."""

    def __init__(self, metrics: Metrics, lag: LoopLag) -> None:
        self.metrics = metrics
        self._lag = lag

    def finish(
        self, record: RequestRecord, error: BaseException | None, *, cancelled: bool = False
    ) -> None:
        """*record* has ended: well, with *error*, or *cancelled*."""
        metrics, now = self.metrics, monotonic()
        code, outcome, status = "", OK, 200
        if error is not None:
            known = error if isinstance(error, AioserverError) else None
            code = known.code if known else "internal_error"
            outcome = known.outcome if known else "internal_error"
            status = known.http_status if known else 500
        elif cancelled:
            outcome, status = (CLIENT_LEFT if record.left else CANCELLED), 499
        metrics.requests.of(record.face, record.provider, code, outcome).value += 1
        metrics.outcomes[outcome].value += 1
        if outcome == "rejected":
            metrics.rejections[code].value += 1
            if isinstance(error, AioserverError):
                error.counted = True
        face, provider = metrics.faces[record.face], metrics.providers[record.provider]
        face.duration.observe(now - record.asked)
        if record.lined:
            face.overhead.observe(record.lined - record.asked)
            provider.wait.observe(record.waited)
        if record.first:
            felt = record.first - record.asked
            face.first_token.observe(felt)
            metrics.felt.add(now, felt)
            provider.first_token.observe(record.first - record.sent)
            provider.recent.add(now, record.first - record.sent)
            if record.events > 1:
                provider.interval.observe((now - record.first) / (record.events - 1))
                self._see_gaps(record, now)
        self._count_tokens(record)
        if logger.isEnabledFor(logging.INFO):
            self._tell(record, now, code, outcome, status)

    def _see_gaps(self, record: RequestRecord, now: float) -> None:
        """Tell the provider's gaps from ours, and from those of a client that takes nothing."""
        metrics, lag, end = self.metrics, self._lag, record.silent_until
        if record.silence > WORTH:
            ours = lag.within(end - record.silence, end)
            record.silence = max(0.0, record.silence - ours)  # sums are not exact
        record.delay = max(record.delay, lag.longest(record.first))
        provider = metrics.providers[record.provider]
        provider.silence.observe(record.silence)
        provider.silences.add(now, record.silence)
        for whose, gap in (("ours", record.delay), ("client", record.stuck)):
            metrics.delay[whose].observe(gap)
            metrics.delays[whose].add(now, gap)

    def _count_tokens(self, record: RequestRecord) -> None:
        into = record.tokens("prompt_tokens", "input_tokens")
        out = record.tokens("completion_tokens", "output_tokens")
        family, provider = self.metrics.tokens, record.provider
        known = (provider, record.model, "output", "provider") in family.children
        model = record.model if known else "other"
        if into is not None:
            family.of(provider, model, "input", "provider").value += into
        if out is not None:
            family.of(provider, model, "output", "provider").value += out
        elif record.events:
            family.of(provider, model, "output", "estimate").value += record.events

    @staticmethod
    def _tell(record: RequestRecord, now: float, code: str, outcome: str, status: int) -> None:
        fields: dict[str, Any] = {
            "request_id": record.request_id[:MAX_NAME],
            "face": record.face,
            "provider": record.provider,
            "model": record.model[:MAX_NAME],
            "status": status,
            "outcome": outcome,
            "duration_ms": round((now - record.asked) * 1000, 1),
            "wait_ms": round(record.waited * 1000, 1),
            "attempts": record.attempts,
        }
        if record.caller:
            fields["caller"] = record.caller
        if code:
            fields["code"] = code
        if record.first:
            fields["first_token_ms"] = round((record.first - record.asked) * 1000, 1)
            gaps = {"provider": record.silence, "our": record.delay, "client": record.stuck}
            fields |= {
                f"{whose}_gap_ms": round(gap * 1000, 1)
                for whose, gap in gaps.items()
                if gap > WORTH
            }
        tokens = {
            "tokens_in": record.tokens("prompt_tokens", "input_tokens"),
            "tokens_out": record.tokens("completion_tokens", "output_tokens"),
        }
        fields |= {name: number for name, number in tokens.items() if number is not None}
        logger.info("request finished", extra={"fields": fields})
