"""What is counted. Names and label sets are there from the start; `exposition` writes them as text.

How it is counted is told in counting.py. prometheus-client gets it as families when somebody asks
(`Collector`), and writes the text.

Labels come from the configuration or from a list here: never from a client.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from aioserver import errors, provider_errors
from aioserver.telemetry.counters import SHORT, Counter, Family, Histogram, Recent

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from aioserver.config import settings

FACES = ("websocket", "sse", "openai")
OK, CLIENT_LEFT, CANCELLED = "ok", "client_left", "cancelled"
OUTCOMES = (
    OK,
    "client_error",
    "rejected",
    "provider_error",
    CLIENT_LEFT,
    CANCELLED,
    "internal_error",
)
ATTEMPTS = (
    *("ok", "connect_error", "timeout", "http_429", "http_4xx", "http_5xx", "tls"),
    *("disconnected", "stale", "bad_response", "cancelled"),
)
CLOSES = ("1000", "1001", "1002", "1003", "1005", "1006", "1007", "1008", "1009", "1011", "1012")


Fault = TypeVar("Fault", bound=errors.AioserverError)


def _below(root: type[Fault]) -> Iterator[type[Fault]]:
    """Every class that is derived from *root*."""
    for one in root.__subclasses__():
        yield one
        yield from _below(one)


def _codes(flag: str) -> list[str]:
    """The codes of the provider's faults that have *flag*."""
    return sorted(
        {one.code for one in _below(provider_errors.ProviderFault) if getattr(one, flag)}
    )


class ProviderMeter:
    """What is counted of one provider. *events*: those that passed, about a token each."""

    __slots__ = (
        "attempts",
        "events",
        "failovers",
        "first_token",
        "interval",
        "key_refused",
        "recent",
        "retries",
        "silence",
        "silences",
        "wait",
    )

    def __init__(self) -> None:
        self.events = 0
        self.wait = Histogram()
        self.first_token = Histogram()
        self.interval = Histogram(SHORT)
        self.attempts = {outcome: Counter() for outcome in ATTEMPTS}
        self.retries = {code: Counter() for code in _codes("retry")}
        self.failovers = {code: Counter() for code in _codes("failover")}
        self.key_refused = Counter()
        self.recent = Recent()
        self.silence = Histogram()
        self.silences = Recent()


NO_METER = ProviderMeter()  # of a log that no provider fills yet


class FaceMeter:
    """What is counted of one face."""

    __slots__ = (
        "connections",
        "duration",
        "first_token",
        "opened",
        "overhead",
        "rejected",
        "waiting",
    )

    def __init__(self) -> None:
        self.connections = Counter()
        self.waiting = Counter()
        self.opened = Counter()
        self.rejected = Counter()
        self.duration = Histogram()
        self.first_token = Histogram()
        self.overhead = Histogram(SHORT)


# Every error code with the outcome of a request that ends with it.
KINDS = sorted({(one.code, one.outcome) for one in _below(errors.AioserverError)})
REASONS = sorted({one.reason for one in _below(errors.Denied)})


class Metrics:
    """Everything that is counted, for as long as the server lives."""

    def __init__(self, providers: Mapping[str, settings.Provider]) -> None:
        self.providers: dict[str, ProviderMeter] = {}
        self.faces = {face: FaceMeter() for face in FACES}
        self.felt = Recent()  # first tokens as clients feel them, on all faces
        self.rejections = {code: Counter() for code, outcome in KINDS if outcome == "rejected"}
        self.requests: Family[Counter] = Family(
            "requests",
            "Requests for an answer that have ended",
            ("face", "provider", "code", "outcome"),
        )
        self.outcomes = {outcome: Counter() for outcome in OUTCOMES}
        self.tokens: Family[Counter] = Family(
            "tokens",
            "Tokens, as the provider reports them, or about one an event",
            ("provider", "model", "type", "source"),
        )
        self.closed: Family[Counter] = Family(
            "connections_closed",
            "Connections that have ended; code: the close code of a WebSocket",
            ("face", "code"),
            {
                **{("websocket", code): Counter() for code in (*CLOSES, "1013", "other")},
                **{(face, ""): Counter() for face in FACES if face != "websocket"},
            },
        )
        self.delay = {whose: Histogram() for whose in ("ours", "client")}
        self.delays = {whose: Recent() for whose in self.delay}
        self.admission_wait = {outcome: Histogram() for outcome in ("entered", "refused")}
        self.resumes = {outcome: Counter() for outcome in ("ok", "gap", "not_found")}
        self.slow_clients = Counter()
        self.bad_requests = {code: Counter() for code, why in KINDS if why == "client_error"}
        self.auth_failures = {reason: Counter() for reason in REASONS}
        self.bugs = Counter()
        self.loop_lag = Histogram(SHORT)
        self.reloads = {outcome: Counter() for outcome in ("applied", "invalid", "failed")}
        self.apply(providers)

    def apply(self, providers: Mapping[str, settings.Provider]) -> None:
        """Count what *providers* do, too. Those that have gone keep their numbers."""
        for name, given in providers.items():
            self.providers.setdefault(name, ProviderMeter())
            for labels in _ends(name):
                self.requests.children.setdefault(labels, Counter())
            for labels in _tokens(name, given):
                self.tokens.children.setdefault(labels, Counter())

    def count_error(self, error: errors.AioserverError) -> None:
        """Somebody was told *error*, and no provider was asked."""
        if isinstance(error, errors.Denied):
            self.auth_failures[error.reason].value += 1
        if error.outcome == "rejected":
            self.rejections[error.code].value += 1
        elif error.outcome == "client_error" and error.code in self.bad_requests:
            self.bad_requests[error.code].value += 1

    @contextmanager
    def resuming(self) -> Iterator[None]:
        """Count how it ends that somebody comes back for an answer."""
        outcome = "ok"
        try:
            yield
        except errors.ResumeGap:
            outcome = "gap"
            raise
        except errors.StreamNotFound:
            outcome = "not_found"
            raise
        finally:
            self.resumes[outcome].value += 1

    def families(self) -> Iterator[Family[Counter] | Family[Histogram]]:
        """All families; counters without their suffix `_total`."""
        providers, faces = self.providers.items(), self.faces.items()
        yield self.requests
        yield self.tokens
        yield self.closed
        yield Family(
            "connections_rejected",
            "Connections for which there was no place",
            ("face",),
            {(face,): meter.rejected for face, meter in faces},
        )
        yield Family(
            "rejections",
            "Requests and connections that were told to come back",
            ("code",),
            {(code,): counter for code, counter in self.rejections.items()},
        )
        yield Family(
            "provider_attempts",
            "Requests sent to a provider",
            ("provider", "outcome"),
            {
                (name, outcome): counter
                for name, meter in providers
                for outcome, counter in meter.attempts.items()
            },
        )
        yield Family(
            "retries",
            "Tries after a fault, at the same provider",
            ("provider", "reason"),
            {(n, code): one for n, meter in providers for code, one in meter.retries.items()},
        )
        yield Family(
            "failovers",
            "Requests that went on to a fallback",
            ("provider", "reason"),
            {(n, code): one for n, meter in providers for code, one in meter.failovers.items()},
        )
        yield Family(
            "resumes",
            "Answers that somebody came back for",
            ("outcome",),
            {(outcome,): counter for outcome, counter in self.resumes.items()},
        )
        yield Family(
            "slow_clients", "Clients dropped: they took nothing", (), {(): self.slow_clients}
        )
        yield Family(
            "bad_requests",
            "Requests that were not understood or not allowed",
            ("code",),
            {(code,): counter for code, counter in self.bad_requests.items()},
        )
        yield Family(
            "auth_failures",
            "Requests that were not let in",
            ("reason",),
            {(reason,): counter for reason, counter in self.auth_failures.items()},
        )
        yield Family(
            "reloads",
            "Configurations read again on SIGHUP",
            ("outcome",),
            {(outcome,): counter for outcome, counter in self.reloads.items()},
        )
        yield Family("errors", "Bugs: each has a traceback in the log", (), {(): self.bugs})
        yield Family(
            "admission_wait_seconds",
            "From coming to a place, or to the refusal",
            ("outcome",),
            {(outcome,): one for outcome, one in self.admission_wait.items()},
        )
        yield Family(
            "provider_wait_seconds",
            "In the line in front of a provider",
            ("provider",),
            {(name,): meter.wait for name, meter in providers},
        )
        yield Family(
            "request_duration_seconds",
            "From admission to the answer's end",
            ("face",),
            {(face,): meter.duration for face, meter in faces},
        )
        yield Family(
            "first_token_seconds",
            "From admission to the answer's first event, waits included",
            ("face",),
            {(face,): meter.first_token for face, meter in faces},
        )
        yield Family(
            "provider_first_token_seconds",
            "From the request being sent to the first event",
            ("provider",),
            {(name,): meter.first_token for name, meter in providers},
        )
        yield Family(
            "token_interval_seconds",
            "Between two events of an answer, its mean",
            ("provider",),
            {(name,): meter.interval for name, meter in providers},
        )
        yield Family(
            "provider_silence_seconds",
            "The longest time between two reads of an answer, our own lag taken out",
            ("provider",),
            {(name,): meter.silence for name, meter in providers},
        )
        yield Family(
            "delay_seconds",
            "The longest time that an answer was held up by us, or by a client that took nothing",
            ("by",),
            {(whose,): one for whose, one in self.delay.items()},
        )
        yield Family(
            "overhead_seconds",
            "Our own work from admission to the provider's line",
            ("face",),
            {(face,): meter.overhead for face, meter in faces},
        )
        yield Family("loop_lag_seconds", "How late the event loop is", (), {(): self.loop_lag})


def _ends(provider: str) -> Iterator[tuple[str, str, str, str]]:
    for face in FACES:
        for outcome in (OK, CLIENT_LEFT, CANCELLED):
            yield face, provider, "", outcome
        for code, outcome in KINDS:
            yield face, provider, code, outcome


def _tokens(name: str, given: settings.Provider) -> Iterator[tuple[str, str, str, str]]:
    for model in dict.fromkeys((given.model, *given.models, "other")):
        for kind in ("input", "output"):
            yield name, model, kind, "provider"
        yield name, model, "output", "estimate"
