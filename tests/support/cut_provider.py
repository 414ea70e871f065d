"""A provider whose answers break off in every way that there is, and which says the rest of any
answer that is its own.

What it says, where it breaks off and how follow from the seed in the question, so that a test
knows them, too. Its texts repeat themselves: what is shown twice, or not at all, is a wrong text.
"""

from __future__ import annotations

import asyncio
import random
import re
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import orjson
from aiohttp import web

from aioserver.wings.simulator.exchange import reset
from tests.support.web_app import served

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

WAYS = (
    *("event", "inside", "inside", "reset", "finish", "end mark", "preamble", "garbage", "error"),
    "silence",
)
# One in so many cuts that would be a silence is one: each takes the time of a `read_timeout`.
RARELY = 20
PIECES = (
    *("ha ", "0", "\n", "| a | b |\n", "| --- | --- |\n", '"', "\\", "ü", "👍🏽", "}\n", "\t"),
    *("Once upon a time ", "there was a king ", "who slept. "),
)


@dataclass(frozen=True)
class Cut:
    """What the answer to the question of *seed* says, and where and how it breaks off."""

    seed: int

    @property
    def text(self) -> str:
        dice = random.Random(self.seed)
        few = dice.sample(PIECES, dice.randint(1, 4))
        return "".join(dice.choices(few, k=dice.randint(2, 40)))

    @property
    def way(self) -> str:
        dice = random.Random(f"way {self.seed}")
        way = dice.choice(WAYS)
        return "event" if way == "silence" and dice.random() * RARELY > 1 else way

    def events(self, text: str, *, messages: bool) -> tuple[list[bytes], list[bytes], list[bytes]]:
        """Return the events of an answer: before its text, of its text, and behind it."""
        dice = random.Random(f"events {self.seed} {len(text)}")
        pieces, place = [], 0
        while place < len(text):
            size = dice.randint(1, 12)
            pieces.append(text[place : place + size])
            place += size
        # Bytes as they are, and not escaped: a cut may be within a character.
        return (_messages if messages else _chunks)(pieces, str(dice.getrandbits(64)))


def _event(content: dict[str, Any], name: str = "") -> bytes:
    head = f"event: {name}\n".encode() if name else b""
    return b"%bdata: %b\n\n" % (head, orjson.dumps(content))


def _chunks(pieces: list[str], ident: str) -> tuple[list[bytes], list[bytes], list[bytes]]:
    frame = {"id": ident, "object": "chat.completion.chunk", "created": 1, "model": "m"}

    def chunk(delta: dict[str, Any], finish: str | None = None) -> bytes:
        return _event(
            {**frame, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}
        )

    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    return (
        [chunk({"role": "assistant", "content": ""})],
        [chunk({"content": piece}) for piece in pieces],
        [chunk({}, "stop"), _event({**frame, "choices": [], "usage": usage}), b"data: [DONE]\n\n"],
    )


def _messages(pieces: list[str], ident: str) -> tuple[list[bytes], list[bytes], list[bytes]]:
    def event(kind: str, **members: Any) -> bytes:
        return _event({"type": kind, **members}, kind)

    usage = {"input_tokens": 1, "output_tokens": 1}
    message = {"id": ident, "type": "message", "role": "assistant", "model": "m", "content": []}
    delta = {"stop_reason": "end_turn", "stop_sequence": None}
    return (
        [
            event("message_start", message={**message, "usage": usage}),
            event("content_block_start", index=0, content_block={"type": "text", "text": ""}),
        ],
        [
            event("content_block_delta", index=0, delta={"type": "text_delta", "text": piece})
            for piece in pieces
        ],
        [
            event("content_block_stop", index=0),
            event("message_delta", delta=delta, usage={"output_tokens": 1}),
            event("message_stop"),
        ],
    )


@dataclass
class CutProvider:
    """Answers at `BASE/firstN/v1`, where answers break off, and at `BASE/other/v1`, where none
    does.

    *rests* counts the answers whose rest was asked for; *lies* has what was said to be the
    beginning of an answer and is none.
    """

    rests: int = 0
    lies: list[str] = field(default_factory=list)
    base: str = ""

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        messages = request.path.endswith("/messages")
        asked = [message for message in body["messages"] if message["role"] == "user"]
        content = asked[-1]["content"]
        match = re.search(r"seed (\d+)", content if isinstance(content, str) else str(content))
        assert match is not None
        cut, text, said = Cut(int(match[1])), "", ""
        last = body["messages"][-1]
        if last["role"] == "assistant":
            said = last["content"]
            self.rests += 1
            if not cut.text.startswith(said):
                self.lies.append(said)
        text = cut.text[len(said) :]
        breaks = not said and request.match_info["name"].startswith("first")
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        opening, texts, closing = cut.events(text, messages=messages)
        if breaks:
            await self._break(request, response, cut, (opening, texts, closing))
        else:
            await response.write(b"".join((*opening, *texts, *closing)))
        return response

    async def _break(
        self,
        request: web.Request,
        response: web.StreamResponse,
        cut: Cut,
        parts: tuple[list[bytes], list[bytes], list[bytes]],
    ) -> None:
        opening, texts, closing = parts
        dice, way = random.Random(f"cut {cut.seed}"), cut.way
        count = dice.randint(1, len(texts))
        data = b"".join((*opening, *texts[:count]))
        if way == "preamble":
            data = b"".join(opening[: dice.randint(0, len(opening))])
        elif way == "finish":
            stop = 1 if len(opening) == 1 else 2
            data = b"".join((*opening, *texts, *closing[:stop]))
        elif way == "end mark":
            data = b"".join((*opening, *texts, *closing))
        elif way == "inside":
            following = b"".join((*texts[count:], *closing[:1]))
            # Without the last byte of the finish that is no event.
            data += following[: dice.randint(0, len(following) - 1)]
        elif way == "garbage":
            data += b"data: {\xff\n\n"
        elif way == "error":
            data += _event({"type": "error", "error": {"type": "api_error", "message": "x"}})
        # Reads that end anywhere.
        place = dice.randint(0, len(data))
        for piece in (data[:place], data[place:]):
            if piece:
                await response.write(piece)
                await asyncio.sleep(0)
        if way == "silence":
            await asyncio.get_running_loop().create_future()
        if way in {"error", "garbage"} or (way == "event" and dice.random() < 0.5):
            # The body ends as if it were whole.
            return
        assert request.transport is not None
        if way == "reset":
            reset(request.transport)
        else:
            request.transport.close()


@asynccontextmanager
async def cut_provider() -> AsyncIterator[CutProvider]:
    """Serve a `CutProvider`."""
    provider = CutProvider()
    app = web.Application()
    app.router.add_post("/{name}/v1/{path:.+}", provider.answer)
    async with served(app, shutdown_timeout=1.0) as provider.base:
        yield provider
