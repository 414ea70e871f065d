"""The state of the keys: their running and waiting requests, and their spent tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aioserver.auth.keys import Keys
    from aioserver.limits.budget import BudgetState
    from aioserver.limits.quota import Quota
    from aioserver.monitoring.state import KeyBudgetState, KeyState
    from aioserver.usage.sums import CallerSums


def key_states(keys: Keys, sums: CallerSums) -> dict[str, KeyState]:
    """Return the state of each of *keys*, by the names of their callers."""
    return {name: _state(quota, sums.today(name)) for name, quota in keys.quotas().items()}


def _state(quota: Quota, tokens_today: int) -> KeyState:
    return {
        "running": quota.running,
        "limit": quota.limit,
        "waiting": quota.resource.waiting,
        "queue_size": quota.queue_size,
        "tokens_today": tokens_today,
        "budgets": budget_states(quota),
    }


def budget_states(quota: Quota) -> dict[str, KeyBudgetState]:
    """Return the state of each budget of *quota*, by its setting."""
    return {name: _budget(budget) for name, budget in quota.budgets().items()}


def _budget(budget: BudgetState) -> KeyBudgetState:
    return {
        "limit": budget.limit,
        "used": budget.used,
        "reserved": budget.reserved,
        "remaining": budget.remaining,
        "reset": round(budget.reset, 1),
    }
