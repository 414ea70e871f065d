"""The streams of all instances, for the gateway of one instance: see
`gateway.contracts.instances.Instances`.

    claim     decides (claims.py) whether this instance answers a request, or passes it on
    route     finds the instance that has an answer
    cancel    asks the owner of the stream
    listing   asks all instances

If Redis cannot be reached, this instance answers every request itself, and knows only its own
streams.

This file is long, but it is one concept: how every instance finds the one log of a request id.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from aioserver.auth.callers import Caller
from aioserver.errors import (
    InvalidApiKey,
    RequestConflict,
    ResumeGap,
    ServerShutdown,
    StreamNotFound,
)
from aioserver.gateway.contracts.commands import KNOWN_TIMEOUT, TIMEOUT, name_of, unknown
from aioserver.gateway.contracts.instances import NOT_FOUND, Elsewhere, Start
from aioserver.streams.entries import ERROR
from aioserver.streams.stream import Remote
from aioserver.telemetry.counters import Counter
from aioserver.wings.cluster.answers import handover
from aioserver.wings.cluster.answers.claims import LEASE, RENEWAL, Claims
from aioserver.wings.cluster.answers.fan_out import FanOut
from aioserver.wings.cluster.answers.greeting import Cancel, Forget, Listing
from aioserver.wings.cluster.answers.handover import KeptLog, polled
from aioserver.wings.cluster.answers.peer_listener import PeerListener
from aioserver.wings.cluster.answers.peer_reader import PeerReader
from aioserver.wings.cluster.answers.peers import Peers
from aioserver.wings.cluster.answers.tunnels import Tunnels

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Coroutine, Sequence

    from aioserver.auth.callers import Peer
    from aioserver.faces.context import Context
    from aioserver.gateway.contracts.commands import Commands
    from aioserver.gateway.contracts.instances import Lost
    from aioserver.gateway.gateway import Gateway
    from aioserver.gateway.request import Request
    from aioserver.streams.store import StreamStore
    from aioserver.streams.stream import Stream
    from aioserver.wings.cluster.answers.bus import MakeBus
    from aioserver.wings.cluster.answers.claims import Claim
    from aioserver.wings.cluster.answers.greeting import Question
    from aioserver.wings.cluster.answers.peer_network import Network

# Claims that one call renews at most, and seconds for calls for whose answer no client waits.
MAX_RENEWED, CALL_TIMEOUT = 1_000, 1.0
# Owners that are asked for one id, one after the other, if each of them has lost it.
MAX_OWNERS = 3
# Seconds for which a mirror waits for its first reader, which may first wait for a place.
MAX_UNREAD = 60.0


class InstancesStats(msgspec.Struct, frozen=True):
    """A snapshot: links (logs read elsewhere), and mirrors (others' logs).

    *unclaimed* counts requests that were answered without a claim, since Redis did not answer in
    time.
    """

    links: int
    mirrors: int
    unclaimed: int


class RemoteStreams:
    """Finds streams at other instances, and lets them find those of this one.

    Always: the claims to the names of running streams of this instance are renewed.

    `serve` must be called before anything is claimed. Instances ask each other by *network*, with
    the *secret* that all of them have; *on_look* returns a page for another one. *members* returns
    the names of the instances that this one knows of, for the case that Redis does not answer.
    """

    _gateway: Gateway
    _streams: StreamStore
    _tunnels: Tunnels
    _listener: PeerListener

    def __init__(
        self,
        make_bus: MakeBus,
        commands: Commands,
        network: Network,
        secret: Callable[[], bytes],
        on_look: Callable[[str], bytes],
        members: Callable[[], Sequence[str]] = tuple,
    ) -> None:
        self._commands = commands
        self._ask, self._know = commands.ask, commands.know
        self._members = members
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        # By name: the ids that are being claimed.
        self._claiming: dict[str, asyncio.Future[None]] = {}
        self._renewer: asyncio.TimerHandle | None = None
        self._unclaimed = Counter()
        self._network, self._secret, self._on_look = network, secret, on_look
        self.fan_out = FanOut(network, secret)
        self._serves = False
        self.peers = Peers(make_bus)
        self._me = self.peers.bus.name
        self._store = Claims(commands, self._me)

    async def serve(self, context: Context) -> None:
        """Let other instances read the streams of this one. It is called once."""
        self._gateway = gateway = context.gateway
        self._streams = gateway.lifetime.store
        self.peers.serve(gateway, context.apis)
        admission = context.admission
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
        self._serves = True
        self._renewer = self._loop.call_later(RENEWAL, self._renew)

    def listen(self, accept: Callable[[Peer], asyncio.Protocol]) -> None:
        """Let other instances pass requests on, each to a protocol that *accept* returns."""
        self._listener.accept = accept

    async def finish(self, seconds: float) -> None:
        """Wait until no other instance reads an answer here, *seconds* at most."""
        if self._serves:
            await self._listener.finish(seconds)

    def stats(self) -> InstancesStats:
        """Return a snapshot."""
        return InstancesStats(
            links=self.peers.links + self._listener.serving,
            mirrors=self.peers.mirrors + len(self._tunnels),
            unclaimed=int(self._unclaimed.value),
        )

    def claiming(
        self,
        stream: Stream,
        request: Request,
        producer: Coroutine[Any, Any, None],
        release: Callable[[], None],
    ) -> tuple[Coroutine[Any, Any, None], Callable[[], None]]:
        """Return a producer that claims the id of *stream* and then runs *producer*, and the
        function that releases both. *release* releases *producer*.
        """
        stream.remote = Remote(self._loop.create_future())

        def release_all() -> None:
            # The coroutine may never have started.
            producer.close()
            release()

        return self._claim(stream, request, producer), release_all

    def mirror(self, caller: Caller, request_id: str, start: Start) -> Stream:
        """Return a mirror of the caller's stream *request_id*, which ends soon if there is none.

        Raises:
            ServerAtCapacity: there is no room for the mirror.
        """
        stream = self._streams.open_mirror(request_id, caller, after=start.after or 0)
        try:
            _remote(stream).claimed = self._loop.create_future()
            self._gateway.lifetime.expect(stream, MAX_UNREAD)
            self._gateway.producers.start(stream, self._follow(stream, start), _nothing)
        except BaseException:
            self._streams.drop(stream)
            raise
        return stream

    async def reach(self, caller: Caller, request_id: str, start: Start) -> Stream:
        """Return a mirror, as `mirror` does, but only once its stream is known to exist.

        Raises:
            StreamNotFound, RequestConflict, ResumeGap, ServerShutdown: as `Instances.reach`.
        """
        stream = self.mirror(caller, request_id, start)
        await self.claimed(stream)
        return stream

    def keep(self, members: Collection[str]) -> None:
        """Read no answer any more of an owner that is none of *members*, those of now."""
        self._tunnels.keep(members)

    async def claim(
        self, caller: Caller, request_id: str, start: Start, lost: Lost | None
    ) -> None:
        """Claim *request_id* for this instance, unless another one has it; see `Instances`.

        Raises:
            Elsewhere: another instance has it.
            InstanceUnavailable, ServerAtCapacity: the log that an instance has handed over cannot
                be read, or there is no room for it.
        """
        name = name_of(caller.name, request_id)
        claiming = self._claiming[name] = self._loop.create_future()
        try:
            claim = await self._ask(self._store.take(name, "" if lost is None else lost.owner))
            if claim is None:
                self._unclaimed.value += 1
            elif claim.owner != self._me:
                raise self._elsewhere(claim, caller, request_id, start)
            elif claim.seconds:
                await self._adopt(caller, request_id, claim)
        finally:
            # Whoever waits for it goes on when the answer has begun.
            claiming.set_result(None)
            if self._claiming.get(name) is claiming:
                del self._claiming[name]

    def _claims_under_way(self, caller: Caller, request_id: str) -> asyncio.Future[None] | None:
        """Return what is done once an id is claimed; None if it is not being claimed here."""
        return self._claiming.get(name_of(caller.name, request_id))

    async def route(
        self, caller: Caller, request_id: str, start: Start, lost: Lost | None
    ) -> Stream:
        """Return the caller's stream *request_id*, if no other instance has it.

        Raises:
            Elsewhere: another one has it.
            StreamNotFound, ServerShutdown, InstanceUnavailable, ServerAtCapacity: as
                `Instances.route`.
        """
        name, owner = name_of(caller.name, request_id), "" if lost is None else lost.owner
        claim = await self._know(self._store.find(name, owner), "stream")
        if claim.seconds:
            # Of several that find a log, one adopts it.
            claim = await self._know(self._store.take(name, owner), "stream")
        if lost is not None and claim.owner == lost.owner:
            raise lost.error
        if claim.owner not in ("", self._me):
            raise self._elsewhere(claim, caller, request_id, start)
        stream = await self._adopt(caller, request_id, claim) if claim.seconds else None
        # It may have begun here a moment ago.
        if stream is None and (stream := self._streams.find(caller, request_id)) is None:
            raise StreamNotFound(NOT_FOUND)
        return stream

    def _elsewhere(self, claim: Claim, caller: Caller, request_id: str, start: Start) -> Elsewhere:
        tunnels = self._tunnels
        follow = partial(tunnels.follow, claim.owner, caller, request_id, start)
        return Elsewhere(claim.owner, tunnels.forward, follow)

    async def _adopt(self, caller: Caller, request_id: str, claim: Claim) -> Stream | None:
        """Return the stream that has the log of an instance that has ended; None if it is gone.

        Raises:
            InstanceUnavailable: Redis does not answer.
            ServerAtCapacity: there is no room for it.
        """
        name = name_of(caller.name, request_id)
        kept = await self._kept(name)
        if (known := self._streams.find(caller, request_id)) is not None or kept is None:
            # Another request has adopted it meanwhile.
            return known
        stream = handover.adopt(
            kept, self._streams, caller, request_id, claim.seconds, self.peers.apis
        )
        self._start(self._store.renew({name: stream.window}))
        return stream

    async def _kept(self, name: str) -> KeptLog | None:
        log = await self._know(self._store.get_log(name), "answer")
        return None if log is None else await handover.read(log)

    async def claimed(self, stream: Stream) -> None:
        """Wait until it is decided whether *stream* is answered here or elsewhere.

        Raises:
            AioserverError: no instance answers it.
        """
        if stream.remote is None or (claimed := stream.remote.claimed) is None:
            return
        try:
            await asyncio.wait((claimed,))
        except asyncio.CancelledError:
            if stream.mirrored:
                self._gateway.lifetime.let_go(stream)
            elif not stream.readers:
                self._gateway.lifetime.reader_removed(stream)
            raise
        if (error := claimed.result()) is not None:
            raise error

    async def cancel(self, caller: Caller, request_id: str) -> None:
        """Cancel a stream of another instance.

        Raises:
            StreamNotFound: there is no such stream.
            InstanceUnavailable: it is not known whether there is such a stream.
        """
        telling: list[asyncio.Task[tuple[list[Any], bool]]] = []

        def tell() -> None:
            telling.append(self._loop.create_task(self._tell(caller, request_id)))

        try:
            verdict = await self._find(name_of(caller.name, request_id), tell)
            if verdict is not None and verdict.seconds:
                # The stream has ended already.
                return
            if verdict is not None and verdict.owner:
                asked = Cancel(caller.name, request_id)
                answers, complete = await self._answers([verdict.owner], asked)
            elif telling:
                answers, complete = await telling[0]
                complete = complete and verdict is not None
            else:
                answers, complete = [], verdict is not None
        finally:
            for task in telling:
                task.cancel()
        if True not in answers:
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
        answers, complete = await self._answers(others, Forget(caller.name, name))
        if not (complete and certain):
            raise unknown("response")
        return True in answers

    async def _find(self, name: str, late: Callable[[], object]) -> Claim | None:
        """Return the claim of another instance to *name*; None if Redis does not answer.

        *late* is called if the answer takes longer than TIMEOUT.
        """
        finding = self._loop.create_task(self._ask(self._store.find(name), KNOWN_TIMEOUT))
        try:
            found, _ = await asyncio.wait((finding,), timeout=TIMEOUT)
            if not found:
                late()
            return await finding
        finally:
            finding.cancel()

    async def _tell(self, caller: Caller, request_id: str) -> tuple[list[Any], bool]:
        """Let each instance cancel a stream, if it has it. It takes long to find out which one has
        it, and a running answer costs money.
        """
        others = [member for member in self._members() if member != self._me]
        return await self._answers(others, Cancel(caller.name, request_id))

    async def _answers(self, targets: Sequence[str], question: Question) -> tuple[list[Any], bool]:
        """Return the answers of *targets* to *question*, and whether none is missing."""
        asked = await self.fan_out.ask(targets, question)
        return asked.values(), not asked.missing

    async def _others(self) -> tuple[Sequence[str], bool]:
        """Return the names of the other instances, and whether the list is certain."""
        members = await self._ask(self._store.members(), KNOWN_TIMEOUT)
        known = self._members() if members is None else members
        return [member for member in known if member != self._me], members is not None

    def ended(self, stream: Stream) -> None:
        """Note that the producer of *stream* has ended."""
        remote = stream.remote
        if remote is not None and remote.claimed is not None:
            refused = remote.undecided
            remote.decide(stream.error or StreamNotFound("this answer was cancelled"))
            if refused:
                # There is no such log: the only event is an error without a reader.
                self._gateway.lifetime.let_go(stream)
        if not (stream.private or stream.mirrored):
            self._note_end(stream)

    async def hand_over(self, finished: list[Stream]) -> None:
        """Store the logs that have ended in Redis for the other instances, as this one stops.

        *finished* has the newest stream first.
        """
        for stream, seconds, log in handover.chosen(finished):
            for name in handover.names_of(stream):
                put = self._store.put_log(name_of(_caller(stream).name, name), log, seconds)
                await self._ask(put, CALL_TIMEOUT)
                if self._commands.away:
                    return

    async def close(self) -> None:
        """Hand over the logs that have ended, and leave. The gateway must be closed before."""
        finished = [stream for stream in self._streams.finished() if not stream.private]
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=CALL_TIMEOUT)
        await self.hand_over(finished[::-1])
        if self._renewer is not None:
            self._renewer.cancel()
        for task in tuple(self._tasks):
            task.cancel()
        self.peers.close()
        if self._serves:
            self._listener.close()

    async def _claim(
        self,
        stream: Stream,
        request: Request,
        producer: Coroutine[Any, Any, None],
    ) -> None:
        try:
            filled = await self._claimed_elsewhere(
                stream, partial(self._become_mirror, stream, request)
            )
        except RequestConflict:
            # A request with the payload that belongs to this id may still use it.
            self._streams.hide(stream)
            _remote(stream).mirrored = False
            raise
        _remote(stream).decide()
        if filled is not None:
            await filled
            return
        await producer

    async def _claimed_elsewhere(
        self, stream: Stream, accept: Callable[[], None]
    ) -> asyncio.Future[None] | None:
        """Claim the request id of *stream* for this instance.

        Return None if this instance has to make the answer. Otherwise another instance has it,
        *accept* was called, and its events come to *stream*; the returned future is done at its
        end. Cancelling is safe.

        Raises:
            RequestConflict: another instance has claimed the id with another payload.
        """
        name, lost = _name(stream), ""
        for _ in range(MAX_OWNERS):
            claim: Claim | None = await self._ask(self._store.take(name, lost))
            if claim is None:
                if not lost:
                    self._unclaimed.value += 1
                return None
            if (filled := await self._filled(stream, claim, accept)) is not None:
                return filled
            if claim.owner == self._me:
                return None
            # The owner has lost the stream.
            lost = claim.owner
        return None

    async def _filled(
        self, stream: Stream, claim: Claim, accept: Callable[[], None]
    ) -> asyncio.Future[None] | None:
        """Return a future for the end of the mirror *stream*; None if no instance has its log."""
        start = Start(digest=stream.digest)
        if claim.owner == self._me:
            kept = await self._kept(_name(stream)) if claim.seconds else None
            if kept is None:
                return None
            handover.fill_mirror(stream, kept, start, accept, self.peers.apis)
            done: asyncio.Future[None] = self._loop.create_future()
            done.set_result(None)
            return done
        mirror = self.peers.attach(stream, claim.owner, start, accept)
        try:
            await mirror.accepted
        except (StreamNotFound, ServerShutdown):
            if stream.mirrored:
                # The owner had the log, and was lost before all of the log was here.
                raise
            return None
        except BaseException:
            mirror.close()
            raise
        return mirror.done

    def _become_mirror(self, stream: Stream, request: Request) -> None:
        """Note that another instance has the answer, so that *stream* is only a mirror of it."""
        self._streams.hide(stream)
        self._gateway.lifetime.leave_background(stream)
        request.forget_grant()
        request.provider_request.forget_body()
        self._gateway.lifetime.expect(stream, MAX_UNREAD)

    async def _follow(self, stream: Stream, start: Start) -> None:
        """Fill the mirror *stream*, and decide its claim once its log is known to exist.

        Raises:
            StreamNotFound: no instance has such a log.
            RequestConflict, ResumeGap, ServerShutdown, InstanceUnavailable: as `Instances.reach`.
        """
        name = _name(stream)

        def tell() -> None:
            if start.cancel:
                self._start(self._tell(_caller(stream), stream.request_id))

        # Only Redis knows the owner, so this call may take long.
        verdict = await self._find(name, tell)
        if verdict is None:
            raise unknown("stream")
        if verdict.seconds and (kept := await self._kept(name)) is not None:
            handover.fill_mirror(stream, kept, start, lambda: None, self.peers.apis)
            _remote(stream).decide()
            return
        if not verdict.owner:
            # It may have begun here a moment ago.
            self.peers.gateway.find(_caller(stream), stream.request_id, start.digest)
            raise ResumeGap(f"event {start.after} does not exist yet")
        mirror = self.peers.attach(stream, verdict.owner, start, lambda: None)
        try:
            await mirror.accepted
            _remote(stream).decide()
            await mirror.done
        finally:
            mirror.close()

    def _note_end(self, stream: Stream) -> None:
        """Note that *stream*, whose id was claimed, has ended."""
        caller = _caller(stream)
        if self._streams.find(caller, stream.request_id) not in {None, stream}:
            # Its id has a new answer.
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

    def aliased(self, stream: Stream, alias: str) -> None:
        """Claim *alias*, a second name of *stream*."""
        self._start(self._store.renew({name_of(_caller(stream).name, alias): _seconds(stream)}))

    def renew(self) -> None:
        """Renew the claims to the names of all running streams."""
        claims = [
            (name, _seconds(stream))
            for stream in self._streams.running()
            if not (stream.private or stream.undecided)
            for name in _names(stream)
        ]
        for start in range(0, len(claims), MAX_RENEWED):
            self._start(self._store.renew(dict(claims[start : start + MAX_RENEWED])))

    def _renew(self) -> None:
        self._renewer = self._loop.call_later(RENEWAL, self._renew)
        self.renew()

    def _start(self, call: Coroutine[Any, Any, object]) -> None:
        task = self._loop.create_task(self._quietly(call))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _quietly(self, call: Coroutine[Any, Any, object]) -> None:
        await self._ask(call, CALL_TIMEOUT)


def _caller(stream: Stream) -> Caller:
    caller = stream.caller
    assert isinstance(caller, Caller)
    return caller


def _name(stream: Stream) -> str:
    return name_of(_caller(stream).name, stream.request_id)


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


def _nothing() -> None:
    """Release nothing: a mirror has no request."""


def _remote(stream: Stream) -> Remote:
    """Return the remote state of *stream*, which must be claimed or a mirror."""
    assert stream.remote is not None
    return stream.remote
