"""Clients that say nothing when it is their turn: each must be let go by its deadline.

Their connections are good, and they are bytes on a connection rather than an HTTP client, which
would never do that.
"""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

from aioserver.faces.intake import BODY_TIMEOUT
from aioserver.server.connections import LINGERING
from tests.simulation.clock import Clock
from tests.simulation.configuration import GATE, HTTP_SERVER, STREAMS
from tests.simulation.dials import Dial
from tests.simulation.transport import FakeSocket
from tests.simulation.truth import Violation

if TYPE_CHECKING:
    from tests.simulation.client import Client
    from tests.simulation.loop import SimulatedLoop

HEAD = "{} HTTP/1.1\r\nHost: 127.0.0.1\r\n{}"
UPGRADE = (
    "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    "Sec-WebSocket-Key: c2ltdWxhdGVkIGNsaWVudA==\r\n\r\n"
)
LONG_BODY = "Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n{"
# Seconds by which the end may be late: a second for a close handshake, and the latency.
LATE = 2.5
KINDS = ("no byte", "half a head", "half a body", "idle", "deaf")


class _Silent(asyncio.Protocol):
    """Reads all that comes, and answers nothing."""

    def __init__(self) -> None:
        self.text = b""
        self.lost = asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None:
        self.text += data

    def connection_lost(self, exc: BaseException | None) -> None:
        if not self.lost.done():
            self.lost.set_result(None)


async def be_silent(client: Client, port: int) -> None:
    """Connect to *port*, fall silent at some point, and see that the server ends the connection in
    time.
    """
    loop: SimulatedLoop = asyncio.get_running_loop()  # type: ignore[assignment]
    kind = client.dice.choice(KINDS)
    dial = Dial(random.Random(client.dice.random()), address=client.address)
    transport, protocol = await loop.create_connection(
        _Silent, sock=FakeSocket(("127.0.0.1", port), dial)
    )
    assert isinstance(protocol, _Silent)
    credentials = "".join(f"{name}: {value}\r\n" for name, value in client.headers.items())
    last_words = {
        "no byte": "",
        "half a head": HEAD.format("GET /health", credentials),
        "half a body": HEAD.format("POST /v1/chat/completions", credentials) + LONG_BODY,
        "idle": HEAD.format("GET /health", credentials) + "\r\n",
        "deaf": HEAD.format("GET /ws/chat", credentials) + UPGRADE,
    }[kind]
    transport.write(last_words.encode())
    began, seconds = Clock.now, _promised(client, kind)
    try:
        done, _ = await asyncio.wait([protocol.lost], timeout=seconds + LATE)
        if not done and kind == "deaf" and not protocol.text.startswith(b"HTTP/1.1 101 "):
            # It is no WebSocket: its key has too many connections.
            done, _ = await asyncio.wait([protocol.lost], timeout=_promised(client, "idle"))
    finally:
        transport.abort()
    if not done:
        raise Violation(f"{kind}: still open after {Clock.now - began:.1f} s")
    client.outcome = f"silent: {kind}"


def _promised(client: Client, kind: str) -> float:
    """Return the seconds after which a client is let go that is silent in this way."""
    changes = client.plan.changes
    idle = float(changes[f"{HTTP_SERVER}.keepalive_timeout"])
    if kind == "half a body":
        # The connection is closed after the refusal, when its rest was awaited for a moment.
        return BODY_TIMEOUT + LINGERING + idle
    if kind == "deaf":
        # Pings begin with the handshake. The place is not awaited in silence: the socket is told
        # of it.
        pings = changes["chat.websocket.ping_interval"] + changes["chat.websocket.ping_timeout"]
        wheel = min(1.0, changes["chat.websocket.ping_interval"] / 4)
        return float(
            2 * wheel
            + pings
            + changes[f"{STREAMS}.send_timeout"]
            + changes[f"{GATE}.queue_timeout"]
        )
    return idle
