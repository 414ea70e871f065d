"""A program of an operator's that a server asks about requests, and shows answers: a hook."""

from __future__ import annotations

import json
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from aiohttp import web

from tests.support.web_app import served

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from aioserver.wings.hooks.hook_set import HookSet
    from tests.support.server import RunningServer


PASS: dict[str, Any] = {}


def refuse(message: str = "not here", **more: Any) -> dict[str, Any]:
    return {"refuse": {"message": message, **more}}


@dataclass
class HookProgram:
    """What it was asked and shown, and how it answers.

    *decide* answers a request or a whole answer, *read* each line of one that is streamed; None:
    go on.
    """

    decide: Callable[[dict[str, Any]], Awaitable[Any]] | None = None
    read: Callable[[dict[str, Any]], Awaitable[Any]] | None = None
    # What it answers after the last line.
    last: Any = field(default_factory=dict)
    url: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    whole: list[dict[str, Any]] = field(default_factory=list)
    # The lines of each answer that was streamed.
    answers: list[list[dict[str, Any]]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)

    async def serve(self, request: web.Request) -> web.StreamResponse:
        self.headers.append({name.lower(): value for name, value in request.headers.items()})
        if request.content_type == "application/x-ndjson":
            return answer_of(await self._follow(request))
        asked = json.loads(await request.read())
        (self.requests if asked["event"] == "request" else self.whole).append(asked)
        return answer_of(PASS if self.decide is None else await self.decide(asked))

    async def _follow(self, request: web.Request) -> Any:
        lines: list[dict[str, Any]] = []
        self.answers.append(lines)
        # Not `readline`: a line may be long.
        rest = bytearray()
        while data := await request.content.readany():
            rest += data
            *whole, last = rest.split(b"\n") if b"\n" in data else (rest,)
            rest = bytearray(last)
            for line in whole:
                lines.append(json.loads(line))
                if self.read is not None and (said := await self.read(lines[-1])) is not None:
                    return said
        return self.last

    @property
    def ended(self) -> int:
        """How many of the answers have come to their end."""
        return sum(bool(lines) and "end" in lines[-1] for lines in self.answers)

    def texts(self, number: int = -1) -> str:
        """The text of a streamed chat completion."""
        chunks = [
            line["data"] for line in self.answers[number] if isinstance(line.get("data"), dict)
        ]
        return "".join(
            chunk["choices"][0]["delta"].get("content") or ""
            for chunk in chunks
            if chunk.get("choices")
        )


def answer_of(said: Any) -> web.StreamResponse:
    """*said* as an HTTP answer: a status, bytes, or JSON."""
    if isinstance(said, int):
        return web.Response(status=said)
    if isinstance(said, bytes):
        return web.Response(body=said, content_type="application/json")
    return web.json_response(said)


@asynccontextmanager
async def hook_program(**behaviour: Any) -> AsyncIterator[HookProgram]:
    """Run a hook on loopback."""
    program = HookProgram(**behaviour)
    app = web.Application(client_max_size=1 << 26)
    app.router.add_post("/hook", program.serve)
    async with served(app) as base:
        program.url = f"{base}/hook"
        yield program


def entry(program: HookProgram | str, name: str = "guard", **more: Any) -> dict[str, Any]:
    """An entry of `hooks`."""
    url = program if isinstance(program, str) else program.url
    # A decision on a loaded machine takes what it takes.
    return {"name": name, "url": url, "timeout": 30.0, **more}


def hooks_of(server: RunningServer) -> HookSet:
    """The hooks of *server*."""
    (hooks,) = [wing.hooks for wing in server.owners.wings if wing.hooks is not None]
    return hooks  # type: ignore[return-value]
