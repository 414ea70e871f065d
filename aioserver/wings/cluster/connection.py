"""A connection to the Redis or Valkey server (RESP2, by redis-py), on which calls are answered in
their order.

A pool that repeats calls would be wrong here: a call without an answer may still be carried out
later, when its content is outdated. So there is one connection, owned by one task. A call that is
not answered in time closes the connection, and all other calls under way fail with it. If such a
call arrives at the server afterwards, the script refuses it by its number
(tests/support/renew_script.py). The next connection is made at once at first, then after a pause
that doubles, with jitter, so that not all instances connect at the same time.

Calls under way at the same time are written one behind the other, without a wait between them.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections import deque
from importlib.resources import files
from math import inf
from typing import TYPE_CHECKING, Any

from redis.asyncio.connection import Connection as RedisConnection
from redis.asyncio.connection import parse_url
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    NoPermissionError,
    NoScriptError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)

from aioserver.gateway.contracts.timeouts import timeout

if TYPE_CHECKING:
    from collections.abc import Callable

    from redis.asyncio.connection import AbstractConnection

    Reply = Any

# Seconds that a call may take.
BOUND = 1.0
# The bound of making a connection, with TLS and authentication, as a multiple of BOUND; and the
# first and the longest pause between two attempts. The longest pause, a connection and a call
# together must be shorter than the grace period of a server that comes back (`Times.grace`).
CONNECT, PAUSES = 2.0, (0.05, 0.5)
# The first major version of Redis whose scripts can declare that they write. Every Valkey reports a
# later version.
OLDEST = 7
# The errors after which another connection may find a better server: this one cannot serve writes
# now.
USELESS = ("READONLY", "LOADING", "MASTERDOWN", "CLUSTERDOWN", "NOAUTH")


class CallFailed(Exception):
    """A call has failed, or has no answer; it may have been carried out."""


class AccessDenied(CallFailed):
    """The server refuses the password, is too old, or the user lacks a permission. Another attempt
    does not help.
    """


class Connection:
    """The connection to *url*; `open` it, and `close` it in the end.

    Always: replies come in the order of the calls, and a cancelled call gets no reply. Each call
    ends within *bound* seconds. An error or a log line has the `address` of the server, never a
    password.

    *on_open* is called whenever a connection is made, *on_loss* whenever one is lost.

    Raises:
        ValueError: *url* cannot be used.
    """

    def __init__(
        self,
        url: str,
        *,
        bound: float = BOUND,
        on_open: Callable[[], None] | None = None,
        on_loss: Callable[[CallFailed], None] | None = None,
    ) -> None:
        self._kind, self._options, self.address = _parse(url)
        self._bound = bound
        self._on_open = on_open
        self._on_loss = on_loss
        self._connection: AbstractConnection | None = None
        # The calls under way, in their order.
        self._calls: deque[asyncio.Future[Reply]] = deque()
        self._opened: asyncio.Event = asyncio.Event()
        # Whether the present session had a connection, so that its loss must be reported.
        self._was_open = False
        self._task: asyncio.Task[None] | None = None
        self._session: asyncio.Task[None] | None = None
        self._pause = PAUSES[0] * self._bound
        self._failure = CallFailed(f"{self.address}: not connected yet")
        # The id of the server's process, if it is known. Another process may have an older state.
        self.run = ""
        # When the server last answered anything, by the clock of the event loop.
        self.heard = -inf

    @property
    def connected(self) -> bool:
        """Whether calls are sent at once."""
        return self._opened.is_set()

    async def open(self) -> None:
        """Connect, and connect again whenever the connection is lost.

        Raises:
            AccessDenied: the server refuses the password. No further attempt is made.
            CallFailed: the server cannot be reached. Attempts go on in the background.
        """
        try:
            connection = await self._connect()
        except AccessDenied:
            raise
        except CallFailed:
            self._task = asyncio.create_task(self._run(None))
            raise
        self._task = asyncio.create_task(self._run(connection))
        await self._opened.wait()

    async def close(self) -> None:
        """End the connection; calls under way fail."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def ready(self) -> None:
        """Wait until calls are sent at once.

        Raises:
            CallFailed: there is no connection within the bound; the reason is that of the last
                attempt.
        """
        if self._opened.is_set():
            return
        try:
            async with timeout(self._bound):
                await self._opened.wait()
        except TimeoutError:
            raise self._failure from None

    async def execute(self, *command: bytes | str | float, bound: float | None = None) -> Reply:
        """Return the server's reply to *command*.

        Raises:
            CallFailed: no reply within *bound* seconds, or an error; cancelling it does the same
                as no reply.
        """
        try:
            async with timeout(self._bound if bound is None else bound):
                return await self._call(command)
        except TimeoutError:
            failure = CallFailed(f"{self.address}: no answer within {bound or self._bound} s")
            if not self._opened.is_set():
                failure = self._failure
            self.kill(failure)
            raise failure from None
        except ResponseError as error:
            failure = self._translated(error)
            if _useless(error):
                self.kill(failure)
            raise failure from error

    async def _call(self, command: tuple[bytes | str | float, ...]) -> Reply:
        while (connection := self._connection) is None:
            await self._opened.wait()
        if not connection.is_connected:
            # redis-py would connect again by itself.
            raise CallFailed(f"{self.address}: the connection is lost")
        reply: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._calls.append(reply)
        try:
            # It writes before it waits for anything, so that replies come in the order of
            # `_calls`.
            await connection.send_packed_command(
                connection.pack_command(*command), check_health=False
            )
            return await reply
        except RedisError as error:
            if isinstance(error, ResponseError):
                raise
            failure = self._translated(error)
            self.kill(failure)
            raise failure from error
        except asyncio.CancelledError:
            # A call that is not awaited any more must not be answered either.
            if connection is self._connection and not reply.done():
                self.kill(CallFailed(f"{self.address}: a call was given up"))
            raise

    def kill(self, failure: CallFailed) -> None:
        """End the present connection: each call under way raises *failure*.

        Another one is made.
        """
        self._failure = failure
        if self._connection is not None and self._session is not None:
            self._connection = None
            self._session.cancel()
        self._opened.clear()
        self._fail_calls()

    def _fail_calls(self) -> None:
        calls, self._calls = self._calls, deque()
        for call in calls:
            if not call.done():
                call.set_exception(self._failure)
                # Its caller may have been cancelled.
                call.exception()

    async def _run(self, connection: AbstractConnection | None) -> None:
        while True:
            self._session = asyncio.create_task(self._serve(connection))
            connection = None
            try:
                await asyncio.wait([self._session])
            except asyncio.CancelledError:
                self._failure = CallFailed(f"{self.address}: closed")
                self._session.cancel()
                await asyncio.wait([self._session])
                raise
            finally:
                lost, self._was_open = self._was_open, False
                self._opened.clear()
                self._connection = None
                self._fail_calls()
            if not self._session.cancelled() and isinstance(
                error := self._session.exception(), Exception
            ):
                self._failure = self._translated(error)
            if lost and self._on_loss is not None:
                self._on_loss(self._failure)
            await asyncio.sleep(self._pause * random.uniform(0.5, 1.0))  # noqa: S311 - jitter
            self._pause = min(2 * self._pause, PAUSES[1] * self._bound)

    async def _serve(self, connection: AbstractConnection | None) -> None:
        """Connect, if there is no *connection* yet, and pass its replies on until it is lost."""
        if connection is None:
            connection = await self._connect()
        self._connection = connection
        self.heard = asyncio.get_running_loop().time()
        self._was_open = True
        self._opened.set()
        try:
            if self._on_open is not None:
                self._on_open()
            while True:
                try:
                    reply = await connection.read_response()
                except ResponseError as error:
                    reply = error
                self._pause = PAUSES[0] * self._bound
                self._take(reply)
        finally:
            if self._connection is connection:
                self._connection = None
                self._opened.clear()
            await connection.disconnect(nowait=True)

    def _take(self, reply: Reply) -> None:
        self.heard = asyncio.get_running_loop().time()
        call = self._calls.popleft()
        if call.done():
            return
        if isinstance(reply, ResponseError):
            call.set_exception(reply)
        else:
            call.set_result(reply)

    async def _connect(self) -> AbstractConnection:
        connection = self._kind(**self._options)
        try:
            async with timeout(CONNECT * self._bound):
                await connection.connect()  # type: ignore[no-untyped-call]
                await self._greet(connection)
        except TimeoutError:
            await connection.disconnect(nowait=True)
            seconds = CONNECT * self._bound
            raise CallFailed(f"{self.address}: no connection in {seconds} s") from None
        except (RedisError, OSError) as error:
            await connection.disconnect(nowait=True)
            raise self._translated(error) from error
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        return connection

    async def _greet(self, connection: AbstractConnection) -> None:
        await connection.send_command("INFO", "server", check_health=False)
        try:
            text = (await connection.read_response()).decode()
        except ResponseError:
            # This user may not call INFO.
            text = ""
        facts = dict(line.partition(":")[::2] for line in text.splitlines())
        self.run = facts.get("run_id", "")
        version = facts.get("redis_version", "")
        major = version.partition(".")[0]
        if major.isdigit() and int(major) < OLDEST:
            raise AccessDenied(
                f"{self.address}: it is Redis {version}, and {OLDEST} or later is needed"
            )

    def _translated(self, error: Exception) -> CallFailed:
        if isinstance(error, CallFailed):
            return error
        if isinstance(error.__cause__, RedisError):
            # The error of a UNIX socket's `connect` is wrapped once more.
            error = error.__cause__
        denied = isinstance(error, AuthenticationError | NoPermissionError)
        denied = denied or "ACL failure" in str(error)
        code = getattr(error, "status_code", None)
        text = f"{code} {error}" if code and not str(error).startswith(code) else str(error)
        return (AccessDenied if denied else CallFailed)(f"{self.address}: {text}")


class Script:
    """The script *name* of limits/, in Lua."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.text = (files("aioserver") / "wings/cluster/limits" / name).read_text()
        # The protocol's name for a script.
        self.digest = hashlib.sha1(self.text.encode()).hexdigest()  # noqa: S324


RENEW, BUDGET = Script("renew.lua"), Script("budget.lua")


class ScriptConnection(Connection):
    """A connection that calls scripts, and loads a script if the server does not have it."""

    async def call(self, script: Script, prefix: str, request: bytes, run: str) -> bytes:
        """Return the answer of *script* to *request*, which is meant for the server's process
        *run*.

        Raises:
            CallFailed: as `execute`.
        """
        try:
            return await self._evaluate(script, prefix, request, run)
        except CallFailed as failure:
            if not isinstance(failure.__cause__, NoScriptError):
                raise
        await self.execute("SCRIPT", "LOAD", script.text)
        return await self._evaluate(script, prefix, request, run)

    async def _evaluate(self, script: Script, prefix: str, request: bytes, run: str) -> bytes:
        await self.ready()
        if self.run != run:
            raise CallFailed(f"{self.address}: it is another server now")
        answer: bytes = await self.execute("EVALSHA", script.digest, 1, prefix, request)
        return answer


def _useless(error: ResponseError) -> bool:
    kind = isinstance(error, ReadOnlyError | BusyLoadingError)
    return kind or (getattr(error, "status_code", None) or str(error)).startswith(USELESS)


def _parse(url: str) -> tuple[type[AbstractConnection], dict[str, Any], str]:
    """Return the class and the options of a connection to *url*, and the address without a
    password.
    """
    try:
        options: dict[str, Any] = dict(parse_url(url))
    except ValueError as error:
        # The parts of an address that cannot be read may be those of a password.
        text = str(error) if "connection URL" in str(error) or "schemes" in str(error) else ""
        raise ValueError(text or "not a URL that Redis clients know") from None
    kind = options.pop("connection_class", RedisConnection)
    address = (
        options.get("path") or f"{options.get('host', 'localhost')}:{options.get('port', 6379)}"
    )
    options |= {
        "protocol": 2,
        "decode_responses": False,
        "driver_info": None,
        "health_check_interval": 0,
        "retry": None,
        # All waits are bounded here.
        "socket_timeout": None,
        "socket_connect_timeout": CONNECT * BOUND,
    }
    try:
        kind(**options)
    except TypeError:
        raise ValueError("an option of the URL is not one of a connection") from None
    return kind, options, str(address)
