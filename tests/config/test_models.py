"""Names of models, providers that are like others, and sections that are left out."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from aioserver.config import Configuration
from aioserver.config.settings import Group, Member
from aioserver.config.shipped import SHIPPED
from aioserver.config.views import plain
from tests.support.configurations import load, refused

if TYPE_CHECKING:
    from pathlib import Path

SHIPPED_CLIENT = yaml.safe_load(SHIPPED.read_text())["llm"]["providers"]["openai"]["http_client"]
PROVIDERS: dict[str, Any] = {
    "gpu1": {"base_url": "http://10.0.0.1:8000/v1", "model": "qwen3"},
    "gpu2": {"like": "gpu1", "base_url": "http://10.0.0.2:8000/v1"},
    "gpu3": {
        "like": "gpu2",
        "base_url": "http://10.0.0.3:8000/v1",
        "http_client": {"concurrent_requests": 8},
    },
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "config.yaml"


def made(
    file: Path,
    models: Any = None,
    providers: dict[str, Any] | None = None,
    environ: dict[str, str] | None = None,
    **llm: Any,
) -> Configuration:
    """A configuration with these *models*; *providers* are added."""
    values = {"active": "gpu1", **llm, "providers": {**PROVIDERS, **(providers or {})}}
    if models is not None:
        values["models"] = models
    return load(yaml.safe_dump({"llm": values}, sort_keys=False), file, **(environ or {}))


def test_a_file_of_six_lines_serves_with_the_values_that_ship(file: Path) -> None:
    text = "llm:\n  active: mine\n  providers:\n    mine:\n      base_url: http://h/v1\n      model: m\n"

    configuration = load(text, file)

    shipped = Configuration.load(SHIPPED, environ={}).settings
    assert configuration.warnings == ()
    assert configuration.settings.chat == shipped.chat
    mine = configuration.settings.llm.providers["mine"]
    assert mine.http_client == shipped.llm.providers["openai"].http_client
    assert configuration.get_http_client_config()["max_connections"] == 50
    configuration.check_usable()


@pytest.mark.parametrize(
    ("section", "left_out"),
    [
        ("chat:\n  websocket:\n    port: 9\n", "concurrency"),
        (
            "chat:\n  websocket:\n    concurrency: {max_connections: 7, connection_queue_size: 9}\n",
            "uvicorn",
        ),
    ],
)
def test_a_section_inside_one_that_is_there_may_be_left_out(
    section: str, left_out: str, file: Path
) -> None:
    text = f"{section}llm: {{active: m, providers: {{m: {{base_url: 'http://h', model: m}}}}}}\n"

    concurrency = load(text, file).settings.chat.websocket.concurrency

    assert concurrency.uvicorn.backlog == 2048
    assert concurrency.max_connections == (100 if left_out == "concurrency" else 7)


@pytest.mark.parametrize("client", [{"read_timeout": 7}, {"concurrent_requests": 2}, {}, None])
def test_a_key_that_a_section_leaves_out_has_the_value_that_ships(
    client: dict[str, Any] | None, file: Path
) -> None:
    own = {**PROVIDERS["gpu1"], "http_client": client}
    client = client or {}

    providers = made(
        file,
        providers={
            "own": own,
            "like": {"like": "own", "http_client": {"max_retries": 9}},
            "all": {"like": "own", "http_client": None},
        },
    ).settings.llm.providers

    # These follow from others, unless they are set.
    derived = {
        "queue_timeout": client.get("read_timeout", 60.0),
        "queue_size": max(64, 10 * client.get("concurrent_requests", 25)),
    }
    expected = {**SHIPPED_CLIENT, **derived, **client}
    assert plain(providers["own"].http_client) == expected
    assert plain(providers["like"].http_client) == {**expected, "max_retries": 9}
    assert providers["all"].http_client == providers["own"].http_client


def test_a_key_that_is_left_out_keeps_the_rules_with_those_that_are_there(file: Path) -> None:
    text = """\
chat:
  websocket:
    concurrency: {max_connections: 1000, uvicorn: {worker: 2}}
llm:
  active: m
  providers:
    m: {base_url: http://h, model: m, http_client: {max_connections: 10, max_retrys: 2}}
"""
    faults = refused(lambda: load(text, file), file)

    client = "llm.providers.m.http_client"
    assert faults == [
        (
            "F:3:5 chat.websocket.concurrency.connection_queue_size: "
            "must be >= max_connections (1000), not 500"
        ),
        "F:3:52 chat.websocket.concurrency.uvicorn.worker: unknown key (did you mean workers?)",
        f"F:7:39 {client}.concurrent_requests: must be <= max_connections (10), not 25",
        f"F:7:39 {client}.max_keepalive: must be <= max_connections (10), not 20",
        f"F:7:74 {client}.max_retrys: unknown key (did you mean max_retries?)",
    ]


def test_a_section_without_a_value_is_left_out(file: Path) -> None:
    text = "llm: {active: m, providers: {m: {base_url: 'http://h/v1', model: m}}}\n"

    for chat in ("chat:\n", "chat:\n  websocket:\n", "chat:\n  websocket:\n    concurrency:\n"):
        configuration = load(chat + text, file)
        assert configuration.settings.chat == load(text, file).settings.chat
        assert configuration.warnings == ()


def test_a_variable_changes_one_value_in_a_section_that_is_left_out(file: Path) -> None:
    configuration = made(
        file,
        environ={
            "AIOSERVER__CHAT__WEBSOCKET__PORT": "9000",
            "AIOSERVER__LLM__PROVIDERS__GPU1__HTTP_CLIENT__READ_TIMEOUT": "7",
            "AIOSERVER__LLM__PROVIDERS__GPU2__HTTP_CLIENT__MAX_RETRIES": "9",
        },
    )

    providers = configuration.settings.llm.providers
    assert configuration.settings.chat.websocket.port == 9000
    assert configuration.settings.chat.websocket.concurrency.max_connections == 100
    # What is derived is derived after the merge.
    assert providers["gpu1"].http_client.queue_timeout == 60
    assert [providers[name].http_client.read_timeout for name in PROVIDERS] == [7, 7, 7]
    assert [providers[name].http_client.max_retries for name in PROVIDERS] == [3, 9, 9]


def test_a_provider_has_what_the_other_one_has_but_for_its_own(file: Path) -> None:
    other = {
        "base_url": "http://other/v1",
        "model": "m",
        "headers": {"x-a": "1"},
        "temperature": 0.1,
        "http_client": {
            **{key: value for key, value in SHIPPED_CLIENT.items() if key != "queue_size"},
            "concurrent_requests": 4,
        },
    }
    providers = made(
        file,
        providers={
            "other": other,
            "own": {
                "like": "other",
                "headers": {"x-b": "2"},
                "http_client": {"max_retries": 0, "concurrent_requests": 6},
            },
        },
    ).settings.llm.providers

    own = providers["own"]
    assert (own.base_url, own.model, own.temperature) == ("http://other/v1", "m", 0.1)
    assert own.headers == {"x-b": "2"}
    assert (own.http_client.max_retries, own.http_client.queue_size) == (0, 64)
    assert providers["other"].http_client.queue_size == 64
    assert providers["gpu3"].http_client.concurrent_requests == 8
    assert providers["gpu3"].http_client.queue_size == 250


def test_an_address_and_a_key_replace_those_of_the_other(file: Path) -> None:
    key = file.with_name("key")
    key.write_text("from-a-file")
    configuration = made(
        file,
        environ={"OPENAI_API_KEY": "of-openai", "MINE": "of-mine"},
        providers={
            "openai": {"base_url": "https://api.openai.com/v1", "model": "m"},
            "second": {"like": "openai"},
            "third": {"like": "second", "api_key_env": "MINE"},
            "fourth": {"like": "third", "api_key_file": str(key)},
            "fake": {"like": "openai", "simulated": True},
            "groq": {"like": "openai", "base_url": "https://api.groq.com/openai/v1"},
        },
    )

    providers = configuration.settings.llm.providers
    keys = {name: provider.api_key for name, provider in providers.items()}
    texts = {name: key and key.reveal() for name, key in keys.items()}
    assert texts == {
        **dict.fromkeys(PROVIDERS),
        "openai": "of-openai",
        "second": "of-openai",
        "third": "of-mine",
        "fourth": "from-a-file",
        "fake": "of-openai",
        # Its name says where its key is.
        "groq": None,
    }
    assert providers["groq"].missing_key == "GROQ_API_KEY"
    assert (providers["fake"].base_url, providers["fake"].simulated) == ("", True)
    assert providers["fake"].usable


def test_a_key_in_a_pipe_is_read_once_for_all_who_have_it(file: Path) -> None:
    reading, writing = os.pipe()
    os.write(writing, b"through-a-pipe")
    os.close(writing)
    try:
        providers = made(
            file,
            providers={
                "a": {**PROVIDERS["gpu1"], "api_key_file": f"/dev/fd/{reading}"},
                "b": {"like": "a"},
            },
        ).settings.llm.providers
    finally:
        os.close(reading)

    assert [key.reveal() for name in "ab" if (key := providers[name].api_key) is not None] == [
        "through-a-pipe"
    ] * 2


def test_faults_of_like_are_told_where_they_are(file: Path) -> None:
    faults = refused(
        lambda: made(
            file,
            providers={
                "a": {"like": "b"},
                "b": {"like": "c"},
                "c": {"like": "a"},
                "d": {"like": "gpu4"},
                "e": {"like": "d"},
                "f": {"like": 1},
            },
        ),
        file,
    )

    assert {fault.split(" ", 1)[1] for fault in faults} == {
        "llm.providers.c.like: leads in a circle: a → b → c → a",
        (
            'llm.providers.d.like: text "gpu4" is not among llm.providers'
            " (gpu1, gpu2, gpu3, a, b, c, e, f) (did you mean gpu3?)"
        ),
        "llm.providers.f.like: expected text, not 1 (put it in quotes)",
        "llm.providers.f.model: required key is missing",
        "llm.providers.f.base_url: required key is missing",
    }


def test_a_fault_that_is_inherited_is_told_once_where_it_is_written(file: Path) -> None:
    faults = refused(
        lambda: made(
            file,
            providers={
                "a": {"base_url": "http://a", "model": 1, "http_client": {"max_keepalive": -1}},
                "b": {"like": "a"},
                "c": {"like": "b", "http_client": {"max_retries": -2}},
                # The rule is broken here alone.
                "d": {"like": "gpu1", "http_client": {"max_connections": 10}},
            },
        ),
        file,
    )

    paths = [fault.split(" ", 1)[1].split(":")[0] for fault in faults]
    assert len(paths) == len(set(paths))
    assert {path for path in paths if ".b." in path} == set()
    assert {path for path in paths if ".c." in path} == {"llm.providers.c.http_client.max_retries"}
    assert {path for path in paths if ".d." in path} == {
        "llm.providers.d.http_client.max_keepalive",
        "llm.providers.d.http_client.concurrent_requests",
    }


def test_a_name_leads_to_a_member_a_list_or_a_section(file: Path) -> None:
    configuration = made(
        file,
        {
            "fast": "gpu1/llama-8b",
            "smart": ["gpu1", "gpu2/openai/gpt-4o"],
            "qwen": {
                "members": [
                    "gpu1",
                    {"provider": "gpu3", "model": "awq", "weight": 2, "max_context": 32768},
                ],
                "choose": "weighted",
                "affinity": "prefix",
            },
            "claude-*": "gpu2",
        },
        active="qwen",
        fallbacks=["smart", "gpu2"],
    )

    llm = configuration.settings.llm
    assert llm.models == {
        "fast": Group(members=(Member(provider="gpu1", model="llama-8b"),)),
        "smart": Group(
            members=(Member(provider="gpu1"), Member(provider="gpu2", model="openai/gpt-4o"))
        ),
        "qwen": Group(
            members=(
                Member(provider="gpu1", weight=1),
                Member(provider="gpu3", model="awq", weight=2, max_context=32768),
            ),
            choose="weighted",
            affinity="prefix",
        ),
        "claude-*": Group(members=(Member(provider="gpu2"),)),
    }
    assert llm.unknown_models == "pass"
    assert configuration.get_http_client_config() == configuration.get_http_client_config("gpu1")
    assert configuration.effective()["llm"]["models"]["fast"]["choose"] == "ordered"


@pytest.mark.parametrize(
    ("models", "fault"),
    [
        ({"gpu1": "gpu2"}, "gpu1: a provider has this name, which pins it"),
        ({"gpu1/x": "gpu2"}, "gpu1/x: begins with the name of the provider gpu1, which pins it"),
        ({"a": []}, "a: a group needs a member"),
        ({"a": {"members": []}}, "a.members: a group needs a member"),
        ({"a": ["gpu1", "gpu1/qwen3"]}, "a[1]: this member appears twice"),
        ({"a": "b", "b": "a"}, "b: leads in a circle: a → b → a"),
        (
            {"a": ["x/y"], "x/y": {"members": ["gpu1"], "fallbacks": ["gpu2", "a"]}},
            "x/y.fallbacks[1]: leads in a circle: a → x/y → a",
        ),
        (
            {"a": {"members": ["gpu1"], "fallbacks": ["a"]}},
            "a.fallbacks[0]: leads in a circle: a → a",
        ),
        (
            {"a": {"members": ["gpu1"], "fallbacks": ["bb"]}, "bbb": "gpu1"},
            (
                'a.fallbacks[0]: text "bb" is not among llm.providers (gpu1, gpu2, gpu3) or in '
                "llm.models (did you mean bbb?)"
            ),
        ),
        (
            {"a": {"members": ["b", "gpu1"], "choose": "least_busy"}, "b": ["gpu1", "gpu2"]},
            "a.members[0]: b is a group, a member with `choose: ordered` only",
        ),
        (
            {"a": [{"provider": "b", "max_context": 9}], "b": ["gpu1", "gpu2"]},
            "a[0]: b is a group, whose members have a max_context each",
        ),
        (
            {"a": [{"provider": "b", "input_modalities": ["text"]}], "b": ["gpu1", "gpu2"]},
            "a[0]: b is a group, whose members have modalities each",
        ),
        (
            {"a": [{"provider": "gpu1", "output_modalities": ["sound"]}]},
            (
                "a[0].output_modalities[0]: expected one of text, image, file, audio, video, not "
                'text "sound"'
            ),
        ),
        ({"a": ["b", "gpu1", "b"], "b": "gpu2"}, "a[2]: this member appears twice"),
        (
            {f"a{n}": f"a{n + 1}" for n in range(8)} | {"a8": "gpu1"},
            "a0: leads through more than 8 groups",
        ),
        (
            {"a": ["b", "gpu2"], "b": [f"gpu1/m{n}" for n in range(64)]},
            "a: has more than 64 members, with those of its groups",
        ),
        (
            {"a": {"members": ["gpu1", "gpu9/m"]}},
            (
                'a.members[1]: text "gpu9" is not among llm.providers (gpu1, gpu2, gpu3) or in llm.models '
                "(did you mean gpu3?)"
            ),
        ),
        (
            {"*": "gpu1"},
            "?: * alone would take every name (llm.active is asked for what nobody else has)",
        ),
        (
            {"a b": "gpu1"},
            "?: expected printable characters without a space, and * at the end only",
        ),
        (
            {"a*b": "gpu1"},
            "?: expected printable characters without a space, and * at the end only",
        ),
        ({"a" * 257: "gpu1"}, "?: expected a name of 1 to 256 characters"),
        ({"a": "gpu1/"}, 'a: expected PROVIDER or PROVIDER/MODEL, not text "gpu1/"'),
        ({"a": 1}, "a: expected a section of keys, not a number (write it as {a: …, b: …})"),
        (
            {"a": [{"provider": "gpu1", "weight": 2}, "gpu2"]},
            "a[0].weight: has a meaning with `choose: weighted` only",
        ),
        (
            {
                "a": {
                    "members": ["gpu1", {"provider": "gpu2", "weight": 101}],
                    "choose": "weighted",
                }
            },
            "a.members[1].weight: must be at most 100, not 101",
        ),
        (
            {"a": {"members": ["gpu1"], "choose": "random"}},
            'a.choose: expected one of ordered, least_busy, weighted, not text "random"',
        ),
        ({"a": [f"gpu1/m{n}" for n in range(65)]}, "a: has more than 64 members"),
    ],
)
def test_faults_of_groups_have_their_places(
    models: dict[str, Any], fault: str, file: Path
) -> None:
    faults = refused(lambda: made(file, models), file)

    assert [told.split(" ", 1)[1].removeprefix("llm.models.") for told in faults] == [fault]


def test_names_lead_through_others(file: Path) -> None:
    models = {
        "pair": {"members": ["gpu1", "gpu2"], "choose": "least_busy", "fallbacks": ["smart"]},
        "same": "pair",
        "again-*": "same",
        "smart": ["pro", "gpu1"],
        "pro": {"members": ["gpu3", "gpu2/x"], "choose": "weighted"},
    }
    configuration = made(file, models, active="again-*")

    llm = configuration.settings.llm
    assert llm.aliased("again-*") == "pair"
    assert llm.chain("same") == ("pair", "smart")
    assert [member.written for member in llm.members("smart")] == ["gpu3", "gpu2/x", "gpu1"]
    assert set(llm.groups()) == {"pair", "smart", "pro"}
    assert configuration.get_http_client_config() == configuration.get_http_client_config("gpu1")


def test_a_group_whose_fallback_alone_has_its_key_can_be_active(file: Path) -> None:
    keyed = {"a": {**PROVIDERS["gpu1"], "api_key_env": "KEY_A"}}
    models = {"off": {"members": ["a"], "fallbacks": ["gpu2"]}, "same": "off"}

    configuration = made(file, models, keyed, active="same")

    configuration.check_usable()
    (warning,) = configuration.warnings
    assert warning.endswith("llm.models.off.members[0]: KEY_A is not set: this member is off")
    assert configuration.get_http_client_config() == configuration.get_http_client_config("gpu2")


@pytest.mark.parametrize(
    "name",
    [
        *("fast", "openai/gpt-4", "claude-*", "qwen3:8b", "openrouter/anthropic/claude-4.5:beta"),
        "registry.example.com:5000/library/a-name-that-is-long/llama3.3:70b-instruct-q4_K_M",
    ],
)
def test_a_fault_names_the_model_as_it_is_written(name: str, file: Path) -> None:
    (fault,) = refused(lambda: made(file, {name: ["nobody"]}), file)

    assert f" llm.models.{name}[0]: " in fault


def test_all_faults_of_models_are_told_in_one_go(file: Path) -> None:
    faults = refused(
        lambda: made(
            file,
            {"a": ["gpu9", {"provider": "gpu1", "weight": 0}], "b": [], "gpu2": "gpu1"},
            active="nobody",
            unknown_models="drop",
        ),
        file,
    )

    assert len(faults) == 6


def test_no_more_names_than_a_thousand(file: Path) -> None:
    assert made(file, {f"m{n}": "gpu1" for n in range(1000)}).settings.llm.models
    (fault,) = refused(lambda: made(file, {f"m{n}": "gpu1" for n in range(1001)}), file)
    assert fault.endswith("llm.models: has more than 1000 names")


def test_a_group_without_a_usable_member_is_told_and_cannot_be_active(file: Path) -> None:
    keyed = {
        "a": {**PROVIDERS["gpu1"], "api_key_env": "KEY_A"},
        "b": {**PROVIDERS["gpu1"], "api_key_env": "KEY_B"},
    }
    configuration = made(file, {"off": ["a", "b"]}, keyed)
    assert [warning.split(" ", 1)[1] for warning in configuration.warnings] == [
        "llm.models.off: no member has its key, so nobody can ask for it"
    ]
    configuration.check_usable()

    configuration = made(file, {"off": ["a", "b"]}, keyed, active="off", fallbacks=["off", "b"])
    (active, fallback) = refused(configuration.check_usable, file)
    assert "off is active but KEY_A is not set and KEY_B is not set" in active
    assert "b is a fallback but KEY_B is not set" in fallback

    made(file, {"off": ["a", "b"]}, keyed, active="off", environ={"KEY_B": "k"}).check_usable()


def test_each_name_that_leads_to_others_is_known_once(file: Path) -> None:
    lists = {
        "a": {**PROVIDERS["gpu1"], "models": ["both", "a-only", "qwen3", "smart", "claude-x"]},
        "b": {**PROVIDERS["gpu1"], "models": ["both", "both", "gpu1", "gpu1/x", "large"]},
        "off": {**PROVIDERS["gpu1"], "models": ["both", "off-only"], "api_key_env": "KEY"},
    }
    names = {"smart": "gpu1", "claude-*": "gpu2"}
    llm = made(file, names, {**lists, "gpu1": {**PROVIDERS["gpu1"], "models": ["large"]}})

    assert llm.settings.llm.bare_routes() == {("a", "b"): ["both"], ("a",): ["a-only"]}
    # Nobody is active whose models those of a group are.
    active = made(file, names, lists, active="smart").settings.llm
    assert active.bare_routes() == {
        ("a", "b"): ["both"],
        ("a",): ["a-only", "qwen3"],
        ("b",): ["large"],
    }
