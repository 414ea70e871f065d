"""The memory of a large body is used again for the next one."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

import aiohttp

from tests.support.process import serving
from tests.support.simulator import Behaviour, Simulator

if TYPE_CHECKING:
    from tests.support.process import ServerProcess

BODY = {"model": "m", "messages": [{"role": "user", "content": "y" * 1_000_000}]}
# Requests are made in rounds, and the heap still grows in the first ones.
CLIENTS, ROUNDS, FIRST = 4, 20, 10
# A body has 244 pages: not one of its copies is made of new ones.
FEW_FAULTS = 200


def page_faults(process: ServerProcess) -> int:
    """Return the page faults of *process* that needed no disk (proc(5), `minflt`)."""
    stat = Path(f"/proc/{process.pid}/stat").read_text()
    return int(stat.rpartition(")")[2].split()[7])


async def asked(session: aiohttp.ClientSession, process: ServerProcess) -> None:
    """Get an answer to BODY."""
    async with session.post(f"{process.base}/v1/chat/completions", json=BODY) as response:
        await response.read()
        assert response.status == 200


async def test_a_large_body_needs_few_new_pages_after_others(tmp_path: Path) -> None:
    faults = []
    async with (
        Simulator(Behaviour(ttft=0, interval=0)) as simulator,
        serving(tmp_path / "c.yaml", simulator.base_url) as process,
        aiohttp.ClientSession() as session,
    ):
        await process.ready()
        for _ in range(ROUNDS):
            before = page_faults(process)
            await asyncio.gather(*(asked(session, process) for _ in range(CLIENTS)))
            faults.append(page_faults(process) - before)
    assert sorted(faults[FIRST:])[(ROUNDS - FIRST) // 2] < FEW_FAULTS, faults
