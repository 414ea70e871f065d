"""The tokens that a provider reports in the usage of an answer: those of the prompt, how many of
them came from a cache, and those of the answer. Each API has its own names for them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

# The keys of the token counts in a usage: of chat completions, then of responses and of messages.
PROMPT, INPUT = "prompt_tokens", "input_tokens"
COMPLETION, OUTPUT = "completion_tokens", "output_tokens"
# The parts of a usage, of chat completions and of responses, that say what came from a cache.
PROMPT_DETAILS, INPUT_DETAILS = "prompt_tokens_details", "input_tokens_details"
# What Anthropic's `input_tokens` leave out of the prompt.
CACHE_READ, CACHE_WRITTEN = "cache_read_input_tokens", "cache_creation_input_tokens"
# DeepSeek's name for what came from a cache.
CACHE_HITS = "prompt_cache_hit_tokens"
# A number of tokens from this bound on is ignored.
MAX_TOKENS = 1 << 40


class Tokens(NamedTuple):
    """The tokens of the whole *prompt*, how many of them are *cached*, and those of the *answer*;
    None stands for each that is not known.

    Of the prompt *cache_write* were written to a cache, and *audio_in* are audio. Of the answer
    *reasoning* were thought, and *audio_out* are audio.
    """

    prompt: int | None = None
    cached: int | None = None
    answer: int | None = None
    cache_write: int = 0
    reasoning: int = 0
    audio_in: int = 0
    audio_out: int = 0


NO_TOKENS = Tokens()


def tokens_of(usage: Mapping[str, Any] | None) -> Tokens:
    """Return the plausible numbers in *usage*."""
    if usage is None:
        return NO_TOKENS
    answer = _count(usage.get(COMPLETION))
    if answer is None:
        answer = _count(usage.get(OUTPUT))
    if (prompt := _count(usage.get(PROMPT))) is None:
        if (prompt := _count(usage.get(INPUT))) is None:
            return Tokens(answer=answer)
        if INPUT_DETAILS not in usage:
            for name in (CACHE_READ, CACHE_WRITTEN):
                prompt += _count(usage.get(name)) or 0
    cached = None
    # Most have none of these.
    for name in (CACHE_READ, CACHE_HITS):
        if cached is None and name in usage:
            cached = _count(usage[name])
    for name in (PROMPT_DETAILS, INPUT_DETAILS):
        if cached is None and name in usage and isinstance(details := usage[name], dict):
            cached = _count(details.get("cached_tokens"))
    return Tokens(prompt, None if cached is None else min(cached, prompt), answer)


def _count(number: object) -> int | None:
    """Return *number* if it is a plausible one of tokens, else None."""
    # A boolean is an integer, too, for `isinstance`.
    return number if type(number) is int and 0 <= number < MAX_TOKENS else None
