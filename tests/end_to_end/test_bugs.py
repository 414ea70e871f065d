"""A bug in a handler: an incident, the verdict and a line of the doctor's, for a minute, without a
word of the request.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import orjson
import pytest
from aiohttp import ClientSession, web
from aiohttp.test_utils import TestServer

from aioserver.monitoring.findings import FINDINGS
from aioserver.protocol import eventstream
from aioserver.server.app import make_app
from aioserver.tools.doctor.results import Result
from tests.support.doctor import examined as ask_doctor
from tests.support.server import NOWHERE, configured

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


SECRET = "S3CR3T"
BUG = "KeyError at end_to_end/test_bugs.py:"


async def broken(request: web.Request) -> web.Response:
    texts: dict[str, str] = {}
    return web.Response(text=texts[await request.text()])


@asynccontextmanager
async def embedded(path: Path) -> AsyncIterator[ClientSession]:
    """A program that embeds the server, and whose own handler has a bug."""
    app = make_app(configured(NOWHERE, {}, path / "config.yaml"))
    app.router.add_post("/broken", broken)
    async with TestServer(app) as server, ClientSession(str(server.make_url("/"))) as session:
        yield session


async def meet(session: ClientSession, times: int) -> None:
    async def once() -> None:
        async with session.post("/broken", data=SECRET) as response:
            assert response.status == 500
            assert SECRET not in await response.text()

    await asyncio.gather(*(once() for _ in range(times)))


async def events(response: Any) -> AsyncIterator[tuple[str, Any]]:
    """The events of `/events`; none of them may have a word of the request."""
    splitter = eventstream.Splitter()
    async for data in response.content.iter_any():
        assert SECRET.encode() not in data
        for event in eventstream.parse(splitter.feed(data)):
            yield event.event.decode(), orjson.loads(event.data)


async def examined(session: ClientSession) -> list[Result]:
    """What the doctor says of bugs."""
    async with session.get("/health") as response:
        url = str(response.url.origin())
    results = (await ask_doctor(url=url, ask=False)).results
    assert SECRET not in str(results)
    return [result for result in results if "bug" in result.text]


# Virtual seconds, of which a minute passes.
@pytest.mark.timeout(180)
@pytest.mark.virtual_time
async def test_requests_that_meet_a_bug_are_reported_everywhere_until_a_minute_has_passed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    incidents, verdicts, during = [], [], list[Result]()
    async with embedded(tmp_path) as session, session.get("/events") as response:
        assert await examined(session) == []
        await meet(session, 93)
        async for event, data in events(response):
            if event == "incident" and data["kind"] == "bug":
                incidents.append(data)
            elif event == "stats" and data["bugs"]["total"] == 93:
                verdicts.append(data["verdict"])
                if len(verdicts) == 1:
                    during = await examined(session)
                if data["bugs"]["last_minute"] == 0:
                    break
        after = await examined(session)
        async with session.get("/metrics") as metrics:
            text = await metrics.text()

    sentence = "93 requests met a bug of the server in the last minute"
    assert (verdicts[0]["level"], verdicts[0]["word"], verdicts[0]["text"]) == (
        *("error", "Bug"),
        sentence,
    )
    assert verdicts[0]["advice"] == FINDINGS["bug"].remedy
    # A burst is one incident; where a tick has cut it in two, they are two.
    assert len(incidents) <= 2
    assert sum(int(incident["text"].split()[0]) for incident in incidents) == 93
    for incident in incidents:
        assert incident["severity"] == "error"
        assert f": {BUG}" in incident["text"]
        assert incident["text"].endswith(" in broken")
    assert [(finding.level, finding.text, finding.hint) for finding in during] == [
        ("fail", f"Bug: {sentence}", FINDINGS["bug"].remedy)
    ]
    assert {verdict["word"] for verdict in verdicts[:59]} == {"Bug"}
    assert verdicts[-1]["word"] != "Bug"
    assert after == []
    assert "aioserver_errors_total 93.0" in text
    assert SECRET not in text
    lines = [record for record in caplog.records if record.name == "aioserver.monitoring"]
    assert [record.getMessage() for record in lines if record.levelno == logging.ERROR] == [
        incident["text"] for incident in incidents
    ]
    assert SECRET not in str([vars(line) for line in lines])
