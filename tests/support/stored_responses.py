"""The responses that a server has stored."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aioserver.wings.responses.wing import ResponsesWing

if TYPE_CHECKING:
    from aioserver.server.app import Server
    from aioserver.wings.responses.stored import StoredResponses


def stored_in(server: Server) -> StoredResponses:
    """The stored responses of *server*."""
    (wing,) = (wing for wing in server.wings if isinstance(wing, ResponsesWing))
    return wing.stored
