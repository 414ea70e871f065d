"""The regions of prompts: the same text has the same digest in the same part, for one caller."""

from __future__ import annotations

import json
from typing import Any

import pytest

from aioserver.protocol.prefix import MAX_ELEMENTS
from aioserver.protocol.steps import at_once
from tests.support.regions import reading
from tests.support.regions import regions_in as of

USER = {"role": "user", "content": "Hello"}


@pytest.mark.parametrize(
    ("body", "counts", "talk", "number"),
    [
        ({"messages": [USER, USER]}, (0, 0, 0), "messages", 2),
        ({"tools": [{}, {}], "system": "S", "messages": [USER]}, (2, 1, 0), "messages", 4),
        ({"messages": [USER], "system": [{}, {}], "tools": []}, (1, 2, 0), "messages", 4),
        ({"instructions": "I", "input": "Hello"}, (0, 0, 1), "input", 2),
        ({"prompt": ["a", "b"]}, (0, 0, 0), "prompt", 2),
    ],
)
def test_each_tool_each_block_and_each_message_is_a_region(
    body: dict[str, Any], counts: tuple[int, ...], talk: str, number: int
) -> None:
    found = of(body)

    assert (found.counts, found.talk) == (counts, talk)
    assert len(found.digests) == len(found.lengths) == number


def test_a_text_has_another_digest_in_another_part_and_for_another_caller() -> None:
    body = {"tools": ["x"], "system": ["x"], "messages": ["x"]}

    assert len({*of(body).digests, *of(body, "bo").digests}) == 6


def test_markers_of_caching_change_no_region() -> None:
    plain = {"role": "user", "content": [{"type": "text", "text": "the cache_control of it"}]}
    marked = json.loads(json.dumps(plain))
    marked["content"][0]["cache_control"] = {"type": "ephemeral"}

    assert of({"messages": [plain]}) == of({"messages": [marked]})


def test_the_identity_is_the_first_message_of_a_user() -> None:
    system = {"role": "system", "content": "Be brief."}

    one = of({"messages": [system, USER, {"role": "assistant", "content": "Hi"}]})
    other = of({"messages": [{"role": "system", "content": "Be long."}, USER]})

    assert one.first_user == other.first_user == one.digests[1]


@pytest.mark.parametrize(
    "body",
    [
        {"model": "m"},
        {"messages": [{}] * MAX_ELEMENTS},
        {"messages": [{"role": "user", "content": "data:image/png;base64,AAAA"}]},
        {"messages": [{"role": "user", "content": [{"source": {"type": "base64", "data": ""}}]}]},
    ],
)
def test_a_prompt_without_text_alone_is_not_read(body: dict[str, Any]) -> None:
    assert at_once(reading(body)) is None


def test_a_prompt_that_only_speaks_of_pictures_is_read() -> None:
    words = 'In "base64" a picture is longer; base64, or 64", is no secret.'

    assert len(of({"messages": [{"role": "user", "content": words}]}).digests) == 1


def test_a_long_prompt_is_read_in_steps() -> None:
    long = {"messages": [{"role": "user", "content": "x" * 900_000}] * 4}
    steps, pauses = reading(long), 0

    found = None
    while found is None:
        try:
            steps.send(None)
        except StopIteration as end:
            found = end.value
        else:
            pauses += 1

    assert pauses >= 3
    assert found == of(long)
