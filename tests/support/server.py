"""A real server on loopback, with the simulator as its provider."""

from __future__ import annotations

import contextlib
import copy
import itertools
import ssl
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import aiohttp
import orjson
import yaml
from aiohttp import web_app

from aioserver.config import Configuration
from aioserver.protocol import eventstream
from aioserver.server.app import Server, open_server
from aioserver.server.reload import Reload
from aioserver.server.runner import Runner
from aioserver.telemetry import counters
from tests.support.members import wings_of
from tests.support.simulator import Behaviour, Simulator
from tests.support.waiting import LATE, ticks, until

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncIterator, Iterator, Sequence

    from aioserver.limits.quota import Quota
    from aioserver.workers.balance import Balance

# How the simulated provider answers: at once; 40 tokens in 0.4 s; for 100 s; for 1000 s; not at
# all.
QUICK = Behaviour(ttft=0, interval=0)
PACED = Behaviour(ttft=0, interval=0.01, tokens=40)
SLOW = Behaviour(ttft=0, interval=0.05, tokens=2000)
ENDLESS = Behaviour(ttft=0, interval=0.01, tokens=100_000)
SILENT = Behaviour(ttft=60)
# As PyYAML has it, which depends on how it was built.
_DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
# Nothing listens here.
NOWHERE = "http://127.0.0.1:9/v1"
# Sections of the configuration, for changes by dotted path.
CONCURRENCY = "chat.websocket.concurrency"
UVICORN = f"{CONCURRENCY}.uvicorn"
SIM_HTTP_CLIENT = "llm.providers.sim.http_client"
HTTP_CLIENT = {
    "max_connections": 20,
    "max_keepalive": 10,
    "keepalive_expiry": 30.0,
    "connect_timeout": LATE,
    "read_timeout": 10.0,  # and so, where none is given, the longest wait in a queue
    "write_timeout": LATE,
    "pool_timeout": LATE,
    "requests_per_minute": 1_000_000,
    "concurrent_requests": 20,
    "max_retries": 0,
    "backoff_factor": 0.1,
}
BASE: dict[str, Any] = {
    "chat": {
        "websocket": {
            "host": "127.0.0.1",
            "port": 0,
            "allow_origins": ["*"],
            # A client that reads nothing meanwhile answers no ping.
            "ping_timeout": 3 * LATE,
            "concurrency": {
                "max_connections": 50,
                "connection_queue_size": 50,
                "queue_timeout": 10.0,
                "uvicorn": {
                    "backlog": 128,
                    "workers": 1,
                    "access_log": False,
                    "keepalive_timeout": 30,
                    "max_keepalive_requests": 10000,
                    "h11_max_incomplete_event_size": 16384,
                    "h11_max_request_line_size": 8192,
                    "h11_max_header_size": 32768,
                },
            },
        },
    },
    "llm": {
        "active": "sim",
        "providers": {
            "sim": {
                "base_url": "",
                "model": "sim-model",
                "messages": True,
                "http_client": HTTP_CLIENT,
            }
        },
    },
    "auth": {"allowed_hosts": ["x"]},  # what raw sockets say: `Host: x`
    "logging": {"level": "WARNING", "format": "console"},
}


def provider_entry(base_url: str, model: str = "other-model", **client: Any) -> dict[str, Any]:
    """An entry of `llm.providers`; *client* is put over `HTTP_CLIENT`."""
    return {"base_url": base_url, "model": model, "http_client": HTTP_CLIENT | client}


class MakeServer(Protocol):
    """The fixture `make_server`."""

    async def __call__(self, behaviour: Behaviour = QUICK, /, **changes: Any) -> RunningServer: ...


class RunningServer:
    """A server that runs in the test's own event loop, with `simulator` as its provider `sim`.

    `base` is its address; `ws`, `sse` and `v1` are those of its faces. `session` is an HTTP
    client.
    """

    def __init__(
        self,
        owners: Server,
        runner: Runner,
        base: str,
        simulator: Simulator,
        session: Any,
        reload: Reload,
        changes: dict[str, Any],
    ) -> None:
        self.owners = owners
        self.context = owners.context
        self.app = owners.app
        self.runner = runner
        self.base = base
        self.simulator = simulator
        self.session: aiohttp.ClientSession = session
        assert runner.server is not None
        # aiohttp's: its `connections` are those of the clients.
        self.http_server = runner.server
        self.settings = self.context.settings
        self.ws = base.replace("http", "ws", 1) + self.settings.chat.websocket.endpoint
        self.sse = base + self.settings.chat.sse.endpoint
        self.v1 = base + "/v1"
        self.port = int(base.rpartition(":")[2])
        self.reload = reload
        self.file = reload.source
        self._changes = changes
        self._addresses = itertools.cycle(
            simulator.base_url.replace("127.0.0.1", host) for host in ("localhost", "127.0.0.1")
        )

    @property
    def provider(self) -> Any:
        """The provider `sim`."""
        return self.context.router.providers["sim"]

    def provider_of(self, name: str) -> Any:
        """The provider *name*."""
        return self.context.router.providers[name]

    def held(self) -> dict[str, int]:
        """Count everything that a request may hold: all zeros when no request is under way."""
        counts = {
            "places": self.context.admission.gate.inside,
            "waiting": self.context.admission.gate.waiting,
            "body_bytes": self.context.admission.body_bytes,
            "running": self.owners.streams.stats().running,
            "sockets": len(self.context.sockets),
            "detached": self.context.gateway.lifetime.detached,
            "background": self.context.gateway.lifetime.background,
            "lent": self.context.admission.lent,
            "refused closing": self.context.admission.refused_closing,
        }
        for face, meter in self.context.metrics.faces.items():
            counts[f"{face} shown"] = int(meter.connections + meter.waiting.value)
        # Where conversations are kept at all.
        histories = self.context.gateway._prompts._histories
        counts["questions"] = len(getattr(histories, "_asked", ()))
        counts["attempts"] = self.context.usage.running
        idle_sockets = self.context.admission.idle_sockets
        counts["places of keys"] = sum(idle_sockets._places.values())
        counts["waiting of keys"] = idle_sockets._waiters.total()
        for name, quota in self.quotas():
            counts[f"{name} answers"] = quota.running
            counts[f"{name} waiting at its key"] = len(quota.queue)
            counts[f"{name} tokens"] = quota.budget.reserved
            counts[f"{name} connections"] = quota.connections
        for name, provider in self.context.router.providers.items():
            stats = provider.stats()
            counts[f"{name} places"] = stats.queue.inside
            counts[f"{name} waiting"] = stats.queue.waiting
            counts[f"{name} background"] = sum(stats.background)
            counts[f"{name} busy"] = stats.pool.open - stats.pool.idle
            idle = provider.pools.pool._connections.idle
            kept = sum(connection.place is not None for connection in idle)
            counts[f"{name} connecting"] = provider.pools.gate.inside - kept
            counts[f"{name} trials"] = provider.health.breaker._trials
            counts[f"{name} pending"] = provider._pending
        return counts

    def quotas(self) -> Iterator[tuple[str, Quota]]:
        """The limits of each key, by its name."""
        for name, key in self.context.access.keys._by_name.items():
            yield name, key.quota

    async def counted(self, name: str, *by: str) -> Counter[tuple[str, ...]]:
        """Read the counter or gauge *name*, summed up *by* these labels, without zeros, as /metrics
        has it.

        Its text is not read: to make and to parse it takes longer than most tests. But what has
        just been answered has the time of a request to be counted.
        """
        async with self.session.get(f"{self.base}/health") as response:
            await response.read()
        await ticks(50)
        others = self.context.monitor.others
        families = self.context.metrics.families() if others is None else await others.families()
        counts: Counter[tuple[str, ...]] = Counter()
        for family in families:
            if family.name == name:
                for values, child in family.children.items():
                    labels = dict(zip(family.labels, values, strict=True))
                    assert isinstance(child, counters.Counter), f"{name} is a histogram"
                    counts[tuple(labels[label] for label in by)] += int(child.value)
                return +counts
        for gauge in self.context.registry.collect():
            if gauge.name == f"aioserver_{name}":
                for sample in gauge.samples:
                    counts[tuple(sample.labels[label] for label in by)] += int(sample.value)
                return +counts
        raise AssertionError(f"there is no {name}")

    async def nothing_held(self, within: float = 10.0) -> None:
        """Wait until `held` counts nothing."""
        await until(lambda: not any(self.held().values()), within, self.held)

    @property
    def watchers(self) -> int:
        """The number of clients that follow `/events` now."""
        return int(self.context.monitor.fresh()["watchers"])

    def history(self) -> dict[str, Any]:
        """The series and the incidents that a new client of `/events` is sent first."""
        sent: list[bytes] = []
        self.context.monitor.watch(sent.append, 1)
        self.context.monitor.leave(sent.append)
        history: dict[str, Any] = orjson.loads(eventstream.parse(b"".join(sent))[0].data)
        return history

    def incidents(self) -> list[dict[str, Any]]:
        """The incidents that a new client of `/events` is shown, but those of a busy machine.

        They are of a loop that was late.
        """
        return [
            incident for incident in self.history()["incidents"] if incident["kind"] != "loop_lag"
        ]

    async def forgive(self) -> None:
        """Make the provider `sim` usable at once, as if no attempt had ever failed.

        A reload gives it another address, which leads to the same simulator.
        """
        address = {"llm.providers.sim.base_url": next(self._addresses)}
        assert await self.change(**{**self._changes, **address})

    async def change(self, **changes: Any) -> bool:
        """Reload with other changes: `change(**{"llm.active": "other"})`.

        Returns whether the new configuration was applied.
        """
        write(self.simulator.base_url, changes, Path(self.file))
        return await self.reload.once()

    def connect(self, **kwargs: Any) -> Any:
        """Open a WebSocket: `async with server.connect() as ws`."""
        return self.session.ws_connect(self.ws, **kwargs)


def write(base_url: str, changes: dict[str, Any], path: Path) -> None:
    """Write `BASE` with *changes*, by dotted path, to *path*; the provider `sim` is at
    *base_url*.
    """
    data = copy.deepcopy(BASE)
    data["llm"]["providers"]["sim"]["base_url"] = base_url
    for dotted, value in changes.items():
        section = data
        *path_to, key = dotted.split(".")
        for name in path_to:
            section = section.setdefault(name, {})
        section[key] = value
    path.write_text(yaml.dump(data, Dumper=_DUMPER))


def configured(base_url: str, changes: dict[str, Any], path: Path) -> Configuration:
    """Write `BASE` with *changes* to *path*, as `write` does, and load it."""
    write(base_url, changes, path)
    return Configuration.load(path, environ={})


@contextlib.asynccontextmanager
async def running(
    path: Path,
    behaviour: Behaviour = QUICK,
    changes: dict[str, Any] | None = None,
    *,
    balance: Balance | None = None,
    cluster: Any = None,
    inherited: Sequence[socket.socket] = (),
) -> AsyncIterator[RunningServer]:
    """Run a server until the end of the block; then no request may hold anything any more.

    *balance* and the socket that it has *inherited*: those of a server that shares it with others.
    *cluster*: the instance of a cluster that it is; None if it is none.
    """
    async with Simulator(behaviour) as simulator:
        configuration = configured(simulator.base_url, changes or {}, path)
        async with open_server(configuration.settings, wings=wings_of(cluster)) as owners:
            runner = Runner(owners, balance)
            await runner.setup()
            try:
                listening = await runner.listen(inherited)
                base = f"{listening[0].scheme}://127.0.0.1:{listening[0].port}"
                async with aiohttp.ClientSession(connector=_connector(changes or {})) as session:
                    reload = Reload(owners, runner, configuration, {})
                    server = RunningServer(
                        owners, runner, base, simulator, session, reload, changes or {}
                    )
                    yield server
                await server.nothing_held()
            finally:
                await runner.end()
                await runner.cleanup()
                # It keeps each application alive.
                web_app._cached_build_middleware.cache_clear()


def _connector(changes: dict[str, Any]) -> aiohttp.TCPConnector:
    """What connects to a server with *changes*: over TLS, it trusts the `ca.pem` beside its
    certificate.
    """
    tls = changes.get("chat.websocket.tls")
    if tls is None:
        return aiohttp.TCPConnector()
    authority = Path(tls["cert_file"]).with_name("ca.pem")
    return aiohttp.TCPConnector(ssl=ssl.create_default_context(cafile=authority))


@contextlib.asynccontextmanager
async def runner_of(path: Path, **changes: Any) -> AsyncIterator[tuple[Runner, Any]]:
    """Set up a runner that does not listen yet; yields it and the settings of its listener."""
    settings = configured(NOWHERE, changes, path / "config.yaml").settings
    async with open_server(settings) as owners:
        runner = Runner(owners)
        await runner.setup()
        try:
            yield runner, settings.chat.websocket
        finally:
            await runner.cleanup()
