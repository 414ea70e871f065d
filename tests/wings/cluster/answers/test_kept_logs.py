"""Finished logs that are handed over when their instance stops: which ones, and what another
instance makes of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aioserver.auth.callers import Caller
from aioserver.errors import ServerShutdown
from aioserver.protocol.whole_answer import text_pieces
from aioserver.provider_errors import ProviderRefused
from aioserver.providers.request import Answer
from aioserver.streams.entries import CHUNK, COMPLETE, TextEntry
from aioserver.streams.store import StreamStore
from aioserver.streams.stream import Stream
from aioserver.telemetry.outcome import Outcome
from aioserver.wings.cluster.answers import kept_logs

if TYPE_CHECKING:
    from aioserver.providers.request import Api

CALLER = Caller("somebody")


def finished(
    request_id: str, size: int = 10, window: float = 30.0, caller: Caller = CALLER
) -> Stream:
    stream = Stream(request_id, caller, window=window, max_bytes=1 << 30)
    for _ in range(3):
        stream.append(CHUNK, [b'"%b"' % (b"x" * size)])
    stream.end(COMPLETE, {})
    return stream


def test_the_newest_logs_are_handed_over_up_to_a_bound() -> None:
    newest, large, old = finished("1"), finished("2", kept_logs.MAX_BYTES // 3), finished("3")

    assert [s.request_id for s, _seconds, _log in kept_logs.chosen([newest, old])] == ["1", "3"]
    assert [s.request_id for s, _seconds, _log in kept_logs.chosen([newest, large, old])] == ["1"]


def test_nobody_takes_the_room_of_all_logs_that_are_handed_over() -> None:
    size, other = kept_logs.MAX_BYTES // 9, Caller("other")
    mine = [finished(f"m{number}", size // 3) for number in range(20)]
    theirs = [finished(f"t{number}", size // 6, caller=other) for number in range(3)]

    names = [s.request_id for s, _seconds, _log in kept_logs.chosen([*mine, *theirs])]

    assert [name for name in names if name[0] == "t"] == ["t0", "t1", "t2"]
    assert [name for name in names if name[0] == "m"] == [f"m{number}" for number in range(7)]


def test_what_has_no_window_left_or_was_cut_is_not_handed_over() -> None:
    cut = Stream("1", CALLER, window=30.0, max_bytes=1 << 20)
    cut.fail(ServerShutdown("the server is stopping"))
    running = Stream("2", CALLER, window=30.0, max_bytes=1 << 20)
    running.append(CHUNK, [b'"x"'])
    over = finished("3", window=-1.0)

    assert list(kept_logs.chosen([cut, running, over])) == []


def store() -> StreamStore:
    return StreamStore(max_stream_bytes=1 << 20, max_kept_bytes=1 << 24)


async def adopted(
    log: bytes, name: str, streams: StreamStore, apis: dict[str, Api] | None = None
) -> Stream:
    kept = kept_logs.read(log)
    assert kept is not None
    entries = await kept_logs.entries_of(kept)
    return kept_logs.adopt(kept, entries, streams, CALLER, name, 9.5, apis or {})


def frames(stream: Stream) -> list[bytes]:
    return [frame for entry in stream.entries for frame in stream.frames(entry)]


async def test_a_log_that_is_adopted_is_the_same_stream() -> None:
    stream, streams = Stream("1", CALLER, window=30.0, max_bytes=1 << 20), store()
    stream.append(CHUNK, [b'{"a":1}', b'{"a":2}'])
    stream.append(CHUNK, data=b"data: 1\n\ndata: 2\n\n", count=2)
    stream.add_entry(TextEntry(5, 3, b'a"b"c"'))
    stream.end(COMPLETE, {}, data=b"data: [DONE]\n\n")
    stream.alias, stream.digest, stream.conversation_id = "one", b"d", "c"

    again = await adopted(kept_logs.log_of(stream), "one", streams)

    assert frames(again) == frames(stream)
    assert [entry.size for entry in again.entries] == [entry.size for entry in stream.entries]
    assert [entry.data for entry in again.entries] == [entry.data for entry in stream.entries]
    assert again.describe() == stream.describe()
    assert (again.digest, again.conversation_id) == (b"d", "c")
    # It is kept for the rest of its window, and found by both of its ids.
    assert again.window == 10
    assert streams.find(CALLER, "1") is streams.find(CALLER, "one") is again
    assert streams.finished() == (again,)
    streams.drop(again)
    assert streams.find(CALLER, "1") is streams.find(CALLER, "one") is None
    assert streams.stats().bytes == 0


async def test_an_error_of_an_adopted_log_is_the_owners() -> None:
    stream = Stream("1", CALLER, window=30.0, max_bytes=1 << 20)
    stream.fail(ProviderRefused("no", 400, b"{}"))

    again = await adopted(kept_logs.log_of(stream), "1", store())

    assert isinstance(again.error, ProviderRefused)
    assert again.error.counted
    assert frames(again) == frames(stream)


async def test_an_answer_that_the_end_of_its_server_has_cut_leaves_its_request_id_free() -> None:
    stream, streams = finished("1"), store()
    stream.alias, stream.error = "one", ServerShutdown("the server is stopping")
    log = kept_logs.log_of(stream)

    assert kept_logs.names_of(stream) == ["one"]
    await adopted(log, "one", streams)

    assert streams.find(CALLER, "1") is None


async def test_a_log_that_is_adopted_takes_no_id_of_another_answer() -> None:
    stream, streams = finished("1"), store()
    stream.alias = "one"
    other = streams.open("1", CALLER, window=30.0)

    again = await adopted(kept_logs.log_of(stream), "one", streams)

    assert streams.find(CALLER, "1") is other
    assert streams.find(CALLER, "one") is again


def test_what_is_no_log_is_not_adopted() -> None:
    log = kept_logs.log_of(finished("1"))
    for data in (log[:-10], b"\xff" * 50, b""):
        assert kept_logs.read(data) is None


async def test_the_last_events_of_a_log_keep_their_numbers() -> None:
    stream = finished("1")
    stream.window = 0.0
    stream.cut(stream.bytes)
    stream.window = 30.0

    again = await adopted(kept_logs.log_of(stream), "1", store())

    assert again.first == stream.first > 1
    assert again.last == stream.last


async def test_a_whole_answer_is_adopted_with_the_events_that_are_made_of_it() -> None:
    body = b'{"choices":[{"message":{"content":"Hello you"}}]}'
    stream = Stream("1", CALLER, window=30.0, max_bytes=1 << 20)
    answer = Answer(200, body, "application/json", Outcome("p", "m", 2, {"x": "y"}))
    stream.outcome = answer.outcome
    stream.append_whole(answer, body, await text_pieces(body))
    stream.end(COMPLETE, {})

    again = await adopted(kept_logs.log_of(stream), "1", store())

    assert isinstance(again.whole, Answer)
    assert (again.whole.status, again.whole.body) == (200, body)
    assert again.whole.content_type == "application/json"
    assert again.outcome.headers == {"x": "y"}
    assert frames(again) == frames(stream)
