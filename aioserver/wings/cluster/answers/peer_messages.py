"""Messages between instances, as msgpack: who asks for a log, its blocks, and whether the other
side lives.

Messages come from processes of our own, and are nevertheless parsed as what comes from elsewhere:
each is checked against its shape, and bounded in size.

    reader's side                        owner's side
    Attach(link, …)              →
                                 ←       Block(link, offset, data)*, or Refused(link, fault)
    Credit(link, limit)*         →
                                 ←       Position(link, …)*
    Ping(links)*                →
                                 ←       Pong(links, gone)
    Detach(link)                 →
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec

# Bytes of one publication: what is sent, and what is read. A single block is far below both.
MAX_SENT, MAX_READ = 1 << 18, 1 << 21
# Bytes of a log in one block.
BLOCK_BYTES: Final = 1 << 15


class Fault(msgspec.Struct, array_like=True):
    """An error: its class by name, and what an object of it has of its own."""

    kind: str
    message: str
    retry_after: float | None = None
    param: str | None = None
    paid: bool = False
    provider: str = ""
    attempts: int = 0
    provider_headers: dict[str, str] = {}
    status: int = 0
    body: bytes = b""
    # Whether status and body are `ProviderFault.provider_answer`.
    passed: bool = False


class Attach(msgspec.Struct, array_like=True, tag=1):
    """Send me the log of a caller's stream from *after* on, at most *credit* bytes: see
    `gateway.contracts.instances.Start`.
    """

    link: int
    caller: str
    request_id: str
    after: int | None
    sequence: int | None
    digest: bytes | None
    cancel: bool
    credit: int


class Refused(msgspec.Struct, array_like=True, tag=2):
    """There is no such log, or it cannot be sent any further."""

    link: int
    fault: Fault


class Block(msgspec.Struct, array_like=True, tag=3):
    """Bytes of a log (log_codec.py), from byte *offset* of this link on."""

    link: int
    offset: int
    data: bytes


class Credit(msgspec.Struct, array_like=True, tag=4):
    """Send up to byte *limit* of this link."""

    link: int
    limit: int


class Detach(msgspec.Struct, array_like=True, tag=5):
    """Send nothing more."""

    link: int


class Ping(msgspec.Struct, array_like=True, tag=6):
    """I still read these links: the number of each, the bytes received, and the limit."""

    links: list[tuple[int, int, int]]


class Pong(msgspec.Struct, array_like=True, tag=7):
    """I still send these links: the number of each, and the bytes sent; those that are *gone* I do
    not know.
    """

    links: list[tuple[int, int]]
    gone: list[int]


class Position(msgspec.Struct, array_like=True, tag=8):
    """The request is queued: its position, the estimated wait in seconds, and where it waits."""

    link: int
    position: int
    eta: float
    at: Literal["key", "provider"] = "provider"


Message = Attach | Refused | Block | Credit | Detach | Ping | Pong | Position


class Publication(msgspec.Struct, array_like=True):
    """What one instance sends to another at once."""

    sender: str
    messages: list[Message]


class Malformed(Exception):
    """What was received is no publication."""


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Publication)


def encode(sender: str, messages: list[Message]) -> list[bytes]:
    """Return *messages* as publications of about MAX_SENT bytes at most."""
    publications, batch, size = [], list[Message](), 0
    for message in messages:
        grown = len(message.data) if isinstance(message, Block) else 1024
        if batch and size + grown > MAX_SENT:
            publications.append(_encoder.encode(Publication(sender, batch)))
            batch, size = [], 0
        batch.append(message)
        size += grown
    if batch:
        publications.append(_encoder.encode(Publication(sender, batch)))
    return publications


def decode(data: bytes) -> Publication:
    """Return the publication in *data*.

    Raises:
        Malformed: *data* is not a publication, or is too large.
    """
    if len(data) > MAX_READ:
        raise Malformed(f"a publication of {len(data)} bytes, at most {MAX_READ}")
    try:
        return _decoder.decode(data)
    except (msgspec.MsgspecError, RecursionError) as exc:
        raise Malformed(str(exc)) from exc
