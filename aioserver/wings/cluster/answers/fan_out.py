"""Questions to other instances, each on a connection of its own to a peer listener."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from aioserver.gateway.contracts.timeouts import timeout
from aioserver.wings.cluster.answers.greeting import (
    MAX_ANSWER,
    SIZE,
    Greeting,
    Look,
    encode,
)
from aioserver.wings.cluster.answers.peer_network import Gone, Unreachable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from aioserver.wings.cluster.answers.greeting import Question
    from aioserver.wings.cluster.answers.peer_network import PeerNetwork

logger = logging.getLogger("aioserver.cluster")

# Seconds in which all answer.
ANSWER_TIMEOUT = 1.0


class Answers(NamedTuple):
    """The answers of instances, by their names; *missing*: the instances whose answer is unknown.

    An instance that has ended is in neither.
    """

    answers: dict[str, bytes]
    missing: list[str]

    def values(self) -> list[Any]:
        """Return the answers to a question other than `Look`."""
        return [msgspec.msgpack.decode(answer) for answer in self.answers.values() if answer]


class FanOut:
    """Asks other instances by *network*; *secret* returns what all of them know."""

    def __init__(self, network: PeerNetwork, secret: Callable[[], bytes]) -> None:
        self._network, self._secret = network, secret

    async def look(self, targets: Iterable[str], what: str) -> dict[str, bytes]:
        """Return the page *what* of each of *targets* that answers in time: see `Look`."""
        return (await self.ask(targets, Look(what))).answers

    async def ask(self, targets: Iterable[str], question: Question) -> Answers:
        """Return the answers of the instances *targets* to *question*, all within
        ANSWER_TIMEOUT.
        """
        line, targets = encode(Greeting(self._secret(), question)), list(targets)
        outcomes = await asyncio.gather(
            *(self._ask(target, line) for target in targets), return_exceptions=True
        )
        answers, missing = dict[str, bytes](), list[str]()
        for target, outcome in zip(targets, outcomes, strict=True):
            if isinstance(outcome, bytes):
                answers[target] = outcome
            elif isinstance(outcome, Unreachable):
                missing.append(target)
            elif not isinstance(outcome, Gone):
                raise outcome
        return Answers(answers, missing)

    async def meet(self, name: str) -> str:
        """Return why the instance *name* cannot be reached; empty if it answers."""
        try:
            await self._ask(name, encode(Greeting(self._secret(), Look(""))))
        except Gone:
            return "the connection is refused"
        except Unreachable as exc:
            return str(exc)
        return ""

    async def _ask(self, target: str, line: bytes) -> bytes:
        """Return the answer of *target* to the greeting *line*.

        Raises:
            Gone: as `PeerNetwork.dial`.
            Unreachable: as that, or there was no answer in time, or not all of it.
        """
        reader = asyncio.StreamReader()
        try:
            async with timeout(ANSWER_TIMEOUT):
                transport, _ = await self._network.dial(
                    target, lambda: asyncio.StreamReaderProtocol(reader)
                )
                try:
                    transport.write(line)
                    size = int.from_bytes(await reader.readexactly(SIZE))
                    return await reader.readexactly(min(size, MAX_ANSWER))
                finally:
                    transport.abort()
        except TimeoutError:
            raise Unreachable(f"no answer in {ANSWER_TIMEOUT:g} s") from None
        except (EOFError, ConnectionError):
            text = "it has broken the connection: its secret or its version is another"
            raise Unreachable(text) from None
