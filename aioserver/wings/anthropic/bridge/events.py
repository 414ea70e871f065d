"""The chunks of a chat completion as the events of a message.

    message_start                        with the first content
    for each block
        content_block_start
        content_block_delta …            text_delta, thinking_delta or input_json_delta
        content_block_delta              of a thinking: signature_delta
        content_block_stop
    message_delta, message_stop          at the end, when the usage is known

At most one block is open, so one call is written at a time: until its arguments are whole, text
and pieces of another call are kept, and written behind it. White space in front of a block is kept
until other text follows, so that no block is empty: it is dropped in front of a call, and at the
end. Reasoning is shown if the client has asked for it, with a signature that only states its
origin.

A chunk is read as for the faces that show frames (`protocol.openai.Reading`).

This file is one concept: the open block decides how each piece is written.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

import orjson

from aioserver.protocol.bridging.chunks import ITEM_BYTES, REASONING, REFUSAL, ChunkReader
from aioserver.protocol.openai import BadEvent
from aioserver.protocol.tokens import tokens_of
from aioserver.protocol.transcript import MAX_TRANSCRIPT
from aioserver.wings.anthropic.bridge import ids
from aioserver.wings.anthropic.bridge.arguments import Scanner
from aioserver.wings.anthropic.bridge.blocks import SIGNATURE
from aioserver.wings.anthropic.wire import STOPPED

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aioserver.protocol.bridging.chunks import DeltaText
    from aioserver.wings.anthropic.bridge.request import ChatRequest

TEXT, THINKING, CALL = b"text", b"thinking", b"tool_use"
# The most calls of one answer: more than a model makes at once.
MAX_CALLS = 1000
# The overhead in bytes of a kept text.
KEPT_BYTES = 64
# Bytes that count as one token if the provider reports no usage.
BYTES_PER_TOKEN = 4
# The finish reasons of an answer that was cut.
CUTS = frozenset({"length", "content_filter"})
_DELTA = (
    b'event: content_block_delta\ndata: {"type":"content_block_delta","index":%d,"delta":'
    b'{"type":"%b","%b":"'
)
_DELTA_END = b'"}}\n\n'
_START = (
    b'event: content_block_start\ndata: {"type":"content_block_start","index":%d,'
    b'"content_block":%b}\n\n'
)
_STOP = b'event: content_block_stop\ndata: {"type":"content_block_stop","index":%d}\n\n'
_MESSAGE = (
    b'{"id":"%b","type":"message","role":"assistant","model":%b,"content":[%b],'
    b'"stop_reason":%b,"stop_sequence":%b,"usage":%b}'
)
_FIELDS = {
    TEXT: (b"text_delta", b"text"),
    THINKING: (b"thinking_delta", b"thinking"),
    CALL: (b"input_json_delta", b"partial_json"),
}


class Call:
    """A call of a tool: the client's *name* and *id* of it, and the provider's id.

    `kept` is the part of its arguments that came while another block was open.
    """

    __slots__ = ("closed", "id", "kept", "name", "provider_id", "scanner")

    def __init__(self, name: str, shown_id: str, provider_id: str) -> None:
        self.name = name
        self.id = shown_id
        self.provider_id = provider_id
        self.scanner = Scanner()
        self.kept: list[str] = []
        self.closed = False


class MessageWriter(ChunkReader[Call]):
    """Reads the chunks of one answer, and writes the events of a message.

    *request* is the request that was sent to the provider, and *name* the hex digits of the
    message's id. Kept text has at most *max_bytes*.

    Always: at most one block is open; the next one's index is the number of earlier blocks.
    """

    __slots__ = (
        "_answered_bytes",
        "_asked_tokens",
        "_block",
        "_blocks",
        "_call_under_way",
        "_called",
        "_delta_head",
        "_held",
        "_held_kind",
        "_hidden",
        "_kept",
        "_model",
        "_name",
        "_refused",
        "_stop_sequence",
        "_thinking",
        "_tools",
        "_used_ids",
    )

    def __init__(self, request: ChatRequest, name: str, max_bytes: int) -> None:
        super().__init__(max_bytes)
        self._name, self._model = name, request.model
        self._tools, self._thinking = request.tools, request.thinking
        self._asked_tokens = request.asked_tokens
        self._answered_bytes = 0
        # The number of blocks so far, the kind of the open one, and the beginning of its deltas.
        self._blocks = 0
        self._block: bytes | None = None
        self._delta_head = b""
        # The call of that block, if it is one.
        self._call_under_way: Call | None = None
        # Calls, and texts by their kind, that have come before its arguments were whole.
        self._kept: deque[Call | tuple[bytes, str]] = deque()
        # White space in front of a block of one kind.
        self._held_kind = TEXT
        self._held: list[str] = []
        # Whether there was a call, a refusal, or reasoning that is not shown.
        self._called = self._refused = self._hidden = False
        self._stop_sequence: str | None = None
        self._used_ids: dict[str, int] = {}

    @property
    def plain(self) -> bool:
        """Whether `add_text` may be used: only a text is under way."""
        return self._block is TEXT and not self.half

    @property
    def begun(self) -> bool:
        """Whether any part of an answer has come."""
        return bool(self._blocks or self._hidden or self._held)

    @property
    def committed(self) -> bool:
        """Whether something was read, but not shown, that is content of an answer."""
        return self._hidden or self.finish_reason is not None

    @property
    def transcript(self) -> str | None:
        """The text that has been shown; None if there is more, or an end."""
        if self._called or self._refused or not self.only_text or self.finish_reason is not None:
            return None
        return self.text

    @property
    def size(self) -> int:
        """The bytes that are kept."""
        return self._size + len(self._text)

    @property
    def kept_pieces(self) -> int:
        """The number of texts and pieces of calls that have come before an earlier call
        was whole.
        """
        return sum(1 + len(each.kept) if isinstance(each, Call) else 1 for each in self._kept)

    def keep_text(self) -> None:
        """Keep the shown text, since the answer may be continued."""
        self.max_text_bytes = MAX_TRANSCRIPT + 1

    def name_model(self, name: str) -> None:
        """Take over the *name* of the model that answers."""
        self._model = name

    def begin(self) -> list[bytes]:
        """Return the event before those of any chunk."""
        message = self._rendered(b"", b"null", self._usage(1))
        return [b'event: message_start\ndata: {"type":"message_start","message":%b}\n\n' % message]

    def add_text(self, text: bytes) -> bytes:
        """Return the event of a *text*, escaped, where `plain` is true."""
        self._answered_bytes += len(text)
        self.texts += 1
        if self.max_text_bytes:
            self.note(text, 0)
        return b"%b%b%b" % (self._delta_head, text, _DELTA_END)

    def finish(self) -> list[bytes]:
        """Return the events that end the message.

        Raises:
            BadEvent: a call has no name, or its arguments are not whole.
        """
        events: list[bytes] = []
        self._complete(events)
        form = (
            b'event: message_delta\ndata: {"type":"message_delta","delta":{"stop_reason":"%b",'
            b'"stop_sequence":%b},"usage":%b}\n\n'
        )
        reason = self._stop_reason()
        events.append(form % (reason, self._stopped_by(reason), self._usage()))
        events.append(STOPPED)
        return events

    def _complete(self, events: list[bytes]) -> None:
        """End the blocks that are under way."""
        self._check_named()
        cut = self.finish_reason in CUTS
        while (call := self._call_under_way) is not None:
            if not (call.scanner.begun or (cut and not self._kept)):
                # Clients parse it.
                self._argue(call, "{}", events)
            elif cut:
                self._close(events)
                self._write_kept(events)
            else:
                raise BadEvent("the arguments of a call are not whole")
        self._close(events)

    def _stop_reason(self) -> bytes:
        reason = self.finish_reason
        if reason == "length":
            return b"max_tokens"
        if self._called:
            return b"tool_use"
        if reason == "content_filter" or self._refused:
            return b"refusal"
        return b"stop_sequence" if self._stop_sequence is not None else b"end_turn"

    def _stopped_by(self, reason: bytes) -> bytes:
        return orjson.dumps(self._stop_sequence) if reason == b"stop_sequence" else b"null"

    def _usage(self, answered: int | None = None) -> bytes:
        """Return the usage so far, with *answered* tokens of the answer if they are passed.

        No count of tokens is 0: that would mean that there is no usage.
        """
        tokens = tokens_of(self.usage)
        cached = tokens.cached or 0
        asked = self._asked_tokens if tokens.prompt is None else tokens.prompt - cached
        if answered is None:
            answered = tokens.answer
        if answered is None:
            answered = -(-self._answered_bytes // BYTES_PER_TOKEN)
        return (
            b'{"input_tokens":%d,"cache_creation_input_tokens":0,"cache_read_input_tokens":%d,'
            b'"output_tokens":%d}' % (max(1, asked), cached, max(1, answered))
        )

    def _rendered(self, content: bytes, reason: bytes, usage: bytes) -> bytes:
        stopped = self._stopped_by(reason[1:-1])
        model = orjson.dumps(self._model)
        return _MESSAGE % (b"msg_" + self._name.encode(), model, content, reason, stopped, usage)

    def _choice(self, choice: dict[str, Any], chunks: list[bytes]) -> None:
        super()._choice(choice, chunks)
        if choice.get("finish_reason") == "stop" and isinstance(
            text := choice.get("stop_reason"), str
        ):
            # vLLM's field for the stop sequence that was found.
            self._stop_sequence = text

    def _speak(self, piece: DeltaText, choice: Mapping[str, Any], events: list[bytes]) -> None:  # noqa: ARG002
        kind = TEXT
        if piece.kind is REASONING:
            if not self._thinking:
                self._hidden = True
                return
            kind = THINKING
        self._refused = self._refused or piece.kind is REFUSAL
        if self._call_under_way is None:
            self._write_text(kind, piece.text, events)
        else:
            self._keep(len(piece.text) + KEPT_BYTES)
            self._kept.append((kind, piece.text))

    def _write_text(self, kind: bytes, text: str, events: list[bytes]) -> None:
        if self._block is not kind:
            if self._held_kind is not kind:
                self._held_kind = kind
                self._held.clear()
            if text.isspace():
                self._keep(len(text) + KEPT_BYTES)
                self._held.append(text)
                return
            text = "".join((*self._held, text))
            self._close(events)
            self._open(kind, events)
        if kind is TEXT:
            self.texts += 1
            if self.max_text_bytes:
                self.note(text.encode(), 0)
        elif self._text:
            self.only_text = False
        self._add(orjson.dumps(text)[1:-1], events)

    def _begin_call(self, name: str, provider_id: str, events: list[bytes]) -> Call:
        if len(self._calls) >= MAX_CALLS:
            raise BadEvent(f"the provider's answer has more than {MAX_CALLS} calls")
        call = Call(self._tools.find(name), self._id_for(provider_id), provider_id)
        self._called = True
        if self._call_under_way is None:
            self._open_call(call, events)
        else:
            self._keep(ITEM_BYTES)
            self._kept.append(call)
        return call

    def _id_for(self, provider_id: str) -> str:
        if not provider_id:
            return f"toolu_{self._name[:12]}_{len(self._calls)}"
        count = self._used_ids.get(provider_id, 0) + 1
        self._used_ids[provider_id] = count
        return ids.shown(provider_id if count == 1 else f"{provider_id}_{count}")

    def _argue(self, call: Call, text: str, events: list[bytes]) -> None:
        self._add_arguments(call, text, events)
        if self._kept and self._call_under_way is None:
            self._write_kept(events)

    def _add_arguments(self, call: Call, text: str, events: list[bytes]) -> None:
        """Write *text* of the arguments of *call*, or keep it if its block is not open yet."""
        if call.closed:
            if text and not text.isspace():
                raise BadEvent("the provider sent more of a call whose arguments were whole")
        elif call is not self._call_under_way:
            self._keep(len(text) + KEPT_BYTES)
            call.kept.append(text)
        elif call.scanner.begun or text.strip() not in {"", "null"}:
            end = call.scanner.end(text)
            if end < 0:
                self._add(orjson.dumps(text)[1:-1], events)
                return
            self._add(orjson.dumps(text[:end])[1:-1], events)
            self._close(events)
            self._add_arguments(call, text[end:], events)

    def _write_kept(self, events: list[bytes]) -> None:
        """Write the kept pieces, in order, up to a call whose arguments are not whole."""
        while self._kept and self._call_under_way is None:
            kept = self._kept.popleft()
            if isinstance(kept, Call):
                pieces, kept.kept = kept.kept, []
                self._open_call(kept, events)
                for piece in pieces:
                    self._add_arguments(kept, piece, events)
            else:
                self._write_text(*kept, events)
        if not self._kept:
            self._size = self._overhead = 0

    def _open_call(self, call: Call, events: list[bytes]) -> None:
        self._close(events)
        self._call_under_way = call
        self._open(CALL, events)

    def _close(self, events: list[bytes]) -> None:
        """End the block that is open, if one is."""
        if (call := self._call_under_way) is not None:
            call.closed, self._call_under_way = True, None
        if self._block is not None:
            self._end_block(self._block, call, events)
            self._block = None

    def _open(self, kind: bytes, events: list[bytes]) -> None:
        """Begin a block."""
        self._held.clear()
        self._block = kind
        self._delta_head = _DELTA % (self._blocks, *_FIELDS[kind])
        self._begin_block(kind, events)
        self._blocks += 1

    def _add(self, text: bytes, events: list[bytes]) -> None:
        """Add *text*, escaped, to the block that is open."""
        self._answered_bytes += len(text)
        events.append(b"%b%b%b" % (self._delta_head, text, _DELTA_END))

    def _begin_block(self, kind: bytes, events: list[bytes]) -> None:
        if (call := self._call_under_way) is not None:
            block = b'{"type":"tool_use","id":%b,"name":%b,"input":{}}' % (
                orjson.dumps(call.id),
                orjson.dumps(call.name),
            )
        elif kind is THINKING:
            block = b'{"type":"thinking","thinking":"","signature":""}'
        else:
            block = b'{"type":"text","text":""}'
        events.append(_START % (self._blocks, block))

    def _end_block(self, kind: bytes, call: Call | None, events: list[bytes]) -> None:  # noqa: ARG002
        number = self._blocks - 1
        if kind is THINKING:
            head = _DELTA % (number, b"signature_delta", b"signature")
            events.append(b"%b%b%b" % (head, SIGNATURE.encode(), _DELTA_END))
        events.append(_STOP % number)

    def _keep(self, size: int) -> None:
        self._grow(0, size)
