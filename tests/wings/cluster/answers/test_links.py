"""Links and mirrors in virtual time: whatever becomes of messages, a mirror has the owner's
events, each once.
"""

from __future__ import annotations

import asyncio
import random
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from aioserver.auth.callers import Caller
from aioserver.config.settings import Streams
from aioserver.errors import (
    AioserverError,
    RequestConflict,
    ResumeGap,
    ServerShutdown,
    StreamNotFound,
)
from aioserver.gateway.contracts.instances import FROM_START, Start
from aioserver.provider_errors import ProviderRateLimited
from aioserver.streams.entries import CANCELLED, CHUNK, COMPLETE, TextEntry
from aioserver.streams.lifetime import Lifetime
from aioserver.telemetry.outcome import Outcome
from aioserver.wings.cluster.answers.links import CREDIT
from aioserver.wings.cluster.answers.peer_messages import (
    BLOCK_BYTES,
    Attach,
    Block,
    Credit,
    Detach,
    Refused,
)
from aioserver.wings.cluster.answers.peers import MAX_AWAY, MAX_IDLE, Peers
from tests.support.memory_bus import MemoryBus, World
from tests.support.virtual_loop import run_virtually

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from aioserver.streams.contracts import Queued
    from aioserver.streams.stream import Stream
    from aioserver.wings.cluster.answers.mirrors import Mirror

CALLER = Caller("somebody")


class Node:
    """One instance without a server: a store of logs, and its peers."""

    def __init__(self, world: World, name: str, max_stream_bytes: int = 1 << 22) -> None:
        self.name = name
        self.world = world
        bounds = Streams(max_stream_bytes=max_stream_bytes, max_kept_bytes=1 << 30)
        self.ended: list[Stream] = []
        self.lifetime = Lifetime(bounds)
        self.store = self.lifetime.store
        self.peers = Peers(partial(MemoryBus, world, name))
        self.bus = world.ears[name]
        self.peers.serve(self, {})  # type: ignore[arg-type]

    def find(self, caller: Caller, request_id: str, digest: bytes | None = None) -> Stream:
        stream = self.store.find(caller, request_id)
        if stream is None:
            raise StreamNotFound("no")
        if digest is not None and digest != stream.digest:
            raise RequestConflict("other")
        return stream

    def streams_of(self, caller: Caller) -> Iterator[Stream]:
        return self.store.owned_by(caller)

    def open(self, request_id: str = "r1", window: float = 600.0) -> Stream:
        stream = self.store.open(request_id, CALLER, window=window, digest=b"d")
        stream.mark_answered()
        producer: Any = SimpleNamespace(cancel=partial(self.ended.append, stream))
        stream.producer = producer
        return stream

    def mirror(self, owner: Node, start: Start = FROM_START, request_id: str = "r1") -> Reading:
        stream = self.store.open_mirror(request_id, CALLER, after=start.after or 0)
        return Reading(stream, self.peers.attach(stream, owner.name, start, lambda: None))

    def close(self) -> None:
        self.peers.close()
        self.lifetime.close()


class Reading:
    """A reader of a mirror that keeps what it reads; while `paused` it reads nothing."""

    def __init__(self, stream: Stream, mirror: Mirror) -> None:
        self.stream = stream
        self.filling = mirror
        self.paused = False
        self.frames: list[bytes] = []
        self.data = b""
        self.next_index = 0
        self.positions: list[int] = []
        stream.add_reader(self)

    def write_now(self, _data: bytes) -> bool:
        return False

    def open_fast_path(self, _shape: object) -> None:
        return None

    def report_position(self, queued: Queued) -> None:
        self.positions.append(queued.position)

    def drop(self, _seen: int) -> None:
        raise AssertionError("a mirror drops no reader")

    def notify(self) -> None:
        if not self.paused:
            stream = self.stream
            for entry in stream.entries[self.next_index - stream.offset :]:
                self.data += entry.data
                if entry.frames or not entry.data:
                    self.frames += stream.frames(entry)
            self.next_index = stream.offset + len(stream.entries)

    def go_on(self) -> None:
        self.paused = False
        self.notify()
        self.stream.note_passed()

    async def end(self) -> None:
        """Wait for the end; raises what the owner says, or that it is gone."""
        await self.filling.done


def world_test(
    test: Callable[[Node, Node], Awaitable[None]],
) -> Callable[[], None]:
    def run() -> None:
        async def main() -> None:
            world = World()
            a, b = Node(world, "a"), Node(world, "b")
            await test(a, b)
            await settled()
            a.close()
            b.close()

        run_virtually(main())

    run.__name__ = run.__qualname__ = test.__name__
    return run


async def settled() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def append_randomly(stream: Stream, rng: random.Random) -> None:
    """Append an entry of any kind: frames, texts, a block of the provider's bytes."""
    match rng.randrange(4):
        case 0:
            texts = b"".join(b't%d"' % rng.randrange(1000) for _ in range(rng.randint(1, 30)))
            count = texts.count(b'"')
            stream.add_entry(TextEntry(stream.last + 1, count, texts))
            stream.notify()
        case 1:
            stream.append(CHUNK, [b'{"n":%d}' % rng.randrange(1000)] * rng.randint(1, 3))
        case 2:
            stream.append(CHUNK, [b'"%b"' % (b"x" * rng.randrange(90_000))])
        case 3:
            stream.append(CHUNK, [b'"%b"' % (b"y" * 300)])


def frames_of(stream: Stream, after: int = 0) -> list[bytes]:
    frames = [frame for entry in stream.entries for frame in stream.frames(entry)]
    return frames[after:]


@pytest.mark.parametrize("seed", range(30))
def test_a_mirror_has_each_event_once_whatever_becomes_of_messages(seed: int) -> None:
    rng = random.Random(seed)

    async def main() -> None:
        lost, late, doubled = (rng.random() * 0.12 for _ in range(3))
        world = World(rng, lost=lost, late=late, doubled=doubled)
        a, b = Node(world, "a", 1 << 26), Node(world, "b")
        stream = a.open()
        for _ in range(rng.randrange(10)):
            append_randomly(stream, rng)
        after = rng.randint(0, stream.last)
        readings = [b.mirror(a, Start(after))]
        for _ in range(rng.randrange(60)):
            append_randomly(stream, rng)
            await asyncio.sleep(rng.random() * 0.2)
        stream.end(COMPLETE, {})

        frames: list[bytes] = []
        while True:
            reading = readings[-1]
            try:
                await reading.end()
            except ServerShutdown:
                # The client comes back.
                frames += reading.frames
                readings.append(b.mirror(a, Start(after + len(frames))))
                assert len(readings) < 30
            else:
                frames += reading.frames
                break

        assert frames == frames_of(stream, after), f"{seed=}"
        assert reading.stream.end_status == COMPLETE
        world.lost = world.late = world.doubled = 0.0
        await asyncio.sleep(2 * MAX_IDLE)
        assert (a.peers.links, b.peers.mirrors, b.peers.links) == (0, 0, 0)
        assert len(stream.readers) == 0
        a.close()
        b.close()

    run_virtually(main())


@world_test
async def test_a_slow_reader_elsewhere_gets_no_more_than_its_credit(a: Node, b: Node) -> None:
    a.store.apply(max_stream_bytes=1 << 26, max_kept_bytes=1 << 30)
    stream = a.open()
    reading = b.mirror(a)
    await settled()
    reading.paused = True

    for _ in range(2000):
        stream.append(CHUNK, [b'"%b"' % (b"x" * 3000)])
        await asyncio.sleep(0.001)

    # What the mirror keeps, and what was sent and not passed on.
    assert b.store.stats().bytes < 2 * CREDIT + 3 * BLOCK_BYTES
    assert a.world.published < 2 * CREDIT + 3 * BLOCK_BYTES
    stream.end(COMPLETE, {})
    reading.go_on()
    await reading.end()
    assert reading.frames == frames_of(stream)


@world_test
async def test_a_mirror_keeps_nothing_that_its_reader_has_passed(a: Node, b: Node) -> None:
    stream = a.open()
    reading = b.mirror(a)
    for _ in range(100):
        stream.append(CHUNK, [b'"%b"' % (b"x" * 3000)])
        await asyncio.sleep(0.001)

    assert len(reading.stream.entries) <= 1
    assert len(reading.frames) >= 98


@world_test
async def test_an_event_larger_than_the_credit_arrives(a: Node, b: Node) -> None:
    stream = a.open()
    large = b"data: %b\n\n" % (b"z" * (3 * CREDIT))
    stream.append(CHUNK, data=large)
    stream.end(COMPLETE, {}, data=b"data: [DONE]\n\n")

    reading = b.mirror(a)
    await reading.end()

    assert reading.data == large + b"data: [DONE]\n\n"


@world_test
async def test_blocks_are_bounded(a: Node, b: Node) -> None:
    sizes = []
    stream = a.open()
    reading = b.mirror(a)
    receive = b.bus.on_message

    def look(sender: str, message: Any) -> None:
        if isinstance(message, Block):
            sizes.append(len(message.data))
        receive(sender, message)

    b.bus.on_message = look
    stream.append(CHUNK, [b'"%b"' % (b"x" * 200_000)])
    stream.end(COMPLETE, {})
    await reading.end()

    assert len(sizes) > 5
    assert max(sizes) <= BLOCK_BYTES


@world_test
async def test_the_error_that_ends_an_answer_is_the_same_elsewhere(a: Node, b: Node) -> None:
    stream = a.open()
    reading = b.mirror(a)
    error = ProviderRateLimited("slowly", retry_after=3.0)
    error.request_outcome = Outcome("p", "m", 2, {"x-ratelimit": "1"})
    await settled()

    stream.fail(error)
    await reading.end()

    mine = reading.stream.error
    assert isinstance(mine, ProviderRateLimited)
    assert (mine.headers(), mine.as_chunk()) == (error.headers(), error.as_chunk())
    assert reading.frames == frames_of(stream)


@pytest.mark.parametrize(
    ("start", "error"),
    [
        (Start(99), ResumeGap),
        (Start(digest=b"other"), RequestConflict),
        (Start(sequence=3), ResumeGap),
    ],
)
def test_what_the_owner_refuses_is_told(start: Start, error: type[AioserverError]) -> None:
    async def main() -> None:
        world = World()
        a, b = Node(world, "a"), Node(world, "b")
        a.open()
        reading = b.mirror(a, start)
        with pytest.raises(error):
            await reading.filling.accepted
        with pytest.raises(error):
            await reading.end()
        await settled()
        assert a.peers.links == b.peers.mirrors == 0
        a.close()
        b.close()

    run_virtually(main())


@world_test
async def test_a_reader_elsewhere_that_falls_behind_what_is_kept_is_told(a: Node, b: Node) -> None:
    a.store.apply(max_stream_bytes=100_000, max_kept_bytes=1 << 30)
    stream = a.open()
    reading = b.mirror(a)
    await settled()
    reading.paused = True
    for _ in range(1000):
        stream.append(CHUNK, [b'"%b"' % (b"x" * 3000)])
        await asyncio.sleep(0.001)

    with pytest.raises(AioserverError, match="fell behind"):
        await reading.end()

    assert not stream.readers


@world_test
async def test_a_queued_request_shows_its_position_elsewhere(a: Node, b: Node) -> None:
    stream = a.store.open("r1", CALLER, window=600.0)
    reading = b.mirror(a)
    await settled()

    stream.report_position(3, 1.5)
    await settled()

    assert reading.positions == [3]


@world_test
async def test_a_link_of_an_instance_that_is_gone_ends(a: Node, b: Node) -> None:
    stream = a.open()
    b.mirror(a)
    await settled()
    assert len(stream.readers) == 1

    a.world.kill("b")
    # No word goes to it, so that nobody says that it is gone.
    await asyncio.sleep(MAX_IDLE + 2)

    assert not stream.readers


@world_test
async def test_a_cancelled_mirror_leaves_its_owner(a: Node, b: Node) -> None:
    stream = a.open()
    reading = b.mirror(a)
    await settled()

    reading.filling.close()
    await settled()

    assert not stream.readers
    assert a.peers.links == b.peers.mirrors == 0


@world_test
async def test_attaching_with_a_cancel_ends_the_answer(a: Node, b: Node) -> None:
    stream = a.open()
    stream.append(CHUNK, [b'"x"'])
    reading = b.mirror(a, Start(None, cancel=True))
    await settled()
    assert a.ended == [stream]

    stream.end(CANCELLED, {})
    await reading.end()

    assert reading.frames == frames_of(stream)[-1:]


@pytest.mark.parametrize("kind", [Attach, Detach, Block, Refused])
def test_a_single_lost_message_is_made_good_although_no_other_follows(kind: type) -> None:
    async def main() -> None:
        world = World()
        a, b = Node(world, "a"), Node(world, "b")
        stream = a.open()
        stream.end(COMPLETE, {})
        world.lose.append(kind)

        reading = b.mirror(a, request_id="r2" if kind is Refused else "r1")
        if kind is Refused:
            with pytest.raises(StreamNotFound):
                await reading.end()
        else:
            await reading.end()
            assert reading.frames == frames_of(stream)

        assert not world.lose
        await asyncio.sleep(MAX_IDLE + 2)
        assert (a.peers.links, b.peers.mirrors, len(stream.readers)) == (0, 0, 0)
        a.close()
        b.close()

    run_virtually(main())


@world_test
async def test_credit_that_is_lost_is_given_again(a: Node, b: Node) -> None:
    stream = a.open()
    a.world.lose += [Credit] * 5
    reading = b.mirror(a)
    for _ in range(30):
        stream.append(CHUNK, [b'"%b"' % (b"x" * (CREDIT // 8))])
    stream.end(COMPLETE, {})

    await reading.end()

    assert reading.frames == frames_of(stream)


@world_test
async def test_a_mirror_waits_for_our_own_connection_though_not_for_ever(a: Node, b: Node) -> None:
    stream = a.open()
    reading = b.mirror(a)
    await settled()
    started = asyncio.get_running_loop().time()
    b.bus.connected, b.bus.dead, a.bus.dead = False, True, True
    await asyncio.sleep(MAX_AWAY - 3)
    assert not reading.filling.done.done()

    with pytest.raises(ServerShutdown):
        await reading.end()

    assert asyncio.get_running_loop().time() - started < MAX_AWAY + 3
    a.bus.dead = b.bus.dead = False
    b.bus.connected = True
    await asyncio.sleep(MAX_IDLE + 2)
    assert not stream.readers


@world_test
async def test_what_cannot_be_asked_of_its_owner_is_given_up_soon(a: Node, b: Node) -> None:
    b.bus.connected, b.bus.dead = False, True
    a.open()
    started = asyncio.get_running_loop().time()

    with pytest.raises(ServerShutdown):
        await b.mirror(a).filling.accepted

    assert asyncio.get_running_loop().time() - started < 3


@world_test
async def test_an_owner_without_ears_for_a_moment_is_not_gone(a: Node, b: Node) -> None:
    stream = a.open()
    reading = b.mirror(a)
    await settled()
    ears = a.world.ears.pop("a")
    await asyncio.sleep(0.51)
    a.world.ears["a"] = ears
    await asyncio.sleep(30)
    assert not reading.filling.done.done()
    a.world.ears.pop("a")
    await asyncio.sleep(0.6)
    a.world.ears["a"] = ears

    stream.end(COMPLETE, {})
    await reading.end()

    assert reading.frames == frames_of(stream)
