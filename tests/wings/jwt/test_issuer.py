"""The keys of an issuer over time, in virtual time: when they are fetched, and what is said to
tokens meanwhile.
"""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

import pytest

from aioserver.errors import AuthUnavailable, TokenRefused
from aioserver.wings.jwt.issuer import (
    FORCED,
    INTERVAL,
    MAX_WAITING,
    PATIENCE,
    TIMEOUT,
    Issuer,
    Unreachable,
)
from tests.support.issuer import SigningKey, jwks
from tests.support.virtual_loop import run_virtually

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

KEYS = {name: SigningKey("EdDSA", name) for name in ("k1", "k2", "k3")}
SETS: dict[tuple[str, ...], bytes] = {
    names: jwks(*(KEYS[name] for name in names))
    for names in (("k1",), ("k1", "k2"), ("k2",), ("k1", "k2", "k3"))
}


class Published:
    """What the issuer has, and how its answers come."""

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ("k1",)
        self.delay, self.works = 0.1, True
        # When fetches began.
        self.asked: list[float] = []
        self.reports: list[tuple[str, str]] = []
        # What tokens were told to wait.
        self.waits: list[float] = []
        # When keys were withdrawn.
        self.withdrawn: list[float] = []
        self.issuer = Issuer(
            self.fetch,
            self.report,
            lambda: asyncio.get_running_loop().time(),
            lambda: self.withdrawn.append(self.asked[-1]),
        )

    async def fetch(self) -> bytes:
        self.asked.append(asyncio.get_running_loop().time())
        # An issuer answers with what it has when it is asked.
        content, works = SETS[self.names], self.works
        await asyncio.sleep(self.delay)
        if not works:
            raise Unreachable("status 500")
        return content

    def report(self, text: str, severity: str) -> None:
        self.reports.append((text, severity))

    async def decide(self, kid: str) -> str:
        """What a token with *kid* gets: "in", or the code of its error."""
        try:
            if self.issuer.find(kid) is None:
                self.issuer.check_worth_waiting()
                await self.issuer.wait_for(lambda: self.issuer.find(kid))
        except TokenRefused as error:
            return error.code
        except AuthUnavailable as error:
            self.waits.append(error.retry_after or 0.0)
            return error.code
        return "in"

    @property
    def gaps(self) -> list[float]:
        return [after - before for before, after in zip(self.asked, self.asked[1:], strict=False)]


def virtually(test: Callable[[Published], Coroutine[None, None, None]]) -> Callable[[], None]:
    """Make a test of *test*, which gets an issuer whose first fetch has begun."""

    async def run() -> None:
        published = Published()
        published.issuer.look()
        try:
            await test(published)
        finally:
            await published.issuer.close()

    def wrapped() -> None:
        run_virtually(run())

    wrapped.__name__ = test.__name__
    return wrapped


@virtually
async def test_keys_are_fetched_every_ten_minutes_and_not_at_once_everywhere(
    published: Published,
) -> None:
    await asyncio.sleep(20 * INTERVAL)

    assert all(0.9 * INTERVAL <= gap <= 1.1 * INTERVAL + 1 for gap in published.gaps)
    assert len(set(published.gaps)) > 10


@virtually
async def test_a_new_key_is_fetched_once_a_token_names_it(published: Published) -> None:
    await asyncio.sleep(5)
    published.names = ("k1", "k2")

    assert await published.decide("k2") == "in"
    assert await published.decide("k1") == "in"
    assert len(published.asked) == 2


@virtually
async def test_an_unknown_key_is_refused_by_a_fetch_that_is_recent_and_by_nothing_else(
    published: Published,
) -> None:
    await asyncio.sleep(5)
    published.delay = 1.0

    first = asyncio.create_task(published.decide("k2"))
    await asyncio.sleep(0.5)
    # This key is published after the issuer was asked.
    published.names = ("k1", "k2")
    assert await published.decide("k2") == "invalid_api_key"
    assert await first == "invalid_api_key"
    for _ in range(10):
        assert await published.decide("k2") == "invalid_api_key"
    assert len(published.asked) == 2
    await asyncio.sleep(FORCED)
    assert await published.decide("k2") == "in"


@virtually
async def test_a_flood_of_unknown_keys_forces_one_fetch_in_thirty_seconds(
    published: Published,
) -> None:
    await asyncio.sleep(5)
    for number in range(2000):
        # Each has the same answer: the keys can be had all the time.
        assert await published.decide(f"x{number}") == "invalid_api_key"
        assert await published.decide("k1") == "in"
        await asyncio.sleep(0.1)

    assert len(published.asked) <= 2 + 210 / FORCED
    assert all(gap >= FORCED for gap in published.gaps[1:])


@virtually
async def test_an_unknown_key_is_undecided_from_a_fetch_that_fails_until_one_that_works(
    published: Published,
) -> None:
    await asyncio.sleep(5)
    assert await published.decide("k2") == "invalid_api_key"
    await asyncio.sleep(FORCED)
    published.works = False
    answers = []
    for _ in range(600):
        answers.append(await published.decide("k2"))
        await asyncio.sleep(0.1)
    assert set(answers) == {"auth_unavailable"}
    assert all(1 <= wait <= FORCED for wait in published.waits)

    published.works = True
    answers = []
    for _ in range(600):
        answers.append(await published.decide("k2"))
        await asyncio.sleep(0.1)
    change = answers.index("invalid_api_key")
    assert set(answers[:change]) == {"auth_unavailable"}
    assert set(answers[change:]) == {"invalid_api_key"}


@virtually
async def test_keys_that_are_withdrawn_are_told_of_and_others_are_not(
    published: Published,
) -> None:
    await asyncio.sleep(5)
    published.names = ("k1", "k2")
    await asyncio.sleep(1.2 * INTERVAL)
    published.works = False
    await asyncio.sleep(1.2 * INTERVAL)
    assert published.withdrawn == []

    published.works, published.names = True, ("k2",)
    await asyncio.sleep(FORCED + 5)

    assert len(published.withdrawn) == 1
    assert await published.decide("k1") == "invalid_api_key"


@virtually
async def test_a_fetch_that_fails_keeps_what_was_there_and_tries_again_by_itself(
    published: Published,
) -> None:
    await asyncio.sleep(5)
    published.works = False
    assert await published.decide("k2") == "auth_unavailable"
    await asyncio.sleep(200)

    assert await published.decide("k1") == "in"
    assert await published.decide("k2") == "auth_unavailable"
    pauses = [round(gap - published.delay) for gap in published.gaps[1:-1]]
    assert pauses[:6] == [1, 2, 4, 8, 16, 30]
    text = "the keys of the issuer cannot be fetched: status 500; the known keys stay valid"
    assert published.reports == [(text, "warning")]

    published.works, published.names = True, ("k2",)
    await asyncio.sleep(40)
    assert await published.decide("k2") == "in"
    assert await published.decide("k1") == "invalid_api_key"
    assert published.reports[1:] == [("the keys of the issuer were fetched again", "info")]


@virtually
async def test_waits_are_bounded_in_time_and_number(published: Published) -> None:
    loop = asyncio.get_running_loop()
    published.delay, began = 60.0, loop.time()
    await asyncio.sleep(0)

    waiting = [asyncio.create_task(published.decide("k1")) for _ in range(MAX_WAITING)]
    await asyncio.sleep(0)
    assert await published.decide("k1") == "auth_unavailable"
    assert loop.time() == began
    assert set(await asyncio.gather(*waiting)) == {"auth_unavailable"}
    assert loop.time() - began == pytest.approx(PATIENCE)
    await asyncio.sleep(TIMEOUT)
    assert published.reports[0][0].startswith(
        "the keys of the issuer cannot be fetched: no answer"
    )


@virtually
async def test_who_leaves_stops_nothing(published: Published) -> None:
    published.delay = 1.0
    leaving, staying = (asyncio.create_task(published.decide("k1")) for _ in range(2))
    await asyncio.sleep(0.05)
    leaving.cancel()

    assert await staying == "in"
    with pytest.raises(asyncio.CancelledError):
        await leaving


@pytest.mark.parametrize("seed", range(5))
def test_whatever_comes_forced_fetches_are_apart_and_published_keys_come_in(seed: int) -> None:
    """Keys come and go, fetches fail and are slow, and tokens name anything."""
    dice = random.Random(seed)

    async def run() -> None:
        published, loop = Published(), asyncio.get_running_loop()
        published.issuer.look()
        # Since when a key could be had by any fetch, while all of them work.
        had = dict.fromkeys(published.names, loop.time())
        for _ in range(400):
            roll = dice.random()
            if roll < 0.04:
                published.names = dice.choice(list(SETS))
                had = {name: had.get(name, loop.time()) for name in published.names}
            elif roll < 0.08:
                published.works = dice.random() < 0.7
                had = dict.fromkeys(published.names, loop.time())
            elif roll < 0.1:
                published.delay = dice.choice([0.0, 0.1, 1.0, 3.0])
                had = dict.fromkeys(published.names, loop.time())
            kid = dice.choice(["k1", "k2", "k3", "evil", "bad"])
            began = loop.time()
            answer = await published.decide(kid)
            assert loop.time() - began <= PATIENCE + 1e-6
            if answer == "invalid_api_key":
                # Never one that the issuer has had all the time.
                assert had.get(kid, began) >= began - FORCED
            waited = began - had.get(kid, began)
            if published.works and published.delay <= 1 and waited > FORCED + 2 * TIMEOUT + 31:
                assert answer == "in", (kid, waited)
            await asyncio.sleep(dice.expovariate(0.4))
        await published.issuer.close()

    run_virtually(run())
