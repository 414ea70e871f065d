"""Conversations of a soak test.

In the Responses API they are on the lanes of a WebSocket, and over HTTP by `previous_response_id`;
on our own face the server keeps them in an SQLite file.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import aiohttp

from aioserver.wings.simulator import model
from tests.soak.answers import GONE, Answer, Left, Violation, events_of
from tests.support.chat import ENDS
from tests.support.responses import create

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.soak.clients import Client

# A provider that has chat completions only, which are translated.
BRIDGED = "bridged"
LANES, TURNS, RETURNS = 2, 3, 3
# What is said of a response that cannot be continued, or resumed: the small store has had to make
# room.
LOST = {"previous_response_not_found", "stream_not_found", "resume_gap"}
NOT_CANCELLED = "no such response is under way"
# To read or delete may be refused as well: it counts in a key's `requests_per_minute`, and the disk
# of a machine that does much else may be slow.
REFUSED = {429: "rate_limit_exceeded", 503: "history_unavailable"}


@dataclass
class Talk:
    """A conversation of *client*, on the lane *name* if it is on a WebSocket.

    *turn* counts the questions that the model is shown, and `answer` is that to the last one.
    *outcome* says how it has ended.
    """

    client: Client
    name: str = ""
    turn: int = 0
    previous: str | None = None
    answer: Answer = field(init=False)
    response_id: str | None = None
    outcome: str = ""
    cancelled: bool = False

    def fields(self) -> dict[str, Any]:
        """Return the fields of the next request."""
        client = self.client
        self.turn += 1
        self.response_id, self.cancelled = None, False
        # A provider that keeps responses is shown the last question alone.
        bridged = client.model == BRIDGED
        text = f"{client.name} {self.name} {self.turn} {client.padding}"
        speech = model.speech(text, self.turn if bridged else 1)
        truth = "".join(model.tokens(speech)[: client.tokens])
        self.answer = Answer(truth, client.fault)
        return {
            "input": text,
            "max_output_tokens": client.tokens,
            "store": True,
            **({} if self.previous is None else {"previous_response_id": self.previous}),
            **({} if client.model is None else {"model": client.model}),
        }

    def take(self, event: dict[str, Any]) -> None:
        """Take one event of the response under way; sets `outcome` if nothing is to be asked after
        it.
        """
        answer = self.answer
        if answer.end:
            raise Violation(f"{event['type']} after the end")
        if "sequence_number" in event and self.client.fault != "slices":
            answer.number(event["sequence_number"] + 1)
        match event["type"]:
            case "response.created":
                self.response_id = event["response"]["id"]
            case "response.output_text.delta":
                answer.add(event["delta"])
            case "response.completed" | "response.incomplete":
                answer.finish("complete")
                self.previous = event["response"]["id"]
                if self.turn == TURNS:
                    self.outcome = "complete"
            case "response.failed" | "error":
                answer.finish("error")
                self.outcome = "error"

    def refused(self, status: int, code: str | None) -> None:
        """Take a refusal: a conversation that is lost begins anew."""
        if status == 500:
            raise Violation(f"500: {code}")
        if code in LOST and self.previous is not None:
            self.turn, self.previous = 0, None
        else:
            self.outcome = f"refused: {code}"
        self.answer.end = "refused"


async def lanes(client: Client) -> str:
    """Talk on two lanes at once, and come back where the connection breaks."""
    talks = {name: Talk(client, name) for name in "ab"[:LANES]}
    for attempt in range(RETURNS):
        try:
            await _on_connection(client, talks)
            return next(talk.outcome for talk in talks.values())
        except (Left, *GONE):
            if not client.does("return") or attempt == RETURNS - 1:
                raise
        client.stay()
    raise AssertionError("the last attempt returns or raises")


async def _on_connection(client: Client, talks: dict[str, Talk]) -> None:
    url = client.base.replace("http", "ws", 1) + "/v1/responses"
    async with client.session.ws_connect(url, max_msg_size=0) as ws:

        async def send(name: str, talk: Talk) -> None:
            await ws.send_json(create(lane=name, **talk.fields()))

        for name, talk in talks.items():
            if talk.outcome:
                continue
            if talk.response_id is not None and not talk.answer.end:
                # Of what is not there any more nothing is known: it is asked for anew.
                after = {"response_id": talk.response_id, "starting_after": talk.answer.last - 1}
                await ws.send_json({"type": "response.resume", "stream_id": name, **after})
            else:
                talk.turn -= talk.turn > 0 and not talk.answer.end
                await send(name, talk)
        while not all(talk.outcome for talk in talks.values()):
            event = await _next(ws)
            talk = talks[event["stream_id"]]
            if event["type"] == "error" and "status" in event:
                code = event["error"]["code"]
                if event["error"]["message"].startswith(NOT_CANCELLED):
                    # It was over already.
                    continue
                if code in LOST and talk.response_id is not None:
                    # It could not be resumed.
                    talk.turn, talk.previous, talk.answer.end = 0, None, "lost"
                else:
                    talk.refused(event["status"], code)
            elif not event["type"].startswith("aioserver:"):
                talk.take(event)
            await client.do_habits(talk.answer.last)
            if talk.answer.end and not talk.outcome:
                await send(event["stream_id"], talk)
            elif client.does("cancel") and not talk.cancelled and not talk.answer.end:
                talk.cancelled = True
                await ws.send_json({"type": "response.cancel", "stream_id": event["stream_id"]})


async def _next(ws: aiohttp.ClientWebSocketResponse) -> dict[str, Any]:
    """Return the next event that belongs to a lane.

    Raises:
        EOFError: the connection is over.
    """
    while True:
        message = await ws.receive()
        if message.type is not aiohttp.WSMsgType.TEXT:
            raise EOFError(f"closed with {ws.close_code}")
        event: dict[str, Any] = json.loads(message.data)
        if "stream_id" in event:
            return event


async def chain(client: Client) -> str:
    """Ask over HTTP, then read the last response, its items, and delete it."""
    talk = Talk(client)
    streamed = client.does("return")
    while not talk.outcome:
        body = {**talk.fields(), "stream": streamed}
        async with client.session.post(f"{client.base}/v1/responses", json=body) as response:
            if response.status != 200:
                talk.refused(response.status, await _code(response))
            elif streamed:
                async for data in events_of(response):
                    talk.take(json.loads(data))
                    await client.do_habits(talk.answer.last)
                if not talk.answer.end:
                    raise Violation("a response without an end")
            else:
                _take_whole(talk, json.loads(await response.read()))
    if talk.outcome == "complete" and not client.fault:
        await _look_back(client, talk)
    return talk.outcome


def _take_whole(talk: Talk, response: dict[str, Any]) -> None:
    # A fault behind all of the few slices of a short body comes too late.
    talk.answer.fault = ""
    talk.answer.add(_text_of(response))
    talk.take({"type": "response.completed", "response": response})


def _text_of(response: dict[str, Any]) -> str:
    items = (item for item in response["output"] if item["type"] == "message")
    return "".join(part["text"] for item in items for part in item["content"])


async def _look_back(client: Client, talk: Talk) -> None:
    url = f"{client.base}/v1/responses/{talk.previous}"

    async def look(method: str, path: str, check: Callable[[dict[str, Any]], bool]) -> int:
        async with client.session.request(method, url + path) as response:
            # The small store may have had to make room.
            if response.status == 200 and not check(json.loads(await response.read())):
                raise Violation(f"{method} {path} of a response is another one")
            return response.status

    await look("GET", "", lambda body: _text_of(body) == talk.answer.text)
    count = 2 * talk.turn - 1
    await look("GET", "/input_items", lambda body: len(body["data"]) == count)
    if await look("DELETE", "", lambda body: bool(body["deleted"])) in REFUSED:
        return
    async with client.session.get(url) as response:
        if response.status == 200:
            raise Violation("a response is read after it was deleted")


async def conversation(client: Client) -> str:
    """Ask on the SSE face in a conversation that the server keeps, then read and delete it."""
    talk = Talk(client)
    while not talk.outcome:
        await _ask_in_conversation(client, talk)
    url = f"{client.base}/conversations/{client.name}"
    async with client.session.get(url) as response:
        if response.status in REFUSED:
            return await _refused(response)
        if talk.outcome == "complete":
            if response.status != 200:
                raise Violation(f"{response.status}: a conversation is not found")
            kept_texts = [message["text"] for message in (await response.json())["messages"]]
            if len(kept_texts) != 2 * TURNS or kept_texts[-1] != talk.answer.text:
                raise Violation(f"{len(kept_texts)} messages are kept of {TURNS} turns")
    async with client.session.delete(url) as response:
        if response.status in REFUSED:
            return await _refused(response)
        if response.status not in {200, 204, 404}:
            raise Violation(f"{response.status} for a deletion")
    async with client.session.get(url) as response:
        if response.status not in {404, *REFUSED}:
            raise Violation(f"{response.status} for a conversation that was deleted")
    return talk.outcome


async def _ask_in_conversation(client: Client, talk: Talk) -> None:
    talk.turn += 1
    text = f"{client.name} {talk.turn} {client.padding}"
    truth = "".join(model.tokens(model.speech(text, talk.turn))[: client.tokens])
    talk.answer = answer = Answer(truth, client.fault)
    body = {
        "request_id": f"{client.name}-{talk.turn}",
        "text": text,
        "conversation_id": client.name,
        "options": {"max_tokens": client.tokens},
        **({} if client.model is None else {"model": client.model}),
    }
    async with client.session.post(f"{client.base}/sse/chat", json=body) as response:
        if response.status != 200:
            talk.refused(response.status, await _code(response))
            return
        async for data in events_of(response):
            frame = json.loads(data)
            if frame.get("event_id") is None:
                continue
            answer.number(frame["event_id"])
            if frame["status"] == "chunk":
                answer.add(frame["chunk"]["data"])
            elif frame["status"] in ENDS:
                answer.finish(frame["status"])
            await client.do_habits(answer.last)
    if answer.end != "complete":
        talk.outcome = answer.end or "refused"
    elif talk.turn == TURNS:
        talk.outcome = "complete"


async def _refused(response: aiohttp.ClientResponse) -> str:
    code = await _code(response)
    if code != REFUSED[response.status] or "Retry-After" not in response.headers:
        raise Violation(f"{code} for a conversation")
    return f"refused: {code}"


async def _code(response: aiohttp.ClientResponse) -> str | None:
    error = json.loads(await response.read())["error"]
    code: str | None = error["code"]
    return code
