"""The messages about streams between this instance and its peers, the other instances.

Other instances read logs of this one through links, and clients of this instance read logs of
others through mirrors. Mirrors ping the owners of their logs. A ping has the number of bytes that
were received, and its answer the number that were sent. In this way both sides notice a lost block,
lost credit or a lost end, and repeat it. An instance without links and mirrors sends no pings.

This file is long, but it is one concept: all messages between instances about streams.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from aioserver.auth.callers import Caller
from aioserver.errors import AioserverError, ResumeGap
from aioserver.telemetry.counters import Counter
from aioserver.wings.cluster.answers import log_codec
from aioserver.wings.cluster.answers.links import CREDIT, Link
from aioserver.wings.cluster.answers.mirrors import Mirror
from aioserver.wings.cluster.answers.peer_messages import (
    Attach,
    Block,
    Credit,
    Detach,
    Ping,
    Pong,
    Position,
    Refused,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from aioserver.gateway.contracts.instances import Start
    from aioserver.gateway.gateway import Gateway
    from aioserver.providers.api import Api
    from aioserver.streams.stream import Stream
    from aioserver.wings.cluster.answers.bus import Bus, MakeBus
    from aioserver.wings.cluster.answers.peer_messages import Message

logger = logging.getLogger("aioserver.cluster")

# Seconds between two pings. One lost ping does no harm.
PING = 0.5
# Seconds without a message from an owner, after which it counts as gone; and seconds without a
# message from a mirror, after which its link ends.
MAX_SILENCE, MAX_IDLE = 2.0, 6.0
# Seconds for which mirrors wait for our own connection to Redis.
MAX_AWAY = 10.0
# Seconds after which a message that no process received is followed by another one: the
# subscription of the instance may have been broken.
DEAF_AGAIN = 0.5
# Bytes that may be on their way to all mirrors of this instance together; each has at least
# MIN_CREDIT. By default Redis drops a subscriber with more than 32 MiB, or 8 MiB for a minute.
ALL_CREDIT, MIN_CREDIT = 1 << 23, 1 << 14
# Links of one instance at most.
MAX_LINKS = 10_000


class Peers:
    """The links and mirrors of this instance.

    Always: each link is a reader of its stream; the owner of each mirror that is not done is
    pinged.

    *make_bus* gets two callbacks: for a message, and for a message that no process has received.
    `serve` must be called first.
    """

    gateway: Gateway
    apis: Mapping[str, Api]

    def __init__(self, make_bus: MakeBus) -> None:
        self._loop = asyncio.get_running_loop()
        self._links: dict[tuple[str, int], Link] = {}
        self._mirrors: dict[int, Mirror] = {}
        self._numbers = 0
        # The time since which no process has received the messages to an instance, by its name.
        self._deaf_since: dict[str, float] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._due = self._connected_at = 0.0
        # Messages that could not be understood.
        self.refused = Counter()
        self.bus: Bus = make_bus(on_message=self._receive, on_deaf=self._deaf)

    def serve(self, gateway: Gateway, apis: Mapping[str, Api]) -> None:
        """Let others read the streams that *gateway* finds; *apis* are the APIs by path."""
        self.gateway, self.apis = gateway, apis

    @property
    def links(self) -> int:
        """The number of logs of this instance that other instances read."""
        return len(self._links)

    @property
    def mirrors(self) -> int:
        """The number of logs of other instances that this instance reads."""
        return len(self._mirrors)

    def attach(
        self, stream: Stream, owner: str, start: Start, on_accept: Callable[[], None]
    ) -> Mirror:
        """Return a mirror that fills *stream* with the log of *owner*."""
        mirror = Mirror(
            stream,
            owner,
            start,
            lambda message: self.bus.send(owner, message),
            self._number,
            self._credit,
            on_accept,
            self.apis,
        )
        mirror.done.add_done_callback(lambda _done: self._mirrors.pop(mirror.number, None))
        mirror.attach()
        self._watch()
        return mirror

    def close(self) -> None:
        """Close all links and mirrors."""
        if self._timer is not None:
            self._timer.cancel()
        for link in tuple(self._links.values()):
            self._close_link(link)
        for mirror in tuple(self._mirrors.values()):
            mirror.close()

    def _credit(self) -> int:
        """Return the bytes that may be on their way to one mirror. They are bounded, as Redis drops
        a subscriber for which too many bytes wait.
        """
        return max(MIN_CREDIT, min(CREDIT, ALL_CREDIT // max(1, len(self._mirrors))))

    def _number(self, mirror: Mirror) -> int:
        self._mirrors.pop(mirror.number, None)
        self._numbers += 1
        self._mirrors[self._numbers] = mirror
        return self._numbers

    def _receive(self, sender: str, message: Message) -> None:
        """Take in one message. The bus calls this, and no message may break the bus."""
        try:
            self._take(sender, message)
        except Exception:
            self.refused.value += 1
            logger.exception("bug in a message of another instance")

    def _take(self, sender: str, message: Message) -> None:
        self._deaf_since.pop(sender, None)
        match message:
            case Block() | Refused() | Position():
                self._receive_log(sender, message)
            case Attach():
                self._open_link(sender, message)
            case Credit():
                if (link := self._links.get((sender, message.link))) is not None:
                    link.extend(message.limit)
            case Detach():
                if (link := self._links.get((sender, message.link))) is not None:
                    self._close_link(link)
            case Ping():
                self._answer_ping(sender, message)
            case Pong():
                self._check_links(sender, message)

    def _receive_log(self, sender: str, message: Block | Refused | Position) -> None:
        mirror = self._mirrors.get(message.link)
        if mirror is None or mirror.owner != sender:
            return
        mirror.heard_at = self._loop.time()
        match message:
            case Block():
                mirror.receive(message)
            case Refused():
                mirror.refuse(message.fault)
            case Position():
                mirror.stream.report_position(message.position, message.eta, message.at)

    def _open_link(self, sender: str, attach: Attach) -> None:
        key = (sender, attach.link)
        if key in self._links or len(self._links) >= MAX_LINKS:
            return
        try:
            stream = self.gateway.find(Caller(attach.caller), attach.request_id, attach.digest)
            after = attach.after
            if attach.cancel:
                self.gateway.lifetime.end(stream, abandoned=False)
                after = stream.last - 1 if stream.ended else stream.last
            elif attach.sequence is not None:
                after = _event_before(stream, attach.sequence)
            elif after is None:
                after = stream.last
            link = Link(
                stream,
                attach.link,
                after,
                min(attach.credit, CREDIT),
                lambda message: self.bus.send(sender, message),
                self._close_link,
            )
        except AioserverError as error:
            self.bus.send(sender, Refused(attach.link, log_codec.pack_fault(error)))
            return
        link.heard_at = self._loop.time()
        link.peer = sender
        self._links[key] = link
        stream.add_reader(link)
        self.gateway.lifetime.reader_added(stream)
        link.notify()
        stream.note_passed()
        self._watch()

    def _close_link(self, link: Link) -> None:
        if link.closed:
            return
        link.closed = True
        del self._links[link.peer, link.number]
        stream = link.stream
        stream.remove_reader(link)
        self.gateway.lifetime.reader_removed(stream)

    def _answer_ping(self, sender: str, ping: Ping) -> None:
        links, gone = [], []
        for number, _received, limit in ping.links:
            link = self._links.get((sender, number))
            if link is None:
                gone.append(number)
            else:
                link.heard_at = self._loop.time()
                link.extend(limit)
                links.append((number, link.sent))
        self.bus.send(sender, Pong(links, gone))

    def _check_links(self, sender: str, pong: Pong) -> None:
        now = self._loop.time()
        for number, sent in pong.links:
            mirror = self._mirrors.get(number)
            if mirror is not None and mirror.owner == sender:
                mirror.heard_at = now
                mirror.check(sent)
        for number in pong.gone:
            mirror = self._mirrors.get(number)
            if mirror is not None and mirror.owner == sender:
                mirror.heard_at = now
                mirror.attach()

    def _deaf(self, target: str) -> None:
        """Note that no process has received a message to *target*. The bus calls this."""
        now = self._loop.time()
        since = self._deaf_since.get(target, now)
        if now - since > MAX_SILENCE:
            # The last such message was long ago.
            since = now
        self._deaf_since[target] = since
        mirrors = [mirror for mirror in self._mirrors.values() if mirror.owner == target]
        # A link that is closed without need may end an answer without another reader.
        links = [link for link in self._links.values() if link.peer == target]
        if now - since >= DEAF_AGAIN * 0.9:
            del self._deaf_since[target]
            for mirror in mirrors:
                mirror.lose()
            for link in links:
                self._close_link(link)
        elif since == now and (mirrors or links):
            self._loop.call_later(DEAF_AGAIN, self.bus.send, target, Ping([]))

    def _watch(self) -> None:
        if self._timer is None:
            if self.bus.connected:
                self._connected_at = self._loop.time()
            self._due = self._loop.time() + PING
            self._timer = self._loop.call_later(PING, self._tick)

    def _tick(self) -> None:
        self._timer = None
        now, late = self._loop.time(), self._loop.time() - self._due > PING
        if self.bus.connected:
            self._connected_at = now
        away = not self.bus.connected and now - self._connected_at < MAX_AWAY
        owners: dict[str, list[tuple[int, int, int]]] = {}
        for number, mirror in tuple(self._mirrors.items()):
            if late or (away and mirror.accepted.done()):
                # This instance has not received messages, so the owner is not to blame.
                mirror.heard_at = max(mirror.heard_at, now - PING)
            elif now - mirror.heard_at >= MAX_SILENCE:
                mirror.lose()
                continue
            place = (number, mirror.received, mirror.limit)
            owners.setdefault(mirror.owner, []).append(place)
        for owner, places in owners.items():
            self.bus.send(owner, Ping(places))
        for link in tuple(self._links.values()):
            if late or away:
                link.heard_at = max(link.heard_at, now - PING)
            elif now - link.heard_at >= MAX_IDLE:
                self._close_link(link)
        if self._links or self._mirrors:
            self._watch()


def _event_before(stream: Stream, sequence: int) -> int:
    """Return the number of the last event of a response whose sequence number is at most
    *sequence*.
    """
    number = stream.events.event_before(sequence, stream.last)
    if number is None:
        raise ResumeGap(f"event {sequence} does not exist yet")
    return number
