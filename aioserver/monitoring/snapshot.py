"""The snapshot: the state of the server at one moment, for `/stats`, `/events` and `/metrics`.

Everything is read from counters and from `stats()`. No loop goes over all clients. One goes over
the requests that providers answer now, since no counter has a silence that still lasts. Values that
cannot be read at one moment, such as rates, are those of the last interval.

The meaning of each field is in docs/monitoring.md.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from aioserver import __version__
from aioserver.config.llm import AUTO, BRIDGE
from aioserver.limits.fair_queue import BATCH, INTERACTIVE
from aioserver.monitoring.groups import member_state
from aioserver.monitoring.interval import ATTEMPTS, EVENTS, REJECTIONS, REQUESTS
from aioserver.telemetry.counters import quotient_of
from aioserver.telemetry.kernel import process_usage
from aioserver.telemetry.metrics import CACHED_SHARE, CANCELLED, CONTINUED, KNOWN_SHARE, OK
from aioserver.telemetry.outcome import HOME, NEW, OTHER

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Mapping, Sequence

    from aioserver.config.settings import Chat
    from aioserver.gateway.groups import Group
    from aioserver.gateway.router import Router
    from aioserver.limits.resource import Resource
    from aioserver.monitoring.interval import Interval
    from aioserver.monitoring.section import Section
    from aioserver.monitoring.state import (
        Alert,
        ConnectionsState,
        FormerState,
        GroupState,
        KeyState,
        LearnedState,
        MemberState,
        ProviderState,
        Snapshot,
        StreamsState,
        Verdict,
    )
    from aioserver.providers.provider import Provider
    from aioserver.providers.request import Capabilities
    from aioserver.streams.lifetime import Lifetime
    from aioserver.streams.store import StreamStore
    from aioserver.telemetry.counters import Counter
    from aioserver.telemetry.ended_requests import EndedRequests
    from aioserver.telemetry.loop_lag import LoopLag
    from aioserver.telemetry.metrics import GroupMeter, Metrics
    from aioserver.telemetry.request_log import RequestRecord
    from aioserver.usage.accounting import Usage

# The word of `learned.messages` for each value of the setting, before anything was learned.
MESSAGES_WORDS: Mapping[bool | str, str] = {
    False: "no",
    True: "speaks",
    BRIDGE: "bridge",
    AUTO: "unknown",
}

# Outcomes of an attempt that are not a fault of the provider.
NO_FAULTS = frozenset((OK, CANCELLED))


@dataclass(frozen=True)
class Sources:
    """The objects from which the state is read; they live as long as the server.

    *chat* returns the section of the configuration in effect. *gate* admits connections, *running*
    counts the answers under way, and *ready* says whether the server takes new work. *listening* has
    the sockets that accept connections, as soon as there are any. *keys* returns the state of the
    keys. *former_since* says when another process took the place of this one, in Unix time.
    *sections* are the sections of the wings, and *endpoints* the paths of their faces. *ended* are
    the last requests.
    """

    chat: Callable[[], Chat]
    metrics: Metrics
    usage: Usage
    gate: Resource
    streams: StreamStore
    running: Callable[[], int]
    lifetime: Lifetime
    router: Router
    lag: LoopLag
    ended: EndedRequests[RequestRecord]
    ready: Callable[[], bool]
    listening: Sequence[socket.socket]
    keys: Callable[[], dict[str, KeyState]] = dict
    former_since: Callable[[], float | None] = lambda: None
    sections: Sequence[Section[Any]] = ()
    endpoints: Mapping[str, str] = field(default_factory=dict)


class Snapshots:
    """Builds the snapshots of a server that starts now."""

    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        self._started_at = time.monotonic()

    def build(
        self,
        interval: Interval,
        troubles: Mapping[str, Alert],
        verdict: Verdict,
        *,
        watchers: int,
    ) -> Snapshot:
        """Return the state of this moment.

        *interval*, *troubles* and *verdict* are those of the last tick.
        """
        sources, metrics, now = self._sources, self._sources.metrics, time.monotonic()
        router, chat = sources.router, sources.chat()
        providers = {
            name: _provider_state(
                provider, interval, now, troubles.get(name), active=provider is router.active
            )
            for name, provider in router.providers.items()
        }
        snapshot: Snapshot = {
            "time": round(time.time(), 3),
            "name": "aioserver",
            "version": __version__,
            "uptime": round(now - self._started_at, 1),
            "ready": sources.ready(),
            "verdict": verdict,
            "active_provider": router.active.name,
            "active_group": router.active_group,
            "fallbacks": router.fallbacks,
            "connections": _connections_state(sources, interval),
            "rejections": _values(metrics.rejections),
            "requests": {
                "total": _sum(metrics.outcomes),
                "per_second": interval.rate(REQUESTS),
                "running": sources.running(),
                "outcomes": _values(metrics.outcomes),
            },
            "bugs": {"total": int(metrics.bugs.value), "last_minute": interval.bugs},
            "first_token": metrics.recent_first_tokens.percentiles(now),
            "tokens_per_second": interval.rate(EVENTS),
            "delay": {
                cause: recent.percentiles(now) for cause, recent in metrics.recent_delays.items()
            },
            "streams": _streams_state(sources),
            "slow_clients": int(metrics.slow_clients.value),
            "auth_failures": _values(metrics.auth_failures),
            "providers": providers,
            "groups": {
                name: _group_state(group, metrics.groups[name], providers, now)
                for name, group in router.groups.items()
                # An alias has no numbers of its own.
                if group.name == name
            },
            "keys": sources.keys(),
            "loop": {"lag": round(interval.lag, 5), "lag_max": round(interval.lag_max, 5)},
            "process": {**process_usage(), "tasks": interval.tasks, "cpu": interval.cpu},
            "watchers": watchers,
            "former": _former_state(sources, now),
            "worker_deaths": _values(metrics.worker_deaths),
            "endpoints": {
                "websocket": chat.websocket.endpoint,
                "sse": chat.sse.endpoint,
                "openai": "/v1",
                **sources.endpoints,
            },
        }
        parts = {section.key: section.state() for section in sources.sections}
        return cast("Snapshot", {**snapshot, **parts})


def _former_state(sources: Sources, now: float) -> list[FormerState]:
    """Return the state of this process if others have taken its place."""
    if (since := sources.former_since()) is None:
        return []
    records = [stream.record for stream in sources.streams.running()]
    running = [now - record.admitted_at for record in records if record.admitted_at]
    return [
        {
            "worker": sources.usage.worker,
            "version": __version__,
            "since": round(since, 3),
            "until": round(since + sources.chat().websocket.replace_timeout, 3),
            "answers": sources.running(),
            "longest": round(max(running, default=0.0), 1),
        }
    ]


def _group_state(
    group: Group, meter: GroupMeter, providers: Mapping[str, ProviderState], now: float
) -> GroupState:
    members: list[MemberState] = []
    shares = meter.shares(now)
    for member in group.members:
        provider = providers[member.provider.name]
        members.append(
            {
                "provider": member.provider.name,
                "model": member.asked_model,
                "state": member_state(provider),
                "in_flight": provider["in_flight"],
                "limit": provider["limit"],
                "starts": member.starts,
            }
        )
    return {
        "choose": group.choose,
        "affinity": group.affinity,
        "members": members,
        "waiting": group.waiting,
        "oldest_wait": round(group.oldest_wait, 3),
        "homes": {home: meter.started(home) for home in (HOME, OTHER, NEW)},
        "held_back": group.held_back,
        "known_share": quotient_of(shares[KNOWN_SHARE]),
        "cached_share": quotient_of(shares[CACHED_SHARE]),
    }


def _connections_state(sources: Sources, interval: Interval) -> ConnectionsState:
    gate, faces = sources.gate.stats(), sources.metrics.faces
    return {
        "active": gate.inside,
        "limit": gate.limit,
        "waiting": gate.waiting,
        "queue_size": gate.queue_size,
        "oldest_wait": round(gate.oldest_wait, 3),
        "active_by_face": {name: face.connections for name, face in faces.items()},
        "waiting_by_face": _values({name: face.waiting for name, face in faces.items()}),
        "opened": _sum({name: face.opened for name, face in faces.items()}),
        "rejected": _sum({name: face.rejected for name, face in faces.items()}),
        "rejected_per_second": interval.rate(REJECTIONS),
    }


def _streams_state(sources: Sources) -> StreamsState:
    streams = sources.streams.stats()
    return {
        "detached": sources.lifetime.detached,
        "max_detached": sources.chat().streams.max_detached,
        "background": sources.lifetime.background,
        "finished": streams.finished,
        "responses": streams.responses,
        "held": {"answers": streams.held_answers, "bytes": streams.held_bytes},
        "bytes": streams.bytes,
        "max_bytes": streams.max_bytes,
    }


def _provider_state(
    provider: Provider, interval: Interval, now: float, trouble: Alert | None, *, active: bool
) -> ProviderState:
    state, meter, name = provider.stats(), provider.meter, provider.name
    queue, pool, pace, silence = state.queue, state.pool, state.pace, state.silence
    attempts, trials = _values(meter.attempts), state.trials
    return {
        "usable": state.usable,
        "active": active,
        "model": provider.settings.model,
        "learned": _learned(provider, state.learned),
        "in_flight": queue.inside,
        "limit": queue.limit,
        "waiting": queue.waiting,
        "waiting_by_class": {
            INTERACTIVE: queue.waiting - queue.batch_waiting,
            BATCH: queue.batch_waiting,
        },
        "queue_size": queue.queue_size,
        "oldest_wait": round(queue.oldest_wait, 3),
        "pool": {
            "open": pool.open,
            "idle": pool.idle,
            "limit": pool.limit,
            "waiting": pool.waiting,
        },
        "pace": {
            "per_minute": pace.per_minute,
            "left": pace.left,
            "cooling": round(pace.cooling, 1),
        },
        "state": state.state,
        "next_try": None if state.next_try is None else round(state.next_try, 1),
        "trial": None
        if trials is None
        else {"interval": trials.interval, "row": trials.row, "needed": trials.needed},
        "flagged": state.flagged,
        "retries": _sum(meter.retries),
        "background": {"running": state.background[0], "waiting": state.background[1]},
        "retry_budget": {
            "used": state.budget.used,
            "limit": state.budget.limit,
            "refused": int(meter.retries_refused.value),
        },
        "failovers": _sum(meter.failovers),
        "continued": {
            "total": int(meter.continuations[CONTINUED].value),
            "last_minute": interval.continued.get(name, 0),
        },
        "rescued": _sum(meter.rescued),
        "requests": sum(attempts.values()),
        "cancelled": attempts[CANCELLED],
        "faults": {name: number for name, number in attempts.items() if name not in NO_FAULTS},
        "requests_per_second": interval.rate(ATTEMPTS, name),
        "tokens_per_second": interval.rate(EVENTS, name),
        "first_token": meter.recent_first_tokens.percentiles(now),
        "silence": meter.recent_silences.percentiles(now),
        "silent": {
            "longest": round(silence.longest, 3),
            "stalled": silence.stalled,
            "unanswered": silence.unanswered,
            "under_way": silence.under_way,
        },
        "trouble": trouble,
    }


def _learned(provider: Provider, memories: Sequence[Capabilities]) -> LearnedState:
    """Return the known state of each API of *provider*, from its settings and answers."""
    settings = provider.settings
    words = [word for capabilities in memories if (word := capabilities.messages) is not None]
    return {
        "messages": words[0] if words else MESSAGES_WORDS[settings.messages],
        "refused_words": [
            word for capabilities in memories for word in sorted(capabilities.refused_words)
        ],
        "context_limit": {
            model: limit
            for capabilities in memories
            for model, limit in capabilities.context_limits.items()
        },
        "tokens_per_byte": round(provider.costs.tokens_per_byte(settings.model), 3),
    }


def _values(counters: Mapping[str, Counter]) -> dict[str, int]:
    return {name: int(counter.value) for name, counter in counters.items()}


def _sum(counters: Mapping[str, Counter]) -> int:
    return int(sum(counter.value for counter in counters.values()))
