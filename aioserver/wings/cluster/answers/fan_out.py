"""Questions to other instances, each on a connection of its own to a peer listener."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from aioserver.wings.cluster.answers.greeting import (
    MAX_ANSWER,
    SIZE,
    Greeting,
    Look,
    encode,
    unframed,
)
from aioserver.wings.cluster.answers.peer_network import Gone, Unreachable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from aioserver.wings.cluster.answers.greeting import Question
    from aioserver.wings.cluster.answers.peer_network import Network

logger = logging.getLogger("aioserver.cluster")

# Seconds in which all answer.
ANSWER_TIMEOUT = 1.0


class Answers(NamedTuple):
    """What instances have answered, by their names; *missing*: those of which it is not known.

    An instance that has ended is in neither.
    """

    answers: dict[str, bytes]
    missing: list[str]

    def values(self) -> list[Any]:
        """Return the answers to a question other than `Look`."""
        return [msgspec.msgpack.decode(answer) for answer in self.answers.values() if answer]


class FanOut:
    """Asks other instances by *network*; *secret* returns what all of them know."""

    def __init__(self, network: Network, secret: Callable[[], bytes]) -> None:
        self._network, self._secret = network, secret

    async def look(self, targets: Iterable[str], what: str) -> dict[str, bytes]:
        """Return what those instances say of *what* that answer in time: see `Look`."""
        return (await self.ask(targets, Look(what))).answers

    async def ask(self, targets: Iterable[str], question: Question) -> Answers:
        """Return what the instances *targets* answer to *question*, all within ANSWER_TIMEOUT."""
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

    async def meet(self, name: str) -> None:
        """Do nothing if the instance *name* can be reached, and answers.

        Raises:
            Gone, Unreachable: it cannot.
        """
        await self._ask(name, encode(Greeting(self._secret(), Look(""))))

    async def _ask(self, target: str, line: bytes) -> bytes:
        """Return the answer of *target* to the greeting *line*.

        Raises:
            Gone: as `Network.dial`.
            Unreachable: as that, or there was no answer in time, or not all of it.
        """
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT):
                asking = await self._network.dial(target, Asking)
                try:
                    data = await asking.ask(line)
                finally:
                    asking.close()
        except TimeoutError:
            raise Unreachable(f"no answer in {ANSWER_TIMEOUT:g} s") from None
        if (answer := unframed(data)) is None:
            raise Unreachable("it has broken the connection: its secret or its version is another")
        return answer


class Asking(asyncio.Protocol):
    """The connection of one question."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._transport: asyncio.Transport | None = None
        self._end = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        """Keep a part of the answer."""
        self._data += data
        if len(self._data) > MAX_ANSWER + SIZE:
            self.close()

    def connection_lost(self, _exc: Exception | None) -> None:
        """Note the end of the answer."""
        if not self._end.done():
            self._end.set_result(None)

    async def ask(self, line: bytes) -> bytes:
        """Send *line*, and return all that comes."""
        assert self._transport is not None
        self._transport.write(line)
        await self._end
        return bytes(self._data)

    def close(self) -> None:
        """End the connection at once."""
        if self._transport is not None:
            self._transport.abort()
