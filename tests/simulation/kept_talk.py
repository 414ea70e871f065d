"""How a client talks in a conversation that the server keeps: on our own faces, one question after
the other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import orjson

from tests.simulation import own_faces
from tests.simulation.conversation import NEXT
from tests.simulation.truth import LARGE, Violation

if TYPE_CHECKING:
    from tests.simulation.client import Client


async def talk(client: Client) -> None:
    """Ask some questions, then read the conversation, and delete it."""
    name = f"c{client.number}"
    # Turns that are kept for certain, and those that may be: of an answer that was cancelled the
    # text so far is kept, and a question that is asked again when its answer is forgotten is
    # another turn.
    kept = perhaps = 0
    # Whether an answer is too large to keep what came before it, or to show that to the model.
    large = False
    for number in range(1, client.dice.choice((1, 3, 5)) + 1):
        face = client.dice.choice(("websocket", "sse"))
        asked = client.another(client.number + number * NEXT, face, name)
        # Of several instances one may not have heard yet of what another has kept.
        large |= LARGE in asked.question.text
        least = kept if client.plan.instances == 1 and not large else 0
        asked.question.turns = tuple(range(least + 1, kept + perhaps + 2))
        await own_faces.ask(asked)
        client.outcome = asked.outcome
        if asked.outcome.startswith("refused"):
            return
        kept += asked.outcome == "complete"
        perhaps += (asked.outcome != "complete") + asked.repeats
    url = f"{client.base}/conversations/{name}"
    async with client.session.get(url, headers=client.headers) as response:
        shown = orjson.loads(await response.read())
        alone = client.plan.instances == 1
        if response.status == 200:
            count = len(shown["messages"]) // 2
        else:
            client.note_refusal(response.status, shown["error"], response.headers)
            count = 0
            alone &= shown["error"]["code"] == "not_found"
        least = min(kept, 1) if large else kept
        if alone and not least <= count <= kept + perhaps:
            raise Violation(f"{count} turns are kept, not {kept}, or {perhaps} more")
    async with client.session.delete(url, headers=client.headers) as response:
        deleted = response.status in {200, 204}
    async with client.session.get(url, headers=client.headers) as response:
        if deleted and alone and response.status == 200:
            raise Violation("a conversation is read after it was deleted")
    client.outcome = "complete"
