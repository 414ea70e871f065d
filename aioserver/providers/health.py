"""Whether a provider is asked: not while it is dead or refuses our key, and not after it was
removed.

The states in which a provider is not well, each with the object that knows it, and its effect on a
request:

    removed     `Health`            refused: the configuration does not name the provider any more
    flagged     `Health`            refused, for 5 minutes or until a reload
    dead        `Health.breaker`    refused, except for trials
    away        `Health`            dead, since it cannot be reached; with `when_down: wait` a
                                    request that no other provider can answer waits
    cooling     `Capacity.pace`     waits, or goes elsewhere if another provider can answer it
    sick        `Health.breaker`    goes elsewhere if another provider can answer it, except for
                                    trials
    silent      `SilenceMeter`      sent as usual: a silence is reported, until a timeout ends it

`Capacity.check` decides by all of them. A provider that refuses our key is flagged: no client's
request would fare better. So is a provider whose certificate is invalid, or whose address leads
back to this server.

A refusal that may be about one request does not flag a provider that has accepted its key:
otherwise one client could stop the provider for all. Such refusals are a 403 (a text that
moderation rejects), a 402 (an answer of more tokens than the credit covers), and a 401 about a
model. Nor does a loop flag the provider if the client itself has named servers that its request
came through.
"""

from __future__ import annotations

import random
import time
from math import inf
from typing import TYPE_CHECKING

from aioserver.provider_errors import (
    CertificateFault,
    CircuitOpen,
    LoopFlagged,
    NoProvider,
    ProviderAuthError,
    ProviderFault,
    ProviderFlagged,
    ProviderForbidden,
    ProviderLeadsBack,
)
from aioserver.providers.breaker import Breaker
from aioserver.providers.verdicts import VERDICT_FOR

if TYPE_CHECKING:
    from collections.abc import Callable

    from aioserver.telemetry.metrics import ProviderMeter

# The value of `when_down` with which requests wait.
WAIT = "wait"
KEY_FAULTS = (ProviderAuthError, CertificateFault, ProviderLeadsBack)


class ProviderObserver:
    """Observes what this instance learns about one provider; this class ignores it."""

    def died(self, *, unreachable: bool) -> None:
        """Note that the provider is dead, and whether it cannot be reached."""

    def revived(self) -> None:
        """Note that the provider has answered again."""

    def cooling(self, seconds: float) -> None:
        """Note that the provider has asked for a pause of *seconds*."""


ALONE = ProviderObserver()


class Health:
    """The health of the provider *name*, known from the results of its attempts.

    Always: a provider that was removed is not asked, whatever its breaker says.

    *observer* is told the findings of this instance, not those that others report to `breaker`.
    *waits*: requests may wait for the return of a provider that is away.
    """

    def __init__(
        self,
        name: str,
        meter: ProviderMeter,
        clock: Callable[[], float] = time.monotonic,
        observer: ProviderObserver = ALONE,
        *,
        waits: bool = False,
    ) -> None:
        self.waits = waits
        self._name = name
        self._meter = meter
        self._clock = clock
        self.breaker = Breaker(clock)
        self.observer = observer
        # When a provider that has refused our key is asked again; 0.0 if it has not.
        self.flagged_until = 0.0
        # Whether the flag is set because its address leads back to this server.
        self._leads_back = False
        # Whether the provider has accepted the key of its present settings.
        self._key_accepted = False
        self._removed = False
        # Whether another provider could answer the newest request that found this one dead.
        self._alternative = False

    @property
    def flagged(self) -> bool:
        """Whether the provider has refused our key, and is not asked at the moment."""
        return self.flagged_until > 0.0 and self.flagged_until > self._clock()

    @property
    def available(self) -> bool:
        """Whether the provider is asked like any other: it is not dead, flagged or removed."""
        return not (self.breaker.dead or self.flagged)

    @property
    def well(self) -> bool:
        """Whether the provider is available, and not sick."""
        return self.available and not self.breaker.sick

    @property
    def away(self) -> bool:
        """Whether requests that no other provider can answer wait for the return of the provider,
        which is dead.
        """
        dead = self.breaker.dead and self.breaker.unreachable
        return dead and self.waits and not self.flagged

    @property
    def state(self) -> str:
        """The state of the provider: `well`, `sick` (asked, though it fails often) or `dead` (not
        asked).
        """
        return self.breaker.state

    def next_try(self, *, waited_for: bool) -> float | None:
        """Return the seconds until the provider is asked again; None while it is asked.

        *waited_for* says that requests wait for its return: they are its next trials. Otherwise
        the next request is the next trial, and is assumed to be like the newest one: either
        another provider can answer it, so that trials are rare, or none can.
        """
        if self.flagged:
            return self.flagged_until - self._clock()
        if not self.breaker.dead:
            return None
        return self.breaker.next_trial(alternative=self._alternative and not waited_for)

    @property
    def retry_after(self) -> float:
        """The seconds after which a request may fare better, while the provider is dead."""
        return max(1.0, self.breaker.next_trial())

    def check(self, *, alternative: bool = False) -> None:
        """Refuse an attempt if the provider is not asked now.

        *alternative* says that another provider can answer the request.

        Raises:
            NoProvider: the provider was removed from the configuration.
            ProviderFlagged, LoopFlagged: the provider has refused our key, or led back to us.
            CircuitOpen: the provider is dead, and no trial may start now.
        """
        if self.flagged:
            raise self.refusal()
        if self.breaker.dead:
            self._alternative = alternative
            if self.breaker.delay(alternative=alternative) > 0:
                raise self.refusal()

    def refusal(self) -> ProviderFault:
        """Return the fault that says why the provider is not asked."""
        if self._removed:
            return NoProvider(f"{self._name} was removed from the configuration")
        if self.flagged and self._leads_back:
            return LoopFlagged(f"llm.providers.{self._name}.base_url leads back to this server")
        if self.flagged:
            return ProviderFlagged(f"{self._name} has refused our key")
        # With jitter, so that the clients do not all come back at once.
        wait = self.retry_after * random.uniform(1.0, 1.1)  # noqa: S311
        return CircuitOpen(
            f"{self._name} has answered nothing lately and is not asked for now", retry_after=wait
        )

    def answered(self, seconds: float, *, trial: bool) -> bool:
        """Learn that an attempt has its first event, after *seconds*; return whether the provider
        was dead.
        """
        self._key_accepted = True
        revived = self.breaker.succeeded(seconds, trial=trial)
        if revived:
            self.observer.revived()
        return revived

    def attempt_failed(
        self, exc: BaseException, began: float, *, trial: bool, answered: bool
    ) -> bool:
        """Learn from an attempt that *began* then and ended with *exc*; return whether no other
        may start now.

        *answered*: it had its first event before.
        """
        if not isinstance(exc, ProviderFault) or not exc.attempt_outcome:
            self.breaker.unsure(trial=trial)
            return False
        if isinstance(exc, KEY_FAULTS) and not (
            isinstance(exc, ProviderForbidden) and (self._key_accepted or exc.of_request)
        ):
            self._leads_back = isinstance(exc, ProviderLeadsBack)
            self._meter.key_refused.value += not self._leads_back
            self.flagged_until = max(self.flagged_until, self._clock() + VERDICT_FOR)
            self.breaker.unsure(trial=trial)
            return True
        if not exc.breaker_failure:
            self.breaker.unsure(trial=trial)
            return False
        died = self.breaker.failed(
            began, trial=trial, answered=answered, unreachable=exc.unreachable
        )
        if died:
            self.observer.died(unreachable=self.breaker.unreachable)
        return died

    def reset(self, *, new_address: bool, new_key: bool, waits: bool) -> None:
        """Forget what new settings make doubtful; a key that was refused is tried again. *waits*:
        see the class.
        """
        self.waits = waits
        self._removed, self.flagged_until = False, 0.0
        if new_address:
            # The failures belong to another address.
            self.breaker.reset()
        if new_address or new_key:
            self._key_accepted = False

    def remove(self) -> None:
        """Note that the provider was removed from the configuration: it is not asked any more."""
        self._removed, self.flagged_until = True, inf
