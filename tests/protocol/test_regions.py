"""The regions of prompts: the same text has the same digest in the same part, for one caller."""

from __future__ import annotations

import json
from typing import Any

import pytest

from aioserver.protocol import regions
from aioserver.protocol.regions import MAX_ELEMENTS, PIECE_BYTES, RegionReader
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

    assert (tuple(found.counts.values()), found.talk) == (counts, talk)
    assert len(found.digests) == len(found.lengths) == number


def test_a_region_has_the_same_digest_wherever_it_stands() -> None:
    long = "x" * (PIECE_BYTES + 1)
    found = of({"tools": ["x", long], "system": ["y"], "messages": [long, "x"]})

    assert found.digests[0] == found.digests[4]
    assert found.digests[1] == found.digests[3]
    assert len({*found.digests}) == 3
    assert {index: len(pieces) for index, pieces in found.pieces.items()} == {1: 2, 3: 2}


def test_markers_of_caching_change_no_region() -> None:
    plain = {"role": "user", "content": [{"type": "text", "text": "the cache_control of it"}]}
    marked = json.loads(json.dumps(plain))
    marked["content"][0]["cache_control"] = {"type": "ephemeral"}

    assert of({"messages": [plain]}) == of({"messages": [marked]})


def test_a_reader_that_knows_a_region_finds_the_same() -> None:
    plain = {"role": "user", "content": "the cache_control of it" * 1000}
    marked = {**plain, "cache_control": {"type": "ephemeral"}}
    picture = {"role": "user", "content": "data:image/png;base64,AAAA"}
    both = {**picture, "cache_control": None}
    reader = RegionReader()

    for messages in ([plain], [marked], [marked, plain], [plain, picture], [both], [plain, both]):
        body = {"messages": messages}
        for _ in range(2):
            assert of(body, reader) == of(body)
        assert of(body, reader).picture is (picture in messages or both in messages)
    assert of({"messages": [both]}) == of({"messages": [picture]})


def test_a_reader_remembers_a_bounded_number_of_regions_and_keeps_those_that_come_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(regions, "MAX_REMEMBERED", 10)
    searched: list[bytes] = []

    def unmarked(data: bytes) -> bytes:
        searched.append(data)
        return data

    monkeypatch.setattr(regions, "unmarked", unmarked)
    reader = RegionReader()
    for number in range(100):
        of({"messages": ["again", f"{number}"]}, reader)
        assert len(reader._newest) + len(reader._older) <= 20  # noqa: SLF001

    assert searched.count(b'"again"') == 1
    assert len(searched) == 101


def test_the_first_message_of_a_user_is_found() -> None:
    system = {"role": "system", "content": "Be brief."}

    assert of({"tools": [{}], "messages": [system, USER, USER]}).user == 2
    assert of({"messages": [system, 1, "user", None, [], {}]}).user is None
    assert of({"prompt": "user"}).user is None


def test_a_body_without_a_prompt_has_no_regions() -> None:
    assert at_once(reading({"model": "m"})) is None


def test_a_list_that_is_longer_than_is_read_ends_with_one_region() -> None:
    found = of({"messages": [{}] * (MAX_ELEMENTS + 9)})
    whole = of({"messages": [{}] * (MAX_ELEMENTS - 1)})

    assert found.cut
    assert not whole.cut
    assert len(found.digests) == MAX_ELEMENTS
    assert found.lengths[-1] == len(", {}" * 10 + "]")
    assert [*found.digests[:-1]] == whole.digests


@pytest.mark.parametrize(
    "content", ["data:image/png;base64,AAAA", [{"source": {"type": "base64", "data": ""}}]]
)
def test_a_prompt_with_a_picture_is_known(content: object) -> None:
    assert of({"messages": [USER, {"role": "user", "content": content}, USER]}).picture


def test_a_prompt_that_only_speaks_of_pictures_is_read() -> None:
    words = 'In "base64" a picture is longer; base64, or 64", is no secret.'

    assert not of({"messages": [{"role": "user", "content": words}]}).picture


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
