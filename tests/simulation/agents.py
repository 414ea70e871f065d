"""Fifty agents on four places, with the patience and the repeats of Claude Code, Codex and opencode
(docs/clients.md): nobody gives up, each hears something after every `ping_interval`, and a session
that asks much takes nothing from the others.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, replace
from math import inf
from typing import TYPE_CHECKING, Any

import orjson

from tests.simulation.clock import Clock
from tests.simulation.configuration import GATE, HTTP, STREAMS
from tests.simulation.events import events
from tests.simulation.plan import Plan, draw
from tests.simulation.truth import Violation

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import aiohttp

    from tests.simulation.client import Client

FACE = "agent"
AGENTS = 50
# Turns of each agent, and its answers in tokens, one each 0.2 s: from 1 to 60 s.
TURNS, TOKENS = 2, (5, 10, 25, 50, 300)
# One of so many sessions asks for so many answers at once.
GREEDY, AT_ONCE = 10, 2
# Seconds by which a sign of life may be late. (Each agent ends after 300 s of silence.)
LATE = 2.0
PING_INTERVAL = 20


@dataclass(frozen=True, slots=True)
class Kind:
    """An agent: where it asks, and how it says whose session that is. It repeats a 429, and other
    refusals that may be repeated, so many times; *hears* is whether comments are signs of life.
    """

    path: str
    session: str
    headers: dict[str, str]
    limited: int
    busy: int
    hears: bool
    obeys: frozenset[int]
    # What an answer begins with, and ends with.
    begins: str
    ends: frozenset[str]


CLAUDE = Kind(
    "messages",
    "x-claude-code-session-id",
    {"anthropic-version": "2023-06-01"},
    10,
    10,
    True,
    frozenset({429, 502}),
    "message_start",
    frozenset({"message_stop"}),
)
CODEX = Kind(
    "responses",
    "session-id",
    {"originator": "codex_cli_rs"},
    5,
    29,
    False,
    frozenset(),
    "response.created",
    frozenset({"response.completed", "response.incomplete"}),
)
OPENCODE = Kind(
    "chat/completions",
    "x-session-id",
    {},
    5,
    5,
    True,
    frozenset(),
    "chat.completion.chunk",
    frozenset({"[DONE]"}),
)
KINDS = (CLAUDE, CODEX, OPENCODE)


def plan_of(seed: int) -> Plan:
    """Return a run in which all clients are agents, of an engine whose seed makes it write a token
    each 0.2 s.
    """
    return replace(
        draw(seed, AGENTS, groups=False),
        faces=(FACE,),
        spread=0.1,
        faults={},
        habits={},
        operations={},
        provider_links={},
        provider_fault_share=0.0,
        keys=(),
        spare=False,
        pinned=True,
        silent=0.0,
        uploads=0.0,
        background=0.0,
        messages=0.0,
        hurried=0.0,
        message_kinds=("bridged", "bridged"),
        responses="bridged",
        refuses=("stream_options",),
        changes={
            f"{HTTP}.concurrent_requests": 4,
            f"{HTTP}.max_connections": 4,
            f"{HTTP}.max_keepalive": 4,
            # As it is where nobody sets it.
            f"{HTTP}.queue_size": 64,
            # A session of long answers waits for as much work of each of the others.
            f"{HTTP}.queue_timeout": 1200.0,
            f"{HTTP}.read_timeout": 60.0,
            f"{HTTP}.connect_timeout": 5.0,
            f"{HTTP}.write_timeout": 5.0,
            f"{HTTP}.pool_timeout": 5.0,
            f"{HTTP}.requests_per_minute": 1_000_000,
            f"{HTTP}.max_retries": 2,
            "llm.providers.sim.messages": "bridge",
            "llm.providers.sim.responses": False,
            "chat.websocket.ping_interval": PING_INTERVAL,
            f"{GATE}.max_connections": 300,
            f"{GATE}.uvicorn.backlog": 2048,
            f"{GATE}.connection_queue_size": 300,
            f"{GATE}.queue_timeout": 5.0,
            f"{STREAMS}.resume_window": 30.0,
            f"{STREAMS}.max_kept_bytes": 268_435_456,
        },
    )


async def ask(client: Client) -> None:
    """Be an agent: do all turns, perhaps several at once."""
    kind = KINDS[client.number % len(KINDS)]
    at_once = AT_ONCE if client.number % GREEDY == 0 else 1
    await asyncio.gather(*(_work(client, kind, number) for number in range(at_once)))
    client.outcome = "complete"


async def _work(client: Client, kind: Kind, number: int) -> None:
    dice = random.Random(f"agent {client.plan.seed} {client.number} {number}")
    for turn in range(TURNS):
        text = f"q{client.number}{number}{turn} word markdown"
        began = Clock.now
        begun = await _turn(client, kind, _body(kind, text, dice.choice(TOKENS)))
        client.waits[number, turn] = begun - began


async def _turn(client: Client, kind: Kind, body: dict[str, Any]) -> float:
    """Ask until there is an answer; return when that has begun."""
    refusals = 0
    while True:
        heard = _Heard(client)
        headers = {**kind.headers, kind.session: f"session {client.number}"}
        post = client.session.post(
            f"{client.base}/v1/{kind.path}",
            data=orjson.dumps(body),
            headers={**headers, "Content-Type": "application/json"},
        )
        async with post as response:
            if response.status == 200:
                return await _read(kind, response, heard)
            seconds = _repeats(kind, response, refusals, await response.read())
        refusals += 1
        # An agent that waits by itself hears nothing, and needs nothing.
        await asyncio.sleep(seconds)
        client.patience.heard()


def _body(kind: Kind, text: str, tokens: int) -> dict[str, Any]:
    body: dict[str, Any] = {"model": "sim", "stream": True}
    if kind is CODEX:
        return {**body, "input": text, "max_output_tokens": tokens, "store": False}
    return {**body, "messages": [{"role": "user", "content": text}], "max_tokens": tokens}


def _repeats(kind: Kind, response: aiohttp.ClientResponse, refusals: int, body: bytes) -> float:
    """Return the seconds after which it repeats a refused request."""
    status = response.status
    most = kind.limited if status == 429 else kind.busy
    final = response.headers.get("x-should-retry") == "false" and status in kind.obeys
    if final or refusals >= most or status < 429:
        raise Violation(f"an agent gives up, at {kind.path}, at {status}: {body[:200]!r}")
    said = float(response.headers.get("Retry-After", "1"))
    return max(said, min(40.0, 0.5 * 2**refusals)) if kind is CLAUDE else said


class _Listening:
    """Listens to a stream for an agent, which says itself what silence is."""

    def quiet(self) -> float:
        """Return the seconds of silence that are too many: none are."""
        return inf


class _Heard(_Listening):
    """Notes the signs of life that count for an agent."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._at = Clock.now

    def heard(self) -> None:
        """Note one."""
        silence, self._at = Clock.now - self._at, Clock.now
        self._client.patience.heard()
        if silence > PING_INTERVAL + LATE:
            raise Violation(f"an agent is told nothing for {silence:.1f} s")


class _Deaf(_Listening):
    """Takes no comment for a sign of life."""

    def heard(self) -> None:
        """Do nothing."""


async def _read(kind: Kind, response: aiohttp.ClientResponse, heard: _Heard) -> float:
    heard.heard()
    patience: Any = heard if kind.hears else _Deaf()
    begun = 0.0
    async for data in events(response, patience):
        heard.heard()
        event = {"type": "[DONE]"} if data == b"[DONE]" else orjson.loads(data)
        shown = event.get("type") or event.get("object")
        if "error" in event and event.get("error"):
            raise Violation(f"an agent gets {event}")
        if shown == kind.begins:
            begun = begun or Clock.now
        if shown in kind.ends:
            return begun
    raise Violation(f"an answer at {kind.path} without an end")


def check(clients: Iterable[Client], broken: Callable[[str], None]) -> None:
    """Check that the second answers which sessions ask for at once come behind the first ones of the
    others, as a rule; that shares stay fair is looked at whenever somebody starts (fairness.py).
    """
    waits = [client.waits for client in clients if client.waits]
    first = sorted(each[0, 0] for each in waits)
    second = sorted(each[1, 0] for each in waits if (1, 0) in each)
    if second and second[len(second) // 2] < first[len(first) // 2]:
        broken(f"second requests wait for {second}, and first ones for {first}")
