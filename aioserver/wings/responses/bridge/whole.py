"""A whole chat completion as a whole response (protocol/bridging/whole.py)."""

from __future__ import annotations

from aioserver.protocol.bridging.whole import read_whole
from aioserver.wings.responses.bridge.events import ResponseWriter
from aioserver.wings.responses.bridge.output import REASONS, TEXT, Call, written_logprobs


class WholeWriter(ResponseWriter):
    """Reads a whole answer, and writes the response alone."""

    def whole(self, now: int) -> bytes:
        """Return the response object as `finish` ends it, without the events.

        Raises:
            BadEvent: a call has no name.
        """
        self._complete([])
        reason = REASONS.get(self.finish_reason or "", "")
        for item in self._open:
            if isinstance(item, Call) and not (reason and item is self._items[-1]):
                self._fill(item, [])
        return self.response(now)

    def add_logprobs(self, tokens: object) -> None:
        """Add the logprobs of *tokens* to the text that was added last, if they are wanted.

        Raises:
            BadEvent: the answer is too long.
        """
        part = self._part
        if part is not None and part.kind is TEXT and self.logprobs:
            own, plain = written_logprobs(tokens)
            self._grow(len(own) + len(plain))
            part.add_logprobs(own, plain)


async def whole_response(body: bytes, writer: WholeWriter, now: int) -> bytes:
    """Return the response for *body*, as *writer* reads it, in steps.

    *now* is the time of its end.

    Raises:
        BadEvent: *body* is no chat completion.
        ErrorEvent: it is an error object.
    """
    await read_whole(body, writer)
    return writer.whole(now)
