from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from aioserver.commands.check import check
from aioserver.config.schema import SettingsClass, fields
from aioserver.config.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DIGEST = "a" * 64
TIGHT = {"tokens_per_minute": 1000, "tokens_per_day": 10}
LONGER = {"tokens_per_day": 100, "tokens_per_week": 70, "tokens_per_month": 90}
BELOW = "must be 0 or >= tokens_per_minute (1000), not 10"
JWT = {"issuer": "i", "audience": "a", "jwks_url": "https://issuer.example/keys"}
GROUPS: dict[str, Any] = {"choose": "ordered", "affinity": "prefix", "members": ["demo"]}
UNDONE = "with `choose: ordered` it would undo the order (set choose: least_busy or weighted)"
# For each class whose settings have rules between them, and each place where it may stand: a file
# whose only fault is a broken rule, where the fault is, and what is said of it.
RULES: list[tuple[str, dict[str, Any], str, str]] = [
    ("Limits", {"auth": {"jwt": {**JWT, "limits": {"staff": TIGHT}}}}, "auth.jwt.limits.staff.tokens_per_day", BELOW),
    ("Limits", {"auth": {"keys": [{"name": "k", "sha256": DIGEST, **TIGHT}]}}, "auth.keys[0].tokens_per_day", BELOW),
    ("Limits", {"auth": {"keys": [{"name": "k", "key_env": "K", **TIGHT}]}}, "auth.keys[0].tokens_per_day", BELOW),
    ("Limits", {"auth": {"keys": [{"name": "k", "sha256": DIGEST, **LONGER}]}}, "auth.keys[0].tokens_per_week", "must be 0 or >= tokens_per_day (100), not 70"),
    ("Auth", {"auth": {"keys": [{"name": "k"}]}}, "auth.keys[0]", "needs exactly one of key_env, key_file, sha256"),
    ("Jwt", {"auth": {"jwt": {**JWT, "limits": {}}}}, "auth.jwt.limits", "without any role every token is refused"),
    ("Hook", {"hooks": [{"name": "h"}]}, "hooks[0]", "needs exactly one of url, python"),
    ("Group", {"llm": {"models": {"g": GROUPS}}}, "llm.models.g.affinity", UNDONE),
    ("Group", {"llm": {"models": {"g": []}}}, "llm.models.g", "a group needs a member"),
    ("Provider", {"llm": {"providers": {"demo": {"simulated": False}}}}, "llm.providers.demo.base_url", "required key is missing"),
    ("HttpClient", {"llm": {"providers": {"demo": {"http_client": {"max_keepalive": 1000}}}}}, "llm.providers.demo.http_client.max_keepalive", "must be <= max_connections (50), not 1000"),
    ("Llm", {"llm": {"fallbacks": ["none"]}}, "llm.fallbacks[0]", 'text "none" is not among llm.providers (demo)'),
    ("Concurrency", {"chat": {"websocket": {"concurrency": {"max_connections": 9, "connection_queue_size": 5, "queue_timeout": 1.0, "uvicorn": {}}}}}, "chat.websocket.concurrency.connection_queue_size", "must be >= max_connections (9), not 5"),
    ("Chat", {"chat": {"sse": {"endpoint": "/a"}, "websocket": {"endpoint": "/a"}}}, "chat.sse.endpoint", "must differ from chat.websocket.endpoint (/a)"),
    ("Cluster", {"cluster": {"listen": "10.0.0.5:7400-7300"}}, "cluster.listen", "has no port from 1 to 65535, or no range of such ports"),
    ("Cluster", {"cluster": {"advertise": "[::1]:70000"}}, "cluster.advertise", "has no port from 1 to 65535, or no range of such ports"),
    ("Settings", {"hooks": [{"name": "h", "url": "http://h"}] * 2}, "hooks[1].name", "another hook is named h as well"),
]  # fmt: skip


def _both(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """*one* with the values of *other* in it."""
    inside = {
        key: _both(one[key], value)
        for key, value in other.items()
        if isinstance(value, dict) and isinstance(one.get(key), dict)
    }
    return one | other | inside


def _file(tmp_path: Path, *changes: dict[str, Any]) -> Path:
    data: dict[str, Any] = {
        "llm": {"active": "demo", "providers": {"demo": {"simulated": True, "model": "m"}}}
    }
    for change in changes:
        data = _both(data, change)
    path = tmp_path / "c.yaml"
    path.write_text(json.dumps(data))
    return path


def _said(path: Path, capsys: pytest.CaptureFixture[str]) -> set[str]:
    """What `check` says of the file *path*, which it refuses, without the places."""
    code = check(path)
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    lines = [line for line in err.splitlines() if not line.startswith("warning: ")]
    assert all(line.startswith(f"{path}:") for line in lines)
    return {line.split(" ", 1)[1] for line in lines}


@pytest.mark.parametrize(("_owner", "change", "path", "message"), RULES)
def test_a_broken_rule_is_a_line_of_check_in_each_place_where_it_may_stand(
    _owner: str,
    change: dict[str, Any],
    path: str,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("K", "a-key-of-a-client")
    assert check(_file(tmp_path)) == 0
    capsys.readouterr()

    told = {f"{path}: {message}"}
    assert _said(_file(tmp_path, change), capsys) == told
    other = "usage.path: expected text, not 7 (put it in quotes)"
    assert _said(_file(tmp_path, change, {"usage": {"path": 7}}), capsys) == {*told, other}


def test_each_class_with_rules_is_in_the_table() -> None:
    def classes(cls: type[Any]) -> Iterator[type[Any]]:
        yield from (base for base in cls.__mro__ if issubclass(base, SettingsClass))
        for field in fields(cls):
            if (inner := field.metadata["validator"].inner) is not None:
                yield from classes(inner)

    with_rules = {
        cls.__name__
        for cls in classes(Settings)
        if "__post_init__" in vars(cls) and cls is not SettingsClass
    }

    assert with_rules == {owner for owner, *_ in RULES}


@pytest.mark.parametrize(
    ("change", "paths"),
    [
        ({"hooks": [{"name": 1, "url": "http://h"}] * 2}, ["hooks[0].name", "hooks[1].name"]),
        ({"hooks": [5, 5]}, ["hooks[0]", "hooks[1]"]),
        ({"auth": {"keys": [5, 5]}}, ["auth.keys[0]", "auth.keys[1]"]),
        (
            {"auth": {"keys": [{"name": 1, "sha256": DIGEST}, {"name": 1, "sha256": "b" * 64}]}},
            ["auth.keys[0].name", "auth.keys[1].name"],
        ),
        (
            {"llm": {"models": {"g": {"choose": "weighted", "members": [5, "demo"]}}}},
            ["llm.models.g.members[0]"],
        ),
        (
            {"llm": {"models": {"g": [{"provider": "demo", "model": 5}] * 2}}},
            ["llm.models.g[0].model", "llm.models.g[1].model"],
        ),
        ({"llm": {"models": {"g": [5, *["demo"] * 64]}}}, ["llm.models.g", "llm.models.g[0]"]),
    ],
)
def test_a_faulty_value_in_a_list_breaks_no_rule_besides(
    change: dict[str, Any], paths: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = _said(_file(tmp_path, change), capsys)

    twice = {line for line in said if line.endswith(": this member appears twice")}
    assert sorted(line.split(": ")[0] for line in said - twice) == paths
