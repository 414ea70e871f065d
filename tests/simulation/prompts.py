"""What callers are told of the caches of their providers (docs/slow.md): it follows from the prompts
that each has sent itself, and nothing of it from another's.

The clients of a talk, whoever they are, have the same words in their prompts, by which a server
could take them for one conversation.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson

from aioserver.protocol.tokens import tokens_of
from aioserver.providers.request import WordlessApi
from aioserver.wings.cache_loss.turns import Reader, Turn
from tests.simulation.noting import noted, together

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable
    from contextlib import ExitStack

    from aioserver.gateway.request import Request
    from aioserver.telemetry.outcome import CacheLoss, Outcome
    from tests.simulation.client import Client

# The parts of a prompt, in the order in which they are read.
PARTS = ("tools", "system", "instructions", "messages", "input", "prompt")
# Talks, and how often each of the two long messages of one has its word: some 1,500 tokens.
TALKS, WORDS = 3, 1000


def talk_of(client: Client) -> list[dict[str, str]]:
    """Return the messages that come before the question of *client*. The first one is of its caller;
    the others are those of all callers, but for one that has changed for half of the clients.
    """
    name = client.key.name if client.key else "nobody"
    words = " ".join([f"talk{client.number % TALKS}"] * WORDS)
    return [
        {"role": "system", "content": f"You help {name}."},
        {"role": "user", "content": words},
        {"role": "assistant", "content": f"Version {client.number // TALKS % 2}."},
        {"role": "user", "content": words},
    ]


@dataclass(slots=True)
class Prompt:
    """The regions of a prompt: the name and the bytes of each; and the tokens of all."""

    regions: list[tuple[str, bytes]]
    tokens: int = 0

    @property
    def size(self) -> int:
        """The bytes of all regions."""
        return sum(len(data) for _, data in self.regions)

    def explains(self, loss: CacheLoss, later: Prompt) -> bool:
        """Return whether *loss* is what may be told of a *later* prompt behind this one."""
        mine, others = (Counter(data for _, data in each.regions) for each in (self, later))
        common = sum(len(data) * count for data, count in (mine & others).items())
        if not common or loss.tokens > self.tokens * common / self.size + 1:
            return False
        if loss.byte is None:
            return True
        both = zip(self.regions, later.regions, strict=False)
        differ = [number for number, (one, other) in enumerate(both) if one[1] != other[1]]
        if not differ:
            return False
        # A region that only one of them has stands behind the others of its part.
        names = {each.regions[differ[0]][0] for each in (self, later)}
        before = sum(len(data) for _, data in later.regions[: differ[0]])
        return loss.at in names and loss.byte == before


def prompt_in(body: bytes) -> Prompt:
    """Return the prompt in *body*, JSON without white space."""
    request: dict[str, Any] = orjson.loads(body)
    regions = []
    for name in PARTS:
        if name in request:
            part = request[name]
            parts = part if isinstance(part, list) and part else [part]
            regions += [(f"{name}[{n}]", orjson.dumps(each)) for n, each in enumerate(parts)]
    return Prompt(regions)


class Prompts:
    """Has the prompts of each caller, and calls *broken* with what a caller is told of others."""

    def __init__(self, broken: Callable[[str], None]) -> None:
        self._broken = broken
        # By the number of its outcome, which it has as well: the caller of a prompt that is read.
        self._read: dict[int, tuple[Outcome, Hashable, Prompt]] = {}
        self._ended: defaultdict[Hashable, list[Prompt]] = defaultdict(list)

    def read(self, _reader: Reader, request: Request, *_others: object) -> None:
        """Note the prompt of *request*."""
        asked, route = request.provider_request, request.route
        if isinstance(asked.api, WordlessApi) or not asked.api.costs:
            return
        prompt = prompt_in(asked.body(route.provider.settings, route.model))
        self._read[id(asked.outcome)] = asked.outcome, asked.caller.flow, prompt

    def ended(self, loss: CacheLoss | None, _turn: Turn, outcome: Outcome) -> None:
        """Check what the caller of this turn is told, which ends with *outcome*."""
        _, caller, prompt = self._read.pop(id(outcome))
        prompt.tokens = tokens_of(outcome.usage).prompt or 0
        earlier = self._ended[caller]
        if loss is not None and not any(each.explains(loss, prompt) for each in earlier):
            self._broken(f"{caller!r} is told what none of its own prompts explains: {loss}")
        earlier.append(prompt)

    def patches(self) -> ExitStack:
        """Let all of that be noted, in the block."""
        return together(
            noted(Reader, "read", before=self.read),
            noted(Turn, "ended", after=self.ended),
        )
