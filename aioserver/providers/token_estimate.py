"""The tokens that a request is expected to cost, where tokens are paced, and what it did cost."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aioserver.telemetry.request_log import MAX_TOKENS

if TYPE_CHECKING:
    from aioserver.config import settings
    from aioserver.providers.attempt import Attempt
    from aioserver.providers.pace import Pace

# Bytes of a request for each of its tokens, as an estimate.
BYTES_PER_TOKEN = 4


def expected_tokens(attempt: Attempt, provider: settings.Provider) -> int:
    """Return the tokens that *attempt* will cost, by an estimate; 0 if tokens are not paced."""
    limit = provider.http_client.tokens_per_minute
    if not limit or not attempt.request.estimated:
        return 0
    prompt = len(attempt.request.body(provider)) // BYTES_PER_TOKEN
    # At most a minute's worth: a body with a picture has far fewer tokens than its bytes say.
    return min(prompt + (provider.max_tokens or 0), limit)


def charge_difference(
    attempt: Attempt, provider: settings.Provider, pace: Pace, *, failed: bool
) -> None:
    """Charge *pace* with the difference between the estimated tokens of *attempt* and its real ones."""
    pace.charge(real_tokens(attempt, provider, failed=failed) - attempt.expected_tokens)
    attempt.expected_tokens = 0


def real_tokens(attempt: Attempt, provider: settings.Provider, *, failed: bool) -> int:
    """Return the tokens that *attempt*, which has ended, did cost.

    Where the provider reports no usage, the prompt counts as estimated, and each event as a token.
    """
    if failed and not attempt.request.outcome.sent_at:
        return 0
    usage = None if failed else attempt.request.outcome.usage
    total = usage.get("total_tokens") if usage is not None else None
    if isinstance(total, int) and 0 <= total < MAX_TOKENS:
        return total
    prompt = attempt.expected_tokens - (provider.max_tokens or 0)
    return max(0, prompt) + attempt.events
