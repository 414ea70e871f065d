"""The table of findings: everything that can be wrong with a running server, and how it is shown.

A **finding** is a row of this table. The verdict, the alerts of providers, incidents and `doctor`
take their texts, remedies and severities from it. So do the alerting rules of Prometheus
(deploy/alerts.yaml), which `python docs/tables.py` writes. A remedy names settings as they stand in
`config.yaml`, and has no numbers, since the text beside it has them.

This file is long, but it is one concept: the table.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from aioserver.providers.breaker import DEAD, SICK

if TYPE_CHECKING:
    from collections.abc import Iterator

# Severities. BY_SHARE: an error if the failures are more than the successes, else a warning.
ERROR, WARNING, BY_SHARE = "error", "warning", "by share"
# Names of findings about a provider, in addition to the states of its breaker.
FLAGGED, SILENT, FAILING = "key_refused", "silent", "failing"
# Faults for which a provider is flagged although it has not refused our key.
TLS, LOOP = NO_KEY = ("tls", "loop")


class Rule(NamedTuple):
    """An alerting rule of Prometheus. It fires when *expr* has been true for *lasting*. The value of
    *label* stands for `{name}` in the text. *remedy* is used if the finding has none.
    """

    alert: str
    expr: str
    lasting: str = "5m"
    label: str = "provider"
    remedy: str = ""


class Finding(NamedTuple):
    """A row of the table.

    *text* is used while the finding is true, and *past* afterwards. *remedy* says what an operator
    can do, *word* is the headline of the verdict, and *rule* is the alerting rule of Prometheus.
    """

    name: str
    text: str = ""
    remedy: str = ""
    severity: str = BY_SHARE
    past: str = ""
    word: str = ""
    rule: Rule | None = None


def _table(*rows: Finding) -> dict[str, Finding]:
    return {row.name: row for row in rows}


# Faults of a provider, by the outcome of an attempt. A 4xx is not one of them: the request or our
# key is at fault. A stale connection is not one either: it is replaced at once.
FAULTS = _table(
    Finding(
        "connect_error",
        "cannot be reached",
        "Check that {name} runs, and that its base_url leads to it.",
        past="could not be reached",
    ),
    Finding(
        "timeout",
        "does not answer in time",
        "Look at the load of {name}; if it is only slow, raise read_timeout in its http_client.",
        past="did not answer in time",
    ),
    Finding(
        "http_429",
        "limits our rate",
        "Lower requests_per_minute of {name}, or have its limits raised.",
        past="limited our rate",
    ),
    Finding(
        "http_5xx",
        "answers with server errors (5xx)",
        "Look at the log of {name}, or at its status page.",
        past="answered with server errors (5xx)",
    ),
    Finding(
        TLS,
        "fails in TLS",
        "Check the certificate of {name}, and its base_url and ca_file.",
        ERROR,
        "failed in TLS",
    ),
    Finding(
        LOOP,
        "leads back to this server",
        "Correct the base_url of {name}: it leads back to this server.",
        ERROR,
        "led back to this server",
    ),
    Finding(
        "disconnected",
        "breaks off its answers",
        "Look at the log of {name}, and at proxies in between that cut long answers.",
        past="broke off its answers",
    ),
    Finding(
        "bad_response",
        "sends what is no answer",
        "Check that the base_url of {name} leads to an API of OpenAI's form.",
        past="sent what is no answer",
    ),
)

_MORE_PLACES = (
    "If the provider can answer more at once, raise its concurrent_requests;"
    " else name another one in llm.fallbacks."
)
_OWN_LIMITS = "The log names the caller; its limits stand in auth.keys."

# Reasons of rejected requests, by error code. Rejections that concern the limits of one caller, a
# stop of the server, or something other than an answer are never more than a warning.
REJECTED = _table(
    Finding(
        "auth_unavailable",
        "tokens could not be checked",
        "Look whether the issuer's keys can be had (auth.jwt.jwks_url): aioserver doctor.",
    ),
    Finding(
        "circuit_open",
        "a provider was dead, and left alone",
        "Look at its log, or at its status page.",
    ),
    Finding(
        "concurrency_exceeded", "a client had as many answers as it may", _OWN_LIMITS, WARNING
    ),
    Finding(
        "deadline_exceeded",
        "requests could not start within the time that they allow",
        "Look at what they wait for: the message of each names it, and its log line has the wait.",
    ),
    Finding(
        "history_unavailable",
        "conversations could not be read or deleted",
        "The log says what is wrong with the storage of conversations.",
        WARNING,
    ),
    Finding(
        "hook_unavailable",
        "a hook did not decide, and what it cannot decide is refused",
        "Look at the program behind its url (hooks); the log says what it has answered.",
    ),
    Finding(
        "loop_detected",
        "requests came back to this server by way of a provider",
        "Correct the base_url that leads here; /stats shows whose it is.",
    ),
    Finding(
        "instance_unavailable",
        "other instances, or the server that they share, did not answer",
        "Look at the load of the cluster's Redis or Valkey server, and of the instances.",
    ),
    Finding(
        "no_provider",
        "no provider could be asked",
        "`aioserver check` says which provider lacks its key; the log says which refuses it.",
        ERROR,
    ),
    Finding(
        "pool_timeout",
        "no connection of a provider was free in time",
        "If the log says that no file descriptor is free, raise the limit of open files;"
        " else raise max_connections in the http_client of the provider.",
    ),
    Finding("provider_queue_full", "the queue of a provider was full", _MORE_PLACES),
    Finding("provider_queue_timeout", "requests waited too long for a provider", _MORE_PLACES),
    Finding(
        "provider_rate_limited",
        "a provider limited our rate",
        "Have its limits raised, or name another provider in llm.fallbacks.",
    ),
    Finding("rate_limit_exceeded", "a client asked more often than it may", _OWN_LIMITS, WARNING),
    Finding(
        "server_at_capacity",
        "the server was full",
        "If the machine has room, raise max_connections in chat.websocket.concurrency.",
    ),
    Finding("server_shutdown", "the server stopped", severity=WARNING),
)

# Findings about one provider, the worst first. A provider that fails takes its text and its remedy
# from the fault. A finding with *past* is an incident, and *past* is the text of its end.
OF_PROVIDERS = _table(
    Finding(
        FLAGGED,
        "{name} refuses our key, or its quota is used up",
        "Check the key of {name}, and the quota of its account.",
        ERROR,
        word="Key refused",
    ),
    Finding(
        DEAD,
        "{name} failed; it is left alone",
        "Look at the log of {name}, or at its status page.",
        ERROR,
        "{name} answers again",
        "Dead",
    ),
    Finding(
        SILENT,
        "{name} has said nothing for {silence}",
        "Look at the log and the load of {name}; read_timeout in its http_client ends silent "
        "answers.",
        ERROR,
        "{name} speaks again",
        "Stalled",
    ),
    Finding(
        SICK,
        "{name} failed often, and is asked last but for trials",
        "Look at the log of {name}, or at its status page.",
        past="{name} is well again",
        word="Sick",
    ),
    Finding(FAILING, word="Failing"),
)

# Findings about the server: in the verdict (*text*), as an incident (*past*), and in Prometheus.
OF_SERVER = _table(
    Finding(
        "away",
        "it does not answer",
        "Look at the process (systemctl status aioserver), and at the admin key of the job.",
        ERROR,
        rule=Rule("AioserverAway", 'up{job="aioserver"} == 0', "1m"),
    ),
    Finding(
        "not_ready",
        "it is stopping, or no provider is usable",
        "`aioserver check` says what is missing.",
        ERROR,
        word="Not ready",
        rule=Rule("AioserverNotReady", "aioserver_ready == 0", "2m"),
    ),
    Finding(
        "bug",
        "requests met a bug, or a task broke",
        "Look for the traceback in the log, and report it.",
        ERROR,
        "{requests} met a bug of the server in {span}: {detail}",
        "Bug",
        Rule("AioserverBug", "increase(aioserver_errors_total[10m]) > 0", ""),
    ),
    Finding(
        "group_out",
        "no member of {name} can start anything",
        "Look at what is wrong with each of its providers.",
        ERROR,
        word="Group out",
        rule=Rule(
            "AioserverGroupOut",
            "min by (instance, group) (aioserver_provider_trouble * on (instance, provider) "
            "group_right () group by (instance, group, provider) (aioserver_group_starts_total)) "
            ">= 4",
            "1m",
            "group",
        ),
    ),
    Finding(
        "provider",
        "{name} is in trouble: 1 failing, 2 sick, 3 silent, 4 dead, 5 key refused; it is "
        "{{ $value }}",
        "The dashboard shows since when, by which faults, and what to do.",
        rule=Rule("AioserverProviderTrouble", "aioserver_provider_trouble > 0", "1m"),
    ),
    Finding(
        "answers",
        "one of twenty answers of {name} fails after all retries",
        "requests_total by code says how.",
        rule=Rule(
            "AioserverAnswersFail",
            'sum by (instance, provider) (rate(aioserver_requests_total{outcome="provider_error"}'
            "[10m])) / sum by (instance, provider) (rate(aioserver_requests_total[10m])) > 0.05",
            "10m",
        ),
    ),
    Finding(
        "retries",
        "{name} fails more often than a fifth of its requests, which may be tried again",
        "Look at provider_attempts_total for its faults.",
        rule=Rule("AioserverRetryBudgetUsedUp", "rate(aioserver_retries_refused_total[5m]) > 0"),
    ),
    Finding(
        "queue",
        "more requests wait for {name} than it works on",
        "Raise its concurrent_requests or requests_per_minute, or add another provider.",
        rule=Rule(
            "AioserverProviderQueue", "aioserver_provider_waiting / aioserver_provider_limit > 1"
        ),
    ),
    Finding(
        "rejections",
        "it rejects requests: {name}",
        past="{requests} {were} rejected in {span}: {detail}",
        word="Rejecting",
        rule=Rule(
            "AioserverRefuses",
            "sum by (instance, code) (rate(aioserver_rejections_total[5m])) > 0",
            label="code",
            remedy="The row of this code in docs/errors.md names the limit, and what to change.",
        ),
    ),
    Finding(
        "not_usable",
        "the active provider {name} is not usable",
        "`aioserver check` says what is missing.",
        ERROR,
        word="Not usable",
    ),
    Finding(
        "files",
        "few file descriptors are left",
        "Raise LimitNOFILE of the unit, or `ulimit -n`, and restart.",
        ERROR,
        word="Out of files",
        rule=Rule("AioserverDescriptors", "aioserver_open_fds / aioserver_max_fds > 0.8", "1m"),
    ),
    Finding(
        "nearly_full",
        "nine of ten connections are taken",
        "Raise max_connections, or add an instance: docs/scaling.md.",
        word="Nearly full",
        rule=Rule(
            "AioserverNearlyFull",
            "sum by (instance) (aioserver_connections) / on (instance) "
            "aioserver_connections_limit > 0.9",
        ),
    ),
    Finding(
        "loop_lag",
        "the event loop is late, and every answer with it",
        past="the event loop was {count} ms late",
        word="Slow",
        rule=Rule(
            "AioserverLate",
            "histogram_quantile(0.99, sum by (instance, le) "
            "(rate(aioserver_loop_lag_seconds_bucket[5m]))) > 0.25",
            remedy="See whether the machine is too busy, or add processes: uvicorn.workers.",
        ),
    ),
    Finding(
        "full",
        remedy="If {name} can answer more at once, raise its concurrent_requests;"
        " more connections would only wait for it.",
        severity=WARNING,
        word="Full",
    ),
    Finding("busy", severity=WARNING, word="Busy"),
    Finding("open", word="Open"),
    # The word and the texts are those of the section.
    Finding("section", severity=WARNING),
    Finding(
        "ledger",
        "its ledger is not written: {{ $value }} lines wait, and from 20,000 on they are lost",
        "Make the directory of usage.path writable, and see that its disk has room: "
        "docs/usage.md.",
        rule=Rule("AioserverLedgerNotWritten", "aioserver_usage_queue > 1000", "1m"),
    ),
    Finding(
        "certificate",
        "its certificate ends within 14 days, and was not renewed",
        "Renew it: the files of chat.websocket.tls are read again within seconds.",
        rule=Rule(
            "AioserverCertificateExpires",
            "aioserver_tls_certificate_expires_seconds - time() < 14 * 86400",
            "10m",
        ),
    ),
    Finding(
        "instances",
        "another process or machine of the cluster hangs, or cannot be reached",
        "See which: /stats names it under instances.",
        rule=Rule("AioserverInstanceUnheard", 'aioserver_instances{state="unheard"} > 0', "1m"),
    ),
    Finding(
        "reload",
        "it did not take its new configuration, and the old one stays in effect",
        "`aioserver check` tells every fault of the file.",
        rule=Rule(
            "AioserverReloadFailed",
            'increase(aioserver_reloads_total{outcome=~"invalid|failed"}[15m]) > 0',
            "",
        ),
    ),
    Finding(
        "log_lines",
        "it loses log lines, and serves on",
        "See whether the disk is full, or the reader of its output is too slow.",
        rule=Rule(
            "AioserverLogLinesDropped",
            "increase(aioserver_log_lines_dropped_total[15m]) > 0",
            "",
        ),
    ),
)

# Findings that are incidents only: each has a *past* and no *text*.
HAPPENED = _table(
    Finding(
        "auth",
        past="{requests} {were} denied: a missing or wrong key, or a host or origin not allowed",
        severity=WARNING,
    ),
    Finding(
        "slow_client",
        past="slow clients dropped, which did not read what was sent: {count}",
        severity=WARNING,
    ),
    Finding(
        "provider_auth",
        past="{name} refused our key, or its quota was used up ({count})",
        remedy=OF_PROVIDERS[FLAGGED].remedy,
        severity=ERROR,
    ),
    Finding("provider_faults", past="{name} {detail}: {attempts} failed in {span}"),
    Finding(
        "seams",
        past="{name} broke off {answers} in {span}, continued by another attempt: {detail}",
        severity=WARNING,
    ),
    Finding(
        "rescued",
        past="{name} broke off {answers} in {span}, made good by another attempt: {detail}",
        severity=WARNING,
    ),
)

# Habits of clients that lose the caches of providers (docs/slow.md). Only `doctor` shows them: the
# server is well. Those of changes are found by the beginning of a region's name.
REORDERED = Finding(
    "reordered_prompt",
    "prompts have the same regions in another order: in the last hour {count} tokens were read "
    "again for it",
    "Have the client sort its tools.",
    WARNING,
)
_HEAD = Finding(
    "changed_head",
    "prompts differ at {name}: in the last hour {count} tokens were read again for it",
    "Does the client begin its prompt with a date, a counter or an id? It belongs at the end. "
    "Claude Code's billing line is left out with CLAUDE_CODE_ATTRIBUTION_HEADER=0.",
    WARNING,
)
CHANGED_PROMPTS = {
    **dict.fromkeys(("system[", "instructions[", "messages[0]", "input[0]"), _HEAD),
    "tools[": Finding(
        "changed_tools",
        _HEAD.text,
        "Does the client add tools while it goes on, or describe one by a date?",
        WARNING,
    ),
}

FINDINGS = {
    **FAULTS,
    **REJECTED,
    **OF_PROVIDERS,
    **OF_SERVER,
    **HAPPENED,
    **_table(REORDERED, *CHANGED_PROMPTS.values()),
}


def rules() -> Iterator[dict[str, Any]]:
    """Yield the alerting rules of Prometheus, in its form."""
    for row in FINDINGS.values():
        if (rule := row.rule) is not None:
            name = f"{{{{ $labels.{rule.label} }}}}"
            yield {
                "alert": rule.alert,
                "expr": rule.expr,
                **({"for": rule.lasting} if rule.lasting else {}),
                "labels": {"severity": "critical" if row.severity == ERROR else "warning"},
                "annotations": {
                    "summary": "aioserver at {{ $labels.instance }}: "
                    + row.text.replace("{name}", name),
                    "description": row.remedy or rule.remedy,
                },
            }
