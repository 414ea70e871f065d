"""The log against a simple model: gapless for every reader or a ResumeGap, and every byte
counted.
"""

from __future__ import annotations

import asyncio
import gc
import json
import random
import weakref
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import orjson
import pytest

from aioserver.auth.callers import anonymous
from aioserver.config.settings import Streams
from aioserver.errors import ResumeGap, ServerAtCapacity
from aioserver.protocol import eventstream
from aioserver.protocol.openai import Reading, Shape
from aioserver.protocol.sound import PIECE_BYTES
from aioserver.protocol.steps import at_once
from aioserver.protocol.whole_answer import text_pieces
from aioserver.provider_errors import ProviderDisconnected, ProviderRefused
from aioserver.providers.request import Answer
from aioserver.streams.contracts import PLAIN_EVENTS
from aioserver.streams.cursor import ConditionReader
from aioserver.streams.entries import CANCELLED, CHUNK, COMPLETE, ERROR
from aioserver.streams.fast_path import Destination, TextPath
from aioserver.streams.formats import EVENTS
from aioserver.streams.lifetime import Lifetime
from aioserver.streams.store import StoreObserver, StreamStore
from aioserver.streams.stream import STREAM_OVERHEAD, Stream
from aioserver.wings.responses.events import ResponseEvents
from tests.support.waiting import ticks

if TYPE_CHECKING:
    from collections.abc import Awaitable, Sequence

    from aioserver.streams.contracts import Queued


MUCH = 1 << 30
DEMO = "demo"


def streams_of(max_stream_bytes: int = MUCH, max_kept_bytes: int = MUCH) -> StreamStore:
    return StreamStore(max_stream_bytes=max_stream_bytes, max_kept_bytes=max_kept_bytes)


@pytest.fixture
def stream() -> Stream:
    """A log without bounds that is kept for a while."""
    return streams_of().open("r1", DEMO, window=30)


def fill(stream: Stream, count: int, size: int = 50_000) -> None:
    """Append *count* events of so many bytes."""
    for _ in range(count):
        stream.append(CHUNK, [chunk("x" * size)])


def chunk(text: str) -> bytes:
    return orjson.dumps({"type": "text", "data": text, "metadata": {}})


def raw(*texts: str) -> bytes:
    return b"".join(
        b"data: %b\n\n" % orjson.dumps({"choices": [{"delta": {"content": text}}]})
        for text in texts
    )


def texts(frames: Sequence[bytes]) -> list[str]:
    return [orjson.loads(frame)["chunk"].get("data") for frame in frames]


class Ends(StoreObserver):
    """Writes down which logs have ended."""

    def __init__(self) -> None:
        self.seen: list[Stream] = []

    def finished(self, stream: Stream) -> None:
        self.seen.append(stream)


class Nowhere:
    """An outbox that writes to nobody."""

    def put(self, _path: object, _data: bytes) -> None:
        pass


class Slow:
    """A reader that takes as many entries as a test says, and writes down what it has read."""

    def __init__(self, stream: Stream, after: int = 0) -> None:
        self.stream = stream
        self.next = after + 1
        self.next_index, self.skip = stream.locate(after)
        self.seen: list[tuple[int, str]] = []
        self.notices = 0
        self.dropped = False
        self.positions: list[int] = []
        stream.add_reader(self)

    def write_now(self, _data: bytes) -> bool:
        return False

    def open_fast_path(self, _shape: Shape | None) -> None:
        return None

    def notify(self) -> None:
        self.notices += 1

    def drop(self, _seen: int) -> None:
        assert self.next_index < self.stream.offset
        self.dropped = True
        self.stream.remove_reader(self)

    def report_position(self, queued: Queued) -> None:
        self.positions.append(queued.position)

    def read(self, most: int = MUCH) -> None:
        """Read up to *most* entries; every number must be the next one."""
        while most and self.next_index < self.stream.offset + len(self.stream.entries):
            if self.next_index < self.stream.offset:
                raise ResumeGap("behind")
            entry = self.stream.entries[self.next_index - self.stream.offset]
            frames = self.stream.frames(entry)
            assert len(frames) == entry.count
            for frame in frames[self.skip :]:
                read = orjson.loads(frame)
                assert read["event_id"] == self.next
                assert read["request_id"] == self.stream.request_id
                self.seen.append((self.next, read["chunk"].get("data", "")))
                self.next += 1
            self.skip = 0
            self.next_index += 1
            most -= 1
        self.stream.trim()

    def leave(self) -> None:
        self.stream.remove_reader(self)
        if self.stream.ended:
            self.stream.trim()


# One log.


def test_an_answer_is_numbered_from_1_without_holes(stream: Stream) -> None:
    reader = Slow(stream)

    stream.outcome.provider, stream.outcome.model = "groq", "llama"
    stream.append_processing()
    stream.append(CHUNK, [chunk("a"), chunk("b")])
    stream.append(CHUNK, [chunk("c")])
    stream.end(COMPLETE, {"metadata": {"finish_reason": "stop"}})
    reader.read()

    assert [number for number, _ in reader.seen] == [1, 2, 3, 4, 5]
    assert reader.notices == 4
    assert (stream.first, stream.last, stream.ended, stream.end_status) == (1, 5, True, COMPLETE)
    assert stream.frames(stream.entries[1])[1] == (
        b'{"request_id":"r1","event_id":3,"status":"chunk",'
        b'"chunk":{"type":"text","data":"b","metadata":{}}}'
    )


def test_processing_is_event_1_and_a_later_try_keeps_it(stream: Stream) -> None:
    stream.conversation_id = "c1"

    stream.outcome.provider, stream.outcome.model = "groq", "llama"
    stream.append_processing()
    stream.outcome.provider, stream.outcome.model = "openai", "gpt"
    stream.append_processing()

    assert stream.last == 1
    assert (stream.outcome.provider, stream.outcome.model) == ("openai", "gpt")
    assert orjson.loads(stream.frames(stream.entries[0])[0]) == {
        "request_id": "r1",
        "event_id": 1,
        "status": "processing",
        "chunk": {
            "metadata": {
                "processing": True,
                "provider": "groq",
                "model": "llama",
                "conversation_id": "c1",
            }
        },
    }


def test_nothing_follows_the_end(stream: Stream) -> None:
    stream.end(CANCELLED, {})

    with pytest.raises(AssertionError):
        stream.append(CHUNK, [chunk("late")])
    assert stream.last == 1


def test_a_fault_is_the_last_event_on_both_kinds_of_face(stream: Stream) -> None:
    error = ProviderDisconnected("the provider has left")

    stream.fail(error)

    (entry,) = stream.entries
    assert (entry.status, stream.error) == (ERROR, error)
    assert orjson.loads(stream.frames(entry)[0])["chunk"]["code"] == "provider_disconnected"
    (event,) = eventstream.parse(entry.data)
    assert orjson.loads(event.data)["error"]["code"] == "provider_disconnected"


def test_every_reader_hears_the_position_in_the_queue_which_is_no_event(stream: Stream) -> None:
    readers = [Slow(stream), Slow(stream)]

    stream.report_position(3, 4.5)

    assert [reader.positions for reader in readers] == [[3], [3]]
    assert stream.last == 0


def test_a_reader_that_leaves_while_it_is_poked_keeps_no_other_from_being_poked(
    stream: Stream,
) -> None:

    class Leaver(Slow):
        def notify(self) -> None:
            super().notify()
            self.leave()

    readers = [Leaver(stream), Slow(stream), Leaver(stream), Slow(stream)]

    stream.append(CHUNK, [chunk("a")])
    stream.end(COMPLETE, {})

    assert [reader.notices for reader in readers] == [1, 2, 1, 2]


# Where a reader goes on.


def test_a_reader_goes_on_behind_any_event_also_in_the_middle_of_an_entry(stream: Stream) -> None:
    names = "abcdefghij"
    stream.append(CHUNK, [chunk(name) for name in names[:4]])
    stream.append(CHUNK, data=raw(*names[4:9]), count=5)
    stream.append(CHUNK, data=b": a comment\n\n", count=0)
    stream.append(CHUNK, [chunk(names[9])])

    for after in range(11):
        reader = Slow(stream, after)
        reader.read()
        assert reader.seen == [(at + 1, names[at]) for at in range(after, 10)]


def test_a_resume_beyond_what_exists_is_a_gap(stream: Stream) -> None:
    stream.locate(0)
    with pytest.raises(ResumeGap, match="does not exist yet; the newest is 0"):
        stream.locate(1)
    stream.append(CHUNK, [chunk("a")])

    with pytest.raises(ResumeGap, match="event 2 does not exist yet; the newest is 1"):
        stream.locate(2)
    with pytest.raises(ResumeGap):
        stream.locate(2**63)
    assert stream.locate(1) == (1, 0)


def test_a_resume_from_before_what_is_kept_is_a_gap() -> None:
    stream = streams_of(max_stream_bytes=2000).open("r1", DEMO, window=30)
    for number in range(1, 40):
        stream.append(CHUNK, [chunk(f"{number}")])

    assert 1 < stream.first < stream.last == 39
    assert stream.bytes <= 2000
    with pytest.raises(ResumeGap, match=f"the oldest is {stream.first}"):
        stream.locate(stream.first - 2)
    reader = Slow(stream, stream.first - 1)
    reader.read()
    assert reader.seen[0] == (stream.first, f"{stream.first}")
    assert reader.next == 40


def test_a_log_without_entries_still_knows_where_it_was() -> None:
    stream = streams_of().open("r1", DEMO, window=0)
    reader = Slow(stream)
    stream.append(CHUNK, [chunk("a"), chunk("b")])
    reader.read()

    assert not stream.entries
    assert (stream.first, stream.last, stream.bytes) == (3, 2, 0)
    with pytest.raises(ResumeGap):
        stream.locate(1)
    assert Slow(stream, 2).next_index == 1


# Bounds of one log.


def test_with_window_0_what_every_reader_has_passed_is_let_go() -> None:
    streams = streams_of()
    stream = streams.open("r1", DEMO, window=0)
    fast, slow = Slow(stream), Slow(stream)
    for _ in range(5):
        stream.append(CHUNK, [chunk("a")])

    fast.read()
    assert stream.first == 1
    slow.read(3)
    assert stream.first == 4
    slow.read()
    assert stream.bytes == 0
    assert streams.stats().bytes == stream.kept_bytes


def test_an_entry_over_the_bound_still_reaches_present_readers() -> None:
    stream = streams_of(max_stream_bytes=1000).open("r1", DEMO, window=30)
    reader = Slow(stream)
    for name in ("a", "b" * 5000, "c" * 5000):
        stream.append(CHUNK, [chunk(name)])
        reader.read()

    assert [text for _, text in reader.seen] == ["a", "b" * 5000, "c" * 5000]
    assert len(stream.entries) == 1


def test_a_log_of_frames_and_bytes_counts_both(stream: Stream) -> None:
    before = stream.bytes

    stream.append(CHUNK, data=b"x" * 1000, count=1)
    assert stream.bytes - before >= 1000
    stream.end(COMPLETE, {}, data=b"y" * 1000)

    assert stream.bytes == sum(entry.size for entry in stream.entries)
    assert stream.bytes >= 2000


def test_frames_of_the_providers_bytes_cost_no_memory_that_is_not_counted(stream: Stream) -> None:
    stream.append(CHUNK, data=raw("a", "b"), count=2)
    (entry,) = stream.entries

    assert texts(stream.frames(entry)) == ["a", "b"]

    assert entry.frames is None
    assert entry.size == stream.bytes


def test_frames_of_a_whole_answer_leave_no_hole_in_the_numbers(stream: Stream) -> None:
    whole = orjson.dumps({"choices": [{"message": {"role": "assistant", "content": "Hello"}}]})
    pieces = at_once(text_pieces(whole))
    stream.append_whole(Answer(200, whole, "", stream.outcome), whole, pieces)
    stream.end(COMPLETE, {})
    reader = Slow(stream)

    reader.read()

    assert reader.seen == [(1, "Hello"), (2, "")]


def test_a_large_whole_answer_is_shown_in_small_events_by_what_was_found_in_it(
    stream: Stream,
) -> None:
    text = "Hell\u00f6 \U0001f600\n" * 100_000
    whole = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
    pieces = at_once(text_pieces(whole))
    stream.append_whole(Answer(200, whole, "", stream.outcome), whole, pieces)
    stream.end(COMPLETE, {})
    reader, later = Slow(stream), Slow(stream, 7)

    reader.read()
    later.read()

    assert len(pieces) > 20
    assert "".join(text for _, text in reader.seen) == text
    assert later.seen == reader.seen[7:]
    assert max(len(stream.frames(entry)[0]) for entry in stream.entries) < 2 * PIECE_BYTES


@pytest.mark.parametrize(
    "data",
    [
        b"not JSON",
        b"[DONE]",
        b"[]",
        b"1",
        b"null",
        b'{"choices":[]}',
        b'{"choices":{}}',
        b'{"choices":[1]}',
        b'{"choices":[{}]}',
        b'{"choices":[{"delta":null}]}',
        b'{"choices":[{"delta":[]}]}',
        b'{"choices":[{"delta":{"content":null}}]}',
        b'{"choices":[{"delta":{"content":[1]}}]}',
        b'{"choices":[{"delta":{"role":"assistant"}}]}',
        b'{"choices":[{"message":7}]}',
        b"\xff\xff",
    ],
)
def test_every_event_is_one_frame_whatever_the_provider_sends(stream: Stream, data: bytes) -> None:
    stream.append(CHUNK, data=b"data: %b\n\n" % data, count=1)

    (frame,) = stream.frames(stream.entries[0])

    assert orjson.loads(frame)["chunk"] == {"type": "text", "data": "", "metadata": {}}


# The store.


def test_a_log_is_found_by_its_caller_only() -> None:
    streams = streams_of()
    stream = streams.open("r1", "a", window=30)
    other = streams.open("r1", "b", window=30)
    streams.open("r2", "a", window=30, private=True)

    assert streams.find("a", "r1") is stream
    assert streams.find("b", "r1") is other
    assert streams.find("c", "r1") is streams.find("a", "r2") is None
    assert list(streams.owned_by("a")) == [stream]
    assert len(streams.running()) == 3


def test_without_keys_the_logs_of_other_addresses_are_not_listed() -> None:
    streams = streams_of()
    here, there = anonymous("10.0.0.1"), anonymous("10.0.0.2")
    stream = streams.open("r1", here, window=30)
    other = streams.open("r2", there.on_behalf_of("somebody"), window=30)
    stream.add_alias("resp_1")

    assert list(streams.owned_by(here)) == [stream]
    assert list(streams.owned_by(there)) == [other]
    assert streams.find(there, "r1") is stream  # an id is enough to read its answer
    for log in (stream, other):
        log.end(COMPLETE, {})
        streams.drop(log)
    assert list(streams.owned_by(here)) == list(streams.owned_by(there)) == []


class Counted:
    """A caller that counts how often one is looked at."""

    looks = 0

    def __init__(self, number: int) -> None:
        self.number = number

    def __hash__(self) -> int:
        Counted.looks += 1
        return self.number

    def __eq__(self, other: object) -> bool:
        Counted.looks += 1
        return self is other


def test_the_logs_of_a_caller_are_listed_without_a_look_at_those_of_others() -> None:
    streams = streams_of()
    callers = [Counted(number) for number in range(1000)]
    for caller in callers:
        streams.open("r1", caller, window=30)

    Counted.looks = 0
    (stream,) = streams.owned_by(callers[500])

    assert stream.caller is callers[500]
    assert Counted.looks < 10


def test_a_caller_whose_logs_are_all_dropped_is_forgotten() -> None:
    streams = streams_of()
    caller = Counted(1)
    stream = streams.open("r1", caller, window=30)
    stream.add_alias("resp_1")
    stream.end(COMPLETE, {})
    alive = weakref.ref(caller)

    streams.drop(stream)
    del caller, stream
    gc.collect()

    assert alive() is None


def test_a_dropped_log_gives_its_bytes_back_once() -> None:
    streams = streams_of()
    stream, other = streams.open("r1", DEMO, window=30), streams.open("r2", DEMO, window=30)
    for log in (stream, other):
        log.append(CHUNK, [chunk("a")])
        log.end(COMPLETE, {})

    streams.drop(stream)
    streams.drop(stream)

    assert streams.find(DEMO, "r1") is None
    assert streams.stats().bytes == other.kept_bytes > 0
    assert streams.stats().finished == 1
    with pytest.raises(ResumeGap):
        stream.locate(0)


def test_a_reader_of_a_dropped_log_is_behind_and_not_at_its_end() -> None:
    streams = streams_of()
    stream = streams.open("r1", DEMO, window=30)
    reader = Slow(stream)
    stream.append(CHUNK, [chunk("a")])
    stream.end(COMPLETE, {})

    streams.drop(stream)

    assert reader.next_index < stream.offset


def test_a_name_used_again_is_not_dropped_with_its_first_bearer() -> None:
    streams = streams_of()
    old = streams.open("r1", DEMO, window=30)
    old.end(COMPLETE, {})
    new = streams.open("r1", DEMO, window=30)

    streams.drop(old)

    assert streams.find(DEMO, "r1") is new


def finished(streams: StreamStore, name: str, size: int = 1000) -> Stream:
    stream = streams.open(name, DEMO, window=30)
    stream.append(CHUNK, [chunk("x" * size)])
    stream.end(COMPLETE, {})
    return stream


def test_over_max_kept_bytes_the_oldest_finished_go_first() -> None:
    streams = streams_of(max_kept_bytes=60_000)
    running = streams.open("running", DEMO, window=30)
    running.append(CHUNK, [chunk("x" * 1000)])

    for number in range(20):
        finished(streams, f"r{number}")
        assert streams.stats().bytes <= 60_000

    kept = [stream.request_id for stream in streams.owned_by(DEMO)]
    assert kept == ["running", *(f"r{number}" for number in range(20 - len(kept) + 1, 20))]
    assert len(kept) > 4


async def test_an_ended_log_goes_with_its_last_reader_if_too_much_is_kept() -> None:
    lifetime = Lifetime(Streams(max_kept_bytes=60_000))
    streams = lifetime.store
    ended = streams.open("ended", DEMO, window=30)
    reader = ConditionReader(ended, lambda _stream: False)
    ended.append(CHUNK, [chunk("x" * 62_000)])
    ended.end(COMPLETE, {})
    assert streams.stats().bytes > 60_000

    reader.leave()
    lifetime.reader_removed(ended)

    assert streams.find(DEMO, "ended") is None
    assert streams.stats().bytes == 0
    lifetime.close()


def test_a_new_answer_is_refused_when_running_ones_fill_the_server() -> None:
    streams = streams_of(max_kept_bytes=60_000)
    old = finished(streams, "old")
    running = streams.open("running", DEMO, window=30)

    running.append(CHUNK, [chunk("x" * 62_000)])

    assert streams.find(DEMO, "old") is None  # it made room, as far as it could
    assert not old.entries
    with pytest.raises(ServerAtCapacity, match="max_kept_bytes=60000") as caught:
        streams.open("more", DEMO, window=30)
    assert caught.value.retry_after == 5.0
    assert streams.find(DEMO, "more") is None
    assert len(streams.running()) == 1


def test_past_the_bound_late_readers_are_dropped_and_nobody_is_refused() -> None:
    streams = streams_of(max_kept_bytes=1_000_000)
    ended, running = (streams.open(name, DEMO, window=30) for name in ("ended", "running"))
    readers = [Slow(ended), Slow(running)]
    for stream in (ended, running):
        fill(stream, 8)
    ended.end(COMPLETE, {})
    prompt = streams.open("prompt", DEMO, window=30)
    reader = Slow(prompt)

    for _ in range(8):
        prompt.append(CHUNK, [chunk("x" * 50_000)])
        reader.read()

    assert readers[0].dropped
    assert len(ended.entries) == 1
    assert not readers[1].dropped  # what one finished log kept was enough
    assert not reader.dropped
    more = streams.open("more", DEMO, window=30)
    fill(more, 8)
    assert readers[1].dropped
    assert streams.find(DEMO, "running") is running
    assert len(running.entries) == 1
    assert streams.stats().bytes < 1_000_000
    streams.open("another", DEMO, window=30)


def test_of_running_logs_the_largest_drops_its_late_reader_first() -> None:
    streams = streams_of(max_kept_bytes=1_000_000)
    readers = []
    for name, count in (("small", 4), ("large", 12)):
        stream = streams.open(name, DEMO, window=30)
        readers.append(Slow(stream))
        fill(stream, count)
    prompt = streams.open("prompt", DEMO, window=30)

    fill(prompt, 5)

    assert [reader.dropped for reader in readers] == [False, True]


def test_past_the_bound_running_logs_lose_what_nobody_reads_the_largest_first() -> None:
    streams = streams_of(max_kept_bytes=1_000_000)
    small, large = (streams.open(name, DEMO, window=30) for name in ("small", "large"))
    for stream, count in ((small, 4), (large, 15)):
        for _ in range(count):
            stream.append(CHUNK, [chunk("x" * 50_000)])
            assert streams.stats().bytes < 1_000_000

    for _ in range(40):
        large.append(CHUNK, [chunk("x" * 50_000)])
        assert streams.stats().bytes < 1_000_000

    assert (small.first, small.last) == (1, 4)
    assert (large.first, large.last) == (55 - len(large.entries) + 1, 55)
    streams.open("more", DEMO, window=30)


def test_past_the_bound_running_logs_lose_what_every_reader_has_passed() -> None:
    streams = streams_of(max_kept_bytes=1_000_000)
    stream = streams.open("r", DEMO, window=30)
    readers = [Slow(stream), Slow(stream)]

    for _ in range(60):
        stream.append(CHUNK, [chunk("x" * 50_000)])
        readers[0].read()
        readers[1].read(1 if len(stream.entries) < 2 else MUCH)
        assert streams.stats().bytes < 1_000_000

    assert not any(reader.dropped for reader in readers)
    assert [number for number, _ in readers[0].seen] == [*range(1, 61)]
    assert stream.first > 40
    with pytest.raises(ResumeGap):
        Slow(stream)
    assert Slow(stream, 55).next_index == 55


def test_past_the_bound_a_log_that_ended_loses_what_all_its_readers_have_passed() -> None:
    streams = streams_of(max_kept_bytes=1_000_000)
    ended = streams.open("ended", DEMO, window=30)
    reader = Slow(ended)
    for _ in range(12):
        ended.append(CHUNK, [chunk("x" * 50_000)])
        reader.read()
    ended.end(COMPLETE, {})

    with streams.hold() as body:
        body.grow(900_000)
        assert streams.stats().bytes < 1_000_000

    assert not reader.dropped
    reader.read()
    assert [number for number, _ in reader.seen] == [*range(1, 14)]


def test_a_whole_answer_that_is_kept_while_it_runs_loses_nothing() -> None:
    streams = streams_of(max_kept_bytes=100_000)
    stream = streams.open("r", DEMO, window=30)
    body = b"x" * 110_000
    pieces = [slice(start, start + 10_000) for start in range(0, 110_000, 10_000)]

    stream.append_whole(Answer(200, body, "", stream.outcome), body, pieces)

    assert stream.first == 1
    assert len(stream.entries) == 11


async def test_past_the_bound_answers_that_nobody_reads_are_ended_last_of_all() -> None:
    lifetime = Lifetime(Streams(max_kept_bytes=200_000, max_detached=100))
    streams, ended = lifetime.store, list[str]()

    async def produce(stream: Stream) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(stream.request_id)
            stream.end(CANCELLED, {})

    def begin(name: str, caller: str) -> Stream:
        stream = streams.open(name, caller, window=30)
        stream.outcome.sent = True
        stream.producer = asyncio.create_task(produce(stream))
        stream.append(CHUNK, [chunk("x" * 4000)])
        stream.append(CHUNK, [chunk("x" * 4000)])
        return stream

    others = begin("others", "another")
    mine = [begin(f"r{number}", DEMO) for number in range(5)]
    read = begin("read", DEMO)
    Slow(read).read()
    await ticks()
    for stream in (others, *mine):
        lifetime.detach(stream, left=True)

    # What a conversation needs of an answer cannot be cut.
    for _ in range(250):
        read.text_bytes += 1000
        read.recount()
        await ticks()
        assert streams.stats().bytes < 203_000 or len(ended) == 6
        if not ended:
            assert streams.stats().bytes < 200_000
        elif len(ended) == 1:
            assert all(len(stream.entries) == 1 for stream in (read, *mine[1:], others))

    # Then both keep as much.
    assert ended[:4] == ["r0", "r1", "r2", "r3"]
    for stream in (others, read, *mine):
        stream.cancel()
    await ticks()
    lifetime.close()


def test_the_objects_of_tiny_events_are_counted() -> None:
    stream = streams_of(max_stream_bytes=20_000).open("r", DEMO, window=30)
    for _ in range(1000):
        stream.append(CHUNK, data=b":\n\n", count=0)

    assert len(stream.entries) <= 100


def test_no_rendering_outlives_its_answer(stream: Stream) -> None:
    readers = [Slow(stream), Slow(stream)]
    stream.append(CHUNK, [chunk("x" * 10_000)])
    EVENTS.render_newest(stream, stream.entries[-1])
    assert stream.rendered is not None  # the readers share it, and nothing counts it

    readers[0].leave()
    stream.end(COMPLETE, {})

    assert stream.rendered is None


def test_everything_that_a_stream_keeps_is_counted() -> None:
    streams = streams_of()
    stream = streams.open("r1", DEMO, window=30)
    empty = streams.stats().bytes
    assert empty >= STREAM_OVERHEAD

    stream.outcome.headers = {"x-ratelimit-remaining": "9" * 10_000}
    stream.recount()
    assert streams.stats().bytes >= empty + 10_000
    stream.text_bytes = 50_000
    stream.recount()
    assert streams.stats().bytes >= empty + 60_000
    stream.outcome.headers = {**stream.outcome.headers, "a": "b" * 5000}
    stream.append_whole(Answer(200, b"x" * 70_000, "", stream.outcome), b"x" * 70_000)
    assert streams.stats().bytes >= empty + 135_000
    events = ResponseEvents()
    events.note(b'data: {"response":{"id":"%b"}}\n\n' % (b"z" * 20_000), 1)
    stream.events = events
    stream.recount()
    assert streams.stats().bytes >= empty + 155_000
    stream.events = PLAIN_EVENTS
    stream.fail(ProviderRefused("no", 400, b"y" * 30_000))
    # The text belongs to the producer, which is done; the body is in the error, and in its event.
    assert empty + 145_000 <= streams.stats().bytes < empty + 150_000
    streams.drop(stream)
    assert streams.stats().bytes == 0


def test_a_whole_answer_near_the_bound_of_a_log_is_counted_once_and_stays_counted() -> None:
    streams = streams_of(max_stream_bytes=100_000)
    stream = streams.open("r1", DEMO, window=30)
    body = b"x" * 99_990

    stream.append_whole(Answer(200, body, "", stream.outcome), body)
    stream.end(COMPLETE, {})

    assert len(body) < streams.stats().bytes < len(body) + 2 * STREAM_OVERHEAD
    assert (stream.first, stream.last) == (1, 2)


def test_an_answer_that_ends_over_the_bound_is_not_kept() -> None:
    streams = streams_of(max_kept_bytes=60_000)
    stream = streams.open("long", DEMO, window=30)
    stream.append(CHUNK, [chunk("x" * 62_000)])
    assert streams.stats().bytes > 60_000

    stream.end(COMPLETE, {})

    assert streams.stats().bytes == 0
    assert streams.stats().finished == 0
    streams.open("next", DEMO, window=30)


def test_new_bounds_are_used_by_logs_to_come() -> None:
    streams = streams_of()
    streams.apply(max_stream_bytes=1000, max_kept_bytes=30_000)

    for number in range(9):
        finished(streams, f"r{number}", 200)
    stream = streams.open("r", DEMO, window=30)
    for _ in range(9):
        stream.append(CHUNK, [chunk("x" * 200)])

    assert streams.stats().bytes <= streams.stats().max_bytes == 30_000
    assert stream.bytes <= 1000


def test_new_bounds_make_room_for_a_new_answer() -> None:
    streams = streams_of()
    for number in range(9):
        finished(streams, f"r{number}")
    streams.apply(max_stream_bytes=MUCH, max_kept_bytes=20_000)
    assert streams.stats().bytes <= 20_000

    streams.open("r", DEMO, window=30)

    assert streams.stats().bytes <= 20_000 + STREAM_OVERHEAD


def test_a_long_id_is_counted_as_often_as_it_is_kept() -> None:
    streams = streams_of()
    streams.open("r", DEMO, window=30)
    short = streams.stats().bytes
    streams.open("r" * 101, DEMO, window=30)

    # As the name of the log, in the index, and in the head of its frames.
    assert streams.stats().bytes - short >= short + 300


def test_the_store_hears_of_each_end_once() -> None:
    ends = Ends()
    streams = StreamStore(max_stream_bytes=MUCH, max_kept_bytes=MUCH, observer=ends)
    first, second = (streams.open(name, DEMO, window=30) for name in "ab")

    second.end(CANCELLED, {})
    first.fail(ProviderDisconnected("gone"))

    assert ends.seen == [second, first]
    assert streams.stats().running == 0
    assert streams.stats().finished == 2


# Random steps.


@dataclass(eq=False)
class Known:
    """The model of one log: everything that was ever appended, and its readers."""

    stream: Stream
    events: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)  # of every entry since the start
    readers: list[Slow] = field(default_factory=list)
    resumed: dict[Slow, int] = field(default_factory=dict)
    dropped: bool = False
    # Nobody can come back to it: it goes with its last reader (streams/lifetime.py).
    goes: bool = False

    def append(self, dice: random.Random) -> None:
        names = [f"{len(self.events) + at}-" + "x" * dice.randint(0, 300) for at in range(3)]
        names = names[: dice.randint(1, 3)]
        if dice.random() < 0.5:
            self.stream.append(CHUNK, [chunk(name) for name in names])
        else:
            self.stream.append(CHUNK, data=raw(*names), count=len(names))
        self.events += names
        self.sizes.append(self.stream.entries[-1].size)

    def pass_on(self, dice: random.Random) -> None:
        """Append as the fast path does if there is one reader, which has read everything;
        otherwise as `append` does.
        """
        if len(self.readers) != 1 or self.stream.private:
            return self.append(dice)
        (reader,) = self.readers
        self.read(reader, MUCH)
        if reader not in self.readers or not self.stream.last:
            return self.append(dice)
        shape = Shape(b'data: {"t":"', b'"}\n\n', Reading())
        client = Destination(
            cast("Any", None), cast("Any", Nowhere()), lambda: 0.0, 0, lambda: None, False
        )
        path = TextPath(cast("Any", reader), client, shape, lambda _head, _number, _text: b"x")
        path.open, self.stream.path = True, path
        for _ in range(dice.randint(1, 4)):
            name = f"{len(self.events)}-" + "x" * dice.randint(0, 300)
            event = shape.prefix + name.encode() + shape.suffix
            assert path.forward(b"%x\r\n%b\r\n" % (len(event), event))
            self.events.append(name)
            reader.seen.append((reader.next, name))
            reader.next += 1
        assert self.stream.last == len(self.events)
        self.stream.close_fast_path()
        assert not path.open
        entries = self.stream.entries
        self.sizes.append(entries[-1].size if entries else 0)
        return None

    def end(self, dice: random.Random) -> None:
        status = dice.choice((COMPLETE, CANCELLED, ERROR))
        if status == ERROR:
            self.stream.fail(ProviderDisconnected("gone"))
        else:
            self.stream.end(status, {})
        self.events.append("")
        entries = self.stream.entries
        self.sizes.append(entries[-1].size if entries else 0)

    @property
    def spare(self) -> int:
        """The bytes of a log that nobody needs: its newest entry is not among them."""
        stream = self.stream
        if stream.ended and not self.readers:
            return 0
        passed = min([reader.next_index - stream.offset for reader in self.readers], default=MUCH)
        return sum(entry.size for entry in stream.entries[:-1][: max(0, passed)])

    def check(self, max_bytes: int, *, crowded: bool) -> None:
        stream = self.stream
        assert stream.last == len(self.events)
        assert stream.bytes == sum(entry.size for entry in stream.entries)
        assert stream.bytes <= max_bytes or len(stream.entries) <= 1
        assert stream.offset + len(stream.entries) == len(self.sizes)
        number = stream.first
        for entry in stream.entries:
            assert entry.first == number
            number += entry.count
        assert number == stream.last + 1
        if stream.window > 0 and not (self.dropped or crowded) and stream.offset:
            # No more was let go than had to be; the last entry brought it over the bound.
            assert stream.bytes + self.sizes[stream.offset - 1] > max_bytes

    def resume(self, after: int) -> None:
        stream = self.stream
        possible = stream.first - 1 <= after <= len(self.events)
        try:
            reader = Slow(stream, after)
        except ResumeGap:
            assert not possible
        else:
            assert possible
            self.readers.append(reader)
            self.resumed[reader] = after

    def read(self, reader: Slow, most: int) -> None:
        behind = reader.next_index < self.stream.offset
        try:
            reader.read(most)
        except ResumeGap:
            assert behind
            self.leave(reader)
        else:
            assert not behind or not most or self.dropped or not self.stream.entries
        after = self.resumed.get(reader)
        if after is not None:
            got = [text for _, text in reader.seen]
            assert got == self.events[after : after + len(got)]

    def leave(self, reader: Slow) -> None:
        reader.leave()
        self.readers.remove(reader)
        del self.resumed[reader]


@pytest.mark.parametrize("run", range(6))
def test_random_steps_agree_with_the_model(run: int) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    max_stream, max_kept = dice.choice((1500, 6000, MUCH)), dice.choice((40_000, 200_000, MUCH))
    streams = streams_of(max_stream, max_kept)
    logs: list[Known] = []
    order: list[Known] = []  # of their ends

    for step in range(600):
        log = dice.choice(logs) if logs else None
        grown = False
        match dice.choices(
            ("open", "append", "pass", "end", "resume", "read", "leave", "drop"),
            (2, 9, 6, 1, 6, 12, 3, 0.5),
        )[0]:
            case "open":
                room = streams.stats().bytes < max_kept
                window, private = dice.choice((0, 30)), dice.random() < 0.2
                try:
                    stream = streams.open(f"r{step}", DEMO, window=window, private=private)
                except ServerAtCapacity:
                    assert not room
                    assert not any(log.spare for log in logs)
                else:
                    assert (streams.find(DEMO, f"r{step}") is None) == private
                    logs.append(Known(stream))
            case "append" if log and not log.stream.ended:
                log.append(dice)
                grown = True
            case "pass" if log and not log.stream.ended:
                log.pass_on(dice)
                grown = True
            case "end" if log and not log.stream.ended:
                order.append(log)
                log.end(dice)
                log.goes = log.stream.window <= 0 and bool(log.stream.readers)
                grown = True
            case "resume" if log and len(log.readers) < 4:
                log.resume(dice.choice((0, log.stream.last, dice.randint(0, log.stream.last + 2))))
            case "read" if log and log.readers:
                log.read(dice.choice(log.readers), dice.choice((0, 1, 3, MUCH)))
            case "leave" if log and log.readers:
                log.leave(dice.choice(log.readers))
            case "drop" if log and log.stream.ended and not log.readers:
                log.dropped = True
                streams.drop(log.stream)

        for kept_log in logs:
            for reader in [reader for reader in kept_log.readers if reader.dropped]:
                kept_log.readers.remove(reader)
                kept_log.resumed.pop(reader)
            if kept_log.goes and not (kept_log.readers or kept_log.dropped):
                kept_log.dropped = True
                streams.drop(kept_log.stream)
        stats = streams.stats()
        unread = False  # an older finished log is kept, and nobody reads it
        for kept_log in order:
            if kept_log.stream.entries:
                unread = unread or not kept_log.readers
            elif not kept_log.dropped and kept_log.stream.window > 0:
                kept_log.dropped = True  # evicted: the oldest first, but for those that are read
                assert not kept_log.readers
                assert not unread
        if stats.bytes > max_kept and grown:
            assert not unread
        for kept_log in logs:
            kept_log.check(max_stream, crowded=max_kept < MUCH)
        assert stats.bytes == sum(log.stream.kept_bytes for log in logs)
        assert stats.running == sum(not log.stream.ended for log in logs)

    for log in logs:
        for reader in list(log.readers):
            log.read(reader, MUCH)
            if reader in log.readers:
                assert reader.next == len(log.events) + 1
                log.leave(reader)
        if not log.stream.ended:
            log.end(dice)
        streams.drop(log.stream)
    assert streams.stats().bytes == 0
    assert streams.stats().running == streams.stats().finished == 0


def test_first_event_of_a_private_log_is_a_number_without_an_entry() -> None:
    streams = streams_of(600)
    stream = streams.open("r1", DEMO, window=0.0, private=True)
    size = stream.kept_bytes

    stream.append_processing()
    assert (stream.last, stream.first, stream.kept_bytes) == (1, 2, size)
    Slow(stream)
    stream.forward(b"data: {}\n\n", 1)
    assert (stream.locate(0), stream.entries[0].first) == ((0, 0), 2)

    stream.forward(b"data: %b\n\n" % (b"x" * 600), 1)
    assert stream.first == 3
    with pytest.raises(ResumeGap):
        stream.locate(0)


def test_room_is_looked_for_once_however_many_fast_paths_count_late(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = StreamStore(max_stream_bytes=1 << 20, max_kept_bytes=1 << 22)
    closed = []

    def count_late(stream: Stream) -> None:
        closed.append(stream)
        store.count_bytes(stream, 10)  # as a fast path does that appends its texts

    monkeypatch.setattr(Stream, "close_fast_path", count_late)
    for number in range(500):
        stream = store.open(str(number), "anybody", window=30.0)
        stream.readers.append(cast("Any", SimpleNamespace(next_index=0)))

    with pytest.raises(ServerAtCapacity):
        store.take(1 << 23)
    assert len(closed) == 500


class Announcements(ConditionReader):
    """A reader that counts what it is told; a *broken* one has a bug."""

    def __init__(self, stream: Stream, *, broken: bool) -> None:
        self.told, self._broken = 0, False
        super().__init__(stream, lambda _stream: False)
        self._broken = broken

    def notify(self) -> None:
        if self._broken:
            raise RuntimeError("a bug")
        self.told += 1


async def test_an_end_is_told_to_all_whatever_one_reader_raises() -> None:
    ends = Ends()
    streams = StreamStore(max_stream_bytes=1 << 20, max_kept_bytes=1 << 20, observer=ends)
    stream = streams.open("r1", DEMO, window=30)
    readers = [Announcements(stream, broken=broken) for broken in (True, False, True, False)]
    before = [reader.told for reader in readers]

    with pytest.raises(RuntimeError, match="a bug"):
        stream.end(COMPLETE, {})

    assert stream.ended
    counts = [reader.told - count for reader, count in zip(readers, before, strict=True)]
    assert counts == [0, 1, 0, 1]
    assert ends.seen == [stream]
    assert (streams.stats().running, streams.stats().finished) == (0, 1)


class Bank:
    """A keeper that takes as long as a test says."""

    def __init__(self) -> None:
        self.kept: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def identified(self, answer_id: str) -> None: ...

    def keep(self, _stream: Stream) -> Awaitable[None]:
        return self.kept


async def test_log_whose_answer_is_being_kept_ends_when_that_is_done() -> None:
    stream, bank = streams_of().open("r", "a", window=60.0), Bank()
    stream.keeper = bank
    stream.append(CHUNK, [chunk("one")], more=True)
    reader = Slow(stream)
    stream.finish({})
    before = reader.notices
    ending = asyncio.create_task(stream.finished())
    await ticks(3)
    assert (before, stream.ended, stream.last) == (1, False, 1)

    bank.kept.set_result(None)
    await ending

    assert (stream.ended, stream.end_status, stream.last) == (True, COMPLETE, 2)
    assert reader.notices == 2


async def test_log_whose_answer_was_kept_at_once_has_ended_before_anybody_waits() -> None:
    stream = streams_of().open("r", "a", window=60.0)

    stream.finish({})
    await stream.finished()

    assert (stream.ended, stream.last) == (True, 1)
