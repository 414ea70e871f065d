"""The machine's clock jumps by an hour, either way, under a running server: nobody notices.

`tests/test_clocks.py` finds any look at that clock in the source; this is the same for a whole
process.
"""

from __future__ import annotations

import mmap
import struct
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

import aiohttp

from tests.support.chat import CHAT, cancel, chat, resume
from tests.support.keys import COOKIE, bearer, cookie, entry, key_of
from tests.support.process import serving
from tests.support.raw import Raw
from tests.support.server import QUICK, SIM_HTTP_CLIENT, UVICORN, provider_entry
from tests.support.simulator import Behaviour, Simulator

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.process import ServerProcess

HOUR = 3600.0
# Python runs a module of this name at its start; the file has the seconds to add to the time of
# day.
SHIFTED = """
import mmap, struct, time
with open({file!r}, "r+b") as file:
    shift = mmap.mmap(file.fileno(), 8)
time_of_day, nanoseconds = time.time, time.time_ns
time.time = lambda: time_of_day() + struct.unpack("d", shift)[0]
time.time_ns = lambda: nanoseconds() + int(struct.unpack("d", shift)[0]) * 10**9
"""


class Clock:
    """The time of day of a process, which can be moved."""

    def __init__(self, folder: Path) -> None:
        file = folder / "shift"
        file.write_bytes(bytes(8))
        (folder / "sitecustomize.py").write_text(SHIFTED.format(file=str(file)))
        self.environ = {"PYTHONPATH": str(folder)}
        with file.open("r+b") as opened:
            self._shift = mmap.mmap(opened.fileno(), 8)

    def move(self, seconds: float) -> None:
        """Let it be *seconds* later than it is; earlier if negative."""
        self._shift[:] = struct.pack("d", seconds)


async def next_event(ws: Raw, request_id: str) -> dict[str, Any]:
    """The next frame of *request_id*."""
    while (frame := await ws.json_frame())["request_id"] != request_id:
        pass
    event: dict[str, Any] = frame
    return event


async def date(raw: Raw) -> float:
    """The time that the server says it is, over a connection that it has kept."""
    await raw.get("/health")
    return parsedate_to_datetime((await raw.answer()).headers["date"]).timestamp()


async def ask(process: ServerProcess, model: str, name: str) -> tuple[int, str]:
    """Status and code of a question."""
    async with (
        aiohttp.ClientSession(headers=bearer(name)) as session,
        session.post(
            f"{process.base}/v1/chat/completions", json={**CHAT, "model": model}
        ) as answer,
    ):
        body = await answer.json()
        return answer.status, body.get("error", {}).get("code", "")


async def test_no_limit_timeout_or_window_follows_the_time_of_day(tmp_path: Path) -> None:
    clock = Clock(tmp_path)
    key = f"Authorization: Bearer {key_of('web')}"
    async with (
        Simulator(Behaviour(ttft=0, interval=0.005, tokens=10_000)) as simulator,
        Simulator(QUICK) as other,
        serving(
            tmp_path / "c.yaml",
            simulator.base_url,
            changes={
                "auth.keys": [entry("web"), entry("few", requests_per_minute=2)],
                f"{SIM_HTTP_CLIENT}.concurrent_requests": 1,
                f"{SIM_HTTP_CLIENT}.queue_timeout": 60.0,
                f"{UVICORN}.keepalive_timeout": 60,
                "llm.providers.long": provider_entry(simulator.base_url),
                "llm.providers.other": provider_entry(other.base_url),
                "chat.websocket.shutdown_timeout": 0.2,
            },
            environ=clock.environ,
        ) as process,
        Raw(await process.ready()) as ws,
        Raw(process) as kept,
        aiohttp.ClientSession() as session,
    ):
        # An answer runs, a request waits behind it, and an answer has lost its reader.
        await ws.upgrade(key)
        await ws.send_json(chat("runs"))
        assert (await next_event(ws, "runs"))["status"] == "processing"
        await ws.send_json(chat("waits"))
        assert (await next_event(ws, "waits"))["status"] == "queued"
        async with Raw(process) as leaver:
            await leaver.upgrade(key)
            await leaver.send_json(chat("detached", provider="long"))
            while (await next_event(leaver, "detached"))["status"] != "chunk":
                pass
        # A key has used its minute, a provider wants a rest, and somebody has logged in.
        assert [(await ask(process, "other/m", "few"))[0] for _ in range(2)] == [200, 200]
        limited = (429, "rate_limit_exceeded")
        assert await ask(process, "other/m", "few") == limited
        resting = (429, "provider_rate_limited")
        assert await ask(process, "other/fault-retry-after-60", "web") == resting
        async with session.post(f"{process.base}/session", json={"key": key_of("web")}) as answer:
            logged_in = cookie(answer.cookies[COOKIE].value)
        asked = other.stats().requests
        before = await date(kept)

        seen = (await next_event(ws, "runs"))["event_id"]
        for jump in (HOUR, -HOUR):
            clock.move(jump)

            assert abs(await date(kept) - before - jump) < 600, "the time of day has jumped"
            numbers = [(await next_event(ws, "runs"))["event_id"] for _ in range(30)]
            assert numbers == [*range(seen + 1, seen + 31)]
            seen += 30
            assert await ask(process, "other/m", "few") == limited
            assert await ask(process, "other/m", "web") == resting
            async with session.get(f"{process.base}/v1/models", headers=logged_in) as answer:
                assert answer.status == 200

        assert other.stats().requests == asked
        await ws.send_json(resume("detached", 0))
        numbers = [(await next_event(ws, "detached"))["event_id"] for _ in range(30)]
        assert numbers == [*range(1, 31)]
        await ws.send_json(cancel("runs"))
        while (frame := await next_event(ws, "waits"))["status"] == "queued":
            pass
        assert frame["status"] == "processing"
        assert (await next_event(ws, "waits"))["status"] == "chunk"
        process.signal()
        assert await process.ended() == 0
    assert "Traceback" not in process.log
