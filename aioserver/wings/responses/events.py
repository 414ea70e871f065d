"""OpenAI's Responses API: the end of a response, the memory of its events, and errors in their
form.

An error between the events of a response is a `response.failed` event with the response object
that came last, its status `failed`, and the next `sequence_number`. Our error object, with our
code, stands beside it. Of the forms that were tried, only this one is understood by openai for
Python and Node, the AI SDK and Codex.

Clients name an event by its `sequence_number`, and the log by a number of its own. Their relation
is remembered as the events come, so that neither a resume nor a look at the response reads the
log.
"""

from __future__ import annotations

import contextlib
import re
from itertools import islice
from typing import TYPE_CHECKING, Any

import msgspec
import orjson
from msgspec import Raw

from aioserver.protocol.eventstream import count_named, having, parse, split, with_lf, write
from aioserver.protocol.openai import BadEvent, only_names
from aioserver.protocol.parts import Parts, escaped
from aioserver.protocol.transcript import loaded
from aioserver.streams.contracts import AnswerEvents

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from aioserver.errors import AioserverError
    from aioserver.streams.stream import Stream

# The OpenAI codes for the error in a response object that fit: clients check them.
SERVER_ERROR, RATE_LIMITED = "server_error", "rate_limit_exceeded"
# The types of the events that end a response, unless an error does.
ENDS = ("response.completed", "response.incomplete", "response.failed")
# Bytes of a run of sequence numbers, in Python's objects.
RUN_OVERHEAD = 200
# Replaces a missing response object.
_NO_RESPONSE: dict[str, Any] = {"object": "response", "output": []}
# The types of events that precede the content: all of them, those with an item, and those with a
# part of one.
OPENINGS = frozenset({"response.created", "response.queued", "response.in_progress"})
ITEM_ADDED = "response.output_item.added"
PART_ADDED = frozenset({"response.content_part.added", "response.reasoning_summary_part.added"})
_RESPONSE = b'"response"'
_END_TYPES = tuple(b'"%b"' % end.encode() for end in ENDS)
_SEQUENCE = b'"sequence_number"'
# The characters that may follow a number in an object.
_VALUE_ENDS = b",}"
_NUMBER = re.compile(rb":([0-9]{1,18}),")
_SEQUENCE_NUMBER = re.compile(rb'"sequence_number" ?: ?([0-9]{1,18})[,}]')


class _Event(msgspec.Struct, gc=False):
    response: Raw


_EVENT = msgspec.json.Decoder(_Event)
_OBJECT = msgspec.json.Decoder(dict[str, Raw])


class _Run:
    """Consecutive events with consecutive sequence numbers: the log's number of the first event,
    its sequence number, and that of the last one.
    """

    __slots__ = ("last_sequence", "number", "sequence")

    def __init__(self, number: int, sequence: int, last_sequence: int) -> None:
        self.number = number
        self.sequence = sequence
        # Changed in place, since that happens once for each event.
        self.last_sequence = last_sequence


class ResponseEvents(AnswerEvents):
    """The memory of the events of one response that is streamed, for as long as its log.

    Always: at most one of its events is kept, as bytes: the last that has a response object. The
    sequence numbers are kept as runs, of which there is one if the provider counts as it should.
    """

    __slots__ = ("_last_response", "_runs")

    def __init__(self) -> None:
        self._last_response = b""
        self._runs: list[_Run] = []

    @property
    def size(self) -> int:
        """The bytes that this object keeps."""
        return len(self._last_response) + RUN_OVERHEAD * (1 + len(self._runs))

    @property
    def response(self) -> dict[str, Any] | None:
        """The response object that came last."""
        return _response_in(self._last_response)

    def state(self) -> tuple[list[tuple[int, int, int]], bytes]:
        """Return everything remembered, for `restore`."""
        return [
            (run.number, run.sequence, run.last_sequence) for run in self._runs
        ], self._last_response

    def restore(self, runs: Sequence[tuple[int, int, int]], newest: bytes) -> None:
        """Replace the memory by the `state` of another object."""
        self._runs = [_Run(*run) for run in runs]
        self._last_response = newest

    def newest(self, status: str = "") -> bytes | None:
        """Return the JSON of the response object that came last, with another *status* if one is
        passed.

        None if there is no such object. Nothing below its top level is built, and it is as deep as
        it came.
        """
        try:
            response = _EVENT.decode(self._last_response).response
            if status:
                fields = _OBJECT.decode(response)
                fields["status"] = Raw(orjson.dumps(status))
                return msgspec.json.encode(fields)
            return bytes(response)
        except (msgspec.DecodeError, RecursionError):
            return None

    @property
    def last_sequence(self) -> int:
        """The newest sequence number; -1 if there is none."""
        return self._runs[-1].last_sequence if self._runs else -1

    def note(self, block: bytes, first: int) -> None:
        """Remember the sequence numbers, and the newest response object, of a block of whole
        events.

        *first* is the number of its first event in the log.
        """
        odd = escaped(block)
        if not odd and block.find(_SEQUENCE) < 0 and block.find(_RESPONSE) < 0:
            return
        if not odd and self._note_together(block, first):
            for place in having(block, (_RESPONSE,)):
                for event in parse(block[place]):
                    self._note_response(event.data)
            return
        for number, event in enumerate(parse(block), first):
            if (sequence := _sequence_in(event.data)) is not None:
                self.note_run(number, sequence)
            self._note_response(event.data)

    def _note_together(self, block: bytes, first: int) -> bool:
        """Remember the sequence numbers of *block*, as `note`, if it has several events, each with
        one number, which is the next; return whether it has.
        """
        # Each but the first begins behind the name of a number.
        parts = block.split(_SEQUENCE)
        count = len(parts) - 1
        if count < 2 or count_named(block) != count:
            return False
        match = _NUMBER.match(parts[1])
        if match is None:
            return False
        begin = int(match[1])
        for number, part in enumerate(islice(parts, 1, None), begin):
            # The next number is in the next event.
            if not part.startswith(b":%d," % number) or part.count(b"\n\n") != 1:
                return False
        self.note_run(first, begin, count)
        return True

    def _note_response(self, data: bytes) -> None:
        if (data.find(_RESPONSE) >= 0 or escaped(data)) and _response_in(data) is not None:
            self._last_response = data

    def follows(self, event: bytes, number: int) -> bool:
        """Note *event*, whose *number* is the next, if only its place needs to be remembered.

        Return False, with nothing done, if `note` must read it. It has no response object.
        """
        found = event.find(_SEQUENCE)
        if found < 0:
            return True
        if not self._runs:
            return False
        run = self._runs[-1]
        sequence = run.last_sequence + 1
        written = b":%d" % sequence
        end = found + len(_SEQUENCE)
        if (
            not event.startswith(written, end)
            or event[end + len(written)] not in _VALUE_ENDS
            or event.find(_SEQUENCE, end) >= 0
            or sequence - run.sequence != number - run.number
        ):
            return False
        run.last_sequence = sequence
        return True

    def note_run(self, number: int, sequence: int, count: int = 1) -> None:
        """Remember the numbers of *count* events, as `AnswerEvents.note_run`."""
        last = sequence + count - 1
        if self._runs:
            run = self._runs[-1]
            if (
                sequence == run.last_sequence + 1
                and sequence - run.sequence == number - run.number
            ):
                run.last_sequence = last
                return
        self._runs.append(_Run(number, sequence, last))

    def event_before(self, sequence: int, last: int) -> int | None:
        """Return the number of the event before the first one above *sequence*. If *sequence* is
        -1, it is before the first event.

        It is *last*, the newest event's number, if *sequence* is the newest; None if *sequence*
        has not come yet.
        """
        for run in self._runs:
            if run.last_sequence > sequence:
                return run.number + max(0, sequence + 1 - run.sequence) - 1
        if not self._runs:
            return 0 if sequence < 0 else None
        return last if sequence == self.last_sequence else None

    def render(self, error: AioserverError, seen: int | None = None) -> bytes:
        """Return *error* as a `response.failed` event.

        It has the next sequence number. If a reader fell behind, having *seen* the event of that
        number in the log, it has the sequence number of that event (-1 if it has seen none). So a
        client that comes back after it misses no event.

        It has only the frame of a response object, if that object is nested deeper than orjson
        writes.
        """
        sequence = self.last_sequence + 1 if seen is None else self._sequence_at(seen)
        try:
            return self._render(self.response or _NO_RESPONSE, error, sequence)
        except orjson.JSONEncodeError:
            return self._render(_NO_RESPONSE, error, sequence)

    def _sequence_at(self, number: int) -> int:
        """Return the sequence number of the event *number*, or of the last before; -1 if none."""
        sequence = -1
        for run in self._runs:
            if run.number > number:
                break
            sequence = min(run.last_sequence, run.sequence + number - run.number)
        return sequence

    def _render(self, response: dict[str, Any], error: AioserverError, sequence: int) -> bytes:
        failed: dict[str, Any] = {
            "type": "response.failed",
            "sequence_number": sequence,
            "response": {
                **response,
                "status": "failed",
                "error": {
                    "code": RATE_LIMITED if error.http_status == 429 else SERVER_ERROR,
                    "message": error.message,
                },
            },
            "error": error.as_object(),
        }
        return write(orjson.dumps(failed), event="response.failed")


def remember(stream: Stream, block: bytes) -> None:
    """Let *stream* remember the events of *block*, the next ones of a response, as far as its
    errors need them.
    """
    events = stream.events
    size = events.size
    events.note(block, stream.last + 1)
    if events.size != size:
        stream.recount()


def is_content(data: bytes) -> bool:
    """Return whether an event with *data* is content. A preamble is not: the response as it
    begins, a message or reasoning without content, a part without text.
    """
    try:
        event = orjson.loads(data)
    except orjson.JSONDecodeError:
        return True
    if not isinstance(event, dict):
        return True
    kind, item, part = event.get("type"), event.get("item"), event.get("part")
    if kind == ITEM_ADDED and isinstance(item, dict):
        opens = item.get("type") in ("message", "reasoning")
        return not opens or not only_names(item, {"id", "type", "status", "role", "phase"})
    if kind in PART_ADDED and isinstance(part, dict):
        return not only_names(part, {"type"})
    # An end is no content either: it may end an empty answer.
    return kind not in OPENINGS and kind not in ENDS


def _words(content: dict[str, Any]) -> Iterator[str]:
    """Yield the type of the item that an event with this *content* adds, or its own."""
    kind: str = content["type"]
    added = kind == ITEM_ADDED
    yield f"added {content['item']['type']}" if added else kind.removeprefix("response.")


# The input of a tool follows its item, and everything that is done has come before.
PARTS = Parts(
    (b'_call"', b"reasoning"),
    re.compile(rb"event: response\.[a-z_]+\.delta\ndata: \{"),
    _words,
    re.compile(
        r"(?P<PREAMBLE>created|queued|in_progress|added message|.*part\.added|.*\.done"
        r"|(?:function_call_arguments|custom_tool_call_input)\.delta)"
        "|(?P<REASONING>(?:added )?reasoning.*)"
        "|(?P<CALL>added (?:function|custom_tool|local_shell|shell|apply_patch|computer|tool_search)"
        "_call)"
        r"|(?P<HOSTED>(?:added )?(?:\w+_call|mcp)[._a-z]*)"
        "|(?P<FINISH>completed|incomplete)|(?P<ERROR>error|failed)"
    ),
    signs_reasoning=True,
)


def failed(data: bytes) -> object:
    """Return the error of the response, if an event with *data* reports its failure; otherwise
    None.
    """
    response = _response_in(data)
    if response is None or response.get("status") != "failed":
        return None
    return response.get("error") or {}


def up_to_end(block: bytes) -> tuple[bytes, bool]:
    """Return *block*, whole events, up to the one that ends a response, and whether there is one.

    A comment that looks like one does not count.
    """
    if not _may_end(block):
        return block, False
    lines = with_lf(block)
    # A type that is written with escapes may be in any event.
    marks = (b"\n\n",) if escaped(lines) else _END_TYPES
    for place in having(lines, marks):
        if _ends(lines[place]):
            return (lines[: place.stop] if split(lines[place.stop :]) else block), True
    return block, False


def _ends(event: bytes) -> bool:
    """Return whether *event* ends a response."""
    if not _may_end(event):
        return False
    try:
        return any(loaded(part.data).get("type") in ENDS for part in parse(event))
    except BadEvent:
        # Nested more deeply than it can be read, for example.
        return any(event.find(end) >= 0 for end in _END_TYPES)


def _may_end(block: bytes) -> bool:
    """Return whether an event of *block* may end a response."""
    for end in _END_TYPES:
        # Not `in`: for bytes that costs more than twice as much.
        if block.find(end) >= 0:
            return True
    return escaped(block)


def _sequence_in(event: bytes) -> int | None:
    """Return the sequence number of *event*, None if it has none."""
    numbers = _SEQUENCE_NUMBER.findall(event)
    if len(numbers) == 1:
        return int(numbers[0])
    if numbers or event.find(_SEQUENCE) >= 0 or escaped(event):
        # Another object in the event has such a key, too, or it is written in another way.
        with contextlib.suppress(BadEvent):
            number = loaded(event).get("sequence_number")
            return number if type(number) is int else None
    return None


def _response_in(event: bytes) -> dict[str, Any] | None:
    """Return the response object in *event*, None if there is none."""
    try:
        response = orjson.loads(event)["response"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return None
    return response if isinstance(response, dict) else None
