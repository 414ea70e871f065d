"""Whether bytes that a client sends are a command, or are refused as they should be."""

from __future__ import annotations

from aioserver.errors import InvalidJson, InvalidRequest
from aioserver.protocol import client_frames, frames
from aioserver.protocol.client_frames import BadCommand, Chat, Command
from aioserver.protocol.steps import at_once

# Levels that no Python reads. Until 3.13 it counts them, up to some thousands; from 3.14 on it
# measures its stack, and the usual 8 MiB (`ulimit -s`) have room for 200,000 levels.
TOO_DEEP = 500_000


def encoded(text: bytes | str) -> bytes:
    return text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")


def parse(frame: bytes) -> Command:
    """The command of one WebSocket text frame."""
    return at_once(client_frames.parsing(frame))


def survives(text: bytes | str) -> None:
    """Assert that *text* is a command whose digest can be made, or is refused."""
    try:
        parsed = parse(encoded(text))
    except BadCommand as bad:
        assert isinstance(bad.error, InvalidJson | InvalidRequest)  # noqa: PT017 - either is right
        # The refusal can be written.
        frames.loose_frame(bad.request_id, "error", bad.error.as_chunk())
    else:
        if isinstance(parsed, Chat):
            assert len(parsed.digest()) == 32
