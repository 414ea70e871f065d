"""A whole chat completion as a whole message (protocol/bridging/whole.py), with the same blocks as
a streamed answer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import orjson

from aioserver.errors import InvalidJson
from aioserver.protocol import json_body
from aioserver.protocol.bridging.whole import read_whole
from aioserver.protocol.openai import BadEvent
from aioserver.wings.anthropic.bridge.blocks import SIGNATURE
from aioserver.wings.anthropic.bridge.events import (
    CUTS,
    TEXT,
    THINKING,
    Call,
    MessageWriter,
)

if TYPE_CHECKING:
    from aioserver.wings.anthropic.bridge.request import ChatRequest


class WholeWriter(MessageWriter):
    """Reads a whole answer, and writes the message alone."""

    def __init__(self, request: ChatRequest, name: str, max_bytes: int) -> None:
        super().__init__(request, name, max_bytes)
        # The blocks that have ended, and the text of the open one, escaped.
        self._content: list[bytes] = []
        self._grown = bytearray()

    def whole(self) -> bytes:
        """Return the message.

        Raises:
            BadEvent: a call has no name, or its arguments are not JSON.
        """
        self._complete([])
        reason = self._stop_reason()
        return self._rendered(b",".join(self._content), b'"%b"' % reason, self._usage())

    def _begin_block(self, kind: bytes, events: list[bytes]) -> None:  # noqa: ARG002
        self._grown = bytearray()

    def _add(self, text: bytes, events: list[bytes]) -> None:  # noqa: ARG002
        self._answered_bytes += len(text)
        self._grown += text

    def _end_block(self, kind: bytes, call: Call | None, events: list[bytes]) -> None:  # noqa: ARG002
        text = bytes(self._grown)
        if call is not None:
            block = b'{"type":"tool_use","id":%b,"name":%b,"input":%b}' % (
                orjson.dumps(call.id),
                orjson.dumps(call.name),
                self._input(text),
            )
        elif kind is THINKING:
            form = b'{"type":"thinking","thinking":"%b","signature":"%b"}'
            block = form % (text, SIGNATURE.encode())
        else:
            assert kind is TEXT, "there are three kinds"
            block = b'{"type":"text","text":"%b"}' % text
        self._content.append(block)

    def _input(self, text: bytes) -> bytes:
        """Return *text*, the escaped arguments of a call, as an object; {} if it was cut."""
        arguments: bytes = orjson.loads(b'"%b"' % text).encode()
        try:
            json_body.decode(json_body.ANYTHING, arguments, "the arguments")
        except InvalidJson:
            if self.finish_reason in CUTS:
                return b"{}"
            raise BadEvent("the arguments of a call are not JSON") from None
        return arguments


async def whole_message(body: bytes, writer: WholeWriter) -> bytes:
    """Return the message for *body*, as *writer* reads it, in steps.

    Raises:
        BadEvent: *body* is no chat completion.
        ErrorEvent: it is an error object.
    """
    await read_whole(body, writer)
    return writer.whole()
