"""The beginnings of prompts: two have the same digest where, and as far as, they begin alike."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from aioserver.protocol.prefix import LENGTHS
from aioserver.protocol.regions import (
    FEW_ELEMENTS,
    MAX_ELEMENTS,
    MAX_KEY_BYTES,
    MAX_LOOKED_AT,
    PIECE_BYTES,
)
from aioserver.protocol.steps import at_once
from tests.support.regions import prefix_in as of
from tests.support.regions import reading

if TYPE_CHECKING:
    from aioserver.protocol.prefix import Prefix


def user(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": text, **more}


def talk(*texts: str, system: str = "Be brief.") -> dict[str, Any]:
    """A chat whose turns are *texts*, the user's first."""
    roles = ("user", "assistant")
    messages = [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]
    return {"model": "m", "messages": [{"role": "system", "content": system}, *messages]}


def alike(one: Prefix, other: Prefix) -> int:
    """How many digests they have in common."""
    return len({*one.digests} & {*other.digests})


def test_lengths_go_up_by_an_eighth_and_are_fifty_at_most() -> None:
    assert LENGTHS[:9] == (1024, 2048, 3072, 4096, 5120, 6144, 7168, 8192, 9216)
    assert len(LENGTHS) <= 50
    assert LENGTHS[-1] <= 1 << 20
    found = of(talk("x" * 3_000_000))
    assert len(found.digests) <= 52


def test_a_later_turn_has_the_identity_and_the_beginning_of_the_one_before() -> None:
    first = talk("q" * 5000)
    later = talk("q" * 5000, "a" * 500, "and now?" * 500)

    one, two = of(first), of(later)

    assert one.identity == two.identity
    assert (one.has_history, two.has_history) == (False, True)
    assert one.identity_length == two.identity_length
    # All that was there.
    assert {*two.digests} > {*one.digests}
    assert one.lengths[-1] == one.size
    assert two.size > one.size
    assert list(two.lengths) == sorted(two.lengths)


@pytest.mark.parametrize(
    "key", [None, "", 7, 1.5, True, ["k"], {"k": 1}, "k" * (MAX_KEY_BYTES - 1)]
)
def test_a_cache_key_that_is_no_text_or_too_long_names_nothing(key: object) -> None:
    plain = of(talk("q" * 5000, "a"))

    assert of({**talk("q" * 5000, "a"), "prompt_cache_key": key}) == plain


def test_a_cache_key_is_the_identity_whatever_the_prompt_is() -> None:
    one = of({**talk("q" * 5000, "a"), "prompt_cache_key": "session-1"})
    other = of({"input": "compacted", "prompt_cache_key": "session-1"})

    assert one.identity == other.identity
    # What is known of a cache is a matter of its prompt alone.
    assert one._replace(identity=b"") == of(talk("q" * 5000, "a"))._replace(identity=b"")
    again = {**talk("q" * 5000, "a"), "prompt_cache_key": "session-2"}
    assert len({one.identity, of(again).identity, of(again, "another").identity}) == 3
    # A key is no prompt.
    assert of({"input": "session-1"}).identity != one.identity
    assert at_once(reading(b'{"prompt_cache_key":"session-1"}')) is None
    many = {"messages": [user("q")] * (FEW_ELEMENTS + 1), "prompt_cache_key": "session-1"}
    assert of(many).identity == one.identity


def test_another_first_question_system_prompt_or_group_is_another_conversation() -> None:
    plain = of(talk("q" * 5000))
    assert alike(plain, of(talk("r" * 5000))) == 0
    assert of(talk("q" * 5000, system="Be long.")).identity != plain.identity
    assert alike(plain, of(talk("q" * 5000), seed="other")) == 0
    # A shared system prompt is a shared beginning, and no shared identity.
    long = "s" * 9000
    one, two = of(talk("one", system=long)), of(talk("two", system=long))
    # At the end of two pieces.
    assert alike(one, two) == 2
    assert one.identity != two.identity


@pytest.mark.parametrize(
    ("marker", "spaced"),
    [
        ({"cache_control": {"type": "ephemeral", "ttl": "5m"}}, False),
        ({"cachePoint": {"type": "default"}}, True),
        ({"prompt_cache_breakpoint": True}, False),
        ({"cache_control": None}, True),
        ({"cache_control": 'a "quoted\\" text'}, False),
    ],
)
def test_markers_may_move_from_message_to_message(marker: dict[str, Any], spaced: bool) -> None:
    separators = (", ", ": ") if spaced else (",", ":")

    def body(*marked: int, first: bool = False) -> bytes:
        parts = []
        for number in range(3):
            part: dict[str, Any] = {"type": "text", "text": f"part {number}" + "x" * 1000}
            if number in marked:
                part = {**marker, **part} if first else {**part, **marker}
            parts.append({"role": "user" if number != 1 else "assistant", "content": [part]})
        return json.dumps({"messages": parts}, separators=separators).encode()

    plain = of(body())
    assert plain.has_history
    for marked in ((0,), (1, 2), (0, 1, 2)):
        for first in (False, True):
            assert of(body(*marked, first=first)) == plain


def test_a_text_that_speaks_of_a_marker_is_no_marker() -> None:
    def body(number: int) -> bytes:
        text = 'say {"cache_control":' + str(number) + "} in JSON" + "x" * 2000
        return json.dumps({"messages": [user(text)]}).encode()

    assert alike(of(body(1)), of(body(2))) == 0


@pytest.mark.parametrize(
    ("body", "has_history"),
    [
        ({"prompt": "Once"}, False),
        ({"prompt": "Once upon a time " * 100}, True),
        ({"input": "Hello"}, False),
        ({"input": [user("a"), {"role": "assistant", "content": "b"}]}, True),
        ({"instructions": "Be brief.", "input": [user("a")]}, False),
        ({"system": [{"type": "text", "text": "s"}], "messages": [user("a"), user("b")]}, True),
        ({"messages": [{"role": "system", "content": "only this"}]}, False),
        ({"messages": []}, False),
        ({"messages": [1, "two", None, {}]}, False),
        ({"messages": {"role": "user"}}, False),
    ],
)
def test_every_api_has_a_beginning(body: dict[str, Any], has_history: bool) -> None:
    found = of(body)
    assert found.has_history is has_history
    assert len(found.identity) == 16


def test_tools_come_first_whatever_the_order_of_the_body_is() -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"a": "x" * 3000}}}]
    one = of({"tools": tools, "messages": [user("a" * 2000)]})
    two = of({"messages": [user("a" * 2000)], "model": "m", "tools": tools})
    assert one == two


def test_nothing_looks_for_the_user_behind_hundreds_of_messages() -> None:
    system = {"role": "system", "content": "s"}
    found = of({"messages": [system] * (MAX_LOOKED_AT - 1) + [user("here")]})
    assert not found.has_history
    far = of({"messages": [system] * MAX_LOOKED_AT + [user("here")]})
    # The first KiB stands for it.
    assert far.identity_length == 1024


@pytest.mark.parametrize("size", [100, 10_000, 900_000])
def test_a_digest_is_that_of_all_before_it_also_in_steps(size: int) -> None:
    dice = random.Random(size)
    texts = [dice.randbytes(size // 18).hex() for _ in range(9)]
    found = of(talk(*texts))
    # A byte of the last text is changed, and then one of each text before it.
    for changed in range(8, -1, -1):
        texts[changed] = "!" + texts[changed][1:]
        other = of(talk(*texts))
        shared = [
            length
            for length, one, two in zip(found.lengths, found.digests, other.digests, strict=True)
            if one == two
        ]

        known = sum(
            len(json.dumps(message)) for message in talk(*texts)["messages"][: changed + 1]
        )
        assert other.lengths == found.lengths
        assert shared == [length for length in found.lengths if length <= known]
    assert found.size == found.lengths[-1]


def test_the_known_part_of_a_long_text_is_measured_to_a_piece_or_to_a_ninth() -> None:
    text = random.Random(1).randbytes(200_000).hex()
    for size in (2_000, 10_000, 100_000, 390_000):
        other = text[:size] + "!" + text[size + 1 :]
        one, two = of({"prompt": text}), of({"prompt": other})
        known = max((each for each in one.lengths[: alike(one, two)]), default=0)

        assert 0 <= size + 1 - known <= max(PIECE_BYTES, size / 9 + PIECE_BYTES)


def test_a_conversation_keeps_its_identity_when_it_is_longer_than_is_read() -> None:
    messages = [user("a" * 3000), *({"role": "assistant", "content": f"{n}"} for n in range(1500))]
    short, long = of({"messages": messages[:900]}), of({"messages": messages})

    assert short.identity == long.identity
    assert alike(short, long) >= 2
    assert of({"messages": messages[: MAX_ELEMENTS + 1]}) != of({"messages": messages})


def test_all_processes_give_a_conversation_the_same_identity() -> None:
    code = (
        "from tests.support.regions import prefix_in as of\n"
        "print(of({'tools': ['t'], 'messages': [{'role': 'user', 'content': 'x' * 9000}]})"
        ".identity.hex(), hash('x'))"
    )
    printed = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout.split()
        for seed in ("1", "2")
    ]

    assert printed[0][0] == printed[1][0]
    assert printed[0][1] != printed[1][1]


def test_what_stands_in_front_of_the_question_is_a_part_of_the_identity() -> None:
    def identity(tool: str = "t", system: str = "s", said: str = "q") -> bytes:
        return of({"tools": [tool], "system": system, "messages": [user(said)]}).identity

    others = {identity(), identity(tool="longer"), identity(system="z"), identity(said="z")}
    assert len(others) == 4
