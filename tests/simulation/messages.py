"""How a client asks for messages (`/v1/messages`), as an agent does: one turn or several, streamed
or whole, with tools, their results and reminders between; and what must hold of its requests.

What a client has read is compared with what a simple translation makes of the chunks that a
provider has written, and what the provider was asked with what it makes of the request
(tests/support/reference_chat.py, reference_messages.py).
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import orjson

from tests.simulation.clock import Clock
from tests.simulation.configuration import HTTP
from tests.simulation.conversation import NEXT
from tests.simulation.engine_shapes import ODD, chunks_of
from tests.simulation.events import events
from tests.simulation.message_events import MessageReading, check_block
from tests.simulation.patience import Left
from tests.simulation.plan import WORDS
from tests.simulation.returning import come_back
from tests.simulation.truth import Reading, Violation
from tests.support.reference_chat import BILLING, chat_messages, shown_ids, with_objects
from tests.support.reference_messages import check_order, message_content

if TYPE_CHECKING:
    from collections.abc import Callable

    import aiohttp

    from tests.simulation.client import Client
    from tests.simulation.provider import Call

FACE = "messages"
# Tokens of an answer above which an engine refuses a request.
MOST_TOKENS = 4096
# Repeats of a request without what an engine refuses: each word, the name of the bound, and its
# size; and that it has no such path.
MOST_REPEATS = len(WORDS) + 3
QUERY = {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]}
TOOLS = [{"name": "look_up", "description": "Looks it up.", "input_schema": QUERY}]
# A hosted tool, which is left out among others.
HOSTED = [{"type": "web_search_20250305", "name": "web_search"}]
PICTURE = {
    "type": "image",
    "source": {"type": "base64", "media_type": "image/png", "data": "QUJD"},
}
# The end of a client that has read a provider's own 500, which passes as it came, and the faults
# that are one: an error before the answer is one as well.
FAILED = "refused: a provider's 500"
FAILING = ("status-500", "error-event", "error-chunk")


class Talk:
    """What *client* says to the model: the messages so far, and what each request has beside
    them.
    """

    def __init__(self, client: Client) -> None:
        self.dice = dice = random.Random(f"messages {client.plan.seed} {client.number}")
        self.turns = dice.choice((1, 1, 2, 4))
        self.streamed = dice.random() < 0.7
        self.keyed = dice.random() < 0.3
        # Whether results and a question are one message: of a provider that speaks the API it is
        # known then what it answers.
        self.joins = dice.random() < 0.5 and not {"has", "speaks"} & {*client.plan.message_kinds}
        self.said: list[dict[str, Any]] = []
        self.asked = 0
        self.fixed: dict[str, Any] = {"tools": [*TOOLS, *HOSTED]} if dice.random() < 0.8 else {}
        for name, value in (
            ("thinking", {"type": "adaptive"}),
            ("top_k", 5),
            ("output_config", {"effort": dice.choice(("low", "max"))}),
            ("metadata", {"user_id": f"user-{client.number}"}),
        ):
            if dice.random() < 0.4:
                self.fixed[name] = value
        if client.plan.continued:
            # The rest of what a thinking model says is asked for by an instruction, which the
            # providers here do not follow: their words say themselves again and again.
            self.fixed.pop("thinking", None)

    @property
    def calls(self) -> list[str]:
        """The ids of the calls that the model has made last."""
        last = self.said[-1]["content"] if self.said else []
        return [block["id"] for block in last if block["type"] == "tool_use"]

    def ask(self, client: Client) -> dict[str, Any]:
        """Return the request of *client*, which asks the next question."""
        dice, question = self.dice, client.question
        results = [self._result(call) for call in self.calls]
        dice.shuffle(results)
        text, tokens = question.text, question.tokens
        if dice.random() < 0.7:
            text += f" {ODD}"
        if self.said and dice.random() < 0.3:
            self.said.append({"role": "system", "content": "Mind the time."})
        question_block = {"type": "text", "text": text}
        if self.joins:
            results.append(question_block)
        elif results:
            self.said.append({"role": "user", "content": results})
        content = results if self.joins else [question_block]
        self.said.append({"role": "user", "content": content})
        if not self.asked and dice.random() < 0.5:
            self.said.append({"role": "system", "content": "The user is at a terminal."})
        self.asked += 1
        if dice.random() < 0.2:
            # As agents do that do not know the engine.
            tokens = 64_000
        # Whatever came before it, and however it is translated.
        question.rewrite(text, tokens, tuple(range(1, 2 * self.asked + 1)))
        body: dict[str, Any] = {
            "model": client.model(client.question),
            "max_tokens": tokens,
            "system": self._system(),
            "messages": list(self.said),
            "stream": self.streamed,
            **self.fixed,
        }
        client.calls = "tools" in body and not question.fault and dice.random() < 0.5
        if client.calls:
            body["tool_choice"] = {"type": "any", "disable_parallel_tool_use": True}
        return body

    def answer(self, message: dict[str, Any]) -> bool:
        """Add the answer; return whether there is more to ask."""
        if not message["content"] or message["stop_reason"] == "max_tokens":
            # What was cut is asked for otherwise.
            return False
        self.said.append({"role": "assistant", "content": message["content"]})
        return self.asked < self.turns

    def _result(self, call: str) -> dict[str, Any]:
        content: Any = self.dice.choice(
            ("found", "", [{"type": "text", "text": "see"}, PICTURE], [PICTURE])
        )
        failed = {"is_error": True} if self.dice.random() < 0.2 else {}
        return {"type": "tool_result", "tool_use_id": call, "content": content, **failed}

    def _system(self) -> Any:
        billing = f"{BILLING} cc_version=2.1; number={self.asked};"
        return [{"type": "text", "text": text} for text in (billing, "You help.", "Be brief.")]


async def ask(client: Client) -> None:
    """Ask, and go on asking as long as there are good answers."""
    talk, asking = Talk(client), client
    while True:
        body = talk.ask(asking)
        asking.body_of_message = body
        _may_be_translated(asking, body)
        if talk.keyed:
            await _ask_again(asking, body)
        else:
            asking.message = await _ask(asking, body)
        if asking.message is None or not talk.answer(asking.message):
            return
        asking = client.another(client.number + talk.asked * NEXT, FACE, "")


def asks_once(client: Client) -> bool:
    """Return whether its question has one answer, which it sees from the first word on."""
    body = client.body_of_message
    # White space in front of a call is no answer yet.
    return body is not None and body["stream"] and not (client.keyed or client.calls)


def _may_be_translated(client: Client, body: dict[str, Any]) -> None:
    """Let the model read the question with all that a translation joins with it."""
    question = client.question
    content = chat_messages(body)[-1]["content"]
    texts = [content] if isinstance(content, str) else [part.get("text", "") for part in content]
    joined = " ".join(text for text in texts if text)
    if joined != question.text:
        question.may_be(replace(question, text=joined, others=()))


async def _ask_again(client: Client, body: dict[str, Any]) -> None:
    """Ask, and ask the same once more if its connection breaks."""
    client.keyed = True

    async def attempt(number: int) -> None:
        client.came_back = number > 0
        client.asks()
        client.message = await _ask(client, body)

    await come_back(client, attempt, lambda: "")


async def _ask(client: Client, body: dict[str, Any]) -> dict[str, Any] | None:
    """Return the message that answers *body*; None if there is no good one."""
    arguments = client.body(body)
    if client.keyed:
        arguments["headers"]["Idempotency-Key"] = client.name
    client.sent, client.asked_at = client.sent + 1, client.asked_at or Clock.now
    # A call may have a text beside it.
    reading = None if client.calls else Reading(client.question)
    read = MessageReading(reading)
    async with client.session.post(f"{client.base}/v1/messages", **arguments) as response:
        if response.status != 200:
            await refused(client, response)
            return None
        if body["stream"]:
            await _read(client, response, read)
        else:
            await client.pause()
            read.finish(orjson.loads(await response.read()))
            for block in read.blocks:
                check_block(block)
                if reading is not None and block["type"] == "text":
                    reading.add(block["text"])
                    whole = reading.text in client.question.answers
                    if not (whole or client.question.may_end_early):
                        raise Violation(f"a whole message that is wrong: {block['text'][-40:]!r}")
    if read.end == "complete" and reading is not None and body["stream"]:
        reading.finish("complete")
    client.outcome, client.ended_at = read.end, Clock.now
    return read.message if read.end == "complete" else None


async def _read(client: Client, response: aiohttp.ClientResponse, read: MessageReading) -> None:
    async for data in events(response, client.patience):
        read.take(orjson.loads(data))
        if client.now("leave", read.events):
            raise Left
        await client.pause()
    if not read.end:
        raise Violation("a message without an end and without an error")


async def refused(client: Client, response: aiohttp.ClientResponse) -> None:
    """Note a refusal, which must be one of this API."""
    answer = orjson.loads(await response.read())
    error = answer["error"]
    if answer["type"] != "error" or "message" not in error or "type" not in error:
        raise Violation(f"{response.status}: {answer}")
    if response.status in {429, 503, 529} and response.headers.get("Retry-After"):
        soon = float(response.headers["Retry-After"]) <= 60
        if soon and response.headers.get("x-should-retry") == "false":
            raise Violation(f"{response.status} that may not be tried again, though soon")
    if response.status == 500 and "code" not in error:
        # The server's own errors have a code, and this status is a bug of it.
        client.outcome = FAILED
        return
    client.note_refusal(
        response.status, {"code": error.get("code") or error["type"], **error}, response.headers
    )


def check(client: Client, calls: list[Call], broken: Callable[[str], None]) -> None:
    """Check what the providers were asked for *client*, in *calls*, and what became of what they
    have written.
    """
    body = client.body_of_message
    if body is None:
        return
    for call in calls:
        if call.messages is None or call.continues:
            continue
        said = with_objects(call.messages)
        try:
            check_order(said)
        except (AssertionError, IndexError):
            broken(f"client {client.number}: a strict engine refuses {said}")
        if not any(said == chat_messages(body, name) for name in ("", *REASONING)):
            broken(f"client {client.number}: {said} for {chat_messages(body)}")
    failed = any(call.messages is None and call.fault.startswith(FAILING) for call in calls)
    if client.outcome == FAILED and not failed:
        broken(f"client {client.number} has read a 500 that no provider has said: {calls}")
    repeats: dict[tuple[int, str], int] = {}
    # A provider that is down is tried as long as the request waits for it.
    tried: dict[tuple[int, str], int] = {}
    for call in calls:
        key = call.instance, call.provider
        repeats[key] = repeats.get(key, 0) + bool(call.refused)
        tried[key] = tried.get(key, 0) + (not call.refused)
    for (instance, provider), count in repeats.items():
        attempts = 1 + client.plan.changes[f"{HTTP}.max_retries"] + client.plan.hops
        most = client.sent * attempts + tried[instance, provider]
        if count > MOST_REPEATS * most:
            broken(f"client {client.number} is refused {count} times by {provider} at {instance}")
    message = client.message
    written = [call for call in calls if call.answer is not None]
    speaks = any(call.messages is None and call.begun_at for call in calls)
    other = client.question.fault or any(call.continues for call in calls)
    if message is None or speaks or not written or other:
        return
    shown = _plain(message["content"])
    if not any(shown == expected(client, call, message["id"]) for call in written):
        made = [expected(client, call, message["id"]) for call in written]
        broken(f"client {client.number}: {shown} of {made}")


REASONING = ("reasoning_content", "reasoning")


def expected(client: Client, call: Call, message_id: str) -> list[dict[str, Any]]:
    """Return the content of the message that the chunks of *call* mean for *client*."""
    body = client.body_of_message
    assert body is not None
    assert call.answer is not None
    content = message_content(chunks_of(call.answer), thinking="thinking" in body)
    uses = [block for block in content if block["type"] == "tool_use"]
    ids = shown_ids([block["id"] for block in uses], message_id)
    for block, shown in zip(uses, ids, strict=True):
        block["id"] = shown
    return content


def _plain(content: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in block.items() if name != "signature"} for block in content
    ]
