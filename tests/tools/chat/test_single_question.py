"""`chat` in a pipe: one question, its answer on stdout, all else on stderr, and an exit code."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from typing import TYPE_CHECKING

import pytest
from aiohttp import web

from aioserver.tools.chat import command
from aioserver.tools.chat.asking import BadQuestion, Chat
from aioserver.tools.chat.command import MAX_BYTES
from tests.support.keys import key_of, keys_of
from tests.support.process import Process
from tests.support.server import ENDLESS
from tests.support.waiting import until

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.server import MakeServer, RunningServer
    from tests.support.telling_provider import TellingProvider

# The client is a process of its own, whatever the loop of the test.


async def run(*words: str, stdin: bytes = b"", **environ: str) -> tuple[int | None, str, str]:
    """Run `chat` to its end: exit code, stdout, stderr."""
    command = ("-m", "aioserver", "chat", *words)
    async with await Process.start(*command, stdin=stdin, environ=environ) as process:
        code = await process.ended()
    return code, process.out, process.log


async def test_stdout_has_the_answer_byte_for_byte_and_nothing_else(
    telling_server: RunningServer, provider: TellingProvider
) -> None:
    provider.reasoning = ["I think"]
    provider.pieces = ["# Grüße,\r\n", "\x1b[1m*you*", "\t\x07"]

    code, out, err = await run(telling_server.base, "Say", "hello")

    assert (code, err) == (0, "")
    assert out == "# Grüße,\r\n\x1b[1m*you*\t\x07\n"
    assert provider.questions == [[{"role": "user", "content": "Say hello"}]]


async def test_stdin_is_the_question_and_follows_the_text(
    telling_server: RunningServer, provider: TellingProvider
) -> None:
    await run(telling_server.base, stdin="﻿Größe?\n\nReally?\n".encode())
    await run(telling_server.base, "Sum up:", stdin=b"one\ntwo\n")

    assert [asked[-1]["content"] for asked in provider.questions] == [
        "Größe?\n\nReally?",
        "Sum up:\n\none\ntwo",
    ]


@pytest.mark.parametrize(
    ("stdin", "remark"),
    [
        (b" \n\n", "there is no question"),
        (b"a\xff", "stdin is not UTF-8 text: byte 1 is not"),
    ],
)
async def test_what_is_no_question_is_exit_2_and_one_line(stdin: bytes, remark: str) -> None:
    code, out, err = await run("127.0.0.1:1", stdin=stdin)

    assert (code, out) == (2, "")
    assert remark in err
    assert err.count("\n") == 1


def test_the_first_word_is_an_address_if_it_looks_like_one() -> None:
    for address in (
        "http://x",
        "HTTPS://x/y",
        "localhost",
        "localhost:8000",
        "chat.example.com:80/a",
        "[::1]:8000",
        "10.0.0.1:80",
    ):
        assert command.split([address, "a", "b"]) == (address, "a b")
    for text in ("Hello", "localhosts", "Why: 8", "http://x is down", "a:b", "x.y", "note:123456"):
        assert command.split([text, "b"]) == (None, f"{text} b")
    assert command.split([]) == (None, "")


def test_stdin_may_be_as_large_as_the_bound(tmp_path: Path) -> None:
    file = tmp_path / "question"
    file.write_bytes(b"x" * MAX_BYTES)
    with file.open("rb") as stdin:
        assert len(command.read(stdin)) == MAX_BYTES
    file.write_bytes(b"x" * MAX_BYTES + b"\n")
    with file.open("rb") as stdin, pytest.raises(BadQuestion):
        command.read(stdin)


def test_a_conversation_that_is_kept_here_is_sent_whole_however_long_it_is() -> None:
    turns = 3 * [{"role": role, "content": role[0] * 400_000} for role in ("user", "assistant")]
    chat = Chat(url="http://x", system="Be brief.", timeout=60.0, turns=turns)

    messages = chat.content("Hi")
    assert isinstance(messages, list)
    assert [len(message["content"]) for message in messages] == [9, *6 * [400_000], 2]


async def test_nothing_that_listens_is_one_line() -> None:
    code, out, err = await run("127.0.0.1:1", "Hello")

    assert (code, out) == (1, "")
    assert err == "aioserver: http://127.0.0.1:1 cannot be reached: Connection refused\n"


@pytest.mark.parametrize("body", ["<html>", '{"a": 1}'])
async def test_another_server_is_said_to_be_none_of_ours(body: str) -> None:
    async def page(_request: web.Request) -> web.Response:
        kind = "text/html" if body[0] == "<" else "application/json"
        return web.Response(text=body, content_type=kind)

    app = web.Application()
    app.router.add_get("/", page)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        base = f"http://127.0.0.1:{runner.addresses[0][1]}"

        code, out, err = await run(base, "Hello")
    finally:
        await runner.cleanup()

    assert (code, out) == (1, "")
    assert err == f"aioserver: {base} answers, but it is no aioserver\n"


async def test_a_key_is_asked_for_and_never_shown(make_server: MakeServer) -> None:
    server = await make_server(**keys_of("web"))

    without = await run(server.base, "Hello")
    wrong = await run(server.base, "Hello", "--key", "aio-secret")
    right = await run(server.base, "Hello", AIOSERVER_KEY=key_of("web"))

    remark = f"aioserver: {server.base} wants an API key: give it by --key or AIOSERVER_KEY\n"
    assert without == (2, "", remark)
    remark = f"aioserver: {server.base} does not know this key: see --key and AIOSERVER_KEY\n"
    assert wrong == (2, "", remark)
    assert right[0] == 0
    assert right[2] == ""


async def test_another_path_of_the_face_is_found(make_server: MakeServer) -> None:
    server = await make_server(**{"chat.websocket.endpoint": "/elsewhere"})

    code, out, _ = await run(server.base, "Hello")

    assert code == 0
    assert out


async def test_an_answer_that_breaks_off_is_exit_1_after_what_has_come(
    server: RunningServer,
) -> None:
    code, out, err = await run(server.base, "Hello", "--model", "fault-cut-3")

    assert code == 1
    assert out.strip()
    assert out.endswith("\n")
    assert err.startswith("aioserver: the answer broke off: ")
    assert "(provider_disconnected)" in err
    assert err.count("\n") == 1


async def test_a_refusal_is_exit_1_and_says_its_code(server: RunningServer) -> None:
    code, out, err = await run(server.base, "Hello", "--provider", "nobody")

    assert (code, out) == (1, "")
    assert "(model_not_found)" in err


async def test_an_argument_that_can_be_no_part_of_a_question_is_exit_2(
    server: RunningServer,
) -> None:
    code, out, err = await run(server.base, "Hello", "--model", "a\udcff")

    assert (code, out) == (2, "")
    assert err.startswith("aioserver: ")
    assert err.count("\n") == 1


async def test_bytes_of_an_argument_that_are_not_utf_8_are_replaced(
    telling_server: RunningServer, provider: TellingProvider
) -> None:
    await run(telling_server.base, "a\udcff")

    assert provider.questions[0][0]["content"] == "a\ufffd"


async def test_an_answer_in_time_or_not_at_all(server: RunningServer) -> None:
    server.simulator.behaviour = ENDLESS

    code, out, err = await run(server.base, "Hello", "--timeout", "1")

    assert code == 1
    assert "no whole answer within 1 s" in err
    assert out


async def test_a_cut_by_max_tokens_is_remarked_on_stderr(
    telling_server: RunningServer, provider: TellingProvider
) -> None:
    provider.finish_reason = "length"

    assert await run(telling_server.base, "Hi") == (
        0,
        "Hello\n",
        "aioserver: the answer was cut: it is as long as max_tokens allows\n",
    )


async def test_a_conversation_goes_on_by_its_id(
    telling_server: RunningServer, provider: TellingProvider
) -> None:
    for text in ("One", "Two"):
        await run(telling_server.base, text, "--conversation", "c1")
    await run(telling_server.base, "Three")

    assert [len(asked) for asked in provider.questions] == [1, 3, 1]
    assert [message["content"] for message in provider.questions[1]] == ["One", "Hello", "Two"]


async def test_a_system_prompt_goes_in_front_and_excludes_a_conversation(
    telling_server: RunningServer, provider: TellingProvider
) -> None:
    await run(telling_server.base, "Hi", "--system", "Be brief.", "--model", "m2")
    code, _, err = await run(telling_server.base, "Hi", "--system", "x", "--conversation", "c1")

    assert provider.questions == [
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    ]
    assert provider.models == ["m2"]
    assert code == 2
    assert "either --system or --conversation" in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
async def test_a_signal_ends_the_answer_and_then_the_process(
    server: RunningServer, number: signal.Signals
) -> None:
    server.simulator.behaviour = ENDLESS
    async with await Process.start("-m", "aioserver", "chat", server.base, "Hello") as process:
        await process.prints(re.compile("."))
        process.signal(number)

        assert await process.ended() == -number
        assert process.log == ""
    await server.nothing_held(2.0)


async def test_a_reader_that_leaves_ends_the_answer_without_a_word(server: RunningServer) -> None:
    server.simulator.behaviour = ENDLESS
    ours, theirs = os.pipe()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "aioserver", "chat", server.base, "Hello"),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=theirs,
        stderr=asyncio.subprocess.PIPE,
        # What could not be written is then still in a buffer at the end of the process.
        env={**os.environ, "PYTHONUNBUFFERED": ""},
    )
    os.close(theirs)
    await until(lambda: server.held()["running"] == 1, 30.0)
    os.close(ours)

    _, err = await process.communicate()

    assert (process.returncode, err) == (1, b"")
    await server.nothing_held(2.0)


async def test_a_closed_stdout_is_reported() -> None:
    process = await asyncio.create_subprocess_exec(
        *("sh", "-c", f"{sys.executable} -m aioserver chat Hello </dev/null >&-"),
        stderr=asyncio.subprocess.PIPE,
    )

    _, err = await process.communicate()

    assert process.returncode == 1
    assert err == b"aioserver: stdout is closed: there is no place for an answer\n"


async def test_an_encoding_that_lacks_a_letter_costs_that_letter(
    telling_server: RunningServer, provider: TellingProvider
) -> None:
    provider.pieces = ["Größe 中"]

    assert await run(telling_server.base, "Hi", PYTHONIOENCODING="ascii:strict") == (
        0,
        "Gr??e ?\n",
        "",
    )
