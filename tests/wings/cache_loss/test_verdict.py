"""The verdict on a turn: each cause has its row, and what is no loss has none."""

from __future__ import annotations

import tracemalloc
from typing import TYPE_CHECKING, Any

import pytest

from aioserver.protocol.regions import PIECE_BYTES
from aioserver.telemetry.bugs import Bugs
from aioserver.telemetry.outcome import CacheLoss
from aioserver.wings.cache_loss.turns import LIFE, MAX_KINDS, Conversations, Losses, Reader
from aioserver.wings.cache_loss.verdict import (
    MAX_REGIONS,
    Sent,
    compare,
    judge,
    packed,
    packed_regions,
    unpacked,
)
from tests.support.clock import FakeClock
from tests.support.regions import regions_in

if TYPE_CHECKING:
    from aioserver.protocol.regions import Regions

TOOLS = [{"name": name, "description": name * 4000} for name in "abcd"]
SYSTEM = [{"type": "text", "text": "S" * 4000}]
MESSAGES = [{"role": "user", "content": f"{number}" * 4000} for number in range(4)]
PROMPT: dict[str, Any] = {"tools": TOOLS, "system": SYSTEM, "messages": MESSAGES}
LAST = Sent(100.0, "gpu1", 1, 9000, 9000)
SAME = LAST._replace(ended_at=200.0, prompt=10_000, kept=10_000)


def of(**changes: Any) -> Regions:
    return regions_in({**PROMPT, **changes})


def verdict(
    regions: Regions,
    cached: int | None,
    *,
    last: Sent = LAST,
    sent: Sent = SAME,
    pause: float = 10.0,
    longest: float | None = 60.0,
) -> CacheLoss | None:
    before = unpacked(packed(last, packed_regions(of())))
    return judge(before, compare(before, regions), sent, cached, pause, longest, "sick")


MORE = [*MESSAGES, {"role": "assistant", "content": "more"}]
EDITED = [MESSAGES[0], {"role": "user", "content": "edited"}, *MORE[2:]]
MOVED = SAME._replace(provider="gpu2")
OTHER_MODEL = SAME._replace(model=2)


@pytest.mark.parametrize(
    ("changes", "cached", "told", "expected"),
    [
        # Nothing is lost.
        ({"messages": MORE}, 9000, {}, None),
        ({"messages": MORE}, 8200, {}, None),
        ({"messages": MORE}, 0, {"last": LAST._replace(prompt=1000)}, None),
        # Nothing behind the change could have been cached.
        ({"messages": [*MESSAGES[:3], {"role": "user", "content": "else"}]}, 7900, {}, None),
        ({"messages": MESSAGES[:2]}, 7000, {}, None),
        # Only a part of the prompt was marked, and it is still there.
        ({"messages": MORE}, 2000, {"last": LAST._replace(kept=2000)}, None),
        # The client's changes.
        ({"tools": [*TOOLS[:2], {"name": "x"}, TOOLS[3]]}, 2000, {}, ("changed", "tools[2]")),
        ({"tools": [{"name": "x"}, *TOOLS]}, 0, {}, ("changed", "tools[0]")),
        ({"tools": TOOLS[:3]}, 3000, {}, ("changed", "tools[3]")),
        ({"tools": [*TOOLS, {"name": "x"}]}, 4000, {}, ("changed", "tools[4]")),
        ({"tools": [*TOOLS[::-1]]}, 0, {}, ("reordered", "tools[0]")),
        ({"system": [{"type": "text", "text": "T"}]}, 4000, {}, ("changed", "system[0]")),
        ({"messages": EDITED}, 6000, {}, ("changed", "messages[1]")),
        ({"messages": EDITED}, 6000, {"sent": MOVED}, ("changed", "messages[1]")),
        # A change, of which nothing stands behind, and a loss in front of it.
        ({"messages": [*MESSAGES[:3], {"role": "user"}]}, 0, {}, ("evicted", "")),
        # The engine's.
        ({"messages": MORE}, 0, {"sent": MOVED}, ("moved", "sick")),
        ({"messages": MORE}, 0, {"sent": OTHER_MODEL}, ("moved", "sick")),
        ({"messages": MORE}, 0, {"pause": 61.0}, ("expired", "")),
        ({"messages": MORE}, 0, {"pause": 60.0}, ("evicted", "")),
        ({"messages": MORE}, 0, {"pause": 60.0, "longest": 1.0}, ("evicted", "")),
        ({"messages": MORE}, 0, {"longest": None}, ("unknown", "")),
        ({"messages": MORE}, None, {}, ("unknown", "")),
    ],
)
def test_each_cause_has_its_verdict(
    changes: dict[str, Any],
    cached: int | None,
    told: dict[str, Any],
    expected: tuple[str, str] | None,
) -> None:
    loss = verdict(of(**changes), cached, **told)

    assert (None if loss is None else (loss.verdict, loss.at)) == expected


def test_one_byte_of_a_long_system_prompt_leaves_the_rest_of_it_equal() -> None:
    long = "".join(f"{number:08}" for number in range(5000))

    def prompt(first: str, *more: str, tool: str = "T", **changes: Any) -> Regions:
        tools = [{"name": "a", "description": 1125 * f"{tool}{number}"} for number in range(8)]
        system = [{"type": "text", "text": f"{text}{long}"} for text in (first, *more)]
        messages = [{"role": "user", "content": str(number)} for number in range(9)]
        parts = {"tools": tools, "system": system, "messages": messages}
        return regions_in(parts | changes)

    last = unpacked(packed(LAST, packed_regions(prompt("It is 9:00", "B"))))

    def at(regions: Regions) -> tuple[str, int]:
        difference = compare(last, regions)
        return difference.at, difference.byte

    assert at(prompt("It is 9:00", "B")) == ("", 0)
    changed = prompt("It is 9:01", "B")
    difference = compare(last, changed)
    tools, block = sum(changed.lengths[:8]), changed.lengths[8]
    assert (difference.at, difference.byte, difference.before) == ("system[0]", tools, tools)
    # All but its first piece, of 4 KiB.
    assert difference.equal == sum(changed.lengths) - PIECE_BYTES
    loss = judge(last, difference, SAME, 1500, 10.0, 60.0)
    assert loss is not None
    assert (loss.verdict, loss.at, loss.byte) == ("changed", "system[0]", tools)
    assert at(prompt("It is 9:00", "C")) == ("system[1]", tools + block)
    assert at(prompt("It is 9:00", "B", tool="U")) == ("tools[0]", 0)
    assert at(prompt("It is 9:00")) == ("system[1]", tools + block)
    messages = [{"role": "user", "content": "0"}, {"role": "user", "content": "else"}]
    before = sum(changed.lengths[:11])
    assert at(prompt("It is 9:00", "B", messages=messages)) == ("messages[1]", before)


def test_a_loss_says_its_byte_and_the_tokens_that_were_equal() -> None:
    changed = [{"type": "text", "text": "T" * 4000}]
    regions = of(system=changed)

    loss = verdict(regions, 4000)

    assert loss is not None
    assert loss.byte == sum(regions.lengths[:4])
    # Eight of nine regions are equal, of the same length but for their names.
    assert loss.tokens == pytest.approx(8000 - 4000, abs=30)
    assert loss.text == f"lost at=system[0] byte={loss.byte} tokens={loss.tokens} by=changed"
    assert verdict(of(messages=MORE), None) == CacheLoss("unknown")
    assert not CacheLoss("unknown").text


def test_the_regions_in_the_middle_of_many_are_one() -> None:
    many = [{"role": "user", "content": f"{number}" * 100} for number in range(500)]
    before = of(messages=many)
    last = unpacked(packed(LAST, packed_regions(before)))
    assert len(last.digests) == MAX_REGIONS
    assert sum(last.lengths) == sum(before.lengths)

    def at(*changed: int, more: int = 0) -> str:
        messages = [*many, *many[:more]]
        for number in changed:
            messages[number] = {"role": "user", "content": "else"}
        return compare(last, of(messages=messages)).at

    assert at() == at(more=9) == at(499 + 1, more=9) == ""
    assert at(3, more=2) == "messages[3]"
    assert at(490, more=2) == "messages[490]"
    # Five regions stand in front of the messages.
    assert at(200, more=2) == "messages[95:401]"
    assert compare(last, of(messages=many[:40])).at == ""
    # Of a long one so many more are kept.
    system = [{"type": "text", "text": "S" * 3 * PIECE_BYTES}]
    last = unpacked(packed(LAST, packed_regions(of(messages=many, system=system))))
    assert len(last.digests) == MAX_REGIONS

    def with_system(changed: int) -> str:
        messages = [*many, many[0]]
        messages[changed] = {"role": "user", "content": "else"}
        return compare(last, of(messages=messages, system=system)).at

    assert with_system(91) == "messages[91]"
    assert with_system(92) == with_system(400) == "messages[92:401]"
    assert with_system(401) == "messages[401]"


def test_a_conversation_takes_four_kilobytes_at_most() -> None:
    many = [{"role": "user", "content": f"{number}"} for number in range(500)]
    turn = packed(LAST._replace(provider="p" * 300), packed_regions(of(messages=many)))

    assert MAX_REGIONS == 200
    assert unpacked(turn).sent.provider == "p" * 255
    # Each is of another caller, so that each has a dictionary of its own.
    kept, most = Conversations(), 4096
    tracemalloc.start()
    for number in range(most + 50):
        kept.keep(number, b"%016d" % number, bytes(bytearray(turn)), 100.0)
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(kept) == most
    assert size < 4096 * most


def turn_at(time: float) -> bytes:
    return packed(LAST._replace(ended_at=time), packed_regions(of()))


def test_a_caller_with_many_conversations_displaces_its_own() -> None:
    kept = Conversations(most=10)
    kept.keep("bo", b"only", turn_at(0.0), 0.0)
    for number in range(100):
        kept.keep("ana", b"%d" % number, turn_at(1.0 + number), 1.0 + number)

    assert len(kept) == 10
    assert kept.last("bo", b"only", 101.0) is not None
    assert kept.last("ana", b"90", 101.0) is None
    assert kept.last("ana", b"91", 101.0) is not None
    assert kept.last("bo", b"91", 101.0) is None


def test_a_conversation_is_forgotten_after_an_hour() -> None:
    kept = Conversations()
    for caller, time in (("ana", 0.0), ("bo", 1.0), ("bo", 3000.0)):
        kept.keep(caller, b"%d" % time, turn_at(time), time)

    assert kept.last("ana", b"0", LIFE) is not None
    assert kept.last("ana", b"0", LIFE + 0.1) is None
    kept.keep("bo", b"new", turn_at(LIFE + 2), LIFE + 2)
    assert len(kept) == 2
    kept.keep("bo", b"new", turn_at(9999.0), 9999.0)
    assert len(kept) == 1


def test_losses_are_shown_for_an_hour() -> None:
    clock = FakeClock(now=0.0)
    losses = Losses(clock)
    for number in range(2 * MAX_KINDS):
        losses.add(CacheLoss("changed", f"messages[{number}]", 1, 10))
    clock.now += 1800
    losses.add(CacheLoss("evicted", tokens=7))
    losses.add(CacheLoss("unknown"))

    assert losses.hour().total() == 20 * MAX_KINDS + 7
    assert len(losses.hour()) == MAX_KINDS + 2
    clock.now += 1900
    assert losses.hour() == {("evicted", ""): 7}
    clock.now += 3600
    assert not losses.hour()
    assert losses.verdicts == {"changed": 2 * MAX_KINDS, "evicted": 1, "unknown": 1}


def test_a_bug_in_the_comparison_is_counted_and_the_request_goes_on() -> None:
    clock = FakeClock(now=0.0)
    reader = Reader(Bugs(), clock)
    # A turn that was cut behind its numbers.
    reader.conversations.keep("ana", b"key", bytes(28), 0.0)

    turn = reader.turn("ana", b"key", of(), lambda _name: "gone")

    assert turn is None
    assert reader.bugs.value == 1
