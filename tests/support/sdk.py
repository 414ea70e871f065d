"""OpenAI's own client, in front of a server."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from openai import AsyncOpenAI, DefaultAsyncHttpxClient

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.support.server import RunningServer


@pytest.fixture
async def sdk(server: RunningServer) -> AsyncIterator[AsyncOpenAI]:
    # Nothing is checked, since nothing is encrypted: to read all authorities takes 7 ms.
    http_client = DefaultAsyncHttpxClient(verify=False)
    async with AsyncOpenAI(
        api_key="unused", base_url=server.v1, max_retries=0, http_client=http_client
    ) as client:
        yield client
