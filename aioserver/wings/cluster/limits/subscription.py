"""A connection to the Redis or Valkey server for messages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aioserver.wings.cluster.connection import BOUND, Connection

if TYPE_CHECKING:
    from collections.abc import Callable

    from aioserver.wings.cluster.connection import CallFailed


class Subscription(Connection):
    """Messages: each of *handlers* is called with what comes on its channel.

    A message that comes while there is no connection is lost, so *on_open* has to look for what
    was missed.
    """

    def __init__(
        self,
        url: str,
        handlers: dict[str, Callable[[bytes], None]],
        *,
        bound: float = BOUND,
        on_open: Callable[[], None] | None = None,
        on_loss: Callable[[CallFailed], None] | None = None,
    ) -> None:
        super().__init__(url, bound=bound, on_open=on_open, on_loss=on_loss)
        self._handlers = {channel.encode(): handler for channel, handler in handlers.items()}

    async def _greet(self, connection: Any) -> None:
        for channel in list(self._handlers):
            await connection.send_command("SUBSCRIBE", channel, check_health=False)
            await connection.read_response()

    def _take(self, reply: Any) -> None:
        if isinstance(reply, list) and reply[0] == b"message":
            if (handler := self._handlers.get(reply[1])) is not None:
                handler(reply[2])
        elif self._calls:
            super()._take(reply)
