"""`/conversations`, over real sockets: what is listed, read and deleted, and by whom."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import quote
from uuid import uuid4

from yarl import URL

from tests.support.chat import to_end, until_status
from tests.support.keys import bearer, cookie, keys_of, log_in
from tests.support.server import ENDLESS, MakeServer
from tests.support.waiting import until

if TYPE_CHECKING:
    from aiohttp import ClientResponse

    from tests.support.server import RunningServer

UNUSUAL = [
    "c 1",
    "a/b",
    "%2F",
    "ä€😀",
    "?x=1&y#z",
    "...",
    "x" * 256,
    'q"\\',
    "new\nline",
    "+",
    "{6F96}",
    "}{",
]


async def ask(
    server: RunningServer, text: str, conversation_id: str = "c1", **headers: str
) -> None:
    """Ask over SSE, and wait for the end of the answer."""
    question = {"request_id": uuid4().hex, "text": text, "conversation_id": conversation_id}
    async with server.session.post(server.sse, json=question, headers=headers) as response:
        assert response.status == 200, await response.text()
        assert b"event: complete" in await response.read()


def url(server: RunningServer, conversation_id: str | None = None, query: str = "") -> URL:
    path = "" if conversation_id is None else f"/{quote(conversation_id, safe='')}"
    return URL(f"{server.base}/conversations{path}{query}", encoded=True)


async def get(
    server: RunningServer, conversation_id: str | None = None, query: str = "", **headers: str
) -> Any:
    where = url(server, conversation_id, query)
    async with server.session.get(where, headers=headers) as response:
        assert response.status == 200, await response.text()
        assert response.headers["Cache-Control"] == "no-store"
        return await response.json()


async def code_of(response: ClientResponse) -> tuple[int, str]:
    return response.status, (await response.json())["error"]["code"]


async def refused(
    server: RunningServer, method: str, where: URL, **headers: str
) -> tuple[int, str]:
    """The status and the code of a request that is refused."""
    async with server.session.request(method, where, headers=headers) as response:
        return await code_of(response)


async def delete(server: RunningServer, conversation_id: str, **headers: str) -> None:
    where = url(server, conversation_id)
    async with server.session.delete(where, headers=headers) as response:
        assert (response.status, await response.read()) == (204, b""), conversation_id


async def delete_all(server: RunningServer, **headers: str) -> int:
    """Delete all of a caller; return their number."""
    async with server.session.delete(url(server), headers=headers) as response:
        assert response.status == 200
        number: int = (await response.json())["deleted"]
        return number


async def ids(server: RunningServer, **headers: str) -> list[str]:
    page = await get(server, **headers)
    return [each["id"] for each in page["conversations"]]


async def test_a_conversation_is_listed_and_read(server: RunningServer) -> None:
    await ask(server, "First  question,\n and more")
    await ask(server, "Second question")

    page = await get(server)
    whole = await get(server, "c1")

    (entry,) = page["conversations"]
    assert (page["next"], page["partial"]) == (None, False)
    assert entry["title"] == whole["title"] == "First question, and more"
    assert entry["messages"] == len(whole["messages"]) == 4
    assert entry["updated"] == whole["updated"] == whole["messages"][3]["time"]
    assert [message["role"] for message in whole["messages"]] == ["user", "assistant"] * 2
    assert whole["messages"][0]["text"] == "First  question,\n and more"
    assert whole["messages"][3]["text"]
    assert (whole["older"], whole["partial"]) == (False, False)


async def test_the_conversation_of_a_socket_is_listed_by_the_name_that_it_got(
    server: RunningServer,
) -> None:
    async with server.connect() as ws:
        await ws.send_json(
            {"action": "chat", "request_id": "r", "payload": {"text": "Hi", "streaming": True}}
        )
        begun, *_ = await to_end(ws)

    assert await ids(server) == [begun["chunk"]["metadata"]["conversation_id"]]


async def test_pages_follow_each_other(server: RunningServer) -> None:
    for number in range(7):
        await ask(server, f"q{number}", f"c:{number}")
    await ask(server, "again", "c:2")

    ids, query = [], "?limit=3"
    while query:
        page = await get(server, None, query)
        ids.append([each["id"] for each in page["conversations"]])
        query = f"?limit=3&before={quote(page['next'])}" if page["next"] else ""

    assert ids == [["c:2", "c:6", "c:5"], ["c:4", "c:3", "c:1"], ["c:0"]]


async def test_what_is_no_page_is_refused(server: RunningServer) -> None:
    for query in [
        *("limit=0", "limit=201", "limit=x", "limit=", "limit=-1", "limit=1e2"),
        *("before=", "before=x", "before=nan:c", "before=inf:c", f"limit={'9' * 5000}"),
    ]:
        refusal = await refused(server, "GET", url(server, query=f"?{query}"))
        assert refusal == (400, "invalid_request"), query


async def test_any_id_can_be_read_and_deleted(server: RunningServer) -> None:
    for name in UNUSUAL:
        await ask(server, "Hello", name)

        assert await ids(server) == [name], name
        assert (await get(server, name))["id"] == name, name
        await delete(server, name)
        assert await ids(server) == [], name


async def test_a_deleted_conversation_is_as_if_it_had_never_been(server: RunningServer) -> None:
    await ask(server, "My name is Ada")
    await ask(server, "Other", "c2")
    await delete(server, "c1")

    answers = []
    for name in ("c1", "never"):
        for method in ("GET", "DELETE"):
            async with server.session.request(method, url(server, name)) as response:
                answers.append((*(await code_of(response)), await response.text()))
    assert len(set(answers)) == 1
    assert answers[0][:2] == (404, "conversation_not_found")
    await ask(server, "What is my name?")

    assert len((await get(server, "c1"))["messages"]) == 2
    assert await ids(server) == ["c1", "c2"]


async def test_an_answer_that_runs_while_its_conversation_is_deleted_is_not_kept(
    make_server: MakeServer,
) -> None:
    server = await make_server(ENDLESS)
    async with server.connect() as ws:
        payload = {"text": "Hi", "conversation_id": "c1"}
        await ws.send_json({"action": "chat", "request_id": "r", "payload": payload})
        await until_status(ws, "chunk")
        assert (await refused(server, "DELETE", url(server, "c1")))[0] == 404
        await ws.send_json({"action": "cancel", "request_id": "r"})
        await until_status(ws, "cancelled")
        await ws.send_json({"action": "chat", "request_id": "s", "payload": payload})
        await until_status(ws, "chunk")
        await ws.send_json({"action": "cancel", "request_id": "s"})
        await until_status(ws, "cancelled")
    await until(lambda: server.context.gateway.running == 0)

    assert len((await get(server, "c1"))["messages"]) == 2


async def test_conversations_belong_to_their_key(make_server: MakeServer) -> None:
    server = await make_server(**keys_of("web", "app"))
    await ask(server, "Mine", "c1", **bearer("web"))
    await ask(server, "Theirs", "c1", **bearer("app"))
    await ask(server, "Theirs alone", "c2", **bearer("app"))

    assert await ids(server, **bearer("web")) == ["c1"]
    assert (await get(server, "c1", **bearer("web")))["title"] == "Mine"
    for method in ("GET", "DELETE"):
        refusal = await refused(server, method, url(server, "c2"), **bearer("web"))
        assert refusal == (404, "conversation_not_found")
    assert await delete_all(server, **bearer("web")) == 1
    assert await ids(server, **bearer("app")) == ["c2", "c1"]


async def test_a_session_has_the_conversations_of_its_key(make_server: MakeServer) -> None:
    server = await make_server(**keys_of("web"))
    await ask(server, "Hello", "c1", **bearer("web"))
    session = await log_in(server, "web")

    assert await ids(server, **cookie(session)) == ["c1"]
    headers = {**cookie(session), "Origin": "https://evil.example"}
    refusal = await refused(server, "DELETE", url(server, "c1"), **headers)
    assert refusal == (403, "origin_not_allowed")
    await delete(server, "c1", **cookie(session))


async def test_a_foreign_page_deletes_nothing_where_no_key_is_needed(
    make_server: MakeServer,
) -> None:
    server = await make_server(**{"chat.websocket.allow_origins": []})
    await ask(server, "Hello")

    for where in (url(server), url(server, "c1")):
        refusal = await refused(server, "DELETE", where, Origin="https://evil.example")
        assert refusal == (403, "origin_not_allowed")

    assert await ids(server) == ["c1"]


async def test_without_keys_a_client_is_shown_what_its_own_address_has_asked(
    make_server: MakeServer,
) -> None:
    server = await make_server(
        **{"auth.open": True, "auth.trusted_proxies": ["127.0.0.1"], "auth.allowed_hosts": []}
    )
    here = {"X-Forwarded-For": "192.0.2.1"}
    there = {"X-Forwarded-For": "192.0.2.2"}
    await ask(server, "Hello", "c1", **here)
    await ask(server, "Hello to you", "c2", **there)

    assert await ids(server, **here) == ["c1"]
    assert (await get(server, "c1", **there))["id"] == "c1"  # its id is enough
    assert await delete_all(server, **there) == 1
    assert await ids(server, **here) == ["c1"]


async def test_a_full_server_still_shows_and_deletes(make_server: MakeServer) -> None:
    server = await make_server(
        ENDLESS,
        **{
            "chat.websocket.concurrency.max_connections": 1,
            "chat.websocket.concurrency.connection_queue_size": 1,
        },
    )
    async with server.connect() as ws:
        await ws.send_json(
            {"action": "chat", "request_id": "r", "payload": {"text": "Hi", "streaming": True}}
        )
        await until_status(ws, "chunk")

        assert await ids(server) == []
        assert await delete_all(server) == 0
        await ws.send_json({"action": "cancel", "request_id": "r"})
        await until_status(ws, "cancelled")


async def test_a_long_conversation_is_shown_from_its_newest_turns(
    make_server: MakeServer,
) -> None:
    server = await make_server(
        **{
            "chat.service.repository.persistence.retention_policy": "message_count",
            "chat.service.context.preserve_recent": 0,
        }
    )
    for number in range(6):
        await ask(server, f"{number}" + "x" * 1_000_000)

    whole = await get(server, "c1")

    assert [message["text"][0] for message in whole["messages"][::2]] == ["2", "3", "4", "5"]
    assert whole["older"]
    assert whole["title"].startswith("0x")


async def test_pages_of_another_origin_may_ask(make_server: MakeServer) -> None:
    server = await make_server(**{"chat.websocket.allow_origins": ["https://app.example"]})
    headers = {"Origin": "https://app.example", "Access-Control-Request-Method": "DELETE"}
    async with server.session.options(url(server, "c1"), headers=headers) as response:
        assert response.status in {200, 204}
        assert "DELETE" in response.headers["Access-Control-Allow-Methods"]
    headers = {"Origin": "https://app.example"}
    async with server.session.get(url(server), headers=headers) as response:
        assert response.headers["Access-Control-Allow-Origin"] == "https://app.example"
