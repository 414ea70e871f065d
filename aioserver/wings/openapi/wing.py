"""The wing that adds the route of the description."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from aioserver.faces.wing import Routes, Wing
from aioserver.wings.openapi import document

if TYPE_CHECKING:
    from aioserver.faces.context import Context


class OpenapiWing(Wing):
    """The description of the API."""

    name: ClassVar = "openapi"

    async def serve(self, context: Context) -> Routes:
        """Return the route of the description."""
        return Routes(open=document.routes(context))
