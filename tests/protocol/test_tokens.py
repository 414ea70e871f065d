"""The tokens in a usage, in the form of each API."""

from __future__ import annotations

from typing import Any

import pytest

from aioserver.protocol.openai import MAX_USAGE_BYTES, bounded, usage_of
from aioserver.protocol.tokens import Tokens, tier_of, tokens_of

CHAT = {"prompt_tokens": 100, "completion_tokens": 7, "total_tokens": 107}
RESPONSE = {"input_tokens": 100, "output_tokens": 7}
# Of Anthropic's prompt, what came from a cache or was written to one stands beside the rest.
MESSAGE = {
    "input_tokens": 30,
    "cache_read_input_tokens": 64,
    "cache_creation_input_tokens": 6,
    "output_tokens": 7,
}


def three(tokens: Tokens) -> tuple[int | None, ...]:
    return tokens.prompt, tokens.cached, tokens.answer


@pytest.mark.parametrize(
    ("usage", "cached"),
    [
        (CHAT, None),
        ({**CHAT, "prompt_tokens_details": None}, None),
        ({**CHAT, "prompt_tokens_details": {}}, None),
        ({**CHAT, "prompt_tokens_details": {"cached_tokens": 0}}, 0),
        ({**CHAT, "prompt_tokens_details": {"cached_tokens": 64}}, 64),
        ({**CHAT, "prompt_tokens_details": {"cached_tokens": "64"}}, None),
        ({**CHAT, "prompt_cache_hit_tokens": 64, "prompt_cache_miss_tokens": 36}, 64),
        # The form of chat completions, with Anthropic's counts beside it: they are part of it.
        ({**CHAT, "cache_read_input_tokens": 64, "cache_creation_input_tokens": 6}, 64),
        (RESPONSE, None),
        ({**RESPONSE, "input_tokens_details": {"cached_tokens": 64}}, 64),
        (MESSAGE, 64),
        # More than there are.
        ({**CHAT, "prompt_tokens_details": {"cached_tokens": 1000}}, 100),
    ],
)
def test_what_came_from_a_cache_is_a_part_of_the_prompt(
    usage: dict[str, Any], cached: int | None
) -> None:
    assert three(tokens_of(usage)) == (100, cached, 7)


def written_for(usage: dict[str, Any]) -> dict[str, int]:
    return dict(tokens_of(usage).lifetimes)


@pytest.mark.parametrize(
    "details",
    [
        None,
        [],
        "5m",
        {},
        {"ephemeral_5m_input_tokens": "4"},
        {"ephemeral_5m_input_tokens": True, "ephemeral_1h_input_tokens": None},
        {"ephemeral_5m_input_tokens": -1, "ephemeral_7d_input_tokens": 2},
        # More than was written.
        {"ephemeral_5m_input_tokens": 4, "ephemeral_1h_input_tokens": 3},
        {"ephemeral_5m_input_tokens": 1 << 70},
    ],
)
def test_lifetimes_that_mean_nothing_leave_the_sum_alone(details: object) -> None:
    plain = tokens_of(MESSAGE)

    assert tokens_of({**MESSAGE, "cache_creation": details}) == plain
    assert (plain.cache_write, plain.lifetimes) == (6, ())
    # Nothing was written.
    assert written_for({**RESPONSE, "cache_creation": {"ephemeral_5m_input_tokens": 1}}) == {}


def test_what_was_written_to_a_cache_is_known_by_its_lifetime() -> None:
    creation = {"ephemeral_5m_input_tokens": 4, "ephemeral_1h_input_tokens": 2}
    assert written_for({**MESSAGE, "cache_creation": creation}) == {"5m": 4, "1h": 2}
    only = {"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 6}
    assert written_for({**MESSAGE, "cache_creation": only}) == {"1h": 6}

    details = {"ttl_30m_tokens": 1, "ttl_12h_tokens": 5}
    written = {"cache_write_tokens": 6, "cache_write_tokens_details": details}
    assert written_for({**RESPONSE, "input_tokens_details": written}) == {"30m": 1, "12h": 5}


@pytest.mark.parametrize("tier", [None, 1, True, {}, ["flex"], "x" * 33])
def test_a_tier_that_is_no_name_is_none(tier: object) -> None:
    for answer in (
        {"usage": CHAT, "service_tier": tier},
        {"usage": {**CHAT, "service_tier": tier}},
        {"response": {"usage": RESPONSE, "service_tier": tier}},
    ):
        assert tier_of(usage_of(answer)) == ""
    assert tier_of(None) == ""


@pytest.mark.parametrize(
    "answer",
    [
        {"usage": dict(CHAT), "service_tier": "flex"},
        {"choices": [], "x_groq": {"usage": dict(CHAT)}, "service_tier": "flex"},
        {"choices": [{"usage": dict(CHAT)}], "service_tier": "flex"},
        {"type": "response.completed", "response": {"usage": RESPONSE, "service_tier": "flex"}},
        # Anthropic's own word counts.
        {"usage": {**MESSAGE, "service_tier": "flex"}, "service_tier": "other"},
    ],
    ids=["chat", "groq", "kimi", "response", "message"],
)
def test_the_tier_is_what_the_answer_says(answer: dict[str, Any]) -> None:
    assert tier_of(usage_of(answer)) == "flex"


def test_nothing_is_known_of_no_usage_or_without_the_prompt() -> None:
    for usage in (None, {}, {"prompt_tokens_details": {"cached_tokens": 64}}):
        assert three(tokens_of(usage)) == (None, None, None)


def test_a_usage_that_is_too_large_keeps_what_a_prompt_consists_of() -> None:
    usage = bounded({**MESSAGE, "more": "x" * MAX_USAGE_BYTES})

    assert three(tokens_of(usage)) == (100, 64, 7)


@pytest.mark.parametrize(
    ("usage", "tokens"),
    [
        (
            {
                **CHAT,
                "prompt_tokens_details": {
                    "cached_tokens": 64,
                    "cache_write_tokens": 6,
                    "audio_tokens": 5,
                },
                "completion_tokens_details": {"reasoning_tokens": 4, "audio_tokens": 2},
            },
            Tokens(100, 64, 7, 6, 4, 5, 2),
        ),
        (
            {
                **RESPONSE,
                "input_tokens_details": {"cached_tokens": 64},
                "output_tokens_details": {"reasoning_tokens": 4},
            },
            Tokens(100, 64, 7, reasoning=4),
        ),
        (MESSAGE, Tokens(100, 64, 7, cache_write=6)),
        # Of a message that was cut: what it was asked is true.
        ({"input_tokens": 30, "cache_read_input_tokens": 70}, Tokens(100, 70, None)),
        # Of embeddings.
        ({"prompt_tokens": 100, "total_tokens": 100}, Tokens(100, None, 0)),
        # Some count what was thought beside what was answered, and the total says so.
        (
            {
                "prompt_tokens": 100,
                "completion_tokens": 7,
                "total_tokens": 150,
                "completion_tokens_details": {"reasoning_tokens": 43},
            },
            Tokens(100, None, 50, reasoning=43),
        ),
        # Numbers that mean nothing, and parts that are more than the whole.
        (
            {
                **CHAT,
                "prompt_tokens_details": {"audio_tokens": 101, "cache_write_tokens": 101},
                "completion_tokens_details": {"reasoning_tokens": 8, "audio_tokens": 8},
            },
            Tokens(100, None, 7, 100, 7, 100, 7),
        ),
        (
            {
                **CHAT,
                "prompt_tokens_details": {"cached_tokens": -1, "audio_tokens": True},
                "completion_tokens_details": {"reasoning_tokens": "4", "audio_tokens": 1 << 70},
            },
            Tokens(100, None, 7),
        ),
        ({"prompt_tokens": True, "completion_tokens": 4.5}, Tokens()),
        ({"prompt_tokens": "3", "completion_tokens": -4}, Tokens()),
        (
            {**CHAT, "prompt_tokens_details": [], "completion_tokens_details": "x"},
            Tokens(100, answer=7),
        ),
    ],
)
def test_all_counts_have_one_meaning(usage: dict[str, Any], tokens: Tokens) -> None:
    assert tokens_of(usage) == tokens
