"""The client library for programs without an event loop, in threads beside the server's loop."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal

import pytest

from aioserver.client import AnswerError, Complete, Processing, Text
from aioserver.client.sync import Client
from tests.support.command import serving
from tests.support.server import ENDLESS
from tests.support.waiting import LATE, until

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.server import MakeServer, RunningServer

Transport = Literal["websocket", "sse"]
BOTH = pytest.mark.parametrize("transport", ["websocket", "sse"])


@BOTH
async def test_text_pieces_events_and_conversations(
    server: RunningServer, transport: Transport
) -> None:
    def work() -> None:
        with Client(server.base, transport=transport, deadline=30.0) as client:
            text = client.chat("Hi").text()
            assert "".join(client.chat("Hi")) == text
            answer = client.chat("Hi")
            events = list(answer.events())
            assert isinstance(events[0], Processing)
            assert "".join(event.text for event in events if isinstance(event, Text)) == text
            assert isinstance(events[-1], Complete)
            assert answer.complete == events[-1]
            assert answer.received == text
            conversation = client.conversation()
            conversation.chat("One").text()
            conversation.chat("Two").text()

    await asyncio.to_thread(work)

    assert [len(body["messages"]) for body in server.simulator.bodies] == [1, 1, 1, 1, 3]


@BOTH
async def test_leaving_the_loop_cancels_the_answer(
    make_server: MakeServer, transport: Transport
) -> None:
    server = await make_server(ENDLESS)

    def work() -> None:
        for _piece in client.chat("Hi"):
            break
        with client.chat("Hi") as answer:
            next(iter(answer))

    with Client(server.base, transport=transport, deadline=30.0) as client:
        await asyncio.to_thread(work)
        await server.simulator.until(lambda stats: stats.aborted == 2)
        await asyncio.to_thread(client.close)


async def test_cancel_ends_the_loop_of_another_thread(make_server: MakeServer) -> None:
    server = await make_server(ENDLESS)
    with Client(server.base, deadline=30.0) as client:
        answer = await asyncio.to_thread(client.chat, "Hi")
        reading = asyncio.ensure_future(asyncio.to_thread(list, answer))
        await until(lambda: bool(answer.received))
        await asyncio.to_thread(answer.cancel)
        pieces = await reading

        assert "".join(pieces) == answer.received
        assert answer.complete is None
        await asyncio.to_thread(client.close)


async def test_threads_share_a_client(server: RunningServer) -> None:
    def work() -> set[str]:
        with Client(server.base, deadline=30.0) as client, ThreadPoolExecutor(10) as threads:
            return set(threads.map(lambda _: client.chat("Hi").text(), range(30)))

    texts = await asyncio.to_thread(work)

    assert len(texts) == 1
    assert server.simulator.stats().requests == 30


def test_error_is_the_same_one(unused_tcp_port: int) -> None:
    with Client(f"http://127.0.0.1:{unused_tcp_port}") as client:
        with pytest.raises(AnswerError) as caught:
            client.chat("Hi").text()
        with pytest.raises(ValueError, match="empty"):
            client.chat("")

    assert caught.value.code == "connect_error"
    with pytest.raises(RuntimeError, match="closed"):
        client.chat("Hi")


def test_thread_begins_with_the_first_question_and_ends_with_the_client(
    unused_tcp_port: int,
) -> None:
    def threads() -> list[str]:
        return [
            thread.name for thread in threading.enumerate() if thread.name == "aioserver-client"
        ]

    with Client(f"http://127.0.0.1:{unused_tcp_port}") as client:
        assert not threads()
        with pytest.raises(AnswerError):
            client.chat("Hi").text()
        assert threads()

    assert not threads()


PROGRAM = """
import logging, os, sys
from aioserver.client.sync import Client
# It warns of a callback that was slow: a busy machine is no fault.
logging.getLogger("asyncio").setLevel(logging.ERROR)
client = Client(sys.argv[1])
{body}
"""


def run(body: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-X", "dev", "-c", PROGRAM.format(body=body), *arguments]
    return subprocess.run(program, capture_output=True, text=True, timeout=LATE, check=False)


def test_programs_that_forget_fork_or_are_interrupted(tmp_path: Path) -> None:
    with serving((sys.executable, "-m", "aioserver", "serve", "--port", "0"), tmp_path) as url:
        # It never closes the client.
        done = run("print(len(client.chat('Hi', options={'max_tokens': 3}).text()) > 0)", url)
        assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")

        done = run(
            "client.chat('Hi', options={'max_tokens': 3}).text()\n"
            "if not os.fork():\n"
            "    try: client.chat('Hi')\n"
            "    except RuntimeError as error: print(error, flush=True)\n"
            "    os._exit(0)\n"
            "os.wait()",
            url,
        )
        assert "needs a client of its own" in done.stdout, done

        # Ctrl-C in the middle of an answer.
        program = [sys.executable, "-c", PROGRAM.format(body=INTERRUPTED), url]
        with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "began\n"
            os.kill(process.pid, signal.SIGINT)
            assert process.communicate(timeout=LATE)[0] == "interrupted\n"
            assert process.returncode == 0


INTERRUPTED = """
began = False
try:
    while True:
        for piece in client.chat("Hi"):
            if not began:
                print("began", flush=True)
            began = True
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


def test_session_is_refused() -> None:
    arguments: dict[str, Any] = {"session": None}
    with pytest.raises(ValueError, match="event loop"):
        Client("http://127.0.0.1:1", **arguments)
