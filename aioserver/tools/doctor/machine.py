"""The limits of this machine, beside what a server with these settings may need.

A server itself warns at its start where open files are few, or its accept queue is short.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from aioserver.tools.doctor.results import Result, ok, skip, warn

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from aioserver.tools.doctor.facts import Facts

MIB = 1 << 20
# MiB of a process before its first client, measured.
PROCESS_MIB = 64
# The files in which Linux shows its limits: proc(5), cgroups(7).
PORTS = "proc/sys/net/ipv4/ip_local_port_range"
MEMORY, OWN_CGROUP, CGROUPS = "proc/meminfo", "proc/self/cgroup", "sys/fs/cgroup"


async def limits(facts: Facts) -> AsyncIterator[Result]:
    """Compare what the machine gives with what the settings may need."""
    for name, measured in (("local ports", ports), ("memory", memory)):
        try:
            yield measured(facts)
        except (OSError, ValueError):
            yield skip(f"{name}: this system does not show it")


def ports(facts: Facts) -> Result:
    """Compare the local ports with the most connections to one address, which need a port each:
    connections to a provider, or of a proxy on this machine to the server.
    """
    concurrency = facts.here.chat.websocket.concurrency
    clients = concurrency.max_connections + concurrency.connection_queue_size
    pools = (
        provider.http_client.max_connections * concurrency.uvicorn.workers
        for provider in facts.here.llm.providers.values()
        if provider.usable
    )
    low, high = map(int, (facts.root / PORTS).read_text().split())
    have, wanted = high - low + 1, max(clients, *pools)
    text = f"local ports: {have}, and up to {wanted} connections to one address may need one each"
    remedy = 'sysctl -w net.ipv4.ip_local_port_range="1024 65535"'
    return ok(text) if have >= wanted else warn(text, remedy)


def memory(facts: Facts) -> Result:
    """Compare the free MiB with those that answers, bodies and processes may take together."""
    concurrency = facts.here.chat.websocket.concurrency
    kept = (facts.here.chat.streams.max_kept_bytes + concurrency.max_body_bytes) // MIB
    have = available_memory(facts.root) // MIB
    wanted = (kept + PROCESS_MIB) * concurrency.uvicorn.workers
    text = f"memory: {have} MiB are free, and kept answers and bodies may take {wanted}"
    remedy = "lower chat.streams.max_kept_bytes and concurrency.max_body_bytes, or add memory"
    return ok(text) if have >= wanted else warn(text, remedy)


def available_memory(root: Path) -> int:
    """Return the bytes that this process could take: the free memory of the machine, or of its
    cgroup (v2) if that has less.

    Raises:
        OSError, ValueError: the system does not show them.
    """
    lines = (root / MEMORY).read_text().splitlines()
    (text,) = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    available = int(text) * 1024
    with contextlib.suppress(OSError):
        group = (root / OWN_CGROUP).read_text().strip().rpartition(":")[2].lstrip("/")
        folder = root / CGROUPS / group
        # The limit of a group holds for all groups in it.
        for level in (folder, *folder.parents):
            # A group without a limit has the word `max`, or no such file.
            with contextlib.suppress(OSError, ValueError):
                bound = int((level / "memory.max").read_text())
                used = int((level / "memory.current").read_text())
                available = min(available, max(0, bound - used))
    return available
