"""The JSON Schema judges as the validators do, wherever one value alone decides."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import voluptuous as vol
import yaml

from aioserver.commands.check import command
from aioserver.config import json_schema
from aioserver.config.schema import fields, key_of
from aioserver.config.settings import SETTINGS, Settings
from aioserver.config.shipped import SHIPPED
from tests.support.configurations import ORIGINAL, changed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aioserver.config.schema import Validator

# Not everybody who merges has installed the new option of the tests.
jsonschema = pytest.importorskip("jsonschema")

ROOT = Path(__file__).parents[2]
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 10, 11, 65_535, 65_536, 2**31 - 1, 2**31, 2**53, 2**53 + 1),
    *(0.5, -0.5, 10**9, 10**9 + 1, 1e9 + 0.5, 2.5, "", " ", "a", "a b", "tab\t", "li\nne", "é"),
    *("json", "console", "JSON", "info", "INFO", "Info", "fail", "wait", "Wait", "sql", "memory"),
    *("%(message)s", "unlimited", "time_based", "time", "*", "http://x", "https://x/v1", "\0"),
    *("HTTP://x", "http://x?a", "http://u:p@x", "redis://x/0", "rediss://:p@x", "unix:///x"),
    *("http://x/", "null", "10.0.0.0/8", "unix", "/ws/chat", "/stats", "/", "ws", "/v1/models"),
    *("/a/", "/a b", "NAME", "name", "1NAME", "NAME_2", "x-tenant", "x tenant", "http://"),
    *("a" * 64, "A" * 65, "0" * 64, "g" * 64, [], ["a"], ["http://x"], [1], [None], "\u4e2d"),
    *({}, {"a": "b"}, {"a b": "c"}, {"a": 1}),
]
# Where the schema is more lenient: it knows no list of names, and no form of an address.
LENIENT = {"pass_headers", "trusted_proxies"}


def keys(cls: type[Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, Validator, Any]]:
    """Each key of *cls* and of its sections: its path, its validator, and its schema."""
    schema = json_schema.section_schema(cls)
    for field in fields(cls):
        validator = field.metadata["validator"]
        yield ".".join((*path, key_of(field))), validator, schema["properties"][key_of(field)]
        if validator.inner is not None:
            yield from keys(validator.inner, (*path, key_of(field)))


KEYS = {path: (validator, schema) for path, validator, schema in keys(Settings)}


def judge(schema: Any) -> Any:
    """What judges by *schema*, a part of the whole one."""
    definitions = json_schema.document()["definitions"]
    return jsonschema.Draft7Validator({**schema, "definitions": definitions})


def accepted(validator: Validator, value: Any) -> bool:
    try:
        validator(copy.deepcopy(value))
    except vol.Invalid:
        return False
    return True


def test_it_is_a_schema() -> None:
    jsonschema.Draft7Validator.check_schema(json_schema.document())


def test_each_value_is_judged_as_the_validators_judge_it() -> None:
    wrong: dict[str, list[Any]] = {}
    for path, (validator, schema) in KEYS.items():
        judges = judge(schema).is_valid
        lenient = path.rpartition(".")[2] in LENIENT
        wrong[path] = [
            value
            for value in VALUES
            if (valid := judges(value)) != accepted(validator, value) and not (lenient and valid)
        ]

    assert {path: values for path, values in wrong.items() if values} == {}


def test_every_kind_of_value_is_told_from_another() -> None:
    """Otherwise the test before might compare two verdicts that are always the same."""
    for path, (validator, _) in KEYS.items():
        verdicts = {accepted(validator, value) for value in [*VALUES, {"none": 1}]}
        assert False in verdicts, path


@pytest.mark.parametrize("file", [SHIPPED, ORIGINAL], ids=["shipped", "original"])
def test_the_files_that_load_are_valid(file: Path) -> None:
    values = yaml.safe_load(file.read_text())

    assert [error.message for error in _errors(values)] == []


@pytest.mark.parametrize(
    ("change", "valid"),
    [
        ({"chat__websocket__prot": 1}, False),
        ({"chat__websocket__port": "${PORT}"}, True),
        ({"chat__websocket__port": "${PORT:-8000}"}, True),
        ({"chat__websocket__port": "8000"}, False),
        ({"llm__providers__groq__model": None}, False),
        ({"llm__providers__groq__account_paths": True}, True),
        ({"llm__providers__groq__account_paths": "yes"}, False),
        ({"llm__providers__groq__http_client": {}}, True),
        ({"llm__providers__groq__http_client": {"read_timeout": 7}}, True),
        ({"llm__providers__groq__http_client": {"read_timout": 7}}, False),
        ({"chat__websocket__concurrency": {"uvicorn": None}}, True),
        ({"auth": None}, True),
        ({"auth": {"keys": [{"name": "web", "sha256": "0" * 64}]}}, True),
        ({"auth": {"keys": [{"name": "web", "sha": "0" * 64}]}}, False),
        ({"cluster": None}, True),
        ({"mcp": {"anything": [1]}}, True),
        ({"unheard_of": {}}, False),
    ],
)
def test_a_whole_file_is_judged_as_it_is_when_it_is_loaded(
    change: dict[str, Any], valid: bool
) -> None:
    values = changed(**change)

    assert (not _errors(values)) is valid
    # What a variable brings is seen when the file is loaded.
    if "${" not in str(change):
        assert accepted(SETTINGS, values) is valid


def test_a_key_that_is_missing_is_a_fault() -> None:
    values = changed()
    del values["llm"]["active"], values["llm"]["providers"]["groq"]["model"]

    assert sorted(error.message for error in _errors(values)) == [
        "'active' is a required property",
        "'model' is a required property",
    ]


def test_each_key_says_what_it_means() -> None:
    for path, (validator, schema) in KEYS.items():
        assert "description" in schema or validator.inner is not None, path
    described = KEYS["llm.providers.account_paths"][1]
    assert described["description"].startswith("whether admins may use the objects")
    assert described["default"] is False
    assert "default" not in KEYS["llm.providers.model"][1]
    assert KEYS["llm.providers.http_client.max_connections"][1]["default"] == 50


def test_the_file_that_ships_is_that_of_the_settings_and_named_by_the_configuration(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command.main(["--schema"], standalone_mode=False) == 0

    printed = capsys.readouterr().out
    named = SHIPPED.read_text().splitlines()[0].removeprefix("# yaml-language-server: $schema=")
    assert (SHIPPED.parent / named).read_text() == printed == (ROOT / named).read_text()


def _errors(values: Any) -> list[Any]:
    return list(jsonschema.Draft7Validator(json_schema.document()).iter_errors(values))
