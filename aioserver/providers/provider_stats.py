"""A provider as it is at one moment: for pages, metrics and tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aioserver.limits.gate import GateStats
    from aioserver.providers.budget import BudgetStats
    from aioserver.providers.pool import PoolStats
    from aioserver.providers.stall import Silence


@dataclass(frozen=True, slots=True)
class PaceStats:
    """A snapshot of a pace: starts per minute, how many could start now, seconds of cooling down."""

    per_minute: int
    left: int
    cooling: float


@dataclass(frozen=True, slots=True)
class ProviderStats:
    """A snapshot of a provider."""

    name: str
    usable: bool
    queue: GateStats
    pool: PoolStats
    pace: PaceStats
    state: str
    flagged: bool
    next_try: float | None
    silence: Silence
    budget: BudgetStats
