"""The bus: messages between instances, over the pub/sub of Redis.

All messages to one instance within a turn of the event loop go out as one publication. A message
may be lost: Redis drops a subscriber that reads too slowly, and the messages for it. A message may
also be late, and then comes after others. The code that sends messages has to notice both
(links.py).

`RedisBus` has two connections: one is subscribed to this instance's channel, the other publishes.
Both are made again, after a short wait, when they break.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Any, Protocol

from aioserver.telemetry.counters import Counter
from aioserver.wings.cluster.answers.peer_messages import Malformed, decode, encode
from aioserver.wings.cluster.connection import CallFailed, Connection
from aioserver.wings.cluster.limits.subscription import Subscription

if TYPE_CHECKING:
    from collections.abc import Callable

    from aioserver.wings.cluster.answers.peer_messages import Message

logger = logging.getLogger("aioserver.cluster")

# Seconds in which Redis must answer; after that the connection is made again.
TIMEOUT = 1.0
# Bytes that may wait to be published. Beyond this limit messages are lost, and readers notice it.
MAX_WAITING = 1 << 25
# Commands that wait for Redis.
MAX_COMMANDS = 10_000


class Bus(Protocol):
    """Messages between instances."""

    name: str

    @property
    def connected(self) -> bool:
        """Whether messages can be sent and received."""

    def send(self, target: str, message: Message) -> None:
        """Send *message* to the instance *target*, with all others of this turn of the event
        loop.
        """


class MakeBus(Protocol):
    """Makes the bus of this instance; *on_message* and *on_deaf*: see `RedisBus`."""

    def __call__(
        self, *, on_message: Callable[[str, Message], None], on_deaf: Callable[[str], None]
    ) -> Bus:
        """Return the bus."""


def channel_of(prefix: str, name: str) -> str:
    """Return the channel on which the instance *name* receives messages.

    *prefix* is that of the cluster's keys.
    """
    return f"{prefix}i:{name}:streams"


class Outbox:
    """Messages that wait, by target, until the turn of the event loop ends."""

    def __init__(self, name: str, publish: Callable[[str, bytes], None]) -> None:
        self._name = name
        self._publish = publish
        self._loop = asyncio.get_running_loop()
        self._messages: dict[str, list[Message]] = {}

    def put(self, target: str, message: Message) -> None:
        """Send *message* to *target* at the end of this turn."""
        if not self._messages:
            self._loop.call_soon(self._flush)
        self._messages.setdefault(target, []).append(message)

    def _flush(self) -> None:
        pending, self._messages = self._messages, {}
        for target, messages in pending.items():
            for data in encode(self._name, messages):
                self._publish(target, data)


class RedisCommands:
    """A connection for commands whose callers may stop waiting for the answers.

    Always: commands are carried out in the order of the calls, each at most once.
    """

    def __init__(self, url: str) -> None:
        self._connection = Connection(url, bound=TIMEOUT)
        self._loop = asyncio.get_running_loop()
        self._asked: set[asyncio.Task[Any]] = set()
        self._opening = self._loop.create_task(_open(self._connection))

    @property
    def connected(self) -> bool:
        """Whether commands are carried out."""
        return self._connection.connected

    def ask(self, *args: bytes | str | float) -> asyncio.Future[Any]:
        """Return the future answer to a command."""
        if len(self._asked) >= MAX_COMMANDS:
            refused: asyncio.Future[Any] = self._loop.create_future()
            refused.set_exception(CallFailed("too many commands wait for the server"))
            return refused
        answer = self._loop.create_task(self._connection.execute(*args))
        self._asked.add(answer)
        answer.add_done_callback(self._answered)
        return answer

    async def execute(self, *args: bytes | str | float) -> Any:
        """Return the answer to a command. Cancelling it only ends the wait.

        Raises:
            CallFailed: there is no answer within TIMEOUT, or an error.
        """
        return await asyncio.shield(self.ask(*args))

    async def close(self) -> None:
        """Close the connection; commands without an answer get none."""
        self._opening.cancel()
        for asked in tuple(self._asked):
            asked.cancel()
        await asyncio.wait((self._opening, *self._asked))
        await self._connection.close()

    def _answered(self, answer: asyncio.Task[Any]) -> None:
        self._asked.discard(answer)
        if not answer.cancelled():
            # The asking task may not wait any more.
            answer.exception()


class RedisBus:
    """The bus over Redis: see `Bus`.

    *prefix* is that of the cluster's keys; *commands* publishes, and *url* is subscribed to.

    *on_message* is called with each message and its sender. *on_deaf* is called with the name of an
    instance if no process has received the messages to it.
    """

    def __init__(
        self,
        commands: RedisCommands,
        url: str,
        prefix: str,
        name: str,
        *,
        on_message: Callable[[str, Message], None],
        on_deaf: Callable[[str], None],
    ) -> None:
        self.name = name
        self._on_message, self._on_deaf = on_message, on_deaf
        # Publications that could not be decoded, and messages that were lost as too many waited.
        self.malformed, self.lost = Counter(), Counter()
        self._prefix = prefix
        self._commands = commands
        self._subscription = Subscription(
            url,
            {channel_of(prefix, name): self._receive},
            bound=TIMEOUT,
            on_loss=lambda failure: logger.warning(
                "messages of other instances are not received: %s", failure
            ),
        )
        self._outbox = Outbox(name, self._publish)
        self._waiting = 0
        self._opening = asyncio.get_running_loop().create_task(_open(self._subscription))

    @property
    def connected(self) -> bool:
        """Whether messages come and go."""
        return self._subscription.connected and self._commands.connected

    def send(self, target: str, message: Message) -> None:
        """Send *message* to the instance *target*, with all others of this turn of the event
        loop.
        """
        self._outbox.put(target, message)

    async def close(self) -> None:
        """Stop receiving messages."""
        self._opening.cancel()
        await asyncio.wait((self._opening,))
        await self._subscription.close()

    def _publish(self, target: str, data: bytes) -> None:
        if self._waiting + len(data) > MAX_WAITING:
            self.lost.value += 1
            return
        self._waiting += len(data)

        def published(answer: asyncio.Future[Any]) -> None:
            self._waiting -= len(data)
            # A failed command has been noticed already: the connection is made again.
            if not answer.cancelled() and answer.exception() is None and answer.result() == 0:
                self._on_deaf(target)

        answer = self._commands.ask("PUBLISH", channel_of(self._prefix, target), data)
        answer.add_done_callback(published)

    def _receive(self, data: bytes) -> None:
        try:
            publication = decode(data)
        except Malformed:
            self.malformed.value += 1
            return
        for message in publication.messages:
            self._on_message(publication.sender, message)


async def _open(connection: Connection) -> None:
    # The connection keeps trying in the background.
    with contextlib.suppress(CallFailed):
        await connection.open()
