r"""The scored probes of Http11Probe (github.com/MDA2AV/Http11Probe): what a server must answer to
requests that are malformed, or that two servers could read differently.

`http11probe.txt` has a line for each: its name, the answers that pass, and its bytes. `{a*9}` in
these repeats a text. An answer is a status, or the first digit of it and `xx`, with what it must
have: a header, `-` and one that it must not have, `empty`, `body=TEXT`, and `closed` for the
connection. `close` and `silence` pass where no answer comes. The second of two requests in one
line must not be answered.

The score is in docs/testing.md.
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
# The probes whose server must send a body back, or answer any request to `/`.
NEED_AN_ECHO: set[str] = set()
OTHERWISE: set[str] = set()
# Seconds without a byte after which a server waits for more.
QUIET = 1.0
AT_ONCE = 10


def probes() -> list[tuple[str, str, bytes]]:
    lines = (Path(__file__).parent / "http11probe.txt").read_text().splitlines()
    rows = [tuple(line.split("\t")) for line in lines]
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


async def test_all_pass_that_need_no_echo(make_server: MakeServer) -> None:
    server = await make_server()
    room = asyncio.Semaphore(AT_ONCE)

    async def failed(name: str, passing: str, sent: bytes) -> str | None:
        async with room:
            received, closed = await answer(server.port, sent)
        print(name, passing, received[:60], closed) if not passes(passing, received, closed) else 0
        return None if passes(passing, received, closed) else name

    results = await asyncio.gather(*(failed(*probe) for probe in probes()))

    assert len(results) == PROBES
    assert {name for name in results if name} == NEED_AN_ECHO | OTHERWISE
