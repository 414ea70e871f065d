"""`/client.js` in a page of another origin: what is asked, what comes, and how a caller leaves."""

from __future__ import annotations

import asyncio
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.chat_page import ManualProvider, model_answer
from tests.support.client_page import page_elsewhere, run, unwatched
from tests.support.keys import key_of, keys_of
from tests.support.server import HTTP_CLIENT, SIM_HTTP_CLIENT
from tests.support.simulator import Behaviour
from tests.support.waiting import patience, until

if TYPE_CHECKING:
    from pathlib import Path

    from playwright.async_api import Page

    from tests.support.server import MakeServer, RunningServer

STALLED = Behaviour(ttft=0, interval=0, stall_after=5)
TRANSPORTS = pytest.mark.parametrize("transport", ["websocket", "sse"])


@TRANSPORTS
async def test_an_answer_is_read_as_pieces_as_a_text_and_as_events(
    server: RunningServer, page: Page, transport: str
) -> None:
    async with page_elsewhere(page, server.base):
        pieces, text, outcome, complete = await run(
            page,
            """
            const client = new aio.Client(a, { transport: b });
            const pieces = [];
            for await (const piece of client.chat("Hello")) pieces.push(piece);
            const text = await client.chat("Hello").text();
            const answer = client.chat("Hello");
            const outcome = await read(answer);
            return [pieces, text, outcome, answer.complete];
            """,
            server.base,
            transport,
        )
    whole = await model_answer(server, "Hello")

    assert len(pieces) > 1
    assert "".join(pieces) == text == outcome["text"] == whole
    sent, processing, *_, last = outcome["events"]
    assert sent == {"type": "sent"}
    assert (processing["type"], processing["provider"]) == ("processing", "sim")
    assert last == complete
    assert (last["type"], last["finishReason"]) == ("complete", "stop")
    assert last["usage"]["completion_tokens"] > 1
    assert outcome["numbers"] == [*range(1, len(outcome["numbers"]) + 1)]


async def test_where_there_is_no_websocket_it_uses_sse(server: RunningServer, page: Page) -> None:
    # As in Node.js 20, which has no `Array.fromAsync` either.
    await page.add_init_script("delete globalThis.WebSocket; delete Array.fromAsync")
    async with page_elsewhere(page, server.base):
        text, refused = await run(
            page,
            """
            let refused;
            try { new aio.Client(a, { transport: "websocket" }); } catch (error) { refused = `${error}`; }
            return [await new aio.Client(a).chat("Hello").text(), refused];
            """,
            server.base,
        )

    assert text == await model_answer(server, "Hello")
    assert refused == "TypeError: there is no WebSocket here: Node.js 22 has one"


async def in_node(server: RunningServer, folder: Path, program: str) -> str:
    """What a *program* with the `Client` of *server* prints until it ends."""
    if (node := shutil.which("node")) is None:
        pytest.skip("Node.js is not installed")
    async with server.session.get(f"{server.base}/client.js") as response:
        (folder / "client.mjs").write_bytes(await response.read())
    (folder / "program.mjs").write_text(f'import {{ Client }} from "./client.mjs";\n{program}')
    process = await asyncio.create_subprocess_exec(
        node, folder / "program.mjs", stdout=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(patience(60)):
            out, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return out.decode()


# Over server-sent events a program ends by itself.
@pytest.mark.parametrize(("transport", "end"), [("", "client.close();"), ("sse", "")])
async def test_it_works_in_node(
    server: RunningServer, tmp_path: Path, transport: str, end: str
) -> None:
    printed = await in_node(
        server,
        tmp_path,
        f"""
        const client = new Client("{server.base}", {{ transport: "{transport}" || undefined }});
        console.log(await client.chat("Hello").text());
        {end}
        """,
    )

    assert printed == await model_answer(server, "Hello") + "\n"


async def test_what_the_function_for_the_key_throws_is_said(
    server: RunningServer, tmp_path: Path
) -> None:
    printed = await in_node(
        server,
        tmp_path,
        f"""
        const states = [];
        const key = async () => {{ throw new Error("nobody has logged in"); }};
        const options = {{ transport: "sse", key, deadline: 0.3, onstate: (state) => states.push(state) }};
        const client = new Client("{server.base}", options);
        const error = await client.chat("Hello").text().catch((error) => error);
        const faults = states.filter(({{ name }}) => name === "lost").map(({{ fault }}) => fault.error);
        console.log(error.code, error.message.split(": ")[1], ...new Set(faults));
        client.close();
        """,
    )

    assert printed == "deadline_exceeded nobody has logged in nobody has logged in\n"


@TRANSPORTS
async def test_terms_of_a_question_are_sent(
    make_server: MakeServer, page: Page, caplog: pytest.LogCaptureFixture, transport: str
) -> None:
    caplog.set_level("INFO", logger="aioserver.requests")
    server = await make_server(STALLED, **{f"{SIM_HTTP_CLIENT}.concurrent_requests": 1})
    # The cancel of what has ended by its deadline is refused, and Chromium reports that.
    async with unwatched(page) as own, page_elsewhere(own, server.base):
        codes = await run(
            own,
            """
            const client = new aio.Client(a, { transport: b });
            const running = client.chat("Hello", { batch: true });
            for await (const piece of running) {
              const outcomes = [];
              for (const terms of [{ startWithin: 0.05 }, { deadline: 0.05 }]) {
                outcomes.push((await read(client.chat("Hello", terms))).error.code);
              }
              running.cancel();
              return outcomes;
            }
            """,
            server.base,
            transport,
        )
        await until(
            lambda: any(
                getattr(record, "fields", {}).get("class") == "batch" for record in caplog.records
            )
        )

    assert codes == ["deadline_exceeded", "deadline_exceeded"]
    assert server.simulator.stats().requests == 1


async def test_what_else_a_question_says_is_sent(server: RunningServer, page: Page) -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    async with page_elsewhere(page, server.base):
        await run(
            page,
            """
            const client = new aio.Client(a);
            const options = {
              options: { temperature: 0.5 }, tools: [b], provider: "sim", model: "sim-model", metadata: {},
            };
            await client.chat([{ role: "user", content: "Hello" }], options).text();
            """,
            server.base,
            tool,
        )

    body = server.simulator.bodies[-1]
    assert body["messages"] == [{"role": "user", "content": "Hello"}]
    assert (body["temperature"], body["tools"], body["model"]) == (0.5, [tool], "sim-model")


@TRANSPORTS
async def test_a_refusal_of_the_provider_says_why(
    server: RunningServer, page: Page, transport: str
) -> None:
    async with page_elsewhere(page, server.base):
        outcome = await run(
            page,
            "return await read(new aio.Client(a, { transport: b }).chat('Hello', { model: 'fault-status-422' }))",
            server.base,
            transport,
        )

    error = outcome["error"]
    assert (error["code"], error["retryable"]) == ("provider_error", False)
    assert error["message"] == "sim answered 422: The simulator says 422."


@TRANSPORTS
async def test_the_same_question_under_the_same_id_is_the_same_answer(
    server: RunningServer, page: Page, transport: str
) -> None:
    async with page_elsewhere(page, server.base):
        texts = await run(
            page,
            """
            const texts = [];
            for (const id of ["x", "x", "\u00fc".repeat(256), "\u00fc".repeat(256)])
              texts.push(await new aio.Client(a, { transport: b }).chat("Hello", { requestId: id }).text());
            return texts;
            """,
            server.base,
            transport,
        )

    assert len({*texts}) == 1
    assert server.simulator.stats().requests == 2


async def test_only_the_questions_of_a_conversation_follow_each_other(
    server: RunningServer, page: Page
) -> None:
    async with page_elsewhere(page, server.base):
        await run(
            page,
            """
            const client = new aio.Client(a);
            const conversation = client.conversation();
            await conversation.chat("apples").text();
            await client.chat("pears").text();
            await client.conversation(conversation.id).chat("more").text();
            """,
            server.base,
        )

    asked = [
        [message["content"] for message in body["messages"] if message["role"] == "user"]
        for body in server.simulator.bodies
    ]
    assert asked == [["apples"], ["pears"], ["apples", "more"]]


@pytest.mark.parametrize("key", [None, key_of("web")])
async def test_what_the_server_keeps_of_conversations_is_listed_read_and_deleted(
    make_server: MakeServer, page: Page, key: str | None
) -> None:
    server = await make_server(**(keys_of("web") if key else {}))
    async with unwatched(page) as mine, page_elsewhere(mine, server.base):
        before, turns, after, code = await run(
            mine,
            """
            const client = new aio.Client(a, b ? { key: b } : {}), conversation = client.conversation("c/1");
            await conversation.chat("apples").text();
            await client.conversation("c2").chat("pears").text();
            const before = await client.conversations({ limit: 10 });
            const turns = await client.turns("c/1");
            await client.deleteConversation("c/1");
            const code = await client.turns("c/1").catch((error) => error.code);
            return [before, turns, await client.conversations(), code];
            """,
            server.base,
            key,
        )

    assert [conversation["id"] for conversation in before["conversations"]] == ["c2", "c/1"]
    assert [message["role"] for message in turns["messages"]] == ["user", "assistant"]
    assert turns["messages"][0]["text"] == "apples"
    assert [conversation["id"] for conversation in after["conversations"]] == ["c2"]
    assert code == "conversation_not_found"


async def test_reasoning_and_tool_calls_come_as_events(
    make_server: MakeServer, page: Page
) -> None:
    async with ManualProvider() as provider:
        server = await make_server(**provider.changes)
        delta = {"index": 0, "function": {"name": "f", "arguments": "{}"}}
        provider.delta(reasoning_content="Let me think.")
        provider.delta(tool_calls=[delta])
        provider.say("Done.")
        provider.finish("tool_calls")
        async with page_elsewhere(page, server.base):
            outcome = await run(
                page, "return await read(new aio.Client(a).chat('Hello'))", server.base
            )

    shown = [event for event in outcome["events"] if event["type"] in ("reasoning", "toolCalls")]
    assert shown == [
        {"type": "reasoning", "number": 2, "text": "Let me think."},
        {"type": "toolCalls", "number": 3, "deltas": [delta]},
    ]
    assert outcome["events"][-1]["finishReason"] == "tool_calls"


async def test_nothing_is_sent_before_an_answer_is_read(server: RunningServer, page: Page) -> None:
    async with page_elsewhere(page, server.base):
        await run(
            page, "new aio.Client(a).chat('Hello'); await fetch(`${a}/health`);", server.base
        )

        assert not server.context.sockets
        assert server.simulator.stats().requests == 0


async def test_an_answer_is_read_once(server: RunningServer, page: Page) -> None:
    async with page_elsewhere(page, server.base):
        name = await run(
            page,
            """
            const answer = new aio.Client(a).chat("Hello");
            await answer.text();
            return await answer.text().catch((error) => error.name);
            """,
            server.base,
        )

    assert name == "TypeError"
    assert server.simulator.stats().requests == 1


async def test_many_answers_share_one_socket(make_server: MakeServer, page: Page) -> None:
    server = await make_server(STALLED)
    async with page_elsewhere(page, server.base):
        await run(
            page,
            """
            window.client = new aio.Client(a);
            window.outcomes = Promise.all(Array.from({ length: 10 }, () => read(client.chat("Hello"))));
            """,
            server.base,
        )
        await server.simulator.until(lambda stats: stats.requests == 10)
        assert len(server.context.sockets) == 1
        outcomes = await run(page, "client.close(); return await outcomes;")

        await server.simulator.until(lambda stats: stats.aborted == 10)
    assert {outcome["error"]["code"] for outcome in outcomes} == {"cancelled"}


# Ways to leave an answer after its first piece, and what its reader then gets.
LEAVING: dict[str, tuple[str, Any]] = {
    "break": ("for await (const piece of answer) break;", None),
    "throw": ("for await (const piece of answer) throw new Error('mine');", "mine"),
    "cancel": ("for await (const piece of answer) answer.cancel();", None),
    "abort": ("for await (const piece of answer) abort.abort(new Error('enough'));", "enough"),
    "close": ("for await (const piece of answer) client.close();", "the client was closed"),
}


@TRANSPORTS
async def test_whoever_leaves_an_answer_cancels_it(
    make_server: MakeServer, page: Page, transport: str
) -> None:
    server = await make_server(STALLED)
    async with page_elsewhere(page, server.base):
        for number, (way, (leave, message)) in enumerate(LEAVING.items(), 1):
            error = await run(
                page,
                f"""
                const client = new aio.Client(a, {{ transport: b }}), abort = new AbortController();
                const answer = client.chat("Hello", {{ signal: abort.signal }});
                try {{ {leave} }} catch (error) {{ return error.message; }}
                return null;
                """,
                server.base,
                transport,
            )

            assert error == message, way
            await server.simulator.until(lambda stats, number=number: stats.aborted == number)  # type: ignore[misc]


async def test_an_answer_that_was_left_before_it_was_read_asks_nothing(
    server: RunningServer, page: Page
) -> None:
    async with page_elsewhere(page, server.base):
        outcomes = await run(
            page,
            """
            const client = new aio.Client(a), cancelled = client.chat("Hello");
            cancelled.cancel();
            const aborted = client.chat("Hello", { signal: AbortSignal.abort(new Error("before")) });
            return [await read(cancelled), await read(aborted)];
            """,
            server.base,
        )

    assert [outcome["events"] for outcome in outcomes] == [[], []]
    assert outcomes[0]["error"] is None
    assert outcomes[1]["error"]["message"] == "before"
    assert server.simulator.stats().requests == 0


@TRANSPORTS
async def test_a_deadline_ends_an_answer_with_what_has_come(
    make_server: MakeServer, page: Page, transport: str
) -> None:
    server = await make_server(STALLED)
    async with page_elsewhere(page, server.base):
        outcome = await run(
            page,
            "return await read(new aio.Client(a, { transport: b }).chat('Hello', { deadline: "
            "1 }))",
            server.base,
            transport,
        )

        await server.simulator.until(lambda stats: stats.aborted == 1)
    error = outcome["error"]
    assert (error["name"], error["code"]) == ("AnswerError", "deadline_exceeded")
    assert error["text"] == outcome["text"] != ""


async def test_a_fault_of_a_provider_is_one_error_and_asked_once(
    make_server: MakeServer, page: Page
) -> None:
    server = await make_server(Behaviour(ttft=0, interval=0, cut_after=5))
    async with page_elsewhere(page, server.base):
        outcome = await run(
            page, "return await read(new aio.Client(a).chat('Hello'))", server.base
        )

    error = outcome["error"]
    assert (error["code"], error["retryable"]) == ("provider_disconnected", False)
    assert error["text"] == outcome["text"] != ""
    assert server.simulator.stats().requests == 1


async def test_a_provider_that_cannot_be_reached_is_asked_three_times(
    make_server: MakeServer, page: Page
) -> None:
    gone = {"base_url": "http://127.0.0.1:9/v1", "model": "gone", "http_client": {**HTTP_CLIENT}}
    server = await make_server(**{"llm.providers.gone": gone})
    await page.clock.install()
    async with page_elsewhere(page, server.base):
        await run(
            page,
            """
            window.waits = 0;
            const each = (event) => { waits += event.type === "waiting"; };
            window.outcome = read(new aio.Client(a).chat("Hello", { provider: "gone" }), each);
            """,
            server.base,
        )
        for waits in (1, 2):
            await page.wait_for_function(f"waits === {waits}")
            await page.clock.fast_forward(10_000)  # milliseconds
        outcome = await run(page, "return await outcome")

    assert outcome["error"]["code"] in {"connect_error", "circuit_open"}
    waiting = [event for event in outcome["events"] if event["type"] == "waiting"]
    assert [event["code"] for event in waiting] == ["connect_error"] * 2
    assert all(event["seconds"] >= 1 for event in waiting)


async def test_what_is_no_question_is_refused_at_once(server: RunningServer, page: Page) -> None:
    async with page_elsewhere(page, server.base):
        names = await run(
            page,
            """
            const name = (make) => { try { make(); } catch (error) { return error.name; } };
            const client = new aio.Client(a);
            return [() => client.chat(), () => client.chat({ text: "x" }), () => new aio.Client(a, { key: "a b" }),
              () => new aio.Client("http://[")].map(name);
            """,
            server.base,
        )

    assert names == ["TypeError"] * 4
