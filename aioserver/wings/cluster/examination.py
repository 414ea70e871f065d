"""What the doctor says of a cluster: whether its server answers and has room, and whether this
machine reaches the instances that are members now.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

from aioserver.config.faults import ConfigurationError
from aioserver.wings.cluster.answers import peer_network
from aioserver.wings.cluster.answers.fan_out import FanOut
from aioserver.wings.cluster.connection import CallFailed, Connection

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from aioserver.config.settings import Cluster
    from aioserver.faces.wing import Examined

MIB = 1 << 20
# The share of `maxmemory` that conversations, responses and logs may take (FULL in
# gateway/contracts/commands.py).
MAX_SHARE = 0.75


async def examine(cluster: Cluster, url: str) -> AsyncIterator[Examined]:
    """Yield what there is to say of *cluster*, whose server is at *url*."""
    try:
        connection = Connection(url)
        # The port of a server that runs here already is taken.
        network = await peer_network.bind_tcp(replace(cluster, listen=None), url)
    except ValueError as error:
        yield "fail", f"cluster.redis_url: {error}", ""
        return
    except ConfigurationError as error:
        for fault in error.faults:
            yield "fail", fault, ""
        return
    prefix = f"aio:{{{cluster.name}}}:"
    try:
        await connection.open()
        yield _memory((await connection.execute("INFO", "memory")).decode(), connection.address)
        secret = await connection.execute("GET", f"{prefix}peer_secret") or b""
        members = await connection.execute("ZRANGE", f"{prefix}m", 0, -1)
        fan_out = FanOut(network, lambda: secret)
        for met in asyncio.as_completed([_meet(fan_out, name.decode()) for name in members]):
            yield await met
    except CallFailed as error:
        yield "fail", f"the server does not serve: {error}", "cluster.redis_url"
    finally:
        await connection.close()
        network.close()


def _memory(info: str, address: str) -> Examined:
    facts = dict(line.partition(":")[::2] for line in info.splitlines())
    used, most = int(facts["used_memory"]), int(facts["maxmemory"])
    text = f"{address} uses {used // MIB} MiB of memory"
    if not most:
        return "warn", f"{text}, and has no maxmemory", "docs/scaling.md: maxmemory"
    text += f" of {most // MIB}"
    if facts["maxmemory_policy"] != "noeviction":
        text += f", and evicts leases: maxmemory-policy is {facts['maxmemory_policy']}"
        return "warn", text, "set maxmemory-policy to noeviction"
    if used > most * MAX_SHARE:
        text += ": there is no room for claims, conversations and stored responses"
        return "warn", text, "raise maxmemory"
    return "ok", text, ""


async def _meet(fan_out: FanOut, name: str) -> Examined:
    if not (why := await fan_out.meet(name)):
        return "ok", f"the instance {name} can be reached", ""
    text = f"the instance {name} cannot be reached: {why}"
    return "warn", text, "cluster.listen, cluster.advertise, and the firewall between"
