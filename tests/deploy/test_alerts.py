"""Each alert fires for the series that it is for, and for no other: told by Prometheus's own
`promtool`.

The series are written in promtool's notation: `1+2x3` is 1, 3, 5, 7, one sample a minute.
"""

from __future__ import annotations

import re
import subprocess
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from tests.support.tools import DEPLOY, installed
from tests.support.waiting import LATE

if TYPE_CHECKING:
    from pathlib import Path

RULES: list[dict[str, Any]] = yaml.safe_load((DEPLOY / "alerts.yaml").read_text())["groups"][0][
    "rules"
]
WHERE = {"instance": "a:1"}
PROVIDER = {**WHERE, "provider": "p"}
# Minutes of each series, and the minute in which the alerts are looked at.
LENGTH, LOOKED_AT = 30, 20


class Case(NamedTuple):
    """The series with which an alert fires, those with which it does not, and its labels."""

    fires: dict[str, str]
    rests: dict[str, str]
    labels: dict[str, str]
    value: str = ""


def lag(late: str) -> dict[str, str]:
    """The buckets of the loop's lag: 100 beats a minute, of which *late* were later than 0.25
    s.
    """
    name = 'aioserver_loop_lag_seconds_bucket{instance="a:1",le="%s"}'
    return {
        name % "0.25": f"0+{100 - int(late)}x30",
        name % "0.5": "0+100x30",
        name % "+Inf": "0+100x30",
    }


CASES = {
    "AioserverAway": Case(
        {'up{job="aioserver",instance="a:1"}': "0x30"},
        {'up{job="aioserver",instance="a:1"}': "1x30", 'up{job="other",instance="a:1"}': "0x30"},
        {**WHERE, "job": "aioserver"},
    ),
    "AioserverNotReady": Case(
        {'aioserver_ready{instance="a:1"}': "0x30"},
        # A stop of one minute.
        {'aioserver_ready{instance="a:1"}': "1x18 0 1x10"},
        WHERE,
    ),
    "AioserverBug": Case(
        {'aioserver_errors_total{instance="a:1"}': "0x18 1x11"},
        {'aioserver_errors_total{instance="a:1"}': "3x30"},
        WHERE,
    ),
    "AioserverRefuses": Case(
        {'aioserver_rejections_total{instance="a:1",code="c",face="sse"}': "0+9x30"},
        {'aioserver_rejections_total{instance="a:1",code="c",face="sse"}': "9x30"},
        {**WHERE, "code": "c"},
    ),
    "AioserverNearlyFull": Case(
        {
            'aioserver_connections{instance="a:1",face="sse"}': "50x30",
            'aioserver_connections{instance="a:1",face="websocket"}': "45x30",
            'aioserver_connections_limit{instance="a:1"}': "100x30",
        },
        {
            'aioserver_connections{instance="a:1",face="sse"}': "50x30",
            'aioserver_connections_limit{instance="a:1"}': "100x30",
        },
        WHERE,
    ),
    "AioserverProviderTrouble": Case(
        {'aioserver_provider_trouble{instance="a:1",provider="p"}': "4x30"},
        {'aioserver_provider_trouble{instance="a:1",provider="p"}': "0x30"},
        PROVIDER,
        "4",
    ),
    "AioserverLedgerNotWritten": Case(
        {'aioserver_usage_queue{instance="a:1"}': "5000x30"},
        {'aioserver_usage_queue{instance="a:1"}': "300x30"},
        WHERE,
        "5000",
    ),
    "AioserverCertificateExpires": Case(
        {'aioserver_tls_certificate_expires_seconds{instance="a:1"}': "1000000x30"},
        {'aioserver_tls_certificate_expires_seconds{instance="a:1"}': "2000000x30"},
        WHERE,
    ),
    "AioserverGroupOut": Case(
        {
            'aioserver_provider_trouble{instance="a:1",provider="p"}': "4x30",
            'aioserver_provider_trouble{instance="a:1",provider="q"}': "5x30",
            'aioserver_provider_trouble{instance="a:1",provider="other"}': "0x30",
            'aioserver_group_starts_total{instance="a:1",group="g",provider="p",home="new"}': "7x30",
            'aioserver_group_starts_total{instance="a:1",group="g",provider="p",home="home"}': "9x30",
            'aioserver_group_starts_total{instance="a:1",group="g",provider="q",home="new"}': "0x30",
        },
        {
            'aioserver_provider_trouble{instance="a:1",provider="p"}': "4x30",
            'aioserver_provider_trouble{instance="a:1",provider="q"}': "0x30",
            'aioserver_group_starts_total{instance="a:1",group="g",provider="p",home="new"}': "7x30",
            'aioserver_group_starts_total{instance="a:1",group="g",provider="q",home="new"}': "0x30",
        },
        {**WHERE, "group": "g"},
    ),
    "AioserverProviderQueue": Case(
        {
            'aioserver_provider_waiting{instance="a:1",provider="p"}': "30x30",
            'aioserver_provider_limit{instance="a:1",provider="p"}': "25x30",
        },
        {
            'aioserver_provider_waiting{instance="a:1",provider="p"}': "20x30",
            'aioserver_provider_limit{instance="a:1",provider="p"}': "25x30",
        },
        PROVIDER,
    ),
    "AioserverRetryBudgetUsedUp": Case(
        {'aioserver_retries_refused_total{instance="a:1",provider="p"}': "0+1x30"},
        {'aioserver_retries_refused_total{instance="a:1",provider="p"}': "1x30"},
        PROVIDER,
    ),
    "AioserverAnswersFail": Case(
        {
            'aioserver_requests_total{instance="a:1",provider="p",outcome="ok"}': "0+90x30",
            'aioserver_requests_total{instance="a:1",provider="p",outcome="provider_error"}': "0+10x30",
        },
        {
            'aioserver_requests_total{instance="a:1",provider="p",outcome="ok"}': "0+99x30",
            'aioserver_requests_total{instance="a:1",provider="p",outcome="provider_error"}': "0+1x30",
        },
        PROVIDER,
    ),
    "AioserverLate": Case(lag("5"), lag("0"), WHERE),
    "AioserverDescriptors": Case(
        {
            'aioserver_open_fds{instance="a:1"}': "90x30",
            'aioserver_max_fds{instance="a:1"}': "100x30",
        },
        {
            'aioserver_open_fds{instance="a:1"}': "70x30",
            'aioserver_max_fds{instance="a:1"}': "100x30",
        },
        WHERE,
    ),
    "AioserverInstanceUnheard": Case(
        {'aioserver_instances{instance="a:1",state="unheard"}': "1x30"},
        {'aioserver_instances{instance="a:1",state="joined"}': "1x30"},
        {**WHERE, "state": "unheard"},
    ),
    "AioserverReloadFailed": Case(
        {'aioserver_reloads_total{instance="a:1",outcome="invalid"}': "0x15 1x14"},
        {'aioserver_reloads_total{instance="a:1",outcome="applied"}': "0x15 1x14"},
        {**WHERE, "outcome": "invalid"},
    ),
    "AioserverLogLinesDropped": Case(
        {'aioserver_log_lines_dropped_total{instance="a:1"}': "0x15 7x14"},
        {'aioserver_log_lines_dropped_total{instance="a:1"}': "7x30"},
        WHERE,
    ),
}


def expected(rule: dict[str, Any], case: Case) -> dict[str, Any]:
    """The alert of *rule* for the series of *case*, with its annotations filled in."""

    def filled(text: str) -> str:
        text = text.replace("{{ $value }}", case.value)
        return re.sub(r"\{\{ \$labels\.(\w+) \}\}", lambda match: case.labels[match[1]], text)

    return {
        "exp_labels": {**rule["labels"], **case.labels},
        "exp_annotations": {name: filled(text) for name, text in rule["annotations"].items()},
    }


def cases_of(rule: dict[str, Any]) -> list[dict[str, Any]]:
    """The two tests of an alert, as promtool reads them."""
    case = CASES[rule["alert"]]
    return [
        {
            "interval": "1m",
            "input_series": [
                {"series": name, "values": values} for name, values in series.items()
            ],
            "alert_rule_test": [
                {
                    "eval_time": f"{LOOKED_AT}m",
                    "alertname": rule["alert"],
                    "exp_alerts": [expected(rule, case)] if series is case.fires else [],
                }
            ],
        }
        for series in (case.fires, case.rests)
    ]


def test_each_alert_fires_for_what_it_is_for(tmp_path: Path) -> None:
    promtool = installed("promtool")
    file = tmp_path / "tests.yaml"
    tests = [test for rule in RULES for test in cases_of(rule)]
    file.write_text(yaml.safe_dump({"rule_files": [str(DEPLOY / "alerts.yaml")], "tests": tests}))

    for arguments in (("check", "rules", DEPLOY / "alerts.yaml"), ("test", "rules", file)):
        done = subprocess.run(
            [promtool, *arguments], capture_output=True, text=True, timeout=LATE, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_has_its_case() -> None:
    assert {rule["alert"] for rule in RULES} == CASES.keys()
