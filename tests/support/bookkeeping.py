"""A ledger against what its provider has counted, while the server is killed again and again.

The provider counts each request that it gets, and the usage that it reports in each answer. What a
request meets there follows from its number: answers in one piece and streamed, refusals, cuts
before and in the answer, clients that leave. At the end each attempt that it has got must be one
line of the ledger, but for those of a moment before a kill, and what it has counted must be what
the ledger says it has.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import signal
from collections import Counter, defaultdict
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import aiohttp
from aiohttp import web

from aioserver.usage.ledger_reader import RUNNING
from tests.support.ledgers import entries_of
from tests.support.process import serving
from tests.support.server import provider_entry
from tests.support.web_app import served

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.support.process import ServerProcess

QUESTION = re.compile(rb"question (\d+)")
# What becomes of a request, and how often.
WAYS = (
    *("whole",) * 8,
    *("stream",) * 8,
    *("retried", "dropped", "cut", "left"),
)
# Seconds before a kill in which a line may not be written yet: a tenth, on a machine that is busy.
MOMENT = 1.0
# Answers of which a server may be full of at once, and what it is told of its provider's limits.
AT_ONCE = 64


def way_of(number: int) -> str:
    """What the request *number* meets at the provider that it asks first."""
    return WAYS[random.Random(number).randrange(len(WAYS))]


@dataclass
class Got:
    """A request, as the provider has got it, and the *usage* that it has reported, if it has.

    *process* counts the servers that there were; *over*: when it had sent its last byte. A
    request that was *dropped* was not answered at all.
    """

    provider: str
    process: int
    refused: bool = False
    dropped: bool = False
    usage: tuple[int, int] | None = None
    over: float = float("inf")


@dataclass
class Books:
    """What the provider has counted, by the number of a request: its attempts in their order."""

    got: dict[int, list[Got]] = field(default_factory=lambda: defaultdict(list))
    # When each server was killed, by its number.
    killed: dict[int, float] = field(default_factory=dict)
    process: int = 0

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """Answer as the way of its number says."""
        body = await request.read()
        name = request.match_info["name"]
        [question] = QUESTION.findall(body)
        number = int(question)
        attempts = self.got[number]
        got = Got(name, self.process)
        attempts.append(got)
        try:
            return await self._answer(request, json.loads(body), number, got, len(attempts) == 1)
        except ConnectionError:
            # The server was killed, or has left.
            return web.Response()
        finally:
            got.over = asyncio.get_running_loop().time()

    async def _answer(
        self, request: web.Request, body: Any, number: int, got: Got, first: bool
    ) -> web.StreamResponse:
        way = way_of(number) if first else "stream" if body.get("stream") else "whole"
        if way == "retried":
            got.refused = True
            return web.json_response({"error": {"message": "busy"}}, status=503)
        if way == "dropped":
            got.dropped = True
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        asked, answered = 10 + number % 90, 3 + number % 20
        usage = {
            "prompt_tokens": asked,
            "completion_tokens": answered,
            "total_tokens": asked + answered,
        }
        if not body.get("stream"):
            message = {"role": "assistant", "content": "word " * answered}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            got.usage = asked, answered
            return web.json_response({"id": "a", "choices": [choice], "usage": usage})
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for token in range(answered):
            if way == "cut" and token == 2:
                assert request.transport is not None
                request.transport.abort()
                return response
            delta: dict[str, Any] = {"content": f"w{token} "}
            await response.write(_event([{"index": 0, "delta": delta, "finish_reason": None}]))
            if way == "left":
                # Its client leaves when it has read the first.
                await asyncio.sleep(0.05)
        await response.write(_event([{"index": 0, "delta": {}, "finish_reason": "stop"}]))
        # What does not arrive is not counted by who does not get it.
        got.usage = asked, answered
        await response.write(_event([], usage=usage) + b"data: [DONE]\n\n")
        return response

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[str]:
        """Serve the providers `first` and `second`; yield the address in front of their names."""
        app = web.Application()
        app.router.add_post("/{name}/v1/chat/completions", self.answer)
        async with served(app, shutdown_timeout=1.0) as base:
            yield base


def _event(choices: list[dict[str, Any]], **more: Any) -> bytes:
    event = {"id": "a", "object": "chat.completion.chunk", "choices": choices, **more}
    return b"data: " + json.dumps(event).encode() + b"\n\n"


@dataclass
class Result:
    """What came of a run: the *wrong* attempts, in words; and the sums of both."""

    wrong: list[str]
    outcomes: Counter[str]
    attempts: int
    # Of the attempts that the provider has counted by the ledger: what that says, and the provider.
    ledger: tuple[int, int]
    provider: tuple[int, int]
    # Attempts of the moment before a kill that have no line, or none but `running`.
    missing: int


async def keep_books(folder: Path, answers: int, kills: int, clients: int = 16) -> Result:
    """Ask for so many *answers*, with as many *kills* of the server in between, and compare."""
    books = Books()
    async with books.serving() as address:
        changes: dict[str, Any] = {
            "usage.path": str(folder / "usage"),
            "llm.active": "first",
            "llm.fallbacks": ["second"],
            "logging.level": "ERROR",
        }
        for name in ("first", "second"):
            changes[f"llm.providers.{name}"] = {
                **provider_entry(
                    f"{address}/{name}/v1", max_retries=1, backoff_factor=0.01, queue_size=1000
                ),
                "continuation": "prefill",
            }
        numbers = iter(range(1, answers + 1))
        part = answers // (kills + 1)
        for process in range(kills + 1):
            books.process = process
            async with serving(folder / "config.yaml", address, changes=changes) as server:
                await server.ready()
                last = process == kills
                mine = list(numbers) if last else [next(numbers) for _ in range(part)]
                await _ask_all(server, mine, clients, books, kill=not last)
                if last:
                    server.signal(signal.SIGTERM)
                await server.ended(60)
    return _compare(books, folder / "usage")


async def _ask_all(
    server: ServerProcess, numbers: list[int], clients: int, books: Books, *, kill: bool
) -> None:
    """Ask for all answers; or kill *server* when nine tenths of them were asked for."""
    queue = iter(numbers)
    asked = 0
    deadly = len(numbers) * 9 // 10

    async def client(session: aiohttp.ClientSession) -> None:
        nonlocal asked
        for number in queue:
            asked += 1
            if kill and asked == deadly:
                server.signal(signal.SIGKILL)
                books.killed[books.process] = asyncio.get_running_loop().time()
                return
            if books.process in books.killed:
                return
            with contextlib.suppress(aiohttp.ClientError, OSError):
                await _ask(server, session, number)

    connector = aiohttp.TCPConnector(limit=0)
    async with (
        aiohttp.ClientSession(connector=connector) as session,
        asyncio.TaskGroup() as group,
    ):
        for _ in range(clients):
            group.create_task(client(session))


async def _ask(server: ServerProcess, session: aiohttp.ClientSession, number: int) -> None:
    way = way_of(number)
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": f"question {number} "}],
        "stream": way in {"stream", "cut", "left"},
    }
    if body["stream"]:
        body["stream_options"] = {"include_usage": True}
    headers = {"X-Request-ID": f"{number}"}
    url = f"{server.base}/v1/chat/completions"
    async with session.post(url, json=body, headers=headers) as response:
        if way == "left":
            await response.content.readline()
            response.close()
            return
        await response.read()


def _compare(books: Books, directory: Path) -> Result:
    """Compare each attempt that the provider has got with its line."""
    lines: dict[tuple[int, int], dict[str, Any]] = {}
    wrong: list[str] = []
    for entry in entries_of(directory):
        key = int(entry["request_id"]), entry["attempt"]
        if key in lines:
            wrong.append(f"two ids for one attempt: {entry}")
        lines[key] = entry
    outcomes = Counter(entry["outcome"] for entry in lines.values())
    ledger, provider, attempts, missing = [0, 0], [0, 0], 0, 0
    for number, all_got in books.got.items():
        attempt = 0
        for got in all_got:
            attempt += 1
            line = lines.get((number, attempt))
            if got.dropped and (line is None or line["outcome"] != "failed"):
                # On a connection that was used before: the request was repeated at once, since
                # nobody can have worked on it.
                attempt -= 1
                continue
            lines.pop((number, attempt), None)
            if got.refused:
                if line is not None:
                    wrong.append(f"a refusal has a line: {line}")
                continue
            attempts += 1
            if line is None or line["outcome"] == RUNNING:
                killed = books.killed.get(got.process, float("inf"))
                if got.over < killed - MOMENT:
                    wrong.append(f"no last line: {number}, attempt {attempt}, {got}, {line}")
                missing += 1
            elif line["provider"] != got.provider:
                wrong.append(f"another provider: {got}, {line}")
            elif line["source"] == "provider":
                tokens = line["in"], line["out"]
                if got.usage != tokens:
                    wrong.append(f"not what the provider has counted: {got}, {line}")
                ledger = [total + count for total, count in zip(ledger, tokens, strict=True)]
                counted = (0, 0) if got.usage is None else got.usage
                provider = [total + count for total, count in zip(provider, counted, strict=True)]
            elif line["outcome"] == "ok":
                wrong.append(f"an estimate, though the provider has counted: {got}, {line}")
    wrong += [f"nobody was asked for this: {entry}" for entry in lines.values()]
    return Result(
        wrong,
        outcomes,
        attempts,
        (ledger[0], ledger[1]),
        (provider[0], provider[1]),
        missing,
    )
