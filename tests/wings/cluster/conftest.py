"""What instances share: a real Redis or Valkey server, or the script of one in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.redis_server import RedisServer
from tests.support.reference_server import ReferenceServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path) as server:
        yield server


@pytest.fixture
async def reference() -> AsyncIterator[ReferenceServer]:
    server = ReferenceServer()
    yield server
    server.close()
