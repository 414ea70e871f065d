"""Workers that share a page and a socket: nobody is refused while one of them has room."""

from __future__ import annotations

import asyncio
import os
import random
from typing import TYPE_CHECKING

import aiohttp
import pytest

from aioserver.errors import ServerAtCapacity
from aioserver.gateway.calls import shutdown_error
from aioserver.server.balance import STOP
from aioserver.server.places import SharedGate
from aioserver.server.shared_page import SharedPage, State
from tests.support.clock import FakeClock
from tests.support.server import CONCURRENCY
from tests.support.waiting import ticks, until
from tests.support.workers import workers_of

if TYPE_CHECKING:
    from pathlib import Path

    from aioserver.limits.gate import Place
    from tests.support.workers import Workers

QUEUE_TIMEOUT = f"{CONCURRENCY}.queue_timeout"
QUEUE_SIZE = f"{CONCURRENCY}.connection_queue_size"


async def answer(socket: aiohttp.ClientWebSocketResponse) -> str:
    """What *socket* hears when it sends a ping, once it has its place."""
    await socket.send_json({"action": "ping"})
    while (message := await socket.receive()).type is aiohttp.WSMsgType.TEXT:
        frame = message.json()
        if frame["status"] != "queued":
            return str(frame["status"])
    return f"closed {socket.close_code}"


async def served(sockets: list[aiohttp.ClientWebSocketResponse]) -> None:
    """Wait until each of *sockets* has its place."""
    assert await asyncio.gather(*map(answer, sockets)) == ["pong"] * len(sockets)


async def refusal(workers: Workers, slot: int | None = None) -> str:
    """What one more client is told, and that its connection closes with 1013."""
    (socket,) = await workers.open(1, slot)
    while (frame := await socket.receive_json())["status"] == "queued":
        pass
    message = await socket.receive()
    assert message.data == aiohttp.WSCloseCode.TRY_AGAIN_LATER
    return str(frame["chunk"]["error"])


def fair(workers: Workers) -> bool:
    """Whether the connections of the workers are spread within the rule; a burst comes 16 at a time."""
    counts = [server.owners.slot.balance.connections for server in workers.servers.values()]  # type: ignore[union-attr]
    share, beyond = STOP
    return max(counts) <= share * sum(counts) / len(counts) + beyond + 16


@pytest.mark.parametrize("count", [2, 4])
async def test_all_places_are_used_and_the_connections_spread(tmp_path: Path, count: int) -> None:
    async with workers_of(tmp_path, count, 60) as workers:
        await served(await workers.open(60))

        assert sum(workers.inside) == sum(workers.limits) == 60
        assert fair(workers), workers.inside


async def test_the_first_client_beyond_all_places_is_refused_with_the_configured_number(
    tmp_path: Path,
) -> None:
    async with workers_of(tmp_path, 4, 61, **{QUEUE_TIMEOUT: 0}) as workers:
        sockets = await workers.open(61)
        await served(sockets)

        for slot in (None, 0, 1, 2, 3):
            told = await refusal(workers, slot)
            assert told == "chat.websocket.concurrency.max_connections=61 reached"

        # A place that becomes free anywhere is everybody's.
        await sockets.pop().close()
        await served(await workers.open(1))
        assert sum(workers.inside) == 61


@pytest.mark.parametrize("wait", [5.0, 0])
async def test_one_worker_can_have_all_places(tmp_path: Path, wait: float) -> None:
    async with workers_of(tmp_path, 3, 30, **{QUEUE_TIMEOUT: wait}) as workers:
        await served(await workers.open(30, slot=1))

        assert workers.inside == [0, 30, 0]
        assert workers.limits == [0, 30, 0]


async def test_a_full_local_queue_refuses_nobody_while_a_sibling_has_room(tmp_path: Path) -> None:
    async with workers_of(tmp_path, 2, 40, **{QUEUE_SIZE: 40}) as workers:
        assert workers.gate(0).stats().queue_size == 20

        await served(await workers.open(40, slot=0))

        assert workers.inside == [40, 0]


async def test_a_place_that_ends_goes_to_a_client_that_waits_elsewhere(tmp_path: Path) -> None:
    async with workers_of(tmp_path, 2, 8) as workers:
        sockets = await workers.open(8, slot=0)
        await served(sockets)
        (waiting,) = await workers.open(1, slot=1)
        assert (await waiting.receive_json())["status"] == "queued"

        await sockets[0].close()

        await served([waiting])
        assert (workers.inside, workers.limits) == ([7, 1], [7, 1])


async def test_where_clients_wait_everywhere_the_places_even_out(tmp_path: Path) -> None:
    async with workers_of(tmp_path, 2, 8, **{QUEUE_TIMEOUT: 60}) as workers:
        sockets = await workers.open(8, slot=0)
        await served(sockets)
        mine, theirs = await workers.open(4, slot=0), await workers.open(4, slot=1)
        await until(lambda: workers.gate(0).waiting == workers.gate(1).waiting == 4)

        await workers.beats()
        for number, socket in enumerate(sockets[:4], 1):
            await socket.close()
            await until(lambda: workers.inside == [8 - number, number])  # noqa: B023

        await served(theirs)
        assert not any(socket.closed for socket in mine)


async def test_a_worker_that_ends_leaves_its_places_and_gets_some_when_it_is_started_again(
    tmp_path: Path,
) -> None:
    async with workers_of(tmp_path, 2, 20) as workers:
        await workers.end(0)
        workers.page.retire(0, 1)
        sockets = await workers.open(20, slot=1)
        await served(sockets)

        await workers.start(0)
        (waiting,) = await workers.open(1, slot=0)
        assert (await waiting.receive_json())["status"] == "queued"
        await sockets[0].close()

        await served([waiting])
        assert workers.page.places(0) == 1


async def test_a_rolling_restart_moves_the_places_to_the_new_worker(tmp_path: Path) -> None:
    async with workers_of(tmp_path, 2, 20) as workers:
        sockets = await workers.open(10, slot=0)
        await served(sockets)

        await workers.start(2)
        workers.gate(0).close(shutdown_error)
        await sockets[0].close()

        await until(lambda: workers.limits[0] == 9 and sum(workers.limits) == 20)
        for socket in sockets:
            await socket.close()
        await workers.end(0)
        workers.page.retire(0, 2)
        await served(await workers.open(20, slot=2))
        assert workers.page.places(0) == 0


async def test_a_reload_changes_the_number_for_all_together(tmp_path: Path) -> None:
    async with workers_of(tmp_path, 2, 20, **{QUEUE_TIMEOUT: 0}) as workers:
        sockets = await workers.open(20, slot=0)
        await served(sockets)

        await workers.change(12)
        await until(lambda: sum(workers.limits) == 12)
        assert "max_connections=12 reached" in await refusal(workers, 1)
        for socket in sockets[:9]:
            await socket.close()
        await until(lambda: sum(workers.inside) == 11)
        await served(await workers.open(1, slot=1))
        assert "max_connections=12 reached" in await refusal(workers, 1)

        await workers.change(30)
        await served(await workers.open(18, slot=1))
        assert sum(workers.inside) == sum(workers.limits) == 30


async def test_a_worker_whose_loop_does_not_turn_is_given_nothing(tmp_path: Path) -> None:
    async with workers_of(tmp_path, 2, 60) as workers:
        blocked = SharedPage(workers.page.fd, 2)
        blocked.tell(inside=0, waiting=9)

        await served(await workers.open(60))

        assert workers.page.places(2) == 0
        blocked.close()


class Model:
    """Gates of several workers, without sockets: a place is held until it is given back at random."""

    def __init__(self, page: SharedPage, rng: random.Random, clock: FakeClock) -> None:
        self.page, self.rng, self.clock = page, rng, clock
        self.pages = [SharedPage(page.fd, slot, clock) for slot in range(3)]
        self.gates = [
            SharedGate(
                one,
                lambda total: total // 3,
                lambda: None,
                0,
                queue_size=30,
                queue_timeout=30.0,
                full_error=refused,
                timeout_error=refused,
                clock=clock,
            )
            for one in self.pages
        ]
        self.held: list[Place] = []
        self.tasks: list[asyncio.Task[Place]] = []

    def enter(self) -> None:
        task = asyncio.create_task(self.rng.choice(self.gates).enter())
        task.add_done_callback(self.entered)
        self.tasks.append(task)

    def entered(self, task: asyncio.Task[Place]) -> None:
        self.tasks.remove(task)
        if not task.cancelled() and task.exception() is None:
            self.held.append(task.result())

    def leave(self) -> None:
        if self.held:
            self.held.pop(self.rng.randrange(len(self.held))).release()

    def give_up(self) -> None:
        if self.tasks:
            self.rng.choice(self.tasks).cancel()

    def beat(self) -> None:
        at = self.rng.randrange(len(self.gates))
        self.pages[at].beat(State.SERVING, 0)
        self.gates[at].move()

    def check(self, total: int) -> None:
        assert sum(gate.inside for gate in self.gates) <= total
        assert sum(gate.limit for gate in self.gates) <= total
        for slot, gate in enumerate(self.gates):
            assert gate.inside <= gate.limit
            assert (self.page.inside(slot), self.page.waiting(slot)) == (gate.inside, gate.waiting)


def refused(wait: float) -> ServerAtCapacity:
    return ServerAtCapacity("full", retry_after=wait)


@pytest.mark.parametrize("seed", range(5))
async def test_nobody_waits_for_long_while_a_place_is_free(seed: int) -> None:
    page, clock = SharedPage.create(3, 20), FakeClock()
    model = Model(page, random.Random(seed), clock)
    for _ in range(150):
        for _ in range(10):
            model.rng.choice([model.enter, model.enter, model.leave, model.give_up, model.beat])()
            model.check(20)
            await asyncio.sleep(0)
        # Two beats of each worker: one gives, the other one takes.
        for _ in range(2):
            for worker, gate in zip(model.pages, model.gates, strict=True):
                worker.beat(State.SERVING, 0)
                gate.move()
        await ticks()
        model.check(20)
        waiting = sum(gate.waiting for gate in model.gates)
        assert not waiting or sum(gate.inside for gate in model.gates) == 20
        for _ in range(model.rng.randrange(30)):
            model.leave()

    for task in model.tasks:
        task.cancel()
    await asyncio.gather(*model.tasks, return_exceptions=True)
    for place in model.held:
        place.release()
    assert sum(page.places(slot) for slot in range(page.slots)) == 20
    for one in (*model.pages, page):
        one.close()
    os.close(page.fd)
