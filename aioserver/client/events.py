"""The events of an answer, as a program sees them.

    Queued* Processing (Text | Reasoning | ToolCalls)* Complete

An answer that was asked again by the library may have more than one `Processing`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from aioserver.client.errors import protocol_error

if TYPE_CHECKING:
    from aioserver.protocol.server_frames import Frame


@dataclass(frozen=True, slots=True)
class Queued:
    """The question waits: *position* of the queue, from 1, and an estimate of the wait in seconds."""

    position: int
    eta: float


@dataclass(frozen=True, slots=True)
class Processing:
    """A provider has begun."""

    provider: str = ""
    model: str = ""
    conversation_id: str | None = None


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A piece of what the model thinks."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCalls:
    """OpenAI's list of deltas: join `function.arguments` of those that have the same `index`."""

    deltas: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Complete:
    """The end of a whole answer; what the provider did not say is None or empty.

    *finish_reason* `length` says that the answer was cut by `max_tokens`.
    """

    finish_reason: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    provider: str = ""
    model: str = ""


Event = Queued | Processing | Text | Reasoning | ToolCalls | Complete


def event_of(frame: Frame) -> Event | None:
    """Return the event that *frame* is; None if it is none, or unknown here.

    Raises:
        Broken: a field has the wrong type.
    """
    chunk = frame.chunk
    match frame.status:
        case "chunk":
            return _piece(chunk.type, chunk.data)
        case "queued":
            return Queued(chunk.position, chunk.eta)
        case "processing":
            metadata = chunk.metadata
            return Processing(
                _text(metadata, "provider") or "",
                _text(metadata, "model") or "",
                _text(metadata, "conversation_id"),
            )
        case "complete":
            metadata = chunk.metadata
            usage = metadata.get("usage") or {}
            if not isinstance(usage, dict):
                raise protocol_error("usage is not an object")
            return Complete(
                _text(metadata, "finish_reason"),
                usage,
                _text(metadata, "provider") or "",
                _text(metadata, "model") or "",
            )
    return None


def _piece(kind: str, data: Any) -> Event | None:
    if kind == "text":
        if isinstance(data, str):
            return Text(data)
    elif kind == "reasoning":
        if isinstance(data, str):
            return Reasoning(data)
    elif kind == "tool_calls":
        if isinstance(data, list) and all(isinstance(delta, dict) for delta in data):
            return ToolCalls(data)
    else:
        return None
    raise protocol_error(f"the data of a {kind} chunk is of the type {type(data).__name__}")


def _text(metadata: dict[str, Any], name: str) -> str | None:
    value = metadata.get(name)
    if value is None or isinstance(value, str):
        return value
    raise protocol_error(f"{name} is not a text")
