"""A chunk of a chat completion, taken apart for a bridge: the texts and the pieces of calls in its
delta, or in the message of a whole answer.

Engines have several names for a text, and several ways to send a call. Its pieces have an index,
none, or all the same; the name may come behind the arguments; and the arguments may be an object.
`ChunkReader` handles these, so that its subclasses see only texts, the beginnings of calls, and
their arguments.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeVar

import orjson

from aioserver.protocol.openai import BadEvent, Reading

if TYPE_CHECKING:
    from collections.abc import Mapping

REASONING_FIELDS = ("reasoning_content", "reasoning")
CONTENT, REFUSAL, REASONING = "content", "refusal", "reasoning"
# Bytes of an item beside its texts: its Python objects, and its JSON.
ITEM_BYTES = 1024


class DeltaText(NamedTuple):
    """A text that is not empty.

    *kind* is CONTENT, REFUSAL or REASONING, *field* the field of the delta in which it came.
    """

    kind: str
    text: str
    field: str


class PartialCall(Protocol):
    """A call of a tool whose arguments grow; *provider_id* is the provider's id of it."""

    provider_id: str


C = TypeVar("C", bound=PartialCall)


class ChunkReader(Reading, ABC, Generic[C]):
    """Reads the chunks of one answer, or a whole answer, for a bridge.

    All kept data together have at most *max_bytes*.
    """

    # The sequence number of the next event, in an API that has such numbers.
    sequence = 0

    # Subclasses have a dictionary, but each event counts in these.
    __slots__ = (
        "_calls",
        "_ids",
        "_max_bytes",
        "_nameless",
        "_overhead",
        "_size",
        "in_one_piece",
        "logprobs",
        "reasoning_field",
    )

    def __init__(self, max_bytes: int, size: int = 0, *, logprobs: bool = False) -> None:
        super().__init__(max_text_bytes=0)
        # Whether the client wants the logprobs of the answer.
        self.logprobs = logprobs
        # The name of the field in which the provider sends its reasoning; empty if it has sent
        # none.
        self.reasoning_field = ""
        # Whether a whole answer is read, in which each call stands once.
        self.in_one_piece = False
        self._max_bytes = max_bytes
        # The kept bytes; and the part of them that is overhead: it is no text of the answer, and
        # was not there at the start.
        self._size, self._overhead = size, 0
        # The calls by the provider's index; those without one by a number below 0.
        self._calls: dict[int, C] = {}
        # By the provider's id of a call: the key in `_calls` of the first call with that id.
        self._ids: dict[str, int] = {}
        # Pieces of calls whose name has not come yet: the provider's id and the arguments.
        self._nameless: dict[int, tuple[str, str]] = {}

    @property
    def size(self) -> int:
        """The number of kept bytes."""
        return self._size

    @property
    @abstractmethod
    def plain(self) -> bool:
        """Whether a text may be passed to `add_text`: only a text is under way, and no logprobs
        are wanted.
        """

    @property
    @abstractmethod
    def begun(self) -> bool:
        """Whether any part of an answer has come."""

    @property
    @abstractmethod
    def transcript(self) -> str | None:
        """The text that was shown, if nothing else was shown and it has not ended yet."""

    @abstractmethod
    def add_text(self, text: bytes) -> bytes:
        """Return the event of a *text*, escaped, where `plain` is true.

        Raises:
            BadEvent: the answer is too long.
        """

    @abstractmethod
    def name_model(self, name: str) -> None:
        """Record the *name* of the model that answers."""

    @abstractmethod
    def _speak(self, piece: DeltaText, choice: Mapping[str, Any], events: list[bytes]) -> None:
        """Add *piece*, a text of *choice*."""

    @abstractmethod
    def _begin_call(self, name: str, provider_id: str, events: list[bytes]) -> C:
        """Begin a call of the function *name*."""

    @abstractmethod
    def _argue(self, call: C, text: str, events: list[bytes]) -> None:
        """Add *text* to the arguments of *call*."""

    def add_logprobs(self, tokens: object) -> None:
        """Add the logprobs of *tokens* to the text that was added last, if they are wanted.

        Raises:
            BadEvent: the answer is too long.
        """

    def note_model(self, data: bytes) -> None:
        """Record the model's name from *data*, a chunk or a whole answer."""
        try:
            model = orjson.loads(data).get("model")
        except (orjson.JSONDecodeError, AttributeError):
            # The reading handles it.
            return
        if isinstance(model, str) and 0 < len(model) <= 1024:
            self.name_model(model.encode("utf-8", "replace").decode())

    def _choice(self, choice: dict[str, Any], chunks: list[bytes]) -> None:
        delta = choice.get("delta") or choice.get("message")
        if isinstance(delta, dict):
            for piece in texts_of(delta):
                if piece.kind is REASONING:
                    self.reasoning_field = piece.field
                self._speak(piece, choice, chunks)
            calls = delta.get("tool_calls")
            if isinstance(calls, list) and calls:
                for number, call in enumerate(calls):
                    if isinstance(call, dict):
                        self._call(call, number, chunks)
            elif isinstance(call := delta.get("function_call"), dict):
                # The form from before there were tools; llama-cpp-python sends both.
                self._call({"index": 0, "function": call}, 0, chunks)
        reason = choice.get("finish_reason")
        if isinstance(reason, str):
            self.finish_reason = reason

    def _call(self, call: dict[str, Any], number: int, events: list[bytes]) -> None:
        """Add *call*, a piece of a call, the one with this *number* in its chunk."""
        function = call.get("function")
        function = function if isinstance(function, dict) else {}
        name, call_id = function.get("name"), call.get("id")
        name = name if isinstance(name, str) else ""
        provider_id = call_id if isinstance(call_id, str) else ""
        arguments = function.get("arguments")
        if isinstance(arguments, dict):
            arguments = orjson.dumps(arguments).decode()
        text = arguments if isinstance(arguments, str) else ""
        index = self._index_of(call, number, provider_id, name)
        known = self._calls.get(index)
        if (
            known is not None
            and name
            and provider_id
            and known.provider_id not in {"", provider_id}
        ):
            # Some providers give each of their calls the same index.
            known = None
        if known is None:
            earlier_id, earlier_text = self._nameless.pop(index, ("", ""))
            provider_id, text = provider_id or earlier_id, earlier_text + text
            if not name:
                self._grow(len(text), ITEM_BYTES)
                self._nameless[index] = provider_id, text
                return
            known = self._begin_call(name, provider_id, events)
            self._calls[index] = known
            if provider_id:
                self._ids.setdefault(provider_id, index)
        self._argue(known, text, events)

    def _index_of(self, call: dict[str, Any], number: int, provider_id: str, name: str) -> int:
        """Return the key in `_calls` of the call that *call* is a piece of."""
        index = call.get("index")
        if isinstance(index, bool) or not isinstance(index, int):
            index = None
        if name and (self.in_one_piece or (number and index is None)):
            # It does not belong to a call before it, whatever their ids are.
            return -1 - len(self._calls)
        if index is not None:
            if index in self._calls or name or provider_id or -1 not in self._calls:
                return index
        elif provider_id or name:
            return self._ids.get(provider_id, -1 - len(self._calls))
        # A piece without a name belongs to the newest call.
        return next(reversed(self._calls), number)

    def _check_named(self) -> None:
        """Raise BadEvent if a call never got its name."""
        if self._nameless:
            raise BadEvent("the provider sent a call without a name")

    def _grow(self, size: int, overhead: int = 0) -> None:
        """Count *size* bytes more of the answer, and *overhead* beside them.

        Raises:
            BadEvent: the answer is too long.
        """
        self._size += size + overhead
        self._overhead += overhead
        if self._size > self._max_bytes:
            raise BadEvent(f"the provider's answer has more than {self._max_bytes} bytes")


def texts_of(delta: Mapping[str, Any]) -> list[DeltaText]:
    """Return the texts in *delta*: first its reasoning, then its content, then a refusal."""
    texts = []
    for field in REASONING_FIELDS:
        text = delta.get(field)
        if isinstance(text, str) and text:
            # Some engines send it under both names.
            texts.append(DeltaText(REASONING, text, field))
            break
    content = delta.get("content")
    if isinstance(content, str):
        if content:
            texts.append(DeltaText(CONTENT, content, "content"))
    elif isinstance(content, list):
        for part in content:
            texts += _texts_of_part(part)
    refusal = delta.get("refusal")
    if isinstance(refusal, str) and refusal:
        texts.append(DeltaText(REFUSAL, refusal, "refusal"))
    return texts


def _texts_of_part(part: object) -> list[DeltaText]:
    """Return the texts and thoughts in a *part* of a content, as Mistral's models send it."""
    if not isinstance(part, dict):
        return []
    if part.get("type") == "thinking" and isinstance(thoughts := part.get("thinking"), list):
        texts = [thought.get("text") for thought in thoughts if isinstance(thought, dict)]
        return [DeltaText(REASONING, text, "") for text in texts if isinstance(text, str) and text]
    text = part.get("text")
    if part.get("type") == "text" and isinstance(text, str) and text:
        return [DeltaText(CONTENT, text, "content")]
    return []
