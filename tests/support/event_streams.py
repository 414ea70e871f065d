"""The claims of `aioserver.protocol.eventstream`, checked for any bytes in any pieces."""

from __future__ import annotations

import itertools

from aioserver.protocol.eventstream import (
    BOM,
    MAX_EVENT_BYTES,
    ServerEvent,
    Splitter,
    count,
    parse,
    split,
)


class Parser:
    """Bytes in, events out."""

    def __init__(self, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        self._splitter = Splitter(max_event_bytes)

    @property
    def pending(self) -> bytes:
        return self._splitter.pending

    def feed(self, chunk: bytes) -> list[ServerEvent]:
        return parse(self._splitter.feed(chunk))


def reference(data: bytes) -> list[ServerEvent]:
    """The events of a whole stream, line by line as the standard says it."""
    if data.startswith(BOM):
        data = data[3:]
    lines: list[bytes] = []
    line = b""
    at = 0
    while at < len(data):
        byte = data[at : at + 1]
        at += 1
        if byte == b"\r":
            if data[at : at + 1] == b"\n":
                at += 1
        elif byte != b"\n":
            line += byte
            continue
        lines.append(line)
        line = b""
    # The rest in `line` has no end: it is never processed.
    events: list[ServerEvent] = []
    buffer, name = b"", b""
    id_: bytes | None = None
    for line in lines:
        if line == b"":
            if buffer:
                events.append(ServerEvent(buffer[:-1], name, id_))
            buffer, name, id_ = b"", b"", None
            continue
        if line.startswith(b":"):
            continue
        if b":" in line:
            field, value = line[: line.index(b":")], line[line.index(b":") + 1 :]
            if value[:1] == b" ":
                value = value[1:]
        else:
            field, value = line, b""
        if field == b"event":
            name = value
        elif field == b"data":
            buffer += value + b"\n"
        elif field == b"id" and b"\0" not in value:
            id_ = value
    return events


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    at = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[start:end] for start, end in itertools.pairwise(at)]


def check(data: bytes, chunks: list[bytes]) -> None:
    """Every claim of the module, for *data* that comes as *chunks*."""
    parser, splitter = Parser(), Splitter()
    events = [event for chunk in chunks for event in parser.feed(chunk)]
    blocks = [splitter.feed(chunk) for chunk in chunks]

    assert events == reference(data)
    given_out = b"".join(blocks) + splitter.pending
    assert given_out == (data[3:] if data.startswith(BOM) else data)
    assert parser.pending == splitter.pending
    for block in blocks:
        assert block == b"" or block[-1:] in {b"\n", b"\r"}
        assert count(block) == len(split(block)) == len(parse(block))
        assert parse(b"".join(split(block))) == parse(block)
        assert all(count(event) == 1 for event in split(block))
    assert [event for block in blocks for event in parse(block)] == events
