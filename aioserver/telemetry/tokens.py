"""The tokens that a provider reports in the usage of an answer: those of the prompt, how many of
them came from a cache, and those of the answer. Each API has its own names for them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

# The keys of the token counts in a usage: of chat completions, then of responses and of messages.
PROMPT, INPUT = "prompt_tokens", "input_tokens"
TOKENS_OUT = ("completion_tokens", "output_tokens")
# The parts of a usage, of chat completions and of responses, that say what came from a cache.
PROMPT_DETAILS, INPUT_DETAILS = "prompt_tokens_details", "input_tokens_details"
# What Anthropic's `input_tokens` leave out of the prompt.
CACHE_READ, CACHE_WRITTEN = "cache_read_input_tokens", "cache_creation_input_tokens"
# DeepSeek's name for what came from a cache.
CACHE_HITS = "prompt_cache_hit_tokens"
# A number of tokens from this bound on is ignored.
MAX_TOKENS = 1 << 40


def tokens_in(usage: Mapping[str, Any] | None) -> int | None:
    """Return the tokens of the whole prompt in *usage*; None if it has none."""
    if usage is None:
        return None
    if (number := _token_count(usage, PROMPT)) is not None:
        return number
    number = _token_count(usage, INPUT)
    if number is None or INPUT_DETAILS in usage:
        return number
    beside = (_token_count(usage, name) or 0 for name in (CACHE_READ, CACHE_WRITTEN))
    return number + sum(beside)


def tokens_out(usage: Mapping[str, Any] | None) -> int | None:
    """Return the tokens of the answer in *usage*; None if it has none."""
    return None if usage is None else _token_count(usage, *TOKENS_OUT)


def cached_tokens(usage: Mapping[str, Any] | None) -> int | None:
    """Return how many of `tokens_in` came from a cache, as *usage* has it; None if it does not."""
    whole = tokens_in(usage)
    if usage is None or whole is None:
        return None
    cached = _token_count(usage, CACHE_READ, CACHE_HITS)
    for name in (PROMPT_DETAILS, INPUT_DETAILS):
        if cached is None and isinstance(details := usage.get(name), dict):
            cached = _token_count(details, "cached_tokens")
    return None if cached is None else min(cached, whole)


def _token_count(usage: Mapping[str, Any], *names: str) -> int | None:
    """Return the first plausible number in *usage* under *names*; None if there is none."""
    for name in names:
        number = usage.get(name)
        if isinstance(number, int) and number is not True and 0 <= number < MAX_TOKENS:
            return number
    return None
