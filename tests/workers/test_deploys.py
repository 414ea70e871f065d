"""A deploy cuts no answer: processes that are replaced keep theirs, whatever is asked of them
meanwhile.

The provider's answers end when the test says so, so that each deploy falls into them.
"""

from __future__ import annotations

import asyncio
import json
import random
import signal
from contextlib import AsyncExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import aiohttp
import pytest

from tests.support.chat import STREAMED, chat, resume, to_end, until_status
from tests.support.keys import bearer, keys_of
from tests.support.logs import without_lateness
from tests.support.process import serving
from tests.support.scripted_provider import DONE, EVENT_STREAM, LAST_CHUNK, ScriptedProvider, chunk
from tests.support.server import CONCURRENCY, SIM_HTTP_CLIENT, UVICORN
from tests.support.systemd import Systemd
from tests.support.waiting import patience, until, until_result
from tests.support.worker_processes import command, incidents_of, workers

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.support.process import ServerProcess
    from tests.support.scripted_provider import Peer

pytestmark = pytest.mark.real_time

REPLACED = "all workers are replaced"
FORMER = "replaced: this process accepts no more connections"
# The provider says nothing until its answers are released.
ONE = {"chat.websocket.shutdown_timeout": 0.5, f"{SIM_HTTP_CLIENT}.read_timeout": 600}
TWO = {f"{UVICORN}.workers": 2, **ONE}
FIRST, SECOND = (
    b"data: %b\n\n" % json.dumps({"id": "c", "choices": [{"index": 0, "delta": delta}]}).encode()
    for delta in ({"role": "assistant", "content": "first "}, {"content": "second"})
)
FINISH = b'data: {"id":"c","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'


class HeldProvider(ScriptedProvider):
    """A provider whose answers begin at once, and end when they are `released`."""

    def __init__(self) -> None:
        super().__init__(self._answer)
        self.released = asyncio.Event()
        self.asked = 0

    async def _answer(self, peer: Peer) -> None:
        while True:
            await peer.request()
            self.asked += 1
            peer.write(EVENT_STREAM + chunk(FIRST))
            await self.released.wait()
            peer.write(chunk(SECOND) + chunk(FINISH) + chunk(DONE) + LAST_CHUNK)


@pytest.fixture
async def provider() -> AsyncIterator[HeldProvider]:
    async with HeldProvider() as made:
        yield made


class SlowProvider(ScriptedProvider):
    """A provider whose answers take a while, each another one, as *dice* say."""

    def __init__(self, dice: random.Random) -> None:
        super().__init__(self._answer)
        self._dice = dice
        self.asked = 0

    async def _answer(self, peer: Peer) -> None:
        while True:
            await peer.request()
            self.asked += 1
            peer.write(EVENT_STREAM + chunk(FIRST))
            await asyncio.sleep(self._dice.uniform(0.0, 3.0))
            peer.write(chunk(SECOND) + chunk(FINISH) + chunk(DONE) + LAST_CHUNK)


class Answers:
    """Answers that run, each on a connection of its own, until the end of the block."""

    def __init__(self, process: ServerProcess, provider: HeldProvider) -> None:
        self._process, self._provider = process, provider
        self._stack = AsyncExitStack()
        self._running: list[aiohttp.ClientResponse] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.aclose()

    async def begin(self, count: int, key: str = "") -> None:
        """Ask *count* questions, whose answers have begun then."""
        headers = bearer(key) if key else None
        for _ in range(count):
            session = await self._stack.enter_async_context(aiohttp.ClientSession())
            url = f"{self._process.base}/v1/chat/completions"
            response = await session.post(url, json=STREAMED, headers=headers)
            assert response.status == 200, await response.text()
            assert (await response.content.readline()).startswith(b"data: ")
            self._running.append(response)

    async def rest(self, first: int, last: int | None = None) -> list[bytes]:
        """Read those answers to their ends."""
        async with asyncio.timeout(patience(60)):
            return [await response.read() for response in self._running[first:last]]


async def replace(process: ServerProcess, times: int = 1) -> None:
    """Replace all workers, for the time number *times*. Each that was replaced knows it then."""
    seats = int(process.log.partition(" workers: ")[2].partition(",")[0])
    process.signal(signal.SIGUSR2)
    await until(
        lambda: (process.log.count(REPLACED), process.log.count(FORMER)) == (times, times * seats),
        60.0,
        lambda: process.log,
    )


async def former_of(process: ServerProcess) -> list[dict[str, Any]]:
    """What `/stats` has of the processes that were replaced."""
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"{process.base}/stats") as response,
    ):
        former: list[dict[str, Any]] = (await response.json())["former"]
        return former


def counted(texts: list[str]) -> tuple[int, int]:
    """The answers that have come to their end, and those that were cut, by these incidents."""
    numbers = [[int(word) for word in text.split() if word.isdigit()] for text in texts]
    return sum(kept for kept, _cut in numbers), sum(cut for _kept, cut in numbers)


@pytest.mark.parametrize("count", [4, pytest.param(30, marks=pytest.mark.stress)])
async def test_two_deploys_cut_no_answer_and_ask_for_none_twice(
    tmp_path: Path, provider: HeldProvider, count: int
) -> None:
    async with (
        serving(tmp_path / "c.yaml", provider.url, changes=TWO) as process,
        aiohttp.ClientSession() as session,
        Answers(process, provider) as answers,
    ):
        await process.ready()
        first = workers(process)
        busy = await session.ws_connect(f"{process.base}/ws/chat")
        await busy.send_json(chat("r1"))
        await until_status(busy, "chunk")
        await answers.begin(count)

        await replace(process)
        await answers.begin(count)
        # Another question on a connection to a process that accepts no more of them.
        await busy.send_json(chat("r2"))
        await until_status(busy, "chunk")
        await replace(process, 2)
        # From a new process, to the answer of one that was replaced twice.
        elsewhere = await session.ws_connect(f"{process.base}/ws/chat")
        await elsewhere.send_json(resume("r1"))
        await until_status(elsewhere, "chunk")
        assert {*first} & {*workers(process)}, "those with answers have not ended"
        former = await until_result(
            partial(former_of, process),
            lambda former: sum(each["answers"] for each in former) == provider.asked,
        )
        assert {round(each["until"] - each["since"]) for each in former} == {600}
        async with session.get(f"{process.base}/metrics") as response:
            metrics = await response.text()
        assert f"aioserver_former_answers {provider.asked}.0" in metrics

        provider.released.set()
        for body in await answers.rest(0):
            assert body.endswith(DONE)
            assert body.count(b"second") == 1
        frames = [*await to_end(busy), *await to_end(busy)]
        assert [frame["status"] for frame in frames].count("complete") == 2
        closed = await busy.receive(timeout=patience(20))
        assert (closed.type, closed.data) == (aiohttp.WSMsgType.CLOSE, 1012)
        assert (await to_end(elsewhere))[-1]["status"] == "complete"
        assert provider.asked == 2 * count + 2
        await elsewhere.close()
        await until(lambda: len(workers(process)) == 2, 30.0, lambda: process.log)
        assert not {*first} & {*workers(process)}
        # All but those of the newest processes.
        await until_result(
            partial(incidents_of, process, "replaced"),
            lambda texts: counted(texts) == (2 * count + 2, 0),
        )
        process.signal()
        assert await process.ended() == 0
    assert "answers have ended since, 0 still run" in process.log
    # The provider's silence is that of the test, however long it takes.
    log = without_lateness(process.log, "sim has said nothing for")
    for sign in ("Traceback", " ERROR ", "bug in", "was ended by", "server_shutdown"):
        assert sign not in log, process.log


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.stress)])
async def test_deploys_at_any_moment_cut_and_refuse_nothing(tmp_path: Path, seed: int) -> None:
    dice = random.Random(seed)

    async def ask(process: ServerProcess) -> bytes:
        await asyncio.sleep(dice.uniform(0.0, 4.0))
        url = f"{process.base}/v1/chat/completions"
        async with aiohttp.ClientSession() as session, session.post(url, json=STREAMED) as found:
            assert found.status == 200, await found.text()
            return await found.read()

    async def deploy(process: ServerProcess) -> None:
        for times in (1, 2):
            await asyncio.sleep(dice.uniform(0.0, 1.0))
            await replace(process, times)

    async with (
        SlowProvider(dice) as provider,
        serving(tmp_path / "c.yaml", provider.url, changes=TWO) as process,
    ):
        await process.ready()
        async with asyncio.TaskGroup() as group:
            group.create_task(deploy(process))
            tasks = [group.create_task(ask(process)) for _ in range(40)]
        bodies = [task.result() for task in tasks]
        assert all(body.endswith(DONE) and body.count(b"second") == 1 for body in bodies)
        assert provider.asked == len(bodies)
        process.signal()
        assert await process.ended() == 0


async def test_a_deploy_right_behind_the_start_refuses_nothing_where_nothing_may_wait(
    tmp_path: Path, provider: HeldProvider
) -> None:
    changes = {**TWO, f"{CONCURRENCY}.queue_timeout": 0}
    async with (
        serving(tmp_path / "c.yaml", provider.url, changes=changes) as process,
        Answers(process, provider) as answers,
    ):
        await process.ready()
        # The server of the workers is new as well, and grants nothing for some seconds.
        await replace(process)

        await answers.begin(4)

        provider.released.set()
        for body in await answers.rest(0):
            assert body.endswith(DONE)
        process.signal()
        assert await process.ended() == 0


async def test_a_key_that_is_revoked_has_no_answer_in_a_former_process(
    tmp_path: Path, provider: HeldProvider
) -> None:
    changes: dict[str, Any] = {**TWO, **keys_of("root", "web")}
    async with (
        serving(tmp_path / "c.yaml", provider.url, changes=changes) as process,
        Answers(process, provider) as answers,
    ):
        await process.ready()
        await answers.begin(2, "web")
        await answers.begin(1, "root")
        await replace(process)

        process.change({**TWO, **keys_of("root")})
        process.signal(signal.SIGHUP)

        for body in await answers.rest(0, 2):
            assert b"invalid_api_key" in body
        provider.released.set()
        (body,) = await answers.rest(2)
        assert body.endswith(DONE)
        process.signal()
        assert await process.ended() == 0


async def test_systemd_hears_of_former_processes_which_a_stop_ends_with_all_others(
    tmp_path: Path, provider: HeldProvider
) -> None:
    with Systemd(str(tmp_path / "notify")) as systemd:
        # Soon enough for each worker to say how it is.
        environ = {"NOTIFY_SOCKET": systemd.address, "WATCHDOG_USEC": "6000000"}
        async with (
            serving(tmp_path / "c.yaml", provider.url, changes=TWO, environ=environ) as process,
            Answers(process, provider) as answers,
        ):
            await process.ready()
            await answers.begin(2)
            process.signal(signal.SIGUSR2)
            await process.living(systemd.message_with("RELOADING"))
            await process.living(systemd.message_with("READY"))
            await answers.begin(1)
            said = "2 answers still run in "
            async with asyncio.timeout(patience(60)):
                while said not in (status := (await systemd.message())["STATUS"]):
                    # Not even at the end of the deploy.
                    assert " 0 answers still run" not in status
                    # New workers have not said yet what they hold.
                    assert "of 0 connections" not in status
            assert status.startswith("2 of 2 workers"), status
            assert ", until " in status

            process.signal()

            for body in await answers.rest(0):
                assert b"server_shutdown" in body
            assert await process.ended() == 0


async def test_a_single_worker_is_replaced_and_has_three_generations_at_most(
    tmp_path: Path, provider: HeldProvider
) -> None:
    async with (
        serving(tmp_path / "c.yaml", provider.url, "--replaceable", changes=ONE) as process,
        Answers(process, provider) as answers,
    ):
        await process.ready()
        for times in (1, 2):
            await answers.begin(1)
            await replace(process, times)
        await answers.begin(1)
        assert len(workers(process)) == 3

        await replace(process, 3)

        (oldest,) = await answers.rest(0, 1)
        assert b"server_shutdown" in oldest, oldest
        assert "worker 0 has to end" in process.log
        assert len(workers(process)) == 3
        provider.released.set()
        for body in await answers.rest(1):
            assert body.endswith(DONE)
        await until(
            lambda: len(workers(process)) == 1,
            state=lambda: (process.log, [(pid, command(pid)) for pid in workers(process)]),
        )
        await until_result(
            partial(incidents_of, process, "replaced"), lambda texts: counted(texts) == (2, 1)
        )
        process.signal()
        assert await process.ended() == 0
    assert "Traceback" not in process.log
