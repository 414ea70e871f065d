"""Conversations that the server keeps, as the client library lists, reads and deletes them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import web

from aioserver.client import AnswerError, Client, Summary, Turn
from aioserver.client.sync import Client as SyncClient

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.support.server import RunningServer


class Kept:
    """A server that has conversations, and answers with `replies` first."""

    def __init__(self) -> None:
        self.url = ""
        self.requests: list[str] = []
        self.replies: list[web.Response] = []
        self.ids = [f"c{number}" for number in range(450)]

    async def answer(self, request: web.Request) -> web.Response:
        self.requests.append(f"{request.method} {request.raw_path}")
        if self.replies:
            return self.replies.pop(0)
        if request.path == "/conversations":
            first = int(request.query.get("before", "0"))
            following = first + int(request.query["limit"])
            shown = [{"id": name, "title": "t", "later": 1} for name in self.ids[first:following]]
            after = str(following) if following < len(self.ids) else None
            return web.json_response({"conversations": shown, "next": after})
        messages = [
            {"role": role, "text": f"{role} {number}", "time": number}
            for number in (1, 2)
            for role in ("user", "assistant")
        ]
        return web.json_response({"id": "c", "messages": messages, "older": False})


@pytest.fixture
async def kept() -> AsyncIterator[Kept]:
    kept = Kept()
    app = web.Application()
    app.router.add_route("*", "/conversations{rest:.*}", kept.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    kept.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield kept
    await runner.cleanup()


def refusal(status: int, code: str, **headers: str) -> web.Response:
    error = {"message": f"{code} happened", "type": "t", "param": None, "code": code}
    return web.json_response({"error": error}, status=status, headers=headers)


@pytest.mark.parametrize(("most", "requests"), [(3, 1), (200, 1), (201, 2), (1000, 3)])
async def test_list_is_read_page_by_page(kept: Kept, most: int, requests: int) -> None:
    async with Client(kept.url) as client:
        summaries = await client.conversations(most)

    assert [summary.id for summary in summaries] == kept.ids[:most]
    assert summaries[0] == Summary("c0", "t")
    assert len(kept.requests) == requests


async def test_turns_are_questions_with_their_answers(kept: Kept) -> None:
    async with Client(kept.url) as client:
        turns = await client.turns("a/b ?ü")

    assert turns == [Turn("user 1", "assistant 1", 1.0), Turn("user 2", "assistant 2", 2.0)]
    assert kept.requests == ["GET /conversations/a%2Fb%20%3F%C3%BC"]


async def test_conversation_reads_and_deletes_itself(kept: Kept) -> None:
    kept.replies = [refusal(404, "conversation_not_found") for _ in range(2)]
    kept.replies.append(web.Response(status=204))
    async with Client(kept.url) as client:
        conversation = client.conversation("c1")
        assert await conversation.turns() == []
        await conversation.delete()
        await conversation.delete()
        assert len(await conversation.turns()) == 2

    assert kept.requests == [
        f"{method} /conversations/c1" for method in ["GET", "DELETE", "DELETE", "GET"]
    ]


async def test_refusal_is_raised(kept: Kept) -> None:
    async with Client(kept.url, key="wrong") as client:
        for code, status in (("invalid_api_key", 401), ("conversation_not_found", 404)):
            kept.replies = [refusal(status, code)]
            with pytest.raises(AnswerError) as caught:
                await client.delete_conversation("c1")

            assert (caught.value.code, caught.value.retryable) == (code, False)


@pytest.mark.virtual_time
async def test_full_server_is_asked_again_until_the_deadline(kept: Kept) -> None:
    headers = {"Retry-After": "9"}
    kept.replies = [refusal(503, "server_at_capacity", **headers), web.Response(status=502)]
    loop = asyncio.get_running_loop()
    async with Client(kept.url, deadline=30.0) as client:
        start = loop.time()
        assert len(await client.conversations(5)) == 5
        assert loop.time() - start >= 9.0

        kept.replies = [refusal(503, "history_unavailable", **headers) for _ in range(9)]
        start = loop.time()
        with pytest.raises(AnswerError) as caught:
            await client.conversations()
        assert loop.time() - start <= 30.0

    assert caught.value.code == "history_unavailable"
    assert caught.value.retryable


async def test_address_where_nothing_listens_is_reported_soon(unused_tcp_port: int) -> None:
    async with Client(f"http://127.0.0.1:{unused_tcp_port}") as client:
        with pytest.raises(AnswerError) as caught:
            await client.conversations()

    assert caught.value.code == "connect_error"


@pytest.mark.parametrize("body", [b"", b"[]", b'{"conversations":[{}]}', b'{"conversations":1}'])
async def test_what_is_no_list_is_an_error(kept: Kept, body: bytes) -> None:
    kept.replies = [web.Response(body=body)]
    async with Client(kept.url) as client:
        with pytest.raises(AnswerError) as caught:
            await client.conversations()

    assert caught.value.code == "protocol_error"


async def test_list_whose_pages_never_end_has_an_end(kept: Kept) -> None:
    page: dict[str, Any] = {"conversations": [{"id": "c"}], "next": "0"}
    kept.replies = [web.json_response(page) for _ in range(10)]
    async with Client(kept.url) as client:
        assert len(await client.conversations(5)) == 5


async def test_program_without_an_event_loop_has_the_same(kept: Kept) -> None:
    def work() -> None:
        with SyncClient(kept.url) as client:
            assert len(client.conversations(3)) == 3
            assert len(client.turns("c1")) == 2
            client.delete_conversation("c1")
            conversation = client.conversation("c2")
            assert len(conversation.turns()) == 2
            conversation.delete()

    await asyncio.to_thread(work)

    assert len(kept.requests) == 5


async def test_conversations_of_a_whole_server(server: RunningServer) -> None:
    async with Client(server.base) as client:
        conversation = client.conversation("a/b ?")
        first = await conversation.chat("One").text()
        await conversation.chat("Two").text()
        turns = await conversation.turns()
        (summary,) = await client.conversations()
        await conversation.delete()

        assert [turn.question for turn in turns] == ["One", "Two"]
        assert turns[0].answer == first
        assert (summary.id, summary.title, summary.messages) == ("a/b ?", "One", 4)
        assert await client.conversations() == []
        with pytest.raises(AnswerError, match="conversation_not_found"):
            await client.delete_conversation("a/b ?")
