"""The regions and the prefix of a prompt."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from aioserver.protocol.prefix import prefix_of
from aioserver.protocol.regions import RegionReader
from aioserver.protocol.steps import at_once

if TYPE_CHECKING:
    from aioserver.protocol.prefix import Prefix
    from aioserver.protocol.regions import Regions


async def reading(
    body: dict[str, Any] | bytes, reader: RegionReader | None = None
) -> Regions | None:
    """Read the regions of *body*, in steps."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return await (reader or RegionReader()).read(data)


def regions_in(body: dict[str, Any] | bytes, reader: RegionReader | None = None) -> Regions:
    """Return the regions of *body*, which has some."""
    found = at_once(reading(body, reader))
    assert found is not None
    return found


def prefix_in(body: dict[str, Any] | bytes, seed: str = "group") -> Prefix:
    """Return the prefix of *body*, which has a prompt."""
    return prefix_of(regions_in(body), seed)
