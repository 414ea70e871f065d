"""The responses that a server has stored, and the conversations that it remembers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aioserver.wings.conversations.wing import ConversationsWing
from aioserver.wings.responses.wing import ResponsesWing

if TYPE_CHECKING:
    from aioserver.auth.callers import Caller
    from aioserver.gateway.contracts.histories import Asked
    from aioserver.limits.shares import ByOwner
    from aioserver.server.app import Server
    from aioserver.wings.conversations.memory import Conversations
    from aioserver.wings.responses.stored import StoredResponses


def stored_in(server: Server) -> StoredResponses:
    """The stored responses of *server*."""
    (wing,) = (wing for wing in server.wings if isinstance(wing, ResponsesWing))
    return wing.stored


def questions_in(server: Server) -> ByOwner[tuple[Caller, str], Asked, None]:
    """The questions of *server* that have no answer yet."""
    (wing,) = (wing for wing in server.wings if isinstance(wing, ConversationsWing))
    return wing._history._asked  # noqa: SLF001 - no snapshot has it


def conversations_in(server: Server) -> Conversations:
    """The conversations that *server* remembers."""
    (wing,) = (wing for wing in server.wings if isinstance(wing, ConversationsWing))
    return wing._history._conversations  # noqa: SLF001 - the simulation looks at its sums
