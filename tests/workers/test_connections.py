"""Workers that share their places: nobody is refused while one of them has room."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import aiohttp
import pytest

from aioserver.gateway.request import shutdown_error
from aioserver.workers.balance import STOP
from tests.support.keys import bearer, keys_of
from tests.support.server import CONCURRENCY
from tests.support.waiting import until, until_result
from tests.support.workers import workers_of

if TYPE_CHECKING:
    from pathlib import Path

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
    """Whether the connections of the workers are spread within the rule; a burst comes 16 at a
    time.
    """
    counts = [balance.connections for balance in workers.balances.values()]
    share, beyond = STOP
    return max(counts) <= share * sum(counts) / len(counts) + beyond + 16


@pytest.mark.parametrize("count", [2, 4])
async def test_all_places_are_used_and_the_connections_spread(tmp_path: Path, count: int) -> None:
    async with workers_of(tmp_path, count, 60) as workers:
        await served(await workers.open(60))

        assert sum(workers.inside) == sum(workers.limits) == 60
        assert fair(workers), workers.inside


# Who waits for nothing is refused if the machine is late with a place that is on its way.
@pytest.mark.virtual_time
async def test_the_first_client_beyond_all_places_is_refused_with_the_configured_number(
    tmp_path: Path,
) -> None:
    async with workers_of(tmp_path, 4, 61, **{QUEUE_TIMEOUT: 0}) as workers:
        sockets = await workers.open(61)
        await served(sockets)

        for slot in (None, 0, 1, 2, 3):
            message = await refusal(workers, slot)
            assert "61 of 61 places are taken" in message
            assert message.endswith("(chat.websocket.concurrency.max_connections=61 reached)")

        # A place that becomes free anywhere is everybody's.
        await sockets.pop().close()
        await served(await workers.open(1))
        assert sum(workers.inside) == 61


@pytest.mark.virtual_time
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


async def test_where_clients_wait_everywhere_they_get_places_in_turn(tmp_path: Path) -> None:
    async with workers_of(tmp_path, 2, 8, **{QUEUE_TIMEOUT: 60}) as workers:
        sockets = await workers.open(8, slot=0)
        await served(sockets)
        mine, theirs = await workers.open(4, slot=0), await workers.open(4, slot=1)
        await until(lambda: workers.gate(0).waiting == workers.gate(1).waiting == 4)

        for number, socket in enumerate(sockets[:4], 1):
            # For some milliseconds after a renewal a place that ends is used at once.
            await workers.beats()
            await socket.close()
            await until(
                lambda: sum(workers.gate(slot).waiting for slot in (0, 1)) == 8 - number  # noqa: B023
            )

        assert sum(workers.inside) == 8
        assert workers.inside[1] in {1, 2, 3}
        assert not any(socket.closed for socket in (*mine, *theirs))


async def test_a_worker_that_ends_leaves_its_places_and_gets_some_when_it_is_started_again(
    tmp_path: Path,
) -> None:
    async with workers_of(tmp_path, 2, 20) as workers:
        await workers.end(0)
        sockets = await workers.open(20, slot=1)
        await served(sockets)

        await workers.start(0)
        (waiting,) = await workers.open(1, slot=0)
        assert (await waiting.receive_json())["status"] == "queued"
        await sockets[0].close()

        await served([waiting])
        assert workers.inside == [19, 1]


async def test_a_rolling_restart_moves_the_places_to_the_new_worker(tmp_path: Path) -> None:
    async with workers_of(tmp_path, 2, 20) as workers:
        sockets = await workers.open(10, slot=0)
        await served(sockets)

        await workers.start(2)
        workers.servers[0].context.admission.close(shutdown_error)
        await sockets[0].close()

        await until(lambda: workers.gate(0).limit == 9)
        # What the old one does not use is there for the others.
        await served(await workers.open(11, slot=2))
        assert workers.inside == [9, 0, 11]
        for socket in sockets:
            await socket.close()
        await workers.end(0)
        await served(await workers.open(9, slot=2))
        assert workers.inside == [0, 20]


@pytest.mark.virtual_time
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


async def test_a_key_has_its_connections_over_all_workers(tmp_path: Path) -> None:
    keys = keys_of("web", "other", max_connections=3)
    async with workers_of(tmp_path, 3, 30, **keys) as workers:
        for slot in range(3):
            await workers.open(1, slot, headers=bearer("web"))
        for slot in range(3):
            address = f"http://127.0.0.1:{workers.ports[slot]}/v1/chat/completions"
            async with workers.session.post(address, headers=bearer("web")) as response:
                assert response.status == 429
                assert (await response.json())["error"]["code"] == "concurrency_exceeded"

        await workers.open(3, slot=0, headers=bearer("other"))
        await workers.clients[0].close()

        async def opened() -> bool:
            try:
                await workers.open(1, slot=2, headers=bearer("web"))
            except aiohttp.WSServerHandshakeError:
                return False
            return True

        # What one worker has free is on its way to another for a moment.
        await until_result(opened, bool)
