"""Events of an event stream, as a client reads them: nothing of the server's own parser."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.simulation.clock import Clock
from tests.simulation.truth import Violation

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import aiohttp

    from tests.simulation.patience import Patience


async def events(response: aiohttp.ClientResponse, patience: Patience) -> AsyncIterator[bytes]:
    """Yield the data of each event; all that comes, comments too, is noted by *patience*.

    Raises:
        Violation: nothing has come for too long.
    """
    rest, since = b"", Clock.now
    while part := await response.content.readany():
        if Clock.now - since > patience.quiet():
            raise Violation(f"nothing was heard for {Clock.now - since:.1f} s")
        patience.heard()
        *blocks, rest = (rest + part).replace(b"\r\n", b"\n").split(b"\n\n")
        for block in blocks:
            lines = [
                line[5:].removeprefix(b" ")
                for line in block.split(b"\n")
                if line.startswith(b"data:")
            ]
            if lines:
                yield b"\n".join(lines)
        # Whoever reads slowly hears nothing meanwhile.
        since = Clock.now
