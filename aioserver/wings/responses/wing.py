"""OpenAI's Responses API as a wing: by HTTP, by id, and over WebSocket."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from aioserver.faces.wing import Routes, Wing
from aioserver.wings.responses import face, socket
from aioserver.wings.responses.api import RESPONSES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aioserver.faces.context import Context
    from aioserver.providers.api import Api


class ResponsesWing(Wing):
    """`/v1/responses`, for every provider."""

    name: ClassVar = "responses"

    def apis(self) -> Sequence[Api]:
        """Return the API of providers."""
        return (RESPONSES,)

    async def serve(self, context: Context) -> Routes:
        """Return the routes of its faces."""
        return Routes(websockets=socket.routes(context), key=face.routes(context))
