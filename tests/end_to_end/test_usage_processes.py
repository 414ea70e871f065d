"""The ledger of real processes: what is killed, what several write, and what cannot be written."""

from __future__ import annotations

import asyncio
import json
import signal
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from tests.support.bookkeeping import keep_books
from tests.support.ledgers import lines_of
from tests.support.process import run_command, serving
from tests.support.server import ENDLESS, NOWHERE, UVICORN, write
from tests.support.simulator import Behaviour, Simulator
from tests.support.waiting import until

if TYPE_CHECKING:
    from pathlib import Path

# Processes take seconds to start.
pytestmark = [pytest.mark.real_time, pytest.mark.timeout(150)]


async def test_the_ledger_is_what_the_provider_has_counted_whenever_it_is_killed(
    tmp_path: Path,
) -> None:
    """The full number is in benchmarks/ledger.py."""
    result = await keep_books(tmp_path, answers=300, kills=2)

    assert result.wrong == []
    assert result.ledger == result.provider
    assert result.ledger[0] > 0
    assert {"ok", "cut", "cancelled", "failed"} <= result.outcomes.keys()


async def test_what_runs_when_its_process_is_killed_is_lost_with_an_estimate(
    tmp_path: Path,
) -> None:
    async with Simulator(ENDLESS) as simulator:
        changes = {"usage.path": str(tmp_path / "usage")}
        async with serving(
            tmp_path / "config.yaml", simulator.base_url, changes=changes
        ) as server:
            await server.ready()
            body = {"messages": [{"role": "user", "content": "Hello"}], "stream": True}
            asking = asyncio.create_task(_ask(f"{server.base}/v1/chat/completions", body))
            usage = tmp_path / "usage"
            await until(lambda: usage.exists() and any(lines_of(usage).values()), within=60.0)
            server.signal(signal.SIGKILL)
            await server.ended()
            await asyncio.wait([asking])

        # As after a tear: the last line of a file is cut.
        [file] = usage.iterdir()
        whole = file.read_bytes()
        file.write_bytes(whole[:-20])
        _, report, errors = await run_command("usage", str(usage), "--json")
        assert json.loads(report)["rows"] == []
        assert "skipped 1 lines" in errors
        file.write_bytes(whole.replace(b'"ts":"20', b'"ts":"19'))
        _, report, _ = await run_command("usage", str(usage), "--json", "--by", "outcome")
    [row] = json.loads(report)["rows"]
    assert (row["outcome"], row["requests"]) == ("lost", 1)
    assert row["estimated_tokens"] == row["input_tokens"] + row["output_tokens"] > 0


async def _ask(url: str, body: dict[str, Any]) -> None:
    async with aiohttp.ClientSession() as session:
        try:
            async with session.post(url, json=body) as response:
                await response.read()
        except aiohttp.ClientError:
            return


async def test_workers_write_a_file_each(tmp_path: Path) -> None:
    async with Simulator(Behaviour(ttft=0, interval=0, tokens=7)) as simulator:
        changes = {"usage.path": str(tmp_path / "usage"), f"{UVICORN}.workers": 2}
        async with serving(
            tmp_path / "config.yaml", simulator.base_url, changes=changes
        ) as server:
            await server.ready()
            body = {"messages": [{"role": "user", "content": "Hello"}]}
            url = f"{server.base}/v1/chat/completions"
            await asyncio.gather(*(_ask(url, body) for _ in range(20)))
            server.signal(signal.SIGTERM)
            assert await server.ended(60) == 0

        _, report, errors = await run_command("usage", str(tmp_path / "usage"), "--json")
    files = sorted(path.name[16:] for path in (tmp_path / "usage").iterdir())
    assert files == [".w0.jsonl", ".w1.jsonl"]
    assert errors == ""
    [row] = json.loads(report)["rows"]
    assert (row["requests"], row["output_tokens"]) == (20, 140)


async def test_a_ledger_that_cannot_be_written_is_a_fault_of_the_configuration(
    tmp_path: Path,
) -> None:
    (tmp_path / "file").write_text("")
    config = tmp_path / "config.yaml"
    write(NOWHERE, {"usage.path": str(tmp_path / "file" / "usage")}, config)

    for command in ("check", "serve"):
        code, out, errors = await run_command(command, "--config", str(config))

        assert (code, out) == (2, "")
        assert "usage.path" in errors
        assert errors.startswith(f"{config}:")
