"""The tokens that a provider reports in the usage of an answer: one meaning for all APIs.

    prompt        all tokens read, from a cache or not; Anthropic's `input_tokens` leave out those
                  read from a cache or written to one, so these are added
    answer        all tokens written, including reasoning, which some count apart
    the others    parts of these two

Only the last usage of an answer counts, never a sum: a provider that reports one with each event
reports the total so far.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from collections.abc import Mapping

# The keys of the token counts in a usage: for chat completions, then for responses and messages.
PROMPT, INPUT = "prompt_tokens", "input_tokens"
COMPLETION, OUTPUT = "completion_tokens", "output_tokens"
TOTAL = "total_tokens"
# The members of a usage, of chat completions and of responses, that break these down.
PROMPT_DETAILS, INPUT_DETAILS = "prompt_tokens_details", "input_tokens_details"
COMPLETION_DETAILS, OUTPUT_DETAILS = "completion_tokens_details", "output_tokens_details"
# Members of these.
CACHED, CACHE_WRITE = "cached_tokens", "cache_write_tokens"
REASONING, AUDIO = "reasoning_tokens", "audio_tokens"
# The tokens that Anthropic's `input_tokens` leave out of the prompt.
CACHE_READ, CACHE_WRITTEN = "cache_read_input_tokens", "cache_creation_input_tokens"
# DeepSeek's name for the tokens from a cache; Kimi's is CACHED, beside the others.
CACHE_HITS = "prompt_cache_hit_tokens"
# The keys about caches outside of details.
OF_CACHES = frozenset({CACHE_READ, CACHE_WRITTEN, CACHE_HITS, CACHED})
# A number of tokens with more bits is ignored.
MAX_BITS = 40
MAX_TOKENS = 1 << MAX_BITS


class Tokens(msgspec.Struct, frozen=True, gc=False):
    """The tokens of the whole *prompt*, the *cached* ones among them, and those of the *answer*;
    None for each that is not known.

    *cache_write* tokens of the prompt were written to a cache, and *audio_in* are audio.
    *reasoning* tokens of the answer are reasoning, and *audio_out* are audio.
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
    prompt, answer = usage.get(PROMPT), usage.get(COMPLETION)
    # Most are plausible by the rule of `plausible`: neither has a sign, or a bit above the bound.
    if type(prompt) is not int or type(answer) is not int or (prompt | answer) >> MAX_BITS:
        prompt, answer = plausible(prompt), plausible(answer)
        if answer is None:
            answer = plausible(usage.get(OUTPUT))
        if answer is None and prompt is not None and usage.get(TOTAL) == prompt:
            # Embeddings have no answer.
            answer = 0
    cached, written = None, 0
    if not OF_CACHES.isdisjoint(usage):
        written = plausible(usage.get(CACHE_WRITTEN)) or 0
        cached = plausible(usage.get(CACHE_READ))
        if cached is None and prompt is not None:
            cached = plausible(usage.get(CACHE_HITS))
            if cached is None:
                cached = plausible(usage.get(CACHED))
    if prompt is not None:
        asked, answered = usage.get(PROMPT_DETAILS), usage.get(COMPLETION_DETAILS)
    else:
        asked, answered = usage.get(INPUT_DETAILS), usage.get(OUTPUT_DETAILS)
        if (prompt := plausible(usage.get(INPUT))) is None:
            return Tokens(answer=answer)
        if asked is None:
            prompt += (cached or 0) + written
    if not (asked or answered or written) and cached is None:
        return Tokens(prompt, None, answer)
    reasoning = audio_in = audio_out = 0
    if asked and isinstance(asked, dict):
        if cached is None:
            cached = plausible(asked.get(CACHED))
        # Many details are empty.
        if any(asked.values()):
            written = plausible(asked.get(CACHE_WRITE)) or written
            audio_in = plausible(asked.get(AUDIO)) or 0
    if answered and isinstance(answered, dict) and answer is not None and any(answered.values()):
        reasoning = plausible(answered.get(REASONING)) or 0
        audio_out = min(plausible(answered.get(AUDIO)) or 0, answer)
        if reasoning and usage.get(TOTAL) == prompt + answer + reasoning:
            answer += reasoning
    if cached is not None and cached > prompt:
        cached = prompt
    if not (written or reasoning or audio_in or audio_out):
        return Tokens(prompt, cached, answer)
    return Tokens(
        prompt,
        cached,
        answer,
        min(written, prompt),
        min(reasoning, answer or 0),
        min(audio_in, prompt),
        audio_out,
    )


def several(usage: Mapping[str, Any] | None) -> bool:
    """Return whether *usage* is that of several passes of a model over its prompt, so that it does
    not say how long this is.
    """
    iterations = usage.get("iterations") if usage else None
    return isinstance(iterations, list) and len(iterations) > 1


def plausible(number: object) -> int | None:
    """Return *number* if it is a plausible number of tokens, else None."""
    # For `isinstance` a boolean is an integer, too.
    return number if type(number) is int and 0 <= number < MAX_TOKENS else None
