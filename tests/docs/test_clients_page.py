"""docs/clients.md, and the frames of docs/faces.md, against the code: commands, fields, frames,
codes, close codes, and their rules.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import WSCloseCode

from aioserver import errors, provider_errors
from aioserver.errors import InvalidRequest
from aioserver.protocol import client_frames
from aioserver.protocol.client_frames import BadCommand, Chat
from aioserver.streams import entries
from tests.support.chat import chat, read_frames, resume, to_end, until_status
from tests.support.commands import parse
from tests.support.server import QUICK, SLOW, MakeServer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.server import RunningServer

ROOT = Path(__file__).parents[2]
PAGE = "".join((ROOT / f"docs/{name}.md").read_text() for name in ("faces", "clients"))
FACES = ROOT / "aioserver/faces"
# Of what they are named for on the page.
SAMPLES: dict[str, Any] = {
    "messages": [{"role": "user"}],
    "streaming": True,
    "start_within": 2.5,
    "deadline": 2.5,
    "class": "batch",
    "hold": "calls",
}
OBJECTS = ("options", "metadata")


def table(title: str, first: str) -> list[list[str]]:
    """The rows of the table below the heading *title* whose first column is *first*, without the
    head.
    """
    section = re.split(
        r"^## ", PAGE.partition(f"\n## {title}\n")[2], maxsplit=1, flags=re.MULTILINE
    )[0]
    lines = section.partition(f"| {first} |")[2].splitlines()[2:]
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line[1:-1].split(" | ")])
    assert rows, (title, first)
    return rows


def named(cell: str) -> list[str]:
    """The names in backticks in *cell*."""
    return re.findall(r"`([^`]+)`", cell)


def strings_passed(function: str) -> Iterator[str]:
    """Every status that the faces pass to *function* as its second argument."""
    for path in FACES.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and len(node.args) > 1:
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                status = node.args[1]
                if name == function and isinstance(status, ast.Constant):
                    yield str(status.value)


def question(payload: dict[str, object]) -> client_frames.Command:
    frame = {"action": "chat", "request_id": "r1", "payload": payload}
    return parse(json.dumps(frame).encode())


def test_every_command_has_its_row_and_no_other() -> None:
    with pytest.raises(BadCommand) as refused:
        parse(b'{"action": "none"}')

    known = re.search(r"one of ([\w, ]+) is expected", refused.value.error.message)
    assert known is not None
    assert sorted(row[0] for row in table("What you send", "action")) == sorted(
        f"`{action}`" for action in known[1].split(", ")
    )


def test_every_field_of_a_question_has_its_row_and_its_type() -> None:
    rows = {named(row[0])[0]: row[1] for row in table("What you send", "field")}

    assert sorted(rows) == sorted(client_frames.PAYLOAD_FIELDS)
    for name, kind in rows.items():
        sample = SAMPLES.get(name, {} if name in OBJECTS else "x")
        other = {} if name in ("text", "messages") else {"text": "x"}
        assert isinstance(question({name: sample, **other}), Chat)
        with pytest.raises(BadCommand) as refused:
            question({name: -1, **other})
        assert isinstance(refused.value.error, InvalidRequest)
        assert (
            kind.split()[0]
            == {str: "text", bool: "true", list: "list", dict: "object", float: "number"}[
                type(sample)
            ]
        )


def test_every_status_of_a_frame_has_its_row_and_no_other() -> None:
    rows = table("What you get", "status")
    events = {
        value.decode()
        for name, value in vars(entries).items()
        if name.isupper() and isinstance(value, bytes)
    }
    remarks = {*strings_passed("loose_frame"), *strings_passed("_send")}

    assert {named(row[0])[0] for row in rows} == events | remarks
    assert events.isdisjoint(remarks - {"error"})
    numbered = {named(row[0])[0] for row in rows if row[1].startswith("yes")}
    assert numbered == events


def test_every_type_of_a_chunk_has_its_row_and_no_other() -> None:
    source = (ROOT / "aioserver/protocol/openai.py").read_text()

    assert sorted(
        named(row[0])[0] for row in table("What you get", "`type` of a `chunk`")
    ) == sorted(set(re.findall(r'\{"type":"(\w+)"', source)))


def every_error(cls: type[errors.AioserverError]) -> Iterator[type[errors.AioserverError]]:
    for subclass in cls.__subclasses__():
        yield subclass
        yield from every_error(subclass)


ERRORS = [
    error
    for error in every_error(errors.AioserverError)
    if error is not provider_errors.ProviderFault
]


def test_every_error_code_has_one_row_that_says_what_to_do() -> None:
    codes = [code for row in table("What to do after an error", "code") for code in named(row[0])]

    assert sorted(codes) == sorted({error.code for error in ERRORS})


def test_what_can_help_later_is_not_in_a_row_of_what_cannot() -> None:
    retryable = {error.code for error in ERRORS if error.retryable}
    for first, *_ in (rows := table("What to do after an error", "code")):
        # The provider's refusal of a question shares its code with its faults.
        kinds = {code in retryable for code in named(first)}
        assert len(kinds) == 1, first

    advice = {code: row[1] for row in rows for code in named(row[0])}
    for code in retryable:
        assert re.search(r"ask|come back|decide", advice[code]), code


def test_every_close_code_has_its_row_and_no_other() -> None:
    rows = table("Close codes", "code")
    written = (FACES / "socket.py").read_text()
    sent = {int(WSCloseCode[name]) for name in re.findall(r"WSCloseCode\.([A-Z_]+)", written)}
    sent |= {error.close for error in ERRORS if error.close is not None}
    # A client's faulty frames close with the code of aiohttp's parser, a lost connection with
    # none.
    sent |= {1002, 1007, 1006}

    assert {int(row[0]) for row in rows} == sent
    for error in ERRORS:
        if error.close is not None:
            (row,) = (row for row in rows if row[0] == str(error.close))
            assert error.code in named(row[1]), error.code


CLIENT = (FACES / "assets/client/client.js").read_text()


def test_our_own_client_comes_back_after_the_codes_that_the_table_says() -> None:
    ends = re.search(r"FINAL_CODES = new Set\(\[([\d, ]+)\]\)", CLIENT)
    assert ends is not None
    never = {row[0] for row in table("Close codes", "code") if row[2].startswith("no")}

    assert never == set(ends[1].split(", "))


def test_our_own_client_and_page_ask_again_after_the_codes_that_the_table_says() -> None:
    lists = {
        name: {*re.findall(r'"(\w+)"', values)}
        for name, values in re.findall(
            r"^const (\w+) = (?:new Set\()?\[(.*)\]", CLIENT, re.MULTILINE
        )
    }
    page = (FACES / "assets/chat/errors.js").read_text()
    rows = {row[1]: named(row[0]) for row in table("What to do after an error", "code")}

    later = {code for do, codes in rows.items() if do.startswith("wait for") for code in codes}
    twice = {code for do, codes in rows.items() if "at most twice" in do for code in codes}

    assert lists["BUSY"] | lists["LATER"] == later
    assert lists["TWICE"] == twice
    # The page has words for each wait.
    assert later | twice <= {*re.findall(r'\["(\w+)", \{ waits: ', page)}


# The rules, on real sockets.


async def test_an_error_with_a_number_is_kept_and_shown_again(server: RunningServer) -> None:
    server.simulator.behaviour = dataclasses.replace(QUICK, fail_rate=1.0)
    async with server.connect() as ws:
        await ws.send_json(chat("r1"))
        error = (await to_end(ws))[-1]
        assert error["status"] == "error"
        assert error["event_id"] >= 1
        await server.forgive()
        server.simulator.behaviour = QUICK

        await ws.send_json(chat("r1"))
        again = (await to_end(ws))[-1]
        await ws.send_json(chat("r2"))
        other = (await to_end(ws))[-1]

    assert again == error
    assert other["status"] == "complete"


async def test_after_an_error_without_a_number_the_id_is_still_free(server: RunningServer) -> None:
    async with server.connect() as ws:
        await ws.send_json(chat("r1", model="sim/x", provider="nobody"))
        error = await ws.receive_json()
        assert error["status"] == "error"
        assert "event_id" not in error

        await ws.send_json(chat("r1"))
        frames = await to_end(ws)

    assert frames[-1]["status"] == "complete"


async def test_a_question_that_is_sent_twice_is_answered_from_its_start_and_asked_once(
    server: RunningServer,
) -> None:
    async with server.connect() as ws:
        await ws.send_json(chat("r1"))
        await until_status(ws, "chunk")
    async with server.connect() as ws:
        await ws.send_json(chat("r1"))
        frames = [frame for frame in await to_end(ws) if "event_id" in frame]

    assert [frame["event_id"] for frame in frames] == [*range(1, len(frames) + 1)]
    assert frames[-1]["status"] == "complete"
    assert server.simulator.stats().requests == 1


async def test_a_resume_gets_exactly_what_is_behind_its_number_on_each_face(
    server: RunningServer,
) -> None:
    body = {"request_id": "r1", "text": "Hello"}
    async with server.session.post(server.sse, json=body) as response:
        first = await read_frames(response)
    rest = first[3:]

    async with server.connect() as ws:
        await ws.send_json(resume("r1", 3))
        assert await to_end(ws) == rest
    seen = {"Last-Event-ID": "3"}
    async with server.session.get(f"{server.sse}/r1", headers=seen) as response:
        assert await read_frames(response) == rest
    async with server.session.post(server.sse, json=body, headers=seen) as response:
        assert await read_frames(response) == rest
    async with server.session.get(f"{server.sse}/r1?last_event_id={len(first)}") as response:
        assert response.status == 204


async def test_a_page_of_another_host_is_refused_as_the_page_says(make_server: MakeServer) -> None:
    server = await make_server(
        SLOW, **{"chat.websocket.allow_origins": ["https://chat.example.com"]}
    )
    for origin, allowed in (
        ("https://chat.example.com", True),
        (server.base, True),
        ("https://evil.example", False),
    ):
        headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        async with server.session.options(server.sse, headers=headers) as response:
            assert (response.headers.get("Access-Control-Allow-Origin") == origin) == allowed
        handshake = {
            "Upgrade": "websocket",
            "Connection": "Upgrade",
            "Sec-WebSocket-Version": "13",
            "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
            "Origin": origin,
        }
        async with server.session.get(
            server.ws.replace("ws", "http", 1), headers=handshake
        ) as response:
            assert response.status == (101 if allowed else 403)
