"""Requests that proxy and server might read differently, sent through the samples of `deploy/`.

Whatever a proxy makes of them, each request that reaches aioserver has one answer, which reaches
the client that sent it; and the next client gets its own answer, also over a connection that the
proxy has kept.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

import pytest

from tests.support.proxy import Proxy, running
from tests.support.smuggling import INVALID, LAST, LOGGED, VALID, accesses, answers_with_ids
from tests.support.waiting import patience

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.server import MakeServer


async def answers_to(proxy: Proxy, data: bytes) -> bytes:
    """Everything that *proxy* says to a client that sends *data*."""
    port = int(proxy.base.rpartition(":")[2])
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=proxy.tls)
    try:
        writer.write(data + LAST)
        async with asyncio.timeout(patience(20)):
            return await reader.read()
    finally:
        writer.transport.abort()


@pytest.mark.parametrize("kind", ["nginx", "haproxy"])
async def test_each_request_that_reaches_the_server_has_one_answer(
    kind: str, tmp_path: Path, make_server: MakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    server = await make_server(**LOGGED)
    caplog.set_level(logging.INFO, "aioserver.access")
    (tmp_path / "proxy").mkdir()
    async with running(kind, tmp_path / "proxy", server.port) as proxy:
        for number, (data, followed) in enumerate([*((case, True) for case in INVALID), *VALID]):
            caplog.clear()
            answers = await answers_to(proxy, data)
            mine = {"X-Request-Id": f"victim-{number}", "Connection": "close"}
            async with proxy.session.get(f"{proxy.base}/v1/models", headers=mine) as response:
                assert response.status == 200
                assert response.headers["x-request-id"] == f"victim-{number}"
                assert (await response.json())["object"] == "list"

            seen = [line.fields["path"] for line in accesses(caplog)]
            seen = [path for path in seen if path != "/v1/models"]
            answered = answers_with_ids(answers)
            # A request without a version (HTTP/0.9) gets a body and no head.
            if not answers.startswith(b"HTTP/"):
                answered = min(len(seen), 1)
            assert len(seen) == answered, data
            assert seen.count("/smuggled") <= followed, data
    assert server.simulator.stats().requests == 0
