"""OpenAI's Responses API as a wing: by HTTP, by id, and over WebSocket."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, ClassVar

from aioserver.faces.wing import Routes, Wing
from aioserver.wings.responses import face, socket
from aioserver.wings.responses.api import RESPONSES
from aioserver.wings.responses.redis import SharedResponses
from aioserver.wings.responses.stored import StoredResponses

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AsyncExitStack

    from aioserver.config.settings import Settings
    from aioserver.faces.context import Context
    from aioserver.faces.wing import Core
    from aioserver.providers.request import Api


class ResponsesWing(Wing):
    """`/v1/responses`, for every provider."""

    name: ClassVar = "responses"
    stored: StoredResponses

    def apis(self) -> Sequence[Api]:
        """Return the API of providers."""
        return (RESPONSES,)

    async def open(self, core: Core, stack: AsyncExitStack) -> None:
        """Make the store of responses, and find that of all instances."""
        storage = None
        if core.commands is not None:
            storage = SharedResponses(core.commands, scheduler=core.scheduler)
            stack.push_async_callback(storage.close)
        window = core.settings.chat.streams.store_window
        self.stored = StoredResponses(core.streams, window, storage)
        stack.callback(self.stored.close)

    async def serve(self, context: Context) -> Routes:
        """Return the routes of its faces."""
        stored = self.stored
        return Routes(websockets=socket.routes(context, stored), key=face.routes(context, stored))

    def prepare(self, settings: Settings) -> Callable[[], None]:
        """Return the function that uses another window."""
        return partial(self.stored.apply, settings.chat.streams.store_window)
