"""The regions of a prompt, as a request of a caller has them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from aioserver.protocol.prefix import parts_of
from aioserver.protocol.regions import regions_of
from aioserver.protocol.steps import at_once

if TYPE_CHECKING:
    from aioserver.protocol.regions import Regions


async def reading(body: dict[str, Any], seed: str = "ana") -> Regions | None:
    """Read the regions of *body*, in steps."""
    data = json.dumps(body).encode()
    parts = await parts_of(data)
    return None if parts is None else await regions_of(data, parts, seed)


def regions_in(body: dict[str, Any], seed: str = "ana") -> Regions:
    """Return the regions of *body*, which has some."""
    found = at_once(reading(body, seed))
    assert found is not None
    return found
