"""An answer on either transport: its events, its three ends, what is asked again and what is
not.
"""

from __future__ import annotations

import asyncio
import itertools
from contextlib import asynccontextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

import pytest

from aioserver.client import (
    AnswerError,
    Client,
    Complete,
    Processing,
    Queued,
    Reasoning,
    Text,
    ToolCalls,
    Waiting,
)
from tests.support.scripted_server import ScriptedServer, answer, frame, idle, saying
from tests.support.waiting import patience, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from aioserver.client import Answer
    from tests.support.scripted_server import AnswerScript, ResponsePeer, SocketPeer

Transport = Literal["websocket", "sse"]

pytestmark = pytest.mark.parametrize("transport", ["websocket", "sse"])

HELLO = answer("", "Hel", "lo")
WHOLE = saying(*HELLO)


def error(code: str, number: int | None = None, /, **chunk: Any) -> dict[str, Any]:
    return frame("", "error", number, error=f"{code} happened", code=code, **chunk)


def client_of(server: ScriptedServer, transport: Transport, **arguments: Any) -> Client:
    return Client(server.url, transport=transport, **{"deadline": 1000.0, **arguments})


@asynccontextmanager
async def asked(
    transport: Transport, *answers: AnswerScript, **arguments: Any
) -> AsyncIterator[tuple[ScriptedServer, Client]]:
    """A server with these answers, and a client of it."""
    async with (
        ScriptedServer(answers=[*answers]) as server,
        client_of(server, transport, **arguments) as client,
    ):
        yield server, client


def text_event(word: str, number: int) -> dict[str, Any]:
    return frame("", "chunk", number, type="text", data=word, metadata={})


async def test_events_are_what_the_server_says(transport: Transport) -> None:
    deltas = [{"index": 0, "function": {"name": "f", "arguments": "{"}}]
    usage = {"prompt_tokens": 1, "completion_tokens": 2}
    frames = [
        frame("", "queued", position=3, eta=4.5),
        frame(
            "", "processing", 1, metadata={"provider": "p", "model": "m", "conversation_id": "c"}
        ),
        frame("", "chunk", 2, type="reasoning", data="hm", metadata={}),
        frame("", "chunk", 3, type="text", data="Hi", metadata={}, later="field"),
        frame("", "chunk", 4, type="a type of a later server", data=1),
        frame("", "a status of a later server", 5),
        frame("", "a remark of a later server"),
        frame("", "chunk", 6, type="tool_calls", data=deltas),
        frame(
            "",
            "complete",
            7,
            metadata={"provider": "q", "model": "n", "finish_reason": "length", "usage": usage},
        ),
    ]
    async with asked(transport, saying(*frames)) as (_server, client):
        answered = client.chat("Hi")
        events = [event async for event in answered.events()]

    complete = Complete("length", usage, "q", "n")
    assert events == [
        Queued(3, 4.5),
        Processing("p", "m", "c"),
        Reasoning("hm"),
        Text("Hi"),
        ToolCalls(deltas),
        complete,
    ]
    assert answered.complete == complete
    assert answered.received == "Hi"


async def test_question_has_the_terms_that_were_given(transport: Transport) -> None:
    async with ScriptedServer(answers=[WHOLE]) as server, client_of(server, transport) as client:
        await client.chat("Hi", deadline=30.5, start_within=2, batch=True).text()
        # More than the server takes, and less than it reads.
        await client.chat("Hi", deadline=86_401, start_within=0.000_01).text()
        await client.chat("Hi").text()
        for wrong in (0, -1.0):
            with pytest.raises(ValueError, match="positive"):
                client.chat("Hi", start_within=wrong)

    sent = [
        {name: asked["payload"].get(name) for name in ("start_within", "deadline", "class")}
        for asked in server.seen
    ]
    assert sent == [
        {"start_within": 2, "deadline": 30.5, "class": "batch"},
        {"start_within": 0.001, "deadline": None, "class": None},
        {"start_within": None, "deadline": None, "class": None},
    ]


async def test_question_has_what_was_asked(transport: Transport) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    messages = [{"role": "user", "content": "Hi"}]
    async with ScriptedServer(answers=[WHOLE]) as server, client_of(server, transport) as client:
        await client.chat(
            "Hi",
            conversation_id="c",
            provider="p",
            model="m",
            options={"temperature": 0},
            tools=tools,
            metadata={"a": 1},
            streaming=False,
            request_id="ü/ %?",
        ).text()
        await client.chat(messages).text()
        await client.chat("Hi").text()
        await client.chat("Hi").text()
        conversation = client.conversation()
        await conversation.chat("Hi").text()

    first, second, third, fourth, fifth = server.seen
    assert first["request_id"] == "ü/ %?"
    assert first["payload"] == {
        "text": "Hi",
        "conversation_id": "c",
        "provider": "p",
        "model": "m",
        "options": {"temperature": 0, "tools": tools},
        "metadata": {"a": 1},
        "streaming": False,
    }
    assert second["payload"] == {"messages": messages}
    # Without a conversation of its own a question would follow another one of the same socket.
    assert third["payload"]["conversation_id"] != fourth["payload"]["conversation_id"]
    assert fifth["payload"]["conversation_id"] == conversation.id


@pytest.mark.parametrize(
    ("code", "more"),
    [
        ("invalid_request", {}),
        ("model_not_found", {}),
        ("request_conflict", {}),
        ("internal_error", {"retryable": False}),
        ("a_code_of_a_later_server", {}),
    ],
)
@pytest.mark.parametrize("number", [None, 1])
async def test_error_that_is_not_retryable_is_raised(
    transport: Transport, code: str, more: dict[str, Any], number: int | None
) -> None:
    refusal = saying(error(code, number, **more))
    async with ScriptedServer(answers=[refusal]) as server, client_of(server, transport) as client:
        with pytest.raises(AnswerError) as caught:
            await client.chat("Hi", request_id="r1").text()

    assert (caught.value.code, caught.value.message) == (code, f"{code} happened")
    assert not caught.value.retryable
    assert caught.value.request_id == "r1"
    assert len(server.seen) == 1


@pytest.mark.virtual_time
@pytest.mark.parametrize(
    "code",
    ["server_at_capacity", "rate_limit_exceeded", "concurrency_exceeded", "server_shutdown"],
)
async def test_refusal_for_now_is_repeated_under_the_same_id(
    transport: Transport, code: str
) -> None:
    refusal = saying(error(code, retryable=True, retry_after=5.0))
    async with asked(transport, refusal, refusal, WHOLE) as (server, client):
        start = asyncio.get_running_loop().time()
        text = await client.chat("Hi", request_id="r1").text()
        took = asyncio.get_running_loop().time() - start

    assert text == "Hello"
    assert [command["request_id"] for command in server.seen] == ["r1"] * 3
    assert 10.0 <= took <= 24.0


@pytest.mark.virtual_time
@pytest.mark.parametrize(
    "code", ["provider_queue_full", "provider_rate_limited", "circuit_open", "connect_timeout"]
)
async def test_answer_that_failed_before_anything_was_paid_for_is_asked_under_a_new_id(
    transport: Transport, code: str
) -> None:
    failure = saying(HELLO[0], error(code, 2, retryable=True, retry_after=2.0))
    async with asked(transport, failure, WHOLE) as (server, client):
        start = asyncio.get_running_loop().time()
        answered = client.chat("Hi", request_id="r1")
        text = await answered.text()

        assert asyncio.get_running_loop().time() - start >= 2.0
    assert text == "Hello"
    first, second = server.seen
    assert (first["request_id"], second["request_id"]) == ("r1", answered.request_id)
    assert answered.request_id != "r1"
    assert first["payload"] == second["payload"]


@pytest.mark.virtual_time
async def test_fault_of_the_provider_is_met_three_times_at_most(transport: Transport) -> None:
    failure = saying(HELLO[0], error("connect_error", 2, retryable=True))
    async with ScriptedServer(answers=[failure]) as server, client_of(server, transport) as client:
        with pytest.raises(AnswerError) as caught:
            await client.chat("Hi").text()

    assert caught.value.code == "connect_error"
    assert len(server.seen) == 3


@pytest.mark.parametrize("code", ["read_timeout", "provider_disconnected", "server_shutdown"])
@pytest.mark.parametrize("shown", [False, True])
async def test_answer_that_may_have_been_paid_for_is_not_asked_again(
    transport: Transport, code: str, shown: bool
) -> None:
    frames = HELLO[:2] if shown else HELLO[:1]
    failure = saying(*frames, error(code, len(frames) + 1, retryable=True, retry_after=1.0))
    pieces = []
    async with ScriptedServer(answers=[failure]) as server, client_of(server, transport) as client:

        async def read() -> None:
            async for piece in client.chat("Hi"):
                pieces.append(piece)  # noqa: PERF401 - what has come before the error

        with pytest.raises(AnswerError) as caught:
            await read()

    assert caught.value.code == code
    assert caught.value.text == "".join(pieces) == ("Hel" if shown else "")
    assert caught.value.retryable is not shown
    assert len(server.seen) == 1


@pytest.mark.parametrize("code", ["stream_not_found", "resume_gap"])
async def test_rest_that_can_no_longer_be_had_is_an_error_with_the_part(
    transport: Transport, code: str
) -> None:
    scripts = [saying(*HELLO[:2], cut=True), saying(error(code))]
    async with ScriptedServer(answers=scripts) as server, client_of(server, transport) as client:
        with pytest.raises(AnswerError) as caught:
            await client.chat("Hi").text()

    assert (caught.value.code, caught.value.text) == (code, "Hel")
    lost = "the server has lost the rest of this answer"
    assert (lost in caught.value.message) == (code == "stream_not_found")
    # The rest of the answer is of no use to anybody, if it is there.
    assert server.actions == ["chat", "resume", *["cancel"] * (code == "resume_gap")]


@pytest.mark.parametrize("number", range(4))
async def test_connection_that_is_lost_is_continued_after_the_last_event(
    transport: Transport, number: int
) -> None:
    scripts = [saying(*HELLO[:number], cut=True), WHOLE]
    async with ScriptedServer(answers=scripts) as server, client_of(server, transport) as client:
        pieces = [piece async for piece in client.chat("Hi", request_id="r1")]

    assert pieces == ["Hel", "lo"]
    assert server.actions == ["chat", "resume" if number else "chat"]
    assert server.seen[1]["request_id"] == "r1"


@pytest.mark.parametrize("number", range(4))
async def test_answer_of_an_earlier_program_goes_on_after_its_last_event(
    transport: Transport, number: int
) -> None:
    async with ScriptedServer(answers=[WHOLE]) as server, client_of(server, transport) as client:
        first = [event async for event in client.chat("Hi", request_id="r1").events()]
        numbers = [getattr(event, "number", 0) for event in first]
        rest = client.chat("Hi", request_id="r1", last_event_id=number)
        events = [event async for event in rest.events()]

    assert numbers == [1, 2, 3, 4]
    assert events == first[number:]
    assert server.actions == ["chat", "resume"]
    assert server.seen[1]["payload"] == {"last_event_id": number}


@pytest.mark.parametrize("number", [0, 2])
async def test_answer_of_an_earlier_program_that_is_lost_says_so_and_is_not_asked_again(
    transport: Transport, number: int
) -> None:
    gone = saying(error("stream_not_found", retryable=False))
    async with ScriptedServer(answers=[gone]) as server, client_of(server, transport) as client:
        with pytest.raises(AnswerError) as caught:
            await client.chat("Hi", request_id="r1", last_event_id=number).text()

    assert caught.value.code == "stream_not_found"
    assert "the server has lost the rest of this answer" in caught.value.message
    assert server.actions == ["resume"]


async def test_number_of_an_event_belongs_to_an_id(transport: Transport) -> None:
    async with ScriptedServer(answers=[WHOLE]) as server, client_of(server, transport) as client:
        for arguments in ({"last_event_id": 1}, {"last_event_id": -1, "request_id": "r1"}):
            with pytest.raises(ValueError, match="last_event_id"):
                client.chat("Hi", **arguments)


async def test_same_question_under_the_same_id_has_the_same_bytes(transport: Transport) -> None:
    longest = "ü" * 256
    async with ScriptedServer(answers=[WHOLE]) as server, client_of(server, transport) as client:
        for name in ("r1", "r1", longest, longest):
            assert await client.chat("Hi", request_id=name).text() == "Hello"
        await client.chat("Hi", request_id="r1", conversation_id="c").text()

    first, second, third, fourth, fifth = (command["payload"] for command in server.seen)
    assert first == second
    assert third == fourth
    conversations = {payload["conversation_id"] for payload in (first, third, fifth)}
    assert len(conversations) == 3
    assert all(0 < len(name) <= 256 for name in conversations)
    assert fifth["conversation_id"] == "c"


@pytest.mark.parametrize("how", ["refused", "ended", "lost"])
async def test_a_client_that_does_not_retry_asks_once(transport: Transport, how: str) -> None:
    full = {"retryable": True, "retry_after": 0.1}
    script, code = {
        "refused": (saying(error("server_at_capacity", **full)), "server_at_capacity"),
        "ended": (saying(HELLO[0], error("circuit_open", 2, **full)), "circuit_open"),
        "lost": (saying(*HELLO[:2], cut=True), "connect_error"),
    }[how]
    async with asked(transport, script, WHOLE, retry=False) as (server, client):
        with pytest.raises(AnswerError) as caught:
            await client.chat("Hi").text()

    assert caught.value.code == code
    assert [asked["action"] for asked in server.seen].count("chat") == 1
    assert "resume" not in {asked["action"] for asked in server.seen}


@pytest.mark.virtual_time
async def test_wait_before_the_next_try_is_an_event(transport: Transport) -> None:
    refusal = saying(error("server_at_capacity", retryable=True, retry_after=5.0))
    failure = saying(HELLO[0], error("circuit_open", 2, retryable=True, retry_after=3.0))
    async with asked(transport, refusal, failure, WHOLE) as (_server, client):
        loop = asyncio.get_running_loop()
        waits: list[tuple[Waiting, float]] = []
        others = []
        async for event in client.chat("Hi").events():
            if isinstance(event, Waiting):
                waits.append((event, loop.time()))
            else:
                others.append((event, loop.time()))

    assert [wait.code for wait, _time in waits] == ["server_at_capacity", "circuit_open"]
    assert [wait.message for wait, _time in waits] == [
        "server_at_capacity happened",
        "circuit_open happened",
    ]
    assert waits[0][0].seconds >= 4.9
    assert waits[1][0].seconds >= 2.9
    for (wait, begun), (_event, then) in zip(waits, others, strict=False):
        assert then - begun >= wait.seconds - 0.01
    assert [type(event) for event, _time in others] == [
        Processing,
        Processing,
        Text,
        Text,
        Complete,
    ]


async def test_answer_that_another_client_cancelled_is_an_error(transport: Transport) -> None:
    cancelled = saying(*HELLO[:2], frame("", "cancelled", 3))
    async with asked(transport, cancelled) as (_server, client):
        with pytest.raises(AnswerError) as caught:
            await client.chat("Hi").text()

    assert (caught.value.code, caught.value.text) == ("cancelled", "Hel")


# Deadlines.


async def silent(_peer: SocketPeer | ResponsePeer, _command: dict[str, Any]) -> None:
    await idle()


@pytest.mark.virtual_time
async def test_silence_ends_at_the_deadline_and_is_cancelled(transport: Transport) -> None:
    async def begin(peer: SocketPeer | ResponsePeer, command: dict[str, Any]) -> None:
        await saying(*HELLO[:2])(peer, command)
        if transport == "sse":
            await idle()

    async with ScriptedServer(answers=[begin]) as server, client_of(server, transport) as client:
        loop = asyncio.get_running_loop()
        start = loop.time()
        with pytest.raises(AnswerError) as caught:
            await client.chat("Hi", deadline=20.0).text()
        assert 20.0 <= loop.time() - start < 21.0
        await until(lambda: server.actions[-1] == "cancel")

    assert (caught.value.code, caught.value.text) == ("deadline_exceeded", "Hel")
    assert caught.value.message == "no whole answer within 20 s"


@pytest.mark.virtual_time
async def test_program_that_always_finds_text_is_ended_by_the_deadline(
    transport: Transport,
) -> None:
    async def talk(peer: SocketPeer | ResponsePeer, command: dict[str, Any]) -> None:
        await saying(HELLO[0])(peer, command)
        for number in itertools.count(2):
            await peer.send({**text_event("word ", number), "request_id": command["request_id"]})
            if number % 5 == 0:
                await asyncio.sleep(0.001)

    async with ScriptedServer(answers=[talk]) as server, client_of(server, transport) as client:

        async def read_slowly() -> None:
            async for _piece in client.chat("Hi", deadline=0.05):
                await asyncio.sleep(0.001)

        with pytest.raises(AnswerError) as caught:
            await read_slowly()

    assert caught.value.code == "deadline_exceeded"
    assert not caught.value.retryable


@pytest.mark.virtual_time
async def test_answer_that_is_there_is_read_after_the_deadline(transport: Transport) -> None:
    async with ScriptedServer(answers=[WHOLE]) as server, client_of(server, transport) as client:
        pieces = []
        async for piece in client.chat("Hi", deadline=5.0):
            pieces.append(piece)
            await asyncio.sleep(10)

    assert pieces == ["Hel", "lo"]


@pytest.mark.virtual_time
async def test_server_that_stays_away_is_one_error_at_the_deadline(transport: Transport) -> None:
    async with ScriptedServer(answers=[WHOLE]) as server:
        client = client_of(server, transport)
        assert await client.chat("Hi").text() == "Hello"
    loop = asyncio.get_running_loop()
    start = loop.time()
    with pytest.raises(AnswerError) as caught:
        await client.chat("Hi", deadline=40.0).text()
    # The next try would come too late: a wait has 30 s at most.
    assert 10.0 <= loop.time() - start <= 40.0
    await client.close()

    assert caught.value.code == "connect_error"
    assert "Connection refused" in caught.value.message
    assert caught.value.retryable


async def test_address_where_nothing_listens_is_reported_soon(
    transport: Transport, unused_tcp_port: int
) -> None:
    async with Client(f"http://127.0.0.1:{unused_tcp_port}", transport=transport) as client:
        async with asyncio.timeout(patience(10)):
            with pytest.raises(AnswerError) as caught:
                await client.chat("Hi").text()

    assert caught.value.code == "connect_error"
    assert "Connection refused" in caught.value.message


@pytest.mark.virtual_time
async def test_deadline_covers_refusals_and_reconnections(transport: Transport) -> None:
    refusal = saying(error("server_at_capacity", retryable=True))
    async with ScriptedServer(answers=[refusal]) as server, client_of(server, transport) as client:
        loop = asyncio.get_running_loop()
        start = loop.time()
        with pytest.raises(AnswerError) as caught:
            await client.chat("Hi", deadline=40.0).text()

        assert loop.time() - start <= 40.0
    assert caught.value.code == "server_at_capacity"
    assert 4 < len(server.seen) <= 40


# Leaving.


async def endless(peer: SocketPeer | ResponsePeer, command: dict[str, Any]) -> None:
    await saying(*HELLO[:3])(peer, command)
    if hasattr(peer, "response"):
        await idle()


async def break_off(answered: Answer) -> None:
    async for _piece in answered:
        break


async def fail(answered: Answer) -> None:
    async for _piece in answered:
        raise ZeroDivisionError


async def forget(answered: Answer) -> None:
    pieces = aiter(answered)
    assert await anext(pieces) == "Hel"
    del pieces


@pytest.mark.parametrize("leave", [break_off, fail, forget])
async def test_leaving_the_loop_cancels_the_answer(
    transport: Transport, leave: Callable[[Answer], Awaitable[None]]
) -> None:
    async with asked(transport, endless) as (server, client):
        with pytest.raises(ZeroDivisionError) if leave is fail else nullcontext():
            await leave(client.chat("Hi", request_id="r1"))
        await until(lambda: server.actions == ["chat", "cancel"])

    assert server.seen[1]["request_id"] == "r1"


@pytest.mark.parametrize("way", ["pieces", "text", "events"])
async def test_task_that_is_cancelled_cancels_its_answer(transport: Transport, way: str) -> None:
    async with asked(transport, endless) as (server, client):
        answered = client.chat("Hi")

        async def read() -> None:
            if way == "text":
                await answered.text()
            async for _ in answered if way == "pieces" else answered.events():
                pass

        task = asyncio.ensure_future(read())
        await until(lambda: answered.received == "Hello")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: server.actions == ["chat", "cancel"])


async def test_end_of_the_block_cancels_the_answer(transport: Transport) -> None:
    async with asked(transport, endless) as (server, client):
        async with client.chat("Hi") as answered:
            pieces = aiter(answered)
            assert await anext(pieces) == "Hel"
        await until(lambda: server.actions == ["chat", "cancel"])

        assert [piece async for piece in pieces] == ["lo"]


async def test_end_of_the_client_cancels_its_answers(transport: Transport) -> None:
    async with ScriptedServer(answers=[endless]) as server:
        async with client_of(server, transport) as client:
            pieces = aiter(client.chat("Hi"))
            assert await anext(pieces) == "Hel"
        await until(lambda: server.actions == ["chat", "cancel"])

        with pytest.raises(RuntimeError):
            client.chat("Hi")


@pytest.mark.parametrize("waiting", [False, True])
async def test_cancel_ends_the_loop_of_another_task(transport: Transport, waiting: bool) -> None:
    """The task waits for the next event, or for its next try."""
    full = saying(error("server_at_capacity", retryable=True, retry_after=100.0))
    scripts = [full if waiting else endless]
    async with ScriptedServer(answers=scripts) as server, client_of(server, transport) as client:
        answered = client.chat("Hi")
        task = asyncio.ensure_future(answered.text())
        # The refusal has come, or the text.
        await until(lambda: bool(answered._fault if waiting else answered.received == "Hello"))  # noqa: SLF001
        await answered.cancel()
        async with asyncio.timeout(patience(5)):
            assert await task == ("" if waiting else "Hello")
        assert answered.complete is None
        await answered.cancel()

        await until(lambda: server.actions == (["chat"] if waiting else ["chat", "cancel"]))


async def test_answer_that_has_ended_is_not_cancelled(transport: Transport) -> None:
    async with ScriptedServer(answers=[WHOLE]) as server, client_of(server, transport) as client:
        async with client.chat("Hi") as answered:
            assert await answered.text() == "Hello"
            await answered.cancel()
        assert await client.chat("Hi").text() == "Hello"

    assert server.actions == ["chat", "chat"]


async def test_answer_that_was_never_read_is_never_asked(transport: Transport) -> None:
    async with ScriptedServer(answers=[WHOLE]) as server, client_of(server, transport) as client:
        async with client.chat("Hi"):
            pass
        await client.chat("Hi").cancel()
        assert await client.chat("Hi").text() == "Hello"

    assert server.actions == ["chat"]


async def test_answer_is_read_once(transport: Transport) -> None:
    async with ScriptedServer(answers=[WHOLE]) as server, client_of(server, transport) as client:
        answered = client.chat("Hi")
        await answered.text()
        with pytest.raises(RuntimeError, match="read once"):
            await answered.text()
