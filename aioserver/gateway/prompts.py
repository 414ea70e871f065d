"""Prompts: chats of the WebSocket and SSE faces as requests to a provider.

A chat with a `text` belongs to a conversation: the history so far is sent before the text, and the
text and its answer are appended to it, as far as the answer came, unless it failed. A chat with
`messages` brings its own history, and none is kept.
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

import orjson

from aioserver.errors import InvalidRequest
from aioserver.protocol.openai import Reading
from aioserver.providers.request import ProviderRequest

if TYPE_CHECKING:
    from aioserver.auth.callers import Caller
    from aioserver.config import settings
    from aioserver.gateway.conversations import Conversations
    from aioserver.gateway.router import Route
    from aioserver.protocol.messages import Chat


class Prompt:
    """One chat, ready to be sent. *conversation_id* is None if it belongs to no conversation.

    Always: *reading* is that of *request*, and so has the text that came so far.
    """

    __slots__ = ("_conversations", "_text", "conversation_id", "reading", "request")

    def __init__(
        self,
        conversations: Conversations,
        chat: Chat,
        request: ProviderRequest,
        reading: Reading,
        conversation_id: str | None,
    ) -> None:
        self._conversations = conversations
        self._text = chat.text
        self.request = request
        self.reading = reading
        self.conversation_id = conversation_id

    def keep(self) -> None:
        """Append the client's text, and the answer so far, to the conversation, if there is one."""
        if self.conversation_id is not None and self._text is not None:
            answer = "".join(self.reading.text)
            self._conversations.keep(self.request.caller, self.conversation_id, self._text, answer)


class Prompts:
    """Makes prompts of chats, by the settings that were applied last."""

    def __init__(
        self, conversations: Conversations, service: settings.Service, bounds: settings.Streams
    ) -> None:
        self._conversations = conversations
        self.apply(service, bounds)

    def apply(self, service: settings.Service, bounds: settings.Streams) -> None:
        """Use these settings from now on; prompts that were made stay as they are."""
        self._service, self._bounds = service, bounds

    def make(self, caller: Caller, chat: Chat, scope: str | None, route: Route) -> Prompt:
        """Return the prompt of *chat*; *scope* is its conversation if it names none.

        The `body` of the prompt's request may raise InvalidRequest: see `chat_body`.
        """
        streamed = self._service.streaming.enabled if chat.streaming is None else chat.streaming
        conversation_id = None
        messages = chat.messages
        if messages is None:
            assert chat.text is not None
            conversation_id = chat.conversation_id or scope or uuid.uuid4().hex
            messages = self._conversations.history(caller, conversation_id, chat.text)
            if self._service.system_prompt:
                system_prompt = {"role": "system", "content": self._service.system_prompt}
                messages = [system_prompt, *messages]

        def body(provider: settings.Provider) -> bytes:
            model = route.model if provider.name == route.provider.name else None
            return chat_body(provider, model, messages, chat.options, streamed)

        reading = Reading(
            route.provider.settings.choice_index, max_text_bytes=self._bounds.max_stream_bytes
        )
        request = ProviderRequest(
            "chat/completions",
            body,
            streamed=streamed,
            caller=caller,
            model=route.model,
            reading=reading,
            client_headers=chat.client_headers,
        )
        return Prompt(self._conversations, chat, request, reading, conversation_id)


def chat_body(
    provider: settings.Provider,
    model: str | None,
    messages: list[dict[str, Any]],
    options: dict[str, Any],
    streamed: bool,
) -> bytes:
    """Return the body of a chat completion: *options* replace the provider's defaults.

    Raises:
        InvalidRequest: the options cannot be written as JSON.
    """
    body: dict[str, Any] = {"model": model or provider.model, "messages": messages}
    defaults: dict[str, Any] = {
        "temperature": provider.temperature,
        "max_tokens": None if "max_completion_tokens" in options else provider.max_tokens,
        "top_p": provider.top_p,
    }
    body |= {name: value for name, value in defaults.items() if value is not None}
    if streamed:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    try:
        return orjson.dumps(body | options)
    except orjson.JSONEncodeError as exc:
        raise InvalidRequest(
            f"the options cannot be written as JSON: {exc}", param="options"
        ) from None
