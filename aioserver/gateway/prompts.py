"""A chat of the WebSocket and SSE faces as what is asked of a provider, with its conversation.

In front of a `text` goes what was said before; the answer is kept behind it, as far as it came, unless it
failed. A chat with `messages` brings its own past and leaves none.
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

from aioserver.gateway.bodies import chat_body
from aioserver.protocol.openai import Reading
from aioserver.providers.request import Ask

if TYPE_CHECKING:
    from aioserver.auth.callers import Caller
    from aioserver.config import settings
    from aioserver.gateway.conversations import Conversations
    from aioserver.gateway.router import Route
    from aioserver.protocol.messages import Chat


class Question:
    """One chat, ready to be asked. *conversation_id*: None where it has none."""

    __slots__ = ("_chat", "_conversations", "ask", "conversation_id")

    def __init__(
        self, conversations: Conversations, chat: Chat, ask: Ask, conversation_id: str | None
    ) -> None:
        self._conversations = conversations
        self._chat = chat
        self.ask = ask
        self.conversation_id = conversation_id

    def keep(self) -> None:
        """Keep the turn: the text, and what was answered so far."""
        text, reading = self._chat.text, self.ask.reading
        if self.conversation_id is not None and text is not None and reading is not None:
            answer = "".join(reading.text)
            self._conversations.keep(self.ask.caller, self.conversation_id, text, answer)


class Questions:
    """Makes questions of chats."""

    def __init__(
        self, conversations: Conversations, service: settings.Service, bounds: settings.Streams
    ) -> None:
        self._conversations = conversations
        self.apply(service, bounds)

    def apply(self, service: settings.Service, bounds: settings.Streams) -> None:
        """Make them by these settings from now on."""
        self._service, self._bounds = service, bounds

    def make(self, caller: Caller, chat: Chat, scope: str | None, route: Route) -> Question:
        """What *chat* asks; *scope* names the conversation where it names none."""
        streamed = self._service.streaming.enabled if chat.streaming is None else chat.streaming
        conversation_id = None
        messages = chat.messages
        if messages is None:
            assert chat.text is not None
            conversation_id = chat.conversation_id or scope or uuid.uuid4().hex
            messages = self._conversations.history(caller, conversation_id, chat.text)
            if self._service.system_prompt:
                prompt = {"role": "system", "content": self._service.system_prompt}
                messages = [prompt, *messages]

        def body(provider: settings.Provider) -> bytes:
            model = route.model if provider.name == route.provider.name else None
            return chat_body(provider, model, messages, chat.options, streamed)

        ask = Ask(
            "chat/completions",
            body,
            streamed,
            caller=caller,
            model=route.model,
            frames=True,
            reading=Reading(
                route.provider.settings.choice_index, max_text_bytes=self._bounds.max_stream_bytes
            ),
        )
        return Question(self._conversations, chat, ask, conversation_id)
