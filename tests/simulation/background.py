"""A client that asks for an answer in the background, leaves, and comes back now and then to see how
far it is.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import orjson

from tests.simulation.clock import Clock
from tests.simulation.configuration import HTTP, ROOM, STREAMS
from tests.simulation.patience import GONE
from tests.simulation.plan import BRIDGED
from tests.simulation.response_events import text_of
from tests.simulation.truth import Violation

if TYPE_CHECKING:
    import aiohttp

    from tests.simulation.client import Client

FACE = "background"
# Seconds between two looks: less than what is kept lives.
PAUSES = (0.3, 2.0, 10.0)
# The share of clients that cancel, and of those that ask on the SSE face.
CANCEL, SSE = 0.2, 0.5
# Polls of a server that says nothing, before the client gives up.
TRIES = 5
RUNNING = {"queued", "in_progress", "running"}
GOOD = {"completed", "incomplete", "complete"}


async def ask(client: Client) -> None:
    """Ask, and come back until the answer has ended."""
    sse = client.dice.random() < SSE
    cancels_at = client.dice.choice(PAUSES) if client.dice.random() < CANCEL else 0.0
    asked = await (_ask_sse(client) if sse else _ask_response(client))
    if asked is None:
        return
    url, began, cancelled, tries = asked, Clock.now, False, 0
    longest = _longest(client)
    while True:
        if cancels_at and not cancelled and Clock.now - began >= cancels_at:
            cancelled = True
            await _cancel(client, url, sse=sse)
        try:
            client.patience.heard()
            state = await _look(client, url)
        except GONE:
            # A poll that is lost costs nothing.
            tries += 1
            if tries == TRIES:
                raise
            state = {"status": "queued"}
        if state is None:
            return
        status = state["status"]
        if status not in RUNNING:
            break
        if Clock.now - began > longest:
            raise Violation(f"{status} for {Clock.now - began:.0f} s, at most {longest:.0f}")
        await asyncio.sleep(client.dice.choice(PAUSES))
    if status == "cancelled" and not cancelled:
        raise Violation("cancelled, which nobody has asked for")
    _check(client, state, sse=sse)
    client.outcome = "complete" if status in GOOD else f"background: {status}"


def _longest(client: Client) -> float:
    """Return the seconds after which an answer has ended, whatever happens."""
    changes, plan = client.plan.changes, client.plan
    retries = 1 + int(changes[f"{HTTP}.max_retries"])
    providers = 3 if plan.grouping is not None else 1 + plan.spare
    wait = 10 * float(changes[f"{HTTP}.queue_timeout"])
    return (providers + plan.hops) * retries * (wait + plan.patience)


async def _ask_response(client: Client) -> str | None:
    """Ask for a response; return its address, None if the client has what it gets."""
    arguments = client.body(
        {
            "model": client.model(client.question),
            "input": client.question.text,
            "max_output_tokens": client.question.tokens,
            "background": True,
        }
    )
    async with client.session.post(f"{client.base}/v1/responses", **arguments) as response:
        if response.status != 200:
            await client.refused(response)
            return None
        answer = orjson.loads(await response.read())
    if client.plan.responses != BRIDGED and answer["status"] in GOOD:
        # Its provider has answered at once.
        client.outcome = "complete"
        return None
    if not answer["background"]:
        raise Violation(f"a response in the background that is none: {answer['status']}")
    return f"{client.base}/v1/responses/{answer['id']}"


async def _ask_sse(client: Client) -> str | None:
    arguments = client.body({"request_id": client.name, **client.own_payload()})
    arguments["headers"]["Prefer"] = "respond-async"
    url = f"{client.base}/sse/chat"
    # The answer to its first try ends after this, and perhaps long before another try is answered.
    client.seen_at = client.seen_at or Clock.now
    async with client.session.post(url, **arguments) as response:
        if response.status != 202:
            await client.refused(response)
            return None
        await response.read()
    return f"{url}/{client.name}"


async def _look(client: Client, url: str) -> dict[str, Any] | None:
    """Return how far the answer is; None if it is not kept any more."""
    headers = {**client.headers, "Accept": "application/json"}
    # The response may take long to arrive.
    now = Clock.now
    async with client.session.get(url, headers=headers) as response:
        return await _state(client, response, now)


async def _state(
    client: Client, response: aiohttp.ClientResponse, now: float
) -> dict[str, Any] | None:
    answer: dict[str, Any] = orjson.loads(await response.read())
    if response.status == 200:
        client.seen_at = now
        return answer
    code = answer["error"]["code"]
    client.note_refusal(response.status, answer["error"], response.headers)
    if response.status == 404:
        plan = client.plan
        # What is kept may be dropped for want of room, and ends with its process.
        roomy = plan.changes[f"{STREAMS}.max_kept_bytes"] >= ROOM
        # So is what has ended soon after it was seen, by a client that was sent away meanwhile.
        soon = Clock.now < client.seen_at + plan.changes[f"{STREAMS}.store_window"]
        roomy = roomy and soon
        if roomy and plan.instances == 1 and not plan.drains and not client.network_was_bad:
            raise Violation("an answer in the background is not found")
        return None
    if code in {"invalid_api_key", "server_shutdown"}:
        return None
    client.outcome = ""
    raise ConnectionError(code)


async def _cancel(client: Client, url: str, *, sse: bool) -> None:
    try:
        if sse:
            request = client.session.delete(url, headers=client.headers)
        else:
            request = client.session.post(f"{url}/cancel", headers=client.headers)
        async with request as response:
            await response.read()
    except GONE:
        return


def _check(client: Client, state: dict[str, Any], *, sse: bool) -> None:
    """Check an answer that has ended."""
    status, question = state["status"], client.question
    text = state.get("text") if sse else text_of(state) if state.get("output") else ""
    if text is None:
        # The log has its beginning no more.
        return
    if not any(answer.startswith(text) for answer in question.answers):
        raise Violation(f"read {text[-40:]!r}, which is not in the answer")
    if status not in {"completed", "complete"}:
        return
    if not question.may_be_whole:
        raise Violation(f"{status}, though the provider failed by {question.fault}")
    if text not in question.answers and not question.may_end_early:
        raise Violation(f"{status} with {len(text)} characters of {len(question.answer)}")
