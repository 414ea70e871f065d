"""What became of one request at its providers: one object, to which its record, its log, its
answer and its error refer.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

NO_HEADERS: Mapping[str, str] = MappingProxyType({})


class Outcome:
    """The provider that was asked last, and what is known of its answer.

    Always: it is written by the router and its attempts alone; where the answer is another
    instance's, by the facts that come from there. If the request has failed, it is about the
    attempt whose fault is raised.

    *attempts* counts the requests that were sent, at all providers, and the one that is under way.
    *sent*: one was sent, so that the answer may cost money; *sent_at* is the monotonic time when
    the newest was, 0.0 if it was not. *headers* are those of the provider's answer that clients
    may see, *usage* its tokens, as the provider reports them, until the request is logged.
    """

    __slots__ = ("attempts", "headers", "model", "provider", "sent", "sent_at", "usage")

    def __init__(
        self,
        provider: str = "",
        model: str = "",
        attempts: int = 0,
        headers: Mapping[str, str] = NO_HEADERS,
    ) -> None:
        self.provider = provider
        self.model = model
        self.attempts = attempts
        self.headers = headers
        self.sent = False
        self.sent_at = 0.0
        self.usage: Mapping[str, Any] | None = None

    def begin_attempt(self, provider: str, model: str) -> None:
        """Note that *provider* is asked for an answer of *model*."""
        self.provider, self.model = provider, model
        self.attempts += 1
        self.headers, self.sent_at, self.usage = NO_HEADERS, 0.0, None
