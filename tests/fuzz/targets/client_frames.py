"""What a client sends on a WebSocket (RFC 6455): the frames, and the commands in them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, cast

from aiohttp import EofStream, WebSocketError, WSMsgType
from aiohttp._websocket.reader import WebSocketDataQueue
from aiohttp.http_websocket import WebSocketReader

from aioserver.errors import RateLimitExceeded
from aioserver.faces.client_messages import ClientMessages
from aioserver.protocol.client_frames import PAYLOAD_FIELDS
from tests.fuzz.inputs import parts
from tests.support.commands import survives
from tests.support.virtual_loop import run_virtually

if TYPE_CHECKING:
    from aiohttp.base_protocol import BaseProtocol

    from aioserver.errors import AioserverError
    from aioserver.faces.admission import BodyHold

WORDS = (
    *(b'"action":', b'"request_id":', b'"payload":', b'"last_event_id":', b'"chat"', b'"resume"'),
    b'"ping"',
    *(b'"%b":' % name.encode() for name in PAYLOAD_FIELDS),
    *(b"%b\x80\0\0\0\0" % opcode for opcode in (b"\x81", b"\x01", b"\x80", b"\x88", b"\x89")),
    *(b"\xfe\0", b"\xff\0\0\0\0\0\0", b"\x82", b"\xc1"),
)
MAX_MESSAGE = 1000


class Hold:
    """The bytes of a message, counted."""

    def __init__(self, holds: list[Hold]) -> None:
        self.size = 0
        holds.append(self)

    def grow(self, size: int) -> None:
        self.size += size

    def release(self) -> None:
        self.size = 0


class Socket:
    """The socket, which hears of faults, and its connection, which is paused."""

    def __init__(self) -> None:
        self._reading_paused = False
        self.fault = ""

    def pause_reading(self) -> None:
        self._reading_paused = True

    def resume_reading(self) -> None:
        self._reading_paused = False

    def break_off(self, error: AioserverError) -> None:
        self.fault = error.code

    def client_gone(self) -> None:
        raise AssertionError("the connection is not lost")


def run(data: bytes) -> None:
    """Read frames in any pieces, or take the content for the text of one message."""
    case = parts(data)
    if case.choice % 2:
        survives(case.content)
        return
    whole, *others = (run_virtually(_read(reads)) for reads in case.reads())
    for other in others:
        # How much of a flood is read is a matter of time.
        if RateLimitExceeded.code not in {whole[1], other[1]}:
            assert other == whole, "what is read depends on the reads"


async def _read(reads: list[bytes]) -> tuple[list[Any], str]:
    """Return the messages in *reads*, and the fault that ended them."""
    holds: list[Hold] = []
    socket = Socket()
    counted = ClientMessages(lambda: cast("BodyHold", Hold(holds)), MAX_MESSAGE)
    queue = WebSocketDataQueue(
        cast("BaseProtocol", socket), 1 << 16, loop=asyncio.get_running_loop()
    )
    counted.wrap(WebSocketReader(queue, MAX_MESSAGE, compress=False, decode_text=False))
    counted.start(socket)
    for read in reads:
        over, _ = counted.feed_data(read)
        if over:
            break
    fault = counted.fault.code if counted.fault else socket.fault
    if queue.exception() is None:
        queue.feed_eof()
    messages: list[Any] = []
    try:
        while True:
            message = await queue.read()
            messages.append(message)
            if message.type in {WSMsgType.TEXT, WSMsgType.BINARY}:
                hold = counted.take_hold()
                assert hold.size == len(message.data), "another size than was counted"
                hold.release()
                survives(message.data)
    except EofStream:
        pass
    except WebSocketError as error:
        fault = fault or str(error.code)
    assert sum(hold.size for hold in holds) <= MAX_MESSAGE, (
        "more is held than an unfinished message"
    )
    counted.close()
    assert not any(hold.size for hold in holds), "a hold is left"
    return messages, fault
