"""The network in memory carries bytes as fast as its faults allow."""

from __future__ import annotations

import asyncio
import random

from tests.simulation.clock import Clock
from tests.simulation.dials import Dial, Faults
from tests.simulation.loop import SimulatedLoop
from tests.simulation.network import Network
from tests.simulation.transport import FakeSocket

LATENCY, KERNEL, SIZE = 0.2, 512, 100_000


class Reading(asyncio.Protocol):
    """Reads until there is nothing more."""

    def __init__(self) -> None:
        self.data = b""
        self.ended = asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None:
        self.data += data

    def eof_received(self) -> None:
        self.ended.set_result(None)


def test_a_small_kernel_sends_no_pieces_that_get_ever_smaller() -> None:
    network = Network(random.Random(0))
    loop = SimulatedLoop(network)
    sent = random.Random(1).randbytes(SIZE)
    began = Clock.now

    async def carry() -> bytes:
        reading = Reading()
        listener = network.listen(lambda: reading)
        dial = Dial(random.Random(2), there=Faults(latency=LATENCY, kernel=KERNEL))
        sock = FakeSocket(("127.0.0.1", listener.port), dial)
        near, _ = await network.connect(asyncio.Protocol, sock)
        near.write(sent)
        near.write_eof()
        await reading.ended
        near.abort()
        return reading.data

    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        assert runner.run(carry()) == sent

    # A piece takes twice the latency at most, and has half of the kernel at least.
    assert Clock.now - began < 2 * LATENCY * (SIZE / (KERNEL / 2) + 2)
