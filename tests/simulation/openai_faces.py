"""How a client asks on the faces that OpenAI's clients know: chat completions and responses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson

from aioserver.protocol.request_headers import TURN
from tests.simulation import prompts
from tests.simulation.clock import Clock
from tests.simulation.events import events
from tests.simulation.grouping import talk_of
from tests.simulation.patience import Left
from tests.simulation.response_events import ResponseReading
from tests.simulation.returning import come_back
from tests.simulation.truth import Reading, Thoughts, ToolReading, Violation

if TYPE_CHECKING:
    import aiohttp

    from tests.simulation.client import Client


QUERY = {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]}
# A tool that must be called.
TOOLS = {
    "tools": [{"type": "function", "function": {"name": "look_up", "parameters": QUERY}}],
    "tool_choice": "required",
}


def _chat(client: Client, *, stream: bool) -> dict[str, Any]:
    before = []
    if client.plan.grouping is not None and client.group:
        before = talk_of(client.number)
        client.question.turns = (2,) if before else (1,)
    elif client.talks:
        before = prompts.talk_of(client)
        client.question.turns = (3,)
    arguments = client.body(
        {
            "model": client.model(client.question),
            "messages": [*before, {"role": "user", "content": client.question.text}],
            "max_tokens": client.question.tokens,
            "stream": stream,
            **(TOOLS if client.calls else {}),
        }
    )
    if client.face.startswith("keyed"):
        arguments["headers"]["Idempotency-Key"] = client.name
    return arguments


async def _post(client: Client, path: str, arguments: dict[str, Any]) -> aiohttp.ClientResponse:
    return await client.session.post(f"{client.base}/v1/{path}", **arguments)


async def stream(client: Client) -> None:
    """Ask for a chat completion as a stream."""
    reading = Reading(client.question)
    arguments = _chat(client, stream=True)
    async with await _post(client, "chat/completions", arguments) as response:
        if response.status != 200:
            await client.refused(response)
            return
        count, finish, roles, idents = 0, "", 0, set()
        call, thoughts = ToolReading(client.question), Thoughts()
        async for data in events(response, client.patience):
            count += 1
            client.events_read.append(data)
            if data == b"[DONE]":
                if not finish and not client.question.fault.startswith("early-done"):
                    raise Violation("[DONE] without a finish_reason")
                if client.calls:
                    reading.end = call.finish(finish)
                else:
                    reading.finish("complete" if finish else "done")
                continue
            if reading.end:
                if client.question.fault == "after-done":
                    continue
                raise Violation("an event after [DONE]")
            event = orjson.loads(data)
            if "error" in event:
                reading.end = f"error: {event['error'].get('code')}"
                if call.calls or (reading.text and client.hold == TURN):
                    client.read_lost()
                continue
            idents.add(event["id"])
            if not event["choices"]:
                raise Violation(f"a usage that nobody has asked for: {event}")
            for choice in event["choices"]:
                roles += "role" in choice["delta"]
                if roles != 1 or finish:
                    raise Violation(f"{roles} roles, or more behind the finish")
                thoughts.take(choice["delta"])
                if client.calls:
                    call.take(choice)
                    client.called_at = client.called_at or (call.calls and Clock.now)
                else:
                    reading.add(choice["delta"].get("content") or "")
                finish = choice.get("finish_reason") or finish
            if len(idents) > 1:
                raise Violation(f"two answers in one: {idents}")
            if client.now("leave", count):
                raise Left
            if client.now("half close", count) and response.connection:
                transport = response.connection.transport
                if transport is not None and transport.can_write_eof():
                    transport.write_eof()
            await client.pause()
        if not reading.end and client.question.fault != "no-done":
            raise Violation("the answer ends without [DONE] and without an error")
    client.outcome = reading.end or "no [DONE]"


async def whole(client: Client) -> None:
    """Ask for a chat completion in one piece."""
    arguments = _chat(client, stream=False)
    async with await _post(client, "chat/completions", arguments) as response:
        if response.status != 200:
            await client.refused(response)
            return
        await client.pause()
        answer = orjson.loads(await response.read())
    text = answer["choices"][0]["message"]["content"]
    if text != client.question.answer:
        raise Violation(f"a whole answer that is wrong: {text[-40:]!r}")
    client.outcome = "complete"


def _responses_body(client: Client, *, store: bool) -> dict[str, Any]:
    return client.body(
        {
            "model": client.model(client.question),
            "input": client.question.text,
            "max_output_tokens": client.question.tokens,
            "stream": True,
            "store": store,
        }
    )


async def responses(client: Client) -> None:
    """Ask for a response as a stream."""
    read = ResponseReading(client.question)
    arguments = _responses_body(client, store=False)
    async with await _post(client, "responses", arguments) as response:
        await _read(client, response, read)


async def _read(client: Client, response: aiohttp.ClientResponse, read: ResponseReading) -> None:
    """Read the events of *response*."""
    if response.status != 200:
        await client.refused(response)
        return
    async for data in events(response, client.patience):
        read.take(orjson.loads(data) if data != b"[DONE]" else {"type": "[DONE]"})
        if client.now("leave", read.last):
            raise Left
        await client.pause()
    if not read.end:
        raise Violation("a response without an end")
    client.outcome = read.end


async def stored_responses(client: Client) -> None:
    """Ask for a response that is kept, and come back for the rest of it: by its id, or by the
    key.
    """
    read = ResponseReading(client.question)

    async def ask_or_resume(_attempt: int) -> None:
        nonlocal read
        if read.id and client.dice.random() < 0.5:
            await _resume(client, read)
        else:
            # The same request gets the same answer, from its beginning.
            read = ResponseReading(client.question)
            await _ask_to_store(client, read)

    await come_back(client, ask_or_resume, lambda: "")


async def _ask_to_store(client: Client, read: ResponseReading) -> None:
    arguments = _responses_body(client, store=True)
    arguments["headers"]["Idempotency-Key"] = client.name
    async with await _post(client, "responses", arguments) as response:
        await _read(client, response, read)


async def _resume(client: Client, read: ResponseReading) -> None:
    url = f"{client.base}/v1/responses/{read.id}?stream=true&starting_after={read.last}"
    async with client.session.get(url, headers=client.headers) as response:
        await _read(client, response, read)
