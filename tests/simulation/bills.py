"""What the attempts of a run have cost: the parts of each outcome (telemetry/outcome.py), compared
with what the providers themselves have counted.

An attempt is followed by the connection that it was sent on: the call that its provider has got is
the next one there, as each connection carries one request at a time.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING
from unittest import mock

from aioserver.providers.attempt import Attempt
from aioserver.providers.exchange import Exchange
from aioserver.providers.passthrough import PassedAttempt
from aioserver.providers.provider import Provider
from aioserver.telemetry.outcome import PROVIDER

if TYPE_CHECKING:
    from collections.abc import Callable

    from aioserver.streams.contracts import Source
    from aioserver.telemetry.outcome import Outcome, Part
    from tests.simulation.provider import Call, Calls
    from tests.simulation.transport import Transport

# Events of an answer beside those of its tokens: of a response, which is created, has an item with
# a part, and ends.
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
        self._numbers: Counter[Outcome] = Counter()

    def sent(self, attempt: Attempt, exchange: Source | None) -> None:
        """Note that *attempt* is sent, perhaps once more."""
        if isinstance(attempt, PassedAttempt) or not isinstance(exchange, Exchange):
            return
        far = exchange._transport.peer  # type: ignore[attr-defined]  # noqa: SLF001 - nobody else knows it
        if attempt not in self._sent:
            self._numbers[attempt.request.outcome] += 1
        self._sent[attempt] = _Sent(far, len(self._calls.by_transport[far]))

    def ended(self, attempt: Attempt, exc: BaseException | None, before: int) -> None:
        """Check the part of *attempt*, which has ended, well or with *exc*; its outcome had so
        many parts *before*.
        """
        outcome, sent = attempt.request.outcome, self._sent.pop(attempt, None)
        grown = len(outcome.parts) - before
        if sent is None:
            if grown and not isinstance(attempt, PassedAttempt):
                self._broken(f"an attempt that was not sent has {grown} parts: {outcome.parts}")
            return
        number = self._numbers[outcome]
        failed = exc or attempt.fault
        if not outcome.parts and not failed and number == 1:
            # As a rule, the answer itself is the bill.
            return
        if grown != 1 or len(outcome.parts) != number:
            self._broken(f"{number} attempts were sent, and their parts are {outcome.parts}")
            return
        calls = self._calls.by_transport[sent.far]
        call = calls[sent.earlier] if sent.earlier < len(calls) else None
        if wrong := _wrong(outcome.parts[-1], attempt, call, failed):
            self._broken(f"{wrong}: {outcome.parts[-1]}, {call}")

    def patches(self) -> ExitStack:
        """Let all of that be noted, in the block."""
        stack, noted = ExitStack(), self
        sending, ended = Attempt.sending, Provider._ended  # noqa: SLF001 - there is no other door

        def noting_sending(attempt: Attempt, exchange: Source | None = None) -> None:
            noted.sent(attempt, exchange)
            sending(attempt, exchange)

        def noting_ended(provider: Provider, attempt: Attempt, exc: BaseException | None) -> None:
            before = len(attempt.request.outcome.parts)
            ended(provider, attempt, exc)
            noted.ended(attempt, exc, before)

        stack.enter_context(mock.patch.object(Attempt, "sending", noting_sending))
        stack.enter_context(mock.patch.object(Provider, "_ended", noting_ended))
        return stack


def _wrong(part: Part, attempt: Attempt, call: Call | None, failed: BaseException | None) -> str:
    """Return what is wrong of the *part* of *attempt*, of which *call* has come to its provider."""
    tokens = part.tokens_in, part.tokens_out
    if part.provider != attempt.provider.name:
        return "a part of another provider"
    if attempt.status not in {0, 200}:
        return "a refusal has tokens" if any(tokens) else ""
    if call is None:
        return "an answer that nobody gave has tokens" if part.tokens_out else ""
    if call.provider != part.provider:
        return "an answer of another provider"
    if part.source == PROVIDER:
        return "" if call.usage == tokens else "tokens that the provider has not counted"
    if part.tokens_out > len(call.tokens) + OTHER_EVENTS:
        return "more tokens than were sent"
    whole = call.transport.peer.received >= call.whole > 0
    if whole and not failed and call.usage is not None and not call.fault:
        return "an estimate, though the provider has counted"
    # Of an answer in one piece nothing is counted before it is whole.
    lost = (
        failed is None
        or not attempt.request.streamed
        or isinstance(failed, asyncio.CancelledError)
    )
    # One event may be what was wrong: it was too long, for example.
    least = call.tokens_received - (part.outcome == "bad_response")
    if not lost and part.tokens_out < least:
        return f"fewer tokens than the {call.tokens_received} that have come"
    return ""
