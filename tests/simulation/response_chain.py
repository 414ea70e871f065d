"""How a client talks over HTTP in the Responses API: each request continues the response before by
its id.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import orjson

from tests.simulation.conversation import Turn, lost, next_turn
from tests.simulation.events import events
from tests.simulation.patience import Left
from tests.simulation.plan import KEEPS
from tests.simulation.response_events import text_of
from tests.simulation.truth import Violation

if TYPE_CHECKING:
    import aiohttp

    from tests.simulation.client import Client

# Requests that find what they continue no more, before the client gives up.
TRIES = 3
# What a client does with a response that it has read.
LOOKS = ("", "", "retrieve", "list", "delete")
# Seconds between two turns: also longer than a response is stored.
PAUSES = (0.0, 0.0, 1.0, 15.0, 25.0)


async def talk(client: Client) -> None:
    """Ask some questions, one after the other, and look at what is stored."""
    dice = client.dice
    chain: tuple[Turn, ...] = ()
    failed = 0
    for _ in range(dice.choice((1, 3, 6))):
        turn = next_turn(client, chain, dice.choice((True, True, None)))
        if await _ask(client, turn):
            turn.end()
            chain = turn.chain
            await _look(client, turn, dice.choice(LOOKS))
        elif client.outcome:
            return
        else:
            failed += 1
            if failed == TRIES:
                client.outcome = turn.read.end or "lost"
                return
            if not turn.read.end:
                # It sends what it has said before as a new conversation.
                chain = ()
        await asyncio.sleep(dice.choice(PAUSES))
    client.outcome = "complete"


async def _ask(client: Client, turn: Turn) -> bool:
    """Ask for the response of *turn*; return whether it is complete."""
    streamed = client.dice.random() < 0.5
    arguments = client.body(
        {"model": client.model(turn.question, grouped=False), "stream": streamed, **turn.fields}
    )
    async with client.session.post(f"{client.base}/v1/responses", **arguments) as response:
        if response.status != 200:
            await _refused(client, turn, response)
            return False
        if not streamed:
            await client.pause()
            _take(turn, orjson.loads(await response.read()))
            return True
        async for data in events(response, client.patience):
            if data != b"[DONE]":
                turn.read.take(orjson.loads(data))
            if client.now("leave", turn.read.last):
                raise Left
            await client.pause()
    if not turn.read.end:
        raise Violation("a response without an end")
    return turn.read.end == "complete"


def _take(turn: Turn, response: dict[str, Any]) -> None:
    """Take a response that was not streamed."""
    if response["status"] not in {"completed", "incomplete"}:
        raise Violation(f"a whole response that is {response['status']}")
    turn.read.id = response["id"]
    turn.read.end = "complete"
    turn.read.reading.text = text = text_of(response)
    # Where a provider ends an answer early that is not streamed, all of a short one may have come.
    if text not in turn.question.answers:
        raise Violation(f"a whole response that is wrong: {text[-40:]!r}")


async def _refused(client: Client, turn: Turn, response: aiohttp.ClientResponse) -> None:
    error = orjson.loads(await response.read())["error"]
    client.note_refusal(response.status, error, response.headers)
    if lost(response.status, error):
        client.outcome = ""
        if not turn.before:
            raise Violation(f"{error['code']}, though nothing is continued")
        last = turn.before[-1]
        if last.must_go_on(client.plan):
            raise Violation(f"{error['code']}: {last.read.id} is kept no longer")


async def _look(client: Client, turn: Turn, look: str) -> None:
    """Do *look* with the response of *turn*."""
    if not look:
        return
    url = f"{client.base}/v1/responses/{turn.read.id}"
    expected = False
    try:
        if look == "list":
            answer = await _json(client, "GET", f"{url}/input_items?order=asc&limit=100")
        else:
            answer = await _json(client, "DELETE" if look == "delete" else "GET", url)
        expected = turn.must_be_known(client.plan)
    finally:
        # It may have been done, also if its answer is lost.
        turn.deleted |= look == "delete"
    if answer is None:
        # What only its provider has kept is not listed.
        hidden = look == "list" and client.plan.responses == KEEPS
        # Where the connection is lost before its answer, aiohttp sends a deletion once more.
        hidden |= look == "delete" and client.network_was_bad
        if expected and not hidden:
            raise Violation(f"{look}: {turn.read.id} is kept no longer")
    elif look == "retrieve":
        if answer["id"] != turn.read.id or text_of(answer) != turn.read.reading.text:
            raise Violation(f"{answer} is read for {turn.read.id}")
    elif look == "list":
        _compare(turn, answer)
    else:
        # Another instance may keep its log for a while.
        again = await _json(client, "GET", url)
        if again is not None and client.plan.instances == 1:
            raise Violation(f"{turn.read.id} is read after it was deleted")


def _compare(turn: Turn, listed: dict[str, Any]) -> None:
    """Compare the input items of *turn* that are *listed* with what was said."""
    texts = [
        content if isinstance(content := item["content"], str) else content[0]["text"]
        for item in listed["data"]
    ]
    kept_texts = [
        text for each in turn.before for text in (each.question.text, each.read.reading.text)
    ]
    if texts != [*kept_texts, turn.question.text]:
        raise Violation(f"{len(texts)} items are listed for {turn.names}: {texts}")


async def _json(client: Client, method: str, url: str) -> dict[str, Any] | None:
    """Return the JSON that is answered; None if it is no such response, or the request is
    refused.
    """
    async with client.session.request(method, url, headers=client.headers) as response:
        body = orjson.loads(await response.read())
        if response.status == 200:
            answer: dict[str, Any] = body
            return answer
        client.note_refusal(response.status, body["error"], response.headers)
        code = body["error"]["code"]
        client.outcome = ""
    if code == "stream_not_found":
        return None
    # Nothing is said of the response by a server that is full.
    raise ConnectionError(code)
