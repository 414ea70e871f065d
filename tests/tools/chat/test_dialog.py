"""`chat` in a real terminal: a pseudo-terminal that is the process's own, with signals from its
keys.
"""

from __future__ import annotations

import os
import signal
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.process import WITHOUT_RICH
from tests.support.server import CONCURRENCY, ENDLESS
from tests.support.terminal import CTRL_C, CTRL_D, terminal
from tests.support.waiting import ticks, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.support.server import MakeServer, RunningServer
    from tests.support.telling_provider import TellingProvider
    from tests.support.terminal import Terminal

COMMAND = ("-m", "aioserver", "chat")
MARKDOWN = "# Head\n\nSome **bold** and\n`code`.\n\n- one\n- two\n"

# The client is a process of its own, whatever the loop of the test.


@asynccontextmanager
async def dialog(base: str, *options: str, **environment: Any) -> AsyncIterator[Terminal]:
    """A terminal in front of which a person may ask *base*."""
    async with terminal(*COMMAND, base, *options, **environment) as shown:
        await shown.shows("> ")
        yield shown


async def test_a_dialog_goes_on_with_its_conversation_until_it_is_left(
    telling_server: RunningServer, provider: TellingProvider
) -> None:
    async with dialog(telling_server.base) as shown:
        # Commands ask the server nothing.
        shown.type("/help\n")
        await shown.shows("/new")
        shown.type("/nonsense \n")
        await shown.shows("There is no command /nonsense")
        await shown.shows("> ")
        shown.type("\n")
        await shown.shows("> ")
        for question in ("One", "Two", "/new", "Three", "/model m3", "Four"):
            shown.type(f"{question}\n")
            await shown.shows("> ")
        shown.type('"""a\n  b\n\nc"""\n')
        await shown.shows("Hello")
        await shown.shows("> ")
        shown.type("d\\\ne\n")
        await shown.shows("Hello")
        await shown.shows("> ")
        shown.type(CTRL_D)

        assert await shown.ended() == 0

    asked = [[message["content"] for message in messages] for messages in provider.questions]
    assert asked == [
        ["One"],
        ["One", "Hello", "Two"],
        ["Three"],
        ["Three", "Hello", "Four"],
        ["Three", "Hello", "Four", "Hello", "a\n  b\n\nc"],
        ["Three", "Hello", "Four", "Hello", "a\n  b\n\nc", "Hello", "d\ne"],
    ]
    assert provider.models[3] == "m3"


async def test_a_system_prompt_keeps_the_conversation_here(
    telling_server: RunningServer, provider: TellingProvider
) -> None:
    async with dialog(telling_server.base, "--system", "Be brief.") as shown:
        for question in ("One", "Two", "/new", "Three"):
            shown.type(f"{question}\n")
            await shown.shows("> ")

    asked = [[message["content"] for message in messages] for messages in provider.questions]
    assert asked == [
        ["Be brief.", "One"],
        ["Be brief.", "One", "Hello", "Two"],
        ["Be brief.", "Three"],
    ]


async def test_markdown_is_drawn_and_cannot_make_the_terminal_obey(
    telling_server: RunningServer, provider: TellingProvider
) -> None:
    provider.pieces = [*MARKDOWN]
    async with dialog(telling_server.base) as shown:
        shown.type("Hi\n")
        await shown.shows(" • two")
        await shown.shows("> ")

        assert "\x1b[1mbold\x1b[0m" in shown.seen
        assert "# Head" not in shown.text
        assert " • one\n • two\n\n> " in shown.text

        provider.pieces = [
            "a\x1b]0;title\x07",
            "<http://x/%1b%5b2J>",
            "&#13;&#155;",
            "\n\n**end**",
        ]
        provider.reasoning = ["\x1b[5mthinking"]
        shown.type("Hi\n")
        await shown.shows("end")
        await shown.shows("> ")

        for sequence in ("\x1b]0;", "\x07", "\x1b[2J", "\x1b[5m", "\x9b"):
            assert sequence not in shown.seen


@pytest.mark.parametrize(
    ("program", "environ"),
    [(COMMAND, {"TERM": "dumb"}), (("-c", WITHOUT_RICH, "chat"), {})],
    ids=["dumb terminal", "without rich"],
)
async def test_where_nothing_can_be_drawn_the_text_is_plain_and_harmless(
    telling_server: RunningServer,
    provider: TellingProvider,
    program: tuple[str, ...],
    environ: dict[str, str],
) -> None:
    provider.pieces = ["**bold**\x1b[31m\r", "\n\x9b2J"]
    async with terminal(*program, telling_server.base, environ=environ) as shown:
        await shown.shows("> ")
        # Where the reason is that rich is missing, the dialog says so once.
        assert shown.text.count("rich is not installed") == (program != COMMAND)
        shown.type("Hi\n")
        await shown.shows("**bold**�[31m\n�2J\n")
        assert "\x1b[31m" not in shown.seen


async def test_no_color_is_honoured(
    telling_server: RunningServer, provider: TellingProvider
) -> None:
    provider.pieces = ["```python\nx = 'a'\n```\n`c`"]
    provider.afterthought = "hm"
    async with dialog(telling_server.base, environ={"NO_COLOR": "1"}) as shown:
        shown.type("Hi\n")
        await shown.shows("x = 'a'")
        await shown.shows("> ")

        assert "\x1b[3" not in shown.seen
        assert "\x1b[9" not in shown.seen
        # What the model thinks later does not write over its text.
        assert "thinking" not in shown.text


async def test_text_is_wrapped_at_the_width_and_encoded_as_the_terminal_can(
    telling_server: RunningServer, provider: TellingProvider
) -> None:
    provider.pieces = ["Größe " * 8]
    environ = {"PYTHONIOENCODING": "ascii"}
    async with dialog(telling_server.base, columns=30, environ=environ) as shown:
        shown.type("Hi\n")
        await shown.shows("Gr??e Gr??e Gr??e Gr??e Gr??e\nGr??e Gr??e Gr??e\n")


async def test_ctrl_c_stops_the_answer_at_the_server_and_a_second_one_leaves(
    server: RunningServer,
) -> None:
    server.simulator.behaviour = ENDLESS
    async with dialog(server.base) as shown:
        shown.type("Hi\n")
        await until(lambda: server.held()["running"] == 1)
        shown.type(CTRL_C)
        await shown.shows("(stopped)")
        await server.nothing_held(2.0)
        await shown.shows("> ")
        shown.type(CTRL_C)

        assert await shown.ended() == 0
        assert "Traceback" not in shown.text


async def test_keys_pressed_meanwhile_are_not_shown_and_are_the_next_question(
    telling_server: RunningServer, provider: TellingProvider
) -> None:
    provider.go_on.clear()
    async with dialog(telling_server.base) as shown:
        shown.type("One\n")
        await shown.shows("Hello")
        shown.type("Two\n")
        # The terminal itself would have shown them at once.
        await ticks()
        assert "Two" not in shown.text
        provider.go_on.set()
        await shown.shows("> ")
        await until(lambda: len(provider.questions) == 2)
        await shown.shows("> ")
        shown.type("/quit\n")
        await shown.ended()

        assert shown.as_before


@pytest.mark.parametrize(
    "limits",
    [
        {"llm.providers.sim.http_client.concurrent_requests": 1},
        {f"{CONCURRENCY}.max_connections": 1, f"{CONCURRENCY}.queue_timeout": 30.0},
    ],
    ids=["provider", "server"],
)
async def test_the_position_in_the_queue_is_shown(
    make_server: MakeServer, limits: dict[str, float]
) -> None:
    server = await make_server(ENDLESS, **limits)
    async with dialog(server.base) as first, dialog(server.base) as second:
        first.type("Hi\n")
        await until(lambda: server.held()["running"] == 1)
        second.type("Hi\n")
        await second.shows("position 1 in the queue")
        first.type(CTRL_C)
        await second.shows("sim/sim-model has begun")
        second.type(CTRL_C)
        await second.shows("(stopped)")
        assert "position 1 in the queue" in second.text
    await server.nothing_held()


async def test_what_a_model_thinks_is_on_a_line_that_the_answer_replaces(
    telling_server: RunningServer, provider: TellingProvider
) -> None:
    provider.reasoning = ["I wonder, ", "and wonder"]
    async with dialog(telling_server.base) as shown:
        shown.type("Hi\n")
        await shown.shows("thinking: I wonder, and wonder")
        await shown.shows("Hello")
        assert "wonder\r\x1b[2KHello" in shown.seen


async def test_a_silence_in_the_middle_of_an_answer_is_reported(
    make_server: MakeServer, provider: TellingProvider
) -> None:
    """It takes more than 5 s: the client is a process with a clock of its own."""
    provider.go_on.clear()
    patient = {"llm.providers.sim.http_client.read_timeout": 60.0}
    server = await make_server(**{"llm.providers.sim.base_url": provider.base_url, **patient})
    async with dialog(server.base) as shown:
        shown.type("Hi\n")
        await shown.shows("Hello\nnothing has come for ")
        provider.go_on.set()
        await shown.shows("Hello\n\n> ")


async def test_an_error_is_one_line_and_the_dialog_goes_on(server: RunningServer) -> None:
    async with dialog(server.base) as shown:
        shown.type("/model fault-quota\n")
        await shown.shows("> ")
        shown.type("Hi\n")
        await shown.shows("aioserver: ")
        await shown.shows("(provider_auth_error)")
        await shown.shows("> ")
        shown.type("/model\nHi\n")
        await shown.shows("Hi")
        await shown.shows("> ")
        shown.type(CTRL_D)

        assert await shown.ended() == 0


async def test_a_closed_terminal_ends_the_answer(server: RunningServer) -> None:
    server.simulator.behaviour = ENDLESS
    async with dialog(server.base) as shown:
        shown.type("Hi\n")
        await until(lambda: server.held()["running"] == 1)
        shown.hang_up()

        assert await shown.ended(10.0) in {-signal.SIGHUP, 1}
        await server.nothing_held(2.0)


async def test_a_signal_leaves_the_terminal_as_it_was(server: RunningServer) -> None:
    server.simulator.behaviour = ENDLESS
    async with dialog(server.base) as shown:
        shown.type("Hi\n")
        await until(lambda: server.held()["running"] == 1)
        assert not shown.as_before
        shown.process.send_signal(signal.SIGTERM)

        assert await shown.ended(10.0) == -signal.SIGTERM
        assert shown.as_before
        assert "Traceback" not in shown.text
        await server.nothing_held(2.0)


async def test_a_signal_at_the_prompt_ends_it(server: RunningServer) -> None:
    async with dialog(server.base) as shown:
        shown.process.send_signal(signal.SIGTERM)

        assert await shown.ended(10.0) == -signal.SIGTERM
        assert "Traceback" not in shown.text


async def test_nobody_there_is_reported_before_the_first_question() -> None:
    async with terminal(*COMMAND, "127.0.0.1:1") as shown:
        assert await shown.ended() == 1
        await shown.shows("aioserver: http://127.0.0.1:1 cannot be reached: Connection refused")
        assert "> " not in shown.text


async def test_a_text_in_a_terminal_is_one_drawn_answer(
    telling_server: RunningServer, provider: TellingProvider
) -> None:
    provider.pieces = [MARKDOWN]
    async with terminal(*COMMAND, telling_server.base, "Say hello") as shown:
        assert await shown.ended() == 0
        await shown.shows(" • one\n • two\n")


async def test_stdin_of_a_pipe_in_a_terminal_is_one_question(
    telling_server: RunningServer, provider: TellingProvider
) -> None:
    ours, theirs = os.pipe()
    os.write(theirs, b"Hi\n")
    os.close(theirs)
    async with terminal(*COMMAND, telling_server.base, stdin=ours) as shown:
        os.close(ours)
        assert await shown.ended() == 0
        await shown.shows("Hello\n")
    assert provider.questions[0][0]["content"] == "Hi"


async def test_a_file_for_the_answer_makes_one_question_of_what_is_typed(
    telling_server: RunningServer, provider: TellingProvider
) -> None:
    ours, theirs = os.pipe()
    async with terminal(*COMMAND, telling_server.base, stdout=theirs) as shown:
        os.close(theirs)
        await shown.shows("type the question, and Ctrl-D at its end")
        shown.type(f"One\ntwo\n{CTRL_D}")
        assert await shown.ended() == 0
    with os.fdopen(ours, "rb") as answer:
        assert answer.read() == b"Hello\n"
    assert provider.questions[0][0]["content"] == "One\ntwo"
