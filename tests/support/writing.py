"""Writing to a connection that the other side may have left."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio


def write(writer: asyncio.StreamWriter, data: bytes) -> None:
    """Write *data*, unless the connection is closed. No other place in the tests writes to one
    that may be.

    Raises:
        ConnectionResetError: it is closed. asyncio's transport would take the bytes and drop them,
            and uvloop's would raise RuntimeError.
    """
    if writer.is_closing():
        raise ConnectionResetError("the other side has closed the connection")
    writer.write(data)
