"""`stream_options` in the body of a streamed request: whether its client asks for the usage of the
answer, and the bytes of a body that does.

Members are edited in place: the client's other bytes stay as they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aioserver.protocol.json_body import ABSENT
from aioserver.protocol.member import Member

if TYPE_CHECKING:
    from msgspec import Raw

OPTIONS, INCLUDE = Member("stream_options"), Member("include_usage")
_ASKING = b'{"include_usage":true}'
# Bytes of options that are edited.
MAX_OPTIONS_BYTES = 4096
# The values of `include_usage` by which a client does not ask, empty if it is absent.
_UNASKED = frozenset({b"", b"false", b"null"})


def unasked(options: Raw) -> bytes | None:
    """Return *options* as they are written, empty if there are none; None if they ask for the
    usage already, or cannot be edited.
    """
    if options is ABSENT:
        return b""
    if len(memoryview(options)) > MAX_OPTIONS_BYTES:
        return None
    written = bytes(options)
    if written == b"null":
        return written
    if not written.startswith(b"{") or INCLUDE.value(written) not in _UNASKED:
        return None
    return written


def asking(body: bytes, options: bytes) -> bytes:
    """Return *body* with options that ask for the usage, in place of *options*, the result of
    `unasked` for it.

    Raises:
        InvalidRequest: as `Member.find`.
    """
    if not options:
        return OPTIONS.insert(body, (_ASKING,))
    edited = _ASKING
    if options != b"null":
        included = INCLUDE.value(options)
        if included:
            place = INCLUDE.find(options, included)
            edited = b"%btrue%b" % (options[: place.value], options[place.end :])
        else:
            edited = INCLUDE.insert(options, (b"true",))
    place, view = OPTIONS.find(body, options), memoryview(body)
    return b"".join((view[: place.value], edited, view[place.end :]))
