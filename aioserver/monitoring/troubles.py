"""Troubles: what is wrong with a provider and since when, in words that every display shows.

`/stats`, the dashboard, `top` and the log show the same texts, which are made here. A trouble has
a *text* that stands alone, "groq has said nothing for 6 s in 25 answers", and a *detail*: when the
trouble began, when the provider is tried next, and which fallback is asked instead. Of several
troubles of a provider, the worst is shown. The *advice* says what an operator can do, and the
*severity* how the log, the dashboard and `top` show the trouble: as an `error`, or as a `warning`.
"""

from __future__ import annotations

import math
import time
from array import array
from collections import Counter
from typing import TYPE_CHECKING

from aioserver.monitoring.groups import covering, listing
from aioserver.monitoring.interval import ATTEMPTS
from aioserver.providers.breaker import DEAD, SICK, WELL
from aioserver.telemetry.metrics import OK

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from aioserver.monitoring.interval import Interval
    from aioserver.monitoring.state import ProviderState, SilenceState, Snapshot, Trouble

# Kinds of troubles, beside a provider that is dead or sick.
FLAGGED, SILENT, FAILING = "key_refused", "silent", "failing"
# The word for each, the worst first.
WORDS = {
    FLAGGED: "Key refused",
    DEAD: "Dead",
    SILENT: "Stalled",
    SICK: "Sick",
    FAILING: "Failing",
}
# One of these may become another, without an end of the trouble between them.
FAILURES = frozenset((DEAD, SICK, FAILING))
# Why a provider is flagged that has refused no key.
TLS, LOOP = NO_KEY = ("tls", "loop")
# Outcomes of an attempt that are the provider's fault, and how the provider fails then. A 4xx is
# none: it is the fault of the request, or of our key. Nor is a stale connection, which is replaced
# at once.
FAULTS = {
    "connect_error": "cannot be reached",
    "timeout": "does not answer in time",
    "http_429": "limits our rate",
    "http_5xx": "answers with server errors (5xx)",
    TLS: "fails in TLS",
    LOOP: "leads back to this server",
    "disconnected": "breaks off its answers",
    "bad_response": "sends what is no answer",
}
# The same, where it is told of a time that may be over.
PAST_FAULTS = {
    "connect_error": "could not be reached",
    "timeout": "did not answer in time",
    "http_429": "limited our rate",
    "http_5xx": "answered with server errors (5xx)",
    TLS: "failed in TLS",
    LOOP: "led back to this server",
    "disconnected": "broke off its answers",
    "bad_response": "sent what is no answer",
}
# Ticks after its last fault in which a provider fails, though an attempt has succeeded since.
PRESENT = 10
# A provider fails if at least FEW attempts of the last WINDOW ticks have failed, and this share of
# them.
WINDOW = 60
FEW, SHARE = 3, 0.1

# What an operator can do, by the kind of a trouble. The sentences name settings as they stand in
# `config.yaml`, and no number: the numbers stand in the texts beside them. By outcome of a failed
# attempt:
OF_FAULTS = {
    "connect_error": "Check that {name} runs, and that its base_url leads to it.",
    "timeout": (
        "Look at the load of {name}; if it is only slow, raise read_timeout in its http_client."
    ),
    "http_429": "Lower requests_per_minute of {name}, or have its limits raised.",
    "http_5xx": "Look at the log of {name}, or at its status page.",
    LOOP: "Correct the base_url of {name}: it leads back to this server.",
    TLS: "Check the certificate of {name}, and its base_url and ca_file.",
    "disconnected": "Look at the log of {name}, and at proxies in between that cut long answers.",
    "bad_response": "Check that the base_url of {name} leads to an API of OpenAI's form.",
}
OF_A_REFUSED_KEY = "Check the key of {name}, and the quota of its account."
OF_SILENCE = (
    "Look at the log and the load of {name}; read_timeout in its http_client ends silent answers."
)
OF_OLD_FAULTS = "Look at the log of {name}, or at its status page."
OF_A_BUG = "Look for the traceback in the log, and report it."
INSTEAD = "For now, name another provider in llm.fallbacks or llm.active, and reload (SIGHUP)."

_MORE_PLACES = (
    "If the provider can answer more at once, raise its concurrent_requests;"
    " else name another one in llm.fallbacks."
)
# Where connections wait for the server, and requests of those inside for a provider.
OF_A_FULL_PROVIDER = (
    "If {name} can answer more at once, raise its concurrent_requests;"
    " more connections would only wait for it."
)
_MORE_CONNECTIONS = (
    "If the log says that no file descriptor is free, raise the limit of open files;"
    " else raise max_connections in the http_client of the provider."
)
_OWN_LIMITS = "The log names the caller; its limits stand in auth.keys."
# By error code of a rejection: why requests were rejected, told of seconds that are over; and what to
# do.
OF_REJECTIONS = {
    "auth_unavailable": (
        "tokens could not be checked",
        "Look whether the issuer's keys can be had (auth.jwt.jwks_url): aioserver doctor.",
    ),
    "circuit_open": (
        "a provider was dead, and left alone",
        "Look at its log, or at its status page.",
    ),
    "concurrency_exceeded": ("a client had as many answers as it may", _OWN_LIMITS),
    "deadline_exceeded": (
        "requests could not start within the time that they allow",
        "Look at what they wait for: the message of each names it, and its log line has the wait.",
    ),
    "history_unavailable": (
        "conversations could not be read or deleted",
        "The log says what is wrong with the storage of conversations.",
    ),
    "hook_unavailable": (
        "a hook did not decide, and what it cannot decide is refused",
        "Look at the program behind its url (hooks); the log says what it has answered.",
    ),
    "loop_detected": (
        "requests came back to this server by way of a provider",
        "Correct the base_url that leads here; /stats shows whose it is.",
    ),
    "instance_unavailable": (
        "other instances, or the server that they share, did not answer",
        "Look at the load of the cluster's Redis or Valkey server, and of the instances.",
    ),
    "no_provider": (
        "no provider could be asked",
        "`aioserver check` says which provider lacks its key; the log says which refuses it.",
    ),
    "pool_timeout": (
        "no connection of a provider was free in time",
        _MORE_CONNECTIONS,
    ),
    "provider_queue_full": ("the queue of a provider was full", _MORE_PLACES),
    "provider_queue_timeout": ("requests waited too long for a provider", _MORE_PLACES),
    "provider_rate_limited": (
        "a provider limited our rate",
        "Have its limits raised, or name another provider in llm.fallbacks.",
    ),
    "rate_limit_exceeded": ("a client asked more often than it may", _OWN_LIMITS),
    "server_at_capacity": (
        "the server was full",
        "If the machine has room, raise max_connections in chat.websocket.concurrency.",
    ),
    "server_shutdown": ("the server stopped", ""),
}


class Troubles:
    """The trouble of each provider, snapshot by snapshot.

    Always: a trouble that lasts keeps the time at which it began. It is over when the provider is
    found to be well, and the faults before that are no trouble any more.
    """

    def __init__(self) -> None:
        # The troubles at the last snapshot, by provider.
        self.now: dict[str, Trouble] = {}
        # The providers that were dead, sick or flagged at the last snapshot.
        self._ill: set[str] = set()
        # How each provider that is flagged had failed, if not by refusing our key.
        self._flagged: dict[str, str] = {}
        # By provider and outcome: the attempts of each of the last WINDOW ticks. They are arrays,
        # as those of the history are: see history.py.
        self._attempts: dict[str, dict[str, array[int]]] = {}

    def observe(self, snapshot: Snapshot, interval: Interval) -> None:
        """Find the troubles at *snapshot*, at whose tick *interval* ended, and set them there."""
        self._count(interval)
        before, self.now = self.now, {}
        groups = covering(snapshot)
        for name, provider in snapshot["providers"].items():
            if provider["flagged"] or provider["state"] != WELL:
                self._ill.add(name)
            elif name in self._ill:
                self._ill.remove(name)
                self._attempts.pop(name, None)
            trouble = self._trouble(
                name, provider, snapshot, before.get(name), groups.get(name, ())
            )
            provider["trouble"] = trouble
            if trouble is not None:
                self.now[name] = trouble

    def _trouble(
        self,
        name: str,
        provider: ProviderState,
        snapshot: Snapshot,
        before: Trouble | None,
        groups: Sequence[str],
    ) -> Trouble | None:
        """Return the worst trouble of the provider *name*; *before*: at the last snapshot.

        *groups* go on without it.
        """
        faults, attempts = self._lately(name)
        failed = sum(faults.values())
        began = now = snapshot["time"]
        text, remedy, severity = f"{name} failed", OF_OLD_FAULTS, "error"
        present = failed > 0 and self._fails(name)
        if present:
            outcome = faults.most_common(1)[0][0]
            remedy = OF_FAULTS[outcome]
            text = (
                f"{name} {FAULTS[outcome]}: {failed} of {attempts} attempts failed "
                "in the last minute"
            )
        if not provider["flagged"]:
            self._flagged.pop(name, None)
        if provider["flagged"]:
            kind, text = FLAGGED, f"{name} refuses our key, or its quota is used up"
            remedy = OF_A_REFUSED_KEY
            newest = next((cause for cause in NO_KEY if faults[cause]), "")
            if cause := self._flagged.setdefault(name, newest):
                text, remedy = f"{name} {FAULTS[cause]}", OF_FAULTS[cause]
        elif provider["state"] == DEAD:
            kind, text = DEAD, f"{text}; it is left alone"
        elif stalled(provider["silent"]):
            kind, text = SILENT, silence(name, provider["silent"])
            remedy = OF_SILENCE
            began = now - provider["silent"]["longest"]
        elif provider["state"] == SICK:
            kind, severity = SICK, most(failed, attempts)
            if not present:
                text = f"{name} failed often, and is asked last but for trials"
        elif present and failed >= FEW and failed >= SHARE * attempts:
            kind, severity = FAILING, most(failed, attempts)
        else:
            return None
        since = round(began, 3)
        if before is not None and (before["kind"] == kind or {before["kind"], kind} <= FAILURES):
            since = before["since"]
        others = snapshot["fallbacks"]
        remedies = [remedy.format(name=name)]
        if provider["active"] and not (others or groups):
            remedies.append(INSTEAD)
        detail = [f"It began {span(now - since)} ago", *_next_try(provider)]
        if groups:
            detail.append(f"the other members of {listing(groups)} are asked instead")
        elif provider["active"] and kind != SILENT:
            detail.append(f"its fallback is {others[0]}" if others else "no fallback is set")
        return {
            "kind": kind,
            "word": WORDS[kind],
            "since": since,
            "text": text,
            "detail": "; ".join(detail),
            "advice": " ".join(remedies),
            "severity": severity,
        }

    def _count(self, interval: Interval) -> None:
        """Take the attempts of a tick into the last WINDOW ticks."""
        for outcomes in self._attempts.values():
            for ticks in outcomes.values():
                del ticks[0]
                ticks.append(0)
        for total, number in interval.growth.items():
            if total.kind == ATTEMPTS and total.provider is not None:
                outcomes = self._attempts.setdefault(total.provider, {})
                if total.detail not in outcomes:
                    outcomes[total.detail] = array("Q", [0]) * WINDOW
                outcomes[total.detail][-1] += int(number)

    def _fails(self, name: str) -> bool:
        """Return whether the last fault of the provider *name* is what is known of it now: it is
        one of the last PRESENT ticks, or no attempt has succeeded since.
        """
        attempts, succeeded = self._attempts[name], False
        for age in range(1, WINDOW + 1):
            if any(ticks[-age] for outcome, ticks in attempts.items() if outcome in FAULTS):
                return age <= PRESENT or not succeeded
            succeeded = succeeded or (OK in attempts and attempts[OK][-age] > 0)
        return False

    def _lately(self, name: str) -> tuple[Counter[str], int]:
        """Return the faults of the last WINDOW ticks by outcome, and the number of attempts."""
        numbers = {outcome: sum(ticks) for outcome, ticks in self._attempts.get(name, {}).items()}
        faults = Counter(
            {
                outcome: number
                for outcome, number in numbers.items()
                if number and outcome in FAULTS
            }
        )
        return faults, numbers.get(OK, 0) + faults.total()


def _next_try(provider: ProviderState) -> Iterator[str]:
    """Yield when a provider that is left alone is tried again, if it is one."""
    seconds = provider["next_try"]
    if seconds is not None:
        yield f"it is tried again in {span(math.ceil(seconds))}" if seconds else "it is tried now"


def most(failed: int, total: int) -> str:
    """Return the severity of *failed* of *total*: "error" for more than half, otherwise
    "warning".
    """
    return "error" if 2 * failed > total else "warning"


def stalled(silent: SilenceState) -> bool:
    """Return whether the provider has stalled: in half of the answers under way, or more."""
    number = silent["stalled"] + silent["unanswered"]
    return number > 0 and 2 * number >= silent["under_way"]


def silence(name: str, silent: SilenceState) -> str:
    """Return a text: how long the provider *name* has been silent, and in which answers."""
    answers, requests = silent["stalled"], silent["unanswered"]
    places = [f"in {count(answers, 'answer')}"] if answers else []
    if requests:
        places.append(f"to {count(requests, 'request')}")
    return f"{name} has said nothing for {span(silent['longest'])} {' and '.join(places)}"


def span(seconds: float) -> str:
    """Return a number of seconds in a short form: 6 s, 3 min, 2 h."""
    whole = max(0, int(seconds))
    if whole < 120:
        return f"{whole} s"
    return f"{whole // 60} min" if whole < 7200 else f"{whole // 3600} h"


def count(number: int, noun: str) -> str:
    """Return a number of things: 1 answer, 1,200 answers."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def still_run(answers: int, longest: float, processes: int, until: float) -> str:
    """Return what runs in *processes* that were replaced: *answers*, the *longest* for so many
    seconds, *until* when, in Unix time.
    """
    runs = f"{count(answers, 'answer')} still run{'s' * (answers == 1)}"
    where = f"{processes} former process{'es' * (processes != 1)}"
    at = time.strftime("%H:%M", time.localtime(until))
    return f"{runs} in {where}, longest {span(longest)}, until {at} at the latest"


def met_a_bug(number: int, when: str = "in the last minute") -> str:
    """Return how many requests met a bug, and when."""
    return f"{count(number, 'request')} met a bug of the server {when}"


def were(number: int, participle: str) -> str:
    """Return what happened to requests: 1 request was rejected, 1,200 requests were rejected."""
    return f"{count(number, 'request')} {'was' if number == 1 else 'were'} {participle}"


def of_rejections(code: str) -> tuple[str, str]:
    """Return why requests were rejected with *code*, with the code, and what to do."""
    reason, advice = OF_REJECTIONS.get(code, ("", ""))
    return (f"{reason} ({code})" if reason else code), advice
