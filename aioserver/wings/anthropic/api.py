"""Anthropic's Messages API as providers speak it: its headers, its usage, and its errors, which
clients get as they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from aioserver.protocol.openai import bounded, usage_of
from aioserver.providers.request import Api, WordlessApi
from aioserver.wings.anthropic import sink, wire
from aioserver.wings.anthropic.path import MessagePath
from aioserver.wings.anthropic.transcript import MessagesTranscript

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aioserver.config import settings
    from aioserver.errors import AioserverError
    from aioserver.streams.cursor import Cursor
    from aioserver.streams.fast_path import Destination
    from aioserver.streams.stream import Stream

HOST = "anthropic.com"


class MessagesApi(Api):
    """One of the paths of Anthropic's Messages API."""

    name = "Anthropic's Messages API"
    setting = "messages"
    headers: ClassVar = {wire.VERSION_HEADER: wire.VERSION}
    paces_cached = False
    bounds = ("max_tokens",)
    parts = wire.PARTS

    def speaks(self, provider: settings.Provider) -> bool:
        """Return whether a provider with these settings has this API."""
        return provider.messages is not False

    def key_headers(self, host: str, key: str) -> dict[str, str]:
        """Return the headers that present *key*.

        Anthropic accepts only `x-api-key`; engines that speak Messages accept this or
        `Authorization`.
        """
        own = {"x-api-key": key}
        anthropic = host == HOST or host.endswith(f".{HOST}")
        return own if anthropic else super().key_headers(host, key) | own

    def sink(self, stream: Stream) -> sink.MessageSink:
        """Return the sink that fills *stream* with the events of a message."""
        return sink.MessageSink(stream, self.content)

    def fast_path(self, cursor: Cursor, destination: Destination) -> MessagePath | None:
        """Return the path by which events go from *cursor* to *destination*.

        None if there is none.
        """
        return MessagePath(cursor, destination) if destination.chunked else None

    def content(self, event: bytes) -> bool:
        """Return whether an event of a streamed message is content, and not only a preamble."""
        return wire.is_content(event)

    def events(self) -> wire.MessageErrors:
        """Return the form of the errors between the events of a message."""
        return wire.MessageErrors()

    def check_status(
        self, provider: str, status: int, headers: Mapping[str, str], body: bytes
    ) -> None:
        """Raise the fault for the *status* of an answer of *provider*.

        Raises:
            ProviderFault: the status is not in 200 to 299.
        """
        sink.check_status(provider, status, headers, body)

    def usage(self, content: object) -> Mapping[str, Any] | None:
        """Return the tokens that *content*, a whole answer, reports; None if it reports none."""
        usage = usage_of(content)
        return usage and bounded(wire.with_total(wire.billed(usage)))

    def http_status(self, error: AioserverError) -> int:
        """Return the HTTP status of *error* for a client of this API."""
        return wire.http_status(error)


class CountingApi(WordlessApi, MessagesApi):
    """The path that counts the tokens of a request, and generates no answer."""

    costs = False


class AnswersApi(MessagesApi):
    """The path whose answers are messages, which can be continued."""

    continues = MessagesTranscript


MESSAGES, COUNT_TOKENS = AnswersApi(wire.MESSAGES), CountingApi(wire.COUNT_TOKENS)
