"""`client.d.ts` against `client.js`: each name and each field stands in both."""

from __future__ import annotations

import re
from importlib.resources import files
from typing import TYPE_CHECKING

from tests.support.client_page import page_elsewhere, run

if TYPE_CHECKING:
    from playwright.async_api import Page

    from tests.support.server import RunningServer

FOLDER = files("aioserver.faces").joinpath("assets", "client")
MODULE = FOLDER.joinpath("client.js").read_text()
TYPES = re.sub(r"/\*\*.*?\*/|//.*", "", FOLDER.joinpath("client.d.ts").read_text())
MAX_LINES = 430


def members(name: str) -> set[str]:
    """The members of the class or interface *name* in the types, but its constructor."""
    body = re.search(
        rf"^export (?:interface|class) {name}\b.*?\{{\n(.*?)^\}}", TYPES, re.MULTILINE | re.DOTALL
    )
    assert body is not None, name
    names = re.findall(r"^  (?:readonly )?(\w+)\??[(:]", body[1], re.MULTILINE)
    return {*names} - {"constructor"}


def variants(name: str) -> dict[str, set[str]]:
    """The fields of each variant of the union type *name*, by what tells it from the others."""
    union = re.search(rf"^export type {name} =\n(.*?);\n\n", TYPES, re.MULTILINE | re.DOTALL)
    assert union is not None, name
    fields_by_type = {}
    for variant in re.findall(r"\{ (.*) \}", union[1]):
        fields = {*re.findall(r"(\w+)\??:", variant)}
        for value in re.findall(r'"(\w+)"', variant):
            fields_by_type[value] = fields
    return fields_by_type


def options_read(source: str) -> set[str]:
    """The options that *source* reads."""
    read = {*re.findall(r"\boptions\.(?!headers)(\w+)", source)}
    for pattern in re.findall(r"const \{(.*)\} = (?:this\.#)?options;", source):
        read |= {*re.findall(r"(?:^|,) ?(\w+)", pattern)}
    return read


def test_the_module_is_one_short_file_without_dependencies() -> None:
    assert len(MODULE.splitlines()) <= MAX_LINES
    assert not re.search(r"^import\b|\bimport\(", MODULE, re.MULTILINE)


def test_every_option_has_its_type_and_no_other() -> None:
    methods = re.findall(
        r"^  (?:async )?\*?#?\w+\([^\n]*\{\n.*?^  \}\n", MODULE, re.MULTILINE | re.DOTALL
    )
    chat = next(method for method in methods if method.startswith("  chat("))
    others = [method for method in methods if "#options" in method and method != chat]

    assert options_read(chat) - {"deadline"} == members("ChatOptions") - {"deadline"}
    assert "deadline = this.#options.deadline }" in chat
    assert options_read("".join(others)) | {"deadline"} == members("ClientOptions")


async def test_every_name_and_member_has_its_type_and_no_other(
    server: RunningServer, page: Page
) -> None:
    async with page_elsewhere(page, server.base):
        names, client, conversation, answer, error, events = await run(
            page,
            """
            const states = [], client = new aio.Client(a, { onstate: (state) => states.push(state) });
            const all = (object) => Object.getOwnPropertyNames(object);
            const answer = client.chat("Hello"), { events } = await read(answer);
            return [
              Object.keys(aio), [...all(client), ...all(aio.Client.prototype)], all(client.conversation()), all(answer),
              all(new aio.AnswerError({})), [...events, ...states],
            ];
            """,
            server.base,
        )

    exported = {*re.findall(r"^export (?:class|function) (\w+)", TYPES, re.MULTILINE)}
    assert {*names} == exported
    assert {*client} - {"constructor"} == members("Client")
    assert {*conversation} == members("Conversation")
    assert {*answer} == members("Answer")
    assert {*error} - {"stack", "message", "name"} == members("AnswerError")
    known = {**variants("Event"), **variants("State"), "complete": members("Complete")}
    assert len(events) > 5
    for event in events:
        assert {*event} <= known[event.get("type") or event["name"]], event
