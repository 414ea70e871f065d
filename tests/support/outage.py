"""An outage in virtual time: clients, the real router and providers, and a scripted exchange.

The provider of a run fails a share of its attempts. Its clients ask one request after another, as
people and programs do, until the run has seen enough of them. Nothing sleeps: the loop's clock
jumps to the next timer. The same seed gives the same run.

    python -m tests.support.outage        prints the tables of docs/performance.md
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from aioserver.auth.callers import NO_CALLER
from aioserver.config import settings
from aioserver.gateway.request import Request
from aioserver.provider_errors import ConnectError, ProviderError, ProviderFault
from aioserver.providers.breaker import Breaker
from aioserver.providers.provider import Provider
from aioserver.providers.request import CHAT, ProviderRequest
from tests.support.routers import router_of
from tests.support.schedulers import scheduler
from tests.support.scripted_provider import LIMITS
from tests.support.virtual_loop import run_virtually

if TYPE_CHECKING:
    from aioserver.gateway.router import Router
    from aioserver.providers.attempt import Attempt
    from aioserver.providers.request import Answer
    from aioserver.streams.lifetime import Lifetime

T = TypeVar("T")
RATES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
# Requests of a run. Where most attempts fail, few answers decide, and more requests are needed.
REQUESTS, MANY_REQUESTS, MOST_FAIL = 2000, 15_000, 0.9
CLIENTS = (1, 10, 300)
RETRIES = (0, 3)
JSON = {"content-type": "application/json"}
# Seconds that an answer, a failure, and a client between two requests take: means of what is
# drawn.
ANSWER, FAILURE, THINKING = 1.0, 0.2, 1.0


async def ask(router: Router, provider: str | None = None) -> Answer:
    """Ask for an answer that is not streamed; with *provider* at that one only.

    Raises:
        ProviderFault: no provider answered.
    """
    request = ProviderRequest(CHAT, lambda _settings, _model: b"", streamed=False)
    return await router.call(
        Request(router.route(None, provider, caller=NO_CALLER), request, "openai", "r")
    )


class NeverOpen(Breaker):
    """A breaker that never opens."""

    def failed(self, began: float, **_facts: bool) -> bool:
        return False


class ScriptedExchange(Provider):
    """A provider whose exchange with the network is a throw of *dice*: *rate* of the attempts
    fail.
    """

    def __init__(
        self,
        name: str,
        limits: settings.HttpClient,
        dice: random.Random,
        *,
        breaker: bool = True,
        when_down: str = "fail",
        lifetime: Lifetime | None = None,
    ) -> None:
        entry = settings.Provider(
            name=name,
            base_url="http://127.0.0.1:9/v1",
            model="m",
            http_client=limits,
            when_down=when_down,
        )
        self._time = asyncio.get_running_loop().time
        super().__init__(
            entry,
            entry.base_url,
            max_response_bytes=1000,
            clock=self._time,
            lifetime=lifetime,
            scheduler=scheduler(),
        )
        if not breaker:
            self.health.breaker = NeverOpen(self._time)
        self._dice = dice
        self.rate = 0.0
        self.unreachable = False
        # When each attempt was made.
        self.attempts: list[float] = []

    async def exchange(self, attempt: Attempt) -> None:
        self.sent(attempt)
        failed = self._dice.random() < self.rate
        await asyncio.sleep((FAILURE if failed else ANSWER) * self._dice.uniform(0.5, 1.5))
        if failed:
            raise (ConnectError if self.unreachable else ProviderError)("it fails")
        attempt.head_received(200, JSON).feed(b"{}")

    def sent(self, attempt: Attempt) -> None:
        """Note that the request of *attempt* goes out now, through the present pool."""
        self.attempts.append(self._time())
        attempt.pool = self.pools.pool
        attempt.sending()
        attempt.request.outcome.sent_at = self._time()


@dataclass(frozen=True)
class Case:
    """One run: how many clients ask, how often the provider fails, and what is there to help."""

    rate: float
    clients: int
    retries: int
    fallback: bool = False
    breaker: bool = True
    requests: int = 0
    seed: int = 1

    def __post_init__(self) -> None:
        if not self.requests:
            many = MOST_FAIL <= self.rate < 1.0 and self.clients == 10
            object.__setattr__(self, "requests", MANY_REQUESTS if many else REQUESTS)


class Outcome(NamedTuple):
    """What became of a run: *share* of the requests was answered.

    *attempts* at the provider were made for each request. *per_second* is the rate of attempts at
    a provider that answers nothing from its death on; None if it never died.
    """

    share: float
    attempts: float
    per_second: float | None


async def _run(case: Case) -> Outcome:
    loop = asyncio.get_running_loop()
    dice = random.Random(f"{case.seed} {case.rate} {case.clients} {case.retries}")
    limits = replace(
        LIMITS,
        max_connections=50,
        concurrent_requests=25,
        queue_size=1000,
        queue_timeout=60.0,
        max_retries=case.retries,
        backoff_factor=0.5,
    )
    first = ScriptedExchange("first", limits, dice, breaker=case.breaker)
    first.rate = case.rate
    providers = {"first": first}
    if case.fallback:
        providers["second"] = ScriptedExchange("second", limits, dice, breaker=case.breaker)
    router = router_of(providers, "first", [*providers][1:], random_number=dice.random)
    asked = answered = 0
    died: float | None = None

    async def client() -> None:
        nonlocal asked, answered, died
        await asyncio.sleep(dice.uniform(0, THINKING))
        while asked < case.requests:
            asked += 1
            wait = 0.0
            try:
                await ask(router)
            except ProviderFault as fault:
                wait = fault.retry_after or 0.0
            else:
                answered += 1
            if died is None and first.health.state == "dead":
                died = loop.time()
            await asyncio.sleep(max(wait, THINKING * dice.uniform(0.5, 1.5)))

    async with asyncio.TaskGroup() as group:
        for _ in range(case.clients):
            group.create_task(client())
    per_second = None
    if died is not None and case.rate == 1.0:
        seconds = loop.time() - died
        per_second = sum(at > died for at in first.attempts) / seconds
    for provider in providers.values():
        await provider.close()
    return Outcome(answered / asked, len(first.attempts) / asked, per_second)


def run(case: Case) -> Outcome:
    """Run *case* in virtual time."""
    # The jitter of what clients are told comes from here.
    state = random.getstate()
    random.seed(case.seed)
    try:
        return run_virtually(_run(case))
    finally:
        random.setstate(state)


def row(rate: float, *, fallback: bool) -> str:
    """Return a row of a table, for all numbers of clients and of retries.

    A cell has the answered share with the breaker, and without any; where there is a fallback, the
    attempts at the failing provider for each request instead.
    """
    cells = [f"{rate:g}"]
    for clients, retries in product(CLIENTS, RETRIES):
        case = Case(rate, clients, retries, fallback)
        with_breaker, without = run(case), run(replace(case, breaker=False))
        if fallback:
            assert with_breaker.share == without.share == 1.0, "the fallback answers the rest"
            cells.append(f"{with_breaker.attempts:.2f} / {without.attempts:.2f}")
        else:
            cells.append(f"{with_breaker.share:.3f} / {without.share:.3f}")
    return f"| {' | '.join(cells)} |"


def _print_tables() -> None:
    heads = [f"{clients}, {retries}" for clients, retries in product(CLIENTS, RETRIES)]
    for fallback in (False, True):
        print(f"\n| failure rate | {' | '.join(heads)} |")
        print(f"| --- |{' ---: |' * len(heads)}")
        for rate in RATES:
            print(row(rate, fallback=fallback), flush=True)
    print("\nAttempts a second at a dead provider:")
    for fallback in (False, True):
        cells = ["with a fallback" if fallback else "without a fallback"]
        for clients, retries in product(CLIENTS, RETRIES):
            cells.append(f"{run(Case(1.0, clients, retries, fallback)).per_second or 0.0:.2f}")
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    _print_tables()
