"""The clients of a run: each asks one question, on one face, and does what its dice say.

A client keeps what it read (`truth.Reading`), comes back where its connection broke, if it has that habit, and
notes its outcome. Whatever its network does to it, it never accepts a wrong answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from typing import TYPE_CHECKING, Any

import aiohttp

from tests.simulation.plan import Plan, dial
from tests.simulation.truth import Question, Reading, Violation

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.simulation.network import Dial

# Seconds in which a client hears something, or gives up. Longer than any wait that the server promises.
PATIENCE = 120.0
# Times that a client comes back.
RETURNS = 5
GONE = (aiohttp.ClientError, ConnectionError, TimeoutError, EOFError)
JSON = {"Content-Type": "application/json"}


class Left(Exception):
    """The client has left, as it wanted to."""


class Client:
    """Client *number* of *plan*, which talks to the server at *base*."""

    def __init__(self, plan: Plan, number: int, base: str) -> None:
        self._plan = plan
        self._number = number
        self._base = base
        # Of its own, so that it does the same in a run without the others.
        self._dice = random.Random(f"client {plan.seed} {number}")
        dice = self._dice
        self.face = dice.choice(plan.faces)
        thrown, fault = dice.random(), dice.choice(plan.provider_faults)
        fault = fault.replace("<n>", str(dice.randrange(1, 6)))
        words = " ".join(["word"] * dice.choice((1, 5, 50)))
        self.question = Question(
            number,
            f"q{number} {words}",
            dice.choice((1, 5, 40, 200)),
            fault if thrown < plan.provider_fault_share else "",
        )
        self.reading = Reading(self.question)
        self.name = f"r{number}"
        self._habits = {habit: dice.random() < often for habit, often in plan.habits.items()}
        # The events after which the client does what it has a habit of.
        self._moment = dice.choice((0, 1, 2, 5, 20))
        self._read_pause = dice.choice((0.05, 0.5))
        self.outcome = ""
        self.begins = dice.uniform(0.0, plan.spread)
        self.session: aiohttp.ClientSession

    @property
    def has_id(self) -> bool:
        """Whether the question has an id, by which it is known when it is sent again."""
        return self.face in {"websocket", "sse", "keyed stream", "keyed whole"}

    def dial(self) -> Dial:
        """Draw the next connection of this client."""
        return dial(self._plan, self._dice)

    def has(self, habit: str) -> bool:
        """Return whether this client has a *habit*."""
        return self._habits.get(habit, False)

    async def run(self) -> None:
        """Do all that this client does."""
        await asyncio.sleep(self.begins)
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        timeout = aiohttp.ClientTimeout(total=None, sock_read=PATIENCE, sock_connect=20.0)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as self.session:
            asks = {
                "websocket": self._resuming,
                "sse": self._resuming,
                "stream": self._stream,
                "whole": self._whole,
                "keyed stream": self._stream,
                "keyed whole": self._whole,
                "responses": self._responses,
            }[self.face]
            try:
                async with asyncio.timeout(10 * PATIENCE):
                    if self.has("ask twice") and self.face != "stream":
                        twin = self._twin()
                        both = asyncio.gather(
                            asks(), getattr(twin, asks.__name__)(), return_exceptions=True
                        )
                        for result in await both:
                            if isinstance(result, BaseException):
                                raise result
                    else:
                        await asks()
            except Violation:
                raise
            except Left:
                self.outcome = "left"
            except GONE as exc:
                self.outcome = f"gone: {type(exc).__name__}"
            self.outcome = self.outcome or "?"

    def _twin(self) -> Client:
        """Return a client that asks the same at the same time, and then only reads."""
        twin = Client(self._plan, self._number, self._base)
        twin.session, twin.question, twin.reading = (
            self.session,
            self.question,
            Reading(self.question),
        )
        twin._habits = {}
        return twin

    # Our own faces.

    async def _resuming(self) -> None:
        """Ask on the WebSocket or on SSE, and come back until the answer has ended."""
        read = self._websocket if self.face == "websocket" else self._sse
        for attempt in range(RETURNS + 1):
            try:
                await read(attempt)
            except Left:
                if not self.has("return"):
                    raise
            except GONE:
                if not self.has("return") or attempt == RETURNS:
                    raise
            if self.reading.end or self.outcome:
                self.outcome = self.outcome or self.reading.end
                return
            await asyncio.sleep(self._dice.uniform(0.0, 3.0))

    def _payload(self) -> dict[str, Any]:
        payload: dict[str, Any] = {
            "messages": [{"role": "user", "content": self.question.text}],
            "options": {"max_tokens": self.question.tokens},
            "provider": "sim",
        }
        if self.question.model:
            payload["model"] = self.question.model
        return payload

    async def _websocket(self, attempt: int) -> None:
        url = self._base.replace("http", "ws", 1) + "/ws/chat"
        async with self.session.ws_connect(url, max_msg_size=0) as ws:
            frame = {"action": "chat", "request_id": self.name, "payload": self._payload()}
            if attempt and self.reading.last:
                frame["action"] = "resume"
                frame["payload"] = {"last_event_id": self.reading.last}
            await ws.send_json(frame)
            cancelled = False
            async for message in ws:
                if message.type is not aiohttp.WSMsgType.TEXT:
                    continue
                if self._take(json.loads(message.data)):
                    return
                if self._now("leave"):
                    raise Left
                if self._now("cancel") and not cancelled:
                    cancelled = True
                    await ws.send_json({"action": "cancel", "request_id": self.name})
                if self.has("read slowly"):
                    await asyncio.sleep(self._read_pause)
            raise EOFError(f"closed with {ws.close_code}")

    async def _sse(self, attempt: int) -> None:
        url = f"{self._base}/sse/chat"
        if attempt and self.reading.last:
            request = self.session.get(
                f"{url}/{self.name}", headers={"Last-Event-ID": str(self.reading.last)}
            )
        else:
            body = {**self._payload(), "request_id": self.name}
            request = self.session.post(url, json=body)
        async with request as response:
            if response.status == 204:
                raise Violation("204, though the end was not read")
            if response.status != 200:
                await self._refused(response)
                return
            cancelled = False
            async for data in _events(response):
                if self._take(json.loads(data)):
                    return
                if self._now("leave"):
                    raise Left
                if self._now("cancel") and not cancelled:
                    cancelled = True
                    with contextlib.suppress(*GONE):
                        async with self.session.delete(f"{url}/{self.name}") as answer:
                            await answer.read()
                if self.has("read slowly"):
                    await asyncio.sleep(self._read_pause)
            raise EOFError

    def _take(self, frame: dict[str, Any]) -> bool:
        """Take one frame; return whether it is the last one."""
        status = frame["status"]
        if frame.get("event_id") is None:
            if status in {"error", "busy"}:
                self.outcome = f"refused: {frame['chunk']['code']}"
                # Others' readers, and ours on the next connection, may go on.
                if frame["chunk"]["code"] == "slow_client" and self.has("return"):
                    self.outcome = ""
                return True
            return False
        if frame["request_id"] != self.name:
            raise Violation(f"an event of {frame['request_id']}")
        self.reading.number(frame["event_id"])
        if status == "chunk":
            self.reading.add(frame["chunk"]["data"])
        elif status == "error":
            self.reading.finish(f"error: {frame['chunk']['code']}")
        elif status in {"complete", "cancelled"}:
            self.reading.finish(status)
        return bool(self.reading.end)

    def _now(self, habit: str) -> bool:
        return self.has(habit) and self.reading.last >= self._moment

    # OpenAI's.

    def _body(self, *, stream: bool) -> dict[str, Any]:
        return {
            "model": self.question.model or "sim",
            "messages": [{"role": "user", "content": self.question.text}],
            "max_tokens": self.question.tokens,
            "stream": stream,
        }

    def _headers(self) -> dict[str, str]:
        return {"Idempotency-Key": self.name} if self.face.startswith("keyed") else {}

    async def _stream(self) -> None:
        reading = Reading(self.question)
        async with self.session.post(
            f"{self._base}/v1/chat/completions",
            json=self._body(stream=True),
            headers=self._headers(),
        ) as response:
            if response.status != 200:
                await self._refused(response)
                return
            count = 0
            finish = ""
            async for data in _events(response):
                count += 1
                if data == "[DONE]":
                    if not finish and not self.question.fault.startswith("early-done"):
                        raise Violation("[DONE] without a finish_reason")
                    reading.finish("complete" if finish else "done")
                    continue
                if reading.end:
                    if self.question.fault == "after-done":
                        continue
                    raise Violation("an event after [DONE]")
                event = json.loads(data)
                if "error" in event:
                    reading.end = f"error: {event['error'].get('code')}"
                    continue
                for choice in event["choices"]:
                    reading.add(choice["delta"].get("content") or "")
                    finish = choice.get("finish_reason") or finish
                if self.has("leave") and count >= self._moment:
                    raise Left
                if self.has("half close") and count >= self._moment and response.connection:
                    transport = response.connection.transport
                    if transport is not None and transport.can_write_eof():
                        transport.write_eof()
                if self.has("read slowly"):
                    await asyncio.sleep(self._read_pause)
            if not reading.end and self.question.fault != "no-done":
                raise Violation("the answer ends without [DONE] and without an error")
        self.outcome = reading.end or "no [DONE]"

    async def _whole(self) -> None:
        async with self.session.post(
            f"{self._base}/v1/chat/completions",
            json=self._body(stream=False),
            headers=self._headers(),
        ) as response:
            if response.status != 200:
                await self._refused(response)
                return
            if self.has("read slowly"):
                await asyncio.sleep(self._read_pause)
            answer = json.loads(await response.read())
        text = answer["choices"][0]["message"]["content"]
        if text != self.question.answer:
            raise Violation(f"a whole answer that is wrong: {text[-40:]!r}")
        self.outcome = "complete"

    async def _responses(self) -> None:
        body = {
            "model": self.question.model or "sim",
            "input": self.question.text,
            "max_output_tokens": self.question.tokens,
            "stream": True,
            "store": False,
        }
        text, last, end = "", -1, ""
        async with self.session.post(f"{self._base}/v1/responses", json=body) as response:
            if response.status != 200:
                await self._refused(response)
                return
            async for data in _events(response):
                event = json.loads(data) if data != "[DONE]" else {"type": "[DONE]"}
                kind = event["type"]
                if "sequence_number" in event:
                    if event["sequence_number"] != last + 1:
                        raise Violation(f"{event['sequence_number']} follows {last}")
                    last += 1
                if kind == "response.output_text.delta":
                    text += event["delta"]
                    if not self.question.answer.startswith(text):
                        raise Violation(f"read {text[-40:]!r}, which is not in the answer")
                if kind in {"response.completed", "response.incomplete"}:
                    end = "complete"
                elif kind in {"response.failed", "error"}:
                    end = "error"
                if self.has("leave") and last >= self._moment:
                    raise Left
                if self.has("read slowly"):
                    await asyncio.sleep(self._read_pause)
            if not end:
                raise Violation("a response without an end")
        if end == "complete" and text != self.question.answer:
            raise Violation(
                f"completed with {len(text)} of {len(self.question.answer)} characters"
            )
        self.outcome = end

    async def _refused(self, response: aiohttp.ClientResponse) -> None:
        """Note a refusal, which must say what it is, and when to come back if that is soon."""
        body = json.loads(await response.read())
        code = body["error"]["code"]
        seconds = float(response.headers.get("Retry-After", "0"))
        if code in {"server_at_capacity", "provider_queue_full"} and not 1 <= seconds <= 120:
            raise Violation(f"{code} without a plausible Retry-After")
        if response.status == 500:
            raise Violation(f"500: {code}")
        self.outcome = f"refused: {code}"


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[str]:
    """Yield the data of each event of an event stream."""
    data: list[str] = []
    async for raw in response.content:
        line = raw.decode().rstrip("\r\n")
        if line.startswith("data:"):
            data.append(line[5:].removeprefix(" "))
        elif not line and data:
            yield "\n".join(data)
            data = []
