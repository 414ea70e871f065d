"""The chunks of a chat completion as the events of a response.

    response.created, response.in_progress          with the first content
    for each item
        response.output_item.added
            response.content_part.added             for each part of a message or of reasoning
            response.output_text.delta …            for each text; also refusal, reasoning_text
            response.output_text.done
            response.content_part.done
            response.function_call_arguments.delta … .done          or, in one piece,
            response.custom_tool_call_input.delta, .done
        response.output_item.done
    response.completed, or response.incomplete      at the end, when the usage is known

Reasoning ends where the message begins, and the message where a call begins. Calls stay open until
the end, since providers may send the pieces of several in turns; so no argument comes too late for
its item.

A chunk is read as for the faces that show frames (`protocol.openai.Reading`): halves of characters
are joined, only one choice counts, an error object ends the answer.

This file is one concept: a response as it is written, from its first event to its last.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson

from aioserver.protocol.bridging import chunks
from aioserver.protocol.bridging.chunks import ITEM_BYTES, ChunkReader, DeltaText
from aioserver.wings.responses.bridge.output import (
    COMPLETED,
    DELTA,
    IN_PROGRESS,
    INCOMPLETE,
    REASONING,
    REASONS,
    REFUSAL,
    TEXT,
    Call,
    Message,
    Part,
    Reasoning,
    usage_object,
    written_logprobs,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aioserver.wings.responses.bridge.output import Frame
    from aioserver.wings.responses.bridge.request import ChatRequest

# The events that open a response.
OPENING_EVENTS = 2


class ResponseWriter(ChunkReader[Call]):
    """Reads the chunks of one answer, or a whole answer, and writes the response.

    *frame* is that of the response, *request* the request that was sent to the provider. All kept
    texts have at most *max_bytes*: the last event repeats them all.

    Always: `sequence` is the number of events that were written, the opening ones included; an
    item is written to only while it is in `_open`.
    """

    __slots__ = (
        "_asked_tokens",
        "_frame",
        "_items",
        "_message",
        "_name",
        "_open",
        "_part",
        "_plain_part",
        "_reasoning",
        "_tools",
        "sequence",
    )

    def __init__(self, request: ChatRequest, frame: Frame, max_bytes: int) -> None:
        super().__init__(max_bytes, frame.size, logprobs=request.logprobs)
        self._frame = frame
        self._tools = request.tools
        self._asked_tokens = request.asked_tokens
        self._name = frame.id.removeprefix("resp_")
        # The number of the next event; the first two are those of `begin`, unless it has begun
        # before.
        self.sequence = frame.opened or OPENING_EVENTS
        self._items: list[Message | Call] = []
        # The items that are not done, in order.
        self._open: list[Message | Call] = []
        # The message and the reasoning that are being written, and the current part of either.
        self._message: Message | None = None
        self._reasoning: Reasoning | None = None
        self._part: Part | None = None
        # That part, if only text of it can come.
        self._plain_part: Part | None = None

    @property
    def plain(self) -> bool:
        """Whether `add_text` may be used: only a text is under way or wanted."""
        return self._plain_part is not None and not self.half

    @property
    def response_id(self) -> str:
        """The id of the response."""
        return self._frame.id

    @property
    def begun(self) -> bool:
        """Whether any part of an answer has come."""
        return bool(self._items)

    @property
    def transcript(self) -> str | None:
        """The text of the message that is under way, empty if nothing but reasoning was shown;
        None if there is more.
        """
        message, part = self._message, self._part
        others = [item for item in self._items if not isinstance(item, Reasoning)]
        if self._nameless or self.finish_reason is not None:
            return None
        if not others:
            return ""
        if (
            message is None
            or others != [message]
            or part is None
            or part.kind is not TEXT
            or len(message.parts) != 1
        ):
            return None
        text: str = orjson.loads(b'"%b"' % bytes(part.text))
        return text

    def begin(self) -> list[bytes]:
        """Return the events that precede those of any chunk: none, if they are already
        in the log.
        """
        if self._frame.opened:
            return []
        response = b'"response":%b' % self._frame.render(IN_PROGRESS)
        kinds = enumerate((b"created", IN_PROGRESS))
        return [_written(kind, number, response) for number, kind in kinds]

    def name_model(self, name: str) -> None:
        """Take over the *name* of the model that answers."""
        self._frame.model = name

    def add_text(self, text: bytes) -> bytes:
        """Return the event of a *text*, escaped, where `plain` is true.

        Raises:
            BadEvent: the answer is too long.
        """
        part = self._plain_part
        assert part is not None, "asked for by `plain`"
        self._size = size = self._size + len(text)
        if size > self._max_bytes:
            self._grow(0)
        part.text += text
        sequence = self.sequence
        self.sequence = sequence + 1
        self.texts += 1
        return DELTA % (part.head, text, sequence)

    def finish(self, now: int) -> list[bytes]:
        """Return the events that end the response, at the time *now*.

        Raises:
            BadEvent: a call has no name.
        """
        events: list[bytes] = []
        self._complete(events)
        status = INCOMPLETE if self.finish_reason in REASONS else COMPLETED
        for item in self._open:
            # Only the newest item can have been cut.
            events += self._ending(item, status if item is self._items[-1] else COMPLETED)
        self._open.clear()
        events.append(self._event(status, b'"response":%b' % self.response(now)))
        return events

    def _complete(self, events: list[bytes]) -> None:
        if not self._items:
            # Clients read the first item, so there must be one.
            self._say(TEXT, b"", events)
        self._check_named()

    def _fill(self, call: Call, events: list[bytes]) -> None:
        """Give a *call* without arguments an empty object, since clients parse it."""
        if not call.text and not call.custom:
            self._argue(call, "{}", events)

    def response(self, now: int) -> bytes:
        """Return the response object, at the time *now* of its end."""
        reason = REASONS.get(self.finish_reason or "", "")
        status = INCOMPLETE if reason else COMPLETED
        answered_bytes = self._size - self._frame.size - self._overhead
        usage = usage_object(self.usage, self._asked_tokens, answered_bytes)
        output = b",".join([item.render(COMPLETED) for item in self._items[:-1]])
        if self._items:
            last = self._items[-1].render(status)
            output = b"%b,%b" % (output, last) if output else last
        completed_at = None if reason else now
        return self._frame.render(
            status, output, usage=usage, reason=reason, completed_at=completed_at
        )

    def _speak(self, piece: DeltaText, choice: Mapping[str, Any], events: list[bytes]) -> None:
        escaped = orjson.dumps(piece.text)[1:-1]
        if piece.kind is chunks.REASONING:
            self._think(escaped, events)
        elif piece.kind is chunks.REFUSAL:
            self._say(REFUSAL, escaped, events)
        else:
            self._say(TEXT, escaped, events, choice.get("logprobs") if self.logprobs else None)

    def _think(self, text: bytes, events: list[bytes]) -> None:
        """Add *text*, escaped, to the reasoning."""
        if self._reasoning is None:
            self._close(self._message, events)
            self._reasoning = Reasoning(self._next_name(), len(self._items))
            self._begin(self._reasoning, events)
            self._begin_part(self._reasoning, REASONING, events)
        self._add(text, events)

    def _say(self, kind: bytes, text: bytes, events: list[bytes], logprobs: object = None) -> None:
        """Add *text*, escaped, to the message: to its text or to its refusal, as *kind* says."""
        self._close(self._reasoning, events)
        message = self._message
        if message is None:
            message = self._message = Message(self._next_name(), len(self._items))
            self._begin(message, events)
        if self._part is None or self._part.kind is not kind:
            events += self._part_ending()
            self._begin_part(message, kind, events)
        self._add(text, events, logprobs)

    def _add(self, text: bytes, events: list[bytes], logprobs: object = None) -> None:
        part = self._part
        assert part is not None, "begun by the callers"
        self._grow(len(text))
        part.text += text
        plain = b""
        if isinstance(logprobs, dict):
            own, plain = written_logprobs(logprobs.get("content"))
            self._grow(len(own) + len(plain))
            part.add_logprobs(own, plain)
        if text:
            self.texts += part.kind is TEXT
            events.append(part.delta(text, self.sequence, plain))
            self.sequence += 1

    def _begin_call(self, name: str, provider_id: str, events: list[bytes]) -> Call:
        self._close(self._reasoning, events)
        self._close(self._message, events)
        call = Call(self._tools.find(name), self._next_name(), len(self._items), provider_id)
        self._begin(call, events)
        return call

    def _argue(self, call: Call, arguments: str, events: list[bytes]) -> None:
        if not arguments:
            return
        text = orjson.dumps(arguments)[1:-1]
        self._grow(len(text))
        call.text += text
        if not call.custom:
            delta = b'%b,"delta":"%b"' % (call.place, text)
            events.append(self._event(b"function_call_arguments.delta", delta))

    def _begin(self, item: Message | Call, events: list[bytes]) -> None:
        self._grow(0, ITEM_BYTES)
        self._items.append(item)
        self._open.append(item)
        added = b'"output_index":%d,"item":%b' % (item.index, item.render(IN_PROGRESS))
        events.append(self._event(b"output_item.added", added))

    def _begin_part(self, message: Message, kind: bytes, events: list[bytes]) -> None:
        self._grow(0, ITEM_BYTES)
        self._part = part = message.add_part(kind)
        self._plain_part = part if kind is TEXT and not self.logprobs else None
        added = b'%b,"part":%b' % (part.place, part.render())
        events.append(self._event(b"content_part.added", added))

    def _close(self, item: Message | None, events: list[bytes]) -> None:
        """End *item*, the message or the reasoning that is under way, if there is one."""
        if item is not None:
            events += self._ending(item, COMPLETED)
            self._open.remove(item)

    def _ending(self, item: Message | Call, status: bytes) -> list[bytes]:
        """Return the events that end *item*, with a *status*."""
        events: list[bytes] = []
        if isinstance(item, Call):
            if item.custom:
                text = item.input
                if text:
                    delta = b'%b,"delta":"%b"' % (item.place, text)
                    events.append(self._event(b"custom_tool_call_input.delta", delta))
                done = b'%b,"input":"%b"' % (item.place, text)
                events.append(self._event(b"custom_tool_call_input.done", done))
            else:
                if status is COMPLETED:
                    self._fill(item, events)
                done = b'%b,"arguments":"%b"' % (item.place, bytes(item.text))
                events.append(self._event(b"function_call_arguments.done", done))
        elif item is self._message or item is self._reasoning:
            events += self._part_ending()
            self._message = self._reasoning = None
        done = b'"output_index":%d,"item":%b' % (item.index, item.render(status))
        events.append(self._event(b"output_item.done", done))
        return events

    def _part_ending(self) -> list[bytes]:
        part, self._part = self._part, None
        self._plain_part = None
        if part is None:
            return []
        ending = b'%b,"part":%b' % (part.place, part.render())
        return [
            self._event(b"%b.done" % part.kind, part.done),
            self._event(b"content_part.done", ending),
        ]

    def _next_name(self) -> str:
        return f"{self._name}_{len(self._items)}"

    def _event(self, kind: bytes, members: bytes) -> bytes:
        number = self.sequence
        self.sequence = number + 1
        return _written(kind, number, members)


def opening_event(frame: Frame, kind: bytes, status: bytes, number: int) -> bytes:
    """Return the event of a *kind*, and of this *number*, with the response object of *frame* in a
    *status*.
    """
    return _written(kind, number, b'"response":%b' % frame.render(status))


def _written(kind: bytes, number: int, members: bytes) -> bytes:
    return b'event: response.%b\ndata: {"type":"response.%b","sequence_number":%d,%b}\n\n' % (
        kind,
        kind,
        number,
        members,
    )
