"""A client of a soak test: it asks one question on one face, does what its dice say, and checks
what it reads.
"""

from __future__ import annotations

import asyncio
import json
import random
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import aiohttp

from aioserver.wings.simulator import model
from tests.soak import talks
from tests.soak.answers import GONE, SHORT, Answer, Left, Violation, events_of
from tests.support.chat import ENDS, cancel, resume

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

FACES = (
    *("websocket", "sse", "stream", "whole", "keyed stream", "keyed whole", "responses"),
    *("response lanes", "response chain", "conversation"),
)
# The kinds that talk, and the functions by which they do.
TALKS = {
    "response lanes": talks.lanes,
    "response chain": talks.chain,
    "conversation": talks.conversation,
}
# What clients do beside asking and reading, and how often.
HABITS = {"leave": 0.15, "return": 0.6, "cancel": 0.1, "ask twice": 0.1, "read slowly": 0.03}
# The share of questions that are a text, and so begin a conversation.
TEXT_SHARE = 0.3
# The share of conversations with a provider that has chat completions only.
BRIDGED_SHARE = 0.5
RETURNS = 3
# Words of a question; the last are those of an agent with a long history, 200 KB.
WORDS, WORD_WEIGHTS = (1, 5, 50, 500, 40_000), (6, 6, 6, 6, 1)


@dataclass
class Client:
    """Client *name*, which asks the server at *base* for an answer that fails by *fault*, if by
    any.

    *model* is what it asks for, None the active provider's own. *outcome* says at last how it
    ended.
    """

    base: str
    name: str
    model: str | None
    fault: str
    session: aiohttp.ClientSession
    outcome: str = ""
    dice: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.dice = dice = random.Random(self.name)
        self.face = dice.choice(FACES)
        self._habits = {habit for habit, often in HABITS.items() if dice.random() < often}
        # The events after which it does what it has a habit of.
        self._moment = dice.choice((0, 1, 2, 5, 20))
        words = dice.choices(WORDS, WORD_WEIGHTS)[0]
        # A conversation keeps no turns as long as that.
        self.padding = " ".join(
            ["word"] * (min(words, 500) if self.face == "conversation" else words)
        )
        self._text = f"{self.name} {self.padding}"
        self.tokens = dice.choice((1, 5, 40, 200))
        self._truth = "".join(model.tokens(model.speech(self._text, 1))[: self.tokens])
        self._as_text = dice.random() < TEXT_SHARE
        if self.face.startswith("response ") and not self.fault and dice.random() < BRIDGED_SHARE:
            self.model = talks.BRIDGED

    async def run(self) -> None:
        """Ask, and read to an end; sets `outcome`.

        Raises:
            Violation: the server has broken a promise.
        """
        ask = self._ask()
        once = {"stream", *TALKS}
        count = 2 if "ask twice" in self._habits and self.face not in once else 1
        results = await asyncio.gather(*(ask() for _ in range(count)), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, (Left, *GONE)):
                raise result
        first = results[0]
        self.outcome = (
            "left"
            if isinstance(first, Left)
            else f"gone: {type(first).__name__}"
            if isinstance(first, BaseException)
            else first
        )

    def _ask(self) -> Callable[[], Awaitable[str]]:
        """Return what asks on the client's face, and returns how that ended."""
        if self.face in TALKS:
            return partial(TALKS[self.face], self)
        asks = {"websocket": self._resuming, "sse": self._resuming, "responses": self._responses}
        return asks.get(self.face, self._completion)

    def does(self, habit: str) -> bool:
        """Return whether the client has that *habit*."""
        return habit in self._habits

    def stay(self) -> None:
        """Leave no more."""
        self._habits.discard("leave")

    def _answer(self) -> Answer:
        return Answer(self._truth, self.fault)

    async def do_habits(self, seen: int) -> None:
        """Leave, or rest for a moment, if *seen* events are enough for that."""
        if "leave" in self._habits and seen >= self._moment:
            raise Left
        if "read slowly" in self._habits:
            await asyncio.sleep(0.1)

    # Our own faces.

    async def _resuming(self) -> str:
        """Ask on the WebSocket or on SSE, and come back until the answer has ended."""
        answer = self._answer()
        read = self._websocket if self.face == "websocket" else self._sse
        for attempt in range(RETURNS):
            try:
                return await read(answer, attempt)
            except (Left, *GONE):
                if "return" not in self._habits or attempt == RETURNS - 1:
                    raise
            self._habits.discard("leave")
            await asyncio.sleep(self.dice.uniform(0.0, 1.0))
        raise AssertionError("the last attempt returns or raises")

    def _payload(self) -> dict[str, Any]:
        what: dict[str, Any] = {"text": self._text}
        if not self._as_text:
            what = {"messages": [{"role": "user", "content": self._text}]}
        chosen = {} if self.model is None else {"model": self.model}
        return {**what, **chosen, "options": {"max_tokens": self.tokens}}

    async def _websocket(self, answer: Answer, attempt: int) -> str:
        url = self.base.replace("http", "ws", 1) + "/ws/chat"
        async with self.session.ws_connect(url, max_msg_size=0) as ws:
            if attempt and answer.last:
                await ws.send_json(resume(self.name, answer.last))
            else:
                await ws.send_json(
                    {"action": "chat", "request_id": self.name, "payload": self._payload()}
                )
            cancelled = "cancel" not in self._habits
            async for message in ws:
                if message.type is not aiohttp.WSMsgType.TEXT:
                    continue
                if ended := self._take(answer, json.loads(message.data)):
                    return ended
                await self.do_habits(answer.last)
                if not cancelled and answer.last >= self._moment:
                    cancelled = True
                    await ws.send_json(cancel(self.name))
            raise EOFError(f"closed with {ws.close_code}")

    async def _sse(self, answer: Answer, attempt: int) -> str:
        url = f"{self.base}/sse/chat"
        if attempt and answer.last:
            headers = {"Last-Event-ID": str(answer.last)}
            request = self.session.get(f"{url}/{self.name}", headers=headers)
        else:
            request = self.session.post(url, json={**self._payload(), "request_id": self.name})
        async with request as response:
            if response.status != 200:
                return await _refused(response)
            cancelled = "cancel" not in self._habits
            async for data in events_of(response):
                if ended := self._take(answer, json.loads(data)):
                    return ended
                await self.do_habits(answer.last)
                if not cancelled and answer.last >= self._moment:
                    cancelled = True
                    async with self.session.delete(f"{url}/{self.name}") as deleted:
                        await deleted.read()
            raise EOFError

    def _take(self, answer: Answer, frame: dict[str, Any]) -> str:
        """Take one frame; return how the answer ended, or nothing if it goes on."""
        status, chunk = frame["status"], frame["chunk"]
        if frame.get("event_id") is None:
            return f"refused: {chunk['code']}" if status in {"error", "busy"} else ""
        if frame["request_id"] != self.name:
            raise Violation(f"an event of {frame['request_id']}")
        answer.number(frame["event_id"])
        if status == "chunk":
            answer.add(chunk["data"])
        elif status in ENDS:
            answer.finish(status)
        return answer.end

    # OpenAI's.

    async def _completion(self) -> str:
        keyed = self.face.startswith("keyed")
        streamed = self.face.endswith("stream")
        body = {
            "messages": [{"role": "user", "content": self._text}],
            "max_tokens": self.tokens,
            "stream": streamed,
            **({} if self.model is None else {"model": self.model}),
        }
        headers = {"Idempotency-Key": self.name} if keyed else {}
        url = f"{self.base}/v1/chat/completions"
        answer = self._answer()
        async with self.session.post(url, json=body, headers=headers) as response:
            if response.status != 200:
                return await _refused(response)
            if not streamed:
                choice = json.loads(await response.read())["choices"][0]
                answer.add(choice["message"]["content"])
                # A fault behind all of the few slices of a short body comes too late.
                answer.fault = answer.fault if answer.fault in SHORT else ""
                answer.finish("complete")
                return answer.end
            seen, finished = 0, False
            async for data in events_of(response):
                seen += 1
                if data == "[DONE]":
                    if not finished and not self.fault.startswith("early-done"):
                        raise Violation("[DONE] without a finish_reason")
                    answer.finish("complete" if finished else "cut short")
                    continue
                if answer.end:
                    raise Violation("an event behind the end")
                event = json.loads(data)
                if "error" in event:
                    answer.finish("error")
                for choice in event.get("choices", ()):
                    answer.add(choice["delta"].get("content") or "")
                    finished = finished or choice.get("finish_reason") is not None
                await self.do_habits(seen)
        if not answer.end:
            raise Violation("the answer ends without [DONE] and without an error")
        return answer.end

    async def _responses(self) -> str:
        body = {
            "input": self._text,
            "max_output_tokens": self.tokens,
            "stream": True,
            "store": False,
            **({} if self.model is None else {"model": self.model}),
        }
        answer = self._answer()
        async with self.session.post(f"{self.base}/v1/responses", json=body) as response:
            if response.status != 200:
                return await _refused(response)
            async for data in events_of(response):
                event = json.loads(data)
                if answer.end:
                    raise Violation("an event behind the end")
                # The simulator leaves out events in the middle of slices.
                if "sequence_number" in event and self.fault != "slices":
                    answer.number(event["sequence_number"] + 1)
                match event["type"]:
                    case "response.output_text.delta":
                        answer.add(event["delta"])
                    case "response.completed" | "response.incomplete":
                        answer.finish("complete")
                    case "response.failed":
                        answer.finish("error")
                await self.do_habits(answer.last)
        if not answer.end:
            raise Violation("a response without an end")
        return answer.end


async def _refused(response: aiohttp.ClientResponse) -> str:
    """Return which refusal a response is; none is our fault."""
    code = json.loads(await response.read())["error"]["code"]
    if response.status == 500:
        raise Violation(f"500: {code}")
    return f"refused: {code}"
