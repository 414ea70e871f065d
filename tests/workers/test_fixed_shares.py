"""The fixed shares of a worker."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aioserver.limits.fixed_share import Scope
from aioserver.workers.fixed_shares import share_out
from tests.support.server import CONCURRENCY, NOWHERE, configured

if TYPE_CHECKING:
    from pathlib import Path


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

    chat = share_out(settings, Scope("", 3, 4)).chat

    assert chat.websocket.concurrency.max_body_bytes == 400
    assert chat.streams.max_kept_bytes == 225
    assert chat.streams.max_detached == 1
    assert chat.websocket.concurrency.max_connections == 50
    assert share_out(settings, Scope("", 0, 1)) == settings
