"""`/conversations`: a caller's own conversations, to list, read and delete.

    GET    /conversations            the newest first, in pages
    GET    /conversations/{id}       the turns of one
    DELETE /conversations/{id}       one
    DELETE /conversations            all that the list has

With keys these are the conversations of the key. Without keys all clients are one caller, and an
id is enough to read its conversation: a client is therefore shown only those of its own address,
as with streams. Reading and deleting need no place: they work in a full server.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from aiohttp import web

from aioserver.auth.callers import CALLER
from aioserver.errors import InvalidRequest
from aioserver.faces.http import ID, NO_STORE
from aioserver.wings.conversations.turn import Position, title_of

if TYPE_CHECKING:
    from aioserver.wings.conversations.history import History
    from aioserver.wings.conversations.turn import Turn

PATH = "/conversations"
# The most conversations of one page, and the default.
MAX_PAGE, PAGE = 200, 50
# The most bytes of text of one answer; the newest turn is always included.
MAX_SHOWN = 1 << 22


def routes(history: History) -> list[web.RouteDef]:
    """Return the routes of `/conversations`, which are those of *history*."""
    return [
        web.get(PATH, partial(listing, history)),
        web.delete(PATH, partial(delete_all, history)),
        web.get(f"{PATH}/{ID}", partial(read, history)),
        web.delete(f"{PATH}/{ID}", partial(delete, history)),
    ]


async def listing(history: History, request: web.Request) -> web.Response:
    """Answer a GET with a page of the list.

    Raises:
        InvalidRequest: `limit` or `before` is not valid.
    """
    before = request.query.get("before")
    after = None if before is None else Position.parse(before)
    page = await history.listing(request[CALLER], _limit(request), after)
    conversations = [
        {
            "id": summary.conversation_id,
            "title": summary.title,
            "updated": summary.updated,
            "messages": summary.messages,
        }
        for summary in page.summaries
    ]
    following = None if page.after is None else str(page.after)
    return _json({"conversations": conversations, "next": following, "partial": page.partial})


async def read(history: History, request: web.Request) -> web.Response:
    """Answer a GET with the kept turns of one conversation.

    Raises:
        ConversationNotFound: the caller has no such conversation.
    """
    conversation_id = request.match_info["id"]
    dialogue = await history.read(request[CALLER], conversation_id)
    turns, size = dialogue.turns, 0
    first = len(turns)
    while first and (first == len(turns) or size + turns[first - 1].size <= MAX_SHOWN):
        first -= 1
        size += turns[first].size
    return _json(
        {
            "id": conversation_id,
            "title": title_of(turns[0].question),
            "updated": turns[-1].ended,
            "messages": [message for turn in turns[first:] for message in _messages(turn)],
            "older": first > 0,
            "partial": dialogue.partial,
        }
    )


async def delete(history: History, request: web.Request) -> web.Response:
    """Answer a DELETE of one conversation. An answer that runs in it continues, and is not kept.

    Raises:
        ConversationNotFound: the caller has no such conversation.
        HistoryUnavailable: it is not certain that it is deleted.
        RateLimitExceeded: the key has used its requests of this minute.
    """
    await _count(request)
    await history.delete(request[CALLER], request.match_info["id"])
    return web.Response(status=204, headers=NO_STORE)


async def delete_all(history: History, request: web.Request) -> web.Response:
    """Answer a DELETE of all conversations in the caller's list.

    Raises:
        RateLimitExceeded: the key has used its requests of this minute.
        HistoryUnavailable: it is not certain that they are deleted.
    """
    await _count(request)
    deleted = await history.delete_all(request[CALLER])
    return _json({"deleted": deleted})


async def _count(request: web.Request) -> None:
    """Count a deletion, of one or all, for the rate of its key."""
    if (quota := request[CALLER].quota) is not None:
        await quota.count()


def _limit(request: web.Request) -> int:
    text = request.query.get("limit", str(PAGE))
    # A longer number is too large, and int() is slow with thousands of digits.
    if text.isascii() and text.isdigit() and len(text) <= 3 and 1 <= int(text) <= MAX_PAGE:
        return int(text)
    raise InvalidRequest(f"limit must be a number from 1 to {MAX_PAGE}", param="limit")


def _messages(turn: Turn) -> list[dict[str, object]]:
    return [
        {"role": "user", "text": turn.question, "time": turn.ended},
        {"role": "assistant", "text": turn.answer, "time": turn.ended},
    ]


def _json(fields: dict[str, object]) -> web.Response:
    return web.json_response(fields, headers=NO_STORE)
