"""Anthropic's Messages API as a wing."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from aioserver.faces.wing import Routes, Wing
from aioserver.wings.anthropic import face
from aioserver.wings.anthropic.api import COUNT_TOKENS, MESSAGES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aioserver.faces.context import Context
    from aioserver.faces.form import Form
    from aioserver.providers.request import Api


class AnthropicWing(Wing):
    """`/v1/messages`, for providers that speak it."""

    name: ClassVar = "anthropic"
    endpoints: ClassVar = {"anthropic": "/v1"}

    def forms(self) -> Sequence[Form]:
        """Return the form of errors and model lists."""
        return (face.MessagesForm(),)

    def apis(self) -> Sequence[Api]:
        """Return the APIs of providers."""
        return MESSAGES, COUNT_TOKENS

    async def serve(self, context: Context) -> Routes:
        """Return the routes of its face."""
        return Routes(key=face.routes(context))
