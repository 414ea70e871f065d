"""The clients of a soak test, which come and go, and the probes beside them."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import aiohttp

from aioserver.tools.bench.clients import Question as Probe
from aioserver.tools.bench.load import Plan, Run
from aioserver.tools.bench.results import Results
from aioserver.wings.simulator.faults import FAULTS
from tests.soak.answers import GONE, Left, Violation
from tests.soak.clients import Client
from tests.support.keys import bearer, entry, key_of

if TYPE_CHECKING:
    from collections.abc import Sequence

# Clients at once.
CLIENTS = 24
# The share of questions that fail.
FAULT_SHARE = 0.3
# Seconds after which a client gives up, as somebody does before whom nothing happens.
PATIENCE = 20.0
PROBED = ("websocket", "sse", "openai")
# A replaced process closes an idle WebSocket, which a question may cross that is asked only once.
PROBED_BESIDE_DEPLOYS = ("sse", "openai")
# The keys of the clients, whose limits are reached; of the probes, whom nothing is refused; and of
# who looks at `/stats`.
KEYS = [
    entry("many", max_concurrent=16, requests_per_minute=100_000),
    entry("few", max_concurrent=6, max_connections=8, requests_per_minute=600),
    entry("probe", max_concurrent=1000, requests_per_minute=1_000_000),
    entry("root"),
]
# The share of the clients that have the key of few.
FEW_SHARE = 0.3
# The group that a share of the questions that do not fail asks for: two members with few places,
# for which requests wait, and one that fails now and then.
GROUP, GROUP_SHARE = "fleet", 0.3
MEMBERS, FLAPPING = ("fleet-1", "fleet-2"), "fleet-3"
# Seconds at most after which the next client comes, where one was refused.
LATER = 1.0
# Faults after which a provider is asked nothing for a while: each kind has a provider of its own,
# so that the others go on. The rest is the active provider's.
REFUSING = frozenset({"quota", "credits", "status-401"})
LIMITED = frozenset(
    {
        *("retry-after", "retry-after-ms", "retry-after-date", "retry-after-absurd", "day-over"),
        *("capacity", "slow-down", "limits-spent", "limits-day", "status-429", "status-503"),
    }
)
PROVIDERS = ("refusing", "limited", "steady")
# An endless answer has no text that could be checked, and `status` needs a number that is one.
FAULT_NAMES = sorted(
    {*FAULTS, "status-401", "status-404", "status-429", "status-500", "status-503"}
    - {"endless", "status"}
)
ENDLESS_EVENTS = 300


def model_of(fault: str) -> str | None:
    """Return the model that fails by *fault*, with its provider if that is not the active one."""
    if not fault:
        return None
    prefix = "refusing/" if fault in REFUSING else "limited/" if fault in LIMITED else ""
    return f"{prefix}fault-{fault}"


@dataclass
class Load:
    """The clients of a run, and what has become of them: *outcomes* are counted, *violations* are
    told.
    """

    base: str
    seed: int
    outcomes: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    asked: int = 0

    def __post_init__(self) -> None:
        self._numbers = itertools.count()
        self._dice = random.Random(self.seed)

    async def run(self, stop: asyncio.Event) -> None:
        """Let clients come, one after the other in each of CLIENTS places, until *stop* is set."""
        async with asyncio.TaskGroup() as group:
            for place in range(CLIENTS):
                group.create_task(self._endless(stop) if not place else self._clients(stop))

    async def _clients(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            name = f"soak-{self.seed}-{next(self._numbers)}"
            fault = self._dice.choice(FAULT_NAMES) if self._dice.random() < FAULT_SHARE else ""
            model = model_of(fault)
            if not fault and self._dice.random() < GROUP_SHARE:
                model = GROUP
            self.asked += 1
            outcome = "violation"
            connector = aiohttp.TCPConnector(limit=0, force_close=True)
            key = "few" if self._dice.random() < FEW_SHARE else "many"
            async with aiohttp.ClientSession(connector=connector, headers=bearer(key)) as session:
                client = Client(self.base, name, model, fault, session)
                try:
                    async with asyncio.timeout(PATIENCE):
                        await client.run()
                    outcome = client.outcome
                except TimeoutError:
                    outcome = "gave up"
                except Violation as violation:
                    self.violations.append(
                        f"{client.face}, {fault or 'no fault'}, {name}: {violation}"
                    )
            self.outcomes[outcome.partition(":")[0]] += 1
            if outcome.startswith("refused"):
                # Otherwise nobody but those who are refused would ever ask.
                await asyncio.sleep(self._dice.uniform(0.0, LATER))

    async def _endless(self, stop: asyncio.Event) -> None:
        """Begin to read answers without an end, and leave."""
        body = {
            "model": "fault-endless",
            "messages": [{"role": "user", "content": "go on"}],
            "stream": True,
        }
        url = f"{self.base}/v1/chat/completions"
        while not stop.is_set():
            self.asked += 1
            outcome = "refused"
            try:
                async with (
                    asyncio.timeout(PATIENCE),
                    aiohttp.ClientSession(headers=bearer("many")) as session,
                    session.post(url, json=body) as response,
                ):
                    lines = 0
                    async for _ in response.content:
                        lines += 1
                        if lines > ENDLESS_EVENTS:
                            raise Left
            except Left:
                outcome = "left"
            except (TimeoutError, *GONE):
                outcome = "gone"
            self.outcomes[outcome] += 1
            await asyncio.sleep(1.0)


async def probe(
    base: str, provider: str, seconds: float, faces: Sequence[str] = PROBED
) -> dict[str, Any]:
    """Ask the steady provider for *seconds*, on each of *faces* and directly; return the numbers of
    the window.

    The direct answers show what the machine and this program add themselves: only the difference
    is the server's.
    """
    question = Probe(prompt="Why are you called a gateway?", model="steady", max_tokens=20)
    plans = [
        *(
            Plan(
                url=base,
                face=face,
                clients=2,
                question=question,
                duration=seconds,
                key=key_of("probe"),
            )
            for face in faces
        ),
        Plan(url=provider, face="openai", clients=3, question=question, duration=seconds),
    ]
    # The faces share their results, whose samples are then those of all of them.
    results = Results()
    *runs, direct = (Run(plan, results if plan.url == base else Results()) for plan in plans)
    await asyncio.gather(*(run.execute() for run in (*runs, direct)))
    return {
        "requests": results.begun,
        "ok": results.ok,
        "failed": results.refused + results.incomplete,
        **_percentiles("first_token", results),
        **_percentiles("direct", direct.results),
    }


def _percentiles(name: str, results: Results) -> dict[str, float]:
    summary = results.first_token.summary()
    assert summary is not None, "a window without an answer"
    return {f"{name}_p50": summary["p50"], f"{name}_p99": summary["p99"]}
