"""OpenAI's Responses API: how an answer that breaks off is told in its own events.

An error between the events of a response is a `response.failed` event with the response object that came
last, its status `failed`, and the next `sequence_number`; our error object, with our code, stands beside
it. Of the forms that were tried, this one alone is understood by openai for Python and Node, the AI SDK
and Codex.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import orjson

from aioserver.protocol.eventstream import parse, write

if TYPE_CHECKING:
    from aioserver.errors import AioserverError

# Of the codes that OpenAI has for the error in a response object, those that fit: clients check them.
SERVER_ERROR, RATE_LIMITED = "server_error", "rate_limit_exceeded"
_RESPONSE = b'"response"'
_SEQUENCE_NUMBER = re.compile(rb'"sequence_number" ?: ?([0-9]{1,18})[,}]')


class ResponseErrors:
    """The errors of one response that is streamed.

    Always: at most one of its events is kept, as bytes: the last that has a response object.
    """

    __slots__ = ("_last_response", "_sequence_number")

    def __init__(self) -> None:
        self._last_response = b""
        self._sequence_number = -1

    def note(self, block: bytes) -> None:
        """Remember the newest sequence number and response object of a block of whole events."""
        # The last number in the block: a number in a text has its quotes escaped.
        if (start := block.rfind(b'"sequence_number"')) >= 0:
            match = _SEQUENCE_NUMBER.match(block, start)
            if match is not None:
                self._sequence_number = int(match[1])
        if block.find(_RESPONSE) >= 0:
            for event in parse(block):
                if _response_in(event.data) is not None:
                    self._last_response = event.data

    def render(self, error: AioserverError) -> bytes:
        """Return *error* as a `response.failed` event."""
        failed: dict[str, Any] = {
            "type": "response.failed",
            "sequence_number": self._sequence_number + 1,
            "response": {
                **(_response_in(self._last_response) or {"object": "response", "output": []}),
                "status": "failed",
                "error": {
                    "code": RATE_LIMITED if error.http_status == 429 else SERVER_ERROR,
                    "message": error.message,
                },
            },
            "error": error.as_object(),
        }
        return write(orjson.dumps(failed), event="response.failed")


def _response_in(event: bytes) -> dict[str, Any] | None:
    """Return the response object in *event*, None if there is none."""
    try:
        response = orjson.loads(event)["response"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return None
    return response if isinstance(response, dict) else None
