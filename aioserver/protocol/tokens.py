"""The tokens that a provider reports in the usage of an answer: one meaning for all APIs.

    prompt        all tokens read, from a cache or not; Anthropic's `input_tokens` leave out those
                  read from a cache or written to one, so these are added
    answer        all tokens written, including reasoning, which some count apart
    the others    parts of these two

What was written to a cache has a price by its *lifetime*, and all of an answer one by the *tier*
that has served it: both are noted as the provider names them.

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
# The members that break down what was written, by its lifetime: Anthropic's, then OpenAI's.
CACHE_CREATION, CACHE_WRITE_DETAILS = "cache_creation", "cache_write_tokens_details"
# Their members, and the names of these lifetimes.
LIFETIMES = {
    "ephemeral_5m_input_tokens": "5m",
    "ephemeral_1h_input_tokens": "1h",
    "ttl_30m_tokens": "30m",
    "ttl_12h_tokens": "12h",
}
# The tier that has served an answer; its name has at most so many characters.
SERVICE_TIER = "service_tier"
MAX_TIER = 32
# A number of tokens with more bits is ignored.
MAX_BITS = 40
MAX_TOKENS = 1 << MAX_BITS


class Tokens(msgspec.Struct, frozen=True, gc=False):
    """The tokens of the whole *prompt*, the *cached* ones among them, and those of the *answer*;
    None for each that is not known.

    *cache_write* tokens of the prompt were written to a cache, for these *lifetimes* as far as that
    is known, and *audio_in* are audio. *reasoning* tokens of the answer are reasoning, and
    *audio_out* are audio.
    """

    prompt: int | None = None
    cached: int | None = None
    answer: int | None = None
    cache_write: int = 0
    reasoning: int = 0
    audio_in: int = 0
    audio_out: int = 0
    lifetimes: tuple[tuple[str, int], ...] = ()


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
    cached, written, by_lifetime = None, 0, None
    if not OF_CACHES.isdisjoint(usage):
        written, by_lifetime = plausible(usage.get(CACHE_WRITTEN)) or 0, usage.get(CACHE_CREATION)
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
            by_lifetime = asked.get(CACHE_WRITE_DETAILS) or by_lifetime
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
        _lifetimes(by_lifetime, min(written, prompt)),
    )


def _lifetimes(details: object, written: int) -> tuple[tuple[str, int], ...]:
    """Return each lifetime in *details* and its tokens; none if they are more than were *written*."""
    if not isinstance(details, dict):
        return ()
    counts = [(name, plausible(details.get(member)) or 0) for member, name in LIFETIMES.items()]
    known = tuple((name, count) for name, count in counts if count)
    return known if sum(count for _, count in known) <= written else ()


def tiered(usage: dict[str, Any], holder: Mapping[str, Any]) -> dict[str, Any]:
    """Return *usage* with the tier that its *holder* names beside it, as OpenAI's answers do; in
    Anthropic's it is a part of the usage.
    """
    if SERVICE_TIER not in usage and (tier := tier_of(holder)):
        usage[SERVICE_TIER] = tier
    return usage


def tier_of(holder: Mapping[str, Any] | None) -> str:
    """Return the tier that *holder*, such as a usage, names; "" if there is none."""
    tier = None if holder is None else holder.get(SERVICE_TIER)
    return tier if isinstance(tier, str) and len(tier) <= MAX_TIER else ""


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
