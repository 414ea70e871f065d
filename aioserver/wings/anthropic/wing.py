"""Anthropic's Messages API as a wing."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from aioserver.faces.wing import Routes, Wing
from aioserver.wings.anthropic import face

if TYPE_CHECKING:
    from aioserver.faces.context import Context


class AnthropicWing(Wing):
    """`/v1/messages`, for providers that speak it."""

    name: ClassVar = "anthropic"
    endpoints: ClassVar = {"anthropic": "/v1"}

    async def serve(self, context: Context) -> Routes:
        """Return the routes of its face."""
        return Routes(key=face.routes(context))
