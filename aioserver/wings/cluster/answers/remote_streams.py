"""The streams of all instances, for the gateway of one instance: see
`gateway.contracts.instances.Instances`.

    claim     decides (claims.py) whether this instance answers a request, mirrors another
              instance's answer, or reads the log of an instance that has stopped
    follow    fills a mirror of a stream of another instance
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
from aioserver.wings.cluster.answers.claims import (
    CONFLICT,
    KEPT,
    LEASE,
    NONE,
    OURS,
    RENEWAL,
    THEIRS,
    Claims,
    Renewal,
)
from aioserver.wings.cluster.answers.fan_out import FanOut
from aioserver.wings.cluster.answers.greeting import Cancel, Forget, Listing
from aioserver.wings.cluster.answers.handover import polled
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
    from aioserver.wings.cluster.answers.claims import Verdict
    from aioserver.wings.cluster.answers.greeting import Question
    from aioserver.wings.cluster.answers.peer_network import Network

# Claims that one call renews at most, and seconds for calls for whose answer no client waits.
MAX_RENEWED, CALL_TIMEOUT = 1_000, 1.0
# Owners that are asked for one id, one after the other, if each of them has lost it.
MAX_OWNERS = 3
# Seconds for which a mirror waits for its first reader, which may first wait for a place.
MAX_UNREAD = 60.0


class InstancesStats(msgspec.Struct, frozen=True):
    """A snapshot: running claims, links (logs read elsewhere), and mirrors (others' logs).

    *unclaimed* counts requests that were answered without a claim, since Redis did not answer in
    time.
    """

    claims: int
    links: int
    mirrors: int
    unclaimed: int


class RemoteStreams:
    """Finds streams at other instances, and lets them find those of this one.

    Always: each running stream of this instance that has a name is in `_claimed`, and its claim is
    renewed.

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
        self._claimed: dict[Stream, list[Renewal]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
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
            partial(PeerReader, context),
            lambda: admission.max_tunnels,
        )
        self._tunnels = Tunnels(self._network, self._secret, admission, gateway.hold)
        await self._listener.open()
        self._serves = True

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
            claims=len(self._claimed),
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

    async def route(
        self, caller: Caller, request_id: str, start: Start, lost: Lost | None
    ) -> Stream:
        """Return the caller's stream *request_id*, if no other instance has it.

        Raises:
            Elsewhere: another one has it.
            StreamNotFound, ResumeGap, ServerShutdown, InstanceUnavailable: as `Instances.route`.
        """
        verdict = await self._find(name_of(caller.name, request_id), lambda: None)
        if verdict is None:
            raise unknown("stream")
        if verdict.state != THEIRS or verdict.owner == self._me:
            return await self.reach(caller, request_id, start)
        if lost is not None and lost.owner == verdict.owner:
            raise lost.error
        raise Elsewhere(
            verdict.owner,
            partial(self._tunnels.forward, verdict.owner),
            partial(self._tunnels.follow, verdict.owner, caller, request_id, start),
        )

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
            if verdict is not None and verdict.state == KEPT:
                # The stream has ended already.
                return
            if verdict is not None and verdict.state == THEIRS and verdict.owner != self._me:
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

    async def _find(self, name: str, late: Callable[[], object]) -> Verdict | None:
        """Return the state of the claim *name*; None if Redis does not answer.

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
            if not remote.mirrored:
                self._note_end(stream)

    async def hand_over(self, finished: list[Stream]) -> None:
        """Store the logs that have ended in Redis for the other instances, as this one stops.

        *finished* has the newest stream first.
        """
        for stream, seconds, log in handover.chosen(finished):
            names = [stream.request_id, stream.alias]
            if isinstance(stream.error, ServerShutdown):
                # The request id must be free for a new answer.
                names = [stream.alias]
            for name in names:
                if name is not None and not stream.private:
                    await self._ask(
                        self._store.put_log(name_of(_caller(stream).name, name), log, seconds),
                        CALL_TIMEOUT,
                    )
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
        name, digest = _name(stream), stream.digest
        renewal = Renewal(name, digest, _seconds(stream))
        self._claimed[stream] = [renewal]
        self._watch()
        verdict: Verdict | None = await self._ask(self._store.take(name, digest, renewal.seconds))
        if verdict is None:
            self._unclaimed.value += 1
            return None
        for _ in range(MAX_OWNERS):
            filled = await self._filled(stream, verdict, accept)
            if filled is not None:
                return filled
            if verdict.state == OURS:
                return None
            # The owner has lost the stream.
            found = await self._ask(self._store.take(name, digest, renewal.seconds, verdict.owner))
            if found is None:
                return None
            verdict = found
        return None

    async def _filled(
        self, stream: Stream, verdict: Verdict, accept: Callable[[], None]
    ) -> asyncio.Future[None] | None:
        """Return a future for the end of the mirror *stream*; None if no instance has its log."""
        start = Start(digest=stream.digest)
        if verdict.state == CONFLICT:
            del self._claimed[stream]
            raise RequestConflict("this request id is already known, with another payload")

        def accepted() -> None:
            self._claimed.pop(stream, None)
            accept()

        if verdict.state == KEPT:
            log = await self._know(self._store.get_log(_name(stream)), "answer")
            if log is None:
                return None
            try:
                await handover.fill(stream, log, start, accepted, self.peers.apis)
            except StreamNotFound:
                return None
            done: asyncio.Future[None] = self._loop.create_future()
            done.set_result(None)
            return done
        if verdict.state == THEIRS:
            mirror = self.peers.attach(stream, verdict.owner, start, accepted)
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
        return None

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
        if verdict.state == KEPT:
            if start.digest is not None and start.digest != verdict.digest:
                raise RequestConflict("this request id is known, with another payload")
            log = await self._know(self._store.get_log(name), "stream")
            if log is not None:
                await handover.fill(stream, log, start, lambda: None, self.peers.apis)
                _remote(stream).decide()
                return
        if verdict.owner == self._me:
            # This happens only if the stream was claimed a moment ago.
            self.peers.gateway.find(_caller(stream), stream.request_id, start.digest)
            raise ResumeGap(f"event {start.after} does not exist yet")
        if verdict.state in {NONE, KEPT}:
            raise StreamNotFound(NOT_FOUND)
        mirror = self.peers.attach(stream, verdict.owner, start, lambda: None)
        try:
            await mirror.accepted
            _remote(stream).decide()
            await mirror.done
        finally:
            mirror.close()

    def _note_end(self, stream: Stream) -> None:
        """Note that *stream*, whose id was claimed, has ended."""
        claims = self._claimed.pop(stream, None)
        if claims is None:
            return
        # If there is no answer, or the end of the server cut it, the claim is given up, so that
        # the same request gets a new answer. Such a request may have taken the claim already.
        free = isinstance(stream.error, ServerShutdown) or (
            stream.end_status == ERROR and not stream.sent
        )
        if self._streams.find(_caller(stream), stream.request_id) not in {None, stream}:
            return
        kept = name_of(_caller(stream).name, stream.alias or "") if polled(stream) else None
        for claim in claims:
            gone = free and claim.name != kept
            claim.seconds, claim.done = 0.0 if gone else stream.window, True
        self._start(self._store.renew(claims))

    def aliased(self, stream: Stream, alias: str) -> None:
        """Claim *alias*, a second name of *stream*."""
        name = name_of(_caller(stream).name, alias)
        claim = Renewal(name, stream.digest, _seconds(stream))
        self._claimed.setdefault(stream, []).append(claim)
        if stream.remote is None:
            # The stream has no other name. Its end is noted like that of a claimed stream.
            stream.remote = Remote(self._loop.create_future())
            _remote(stream).decide()
        self._watch()
        self._start(self._store.renew([claim]))

    def _watch(self) -> None:
        if self._renewer is None:
            self._renewer = self._loop.call_later(RENEWAL, self._renew)

    def _renew(self) -> None:
        self._renewer = None
        claims = [claim for claims in self._claimed.values() for claim in claims]
        for start in range(0, len(claims), MAX_RENEWED):
            self._start(self._store.renew(claims[start : start + MAX_RENEWED]))
        if claims:
            self._watch()

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


def _seconds(stream: Stream) -> float:
    """Return the seconds for which a claim of a running *stream* outlives a renewal.

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
