"""A client that sends the largest body that aioserver accepts, once a second: who waits for it?"""

import contextlib
import http.client
import threading
import time
from collections.abc import Iterator

from measure import Result

LARGEST = 16 << 20  # bytes: max_message_size
# What takes long to read, or has to be changed, in one body after the other.
FILLINGS = (
    b"{},",
    rb'"\ud83d",',
    '"\U0001f600\u00e9",'.encode(),
    b'{"model":"mock-model"},',
    b"1,",
    b"[" * 400 + b"]" * 400 + b",",
)


def bodies() -> list[bytes]:
    """A body of LARGEST bytes for each filling."""
    head, tail = b'{"model":"mock-model","messages":[{"role":"user","content":"a","x":[', b"0]}]}"
    room = LARGEST - len(head) - len(tail)
    return [
        head + filling * (room // len(filling)) + b" " * (room % len(filling)) + tail
        for filling in FILLINGS
    ]


@contextlib.contextmanager
def sending(port: int, path: str, seen: Result) -> Iterator[None]:
    """Send a body each second while the block lasts.

    Its end fills *seen*: `sent`, `answered`, `slowest`.

    A body that takes longer than a second delays the next one.
    """
    over = threading.Event()
    prepared = bodies()
    seen |= {"sent": 0, "answered": 0, "slowest": 0.0}

    def send() -> None:
        due = time.monotonic()
        while not over.wait(max(0.0, due - time.monotonic())):
            began, due = time.monotonic(), due + 1.0
            body = prepared[seen["sent"] % len(prepared)]
            seen["sent"] += 1
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            with contextlib.suppress(OSError, http.client.HTTPException):
                connection.request("POST", path, body, {"Content-Type": "application/json"})
                response = connection.getresponse()
                response.read()
                seen["answered"] += response.status == 200
            connection.close()
            seen["slowest"] = max(seen["slowest"], time.monotonic() - began)

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(15)
