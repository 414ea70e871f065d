"""Who accepts, where several processes share a listening socket."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from aioserver.workers.balance import REST
from aioserver.workers.loads import Loads
from tests.support.waiting import until
from tests.support.workers import workers_of

if TYPE_CHECKING:
    from pathlib import Path

    from aioserver.workers.balance import Balance
    from tests.support.workers import Workers

pytestmark = pytest.mark.both_loops


def balance_of(workers: Workers, slot: int) -> Balance:
    return workers.balances[slot]


async def test_a_worker_with_too_many_connections_stops_until_the_others_have_caught_up(
    tmp_path: Path,
) -> None:
    async with workers_of(tmp_path, 2, 100) as workers:
        first, second = balance_of(workers, 0), balance_of(workers, 1)
        await workers.open(9, slot=0)
        assert not first.accepts

        await workers.open(4)
        assert (first.connections, second.connections) == (9, 4)

        await workers.open(2)
        await until(lambda: first.accepts)
        assert second.accepts


async def test_a_worker_whose_loop_does_not_turn_holds_back_nobody(tmp_path: Path) -> None:
    async with workers_of(tmp_path, 2, 100) as workers:
        blocked = Loads(workers.loads.fd, 2)
        blocked.beat(0, accepting=True)

        # With it they would have more than their share from 16 connections on, and nobody would
        # accept.
        await workers.open(60)

        assert sum(balance_of(workers, slot).connections for slot in (0, 1)) == 60
        blocked.close()


async def test_a_worker_that_ends_counts_for_nobody(tmp_path: Path) -> None:
    async with workers_of(tmp_path, 2, 100) as workers:
        await balance_of(workers, 0).end()
        await workers.beats()

        await workers.open(40)

        assert balance_of(workers, 1).connections == 40


async def test_no_connection_is_lost_while_it_stops_and_goes_on(tmp_path: Path) -> None:
    async with workers_of(tmp_path, 2, 300) as workers:
        balance = balance_of(workers, 0)
        burst = asyncio.create_task(workers.open(200))
        for _ in range(30):
            await asyncio.sleep(0)
            balance.connections += 1000
            balance.made()
            balance.connections -= 1000
            balance.lost()
            await asyncio.sleep(0)
            balance._go_on()  # noqa: SLF001 - a beat would come later

        clients = await burst

        await until(lambda: balance.connections + balance_of(workers, 1).connections == 200)
        assert not any(client.closed for client in clients)


async def test_a_worker_that_has_no_descriptor_left_leaves_it_to_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with workers_of(tmp_path, 2, 100) as workers:
        balance = balance_of(workers, 0)
        await workers.open(9, slot=0)
        # No copy can be made of it any more, as if there were too many open files.
        workers.servers[0].owners.listening[0].close()

        await workers.open(7, slot=1)
        await until(lambda: "no connections are accepted for 1 s" in caplog.text)
        await workers.open(30)

        assert (balance.connections, balance_of(workers, 1).connections) == (9, 37)


async def test_an_idle_worker_rests_between_its_beats_and_one_whose_clients_wait_does_not(
    tmp_path: Path,
) -> None:
    async with workers_of(tmp_path, 2, 10) as workers:
        balances = workers.balances.values()
        await until(lambda: all(each.interval == REST for each in balances))
        assert workers.loads.accepting() == [0, 1]

        await workers.open(20)
        await workers.beats()

        assert any(each.interval < REST for each in balances)
