"""What one run tries, all of it drawn from its seed: limits, faults, clients, and what the operator does.

Each run leaves some faults out and has more of others, since a mix of all of them hides what only a few can
show (Groce, Zhang, Eide, Chen and Regehr, "Swarm Testing", ISSTA 2012).
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from tests.simulation.network import GOOD, Dial, Faults

# What may go wrong on a connection.
NETWORK_FAULTS = (
    "reset",
    "stall",
    "black hole",
    "slow link",
    "full accept queue",
    "refused",
    "small kernel",
)
# What clients do beside asking and reading.
HABITS = ("leave", "return", "cancel", "ask twice", "read slowly", "half close")
# Faults of the simulated provider; `<n>` is a number of tokens.
PROVIDER_FAULTS = (
    *(
        "status-500",
        "status-503",
        "slow-down",
        "capacity",
        "retry-after-ms",
        "drop",
        "not-http",
        "html",
    ),
    *("cut-<n>", "cut-mid-<n>", "bad-chunk-<n>", "end-<n>", "error-event-<n>", "error-chunk-<n>"),
    *("stall-<n>", "half-line-<n>", "comments-stall-<n>", "head-only", "silent"),
    *("bad-json-<n>", "bad-utf8-<n>", "no-done", "early-done-<n>", "after-done", "flap-<n>"),
)
# Those after which no answer may end well.
NEVER_WHOLE = frozenset(
    {
        *(
            "cut",
            "cut-mid",
            "bad-chunk",
            "end",
            "error-event",
            "error-chunk",
            "stall",
            "half-line",
        ),
        *(
            "comments-stall",
            "head-only",
            "silent",
            "drop",
            "not-http",
            "html",
            "status-500",
            "capacity",
        ),
    }
)
FACES = ("websocket", "sse", "stream", "whole", "keyed stream", "keyed whole", "responses")
# What the operator does in the middle of a run.
OPERATIONS = ("reload limits", "reload provider", "drain")


def share(dice: random.Random) -> float:
    """Draw how often a fault of this run happens: seldom, as a rule."""
    return dice.choice((0.01, 0.05, 0.1, 0.3))


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One run. Times in seconds; *faults*, *habits* and *provider_faults* have the share of each."""

    seed: int
    clients: int
    # All clients begin within these seconds.
    spread: float
    faces: tuple[str, ...]
    faults: dict[str, float]
    habits: dict[str, float]
    # The share of questions to a model that fails, and in which ways.
    provider_fault_share: float
    provider_faults: tuple[str, ...]
    operations: dict[str, float] = field(default_factory=dict)
    # Changes of the configuration, by dotted path.
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def drains(self) -> bool:
        """Whether the server stops in the middle."""
        return "drain" in self.operations


def draw(seed: int, clients: int) -> Plan:
    """Return the plan of *seed*, for *clients* clients."""
    dice = random.Random(f"plan {seed}")
    http, gate, streams = (
        "llm.providers.sim.http_client",
        "chat.websocket.concurrency",
        "chat.streams",
    )
    places = dice.choice((2, 5, 20, 100))
    connections = dice.choice((5, 20, 50, 300))
    changes = {
        f"{gate}.max_connections": connections,
        f"{gate}.connection_queue_size": dice.choice((connections, 2 * connections, 500)),
        f"{gate}.queue_timeout": dice.choice((0, 0.5, 5.0, 30.0)),
        f"{gate}.uvicorn.backlog": 2048,
        f"{gate}.max_body_bytes": dice.choice((20_000, 268_435_456)),
        f"{streams}.resume_window": dice.choice((0, 2.0, 30.0)),
        f"{streams}.max_detached": dice.choice((1, 5, 100)),
        f"{streams}.max_stream_bytes": dice.choice((4096, 65_536, 4_194_304)),
        f"{streams}.max_kept_bytes": dice.choice((65_536, 1 << 20, 268_435_456)),
        f"{streams}.send_timeout": dice.choice((1.0, 10.0)),
        f"{http}.concurrent_requests": places,
        f"{http}.max_connections": dice.choice((places, 2 * places)),
        f"{http}.max_keepalive": dice.choice((1, places)),
        f"{http}.queue_size": dice.choice((1, 10, 1000)),
        f"{http}.queue_timeout": dice.choice((1.0, 30.0)),
        f"{http}.read_timeout": dice.choice((2.0, 10.0)),
        f"{http}.requests_per_minute": dice.choice((600, 1_000_000)),
        f"{http}.max_retries": dice.choice((0, 2)),
        "llm.providers.sim.when_down": dice.choice(("fail", "wait")),
        "chat.websocket.ping_interval": dice.choice((2, 20)),
        "chat.websocket.ping_timeout": dice.choice((2, 10)),
    }
    if dice.random() < 0.5:
        changes[f"{streams}.max_kept_bytes"] = 268_435_456
    changes[f"{streams}.max_kept_bytes"] = max(
        changes[f"{streams}.max_kept_bytes"], changes[f"{streams}.max_stream_bytes"]
    )
    return Plan(
        seed=seed,
        clients=clients,
        spread=dice.choice((0.1, 5.0, 30.0)),
        faces=tuple(dice.sample(FACES, dice.randrange(1, len(FACES) + 1))),
        faults=_some(dice, NETWORK_FAULTS),
        habits=_some(dice, HABITS),
        provider_fault_share=dice.choice((0.0, 0.0, 0.1, 0.5)),
        provider_faults=tuple(dice.sample(PROVIDER_FAULTS, dice.randrange(1, 6))),
        operations={name: dice.uniform(1.0, 40.0) for name in OPERATIONS if dice.random() < 0.25},
        changes=changes,
    )


def _some(dice: random.Random, names: tuple[str, ...]) -> dict[str, float]:
    return {name: share(dice) for name in names if dice.random() < 0.5}


def dial(plan: Plan, dice: random.Random) -> Dial:
    """Draw how a connection of *plan* is made, by the *dice* of its client."""
    accept_after = dice.uniform(0.5, 5.0) if _happens(plan, "full accept queue", dice) else 0.0
    return Dial(
        random.Random(dice.random()),
        there=_direction(plan, dice),
        back=_direction(plan, dice),
        accept_after=accept_after,
        refused=_happens(plan, "refused", dice),
    )


def _happens(plan: Plan, name: str, dice: random.Random) -> bool:
    # The dice are thrown in any case: leaving a fault out changes nothing else.
    thrown = dice.random()
    return thrown < plan.faults.get(name, 0.0)


def _direction(plan: Plan, dice: random.Random) -> Faults:
    size = dice.choice((300, 1500, 6000, 50_000))
    place = dice.randrange(1, size)
    seconds = dice.choice((0.3, 3.0, 25.0))
    small = dice.choice((512, 4096))
    slow = dice.choice((500.0, 20_000.0))
    return Faults(
        latency=GOOD.latency if dice.random() < 0.7 else dice.choice((0.01, 0.2)),
        bandwidth=slow if _happens(plan, "slow link", dice) else GOOD.bandwidth,
        kernel=small if _happens(plan, "small kernel", dice) else GOOD.kernel,
        reset_at=place if _happens(plan, "reset", dice) else None,
        stall_at=place if _happens(plan, "stall", dice) else None,
        stall_seconds=seconds,
        black_hole_at=place if _happens(plan, "black hole", dice) else None,
    )
