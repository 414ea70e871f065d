"""The alerting rules and the dashboard for Grafana: each metric, label and value in them is one of
`/metrics`.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from aioserver.monitoring.prometheus import TROUBLES
from tests.support.server import provider_entry
from tests.support.tls import TLS, pair

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.server import MakeServer

# Not everybody who merges has installed the new option of the tests.
promql = pytest.importorskip("promql_parser")

DEPLOY = Path(__file__).parents[2] / "deploy"
RULES: list[dict[str, Any]] = yaml.safe_load((DEPLOY / "alerts.yaml").read_text())["groups"][0][
    "rules"
]
GRAFANA: dict[str, Any] = json.loads((DEPLOY / "grafana.json").read_text())
PANELS: list[dict[str, Any]] = [panel for panel in GRAFANA["panels"] if panel["type"] != "row"]
# Prometheus's own metric, and the labels that it adds.
OF_PROMETHEUS = {"up"}
ADDED = {"instance", "job"}
# What Grafana fills in.
VARIABLES = {"$__rate_interval": "5m", "$instance": ".*", "$provider": ".*"}
# The severities that a receiver may expect.
SEVERITIES = {"warning", "critical"}


def expressions() -> Iterator[tuple[str, str]]:
    """Each expression, and where it is."""
    for rule in RULES:
        yield rule["alert"], rule["expr"]
    for panel in PANELS:
        for target in panel["targets"]:
            expression = target["expr"]
            for name, value in VARIABLES.items():
                expression = expression.replace(name, value)
            yield panel["title"], expression


EXPRESSIONS = list(expressions())


def parts(node: Any) -> Iterator[Any]:
    """The parsed *node*, and all that it is made of."""
    yield node
    for name in ("lhs", "rhs", "expr", "vector_selector", "param"):
        if (inner := getattr(node, name, None)) is not None:
            yield from parts(inner)
    for inner in getattr(node, "args", ()):
        yield from parts(inner)


async def exposed(make_server: MakeServer, folder: Path) -> dict[str, dict[str, set[str]]]:
    """The labels of each sample of `/metrics`, and the values of each label."""
    other = provider_entry("http://127.0.0.1:9/v1")
    group = {"members": ["sim", "other"], "choose": "least_busy", "affinity": "prefix"}
    changes = {"llm.providers.other": other, "llm.models": {"pair": group}, TLS: pair(folder)}
    server = await make_server(**changes)
    async with server.session.get(f"{server.base}/metrics") as response:
        text = await response.text()
    samples: dict[str, dict[str, set[str]]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            values = samples.setdefault(sample.name, defaultdict(set))
            for label, value in sample.labels.items():
                values[label].add(value)
    return samples


async def test_each_metric_label_and_value_is_there(
    make_server: MakeServer, tmp_path: Path
) -> None:
    samples = await exposed(make_server, tmp_path)
    named = 0
    for place, expression in EXPRESSIONS:
        labels: set[str] = set()
        groups: set[str] = set()
        for part in parts(promql.parse(expression)):
            if isinstance(part, promql.AggregateExpr) and part.modifier is not None:
                groups |= set(part.modifier.labels)
            if not isinstance(part, promql.VectorSelector) or part.name in OF_PROMETHEUS:
                continue
            named += 1
            assert part.name in samples, f"{place}: {part.name}"
            labels |= samples[part.name].keys()
            for matcher in part.matchers.matchers:
                if matcher.name in ADDED:
                    continue
                values = samples[part.name][matcher.name]
                assert values, f"{place}: {part.name} has no label {matcher.name}"
                for value in matcher.value.split("|"):
                    assert value in {*values, ".*"}, f"{place}: {matcher.name} is never {value}"
        assert groups <= labels | ADDED, f"{place}: no metric has the labels {groups - labels}"

    assert named > 40


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_each_alert_says_what_it_is_and_what_to_do(rule: dict[str, Any]) -> None:
    assert re.fullmatch(r"Aioserver[A-Z]\w+", rule["alert"])
    assert rule["labels"]["severity"] in SEVERITIES
    assert re.fullmatch(r"\d+[smh]", rule.get("for", "1m"))
    summary, description = rule["annotations"]["summary"], rule["annotations"]["description"]
    assert "aioserver" in summary or "provider" in summary
    assert description.endswith(".")
    assert rule.keys() <= {"alert", "expr", "for", "labels", "annotations"}
    # Of its labels it shows those that its expression keeps.
    shown = set(re.findall(r"\$labels\.(\w+)", summary + description))
    expression = promql.parse(rule["expr"])
    kept = [
        set(part.modifier.labels)
        for part in parts(expression)
        if isinstance(part, promql.AggregateExpr)
    ]
    assert all(shown <= group for group in kept[:1])


def test_alerts_have_names_of_their_own() -> None:
    names = [rule["alert"] for rule in RULES]

    assert len(set(names)) == len(names)


def test_panels_lie_beside_each_other_and_say_what_they_show() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in GRAFANA["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert all(x < 24 for x, _ in cells), panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in GRAFANA["panels"]}) == len(GRAFANA["panels"])
    assert all(panel["description"] for panel in PANELS)
    assert len({panel["title"] for panel in PANELS}) == len(PANELS)


def test_every_panel_asks_the_source_that_was_chosen() -> None:
    variables = {variable["name"]: variable for variable in GRAFANA["templating"]["list"]}

    assert variables.keys() == {"datasource", "instance", "provider"}
    for panel in PANELS:
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        for target in panel["targets"]:
            assert target["datasource"] == panel["datasource"]
            assert '{instance=~"$instance"' in target["expr"], panel["title"]


async def test_the_variables_ask_for_metrics_that_are_there(
    make_server: MakeServer, tmp_path: Path
) -> None:
    samples = await exposed(make_server, tmp_path)
    queries = [
        variable["definition"]
        for variable in GRAFANA["templating"]["list"]
        if "definition" in variable
    ]
    assert len(queries) == 2
    for query in queries:
        match = re.fullmatch(r"label_values\((\w+), (\w+)\)", query)
        assert match is not None
        assert match[1] in samples
        assert match[2] in {*samples[match[1]], *ADDED}


def test_the_words_of_trouble_are_those_of_the_server() -> None:
    panel = next(panel for panel in PANELS if panel["title"] == "Trouble")
    options = panel["fieldConfig"]["defaults"]["mappings"][0]["options"]

    assert [option["text"].replace(" ", "_") for option in options.values()] == ["none", *TROUBLES]
    assert [int(number) for number in options] == list(range(len(TROUBLES) + 1))
