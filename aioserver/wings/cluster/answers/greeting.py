"""The first line of a connection between instances: a secret that only they know, and what it is
for.

    aioserver-peer/1 {"secret":"…","word":{"kind":"look","what":"state"}}

The answer to a question is MAX_ANSWER bytes at most, with their number in front, and the
connection ends behind it. A connection that ends without all of its answer was broken. Behind
`Forward` comes a client's request, and its response (tunnels.py).
"""

from __future__ import annotations

import msgspec

# What a line of this version begins with: an instance of another version closes the connection.
VERSION = b"aioserver-peer/1 "
# Bytes of the line, and seconds in which it comes.
MAX_GREETING, GREETING_TIMEOUT = 1 << 13, 1.0
MAX_ANSWER = 1 << 24
# Bytes of the number in front of an answer.
SIZE = 4


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


class Forward(msgspec.Struct, frozen=True, tag_field="kind", tag="forward"):
    """A request of a client follows, of whom only this is believed: the *address*, and whether the
    client is connected *secure*ly.
    """

    address: str
    secure: bool


Question = Look | Listing | Cancel | Forget


class Greeting(msgspec.Struct, frozen=True):
    """The line: the *secret* of all instances, and a *word*: what is asked, or what follows."""

    secret: bytes
    word: Question | Forward


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Greeting)


def encode(greeting: Greeting) -> bytes:
    """Return *greeting* as a line."""
    return VERSION + _encoder.encode(greeting) + b"\n"


def decode(line: bytes) -> Greeting | None:
    """Return the greeting in *line*; None if it is none of this version."""
    if not line.startswith(VERSION):
        return None
    try:
        return _decoder.decode(line[len(VERSION) :])
    except (msgspec.MsgspecError, RecursionError):
        return None


def framed(answer: bytes) -> bytes:
    """Return *answer* as it is sent."""
    return len(answer).to_bytes(SIZE) + answer


def unframed(data: bytes) -> bytes | None:
    """Return the answer in *data*; None if it is not whole."""
    answer = data[SIZE:]
    return answer if data[:SIZE] == len(answer).to_bytes(SIZE) else None
