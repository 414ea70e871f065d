"""The streams of all instances, for the gateway of one instance: see
`gateway.contracts.instances.Instances`.

    claim     decides (claims.py) whether this instance answers a request, or passes it on
    route     finds the instance that has an answer
    cancel    asks the owner of the stream
    listing   asks all instances

If Redis cannot be reached, this instance answers every request itself, and knows only its own
streams.
"""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from aioserver.auth.callers import Caller
from aioserver.errors import InvalidApiKey, ServerShutdown, StreamNotFound
from aioserver.gateway.contracts.commands import KNOWN_TIMEOUT, name_of, unknown
from aioserver.gateway.contracts.instances import NOT_FOUND, Elsewhere
from aioserver.streams.entries import ERROR
from aioserver.telemetry.counters import Counter
from aioserver.wings.cluster.answers import kept_logs
from aioserver.wings.cluster.answers.claims import LEASE, RENEWAL, Claims
from aioserver.wings.cluster.answers.fan_out import FanOut
from aioserver.wings.cluster.answers.greeting import Cancel, Forget, Listing
from aioserver.wings.cluster.answers.kept_logs import polled
from aioserver.wings.cluster.answers.peer_listener import PeerListener
from aioserver.wings.cluster.answers.peer_reader import PeerReader
from aioserver.wings.cluster.answers.tunnels import Tunnels

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Coroutine, Iterator, Mapping, Sequence

    from aioserver.auth.callers import Peer
    from aioserver.faces.context import Context
    from aioserver.gateway.contracts.commands import Commands
    from aioserver.gateway.contracts.instances import Lost
    from aioserver.providers.request import Api
    from aioserver.streams.store import StreamStore
    from aioserver.streams.stream import Stream
    from aioserver.wings.cluster.answers.claims import Claim
    from aioserver.wings.cluster.answers.greeting import Question
    from aioserver.wings.cluster.answers.peer_network import PeerNetwork

# Seconds within which the id of a response that has begun is claimed.
UNCLAIMED = 0.02
# Claims that one call renews at most.
MAX_RENEWED = 1_000


class InstancesStats(msgspec.Struct, frozen=True):
    """A snapshot: links (answers of this instance that others read), and tunnels (answers of
    others that clients read here).

    *unclaimed* counts requests that were answered without a claim, since Redis did not answer in
    time.
    """

    links: int
    tunnels: int
    unclaimed: int


class RemoteStreams:
    """Finds streams at other instances, and lets them find those of this one, which is called *me*.

    Always: the claims to the names of running streams of this instance are renewed.

    `serve` must be called before anything is claimed. Instances ask each other by *network*, with
    the *secret* that all of them have; *on_look* returns a page for another one. *members* returns
    the names of the instances that this one knows of, for the case that Redis does not answer.
    """

    _streams: StreamStore
    _apis: Mapping[str, Api]
    _tunnels: Tunnels
    _listener: PeerListener

    def __init__(
        self,
        me: str,
        commands: Commands,
        network: PeerNetwork,
        secret: Callable[[], bytes],
        on_look: Callable[[str], bytes],
        members: Callable[[], Sequence[str]],
    ) -> None:
        self._me = me
        self._commands = commands
        self._ask, self._know = commands.ask, commands.know
        self._store = Claims(commands, me)
        self._members = members
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[object]] = set()
        # By name: the ids that are being claimed, or whose requests have no stream yet.
        self._claiming: dict[str, list[asyncio.Future[None]]] = {}
        self._renewer: asyncio.TimerHandle | None = None
        self._unclaimed = Counter()
        self._network, self._secret, self._on_look = network, secret, on_look
        self.fan_out = FanOut(network, secret)

    async def serve(self, context: Context) -> None:
        """Let other instances read the streams of this one. It is called once."""
        gateway, admission = context.gateway, context.admission
        self._streams, self._apis = gateway.lifetime.store, context.apis
        stranger = InvalidApiKey("no secret of an instance")
        self._listener = PeerListener(
            gateway,
            self._network,
            self._secret,
            self._on_look,
            partial(admission.metrics.count_error, stranger),
            partial(PeerReader, context, self._claims_under_way),
            lambda: admission.max_tunnels,
        )
        self._tunnels = Tunnels(self._network, self._secret, admission, gateway.hold)
        await self._listener.open()
        self._renewer = self._loop.call_later(RENEWAL, self._renew)

    def listen(self, accept: Callable[[Peer], asyncio.Protocol]) -> None:
        """Let other instances pass requests on, each to a protocol that *accept* returns."""
        self._listener.accept = accept

    async def finish(self, seconds: float) -> None:
        """Wait until no other instance reads an answer here, *seconds* at most."""
        if self._renewer is not None:
            await self._listener.finish(seconds)

    def stats(self) -> InstancesStats:
        """Return a snapshot."""
        return InstancesStats(
            links=self._listener.serving,
            tunnels=len(self._tunnels),
            unclaimed=int(self._unclaimed.value),
        )

    def keep(self, members: Collection[str]) -> None:
        """Stop reading the answers of owners that are not among *members*, the present members."""
        self._tunnels.keep(members)

    # The owner of an id.

    async def claim(self, caller: Caller, request_id: str, lost: Lost | None) -> None:
        """Claim *request_id* for this instance, unless another one has it; see `Instances`.

        Raises:
            Elsewhere: another instance has it.
            InstanceUnavailable, ServerAtCapacity: the log that an instance has handed over cannot
                be read, or there is no room for it.
        """
        name = name_of(caller.name, request_id)
        with self.claiming(caller, request_id):
            claim = await self._ask(self._store.take(name, "" if lost is None else lost.owner))
            if claim is None:
                self._unclaimed.value += 1
            elif claim.owner != self._me:
                raise self._elsewhere(claim, caller, request_id)
            elif claim.seconds:
                await self._adopt(caller, request_id, claim)

    @contextmanager
    def claiming(self, caller: Caller, request_id: str) -> Iterator[None]:
        """Let the readers of other instances wait within the `with`: see `Instances`."""
        name, claiming = name_of(caller.name, request_id), self._loop.create_future()
        requests = self._claiming.setdefault(name, [])
        requests.append(claiming)
        try:
            yield
        finally:
            # They go on when the answer has begun.
            claiming.set_result(None)
            requests.remove(claiming)
            if not requests:
                del self._claiming[name]

    def _claims_under_way(self, caller: Caller, request_id: str) -> asyncio.Future[None] | None:
        """Return a future that is done once a request with this id is claimed, and has a place
        here; None if there is no such request.
        """
        requests = self._claiming.get(name_of(caller.name, request_id))
        return requests[-1] if requests else None

    async def route(self, caller: Caller, request_id: str, lost: Lost | None) -> Stream:
        """Return the caller's stream *request_id*, if no other instance has it.

        Raises:
            Elsewhere: another one has it.
            StreamNotFound, ServerShutdown, InstanceUnavailable, ServerAtCapacity: as
                `Instances.route`.
        """
        name, owner = name_of(caller.name, request_id), "" if lost is None else lost.owner
        claim = await self._know(self._store.find(name, owner), "stream")
        if not (claim.owner or claim.seconds or lost):
            # A client may know the id that a provider has just made before its owner has claimed it.
            await asyncio.sleep(UNCLAIMED)
            claim = await self._know(self._store.find(name, owner), "stream")
        if claim.seconds:
            # Of several that find a log, one adopts it.
            claim = await self._know(self._store.take(name, owner), "stream")
        if lost is not None and claim.owner == lost.owner:
            raise lost.error
        if claim.owner not in ("", self._me):
            raise self._elsewhere(claim, caller, request_id)
        stream = await self._adopt(caller, request_id, claim) if claim.seconds else None
        # It may have begun here a moment ago.
        if stream is None and (stream := self._streams.find(caller, request_id)) is None:
            raise StreamNotFound(NOT_FOUND)
        return stream

    def _elsewhere(self, claim: Claim, caller: Caller, request_id: str) -> Elsewhere:
        tunnels = self._tunnels
        follow = partial(tunnels.follow, claim.owner, caller, request_id)
        return Elsewhere(claim.owner, tunnels.forward, follow)

    async def _adopt(self, caller: Caller, request_id: str, claim: Claim) -> Stream | None:
        """Return the stream that has the log of an instance that has ended; None if it is gone.

        Raises:
            InstanceUnavailable: Redis does not answer.
            ServerAtCapacity: there is no room for it.
        """
        name, streams = name_of(caller.name, request_id), self._streams
        log = await self._know(self._store.get_log(name), "answer")
        if log is None or (kept := kept_logs.read(log)) is None:
            return None
        entries = await kept_logs.entries_of(kept)
        if (known := streams.find(caller, request_id)) is not None:
            # Another request has adopted it meanwhile.
            return known
        stream = kept_logs.adopt(
            kept, entries, streams, caller, request_id, claim.seconds, self._apis
        )
        self._start(self._store.renew({name: stream.window}))
        return stream

    # Questions to others.

    async def cancel(self, caller: Caller, request_id: str) -> None:
        """Cancel a stream of another instance.

        Raises:
            StreamNotFound: there is no such stream.
            InstanceUnavailable: it is not known whether there is such a stream.
        """
        name = name_of(caller.name, request_id)
        claim = await self._ask(self._store.find(name))
        if claim is not None:
            targets = [claim.owner] if claim.owner else []
        else:
            # It takes long to find out who has it, and a running answer costs money.
            targets = [member for member in self._members() if member != self._me]
        answers, complete = await self._answers(targets, Cancel(caller.name, request_id))
        if True in answers:
            return
        if claim is None:
            claim = await self._know(self._store.find(name), "stream")
            complete = complete and (not claim.owner or claim.owner in targets)
        # A log that was handed over has ended already.
        if not claim.seconds:
            raise StreamNotFound(NOT_FOUND) if complete else unknown("stream")

    async def listing(self, caller: Caller) -> tuple[list[dict[str, Any]], bool]:
        """Return the streams of the caller at the other instances, and whether one did not answer."""
        others, certain = await self._others()
        answers, complete = await self._answers(others, Listing(caller.name, caller.subflow))
        return [entry for answer in answers for entry in answer], not (certain and complete)

    async def forget(self, caller: Caller, name: str) -> bool:
        """Delete a stored answer at every other instance; return whether one had it.

        Raises:
            InstanceUnavailable: an instance has not answered, or not all of them are known.
        """
        others, certain = await self._others()
        # Otherwise an instance would adopt it again.
        await self._know(self._store.drop_log(name_of(caller.name, name)), "response")
        answers, complete = await self._answers(others, Forget(caller.name, name))
        if not (complete and certain):
            raise unknown("response")
        return True in answers

    async def _answers(self, targets: Sequence[str], question: Question) -> tuple[list[Any], bool]:
        """Return the answers of *targets* to *question*, and whether none is missing."""
        asked = await self.fan_out.ask(targets, question)
        return asked.values(), not asked.missing

    async def _others(self) -> tuple[Sequence[str], bool]:
        """Return the names of the other instances, and whether the list is certain."""
        members = await self._ask(self._store.members(), KNOWN_TIMEOUT)
        known = self._members() if members is None else members
        return [member for member in known if member != self._me], members is not None

    # Claims of streams that run here.

    def aliased(self, stream: Stream, alias: str) -> None:
        """Claim *alias*, a second name of *stream*."""
        self._start(self._store.renew({name_of(_caller(stream).name, alias): _seconds(stream)}))

    def ended(self, stream: Stream) -> None:
        """Note that the producer of *stream* has ended: its claims last as long as its log."""
        caller = _caller(stream)
        if stream.private or self._streams.find(caller, stream.request_id) not in {None, stream}:
            # It has no name, or its id has a new answer.
            return
        # If there is no answer, or the end of the server cut it, the claim is given up, so that
        # the same request gets a new answer. Such a request may have taken the claim already.
        free = isinstance(stream.error, ServerShutdown) or (
            stream.end_status == ERROR and not stream.sent
        )
        claims = dict.fromkeys(_names(stream), 0.0 if free else stream.window)
        if free and polled(stream) and stream.alias is not None:
            claims[name_of(caller.name, stream.alias)] = stream.window
        self._start(self._store.renew(claims))

    def renew(self) -> None:
        """Renew the claims to the names of all running streams."""
        claims = [
            (name, _seconds(stream))
            for stream in self._streams.running()
            if not stream.private
            for name in _names(stream)
        ]
        for start in range(0, len(claims), MAX_RENEWED):
            self._start(self._store.renew(dict(claims[start : start + MAX_RENEWED])))

    def _renew(self) -> None:
        self._renewer = self._loop.call_later(RENEWAL, self._renew)
        self.renew()

    def _start(self, call: Coroutine[Any, Any, object]) -> None:
        task = self._loop.create_task(self._commands.tell(call))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # The end.

    async def hand_over(self, finished: list[Stream]) -> None:
        """Store the logs that have ended in Redis for the other instances, as this one stops.

        *finished* has the newest stream first.
        """
        for stream, seconds, log in kept_logs.chosen(finished):
            for name in kept_logs.names_of(stream):
                put = self._store.put_log(name_of(_caller(stream).name, name), log, seconds)
                await self._commands.tell(put)
                if self._commands.away:
                    return

    async def close(self) -> None:
        """Hand over the logs that have ended, and leave. The gateway must be closed before."""
        if self._renewer is None:
            return
        finished = [stream for stream in self._streams.finished() if not stream.private]
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=KNOWN_TIMEOUT)
        await self.hand_over(finished[::-1])
        self._renewer.cancel()
        for task in tuple(self._tasks):
            task.cancel()
        self._listener.close()


def _caller(stream: Stream) -> Caller:
    caller = stream.caller
    assert isinstance(caller, Caller)
    return caller


def _names(stream: Stream) -> list[str]:
    """Return the names of the claims to the ids of *stream*."""
    caller = _caller(stream).name
    return [name_of(caller, name) for name in (stream.request_id, stream.alias) if name]


def _seconds(stream: Stream) -> float:
    """Return the seconds for which a claim of *stream* outlives a renewal.

    If the message of its end is lost, the claim must last for the window of the log. The window of
    an answer in the background is long. Its claim ends earlier, so that polling clients soon get an
    error if the owner has crashed.
    """
    return LEASE + (min(stream.window, LEASE) if stream.background else stream.window)
