"""The tokens in a usage, in the form of each API."""

from __future__ import annotations

from typing import Any

import pytest

from aioserver.protocol.openai import MAX_USAGE_BYTES, bounded
from aioserver.telemetry.tokens import tokens_of

CHAT = {"prompt_tokens": 100, "completion_tokens": 7, "total_tokens": 107}
RESPONSE = {"input_tokens": 100, "output_tokens": 7}
# Of Anthropic's prompt, what came from a cache or was written to one stands beside the rest.
MESSAGE = {
    "input_tokens": 30,
    "cache_read_input_tokens": 64,
    "cache_creation_input_tokens": 6,
    "output_tokens": 7,
}


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
    assert tokens_of(usage)[:3] == (100, cached, 7)


def test_nothing_is_known_of_no_usage_or_without_the_prompt() -> None:
    for usage in (None, {}, {"prompt_tokens_details": {"cached_tokens": 64}}):
        assert tokens_of(usage)[:3] == (None, None, None)


def test_a_usage_that_is_too_large_keeps_what_a_prompt_consists_of() -> None:
    usage = bounded({**MESSAGE, "more": "x" * MAX_USAGE_BYTES})

    assert tokens_of(usage)[:3] == (100, 64, 7)
