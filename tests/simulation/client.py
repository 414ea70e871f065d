"""A client of a run: it asks one question, on one face, and does what its dice say.

A client keeps what it read (`truth.Reading`), comes back where its connection broke, if it has
that habit, and notes its outcome. Whatever its network does to it, it never accepts a wrong
answer. How it asks is in own_faces.py and openai_faces.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import random
import re
import time
from contextvars import ContextVar
from math import inf
from typing import TYPE_CHECKING, Any

import aiohttp
import orjson

from aioserver.protocol.request_headers import CALLS, PREAMBLE, TURN
from tests.simulation import (
    agents,
    background,
    kept_talk,
    messages,
    openai_faces,
    own_faces,
    response_chain,
    response_lanes,
    uploads,
)
from tests.simulation.clock import Clock
from tests.simulation.configuration import BODY, GATE, GROUP, ROOM, STREAMS
from tests.simulation.dials import draw_dial
from tests.simulation.engine_shapes import THOUGHTFUL
from tests.simulation.hurry import CODE, draw_terms
from tests.simulation.patience import GONE, Left, Patience
from tests.simulation.plan import CONVERSATIONS, VERDICTS
from tests.simulation.truth import LARGE, Question, Reading, Violation

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from aiohttp.abc import AbstractStreamWriter
    from aiohttp.connector import Connection

    from tests.simulation.configuration import Key
    from tests.simulation.conversation import Turn
    from tests.simulation.dials import Dial
    from tests.simulation.plan import Plan

# Numbers of second questions, on a connection that was kept, begin here.
SECOND = 1_000_000
# The share of questions with long answers.
LONG = 0.03
# Seconds without a word after which a client gives up whose network is bad.
GIVE_UP = 90.0
# The longest that a client is told to wait, but for tokens; the seconds of a day; and what it is
# told of the tokens of its key.
SOON, DAY = 120.0, 86_400.0
TOKENS_USED = re.compile(
    r"tokens_per_(minute|day) of this key: limit (\d+), used (\d+), requested about (\d+)\."
)
# The longest answer, with all that a client may do meanwhile, in the patience of a client that
# hears nothing.
LONGEST = 10
# Whoever dials in this task; unset: a server.
DIALLER: ContextVar[Client] = ContextVar("DIALLER")
ASK = {
    "websocket": own_faces.ask,
    "sse": own_faces.ask,
    "stream": openai_faces.stream,
    "whole": openai_faces.whole,
    "keyed stream": openai_faces.stream,
    "keyed whole": openai_faces.whole,
    "responses": openai_faces.responses,
    "stored responses": openai_faces.stored_responses,
    "response lanes": response_lanes.talk,
    "response chain": response_chain.talk,
    "conversation": kept_talk.talk,
    uploads.FACE: uploads.ask,
    background.FACE: background.ask,
    messages.FACE: messages.ask,
    agents.FACE: agents.ask,
}
# The codes of refusals that must say when to come back.
COME_BACK = {
    *("server_at_capacity", "provider_queue_full", "rate_limit_exceeded", "concurrency_exceeded"),
    "hook_unavailable",
}


class Request(aiohttp.ClientRequest):
    """A request whose connection may be closing when the end of its slow upload is due.

    aiohttp sends a body that comes in pieces in a task of its own, which hands on an error of a
    piece, but not one of the end: that one ends the task, and asyncio complains of it, as nobody
    awaits the task. Whoever awaits the answer learns from the connection itself that it is lost,
    so nothing is hidden here.
    """

    async def write_bytes(
        self, writer: AbstractStreamWriter, conn: Connection, content_length: int | None = None
    ) -> None:
        """Send the body."""
        with contextlib.suppress(ConnectionError):
            await super().write_bytes(writer, conn, content_length)


class Client:
    """Client *number* of *plan*, which talks to the server at *base*."""

    def __init__(self, plan: Plan, number: int, base: str, like: Client | None = None) -> None:
        self.plan = plan
        self.number = number
        self.base = base
        # Of its own, so that it does the same in a run without the others.
        self.dice = dice = random.Random(f"client {plan.seed} {number}")
        self.face = dice.choice(plan.faces)
        thrown, fault = dice.random(), dice.choice(plan.provider_faults)
        tokens = dice.randrange(1, 6)
        if random.Random(f"preamble {plan.seed} {number}").random() < plan.preambles:
            # Nothing but a role, or an id, has come before it.
            tokens = 0
        fault = fault.replace("<n>", str(tokens))
        words = " ".join(["word"] * dice.choice((1, 5, 50)))
        # Some answers are longer than what a transport buffers.
        if long := dice.random() < LONG:
            words = f"word markdown {words}"
        # And some are larger than what a small store keeps, in few events.
        if large := random.Random(f"large {plan.seed} {number}").random() < plan.large:
            words = f"word {LARGE} {words}"
        if thrown >= plan.provider_fault_share:
            fault = ""
        judged = random.Random(f"verdict {plan.seed} {number}")
        if judged.random() < plan.verdicts:
            fault = judged.choice(VERDICTS).replace("<n>", str(judged.randrange(6)))
        self.question = Question(
            number,
            f"q{number} {words}",
            2000 if long else dice.choice((1, 5, 40, 200)) + 400 * large,
            fault,
            fails_over=plan.mended,
            hops=plan.hops,
        )
        self.reading = Reading(self.question)
        # Whether it has come back for its answer; and what of its question was cancelled, by it or
        # by who asks the same at the same time.
        self.came_back = False
        self.cancels: list[str] = []
        # The headers by which it says how long an answer is of use to it.
        self.request_options = draw_terms(plan.seed, number, plan.hurried)
        self.name = f"r{number}"
        self._habits = {habit: dice.random() < often for habit, often in plan.habits.items()}
        # The events after which the client does what it has a habit of.
        self._moment = dice.choice((0, 1, 2, 5, 20))
        self._read_pause = dice.choice((0.05, 0.5))
        self.outcome = ""
        # When its answer in the background was seen last.
        self.seen_at = 0.0
        self.begins = dice.uniform(0.0, plan.spread)
        self.key = self._draw_key()
        self.silent = dice.random() < plan.silent
        if random.Random(f"upload {plan.seed} {number}").random() < plan.uploads:
            self.face = uploads.FACE
        if random.Random(f"background {plan.seed} {number}").random() < plan.background:
            self.face = background.FACE
        if random.Random(f"messages share {plan.seed} {number}").random() < plan.messages:
            self.face = messages.FACE
        # A client without a key has the address of this machine: no other address is served.
        self.address = f"10.0.0.{dice.randrange(1, 4)}" if self.key else "127.0.0.1"
        # The group that it asks for, where its question names no model; "" if it asks for none.
        self.group = self._choose_group()
        self.show = self.key and self.key.draw_token(plan.seed, number, self.begins)
        if like is not None:
            # A second question of the same client.
            self.face, self.key, self.address = like.face, like.key, like.address
            self.show = like.show
            self.group, self.request_options = like.group, like.request_options
        # What of its answer is held, since it is an agent, or one below another.
        session = random.Random(f"session {plan.seed} {number}")
        self.hold = session.choice((CALLS, TURN)) if session.random() < plan.sessions else PREAMBLE
        # When the first piece of a call of a tool was read.
        self.called_at = 0.0
        if self.hold != PREAMBLE and self.face == "stream" and session.random() < 0.5:
            self.question.text += f" {THOUGHTFUL}"
        # The data of the events that it has read of a chat completion.
        self.events_read: list[bytes] = []
        # Whether its answer is the call of a tool.
        called = random.Random(f"call {plan.seed} {number}").random() < plan.calls
        self.calls = called and self.face == "stream"
        # Whether its chat is a turn of a talk of several callers; and whether it asks for the request
        # of another client.
        self.talks = random.Random(f"talk {plan.seed} {number}").random() < plan.talks
        self.curious = random.Random(f"curious {plan.seed} {number}").random() < plan.curious
        # The instance that all its connections lead to, where the balancer is sticky.
        self.home = dice.randrange(1 << 16)
        # Whether a connection of it has suffered anything.
        self.network_was_bad = False
        # When its question was first asked, and how often it was asked again when its answer might
        # be forgotten, so that it may be a turn of its conversation more than once.
        self._asked_at = 0.0
        self.repeats = 0
        self.second: Client | None = None
        # What it has asked in conversations of the Responses API, and in one that the server
        # keeps, whose id that of its questions is.
        self.turns: list[Turn] = []
        self.questions: list[Client] = []
        self.conversation = ""
        # What it has asked for as a message, and got; whether that has a key, and how often it was
        # sent.
        self.body_of_message: dict[str, Any] | None = None
        self.message: dict[str, Any] | None = None
        self.asked_at = self.ended_at = 0.0
        self.keyed = False
        # The seconds for which an agent has waited for each answer, by its number among those that
        # it asks for at once, and by its turn.
        self.waits: dict[tuple[int, int], float] = {}
        self.sent = 0
        self.patience = Patience(
            lambda: GIVE_UP if self.network_was_bad else plan.patience,
            lambda: inf if self.network_was_bad else plan.quiet,
        )
        self.session: aiohttp.ClientSession

    def _choose_group(self) -> str:
        plan, number = self.plan, self.number
        if plan.grouping is not None:
            # One of some clients asks for none.
            return ["", *plan.grouping.models][number % (1 + len(plan.grouping.models))]
        return GROUP if plan.grouped and plan.fails_over and number % 2 else ""

    def _draw_key(self) -> Key | None:
        thrown = self.dice.random()
        for key in self.plan.keys:
            thrown -= key.load
            if thrown < 0:
                return key
        return self.plan.keys[-1] if self.plan.keys else None

    def model(self, question: Question, *, grouped: bool = True) -> str:
        """Return the model to ask for on a face of OpenAI's or Anthropic's: with the provider's name
        in front no other one is asked.
        """
        if self.plan.pinned:
            return f"sim/{question.model}" if question.model else "sim"
        return question.model or (self.group if grouped else "") or "sim-model"

    def own_payload(self) -> dict[str, Any]:
        """Return what it asks for on a face of the server's own."""
        what: dict[str, Any] = {"text": self.question.text, "conversation_id": self.conversation}
        if not self.conversation:
            what = {"messages": [{"role": "user", "content": self.question.text}]}
        payload: dict[str, Any] = {**what, "options": {"max_tokens": self.question.tokens}}
        if self.plan.pinned:
            payload["provider"] = "sim"
        if model := self.question.model or self.group:
            payload["model"] = model
        return payload

    @property
    def has_id(self) -> bool:
        """Whether the question has an id, by which it is known when it is sent again."""
        named = {"websocket", "sse", "keyed stream", "keyed whole", "stored responses"}
        return self.face in named or self.keyed

    @property
    def headers(self) -> dict[str, str]:
        """The headers of each request."""
        key = {"Authorization": f"Bearer {self.show()}"} if self.show else {}
        agent = {} if self.hold == PREAMBLE else {"x-session-id": f"session {self.number}"}
        if self.hold == TURN:
            agent["x-parent-session-id"] = "session"
        return {**key, **agent, **self.request_options}

    def read_lost(self) -> None:
        """Note that it has read a part of a turn that has failed, and that is held.

        Raises:
            Violation: it must not have read that.
        """
        if self.hold != PREAMBLE and not self.plan.lets_go:
            raise Violation(f"a part of a turn that has failed, with hold: {self.hold}")

    def dial(self) -> Dial:
        """Draw the next connection of this client."""
        dial = draw_dial(self.plan.faults, self.dice, address=self.address)
        self.network_was_bad |= not dial.good
        return dial

    def has(self, habit: str) -> bool:
        """Return whether this client has a *habit*."""
        return self._habits.get(habit, False)

    def now(self, habit: str, events: int) -> bool:
        """Return whether this client has a *habit*, and does it now that it has read so many
        *events*.
        """
        return events >= self._moment and self.has(habit)

    async def pause(self) -> None:
        """Wait a moment, as a client that reads slowly does after each event."""
        if self.has("read slowly"):
            await asyncio.sleep(self._read_pause)

    def asks(self) -> None:
        """Note that it asks its question, once more if nothing was heard of the first time."""
        changes = self.plan.changes
        # It is read once it has come, and its connection has a place.
        read_by = Clock.now + BODY + changes[f"{GATE}.queue_timeout"]
        kept = read_by - self._asked_at <= changes[f"{STREAMS}.resume_window"]
        if not self._asked_at:
            self._asked_at = Clock.now
        elif not (kept and changes[f"{STREAMS}.max_kept_bytes"] >= ROOM):
            self.repeats += 1
            self.question.may_be_repeated()

    def body(self, payload: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of a request with *payload* as its body."""
        data = orjson.dumps(payload)
        headers = {**self.headers, "Content-Type": "application/json"}
        if self.has("upload slowly"):
            return {"data": self._slowly(data), "headers": headers}
        return {"data": data, "headers": headers}

    async def _slowly(self, data: bytes) -> AsyncIterator[bytes]:
        size = max(1, len(data) // 10)
        for start in range(0, len(data), size):
            yield data[start : start + size]
            # Some are slower than the server allows.
            await asyncio.sleep(4 * self._read_pause)

    async def run(self) -> None:
        """Do all that this client does."""
        DIALLER.set(self)
        await asyncio.sleep(self.begins)
        patience = self.plan.patience
        connector = aiohttp.TCPConnector(limit=0, force_close=not self.has("keep alive"))
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=20.0)
        session = aiohttp.ClientSession(
            connector=connector, timeout=timeout, request_class=Request
        )
        async with session as self.session:
            whole = asyncio.timeout(LONGEST * patience)
            try:
                with self.patience:
                    async with whole:
                        await self._ask()
            except Left:
                self.outcome = "left"
            except GONE as exc:
                if type(exc) is TimeoutError and not self.network_was_bad:
                    if whole.expired():
                        raise Violation(f"heard no end within {LONGEST * patience} s") from exc
                    raise Violation(f"waited in vain, for {patience} s or more") from exc
                self.outcome = f"gone: {type(exc).__name__}"
            self.outcome = self.outcome or "?"
            if CODE in self.outcome and not self.request_options:
                raise Violation("a deadline that was not set has ended it")
            if self.outcome == "complete" and self.has("keep alive"):
                await self._ask_again()
            if self.curious:
                await self._look_at_another()

    async def _ask(self) -> None:
        ask = ASK[self.face]
        once = {
            "stream",
            "responses",
            uploads.FACE,
            background.FACE,
            messages.FACE,
            *CONVERSATIONS,
        }
        if not self.has("ask twice") or self.face in once:
            await ask(self)
            return
        both = asyncio.gather(ask(self), ask(self._reference()), return_exceptions=True)
        for result in await both:
            if isinstance(result, BaseException):
                raise result

    def _reference(self) -> Client:
        """Return a client that asks the same at the same time, and then only reads."""
        reference = Client(self.plan, self.number, self.base)
        reference.session, reference.patience, reference._habits = self.session, self.patience, {}
        reference.cancels = self.cancels
        return reference

    def another(self, number: int, face: str, conversation: str) -> Client:
        """Return a client that asks question *number* on *face*, on the connections and with the
        habits of this one.
        """
        # A large answer would push earlier turns out of a conversation.
        plan = dataclasses.replace(self.plan, large=0.0, uploads=0.0, background=0.0, messages=0.0)
        client = Client(plan, number, self.base, like=self)
        client.face, client.conversation = face, conversation
        client.session, client.patience, client._habits = self.session, self.patience, self._habits
        self.questions.append(client)
        return client

    async def _ask_again(self) -> None:
        """Ask another question on the connection that was kept."""
        self.second = second = Client(self.plan, SECOND + self.number, self.base, like=self)
        # The kept connection has the faults of its network still.
        second.session, second.patience, second._habits = self.session, self.patience, {}
        try:
            with self.patience:
                await ASK[second.face](second)
        except GONE as exc:
            second.outcome = f"gone: {type(exc).__name__}"

    async def _look_at_another(self) -> None:
        """Ask how the request of another client has ended, which only its caller may know."""
        url = f"{self.base}/requests/r{(self.number + 1) % self.plan.clients}"
        with contextlib.suppress(*GONE), self.patience:
            async with self.session.get(url, headers=self.headers) as response:
                shown = orjson.loads(await response.read())
                own = self.key.caller if self.key else ""
                if response.status == 200 and shown.get("caller", "") != own:
                    raise Violation(f"{own!r} sees a request of another caller: {shown}")

    async def refused(self, response: aiohttp.ClientResponse) -> None:
        """Note a refusal, which must say what it is, and when to come back if that is soon."""
        error = orjson.loads(await response.read())["error"]
        self.note_refusal(response.status, error, response.headers)

    def note_refusal(
        self, status: int, error: Mapping[str, Any], headers: Mapping[str, str]
    ) -> None:
        """Note a refusal with this *status*, *error* and *headers*."""
        code = error["code"]
        seconds = float(headers.get("Retry-After", "0"))
        if code in COME_BACK and not (0 < seconds <= SOON or self._must_wait(error, seconds)):
            raise Violation(f"{code} without a plausible Retry-After: {seconds}")
        if status == 500:
            raise Violation(f"500: {code}")
        self.outcome = f"refused: {code}"

    def _must_wait(self, error: Mapping[str, Any], seconds: float) -> bool:
        """Return whether it takes so many *seconds* until a key has the tokens for a request: until
        what was used of a minute's is back, or the next day begins.
        """
        used = TOKENS_USED.match(error.get("message") or error.get("error") or "")
        if used is None:
            return False
        if used[1] == "day":
            return abs(seconds - (DAY - time.time() % DAY)) <= self.plan.patience
        limit, level, tokens = (int(number) for number in used.groups()[1:])
        return seconds <= 60 * (level + min(tokens, limit) - limit) / limit + 1
