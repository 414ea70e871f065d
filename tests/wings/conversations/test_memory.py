"""Conversations: the turns that each retention policy keeps, and those that are sent."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest

from aioserver.auth.callers import Caller
from aioserver.config.settings import Context, Persistence
from aioserver.wings.conversations.memory import Conversations
from aioserver.wings.conversations.turn import MAX_UNLIMITED_BYTES, Turn, estimated_tokens
from tests.support.clock import FakeClock

ME, YOU = Caller("me"), Caller("you")
POLICIES = ("token_limit", "message_count", "time_based", "unlimited")
DAY = 86_400.0
WIDE = Context(max_tokens=1_000_000, reserve_tokens=0, preserve_recent=0)


@dataclass
class Kept:
    """Conversations on a fake clock."""

    context: Context = WIDE
    persistence: Persistence = field(default_factory=lambda: Persistence())
    clock: FakeClock = field(default_factory=lambda: FakeClock(1.0))

    def __post_init__(self) -> None:
        self.all = Conversations(self.context, self.persistence, clock=self.clock)

    def keep(self, question: str, answer: str = "a", name: str = "c1") -> None:
        turn = Turn.of(question, answer, self.clock())
        self.all.keep(ME, name, turn)

    def sent(self, text: str = "now", name: str = "c1") -> list[str]:
        messages = self.all.history(ME, name, text)
        check(messages, text)
        return [message["content"] for message in messages[:-1]]


def check(messages: list[dict[str, Any]], text: str) -> None:
    """A history alternates, begins with the user's turn and ends with the new one."""
    assert all(message.keys() == {"role", "content"} for message in messages)
    roles = [message["role"] for message in messages]
    assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
    assert messages[-1]["content"] == text


def policy(name: str, **bounds: Any) -> Persistence:
    return Persistence(retention_policy=name, **bounds)


def test_a_history_is_a_snapshot() -> None:
    kept = Kept()
    kept.keep("q1", "a1")
    messages = kept.all.history(ME, "c1", "q2")

    kept.keep("q2", "a2")
    messages[0]["content"] = "changed"

    assert len(messages) == 3
    assert kept.sent() == ["q1", "a1", "q2", "a2"]


@pytest.mark.parametrize(("text", "expected"), [("", 0), ("a", 1), ("abcd", 1), ("€€", 2)])
def test_a_token_is_estimated_as_four_bytes(text: str, expected: int) -> None:
    assert estimated_tokens(text) == expected


# What is kept.


@pytest.mark.parametrize("name", ["time_based", "unlimited"])
def test_without_a_bound_of_its_own_a_conversation_keeps_a_mebibyte(name: str) -> None:
    kept = Kept(persistence=policy(name))
    for number in range(40):
        kept.keep(f"{number}" + "q" * 50_000, "a" * 50_000)

    sizes = [len(text) for text in kept.sent()]
    assert 900_000 < sum(sizes) <= MAX_UNLIMITED_BYTES


def test_of_too_many_conversations_the_one_used_longest_ago_goes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("aioserver.wings.conversations.memory.MAX_CONVERSATIONS", most := 500)
    kept = Kept()
    for number in range(most):
        kept.keep("q", name=f"c{number}")
    kept.keep("q", name="c0")  # kept on
    assert kept.sent(name="c1") == ["q", "a"]  # asked again

    kept.keep("q", name="new")
    kept.keep("q", name="newer")

    assert 0.98 * most < len(kept.all) <= most
    assert kept.sent(name="c0") != []
    assert kept.sent(name="c1") != []
    assert kept.sent(name="c2") == kept.sent(name="c3") == []


# What is sent.


def test_turns_that_fit_between_the_reserve_and_the_question_are_sent() -> None:
    context = Context(max_tokens=20, reserve_tokens=10, preserve_recent=0)
    kept = Kept(context)
    for number in range(6):
        kept.keep(f"q{number}xxxxxx", f"a{number}xxxxxx")  # two tokens each

    assert [text[:2] for text in kept.sent("x" * 4)] == ["q4", "a4", "q5", "a5"]  # 8 of 9
    assert [text[:2] for text in kept.sent("x" * 24)] == ["q5", "a5"]  # 4 of 4
    assert kept.sent("x" * 40) == []
    assert kept.sent("x" * 4000) == []


def test_an_answer_is_never_sent_without_its_question() -> None:
    kept = Kept(Context(max_tokens=5, reserve_tokens=0, preserve_recent=0))
    kept.keep("q" * 40, "a")

    assert kept.sent("now") == []  # the answer alone would fit


def test_the_latest_messages_are_sent_also_where_they_do_not_fit() -> None:
    kept = Kept(Context(max_tokens=10, reserve_tokens=9, preserve_recent=3))
    for number in range(4):
        kept.keep(f"q{number}" * 50, f"a{number}" * 50)

    assert [text[:2] for text in kept.sent()] == ["q3", "a3"]  # two of three: a whole turn


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("run", range(3))
def test_random_turns_stay_within_every_bound(name: str, run: int) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    bounds = policy(
        name,
        max_tokens_per_conversation=dice.randint(1, 60),
        max_messages_per_conversation=dice.randint(1, 12),
        retention_days=dice.uniform(0.1, 3.0),
    )
    context = Context(
        max_tokens=dice.randint(1, 80),
        reserve_tokens=dice.randint(0, 20),
        preserve_recent=dice.randint(0, 6),
    )
    wide, narrow = Kept(WIDE, bounds), Kept(context, bounds)
    every: list[tuple[float, str]] = []
    for number in range(120):
        wide.clock.now = narrow.clock.now = wide.clock.now + dice.uniform(0.0, DAY / 4)
        turn = (f"q{number}" + "x" * dice.randint(0, 40), f"a{number}" + "x" * dice.randint(0, 40))
        for kept in (wide, narrow):
            kept.keep(*turn)
        every += [(wide.clock.now, text) for text in turn]

        text = "x" * dice.randint(1, 60)
        kept_texts, sent = wide.sent(text), narrow.sent(text)

        assert kept_texts == [text for _, text in every[len(every) - len(kept_texts) :]]
        assert sent == kept_texts[len(kept_texts) - len(sent) :]
        if len(kept_texts) > 2 and name == "token_limit":
            assert sum(map(estimated_tokens, kept_texts)) <= bounds.max_tokens_per_conversation
        if len(kept_texts) > 2 and name == "message_count":
            assert len(kept_texts) <= bounds.max_messages_per_conversation
        if name == "time_based":
            alive = [
                text for at, text in every if at >= wide.clock.now - bounds.retention_days * DAY
            ]
            assert kept_texts == alive
        room = context.max_tokens - context.reserve_tokens - estimated_tokens(text)
        if len(sent) > context.preserve_recent:
            assert sum(map(estimated_tokens, sent)) <= room
        assert len(sent) >= min(len(kept_texts), context.preserve_recent) // 2 * 2


def test_all_conversations_together_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aioserver.wings.conversations.memory.MESSAGE_OVERHEAD", 0)
    monkeypatch.setattr("aioserver.wings.conversations.memory.MAX_KEPT_TOKENS", 100)
    kept = Conversations(Context(), Persistence())

    for number in range(20):
        turn = Turn.of("x" * 40, "y" * 40, time.time())  # 20 tokens
        kept.keep(ME, f"c{number}", turn)

    assert len(kept) in {4, 5}
    assert len(kept.history(ME, "c19", "?")) == 3
    assert len(kept.history(ME, "c14", "?")) == 1


def test_who_keeps_most_loses_the_conversations_used_longest_ago(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("aioserver.wings.conversations.memory.MAX_CONVERSATIONS", 100)
    kept = Kept()
    for number in range(20):
        kept.all.keep(YOU, f"c{number}", Turn.of("yours", "a", 1.0))

    for number in range(1000):
        kept.keep("mine", name=f"c{number}")

    assert len(kept.all) <= 100
    assert len(kept.all.listing(YOU, 50, None).summaries) == 20
    assert kept.sent(name="c999") == ["mine", "a"]
    assert kept.sent(name="c0") == []


def test_a_list_costs_what_it_shows_and_not_what_others_keep() -> None:
    kept = Kept()
    for number in range(30):
        kept.keep("mine", name=f"c{number:02}")
        kept.clock.now += 1
    looked_at: list[float] = []

    class Bounds(NamedTuple):
        def kept(self, turns: list[Turn], now: float) -> list[Turn]:
            looked_at.append(now)
            return turns

    for number in range(2000):
        kept.all.keep(Caller(f"other{number % 7}"), f"c{number}", Turn.of("theirs", "a", 1.0))
    kept.all.bounds = Bounds()  # type: ignore[assignment]

    page = kept.all.listing(ME, 5, None)
    assert page.after is not None
    rest = kept.all.listing(ME, 5, page.after)

    assert [each.conversation_id for each in page.summaries] == [
        f"c{n}" for n in range(29, 24, -1)
    ]
    assert [each.conversation_id for each in rest.summaries] == [
        f"c{n}" for n in range(24, 19, -1)
    ]
    assert len(looked_at) == 12


def test_short_messages_count_with_what_they_cost_in_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("aioserver.wings.conversations.memory.MAX_KEPT_TOKENS", 1 << 14)
    kept = Conversations(Context(), Persistence())

    for number in range(2000):
        kept.keep(ME, f"c{number}", Turn.of("?", "!", time.time()))

    # 64 KiB have no room for more, at 256 bytes a message and more.
    assert 1 <= len(kept) <= 128
