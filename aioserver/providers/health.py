"""Whether a provider is asked: not while it fails, refuses our key, or after it was removed.

The breaker of a provider that fails keeps requests away from it. A provider that refuses our key is flagged,
for 5 minutes or until a reload: no client's request would fare better. A 403 may be about the one
request (a text that moderation does not let through), so it flags the provider only as long as the key
has never been accepted: otherwise one client could stop the provider for all.
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

# Seconds for which a provider that refuses our key is not asked.
FLAGGED_FOR = 300.0
KEY_FAULTS = (ProviderAuthError, CertificateFault)


class Health:
    """The health of the provider *name*, known from the ends of its attempts.

    Always: a provider that is removed is not asked, whatever its breaker says.
    """

    def __init__(self, name: str, meter: ProviderMeter) -> None:
        self._name = name
        self._meter = meter
        self.breaker = Breaker()
        # On the monotonic clock.
        self._flagged_until = 0.0
        # Whether the provider has answered well with the key of its present settings.
        self._key_accepted = False
        self._removed = False

    @property
    def flagged(self) -> bool:
        """Whether the provider has refused our key, and is not asked at the moment."""
        return self._flagged_until > monotonic()

    @property
    def state(self) -> str:
        """How the provider is: `well`, `sick` (asked, though it fails often) or `dead` (left alone)."""
        return "well" if self.breaker.state == CLOSED else "dead"

    @property
    def next_try(self) -> float | None:
        """Seconds until the provider is asked again; None while it is asked."""
        if self.flagged:
            return self._flagged_until - monotonic()
        return None if self.state != "dead" else self.breaker.wait

    def check(self) -> None:
        """Refuse an attempt if the provider is not asked now.

        Raises:
            NoProvider: the provider was removed from the configuration.
            ProviderFlagged: the provider has refused our key.
            CircuitOpen: the breaker is open, or a trial is under way.
        """
        if not self.breaker.allows or self._flagged_until > monotonic():
            raise self.refusal()

    def refusal(self) -> ProviderFault:
        """Return the fault that says why the provider is not asked."""
        if self._removed:
            return NoProvider(f"{self._name} was removed from the configuration")
        if self.flagged:
            return ProviderFlagged(f"{self._name} has refused our key")
        # With jitter, so that not all clients come back at once.
        wait = self.breaker.wait * random.uniform(1.0, 1.1)  # noqa: S311
        return CircuitOpen(
            f"{self._name} has failed too often and is not asked for now", retry_after=wait
        )

    def attempt_ended(
        self, exc: BaseException | None, *, trial: bool, outdated: bool = False
    ) -> bool:
        """Learn from an attempt that ended well, or with *exc*.

        An *outdated* attempt was sent by former settings, with another key or to another address. It
        proves nothing about the present settings.

        Returns whether the provider is not asked from now on.
        """
        if outdated:
            self.breaker.attempt_ended(trial=trial, failed=None)
            return False
        if exc is None:
            self._key_accepted = True
            self.breaker.attempt_ended(trial=trial, failed=False)
            return False
        failed = key_refused = None
        if isinstance(exc, ProviderFault) and exc.attempt_outcome:
            failed = True if exc.breaker_failure else None
            about_request = isinstance(exc, ProviderForbidden) and self._key_accepted
            key_refused = isinstance(exc, KEY_FAULTS) and not about_request
        if key_refused:
            self._meter.key_refused.value += 1
            self._flagged_until = max(self._flagged_until, monotonic() + FLAGGED_FOR)
        was_closed = self.breaker.state == CLOSED
        self.breaker.attempt_ended(trial=trial, failed=failed)
        return bool(key_refused) or (was_closed and self.breaker.state != CLOSED)

    def reset(self, *, new_address: bool, new_key: bool) -> None:
        """Forget what new settings make doubtful; a key that was refused is tried again."""
        self._removed, self._flagged_until = False, 0.0
        if new_address:
            # The failures were those of another address.
            self.breaker = Breaker()
        if new_address or new_key:
            self._key_accepted = False

    def remove(self) -> None:
        """Note that the provider was removed from the configuration: it is asked no more."""
        self._removed, self._flagged_until = True, inf
