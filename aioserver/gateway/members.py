"""A member of a group: a provider, the model that it is asked for, and what its group knows of
it.
"""

from __future__ import annotations

import hashlib
from itertools import count
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aioserver.config.settings import Provider as ProviderSettings
    from aioserver.providers.provider import Provider

# Seconds in which an engine reads one byte of a prompt, before it is measured.
READING = 60e-6
# Scores of members are below this, a prime number.
PRIME = (1 << 61) - 1


class Member(msgspec.Struct, eq=False):
    """One provider of a group, and the model that it is asked for; None stands for its own.

    *starts* counts the requests that have started there by the group; *started_at* is the
    monotonic time of the newest. *credit* is what the weights owe it (smooth weighted round robin,
    as nginx has it): it grows by the weight with each start, and the member that starts gives back
    the weights of all.

    *mark* is what affinity.py knows it by, one of its group's *marks*. It holds for one *address* and
    until the provider dies, whose *deaths* it knows. *reading* has the seconds in which it reads a
    byte of a prompt. *factor* is of its names, the same in every process: by it members compete
    for conversations.
    """

    provider: Provider
    model: str | None = None
    weight: int = 1
    max_context: int | None = None
    starts: int = 0
    started_at: float = 0.0
    credit: int = 0
    mark: int = 0
    reading: float = READING
    marks: Iterator[int] = msgspec.field(default_factory=count)
    address: str = ""
    deaths: int = 0
    factor: int = 0

    def __post_init__(self) -> None:
        name = f"{self.provider.name}/{self.asked_model}".encode()
        digest = hashlib.blake2b(name, digest_size=8).digest()
        self.factor = int.from_bytes(digest) % PRIME

    def mark_holds(self) -> bool:
        """Return whether what was sent to it under its mark may still be in its cache; it gets
        another mark if not.
        """
        address, breaker = self.provider.pools.base_url, self.provider.health.breaker
        if address != self.address or breaker.deaths != self.deaths:
            self.address, self.deaths, self.mark = address, breaker.deaths, next(self.marks)
        return not breaker.dead

    def takes_more_than(self, other: Member) -> bool:
        """Return whether it may take a prompt that is too long for *other*: unless it is known to
        take no more.
        """
        if self.max_context is None or other.max_context is None:
            return True
        return self.max_context > other.max_context

    @property
    def settings(self) -> ProviderSettings:
        """The settings of its provider."""
        return self.provider.settings

    @property
    def asked_model(self) -> str:
        """The model that it is asked for."""
        return self.model or self.provider.settings.model


def load(member: Member) -> tuple[float, float]:
    """Return what the least busy member has least of: its share of places taken, then the time of
    its newest start.
    """
    inside, limit = member.provider.places
    return inside / max(1, limit), member.started_at


def sick(member: Member) -> bool:
    """Return whether *member* comes last, but for trials, since its provider is sick."""
    breaker = member.provider.health.breaker
    return breaker.sick and not breaker.dead


def well(member: Member) -> bool:
    """Return whether *member* is asked like any other: its provider is neither sick nor dead, and
    has not refused our key.
    """
    health = member.provider.health
    return health.available and not health.breaker.sick
