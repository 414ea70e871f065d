"""The question of a command line: its words, and stdin where that is no terminal."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import BinaryIO

# Bytes that are read of stdin: half of what a server takes by default, since JSON may double them.
MAX_BYTES = 8 << 20
# A first word that is an address: a URL, `localhost`, or a host with a port.
_ADDRESS = re.compile(
    r"https?://\S+ | localhost(/\S*)? | (\[[\da-f:.]+\] | [a-z\d][a-z\d.-]*) : \d{1,5} (/\S*)?",
    re.IGNORECASE | re.VERBOSE,
)


class BadQuestion(Exception):
    """There is no question that can be sent; the message is one line for people."""


def split(words: Sequence[str]) -> tuple[str | None, str]:
    """Return the address in front of *words*, if the first one is an address, and the text of the others."""
    if words and _ADDRESS.fullmatch(words[0]):
        return words[0], " ".join(words[1:])
    return None, " ".join(words)


def decoded(argument: str) -> str:
    """Return an *argument* of the command line without bytes that are not UTF-8, which no server takes."""
    return argument.encode(errors="surrogateescape").decode(errors="replace")


def read(stdin: BinaryIO) -> str:
    """Read all of *stdin*, without the white space at its end.

    Raises:
        BadQuestion: it is larger than MAX_BYTES, or not UTF-8.
    """
    data = stdin.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise BadQuestion(f"stdin has more than {MAX_BYTES} bytes: send less")
    try:
        return data.decode().removeprefix("\ufeff").rstrip()
    except UnicodeDecodeError as error:
        raise BadQuestion(f"stdin is not UTF-8 text: byte {error.start} is not") from None
