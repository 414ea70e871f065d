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
from aioserver.workers.balance import STOP
from aioserver.workers.places import SharedGate
from aioserver.workers.shared_page import SharedPage, State
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
WORKERS = 3
FREQUENT = ("enter", "enter", "leave", "leave", "beat", "beat", "give up")
SELDOM = ("beat", "resize", "replace", "kill")


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
    """Whether the connections of the workers are spread within the rule; a burst comes 16 at a
    time.
    """
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
            message = await refusal(workers, slot)
            assert message == "chat.websocket.concurrency.max_connections=61 reached"

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

        await until(lambda: workers.limits[0] == 9)
        # At its next beat it has given all that was free.
        assert sum(map(workers.page.places, (1, 2))) == 11
        await until(lambda: sum(workers.limits) == 20)
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


class Worker:
    """A worker without sockets: places are held until they are given back."""

    def __init__(self, page: SharedPage, slot: int, clock: FakeClock) -> None:
        self.slot, self.page = slot, SharedPage(page.fd, slot, clock)
        self.gate = SharedGate(
            self.page,
            lambda total: total // WORKERS,
            lambda: None,
            0,
            queue_size=30,
            queue_timeout=30.0,
            full_error=refused,
            timeout_error=refused,
            clock=clock,
        )
        self.held: list[Place] = []
        self.tasks: list[asyncio.Task[Place]] = []

    def enter(self) -> None:
        task = asyncio.create_task(self.gate.enter())
        task.add_done_callback(self.entered)
        self.tasks.append(task)

    def entered(self, task: asyncio.Task[Place]) -> None:
        self.tasks.remove(task)
        if not task.cancelled() and task.exception() is None:
            self.held.append(task.result())

    def beat(self) -> None:
        self.gate.move()
        self.page.beat(State.LEAVING if self.gate.closed else State.SERVING, 0)

    async def leave(self) -> None:
        """Let all clients leave, waiting ones first."""
        for task in self.tasks:
            task.cancel()
        await ticks()
        for place in self.held:
            place.release()
        self.held.clear()


class Model:
    """The parent and its workers, under random steps."""

    def __init__(self, seed: int) -> None:
        self.rng, self.clock = random.Random(seed), FakeClock()
        self.total = self.highest = self.rng.randint(WORKERS, 40)
        self.page = SharedPage.create(WORKERS, self.total)
        self.workers: dict[int, Worker] = {}
        for slot in range(WORKERS):
            self.start(slot)

    def start(self, slot: int) -> None:
        self.workers[slot] = Worker(self.page, slot, self.clock)
        self.workers[slot].beat()

    async def step(self) -> None:
        worker = self.rng.choice(list(self.workers.values()))
        match self.rng.choice(FREQUENT if self.rng.random() < 0.9 else SELDOM):
            case "enter" if not worker.gate.closed:
                worker.enter()
            case "leave" if worker.held:
                worker.held.pop(self.rng.randrange(len(worker.held))).release()
            case "give up" if worker.tasks:
                self.rng.choice(worker.tasks).cancel()
            case "beat":
                worker.beat()
                self.clock.advance(self.rng.random() * 0.01)
            case "resize":
                self.total = self.rng.randint(WORKERS, 40)
                self.highest = max(self.highest, self.total)
            case "replace" if len(self.workers) == WORKERS:
                self.start((worker.slot + WORKERS) % self.page.slots)
                worker.gate.close(shutdown_error)
            case "kill" if not worker.gate.closed:
                await self.end(worker)
                self.start(worker.slot)
        self.page.resize(self.total, list(self.workers))
        for leaving in [
            worker for worker in self.workers.values() if worker.gate.closed and not worker.held
        ]:
            await self.end(leaving)
            self.page.retire(leaving.slot, self.rng.choice(list(self.workers)))
        await asyncio.sleep(0)

    async def end(self, worker: Worker) -> None:
        del self.workers[worker.slot]
        # Nobody sees what a process that is gone does.
        places = self.page.places(worker.slot)
        elsewhere = SharedPage.create(WORKERS, 9)
        worker.gate._page = SharedPage(elsewhere.fd, worker.slot)  # noqa: SLF001
        await worker.leave()
        os.close(elsewhere.fd)
        self.page.reaped(worker.slot)
        assert self.page.places(worker.slot) == places

    def check(self) -> None:
        assert sum(worker.gate.limit for worker in self.workers.values()) <= self.page.bound
        assert self.page.bound <= self.highest
        assert min(map(self.page.places, range(self.page.slots))) >= 0

    async def beats(self, number: int) -> None:
        for _ in range(number):
            self.page.resize(self.total, list(self.workers))
            for worker in self.workers.values():
                worker.beat()
            await ticks()

    @property
    def limits(self) -> list[int]:
        return [worker.gate.limit for worker in self.workers.values()]


def refused(wait: float) -> ServerAtCapacity:
    return ServerAtCapacity("full", retry_after=wait)


@pytest.mark.parametrize("seed", range(6))
async def test_places_are_never_too_many_and_nobody_waits_while_one_is_free(seed: int) -> None:
    model = Model(seed)
    for _ in range(600):
        await model.step()
        model.check()

    await model.beats(10)
    assert model.page.bound == model.total
    gates = [worker.gate for worker in model.workers.values()]
    waiting = sum(gate.waiting for gate in gates if not gate.closed)
    assert not waiting or sum(gate.inside for gate in gates) >= model.total

    # Where nothing happens, no place moves.
    for worker in model.workers.values():
        await worker.leave()
    await model.beats(10)
    before = model.limits
    assert sum(before) == model.total
    await model.beats(3)
    assert model.limits == before
    os.close(model.page.fd)
