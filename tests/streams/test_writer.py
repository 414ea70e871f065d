"""The one writer of a socket, on a transport that takes as much as a test says."""

from __future__ import annotations

import asyncio
import itertools
import random
import socket as sockets
from typing import TYPE_CHECKING

import pytest

from aioserver.errors import ResumeGap
from aioserver.faces.streaming import Heartbeat
from aioserver.streams.entries import COMPLETE
from aioserver.streams.formats import Format
from aioserver.streams.outbox import Outbox
from aioserver.streams.writer import MAX_CONTROL_FRAMES, WRITE_BYTES, Writer
from tests.support.transport import BIG, HIGH, LOW, FakeTransport, client, say, stream_of
from tests.support.waiting import ticks, until

if TYPE_CHECKING:
    from aioserver.streams.cursor import Cursor
    from aioserver.streams.entries import Entry
    from aioserver.streams.stream import Stream

pytestmark = pytest.mark.both_loops


# What is ready is written.


async def test_one_stream_is_written_without_a_task_switch() -> None:
    async with client() as peer:
        stream = stream_of()
        peer.follow(stream)

        say(stream, "a")
        say(stream, "b", "c")
        stream.end(COMPLETE, {})

        assert peer.socket.writes == [b"a", b"bc", b"."]
        assert peer.ended == peer.left == [stream]
        assert stream.readers == []
        assert peer.writer.following == 0


async def test_earlier_events_are_replayed_from_any_event_in_one_write() -> None:
    stream = stream_of()
    say(stream, *"abc")
    say(stream, *"de")
    stream.end(COMPLETE, {})
    for after, expected in enumerate((b"abcde.", b"bcde.", b"cde.", b"de.", b"e.", b".", b"")):
        async with client() as peer:
            peer.follow(stream, after)
            await until(lambda peer=peer: peer.ended == [stream])  # type: ignore[misc]

            assert peer.socket.writes == ([expected] if expected else [])


async def test_events_of_several_streams_in_one_turn_are_one_write() -> None:
    async with client() as peer:
        streams = [stream_of(name) for name in "abc"]
        for stream in streams:
            peer.follow(stream)

        for stream in streams:
            say(stream, stream.request_id)
            say(stream, stream.request_id.upper())
        assert peer.socket.writes == []
        await ticks()

        assert peer.socket.writes == [b"aAbBcC"]
        streams[1].end(COMPLETE, {})
        streams[2].end(COMPLETE, {})
        await ticks()
        assert peer.socket.writes[1:] == [b".."]
        assert peer.ended == streams[1:]


async def test_a_position_is_written_before_what_is_not_written_yet() -> None:
    async with client() as peer:
        stream, other = stream_of(), stream_of("r2")
        peer.follow(stream)
        peer.follow(other)

        say(other, "a")
        stream.report_position(3, 1.0)
        await ticks()

        assert peer.socket.writes == [b"<3>", b"a"]


async def test_every_write_is_one_chunk() -> None:
    socket, outbox = FakeTransport(slow=True), Outbox(asyncio.get_running_loop())
    writer = Writer(socket, socket.drain, outbox, send_timeout=30.0, chunked=True)
    stream = stream_of()
    numbers = Format(
        "test", lambda _stream, entry, _skip: b"%d" % entry.first, None, lambda *_: b""
    )
    writer.follow(stream, 0, numbers)

    say(stream, "a")
    writer.send(b"ping")
    writer.send(b"x" * BIG)
    say(stream, "b")
    writer.send(b"pong")
    writer.send(b"!")
    say(stream, "c")
    socket.take()
    await until(lambda: len(socket.writes) == 4)

    assert socket.writes[:2] == [b"1\r\n1\r\n", b"4\r\nping\r\n"]
    assert socket.writes[3] == b"7\r\npong!23\r\n"
    writer.close()


# A blocked writer.


async def test_a_blocked_writer_renders_nothing_and_goes_on_after_the_drain() -> None:
    async with client(slow=True) as peer:
        stream = stream_of()
        peer.follow(stream)
        say(stream, "x" * BIG)
        await ticks()
        assert (peer.rendered, peer.socket.draining) == (1, 1)

        for text in "abcde":
            say(stream, text)
        stream.end(COMPLETE, {})
        peer.socket.take(BIG - LOW - 1)  # not below the mark yet
        await ticks()
        assert (peer.rendered, len(peer.socket.writes)) == (1, 1)
        peer.socket.take(1)
        await until(lambda: peer.ended == [stream])

        assert peer.socket.writes[1:] == [b"abcde."]
        assert peer.dropped == []


async def test_a_flush_waits_until_all_is_handed_over() -> None:
    async with client(slow=True) as peer:
        streams = [stream_of(name) for name in "ab"]
        for stream in streams:
            say(stream, stream.request_id * BIG)
            peer.follow(stream)
        flushed = asyncio.create_task(peer.writer.flush())
        await until(lambda: peer.socket.draining == 1)
        assert not flushed.done()

        peer.socket.take()
        await until(lambda: len(peer.socket.writes) == 2)
        peer.socket.take()
        await flushed

        assert peer.socket.written == b"a" * BIG + b"b" * BIG


async def test_a_flush_ends_when_the_client_is_gone() -> None:
    async with client(slow=True) as peer:
        peer.writer.send(b"x" * BIG)
        flushed = asyncio.create_task(peer.writer.flush())
        await until(lambda: peer.socket.draining == 1)

        peer.socket.lose()
        await flushed

        assert peer.writer.closed


async def test_a_cancelled_flush_does_not_cancel_the_blocked_write() -> None:
    async with client(slow=True) as peer:
        peer.writer.send(b"x" * BIG)
        flushed = asyncio.create_task(peer.writer.flush())
        await until(lambda: peer.socket.draining == 1)

        flushed.cancel()
        await asyncio.wait((flushed,))
        await ticks()

        assert peer.socket.draining == 1


async def test_without_progress_for_send_timeout_the_client_is_dropped() -> None:
    async with client(slow=True, send_timeout=0.04) as peer:
        stream, other = stream_of(), stream_of("r2")
        peer.follow(stream)
        peer.follow(other)
        say(stream, "x" * BIG)

        await until(lambda: peer.socket.aborted)

        assert peer.dropped == ["nothing taken for 0.04 s"]
        assert peer.writer.closed
        assert peer.left == [stream, other]
        assert stream.readers == other.readers == []


async def test_a_writer_that_was_drained_is_watched_no_more() -> None:
    async with client(slow=True, send_timeout=0.02) as peer:
        loop = asyncio.get_running_loop()
        peer.writer.send(b"x" * BIG)
        peer.socket.take(BIG - LOW)
        end = loop.time() + 0.1

        await until(lambda: loop.time() > end)

        assert not peer.socket.aborted


async def test_of_control_frames_64_wait_and_one_more_drops_the_client() -> None:
    async with client(slow=True) as peer:
        peer.writer.send(b"x" * BIG)
        for _ in range(MAX_CONTROL_FRAMES):
            peer.writer.send(b"pong")
        assert not peer.socket.aborted
        assert len(peer.socket.writes) == 1

        peer.writer.send(b"pong")

        assert peer.socket.aborted
        assert peer.dropped == ["more than 64 control frames wait"]
        assert len(peer.socket.writes) == 1


async def test_positions_do_not_wait_for_a_client_that_takes_nothing() -> None:
    async with client(slow=True) as peer:
        stream, other = stream_of(), stream_of("r2")
        peer.follow(stream)
        peer.follow(other)
        peer.writer.send(b"x" * BIG)
        for position in range(2 * MAX_CONTROL_FRAMES):
            stream.report_position(position, 1.0)
        assert not peer.socket.aborted

        peer.socket.take()
        await until(lambda: not peer.writer.blocked)
        other.report_position(7, 1.0)

        assert peer.socket.writes[1:] == [b"<7>"]


async def test_heartbeats_do_not_wait_for_a_client_that_takes_nothing() -> None:
    async with client(slow=True) as peer:
        beats = Heartbeat(peer.writer, 1.0, lambda: b"beat")
        peer.writer.send(b"x" * BIG)
        now = asyncio.get_running_loop().time()
        for second in range(2 * MAX_CONTROL_FRAMES):
            assert beats.visit(now + 2 + second) == 1.0
        assert not peer.socket.aborted

        peer.socket.take()
        await until(lambda: not peer.writer.blocked)
        beats.visit(now + 1000)

        assert peer.socket.writes[1:] == [b"beat"]


async def test_control_frames_that_waited_come_first_and_all() -> None:
    async with client(slow=True) as peer:
        stream = stream_of()
        peer.follow(stream)
        say(stream, "x" * BIG)
        say(stream, "event")
        for number in range(MAX_CONTROL_FRAMES):
            peer.writer.send(b"%d," % number)

        peer.socket.take()
        await until(lambda: len(peer.socket.writes) == 2)

        assert peer.socket.writes[1] == b"".join(b"%d," % at for at in range(64)) + b"event"


async def test_a_reader_that_falls_behind_its_log_is_dropped_and_never_skips() -> None:
    async with client(slow=True) as peer:
        stream = stream_of(most=3 * BIG)
        peer.follow(stream)
        for number in range(8):
            say(stream, f"{number}" * BIG)
        assert stream.first > 2

        assert peer.dropped == ["reader fell behind"]
        assert peer.left == [stream]
        assert stream.readers == []

        peer.socket.take()
        await until(lambda: len(peer.socket.writes) == 2)

        assert peer.socket.written == b"0" * BIG + b"<slow_client>"
        assert peer.ended == [stream]
        assert not peer.socket.aborted


async def test_a_reader_that_is_dropped_takes_no_other_with_it() -> None:
    async with client(slow=True) as peer:
        late, other = stream_of("late", most=3 * BIG), stream_of("other")
        peer.follow(late)
        peer.follow(other)
        for number in range(8):
            say(late, f"{number}" * BIG)
        await ticks()
        say(other, "still here")

        while peer.socket.held:
            peer.socket.take()
            await ticks()

        assert peer.socket.written.count(b"<slow_client>") == 1
        assert peer.socket.written.endswith(b"still here")
        assert peer.left == peer.ended == [late]
        assert peer.writer.following == 1


async def test_a_farewell_that_waits_is_not_written_once_the_stream_is_followed_again() -> None:
    async with client(slow=True) as peer:
        stream = stream_of(most=3 * BIG)
        cursor = peer.follow(stream)
        for number in range(8):
            say(stream, f"{number}" * BIG)
        peer.follow(stream, 7)
        peer.writer.unfollow(cursor)

        while peer.socket.held:
            peer.socket.take()
            await ticks()

        assert peer.socket.written == b"0" * BIG + b"7" * BIG


async def test_a_resume_from_before_the_log_is_a_gap_and_leaves_no_reader() -> None:
    async with client() as peer:
        stream = stream_of(most=1000)
        for _ in range(20):
            say(stream, "x" * 100)

        for after in (0, 21):
            with pytest.raises(ResumeGap):
                peer.follow(stream, after)

        assert stream.readers == []
        assert peer.writer.following == 0


# The end.


async def test_nothing_is_written_after_the_close() -> None:
    async with client() as peer:
        streams = [stream_of(name) for name in "ab"]
        for stream in streams:
            peer.follow(stream)
        for stream in streams:
            say(stream, "late")  # scheduled, not written

        peer.writer.close()
        for stream in streams:
            say(stream, "later")
            stream.report_position(1, 1.0)
            stream.end(COMPLETE, {})
        peer.writer.send(b"pong")
        peer.writer.pump()
        await peer.writer.flush()
        await ticks()

        assert peer.socket.writes == []
        assert peer.ended == []
        assert peer.left == streams
        assert [stream.readers for stream in streams] == [[], []]


async def test_a_close_while_blocked_writes_nothing_after_the_drain() -> None:
    async with client(slow=True) as peer:
        stream = stream_of()
        peer.follow(stream)
        say(stream, "x" * BIG)
        say(stream, "late")
        peer.writer.send(b"late")
        await ticks()

        peer.writer.close()
        peer.socket.take()
        await until(lambda: peer.socket.draining == 0)
        await ticks()

        assert len(peer.socket.writes) == 1
        assert not peer.socket.aborted


@pytest.mark.parametrize("family", [sockets.AF_UNIX, sockets.AF_INET])
async def test_bytes_left_for_a_client_are_watched_after_the_close(
    family: sockets.AddressFamily,
) -> None:
    async with client(slow=True, send_timeout=0.03) as peer:
        with sockets.socket(family) as peer.socket.under:
            peer.writer.send(b"less than blocks")

            peer.writer.close()
            await until(lambda: peer.socket.aborted)


async def test_a_close_while_blocked_keeps_the_watch() -> None:
    async with client(slow=True, send_timeout=0.03) as peer:
        peer.writer.send(b"x" * BIG)
        await ticks()

        peer.writer.close()
        await until(lambda: peer.socket.aborted)

        assert peer.dropped == []  # it had been let go already


async def test_a_second_close_and_an_abort_after_it_are_nothing_new() -> None:
    async with client() as peer:
        stream = stream_of()
        peer.follow(stream)

        peer.writer.close()
        peer.writer.close()
        peer.writer.abort("late")

        assert peer.left == [stream]
        assert peer.dropped == []
        assert peer.socket.aborted


async def test_a_client_that_is_gone_is_noticed_at_the_next_write() -> None:
    async with client() as peer:
        stream = stream_of()
        peer.follow(stream)
        peer.socket.lose()

        say(stream, "a")
        stream.end(COMPLETE, {})

        assert peer.writer.closed
        assert peer.left == [stream]
        assert peer.ended == []
        assert stream.readers == []


async def test_what_is_passed_on_and_what_is_rendered_take_turns_for_a_slow_client() -> None:
    async with client(slow=True) as peer:
        stream = stream_of()
        for _ in range(8):
            say(stream, "-" * BIG)
        # Each may write whenever the client reads, and blocks it.
        left = {b"a": 8, b"b": 8}

        def pass_on(name: bytes) -> None:
            while left[name] and peer.writer.pass_on(name * BIG, lambda: pass_on(name)):
                left[name] -= 1

        pass_on(b"a")
        pass_on(b"b")
        peer.follow(stream)
        while sum(map(len, peer.socket.writes)) < 24 * BIG:
            await until(lambda: peer.socket.draining == 1)
            peer.socket.take()
            await until(lambda: peer.socket.held > 0)

        order = b"".join(data[:1] for data in peer.socket.writes)
    assert sorted(order) == sorted(b"ab-" * 8)
    # Nobody waits for more than one turn of each other one.
    for name in b"ab-":
        places = [place for place, each in enumerate(order) if each == name]
        assert max(b - a for a, b in itertools.pairwise(places)) <= 3, order


async def test_following_on_a_closed_writer_leaves_no_reader() -> None:
    async with client() as peer:
        stream = stream_of()
        peer.writer.close()

        cursor = peer.follow(stream)

        assert cursor.removed
        assert stream.readers == []
        assert peer.left == []  # not before the face has said that it reads
        await until(lambda: peer.left == [stream])
        peer.writer.unfollow(cursor)
        say(stream, "a")
        assert peer.socket.writes == []


async def test_unfollow_ends_one_stream_and_not_the_others() -> None:
    async with client() as peer:
        stream, other = stream_of(), stream_of("r2")
        cursor = peer.follow(stream)
        peer.follow(other)
        say(stream, "a")
        say(other, "b")

        peer.writer.unfollow(cursor)
        say(stream, "a")
        await ticks()
        peer.writer.unfollow(cursor)

        assert peer.socket.writes == [b"b"]
        assert peer.left == [stream]


async def test_finished_may_unfollow_the_others_and_follow_anew() -> None:
    async with client() as peer:
        streams = [stream_of(name) for name in "abc"]
        after = stream_of("after")
        say(after, "after")
        after.end(COMPLETE, {})
        ended: list[Stream] = []

        def finished(cursor: Cursor) -> None:
            ended.append(cursor.stream)
            if cursor.stream is not after:
                for other in cursors:
                    peer.writer.unfollow(other)
                peer.writer.follow(after, 0, peer.look, on_end=finished)

        cursors = [peer.writer.follow(stream, 0, peer.look, on_end=finished) for stream in streams]
        for stream in streams:
            stream.end(COMPLETE, {})
        await until(lambda: after in ended)

        assert ended == [streams[0], after]  # the others were let go in the first's callback
        assert peer.socket.written == b"...after."
        assert peer.left == [*streams, after]


async def test_finished_may_close_the_writer() -> None:
    async with client() as peer:
        streams = [stream_of(name) for name in "ab"]
        for stream in streams:
            peer.writer.follow(stream, 0, peer.look, on_end=lambda _cursor: peer.writer.close())
        for stream in streams:
            stream.end(COMPLETE, {})
        await ticks()

        assert peer.writer.closed
        assert peer.socket.written == b".."
        assert peer.left == streams


# Fairness.


async def test_a_long_replay_does_not_hold_up_the_others() -> None:
    async with client() as peer:
        long = [stream_of(name) for name in "ab"]
        for stream in long:
            for _ in range(100):
                say(stream, stream.request_id * (WRITE_BYTES // 4))
            peer.follow(stream)
        small = stream_of("small")
        say(small, "!")
        peer.follow(small)
        await ticks()
        assert len(peer.socket.writes) <= 4, "one write in each iteration"
        await until(lambda: peer.writer.following == 0 or len(peer.socket.written) > 200 * 16384)

        assert b"!" in b"".join(peer.socket.writes[:3])  # one turn of each of the others
        assert max(map(len, peer.socket.writes)) < 2 * WRITE_BYTES
        for name in (b"a", b"b"):
            assert peer.socket.written.count(name) == 100 * (WRITE_BYTES // 4)
        # They take turns: neither is ever more than two turns ahead.
        ahead = 0
        for write in peer.socket.writes[:-2]:
            ahead += write.count(b"a") - write.count(b"b")
            assert abs(ahead) <= 2 * WRITE_BYTES


async def test_a_slow_client_gets_its_streams_in_turns() -> None:
    async with client(slow=True) as peer:
        streams = [stream_of(name) for name in "abcd"]
        for stream in streams:
            for _ in range(20):
                say(stream, stream.request_id * (WRITE_BYTES // 2))
            stream.end(COMPLETE, {})
            peer.follow(stream)

        while len(peer.ended) < 4:
            before = len(peer.socket.writes)
            peer.socket.take()
            await until(lambda n=before: len(peer.socket.writes) > n or len(peer.ended) == 4)  # type: ignore[misc]

        for start in range(0, 16, 4):
            seen = b"".join(write[:1] for write in peer.socket.writes[start : start + 4])
            assert sorted(seen) == sorted(b"abcd")


@pytest.mark.parametrize("run", range(3))
async def test_every_client_reads_every_answer_whole_in_order_or_is_dropped(run: int) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    async with client(slow=True) as peer:
        streams = [stream_of(name, window=dice.choice((0.0, 30.0))) for name in "abcd"]
        expected = dict.fromkeys("abcd", 0)
        cursors = {stream: peer.follow(stream) for stream in streams}
        for _ in range(400):
            stream = dice.choice(streams)
            match dice.choices(
                ("say", "end", "take", "send", "again", "tick"), (9, 0.3, 5, 1, 1, 4)
            )[0]:
                case "say" if not stream.ended:
                    size = dice.choice((1, 10, 1000, 30_000))
                    say(stream, stream.request_id * size)
                    expected[stream.request_id] += size
                case "end" if not stream.ended:
                    stream.end(COMPLETE, {})
                case "take":
                    peer.socket.take(dice.choice((10, 50_000, None)))
                case "send":
                    if peer.socket.held <= HIGH:
                        peer.writer.send(b"#")
                case "again" if not cursors[stream].removed and stream.window:
                    old = cursors[stream]
                    if old.next_index < stream.offset + len(stream.entries):
                        continue  # only what it has seen: the test counts
                    cursors[stream] = peer.follow(stream, stream.last)
                    peer.writer.unfollow(old)
                case "tick":
                    await ticks()
        for stream in streams:
            if not stream.ended:
                stream.end(COMPLETE, {})

        def done() -> bool:
            peer.socket.take()
            return peer.writer.following == 0

        await until(done)

        assert not peer.socket.aborted
        assert {name: peer.socket.written.count(name.encode()) for name in "abcd"} == expected
        assert peer.socket.written.count(b".") == 4
        assert {stream.request_id for stream in peer.ended} == set("abcd")
        assert all(stream.readers == [] for stream in streams)


@pytest.mark.parametrize("late", [False, True], ids=["at once", "later"])
async def test_a_writer_with_a_bug_resets_its_client_and_no_other(
    late: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_stream: Stream, _entry: Entry, _skip: int) -> bytes:
        raise RuntimeError("a bug")

    async with client() as peer, client() as other:
        stream = stream_of()
        if late:
            say(stream, "a")
        other.follow(stream)
        peer.look = peer.look._replace(name="broken", render=broken)
        peer.follow(stream)
        if not late:
            say(stream, "a")
        await ticks()
        say(stream, "b")
        await ticks()

        assert peer.socket.aborted
        assert peer.writer.closed
        assert peer.left == [stream]
        assert peer.dropped == [], "it is no slow client"
        assert other.socket.written == b"ab"
        assert len(stream.readers) == 1
    assert [record.getMessage() for record in caplog.records] == ["bug in a writer"]


async def test_a_writer_leaves_all_of_its_streams_whatever_one_of_them_raises() -> None:
    def unfollowed(_stream: Stream) -> None:
        raise RuntimeError("a bug")

    async with client() as peer:
        outbox = Outbox(asyncio.get_running_loop())
        writer = Writer(
            peer.socket, peer.socket.drain, outbox, send_timeout=1.0, on_unfollow=unfollowed
        )
        streams = [stream_of(name) for name in "abc"]
        for stream in streams:
            writer.follow(stream, 0, peer.look)

        with pytest.raises(RuntimeError, match="a bug"):
            writer.close()

        assert [stream.readers for stream in streams] == [[], [], []]
        assert writer.following == 0
