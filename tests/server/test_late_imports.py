"""A process that serves imports nothing any more: its files may be those of another version, since a
worker that is replaced goes on beside one of a new version.
"""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import aiohttp
import pytest

from tests.support.chat import STREAMED
from tests.support.process import serving
from tests.support.server import NOWHERE

if TYPE_CHECKING:
    from pathlib import Path

# Writes the name of each module that is imported to the file in NOTED.
HOOK = """
import os, sys
sys.addaudithook(
    lambda event, args: event == "import"
    and os.write(descriptor, f"{args[0]}\\n".encode()) and None
)
descriptor = os.open(os.environ["NOTED"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
"""
PAGES = ("", "dashboard", "health", "ready", "stats", "metrics", "openapi.json", "v1/models")
DEMO = {"llm.active": "demo", "llm.providers.demo": {"simulated": True, "model": "demo"}}
QUESTIONS = {
    "v1/chat/completions": {**STREAMED, "max_tokens": 3},
    "v1/messages": {
        "model": "demo",
        "max_tokens": 3,
        "messages": [{"role": "user", "content": "Hello"}],
    },
    "v1/responses": {"model": "demo", "input": "Hello", "max_output_tokens": 3, "store": True},
    "sse/chat": {"request_id": "late", "text": "Hello", "options": {"max_tokens": 3}},
    "v1/embeddings": {"model": "demo", "input": "Hello"},
}


@pytest.mark.real_time
@pytest.mark.timeout(90)
async def test_a_server_imports_nothing_once_it_is_ready(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(HOOK)
    noted = tmp_path / "imports"
    environ = {"PYTHONPATH": str(tmp_path), "NOTED": str(noted)}

    async with serving(
        tmp_path / "config.yaml", NOWHERE, changes=DEMO, environ=environ
    ) as process:
        await process.ready()
        before = len(noted.read_text().splitlines())
        async with aiohttp.ClientSession() as session:
            for page in PAGES:
                async with session.get(f"{process.base}/{page}") as response:
                    await response.read()
            for path, body in QUESTIONS.items():
                for streamed in (True, False):
                    question = body if path == "sse/chat" else {**body, "stream": streamed}
                    url = f"{process.base}/{path}"
                    async with session.post(url, json=question) as response:
                        await response.read()
        process.change({**DEMO, "logging.level": "INFO", "chat.websocket.ping_interval": 19})
        process.signal(signal.SIGHUP)
        await process.logs("configuration applied")
        process.signal()
        await process.ended()

        late = noted.read_text().splitlines()[before:]
    assert before > 100, "those of its start"
    assert [name for name in late if name.startswith("aioserver")] == []
