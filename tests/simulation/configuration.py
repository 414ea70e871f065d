"""The configuration of a run, drawn from its dice: limits, times, keys, and whether there is a
second provider.
"""

from __future__ import annotations

import functools
import hashlib
import random
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aioserver.limits.fair_queue import BATCH, INTERACTIVE
from aioserver.limits.quota import MAX_WAIT
from tests.simulation import sick_hook
from tests.support.issuer import SigningKey, claims, jwks, jwt_settings
from tests.support.server import HTTP_CLIENT

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

HTTP = "llm.providers.sim.http_client"
GATE = "chat.websocket.concurrency"
HTTP_SERVER = f"{GATE}.uvicorn"
STREAMS = "chat.streams"
SPARE, THIRD = "llm.providers.spare", "llm.providers.third"
# The name of the group of both providers, and how it may choose.
GROUP, CHOICES = "both", ("ordered", "least_busy", "weighted")
# The part of the runs with a hook, which is sick; and that of the hooks that are closed.
HOOKED, CLOSED = 0.25, 0.4
# How many times as long as others requests of the class batch wait.
BATCH_PATIENCE = 10
# What is kept is dropped for want of room where there is less room than this.
ROOM = 1 << 28

# The share of the keys that are names in tokens, and that of the clients with one whose token ends
# while they ask, or has ended.
TOKENS, ENDING = 0.3, 0.3
# A day that no run reaches, in Unix time; and the key that signs in every run.
LAST_DAY = 2_000_000_000
ISSUER_KEY = SigningKey("EdDSA")
ISSUER_KEY.private = Ed25519PrivateKey.from_private_bytes(b"simulated issuer" * 2)


@dataclass(frozen=True, slots=True)
class Key:
    """A key of a client, or what its *token* names; *load* is the share of the clients that have
    it.
    """

    name: str
    load: float
    weight: int
    token: bool = False

    @property
    def caller(self) -> str:
        """The name of its caller."""
        return f"jwt:{self.name}" if self.token else self.name

    @property
    def batch(self) -> bool:
        """Whether its requests use what others leave: where there are four keys, two are so."""
        return self.load in {0.3, 0.1}

    @property
    def secret(self) -> str:
        """The key itself, or a token that does not end."""
        return token_of(self.name) if self.token else f"aio-{self.name}"

    def draw_token(self, seed: int, number: int, begins: float) -> Callable[[], str]:
        """Draw what client *number* shows, which *begins* so many seconds from now: one token, or
        one that is renewed when it has ended.
        """
        dice = random.Random(f"token {seed} {number}")
        if not self.token or dice.random() >= ENDING:
            return lambda: self.secret
        end = int(now() + begins + dice.uniform(-40.0, 60.0))
        token, renews = token_of(self.name, end), dice.random() < 0.5
        return lambda: self.secret if renews and now() >= end else token

    def entry(self, dice: random.Random) -> dict[str, Any]:
        """Return the entry of `auth.keys`, or of its role."""
        entry = {
            "name": self.name,
            "sha256": hashlib.sha256(self.secret.encode()).hexdigest(),
            "priority": self.weight,
            "class": BATCH if self.batch else INTERACTIVE,
            "max_concurrent": dice.choice((10, 1000, 1000)),
            "max_connections": dice.choice((0, 0, 0, 50)),
            "requests_per_minute": dice.choice((100, 100_000)),
        }
        # Dice of its own: what the others draw stays as it is.
        own = random.Random(repr(sorted(entry.items())))
        entry["queue_size"] = own.choice((0, 5, 200))
        entry["tokens_per_minute"] = own.choice((0, 0, 20_000))
        entry["tokens_per_day"] = own.choice((0, 0, 0, 60_000))
        if self.token:
            del entry["name"], entry["sha256"]
        return entry


@functools.cache
def token_of(name: str, end: int = LAST_DAY) -> str:
    """Return a token of the caller *name*, whose role has the same name."""
    return ISSUER_KEY.sign(claims(sub=name, roles=[name], iat=None, exp=end))


def now() -> float:
    """Return the time of the wall in this run."""
    return time.time()


def with_tokens(seed: int, keys: tuple[Key, ...]) -> tuple[Key, ...]:
    """Return *keys*, of which some are names in tokens; by dice of their own."""
    dice = random.Random(f"tokens {seed}")
    return tuple(replace(key, token=dice.random() < TOKENS) for key in keys)


def draw_keys(dice: random.Random) -> tuple[Key, ...]:
    """Draw the keys, whose loads are far from equal; none is a server without keys."""
    loads = dice.choice(((), (), (0.8, 0.15, 0.05), (0.4, 0.3, 0.2, 0.1), (1.0,)))
    return tuple(
        Key(f"key{number}", load, dice.choice((1, 1, 2, 5))) for number, load in enumerate(loads)
    )


def draw_changes(dice: random.Random, keys: tuple[Key, ...]) -> dict[str, Any]:
    """Draw what differs from the configuration of the other tests, by dotted path."""
    places = dice.choice((2, 5, 20, 100))
    connections = dice.choice((5, 20, 50, 300))
    changes: dict[str, Any] = {
        f"{GATE}.max_connections": connections,
        f"{GATE}.connection_queue_size": dice.choice((connections, 2 * connections, 500)),
        f"{GATE}.queue_timeout": dice.choice((0, 0.5, 5.0, 30.0)),
        f"{HTTP_SERVER}.backlog": 2048,
        f"{GATE}.max_body_bytes": dice.choice((20_000, 268_435_456)),
        f"{STREAMS}.resume_window": dice.choice((0, 2.0, 30.0)),
        f"{STREAMS}.store_window": 20.0,
        f"{STREAMS}.max_detached": dice.choice((1, 5, 100)),
        f"{STREAMS}.max_stream_bytes": dice.choice((4096, 65_536, 4_194_304)),
        f"{STREAMS}.max_kept_bytes": dice.choice((65_536, 1 << 20, 268_435_456)),
        f"{STREAMS}.send_timeout": dice.choice((1.0, 10.0)),
        f"{HTTP}.concurrent_requests": places,
        f"{HTTP}.max_connections": dice.choice((places, 2 * places)),
        f"{HTTP}.max_keepalive": dice.choice((1, places)),
        f"{HTTP}.queue_size": dice.choice((1, 10, 1000)),
        f"{HTTP}.queue_timeout": dice.choice((1.0, 30.0)),
        f"{HTTP}.read_timeout": dice.choice((2.0, 10.0)),
        f"{HTTP}.requests_per_minute": dice.choice((600, 1_000_000)),
        f"{HTTP}.max_retries": dice.choice((0, 2)),
        "llm.providers.sim.when_down": dice.choice(("fail", "wait")),
        "chat.websocket.ping_interval": dice.choice((2, 20)),
        "chat.websocket.ping_timeout": dice.choice((2, 10)),
        f"{HTTP}.connect_timeout": dice.choice((1.0, 5.0)),
        f"{HTTP}.write_timeout": dice.choice((1.0, 5.0)),
        f"{HTTP}.pool_timeout": dice.choice((1.0, 5.0)),
        f"{HTTP}.keepalive_expiry": dice.choice((0.5, 30.0)),
        f"{HTTP}.tokens_per_minute": dice.choice((0, 0, 0, 20_000)),
        f"{HTTP_SERVER}.keepalive_timeout": dice.choice((2, 30)),
        f"{HTTP_SERVER}.max_keepalive_requests": dice.choice((1, 2, 10_000)),
        "chat.websocket.idle_timeout": dice.choice((0, 0, 3.0)),
        "chat.websocket.shutdown_timeout": dice.choice((1.0, 30.0)),
        "chat.websocket.drain_delay": dice.choice((0, 2.0)),
    }
    if dice.random() < 0.5:
        changes[f"{STREAMS}.max_kept_bytes"] = 268_435_456
    changes[f"{STREAMS}.max_kept_bytes"] = max(
        changes[f"{STREAMS}.max_kept_bytes"], changes[f"{STREAMS}.max_stream_bytes"]
    )
    # Dice of its own: what the others draw stays as it is.
    if random.Random(repr(sorted(changes.items()))).random() < HOOKED:
        closed = random.Random(repr(changes)).random() < CLOSED
        changes["hooks"] = [sick_hook.CLOSED if closed else sick_hook.ENTRY]
    if keys:
        entries = {key: key.entry(dice) for key in keys}
        changes["auth.keys"] = [entry for key, entry in entries.items() if not key.token]
        if any(key.token for key in keys):
            # The file is named when the server has a folder.
            limits = {key.name: entry for key, entry in entries.items() if key.token}
            changes["auth.jwt"] = jwt_settings("", limits=limits, jwks_url=None)
    return changes


def write_issuer_keys(changes: dict[str, Any], folder: Path) -> None:
    """Write what *changes* need to take tokens."""
    if "auth.jwt" in changes:
        file = folder / "jwks.json"
        file.write_bytes(jwks(ISSUER_KEY))
        changes["auth.jwt"] = {**changes["auth.jwt"], "jwks_file": str(file)}


def with_spare(
    changes: dict[str, Any],
    base_url: str,
    choose: str,
    third_url: str = "",
    models: Any = None,
    messages: bool | str = False,
) -> dict[str, Any]:
    """Return *changes* with a second provider at *base_url*, which is asked where the first one
    fails; with *choose* there is a group of both, and with *models* there are these groups, and a
    third provider at *third_url*. *messages* is their setting of that name.
    """
    client = {
        name: changes.get(f"{HTTP}.{name}", value)
        for name, value in HTTP_CLIENT.items()
        if name != "max_retries"
    }
    spare = {
        "base_url": base_url,
        "model": "spare-model",
        "messages": messages,
        "http_client": {**client, "max_retries": 0, "queue_size": 10},
        "continuation": changes.get("llm.providers.sim.continuation", "none"),
    }
    changes = {**changes, "llm.fallbacks": ["spare"], SPARE: spare}
    if choose:
        group = {"members": ["sim", "spare"], "choose": choose}
        changes["llm.models"] = {GROUP: group}
    if models is not None:
        third = {"like": "spare", "base_url": third_url, "model": "third-model"}
        changes |= {THIRD: third, "llm.models": models}
    return changes


def longest_wait(changes: dict[str, Any], providers: int, hops: int = 0) -> float:
    """Return the seconds in which a client whose connection is good hears something at last.

    It is the sum of all deadlines that a request may meet, one after another, and of the longest
    answer; *hops* attempts may continue it.
    """
    keys = [*changes.get("auth.keys", ()), *changes.get("auth.jwt", {}).get("limits", {}).values()]
    times = BATCH_PATIENCE if any(key["class"] == BATCH for key in keys) else 1
    queue_timeout = times * changes[f"{HTTP}.queue_timeout"]
    retries = 1 + changes[f"{HTTP}.max_retries"]
    attempt = sum(
        changes[f"{HTTP}.{name}"]
        for name in ("connect_timeout", "write_timeout", "read_timeout", "pool_timeout")
    )
    provider = queue_timeout + retries * (attempt + BACKOFF)
    hop = queue_timeout + attempt
    at_key = MAX_WAIT if any(key["queue_size"] for key in keys) else 0.0
    return at_key + float(
        BODY
        + changes[f"{GATE}.queue_timeout"]
        + providers * provider
        + hops * hop
        + LONGEST_ANSWER
        + MARGIN
    )


# Seconds for a body to come (faces/intake.py), and at most between two attempts
# (gateway/router.py).
BODY, BACKOFF = 15.0, 60.0
# Seconds for 200 tokens, one each 0.2 s, on a slow link; and some more.
LONGEST_ANSWER, MARGIN = 80.0, 30.0
