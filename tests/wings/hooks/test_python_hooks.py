"""Hooks that are classes in Python, and run in the event loop of the server."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

import pytest

from aioserver.config import Configuration
from aioserver.config.faults import ConfigurationError
from aioserver.hook import Call, Refuse
from aioserver.server.wings import WINGS, faults
from aioserver.wings.hooks.python_hook import MAX_STEP
from tests.support.configurations import small
from tests.support.faces import ask_every_face, over_openai, over_websocket
from tests.support.server import ENDLESS, QUICK

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.server import MakeServer

CALLS: list[Call] = []
EVENTS: list[tuple[Call, bytes]] = []
MADE: list[object] = []


class Watching:
    """Sees all, and does what the text of a request asks for."""

    def __init__(self) -> None:
        MADE.append(self)

    async def request(self, call: Call) -> Any:
        CALLS.append(call)
        if call.model == "refused":
            return Refuse("not you", status=429, retry_after=3)
        if call.model == "changed":
            return call.body.replace(b"Hello", b"Other words")
        if call.model == "late":
            await asyncio.sleep(1e6)
        if call.model == "broken":
            raise ValueError("a word of the chat")
        if call.model == "odd":
            return 5
        if call.model == "caught":
            try:
                async with asyncio.timeout(0.01):
                    await asyncio.sleep(1e6)
            except TimeoutError:
                return None
        return None

    def event(self, call: Call, data: bytes) -> Any:
        EVENTS.append((call, data))
        if call.model == "cut" and len(EVENTS) > 4:
            return Refuse("enough")
        if call.model == "breaks":
            raise ValueError("a word of the chat")
        return None


class Slow:
    """Stops everybody."""

    async def request(self, call: Call) -> None:
        loop, now = asyncio.get_running_loop(), call.id
        assert loop.is_running()
        total = 0
        for number in range(400_000):
            total += number
        assert total, now


class NotAsync:
    """Has no event, and a `request` that nobody can wait for."""

    def request(self, _call: Call) -> None:
        return None


class Unmade(Watching):
    """Cannot be made."""

    def __init__(self) -> None:
        raise ValueError("no")


def entry(name: str = "Watching", **more: Any) -> dict[str, Any]:
    return {"name": "mine", "python": f"{__name__}:{name}", "timeout": 30.0, **more}


@pytest.fixture(autouse=True)
def nothing_seen() -> None:
    for seen in (CALLS, EVENTS, MADE):
        seen.clear()


async def test_a_class_sees_requests_and_answers(make_server: MakeServer) -> None:
    server = await make_server(QUICK, hooks=[entry(on=["request", "answer"])])

    seen = await ask_every_face(server, "m")

    assert {answer.end for answer in seen} == {"complete"}
    assert sorted(call.path for call in CALLS) == [
        *("/sse/chat", "/v1/chat/completions", "/v1/chat/completions", "/ws/chat")
    ]
    assert all(call.hook == "mine" and b"Hello" in call.body for call in CALLS)
    assert {call.stream for call, _ in EVENTS} == {True, False}
    assert {call.provider for call, _ in EVENTS} == {"sim"}
    assert all(not call.body for call, _ in EVENTS)
    assert len(MADE) == 1
    assert await server.change(hooks=[entry(on=["request"])])
    assert len(MADE) == 2


async def test_what_a_class_returns(
    make_server: MakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    server = await make_server(QUICK, hooks=[entry()])
    unavailable = (503, "hook_unavailable")
    for model, expected in {
        "refused": (429, "request_refused"),
        "broken": unavailable,
        "odd": unavailable,
        "caught": (200, None),
        "changed": (200, None),
        "late": unavailable,
    }.items():
        if model == "late":
            assert await server.change(hooks=[entry(timeout=0.05)])
        for stream in (True, False):
            seen = await over_openai(server, model, stream=stream)
            assert (seen.status, seen.code) == expected, model
        assert (await over_websocket(server, model)).code == expected[1], model

    assert "a word of the chat" not in caplog.text
    assert not any("a word of the chat" in str(vars(record)) for record in caplog.records)
    await server.nothing_held()


async def test_a_class_ends_an_answer(make_server: MakeServer) -> None:
    server = await make_server(ENDLESS, hooks=[entry(on=["answer"])])

    cut = await over_openai(server, "cut")
    broken = await over_websocket(server, "breaks")

    assert (cut.code, cut.error["message"]) == ("answer_refused", "enough")
    assert broken.code == "hook_unavailable"
    await server.nothing_held()


async def test_a_class_that_stops_everybody_is_warned_of_once(
    make_server: MakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "aioserver.hooks")
    server = await make_server(QUICK, hooks=[entry("Slow")])

    for _ in range(3):
        assert (await over_openai(server, "m")).end == "complete"

    lines = [record for record in caplog.records if "stops everybody" in record.message]
    assert len(lines) == 1
    assert vars(lines[0])["fields"]["ms"] > 1000 * MAX_STEP


@pytest.mark.parametrize(
    ("python", "on", "fault"),
    [
        ("no_such_module_at_all:Hook", ["request"], "cannot be imported: ModuleNotFoundError"),
        (f"{__name__}:Nobody", ["request"], "has no class Nobody"),
        (f"{__name__}:entry", ["request"], "has no class entry"),
        (f"{__name__}:NotAsync", ["answer"], "has no method `event`"),
    ],
)
def test_a_class_that_cannot_be_asked_is_a_fault_of_the_configuration(
    tmp_path: Path, python: str, on: list[str], fault: str
) -> None:
    path = tmp_path / "config.yaml"
    hooks = f"\nhooks: [{{name: mine, python: '{python}', on: {on}}}]\n"
    path.write_text(small() + hooks)
    settings = Configuration.load(path, environ={}).settings

    (found,) = faults(settings, (wing() for wing in WINGS))

    assert found.startswith("hooks[0].python: ")
    assert fault in found


async def test_a_request_that_nobody_can_wait_for_is_no_decision(make_server: MakeServer) -> None:
    server = await make_server(QUICK, hooks=[entry("NotAsync")])

    assert (await over_openai(server, "m")).code == "hook_unavailable"


async def test_a_class_that_cannot_be_made_changes_nothing(make_server: MakeServer) -> None:
    server = await make_server(QUICK)

    assert not await server.change(hooks=[entry("Unmade")])
    with pytest.raises(ConfigurationError, match="cannot be made"):
        await make_server(QUICK, hooks=[entry("Unmade")])
    assert (await over_openai(server, "m")).end == "complete"
