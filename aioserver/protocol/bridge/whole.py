"""A whole chat completion as a whole response."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aioserver.protocol.openai import BadEvent

if TYPE_CHECKING:
    from aioserver.protocol.bridge.events import ResponseWriter

# Bytes of a chat completion that is read at once; those of models that exist are a hundredth of it, as a rule.
MAX_WHOLE_BYTES = 1 << 24


def whole_response(body: bytes, writer: ResponseWriter, now: int) -> bytes:
    """Return the response that *body* means, as *writer* reads it; *now* is the time of its end.

    Raises:
        BadEvent: *body* is no chat completion.
        ErrorEvent: it is an error object.
    """
    writer.note_model(body)
    writer.read(body)
    if writer.finish_reason is None and not writer.begun:
        raise BadEvent("the provider's answer is no chat completion")
    writer.finish(now)
    return writer.response(now)
