"""The first line of a connection between instances: a secret that only they know, and what it is
for.

    aioserver-peer/1 {"secret":"…","word":{"kind":"look","what":"state"}}

The answer to a question is MAX_ANSWER bytes at most, with their number in front, and the
connection ends behind it. A connection that ends without all of its answer was broken. Behind
`Forward` comes a client's request, and its response (tunnels.py). The answer to `Follow` is FOUND,
the messages of a WebSocket, and END; or a `refusal`.
"""

from __future__ import annotations

import msgspec

from aioserver.errors import AioserverError, InternalError
from aioserver.streams.formats import WS_CLOSE, ws_frame
from aioserver.wings.cluster.answers.faults import Fault, error_of, fault_of

# The beginning of a line of this version: an instance of another version closes the connection.
VERSION = b"aioserver-peer/1 "
# Bytes of the line, and seconds in which it comes.
MAX_GREETING, GREETING_TIMEOUT = 1 << 13, 1.0
MAX_ANSWER = 1 << 24
# Bytes of the number in front of an answer.
SIZE = 4
# The mark in front of the messages of an answer that the owner has, and the one behind all of
# them: a close frame, which is not passed on.
FOUND, END = b"+", ws_frame(WS_CLOSE, b"")


class Look(msgspec.Struct, frozen=True, tag_field="kind", tag="look"):
    """A question of the operating pages (totals.py): how are you?"""

    what: str


class Listing(msgspec.Struct, frozen=True, tag_field="kind", tag="listing"):
    """Which streams of a caller are kept?"""

    caller: str
    subflow: str


class Cancel(msgspec.Struct, frozen=True, tag_field="kind", tag="cancel"):
    """Cancel a caller's stream; was there one?"""

    caller: str
    request_id: str


class Forget(msgspec.Struct, frozen=True, tag_field="kind", tag="forget"):
    """Forget a caller's response, and its log; was there one?"""

    caller: str
    response_id: str


class Follow(msgspec.Struct, frozen=True, tag_field="kind", tag="follow"):
    """Write the rest of an answer of *caller*, as a WebSocket shows it: the messages of chats, or
    those of *api* on its *lane*.

    *after*, *sequence* and *digest*: as `gateway.contracts.instances.Start`; without both numbers
    it is the rest after the newest event, or the last event.
    """

    caller: str
    request_id: str
    after: int | None
    sequence: int | None
    digest: bytes | None
    api: str
    lane: str | None


class Forward(msgspec.Struct, frozen=True, tag_field="kind", tag="forward"):
    """A client's request follows. The owner trusts only this about the client: its *address*, and
    whether its connection is *secure*.
    """

    address: str
    secure: bool


Question = Look | Listing | Cancel | Forget


class Greeting(msgspec.Struct, frozen=True):
    """The line: the *secret* of all instances, and a *word*: the question, or the kind of bytes
    that follow.
    """

    secret: bytes
    word: Question | Follow | Forward


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Greeting)
_fault_decoder = msgspec.msgpack.Decoder(Fault)


def encode(greeting: Greeting) -> bytes:
    """Return *greeting* as a line."""
    return VERSION + _encoder.encode(greeting) + b"\n"


def decode(line: bytes) -> Greeting | None:
    """Return the greeting in *line*; None if the line is not a greeting of this version."""
    if not line.startswith(VERSION):
        return None
    try:
        return _decoder.decode(line[len(VERSION) :])
    except (msgspec.MsgspecError, RecursionError):
        return None


def framed(answer: bytes) -> bytes:
    """Return *answer* as it is sent."""
    return len(answer).to_bytes(SIZE) + answer


def refusal(error: AioserverError) -> bytes:
    """Return the answer to `Follow` of an instance that refuses with *error*."""
    return msgspec.msgpack.encode(fault_of(error))


def refused(answer: bytes) -> AioserverError:
    """Return the error in *answer*, a refusal."""
    try:
        return error_of(_fault_decoder.decode(answer))
    except (msgspec.MsgspecError, RecursionError):
        return InternalError("internal error")
