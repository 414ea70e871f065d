"""The fixed shares of a worker."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from aioserver.server.shares_of import share_of, shares_of
from tests.support.server import CONCURRENCY, NOWHERE, configured
from tests.support.workers import workers_of

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(("total", "workers"), [(100, 4), (7, 3), (2, 5), (1, 1)])
def test_shares_add_up_and_differ_by_one_at_most(total: int, workers: int) -> None:
    shares = [share_of(total, rank, workers) for rank in range(workers)]

    assert sum(shares) == total
    assert max(shares) - min(shares) <= 1


def test_each_worker_can_keep_one_whole_body_answer_and_log(tmp_path: Path) -> None:
    changes = {
        f"{CONCURRENCY}.max_body_bytes": 1000,
        "chat.websocket.max_message_size": 400,
        "chat.streams.max_kept_bytes": 900,
        "chat.streams.max_stream_bytes": 100,
        "chat.streams.max_response_bytes": 50,
        "chat.streams.max_detached": 2,
    }
    settings = configured(NOWHERE, changes, tmp_path / "config.yaml").settings

    chat = shares_of(settings, 3, 4).chat

    assert chat.websocket.concurrency.max_body_bytes == 400
    assert chat.streams.max_kept_bytes == 225
    assert chat.streams.max_detached == 1
    assert chat.websocket.concurrency.max_connections == 50
    assert shares_of(settings, 0, 1) == settings


async def test_a_reload_keeps_the_shares(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "aioserver.reload")
    changes = {"chat.streams.max_kept_bytes": 2**30}
    async with workers_of(tmp_path, 2, 20, **changes) as workers:
        assert workers.servers[1].owners.streams.stats().max_bytes == 2**29

        await workers.change(20)
        assert "configuration applied: nothing has changed" in caplog.text
        workers.changes["chat.streams.max_kept_bytes"] = 2**29
        await workers.change(20)

        assert workers.servers[1].owners.streams.stats().max_bytes == 2**28
