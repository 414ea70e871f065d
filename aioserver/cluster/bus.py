"""The bus: messages between instances, over the pub/sub of Redis.

What is sent to one instance within a turn of the event loop goes out as one publication. A message may be
lost: Redis drops a subscriber that reads too slowly, and forgets what it was sent. It may be late, too,
and then comes after others. Who sends messages has to notice both (links.py).

`RedisBus` has two connections: one is subscribed to this instance's channel, the other publishes. Both are made
again, after a short wait, when they break.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Any, Protocol

from redis.asyncio import ConnectionPool
from redis.exceptions import RedisError

from aioserver.cluster.messages import Malformed, decode, encode
from aioserver.telemetry.counters import Counter

if TYPE_CHECKING:
    from collections.abc import Callable

    from redis.asyncio.connection import AbstractConnection

    from aioserver.cluster.messages import Message

logger = logging.getLogger("aioserver.cluster")

# Seconds in which Redis answers: more, and its connection is made again.
TIMEOUT = 1.0
# Seconds before a broken connection is made again, doubling up to the second number.
MIN_PAUSE, MAX_PAUSE = 0.05, 1.0
# Bytes that wait to be published; beyond, messages are lost, which their readers notice.
MAX_WAITING = 1 << 25
# Commands that wait for Redis.
MAX_COMMANDS = 10_000


class Unreachable(Exception):
    """Redis does not answer."""


class Commands(Protocol):
    """A connection to Redis."""

    async def execute(self, *args: bytes | str | float) -> Any:
        """Return the answer to one command; those of one connection are carried out in their order.

        Raises:
            Exception: Redis is away, or refuses the command.
        """


class Bus(Protocol):
    """Messages between instances.

    *on_message* is called with each message and its sender, *on_deaf* with an instance that nobody is: what was
    sent to it has reached no one.
    """

    name: str
    on_message: Callable[[str, Message], None]
    on_deaf: Callable[[str], None]

    @property
    def connected(self) -> bool:
        """Whether messages come and go."""

    def send(self, target: str, message: Message) -> None:
        """Send *message* to the instance *target*, with all others of this turn of the event loop."""


def channel_of(prefix: str, name: str) -> str:
    """Return the channel on which the instance *name* hears others; *prefix* is that of the cluster's keys."""
    return f"{prefix}i:{name}:streams"


class Outbox:
    """What is to be sent, by target, until the turn of the event loop ends."""

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
    """One connection to Redis: what is asked within a turn goes out together.

    Always: commands are carried out in the order in which they were asked, each at most once.
    """

    def __init__(self, pool: ConnectionPool) -> None:
        self._pool = pool
        self._loop = asyncio.get_running_loop()
        self._asked: list[tuple[tuple[Any, ...], asyncio.Future[Any]]] = []
        self._wake = asyncio.Event()
        # Whether the connection is likely to be broken: it is made again before anything is asked.
        self._stale = False
        self._task = self._loop.create_task(self._run())
        self.connected = False

    def ask(self, *args: bytes | str | float) -> asyncio.Future[Any]:
        """Return the future answer to a command."""
        answer: asyncio.Future[Any] = self._loop.create_future()
        if len(self._asked) >= MAX_COMMANDS or self._task.done():
            answer.set_exception(Unreachable("too many commands wait for Redis"))
        else:
            self._asked.append((args, answer))
            self._wake.set()
        return answer

    async def execute(self, *args: bytes | str | float) -> Any:
        """Return the answer to a command.

        Raises:
            Unreachable: Redis does not answer.
            RedisError: it refuses the command.
        """
        return await self.ask(*args)

    def distrust(self) -> None:
        """Make the connection again: another one to the same server broke just now."""
        self._stale = True
        self._wake.set()

    async def close(self) -> None:
        """End the connection; what waits for an answer gets none."""
        self._task.cancel()
        await asyncio.wait((self._task,))
        self._fail(self._asked, Unreachable("the connection is closed"))

    async def _run(self) -> None:
        pause = MIN_PAUSE
        while True:
            connection = self._pool.make_connection()  # type: ignore[no-untyped-call]
            try:
                async with asyncio.timeout(TIMEOUT):
                    await connection.connect()
                self.connected, self._stale, pause = True, False, MIN_PAUSE
                while True:
                    await self._wake.wait()
                    if self._stale:
                        break
                    self._wake.clear()
                    await self._exchange(connection)
            except (OSError, RedisError, TimeoutError) as exc:
                asked, self._asked = self._asked, []
                self._fail(asked, Unreachable(f"Redis does not answer: {exc!r}"))
            finally:
                self.connected = False
                await _disconnect(connection)
            if self._stale:
                self._stale = False
                continue
            await asyncio.sleep(pause)
            pause = min(2 * pause, MAX_PAUSE)

    async def _exchange(self, connection: AbstractConnection) -> None:
        asked, self._asked = self._asked, []
        try:
            async with asyncio.timeout(TIMEOUT):
                commands = connection.pack_commands([args for args, _answer in asked])
                await connection.send_packed_command(b"".join(commands))
                for _args, answer in asked:
                    reply = await connection.read_response(push_request=False)
                    if not answer.done():
                        if isinstance(reply, Exception):
                            answer.set_exception(reply)
                        else:
                            answer.set_result(reply)
        except BaseException as exc:
            self._fail(asked, Unreachable(f"Redis does not answer: {exc!r}"))
            raise

    @staticmethod
    def _fail(asked: list[tuple[tuple[Any, ...], asyncio.Future[Any]]], error: Exception) -> None:
        for _args, answer in asked:
            if not answer.done():
                answer.set_exception(error)


class RedisBus:
    """The bus over Redis: see `Bus`. *prefix* is that of the cluster's keys."""

    def __init__(self, url: str, prefix: str, name: str) -> None:
        self.name = name
        self.on_message: Callable[[str, Message], None] = lambda _sender, _message: None
        self.on_deaf: Callable[[str], None] = lambda _target: None
        # Publications that were none, and messages that were lost since too many waited.
        self.malformed, self.lost = Counter(), Counter()
        self._prefix = prefix
        self._pool: ConnectionPool = ConnectionPool.from_url(
            url, protocol=2, socket_timeout=None, health_check_interval=0
        )
        self.commands = RedisCommands(self._pool)
        self._outbox = Outbox(name, self._publish)
        self._waiting = 0
        self._subscribed = False
        self._listener = asyncio.get_running_loop().create_task(self._listen())

    @property
    def connected(self) -> bool:
        """Whether messages come and go."""
        return self._subscribed and self.commands.connected

    def send(self, target: str, message: Message) -> None:
        """Send *message* to the instance *target*, with all others of this turn of the event loop."""
        self._outbox.put(target, message)

    async def close(self) -> None:
        """Hear and say nothing any more."""
        self._listener.cancel()
        await asyncio.wait((self._listener,))
        await self.commands.close()

    def _publish(self, target: str, data: bytes) -> None:
        if self._waiting + len(data) > MAX_WAITING:
            self.lost.value += 1
            return
        self._waiting += len(data)

        def published(answer: asyncio.Future[Any]) -> None:
            self._waiting -= len(data)
            # A command that has failed was told already: the connection is made again.
            if not answer.cancelled() and answer.exception() is None and answer.result() == 0:
                self.on_deaf(target)

        answer = self.commands.ask("PUBLISH", channel_of(self._prefix, target), data)
        answer.add_done_callback(published)

    async def _listen(self) -> None:
        pause = MIN_PAUSE
        while True:
            connection = self._pool.make_connection()  # type: ignore[no-untyped-call]
            try:
                async with asyncio.timeout(TIMEOUT):
                    await connection.connect()
                    await connection.send_command("SUBSCRIBE", channel_of(self._prefix, self.name))
                    await connection.read_response()
                self._subscribed, pause = True, MIN_PAUSE
                while True:
                    reply = await connection.read_response(timeout=None)
                    if isinstance(reply, list) and len(reply) == 3 and reply[0] == b"message":
                        self._receive(reply[2])
            except (OSError, RedisError, TimeoutError) as exc:
                self.commands.distrust()
                logger.warning("messages of other instances are not heard: %r", exc)
            finally:
                self._subscribed = False
                await _disconnect(connection)
            await asyncio.sleep(pause)
            pause = min(2 * pause, MAX_PAUSE)

    def _receive(self, data: object) -> None:
        try:
            publication = decode(data if isinstance(data, bytes) else b"")
        except Malformed:
            self.malformed.value += 1
            return
        for message in publication.messages:
            self.on_message(publication.sender, message)


async def _disconnect(connection: AbstractConnection) -> None:
    with contextlib.suppress(OSError, RedisError):
        await connection.disconnect(nowait=True)
