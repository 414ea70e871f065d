"""What the attempts of a run have cost: the parts of each outcome (telemetry/outcome.py), compared
with what the providers themselves have counted.

An attempt is followed by the connection that it was sent on: the call that its provider has got is
the next one there, as each connection carries one request at a time.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING
from unittest import mock

from aioserver.limits.estimate import Estimate
from aioserver.provider_errors import ProviderBadResponse
from aioserver.providers.attempt import Attempt
from aioserver.providers.costs import MIN_ERROR_STATUS
from aioserver.providers.exchange import Exchange
from aioserver.providers.passthrough import PassedAttempt
from aioserver.providers.provider import Provider
from aioserver.telemetry.outcome import PROVIDER
from aioserver.usage.ledger_reader import REFUSED
from tests.simulation.book import Book
from tests.simulation.noting import noted, together

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import ExitStack

    from aioserver.streams.contracts import Source
    from aioserver.telemetry.outcome import AttemptCost
    from aioserver.usage.ledger import Line
    from tests.simulation.provider import Call, Calls
    from tests.simulation.transport import Transport

# Events of an answer beside those of its tokens: of a response, which is created, has an item with
# a part, and ends; or of a message, which has some blocks.
OTHER_EVENTS = 12


@dataclass(frozen=True, slots=True)
class _Sent:
    """A request that was sent to a provider, whose end of the connection is *far*, after so many
    *earlier* ones.
    """

    far: Transport
    earlier: int


class Bills:
    """Looks at each attempt that ends, and calls *broken* with what is wrong of its part."""

    def __init__(self, calls: Calls, broken: Callable[[str], None]) -> None:
        self._calls = calls
        self._broken = broken
        self._sent: dict[Attempt, _Sent] = {}

    def sent(self, attempt: Attempt, exchange: Source | None = None) -> None:
        """Note that *attempt* is sent, perhaps once more."""
        if isinstance(attempt, PassedAttempt) or not isinstance(exchange, Exchange):
            return
        far = exchange.protocol.transport.peer  # type: ignore[union-attr]
        self._sent[attempt] = _Sent(far, len(self._calls.by_transport[far]))

    def ended(
        self,
        attempt: Attempt,
        exc: BaseException | None,
        cost: AttemptCost | None,
        lines: Sequence[Line],
    ) -> None:
        """Check the *cost* of *attempt*, which has ended, well or with *exc*, and its *lines*."""
        last = [line.cost for line in lines if line.outcome != REFUSED]
        if last != ([] if cost is None else [cost]):
            self._broken(f"an attempt that has cost {cost} has the lines {lines}")
        outcome, sent = attempt.request.outcome, self._sent.pop(attempt, None)
        if cost is not None and outcome.costs[-1] is not cost:
            self._broken(f"{cost} is not in {outcome.costs}")
        if sent is None:
            if cost is not None and not isinstance(attempt, PassedAttempt):
                self._broken(f"an attempt that was not sent has cost {cost}")
            return
        calls = self._calls.by_transport[sent.far]
        call = calls[sent.earlier] if sent.earlier < len(calls) else None
        # What was refused costs nothing, nor what a provider cannot have begun to read.
        costs = attempt.status < MIN_ERROR_STATUS and outcome.sent_at > 0
        # A kept connection that is lost at once is taken for one that the provider had closed.
        if not outcome.sent_at and call is not None and call.arrived:
            self._broken(f"a provider has got what costs nothing: {call}")
        if (cost is not None) != costs:
            self._broken(f"an attempt with the status {attempt.status} has cost {cost}")
        elif cost and (wrong := _wrong(cost, attempt, call, exc or attempt.fault)):
            self._broken(f"{wrong}: {cost}, {call}")

    def patches(self) -> ExitStack:
        """Let all of that be noted, in the block."""
        ended = Provider._ended  # noqa: SLF001 - there is no other door

        def noting_ended(
            provider: Provider,
            attempt: Attempt,
            exc: BaseException | None,
            cost: AttemptCost | None,
        ) -> None:
            book = provider.costs._usage.ledger  # noqa: SLF001 - nobody else knows it
            assert isinstance(book, Book)
            written = book.written
            ended(provider, attempt, exc, cost)
            self.ended(attempt, exc, cost, book.lines[written:])

        return together(
            noted(Attempt, "sending", before=self.sent),
            mock.patch.object(Provider, "_ended", noting_ended),
        )


def _wrong(
    cost: AttemptCost, attempt: Attempt, call: Call | None, failed: BaseException | None
) -> str:
    """Return what is wrong of the *cost* of *attempt*, of which *call* has come to its provider."""
    tokens = cost.tokens_in, cost.tokens_out
    if cost.provider != attempt.provider.name:
        return "a part of another provider"
    if call is not None and call.provider != cost.provider:
        return "an answer of another provider"
    if cost.source == PROVIDER:
        counted = call is not None and call.usage == tokens
        if call is not None and call.usage is not None and call.fault.startswith("early-done"):
            # Of an answer that stops in its middle it has said how much it was so far.
            counted = call.usage[0] == tokens[0] and tokens[1] <= call.usage[1]
        return "" if counted else "tokens that the provider has not counted"
    if call is not None:
        whole = call.transport.peer.received >= call.whole > 0
        if whole and not failed and call.usage is not None and not call.fault:
            return "an estimate, though the provider has counted"
    if not attempt.streamed:
        # What of it was written is not known before it is whole.
        return ""
    sent, received = (0, 0) if call is None else (len(call.tokens), call.tokens_received)
    # Reasoning comes before the first token, as it is counted here.
    before = len(call.answer.opening) if call is not None and call.answer is not None else 0
    if cost.tokens_out > _estimate(attempt, sent + before + OTHER_EVENTS):
        return "more tokens than were sent"
    if failed is None or isinstance(failed, asyncio.CancelledError):
        return ""
    # One event may be what was wrong: it was too long, for example.
    received -= isinstance(failed, ProviderBadResponse)
    if call is not None and call.fault.startswith("bad-"):
        # What came behind the wrong event in one read with it is not looked at.
        received = min(received, int(call.fault.rpartition("-")[2]))
    if cost.tokens_out < _estimate(attempt, received):
        return f"fewer tokens than the {received} that have come"
    return ""


def _estimate(attempt: Attempt, events: int) -> int:
    """Return the tokens of an answer of so many *events*, by what its provider has reported."""
    provider = attempt.provider
    assert isinstance(provider, Provider)
    estimates = provider.costs._estimates  # noqa: SLF001 - what it has learned is nowhere else
    model, caller = attempt.request.outcome.model, attempt.request.caller.flow
    return estimates.unreported(provider.name, model, caller, Estimate(0, 0, 0), events).answer
