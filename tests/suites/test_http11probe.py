r"""The scored probes of Http11Probe (github.com/MDA2AV/Http11Probe): what a server must answer to
requests that are malformed, or that two servers could read differently.

`http11probe.txt` has a line for each, whose requests with a body go to /session: its name, the answers that pass, and its bytes. `{a*9}` in
these repeats a text. An answer is a status, or the first digit of it and `xx`, with what it must
have: a header, `-` and one that it must not have, `empty`, `body=TEXT`, and `closed` for the
connection. `close` and `silence` pass where no answer comes. The second of two requests in one
line must not be answered.

The score is in docs/testing.md: 149 of 161, with what its own program counts as a warning.
"""

from __future__ import annotations

import asyncio
import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.support.server import MakeServer

pytestmark = [pytest.mark.suites, pytest.mark.real_time]

PROBES = 161
# A server would have to send a body back, or to answer any path.
NEED_AN_ECHO = {
    "COMP-POST-CL-BODY",
    "COMP-CHUNKED-BODY",
    "COMP-CHUNKED-MULTI",
    "COMP-CHUNKED-EXTENSION",
    "COMP-CHUNKED-TRAILER-VALID",
    "COMP-CHUNKED-HEX-UPPERCASE",
    "RFC9112-3.2-FRAGMENT-IN-TARGET",
}
# /session answers without its body, and closes the connection where that does not come.
ANSWERED_BEFORE_THE_BODY = {
    "COMP-POST-CL-UNDERSEND",
    "COMP-CHUNKED-NO-FINAL",
    "MAL-POST-CL-HUGE-NO-BODY",
}
# An empty Host is one that is not allowed (403); OPTIONS without CORS is 405, with `Allow`.
OTHERWISE = {"COMP-HOST-EMPTY-VALUE", "COMP-OPTIONS-ALLOW"}
# Seconds without a byte after which a server waits for more.
QUIET = 1.0
AT_ONCE = 10


def probes() -> list[tuple[str, str, bytes]]:
    lines = (Path(__file__).parent / "http11probe.txt").read_text().splitlines()
    rows = [line.split("\t") for line in lines]
    return [(name, passing, payload(text)) for name, passing, text in rows]


def payload(text: str) -> bytes:
    plain = re.sub(r"\{([^{}]+)\*(\d+)\}", lambda match: match[1] * int(match[2]), text)
    return plain.encode("ascii").decode("unicode_escape").encode("latin-1")


async def answer(port: int, sent: bytes) -> tuple[bytes, bool]:
    """What comes for *sent*, and whether the server has closed the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    received = b""
    try:
        with suppress(ConnectionError):
            writer.write(sent)
            while piece := await asyncio.wait_for(reader.read(65536), QUIET):
                received += piece
        return received, True
    except TimeoutError:
        return received, False
    finally:
        writer.transport.abort()


def passes(passing: str, received: bytes, closed: bool) -> bool:
    statuses = re.findall(rb"HTTP/1\.[01] (\d{3})", received)
    if not statuses:
        return ("close" if closed else "silence") in passing.split(",")
    if len([status for status in statuses if status != b"100"]) > 1:
        return False
    head, _, body = received.partition(b"\r\n\r\n")
    names = {line.partition(b":")[0].lower().decode("latin-1") for line in head.splitlines()}
    facts = names | {f"body={body.decode('latin-1').replace(' ', '_')}"}
    facts |= {name for name, true in (("closed", closed), ("empty", not body)) if true}
    status = statuses[0].decode()
    for alternative in passing.split(","):
        wanted, *conditions = alternative.split("+")
        if wanted in {status, f"{status[0]}xx"} and all(
            each[1:] not in facts if each.startswith("-") else each in facts for each in conditions
        ):
            return True
    return False


async def test_all_pass_but_those_that_are_known(make_server: MakeServer) -> None:
    server = await make_server(**{"auth.allowed_hosts": ["example.com"]})
    room = asyncio.Semaphore(AT_ONCE)

    async def fails(passing: str, sent: bytes) -> bool:
        async with room:
            return not passes(passing, *await answer(server.port, sent))

    rows = probes()
    results = await asyncio.gather(*(fails(passing, sent) for _, passing, sent in rows))

    failed = {name for (name, _, _), failing in zip(rows, results, strict=True) if failing}
    assert failed == NEED_AN_ECHO | ANSWERED_BEFORE_THE_BODY | OTHERWISE
    assert len(rows) == PROBES
