"""Whether a provider is to be left alone: since it fails, refuses our key, or was taken out.

One that fails is left alone by its breaker. One that refuses our key is flagged, for 5 minutes or until a
reload: nobody's request would fare better. A 403 may be about the one request (a text that is not let
through), so it flags only as long as the key has not been taken: else one client could stop the provider
for everybody.
"""

from __future__ import annotations

import random
from math import inf
from time import monotonic
from typing import TYPE_CHECKING

from aioserver.provider_errors import (
    CertificateFault,
    CircuitOpen,
    NoProvider,
    ProviderAuthError,
    ProviderFault,
    ProviderFlagged,
    ProviderForbidden,
)
from aioserver.providers.breaker import CLOSED, Breaker

if TYPE_CHECKING:
    from aioserver.telemetry.metrics import ProviderMeter

FLAGGED = 300.0  # seconds for which one that refuses our key is not asked
KEY_FAULTS = (ProviderAuthError, CertificateFault)


class Health:
    """What is known of the provider *name*, from how its tries have ended."""

    def __init__(self, name: str, meter: ProviderMeter) -> None:
        self._name = name
        self._meter = meter
        self.breaker = Breaker()
        self._flagged_until = 0.0  # monotonic
        self._trusted = False  # it has answered well with the key that it has now
        self._gone = False

    @property
    def flagged(self) -> bool:
        """Whether it has refused our key, and is not asked now."""
        return self._flagged_until > monotonic()

    def check(self) -> None:
        """Raise where it is to be left alone."""
        if not self.breaker.allows or self._flagged_until > monotonic():
            raise self.left_alone()

    def left_alone(self) -> ProviderFault:
        """Why it is."""
        if self._gone:
            return NoProvider(f"{self._name} was taken out of the configuration")
        if self.flagged:
            return ProviderFlagged(f"{self._name} has refused our key")
        wait = self.breaker.wait * random.uniform(1.0, 1.1)  # noqa: S311 - not all at once
        return CircuitOpen(f"{self._name} fails, and is left alone", retry_after=wait)

    def ended(self, exc: BaseException | None, *, trial: bool, outdated: bool = False) -> bool:
        """A try has ended, well or with *exc*; whether it is left alone from now on.

        One that is *outdated* was sent as the settings of before said: by another key, or to another
        address. It tells nothing of those of now.
        """
        if outdated:
            self.breaker.ended(trial=trial, failed=None)
            return False
        if exc is None:
            self._trusted = True
            self.breaker.ended(trial=trial, failed=False)
            return False
        failed = flag = None
        if isinstance(exc, ProviderFault) and exc.attempt_outcome:
            failed = True if exc.breaker_failure else None
            about_request = isinstance(exc, ProviderForbidden) and self._trusted
            flag = isinstance(exc, KEY_FAULTS) and not about_request
        if flag:
            self._meter.key_refused.value += 1
            self._flagged_until = max(self._flagged_until, monotonic() + FLAGGED)
        closed = self.breaker.state == CLOSED
        self.breaker.ended(trial=trial, failed=failed)
        return bool(flag) or (closed and self.breaker.state != CLOSED)

    def renew(self, *, elsewhere: bool, other_key: bool) -> None:
        """It has other settings: *elsewhere*, another address; a key that was refused is tried again."""
        self._gone, self._flagged_until = False, 0.0
        if elsewhere:
            self.breaker = Breaker()  # what failed was another address
        if elsewhere or other_key:
            self._trusted = False

    def leave(self) -> None:
        """It is taken out of the configuration."""
        self._gone, self._flagged_until = True, inf
