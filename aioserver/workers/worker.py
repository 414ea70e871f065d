"""A worker: one of several processes that serve the same port, as its parent has started it, with
its fixed share of each limit that the configuration sets for all of them.

The parent passes its listening sockets by the protocol of systemd. Everything else comes in
variables:

- `AIOSERVER_WORKER=SLOT/WORKERS`;
- `AIOSERVER_FDS=NAME=NUMBER,…`, descriptors by name;
- `AIOSERVER_PRIVATE_SERVER`, the URL of the parent's own Valkey or Redis server, if it has one
  (workers/private_server.py);
- `AIOSERVER_HOST`, a name that only the workers of this parent have.

| name | what it is |
| --- | --- |
| ear | a socket for this worker's messages to its parent, by the protocol of systemd |
| lifeline | a pipe that ends with the parent |
| configuration | the content of the configuration file that is in effect |
| session_secret | the secret that signs browser sessions, the same in each worker |
| loads | shared memory, by which the workers balance their connections (loads.py) |

A worker that is replaced, and its successors, have different slots of the same rank: there are
four times as many slots as workers (loads.py).

The shares of all workers together never exceed the limit, unless the limit is lower than the
number of workers: a share is at least 1. While a worker that was replaced keeps its answers, its
successor has the same share. Limits that workers share through a server
(wings/cluster/limits/limits.py) are not divided. Without a server, `FixedCapacity` divides
`max_connections` and its queue, so that messages still show the configured number.
"""

from __future__ import annotations

import asyncio
import os
import socket
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Self, TypeVar

from aioserver.config.settings import Limits
from aioserver.limits.fixed_share import Scope
from aioserver.limits.resource import Supply
from aioserver.server.preflight import Unfit
from aioserver.server.systemd import Notifier
from aioserver.workers.balance import Balance
from aioserver.workers.loads import SLOTS_PER_WORKER, Loads, OtherLayout

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, MutableMapping

    from aioserver.config.settings import Auth, Chat, Llm, Provider, Settings
    from aioserver.limits.resource import Resource
    from aioserver.limits.scheduler import Scheduler
    from aioserver.server.app import Server

OfCaller = TypeVar("OfCaller", bound=Limits)
# The numbers of a caller that are not limits, and the limits that instances do not share.
NO_LIMITS, OF_EACH = frozenset({"priority"}), frozenset({"queue_size"})
WORKER = "AIOSERVER_WORKER"
DESCRIPTORS = "AIOSERVER_FDS"
SERVER = "AIOSERVER_PRIVATE_SERVER"
# Set for the workers that the parent starts first: no other process can have places yet.
FIRST = "AIOSERVER_FIRST"
# The seconds within which the parent wants to hear from the worker.
PERIOD = "AIOSERVER_PERIOD"
# The name under which the workers of one parent share limits that other hosts have no part of.
HOST = "AIOSERVER_HOST"
# The causes of the workers' deaths since the last worker was started.
DEATHS = "AIOSERVER_DEATHS"
# Seconds after which a worker without a server checks again how many connections its predecessors
# have.
LOOK = 0.1
NAMES = frozenset({"ear", "lifeline", "configuration", "loads"})
# The descriptor that parents of version 0.1.0 lack, whose secret can be guessed.
SESSIONS = "session_secret"


@dataclass(frozen=True, slots=True)
class Worker:
    """The identity of this process among *workers* processes. *slot*: from 0 to `slots - 1`.

    *period*: the seconds within which its parent expects a message. *server_url*: the parent's
    private server, through which the workers share limits and streams; None if it has none.
    *first*: whether it was started with the parent, so that no worker was there before. *host*:
    the common name of this parent's workers. *deaths*: the causes of the deaths of other workers,
    which it counts.
    """

    slot: int
    workers: int
    period: float
    descriptors: Mapping[str, int]
    server_url: str | None = None
    first: bool = False
    host: str = ""
    deaths: tuple[str, ...] = ()

    @classmethod
    def take(cls, environ: MutableMapping[str, str]) -> Self | None:
        """Return the worker that *environ* describes, and remove its variables.

        None if it describes none.

        There may be descriptors with other names, of a parent of another version.

        Raises:
            Unfit: the version of the parent is one whose shared memory this process cannot use, or
                whose sessions are not signed as they are here.
        """
        slot, _, workers = environ.pop(WORKER, "").partition("/")
        server_url, first = environ.pop(SERVER, "") or None, bool(environ.pop(FIRST, ""))
        descriptors = {}
        for item in environ.pop(DESCRIPTORS, "").split(","):
            name, _, number = item.partition("=")
            if name and number.isdigit():
                descriptors[name] = int(number)
        period, host = environ.pop(PERIOD, ""), environ.pop(HOST, "")
        if not (
            slot.isdigit()
            and workers.isdigit()
            and period.isdigit()
            and descriptors.keys() >= NAMES
        ):
            return None
        for descriptor in descriptors.values():
            # Not for the children of this process.
            os.set_inheritable(descriptor, False)
        other = None
        try:
            Loads(descriptors["loads"]).close()
        except OtherLayout:
            other = "whose workers share their places in another way"
        if SESSIONS not in descriptors:
            other = other or "that signs sessions in another way"
        if other is not None:
            raise Unfit(
                f"the parent process is of a version of aioserver {other}: restart the service, "
                "SIGUSR2 is not enough",
                1,
            )
        deaths = tuple(filter(None, environ.pop(DEATHS, "").split(",")))
        return cls(
            *(int(slot), int(workers), int(period) / 1e6, descriptors, server_url, first, host),
            deaths,
        )

    def variables(self) -> dict[str, str]:
        """Return the variables from which `take` makes this worker."""
        descriptors = ",".join(f"{name}={number}" for name, number in self.descriptors.items())
        return {
            WORKER: f"{self.slot}/{self.workers}",
            PERIOD: str(int(self.period * 1e6)),
            DESCRIPTORS: descriptors,
            **({} if self.server_url is None else {SERVER: self.server_url}),
            **({FIRST: "1"} if self.first else {}),
            HOST: self.host,
            DEATHS: ",".join(self.deaths),
        }

    @property
    def slots(self) -> int:
        """The number of slots."""
        return SLOTS_PER_WORKER * self.workers

    @property
    def rank(self) -> int:
        """The number, from 0, of this worker's share of each limit."""
        return self.slot % self.workers

    @property
    def scope(self) -> Scope:
        """The position of this worker among those of its parent."""
        return Scope(self.host, self.rank, self.workers, self.first)

    def content(self) -> bytes:
        """Return the content of the configuration file that was in effect when the worker was
        started.
        """
        return read(self.descriptors["configuration"])

    def session_secret(self) -> bytes:
        """Return the secret that signs browser sessions."""
        return read(self.descriptors[SESSIONS])

    def take_loads(self) -> Loads:
        """Take this worker's slot on the page of loads over, and return the page."""
        return Loads(self.descriptors["loads"], self.slot)

    def door_sharer(self, loads: Loads) -> Callable[[Scheduler, Resource, int], None]:
        """Return the function that divides the places in front of the handlers, if there is no
        server for that.
        """
        # The earlier workers of its rank. A worker that is gone does not come back, and its slot
        # may belong to a successor.
        before = set(range(self.rank, self.slots, self.workers)) - {self.slot}

        def predecessors() -> list[int]:
            before.intersection_update(loads.in_use())
            connections = loads.connections()
            return [connections[slot] for slot in before]

        def share(scheduler: Scheduler, door: Resource, limit: int) -> None:
            FixedCapacity(self.scope, predecessors, scheduler, door, limit)

        return share

    def balance(
        self,
        loads: Loads,
        on_gone: Callable[[int], None] = lambda _instance: None,
        on_replaced: Callable[[int, int], None] = lambda _kept, _cut: None,
    ) -> Balance:
        """Return the balance that decides when this worker accepts: see `Balance`."""
        return Balance(loads, on_gone, on_replaced)

    def notifier(self, status: Callable[[], str]) -> Notifier:
        """Return the notifier that reports this worker's state to the parent."""
        ear = socket.socket(fileno=self.descriptors["ear"])
        ear.setblocking(False)
        return Notifier(None, self.period, status, ear)

    def count_deaths(self, server: Server) -> None:
        """Count at *server*, which is this worker's, the workers that have died before."""
        for cause in self.deaths:
            if (counter := server.context.metrics.worker_deaths.get(cause)) is not None:
                counter.value += 1
                text = f"a worker has died ({cause}), and its running answers are lost"
                server.context.monitor.incident("worker_died", text, severity="error")

    def settings(self, whole: Settings) -> Settings:
        """Return *whole* with this worker's share of each limit."""
        clustered = self.server_url is not None or whole.cluster.redis_url is not None
        return share_out(whole, self.scope, clustered=clustered)


def as_file(name: str, content: bytes) -> int:
    """Return the descriptor of a file in memory with *content*, which processes can share."""
    descriptor = os.memfd_create(f"aioserver {name}")
    written = 0
    while written < len(content):
        written += os.pwrite(descriptor, content[written:], written)
    return descriptor


def read(descriptor: int) -> bytes:
    """Return the content of the file *descriptor*, whose position several processes share."""
    return os.pread(descriptor, os.fstat(descriptor).st_size, 0)


class FixedCapacity(Supply):
    """The places of *door* that the worker of *scope* has without a server: its share of all
    *limit* places, minus those that its predecessors still use.

    *before* returns the number of connections of each predecessor that may have some.
    """

    def __init__(
        self,
        scope: Scope,
        before: Callable[[], list[int]],
        scheduler: Scheduler,
        door: Resource,
        limit: int,
    ) -> None:
        self._scope, self._before = scope, before
        self._scheduler, self._door, self._limit = scheduler, door, limit
        door.attach(self)
        self._look()

    def apply(self, limit: int) -> None:
        """Use another limit, which is that of all workers together."""
        self._limit = limit
        self._resize()

    def share(self, size: int) -> int:
        """Return the fixed share of *size*."""
        return self._scope.share(size)

    def _resize(self) -> None:
        places = self._scope.share(self._limit) - sum(self._before())
        self._scheduler.resize(self._door, max(0, places))

    def _look(self) -> None:
        self._resize()
        if self._before() and self._door.closed is None:
            asyncio.get_running_loop().call_later(LOOK, self._look)


def share_out(settings: Settings, scope: Scope, *, clustered: bool = False) -> Settings:
    """Return *settings* in which each limit for all workers is replaced by the share of the worker
    of *scope*.

    *clustered*: the workers share the limits of providers and keys through a server. A provider's
    `max_connections` stays as it is: its `concurrent_requests` bounds the connections in use.

    Each worker may keep one whole body, answer or log, however many workers there are. If that is
    more than its share, all together may keep more than is configured.
    """
    part = scope.share

    def memory(limit: int, least: int) -> int:
        return max(part(limit), min(limit, least))

    def chat(whole: Chat) -> Chat:
        websocket, streams = whole.websocket, whole.streams
        concurrency = replace(
            websocket.concurrency,
            max_body_bytes=memory(
                websocket.concurrency.max_body_bytes, websocket.max_message_size
            ),
            # The limits are divided already.
            uvicorn=replace(websocket.concurrency.uvicorn, workers=1),
        )
        kept = max(streams.max_stream_bytes, streams.max_response_bytes)
        streams = replace(
            streams,
            max_kept_bytes=memory(streams.max_kept_bytes, kept),
            max_detached=part(streams.max_detached),
        )
        return replace(
            whole, websocket=replace(websocket, concurrency=concurrency), streams=streams
        )

    def provider(whole: Provider) -> Provider:
        client = whole.http_client
        client = replace(
            client, max_keepalive=part(client.max_keepalive), queue_size=part(client.queue_size)
        )
        if not clustered:
            client = replace(
                client,
                concurrent_requests=part(client.concurrent_requests),
                requests_per_minute=part(client.requests_per_minute),
                tokens_per_minute=part(client.tokens_per_minute),
            )
        return replace(whole, http_client=client)

    def llm(whole: Llm) -> Llm:
        return replace(
            whole,
            providers={name: provider(settings) for name, settings in whole.providers.items()},
        )

    def limits(whole: OfCaller) -> OfCaller:
        # Every number is a limit unless listed, so that none can be forgotten.
        shared: dict[str, Any] = {
            field.name: part(value)
            for field in fields(Limits)
            if type(value := getattr(whole, field.name)) is int
            and field.name not in NO_LIMITS
            and (field.name in OF_EACH or not clustered)
        }
        return replace(whole, **shared)

    def auth(whole: Auth) -> Auth:
        keys = None if whole.keys is None else tuple(map(limits, whole.keys))
        jwt = whole.jwt
        if jwt is not None:
            roles = {role: limits(each) for role, each in jwt.limits.items()}
            jwt = replace(jwt, limits=roles)
        return replace(whole, keys=keys, file_keys=tuple(map(limits, whole.file_keys)), jwt=jwt)

    return replace(
        settings,
        chat=chat(settings.chat),
        llm=llm(settings.llm),
        auth=None if settings.auth is None else auth(settings.auth),
    )
