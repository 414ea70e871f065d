"""Prompts: chats of the WebSocket and SSE faces as requests to a provider.

A chat with a `text` belongs to a conversation. The history so far is sent before the text. The
text and its answer are appended to it if the answer is complete, or if its client has cancelled it
after some text; otherwise the turn has failed. A chat with `messages` brings its own history, and
nothing is stored. The client's JSON is not changed: a body joins its bytes, our defaults, and the
history.
"""

from __future__ import annotations

import re
import uuid
from typing import TYPE_CHECKING, Any

import orjson

from aioserver.gateway.contracts.histories import Answered
from aioserver.protocol.model_body import OPTIONS
from aioserver.protocol.openai import Reading
from aioserver.providers.request import CHAT, ProviderRequest

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from aioserver.auth.callers import Caller
    from aioserver.config import settings
    from aioserver.gateway.contracts.histories import Asked, Begun, Histories
    from aioserver.gateway.request import Route
    from aioserver.protocol.client_frames import Chat
    from aioserver.providers.request import Answer, Hold
    from aioserver.streams.stream import Stream

_EMPTY = re.compile(rb"\{[ \t\r\n]*\}")


class Prompt:
    """One chat, ready to be sent; the `Keeper` of its turn.

    *conversation_id* is None if it belongs to no conversation.

    Always: *reading* is that of *request*, and has the text that came so far.

    *late* loads the history, if that has to be done first, and returns the question's handle in
    the storage. *sent* holds the sizes of the messages and options that were sent, as soon as they
    are known. *asked* is the question, if it belongs to a conversation.
    """

    __slots__ = (
        "_asked",
        "_begun",
        "_histories",
        "_late",
        "_sent",
        "_text",
        "conversation_id",
        "reading",
        "request",
    )

    def __init__(
        self,
        histories: Histories,
        chat: Chat,
        request: ProviderRequest,
        reading: Reading,
        asked: Asked | None,
        sent: list[int],
        late: Callable[[], Coroutine[Any, Any, Begun | None]] | None = None,
    ) -> None:
        self._asked = asked
        # The question's handle in the storage, from `begin` until its turn is stored.
        self._begun: Begun | None = None
        self._histories = histories
        self._late = late
        self._sent = sent
        self._text = chat.text
        self.request = request
        self.reading = reading
        self.conversation_id = None if asked is None else asked.conversation_id

    @property
    def kept_at(self) -> None:
        """None: any provider gets the history."""

    async def begin(self) -> None:
        """Load the history, if it was not there when the prompt was made."""
        late, self._late = self._late, None
        if late is not None:
            self._begun = await late()

    def identified(self, answer_id: str) -> None:
        """Do nothing: a turn belongs to the id of its conversation."""

    def keep(self, _answer: Stream | Answer) -> Awaitable[None] | None:
        """Append the client's text, and the answer so far, to the conversation, if there is
        one.
        """
        if self._asked is None or self._text is None:
            return None
        share = len(self._text) / max(1, sum(self._sent))
        answered = Answered(
            orjson.loads(self._text),
            self.reading.text,
            self._asked,
            self.reading.usage,
            min(1.0, share),
        )
        begun, self._begun = self._begun, None
        return self._histories.keep(answered, begun)

    def cut(self, stream: Stream) -> Awaitable[None] | None:
        """Append the answer as far as it came, if there is any of it."""
        return self.keep(stream) if self.reading.size else None

    def release(self) -> None:
        """Forget the question, and end all waits for a turn that does not come."""
        asked, self._asked = self._asked, None
        begun, self._begun = self._begun, None
        if asked is not None:
            if begun is not None:
                self._histories.leave(asked, begun)
            self._histories.done(asked)


class Prompts:
    """Makes prompts of chats, by the settings that were applied last."""

    def __init__(
        self, histories: Histories, service: settings.Service, bounds: settings.Streams
    ) -> None:
        self._histories = histories
        self.apply(service, bounds)

    def apply(self, service: settings.Service, bounds: settings.Streams) -> None:
        """Apply new settings; existing prompts stay as they are."""
        self._service, self._bounds = service, bounds

    def make(
        self,
        caller: Caller,
        chat: Chat,
        conversation: str | None,
        route: Route,
        hold: Hold | None = None,
    ) -> Prompt:
        """Return the prompt of *chat*; *conversation* is its own if it names none.

        `Prompt.begin` loads a history that is not here. *hold* counts the bytes of *chat*. A text
        counts until its answer has ended, since it is then stored in the conversation.
        """
        streamed = self._service.streaming.enabled if chat.streaming is None else chat.streaming
        asked: Asked | None = None
        name = ""
        # These are lists of their own, so that the prompt, which lives longer, does not keep the
        # messages.
        held, sent = [chat.messages or b""], [len(chat.options)]
        take_history: Callable[[], Coroutine[Any, Any, Begun | None]] | None = None
        if chat.messages is None:
            assert chat.text is not None
            text, known = chat.text, chat.conversation_id or conversation
            name = known or uuid.uuid4().hex

            def take() -> None:
                held[0] = self._messages(caller, name, text)
                sent.append(len(held[0]))

            async def load() -> Begun | None:
                assert asked is not None
                begun = await self._histories.begin(asked, known=known is not None)
                take()
                return begun

            if self._histories.stored:
                take_history = load
            else:
                take()

        options, option_names = chat.options, chat.option_names

        def body(provider: settings.Provider, model: str | None) -> bytes:
            return chat_body(provider, model, held[0], options, option_names, streamed)

        # A question with `messages` does not need the answer's text for a history.
        kept = self._bounds.max_stream_bytes if chat.messages is None else 0
        reading = Reading(route.provider.settings.choice_index, max_text_bytes=kept)
        request = ProviderRequest(
            CHAT,
            body,
            streamed=streamed,
            caller=caller,
            model=route.model,
            reading=reading,
            hold=hold,
            kept_bytes=len(chat.text or b""),
            client_headers=chat.client_headers,
            size=len(held[0]) + len(chat.text or b"") + len(options),
            allowed=(chat.max_answer or route.provider.settings.max_tokens, chat.choices),
            # UsageAttempt adds them, unless the client has set its own.
            usage_options=b"" if streamed and OPTIONS.name not in option_names else None,
        )
        if name:
            # Last, since it is the prompt that forgets the question.
            asked = self._histories.ask(caller, name)
        return Prompt(self._histories, chat, request, reading, asked, sent, take_history)

    def _messages(self, caller: Caller, conversation_id: str, text: bytes) -> bytes:
        """Return, as JSON, the present messages of a conversation, and *text* after them."""
        history = self._histories.messages(caller, conversation_id, orjson.loads(text))[:-1]
        if self._service.system_prompt:
            history.insert(0, {"role": "system", "content": self._service.system_prompt})
        return _messages(history, text)


def _messages(history: list[dict[str, Any]], text: bytes) -> bytes:
    """Return, as JSON, the messages of *history* and one with *text* after them."""
    before = orjson.dumps(history)[:-1]
    comma = b"," if history else b""
    return b'%b%b{"role":"user","content":%b}]' % (before, comma, text)


def chat_body(
    provider: settings.Provider,
    model: str | None,
    messages: bytes,
    options: bytes,
    option_names: frozenset[str],
    streamed: bool,
) -> bytes:
    """Return the body of a chat completion: *options* replace the provider's defaults.

    *messages* and *options* are JSON, a list and an object; *option_names* are the keys of
    *options* for which there is a default.
    """
    defaults: dict[str, Any] = {
        "model": model or provider.model,
        "temperature": provider.temperature,
        "max_tokens": None if "max_completion_tokens" in option_names else provider.max_tokens,
        "top_p": provider.top_p,
    }
    if streamed:
        defaults["stream"] = True
    fields = {
        name: value
        for name, value in defaults.items()
        if value is not None and name not in option_names
    }
    # The braces between the objects are left out.
    parts: list[bytes | memoryview] = [orjson.dumps(fields)[:-1], b',"messages":', messages]
    if not _EMPTY.fullmatch(options):
        parts += (b",", memoryview(options)[1:-1])
    return b"".join((*parts, b"}"))
