"""The official clients of OpenAI and Anthropic, in front of a server.

They check no certificate, since nothing is encrypted: to read all authorities takes 15 ms.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from openai import AsyncOpenAI, DefaultAsyncHttpxClient

from tests.support.lazily import lazily

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import anthropic

    from tests.support.server import RunningServer
else:
    anthropic = lazily("anthropic")


def openai_of(url: str, key: str = "unused") -> AsyncOpenAI:
    """OpenAI's client of the API at *url*, such as `server.v1`."""
    http_client = DefaultAsyncHttpxClient(verify=False)
    return AsyncOpenAI(api_key=key, base_url=url, max_retries=0, http_client=http_client)


def anthropic_of(url: str, key: str = "unused", **options: Any) -> anthropic.AsyncAnthropic:
    """Anthropic's client of the API at *url*, such as `server.base`."""
    http_client = anthropic.DefaultAsyncHttpxClient(verify=False)
    return anthropic.AsyncAnthropic(
        **{"api_key": key, "base_url": url, "max_retries": 0, **options}, http_client=http_client
    )


@pytest.fixture
async def sdk(server: RunningServer) -> AsyncIterator[AsyncOpenAI]:
    async with openai_of(server.v1) as client:
        yield client
