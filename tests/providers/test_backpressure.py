"""Clients that are too slow for what is passed on, while others wait: by a clock that jumps."""

from __future__ import annotations

import asyncio

import pytest

from aioserver.providers.backpressure import LEAST_RATE, RATE_SECONDS, Backpressure, ClientPace

# Waits for long times.
pytestmark = [pytest.mark.virtual_time, pytest.mark.timeout(2000)]


class Client:
    """A client that moves *rate* bytes a second while it is waited for."""

    def __init__(self, backpressure: Backpressure, rate: float) -> None:
        self.loop = asyncio.get_running_loop()
        self.pace = ClientPace()
        self.began = self.loop.time()
        self.rate = rate
        self.given_up_at = 0.0
        backpressure.watch(self.pace)

    def moved(self) -> int:
        return int((self.loop.time() - self.began) * self.rate)

    def give_up(self) -> None:
        self.given_up_at = self.given_up_at or self.loop.time() - self.began

    async def wait(self, seconds: float) -> None:
        with self.pace.waited_for(self.moved, self.give_up):
            await asyncio.sleep(seconds)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
async def test_a_client_below_the_least_rate_is_given_up_once_somebody_waits(share: float) -> None:
    backpressure = Backpressure(lambda: 1, lambda: 1)
    client = Client(backpressure, LEAST_RATE * share)

    await client.wait(200.0)

    due = RATE_SECONDS / (1 - share)
    assert due <= client.given_up_at <= due + 1.1


@pytest.mark.parametrize("share", [1.01, 5.0])
async def test_a_client_at_the_least_rate_is_not(share: float) -> None:
    backpressure = Backpressure(lambda: 1, lambda: 1)
    client = Client(backpressure, LEAST_RATE * share)

    await client.wait(200.0)

    assert not client.given_up_at


async def test_no_client_is_given_up_while_nobody_waits_and_then_at_once() -> None:
    waiting = 0
    backpressure = Backpressure(lambda: waiting, lambda: waiting)
    client = Client(backpressure, 0)
    task = asyncio.ensure_future(client.wait(200.0))
    await asyncio.sleep(100.0)
    assert not client.given_up_at

    waiting = 1
    backpressure.end()
    await asyncio.sleep(0.1)

    assert client.given_up_at
    task.cancel()


async def test_time_in_which_the_provider_is_waited_for_does_not_count() -> None:
    backpressure = Backpressure(lambda: 1, lambda: 1)
    client = Client(backpressure, 0)

    for _ in range(9):
        await client.wait(1.0)
        await asyncio.sleep(100.0)

    assert not client.given_up_at
    await client.wait(2.5)
    assert client.given_up_at


async def test_the_slowest_goes_first_and_no_more_than_wait_for_places() -> None:
    held_up = 0
    backpressure = Backpressure(lambda: 1, lambda: held_up)
    clients = [Client(backpressure, LEAST_RATE * share) for share in (0.6, 0.3, 0.9)]
    tasks = [asyncio.ensure_future(client.wait(1000.0)) for client in clients]
    await asyncio.sleep(40.0)
    assert not any(client.given_up_at for client in clients)

    held_up = 1
    await asyncio.sleep(1.5)

    assert [client.given_up_at > 0 for client in clients] == [False, True, False]
    for task in tasks:
        task.cancel()


async def test_nothing_is_looked_at_once_nobody_is_watched() -> None:
    backpressure = Backpressure(lambda: 1, lambda: 1)
    client = Client(backpressure, 0)

    backpressure.unwatch(client.pace)
    backpressure.unwatch(client.pace)
    await client.wait(100.0)

    assert not client.given_up_at
