"""What a log holds beside its events: facts about the answer, and how clients come back and leave.

An event touches neither of the two, so that they cost it no look-up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Mapping

    from aioserver.errors import AioserverError


class AnswerDetails:
    """What is known of the answer in a log beside its events.

    *headers* are those of the provider's that clients may see; *usage* has the tokens, as the provider
    reports them; *whole* is an answer that was not streamed, kept for who comes back for it.
    """

    __slots__ = (
        "attempts",
        "conversation_id",
        "headers",
        "model",
        "provider",
        "usage",
        "whole",
    )

    def __init__(self) -> None:
        self.provider = self.model = ""
        self.attempts = 0  # requests sent for it, at all providers
        self.conversation_id: str | None = None
        self.headers: Mapping[str, str] = {}
        self.usage: Mapping[str, Any] | None = None
        self.whole: object = None


class Attachment:
    """What coming back to a log and leaving it need.

    *digest* tells a repeated request from a conflicting one; *alias* is another name by which the
    log is found; *timer* ends the log that has no reader when its window is over. *abandoned* says
    that it was cancelled since nobody read it; *cancel_reason* is the error that a cancelled log ends
    with, None where a reader asked for it.
    """

    __slots__ = ("abandoned", "alias", "cancel_reason", "digest", "timer")

    def __init__(self, digest: bytes) -> None:
        self.digest = digest
        self.alias: str | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.abandoned = False
        self.cancel_reason: AioserverError | None = None
