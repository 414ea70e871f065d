"""A client of one answer that comes as fast as it can be sent: who waits for it?"""

import contextlib
import json
import socket
import threading
from collections.abc import Iterator

from measure import CHAT, Result

PIECE = 1 << 20  # bytes of a read


@contextlib.contextmanager
def reading(port: int, path: str, seen: Result) -> Iterator[None]:
    """Read the mock provider's endless stream while the block lasts.

    Its end fills *seen*: `megabytes`.
    """
    body = json.dumps({**CHAT, "model": "firehose", "stream": True})
    request = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n{body}"
    )
    seen["megabytes"] = 0.0
    buffer = bytearray(PIECE)

    def read() -> None:
        with contextlib.suppress(OSError):
            while count := connection.recv_into(buffer):
                seen["megabytes"] += count / 1e6

    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(request.encode())
        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            thread.join(15)
