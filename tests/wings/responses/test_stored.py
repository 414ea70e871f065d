"""The store of responses: bounded in bytes and time, shared along conversations, and a caller's
own.
"""

from __future__ import annotations

import gc
import json
import random
import tracemalloc
from typing import TYPE_CHECKING, Any

import pytest

from aioserver.auth.callers import Caller
from aioserver.errors import RequestTooLarge, ResponseNotFound
from aioserver.protocol.steps import at_once
from aioserver.streams.entries import COMPLETE, Entry
from aioserver.streams.store import StreamStore
from aioserver.wings.responses.draft import Draft
from aioserver.wings.responses.items import continued
from aioserver.wings.responses.stored import StoredResponses
from tests.support.clock import FakeClock

if TYPE_CHECKING:
    from collections.abc import Iterable

    from aioserver.wings.responses.stored import StoredResponse

CALLER = Caller("web")
ROOM = 1 << 24


class Conversations:
    """A store of responses, and what clients do with it."""

    def __init__(self, *, window: float = 60.0, room: int = ROOM, max_bytes: int = ROOM) -> None:
        self.clock = FakeClock()
        self.streams = StreamStore(max_stream_bytes=1 << 20, max_kept_bytes=room)
        self.stored = StoredResponses(self.streams, window, clock=self.clock, loop=self.clock.loop)
        self.max_bytes = max_bytes

    @property
    def bytes(self) -> int:
        return self.streams.stats().bytes

    def draft(self, previous: str | StoredResponse | None = None, **options: Any) -> Draft:
        caller = options.pop("caller", CALLER)
        if isinstance(previous, str):
            options["previous_id"] = previous
            previous = self.stored.get(caller, previous)
        options.setdefault("store", True)
        return Draft(self.stored, caller, previous=previous, max_bytes=self.max_bytes, **options)

    def find(self, response_id: str) -> StoredResponse:
        response = self.stored.get(CALLER, response_id)
        assert response is not None
        return response

    def ask(
        self,
        response_id: str,
        previous: str | StoredResponse | None = None,
        *,
        text: str = "q",
        **options: Any,
    ) -> None:
        """Ask *text*, and get the answer `a`."""
        draft = self.draft(previous, **options)
        at_once(draft.body_for(json.dumps({"input": text}).encode(), "demo", keeps=True))
        draft.keep_response(answer(response_id, "a"), "demo")
        draft.release()


@pytest.fixture
def conversations() -> Conversations:
    return Conversations()


def answer(response_id: str, text: str, **fields: Any) -> bytes:
    output = [{"type": "message", "role": "assistant", "content": text}]
    response = {"id": response_id, "status": "completed", "output": output, "model": "m", **fields}
    return json.dumps(response).encode()


def texts(items: Iterable[bytes]) -> list[str]:
    return [item["content"] for item in json.loads(b"[%b]" % b",".join(items))]


def test_a_conversation_is_continued_by_the_id_of_its_last_response(
    conversations: Conversations,
) -> None:
    conversations.ask("r1", text="first")
    conversations.ask("r2", "r1", text="second")

    history = conversations.find("r2").history()
    assert texts(history) == ["first", "a", "second", "a"]
    shown = json.loads(conversations.find("r2").response())
    assert shown == json.loads(answer("r2", "a"))


def test_a_response_that_continues_an_unknown_one_is_not_whole_nor_what_continues_it(
    conversations: Conversations,
) -> None:
    conversations.ask("r2", "r1")
    conversations.ask("r3", "r2")
    conversations.ask("r5", "r4", store=False)

    assert [conversations.find(name).whole for name in ("r2", "r3")] == [False, False]
    draft = conversations.draft("r3")
    with pytest.raises(ResponseNotFound, match="'r3' not found"):
        at_once(draft.body_for(b'{"input":"q"}', "another", keeps=True))
    draft.release()


def test_a_conversation_that_no_body_could_have_is_not_held_for_its_newest_response() -> None:
    conversations = Conversations(max_bytes=10_000)
    sizes = []
    for number in range(30):
        conversations.clock.advance(10.0)
        conversations.ask(f"r{number}", f"r{number - 1}" if number else None, text="x" * 2000)
        sizes.append(conversations.bytes)

    # Its provider continues it all the same. Those before go when their own time is over.
    newest = conversations.find("r29")
    assert not newest.whole
    assert len(newest.chain()) <= 6
    assert max(sizes[6:]) < 12 * 3500
    conversations.clock.advance(60.0)
    assert conversations.bytes == 0


def test_the_response_of_another_caller_is_not_found(conversations: Conversations) -> None:
    conversations.ask("r1")

    assert conversations.stored.get(Caller("other"), "r1") is None
    assert not conversations.stored.drop(Caller("other"), "r1")
    assert conversations.stored.get(Caller("web", priority=3), "r1") is not None


def test_a_response_is_found_for_its_window_and_then_costs_nothing(
    conversations: Conversations,
) -> None:
    conversations.ask("r1")
    conversations.clock.advance(59.0)
    conversations.ask("r2")

    conversations.clock.advance(1.0)

    assert conversations.stored.get(CALLER, "r1") is None
    assert conversations.stored.get(CALLER, "r2") is not None
    conversations.clock.advance(60.0)
    assert conversations.bytes == 0
    assert conversations.clock.pending == 0


def test_a_shorter_window_holds_at_once_for_what_is_stored(conversations: Conversations) -> None:
    conversations.ask("r1")
    conversations.clock.advance(10.0)
    conversations.ask("r2")

    conversations.stored.apply(10.0)

    assert len(conversations.stored) == 1
    assert conversations.clock.next_due == conversations.clock.now + 10.0
    conversations.stored.apply(0.0)
    assert conversations.bytes == 0
    conversations.ask("r3")
    assert len(conversations.stored) == 0


def test_a_conversation_goes_on_from_a_response_that_is_deleted(
    conversations: Conversations,
) -> None:
    conversations.ask("r1", text="first")
    conversations.ask("r2", "r1", text="second")
    before = conversations.bytes

    assert conversations.stored.drop(CALLER, "r1")

    assert not conversations.stored.drop(CALLER, "r1")
    assert conversations.bytes == before
    conversations.ask("r3", "r2", text="third")
    assert texts(conversations.find("r3").history())[::2] == [
        "first",
        "second",
        "third",
    ]
    conversations.stored.drop(CALLER, "r2")
    conversations.stored.drop(CALLER, "r3")
    assert conversations.bytes == 0


def test_a_fork_shares_what_came_before(conversations: Conversations) -> None:
    conversations.ask("root", text="x" * 100_000)
    alone = conversations.bytes

    for number in range(20):
        conversations.ask(f"fork{number}", "root")

    assert conversations.bytes - alone < 20 * 2000
    fork = conversations.find("fork7")
    assert fork.previous is conversations.find("root")


def test_a_connection_holds_a_response_that_has_no_name(conversations: Conversations) -> None:
    held: list[StoredResponse] = []

    def keep(response: StoredResponse) -> None:
        response.retain()
        held.append(response)

    draft = conversations.draft(store=False, on_kept=keep)
    draft.take_input(b'{"input":"q"}')
    draft.keep_response(answer("r1", "a"), "demo")
    draft.release()

    assert conversations.stored.get(CALLER, "r1") is None
    assert conversations.bytes == held[0].size
    following = conversations.draft(held[0], store=False)
    held.pop().release()
    sent = at_once(following.body_for(b'{"input":"2"}', "demo", keeps=True))
    assert [item["content"] for item in json.loads(sent)["input"]] == ["q", "a", "2"]
    following.release()
    following.release()
    assert conversations.bytes == 0


@pytest.mark.parametrize(
    "response",
    [
        answer("r1", "a", status="failed"),
        answer("r1", "a", status="in_progress"),
        answer("", "a"),
        b'{"status": "completed", "output": []}',
        b"[]",
        b"{",
        b'{"id":"r1","status":"completed","output":' + b"[" * 100_000,
    ],
)
def test_what_is_no_response_that_can_go_on_is_not_kept(
    conversations: Conversations, response: bytes
) -> None:
    draft = conversations.draft()
    draft.take_input(b'{"input":"q"}')

    draft.keep_response(response, "demo")
    draft.release()

    assert conversations.bytes == 0


def test_a_response_that_its_provider_keeps_is_known_there_only(
    conversations: Conversations,
) -> None:
    conversations.ask("r1", store=None)
    bridging = conversations.draft(store=None)
    at_once(bridging.bridge(b'{"input":"q"}'))
    bridging.keep_response(answer("r2", "a"), "demo")
    bridging.release()

    def sent(previous: str, provider: str, *, keeps: bool) -> str:
        draft, body = conversations.draft(previous), b'{"previous_response_id":"%b"}'
        try:
            sent = at_once(draft.body_for(body % previous.encode(), provider, keeps=keeps))
            assert draft.by_id == (sent == body % previous.encode() and previous != "r9")
            return "the id" if b"previous" in sent else "the conversation"
        finally:
            draft.release()

    assert sent("r1", "demo", keeps=True) == "the id"
    assert sent("r1", "demo", keeps=False) == "the conversation"
    assert sent("r1", "other", keeps=True) == "the conversation"
    assert sent("r2", "demo", keeps=True) == "the conversation"
    assert sent("r9", "demo", keeps=True) == "the id"
    unknown = conversations.draft("r9")
    with pytest.raises(ResponseNotFound):
        at_once(unknown.bridge(b"{}"))
    unknown.release()


def test_store_false_is_never_named(conversations: Conversations) -> None:
    draft = conversations.draft(store=False)

    at_once(draft.bridge(b'{"input":"q"}'))
    draft.keep_response(answer("r1", "a"), "demo")
    draft.release()

    assert len(conversations.stored) == 0
    assert conversations.bytes == 0


def test_a_conversation_that_is_too_long_is_refused(conversations: Conversations) -> None:
    conversations.max_bytes = 2000
    conversations.ask("r1", text="x" * 1500)
    draft = conversations.draft("r1")
    body = b'{"input":"%b","previous_response_id":"r1"}'

    with pytest.raises(RequestTooLarge, match="more than 2000"):
        at_once(draft.expand(body % (b"y" * 500), "demo"))
    assert len(at_once(draft.expand(body % (b"y" * 100), "demo"))) <= 2000
    draft.release()


def test_reasoning_that_a_provider_would_not_take_back_is_left_out(
    conversations: Conversations,
) -> None:
    output = [
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {"type": "reasoning", "id": "rs_2", "summary": [], "encrypted_content": "x"},
        {"type": "reasoning", "id": "rs_3", "content": [{"type": "reasoning_text", "text": "t"}]},
        {"type": "message", "id": "m", "content": "reasoning"},
    ]
    draft = conversations.draft()
    draft.take_input(b'{"input":[{"type":"reasoning","id":"own"}]}')
    draft.keep_response(answer("r1", "", output=output), "demo")
    draft.release()
    stored = conversations.find("r1")

    def ids(provider: str) -> list[str]:
        body = at_once(continued(b"{}", stored.history(provider), ROOM))
        return [item["id"] for item in json.loads(body)["input"]]

    assert ids("demo") == ["own", "rs_2", "rs_3", "m"]
    assert ids("other") == ["own", "rs_3", "m"]
    assert len(json.loads(stored.response())["output"]) == 4


def test_thousands_of_turns_neither_recurse_nor_leak(conversations: Conversations) -> None:
    turns = 5_000
    for number in range(turns):
        conversations.ask(f"r{number}", f"r{number - 1}" if number else None)
    last = conversations.find(f"r{turns - 1}")

    assert len([*last.history()]) == 2 * turns
    assert len(last.chain()) == turns
    del last
    conversations.clock.advance(60.0)
    assert conversations.bytes == 0


def test_many_small_responses_cost_what_they_count() -> None:
    conversations = Conversations(room=1 << 28)
    gc.collect()
    tracemalloc.start()
    for number in range(2000):
        conversations.ask(f"resp_{number:048}")
    gc.collect()
    taken = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()

    assert 0.5 * conversations.bytes < taken < 1.1 * conversations.bytes


def test_the_oldest_responses_make_room_for_new_ones() -> None:
    conversations = Conversations(room=1 << 20)

    for number in range(100):
        conversations.ask(f"r{number}", text="x" * 50_000)
        assert conversations.bytes <= 1 << 20

    kept = [n for n in range(100) if conversations.stored.get(CALLER, f"r{n}") is not None]
    assert kept == list(range(kept[0], 100))
    assert len(kept) >= 15


def test_a_new_answer_is_given_room_before_a_stored_response() -> None:
    conversations = Conversations(room=100_000)
    conversations.ask("r1", text="x" * 60_000)

    with conversations.streams.hold() as held:
        held.grow(90_000)

        assert len(conversations.stored) == 0
        # There is no room for this one, which is therefore not kept.
        conversations.ask("r2", text="x" * 60_000)
        assert len(conversations.stored) == 0
    assert conversations.bytes == 0


def test_answers_that_are_kept_and_stored_responses_make_room_oldest_first() -> None:
    conversations = Conversations(room=100_000)
    streams, clock = conversations.streams, conversations.clock
    for number in range(6):
        if number % 2:
            conversations.ask(f"r{number}", text="x" * 15_000)
        else:
            stream = streams.open(f"r{number}", CALLER, window=60.0)
            stream.end_with(Entry(1, 1, COMPLETE, b"x" * 10_000, None, clock.now))
        clock.advance(1.0)

    def kept() -> list[int]:
        return [
            number
            for number in range(6)
            if streams.find(CALLER, f"r{number}") or conversations.stored.get(CALLER, f"r{number}")
        ]

    with streams.hold() as held:
        for left in range(6, 0, -1):
            assert kept() == list(range(6 - left, 6))
            while len(kept()) == left:
                held.grow(500)
                assert streams.stats().bytes <= 100_000
        assert kept() == []


@pytest.mark.parametrize("held", [False, True])
def test_one_caller_pushes_out_nothing_that_others_keep(held: bool) -> None:
    conversations = Conversations(room=1 << 20)
    streams, others = conversations.streams, [Caller(f"other{number}") for number in range(5)]
    for other in others:
        conversations.ask("r", text="x" * 20_000, caller=other)
        stream = streams.open("log", other, window=60.0)
        stream.end_with(Entry(1, 1, COMPLETE, b"x" * 20_000, None, conversations.clock.now))
        conversations.clock.advance(1.0)

    for number in range(20):
        lane = number % 5
        draft = conversations.draft(
            store=not held,
            on_kept=lambda response, lane=lane: conversations.stored.held.hold(lane, response),
        )
        text = json.dumps({"input": "x" * 200_000})
        at_once(draft.body_for(text.encode(), "demo", keeps=True))
        draft.keep_response(answer(f"r{number}", "a"), "demo")
        draft.release()
        conversations.clock.advance(1.0)

    assert conversations.bytes <= 1 << 20
    for other in others:
        assert conversations.stored.get(other, "r") is not None
        assert streams.find(other, "log") is not None
    assert any(conversations.stored.held.get(lane) for lane in range(5))


@pytest.mark.parametrize("seed", range(10))
def test_random_conversations_stay_within_their_bounds_and_leave_nothing(seed: int) -> None:
    rng = random.Random(seed)
    conversations = Conversations(room=rng.choice([20_000, 100_000, ROOM]), window=30.0)
    callers = [Caller("one"), Caller("two")]
    expected: dict[tuple[str, str], list[str]] = {}
    drafts: list[Draft] = []
    held: list[StoredResponse] = []
    names: list[str] = [""]
    for step in range(400):
        caller, name = rng.choice(callers), rng.choice(names)
        action = rng.random()
        if action < 0.5:
            new, text = f"r{step}", "x" * rng.randrange(2000)
            previous = conversations.stored.get(caller, name)
            conversations.ask(new, previous, text=text, caller=caller)
            before = [] if previous is None else expected[caller.name, name]
            expected[caller.name, new] = [*before, text, "a"]
            names.append(new)
        elif action < 0.6:
            conversations.stored.drop(caller, name)
        elif action < 0.7:
            draft = conversations.draft(name, caller=caller)
            draft.take_input(json.dumps({"input": "y" * rng.randrange(2000)}).encode())
            drafts.append(draft)
        elif action < 0.8 and drafts:
            drafts.pop(rng.randrange(len(drafts))).release()
        elif action < 0.9 and (response := conversations.stored.get(caller, name)) is not None:
            response.retain()
            held.append(response)
        elif held:
            held.pop(rng.randrange(len(held))).release()
        conversations.clock.advance(rng.random())
        response = conversations.stored.get(caller, name)
        if response is not None:
            assert texts(response.history()) == expected[caller.name, name], seed
            assert conversations.clock.now - response.stored_at < 30.0
        assert 0 <= conversations.bytes <= conversations.streams.stats().max_bytes, seed

    for draft in drafts:
        draft.release()
    for response in held:
        response.release()
    conversations.clock.advance(31.0)
    assert conversations.bytes == 0, seed
    assert conversations.clock.pending == 0
