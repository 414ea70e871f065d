"""A server whose provider says what a test wants."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.telling_provider import TellingProvider, telling

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.support.server import MakeServer, RunningServer


@pytest.fixture
async def provider() -> AsyncIterator[TellingProvider]:
    async with telling() as provider:
        yield provider


@pytest.fixture
async def telling_server(make_server: MakeServer, provider: TellingProvider) -> RunningServer:
    """A server in front of `provider`."""
    return await make_server(**{"llm.providers.sim.base_url": provider.base_url})
