from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given as drawn
from hypothesis import strategies as st

from aioserver.config import settings
from aioserver.config.schema import (
    FAULTY,
    Faults,
    Validator,
    section,
    shipped_values,
)
from aioserver.config.settings import SETTINGS, ClientKey, HttpClient, Provider, Settings
from aioserver.config.validators import TAKEN
from aioserver.config.views import plain
from tests.support.configurations import ANY_MACHINE, ORIGINAL_CLIENT, changed, original, paths


def faults(check: Validator, value: Any) -> dict[str, str]:
    """Path and message of each fault of *value*."""
    with pytest.raises(Faults) as caught:
        check(value)
    return {".".join(map(str, exc.path)): exc.error_message for exc in caught.value.errors}


def test_the_original_becomes_settings() -> None:
    made: Settings = SETTINGS(original())

    assert made.chat.websocket.concurrency.uvicorn.backlog == 2048
    assert made.chat.service.repository.persistence.retention_policy == "token_limit"
    assert made.llm.providers["groq"].http_client.read_timeout == 90.0
    assert made.logging.format == "console"


@pytest.mark.parametrize("cls", [HttpClient, settings.Concurrency, settings.Uvicorn])
def test_keys_that_the_original_requires_have_the_values_that_ship(cls: type[Any]) -> None:
    added = {"queue_size", "queue_timeout", "tokens_per_minute", "max_body_bytes"}
    added.add("first_token_timeout")
    names = {field.name for field in dataclasses.fields(cls)} - added
    shipped = shipped_values(cls)
    assert shipped is not None

    for name in names:
        without = {key: value for key, value in shipped().items() if key != name}
        assert plain(section(cls)(without))[name] == shipped()[name]
    assert {name: plain(section(cls)({}))[name] for name in names} == {
        name: shipped()[name] for name in names
    }


@pytest.mark.parametrize("cls", [HttpClient, settings.Concurrency, settings.Uvicorn])
def test_a_key_that_is_mistyped_is_a_fault_and_not_left_out(cls: type[Any]) -> None:
    for field in dataclasses.fields(cls):
        typo = f"{field.name[:-1]}x"
        assert "unknown key" in faults(section(cls), {typo: 1})[typo]
    assert faults(section(HttpClient), {"max_conections": 9}) == {
        "max_conections": "unknown key (did you mean max_connections?)"
    }


def test_requests_wait_for_a_provider_that_is_away_only_where_it_is_said() -> None:
    assert SETTINGS(original()).llm.providers["groq"].when_down == "fail"
    made = SETTINGS(changed(llm__providers__groq__when_down="wait"))
    assert made.llm.providers["groq"].when_down == "wait"
    assert list(faults(SETTINGS, changed(llm__providers__groq__when_down="hang"))) == [
        "llm.providers.groq.when_down"
    ]


def test_keys_that_the_original_lacks_have_the_contracts_defaults() -> None:
    made: Settings = SETTINGS(original())
    websocket = made.chat.websocket

    assert websocket.concurrency.queue_timeout == 0.0
    assert websocket.concurrency.max_body_bytes == 268435456
    assert (websocket.idle_timeout, websocket.shutdown_timeout, websocket.drain_delay) == (
        0,
        30,
        0,
    )
    assert made.chat.sse.endpoint == "/sse/chat"
    assert plain(made.chat.streams) == {
        "resume_window": 30.0,
        "hold": "agents",
        "max_stream_bytes": 4194304,
        "max_kept_bytes": 268435456,
        "max_detached": 100,
        "store_window": 3600.0,
        "max_response_bytes": 67108864,
        "send_timeout": 10.0,
    }
    assert made.auth is None
    assert plain(made.cluster) == {
        "redis_url": None,
        "name": "aioserver",
        "listen": None,
        "advertise": None,
        "tls": None,
    }


def test_queue_of_a_provider_follows_its_other_limits() -> None:
    client: HttpClient = section(HttpClient)(ORIGINAL_CLIENT)

    assert (client.queue_size, client.queue_timeout) == (250, 60.0)
    assert client.tokens_per_minute == 0


@pytest.mark.parametrize(
    ("change", "where", "why"),
    [
        (
            {"connection_queue_size": 99},
            "connection_queue_size",
            ">= max_connections (100), not 99",
        ),
        (
            {"uvicorn__backlog": 499},
            "uvicorn.backlog",
            ">= connection_queue_size (500), not 499",
        ),
        ({"uvicorn__workers": 101}, "uvicorn.workers", "<= max_connections (100), not 101"),
        ({"max_connections": 0}, "max_connections", "at least 1"),
    ],
)
def test_places_queue_and_backlog_grow_outwards(
    change: dict[str, Any], where: str, why: str
) -> None:
    data = changed(**{f"chat__websocket__concurrency__{key}": it for key, it in change.items()})

    refusals = faults(SETTINGS, data)

    assert why in refusals[f"chat.websocket.concurrency.{where}"]


@pytest.mark.parametrize("value", [0, -1.0, True, "15", [15]])
def test_the_wait_for_the_first_content_is_seconds_or_nothing(value: object) -> None:
    refusals = faults(section(HttpClient), {**ORIGINAL_CLIENT, "first_token_timeout": value})
    assert list(refusals) == ["first_token_timeout"]

    for good in (15, 0.5, None):
        made = section(HttpClient)({**ORIGINAL_CLIENT, "first_token_timeout": good})
        assert made.first_token_timeout == good
    assert section(HttpClient)(ORIGINAL_CLIENT).first_token_timeout is None


def test_workers_must_be_able_to_share_out_every_provider() -> None:
    data = changed(chat__websocket__concurrency__uvicorn__workers=16)

    assert list(faults(SETTINGS, data)) == ["llm.providers.groq.http_client.concurrent_requests"]


def test_rules_are_checked_although_other_keys_are_faulty() -> None:
    data = changed(
        chat__websocket__concurrency__uvicorn__backlog=1,
        chat__websocket__concurrency__uvicorn__workers="two",
        chat__websocket__concurrency__max_body_bytes=None,
        chat__websocket__port=True,
        llm__active="nobody",
        llm__providers__groq__model=3,
        llm__providers__openai__http_client__max_keepalive=51,
    )

    assert sorted(faults(SETTINGS, data)) == [
        "chat.websocket.concurrency.max_body_bytes",
        "chat.websocket.concurrency.uvicorn.backlog",
        "chat.websocket.concurrency.uvicorn.workers",
        "chat.websocket.port",
        "llm.active",
        "llm.providers.groq.model",
        "llm.providers.openai.http_client.max_keepalive",
    ]


def test_a_faulty_value_breaks_no_rule() -> None:
    assert not FAULTY < 1
    assert not FAULTY < 1
    assert "anything" in FAULTY
    assert list(FAULTY.whatever(1)[2] * 3) == []
    assert 10 * FAULTY is FAULTY
    assert repr(FAULTY) == "<faulty>"


def test_the_nearest_known_key_is_the_hint() -> None:
    refusals = faults(section(HttpClient), {**ORIGINAL_CLIENT, "max_retrys": 1, "zzz": 1})

    assert refusals["max_retrys"] == "unknown key (did you mean max_retries?)"
    assert refusals["zzz"].startswith("unknown key (known: max_connections, ")


def test_a_section_of_comments_is_an_empty_one() -> None:
    assert SETTINGS(changed(chat__streams=None)) == SETTINGS(original())


@pytest.mark.parametrize("value", [1, "text", [], True])
def test_a_section_is_a_mapping(value: object) -> None:
    refusals = faults(SETTINGS, changed(chat__service=value, llm__providers=value))

    assert refusals["chat.service"].startswith("expected a section of keys, not ")
    assert refusals["llm.providers"].startswith("expected a section of keys, not ")


def test_a_provider_is_remote_or_simulated() -> None:
    check = section(Provider)
    provider = {"model": "m", "http_client": ORIGINAL_CLIENT}

    assert faults(check, provider) == {"base_url": "required key is missing"}
    assert list(faults(check, {**provider, "base_url": "http://h", "simulated": True})) == [
        "simulated"
    ]
    assert check({**provider, "simulated": True}).base_url == ""


def test_optional_settings_of_a_provider_are_not_set() -> None:
    made: Provider = section(Provider)(
        {"model": "m", "simulated": True, "http_client": ORIGINAL_CLIENT}
    )

    assert (made.temperature, made.max_tokens, made.top_p, made.choice_index) == (None,) * 3 + (0,)
    assert (made.models, made.headers, made.proxy, made.ca_file) == ((), {}, None, None)


@pytest.mark.parametrize(
    ("keys", "variable", "missing"),
    [
        ({}, "OPENAI_API_KEY", "OPENAI_API_KEY"),
        ({"api_key_env": "MINE"}, "MINE", "MINE"),
        ({"api_key_file": "key"}, None, "key"),
        ({"api_key": "sk"}, None, None),
    ],
)
def test_a_known_name_brings_its_variable(
    keys: dict[str, str], variable: str | None, missing: str | None
) -> None:
    made: Provider = section(Provider)(
        {"model": "m", "base_url": "http://h", "http_client": ORIGINAL_CLIENT, **keys}
    )
    named = dataclasses.replace(made, name="openai", api_key_env=made.variable("openai"))

    assert made.variable("openai") == variable
    assert named.missing_key == missing
    assert named.usable is (missing is None)
    assert made.variable("mine") == keys.get("api_key_env")


def test_names_of_providers_and_headers_are_checked_with_their_values() -> None:
    provider = {
        "model": 1,
        "simulated": True,
        "http_client": ORIGINAL_CLIENT,
        "headers": {"a b": 1},
    }

    refusals = faults(SETTINGS, changed(**{"llm__providers__a/b": provider}))

    assert "llm.providers.a/b" in refusals
    assert "llm.providers.a/b.model" in refusals
    assert "llm.providers.a/b.headers.a b" in refusals


@pytest.mark.parametrize(
    "name",
    [
        *("Authorization", "x-api-key", "API-KEY", "Cookie", "Host", "Content-Length", "expect"),
        *("transfer-encoding", "upgrade", "trailer", "keep-alive", "proxy-authorization", "TE"),
        *("content-type", "Accept-Encoding", "sec-websocket-protocol", "tracestate", "a:", "a b"),
        *("Connection", "traceparent", "", "x\r\ny", "x\n", 7, None),
    ],
)
def test_a_header_that_must_stay_here_is_not_passed_on(name: Any) -> None:
    names = ["x-tenant", name]
    refusals = faults(SETTINGS, changed(llm__providers__openai__pass_headers=names))

    assert list(refusals) == ["llm.providers.openai.pass_headers.1"]


@pytest.mark.parametrize(
    "path",
    [
        # What this server answers itself, and what never passes.
        *("chat", "chat/completions", "models/x", "embeddings", "completions", "responses/x"),
        *("messages", "organization", "organization/usage", "organizations", "v1/videos"),
        # Further spellings, and what is no path.
        *("Videos", "/videos", "videos/", "a//b", "..", "a/../b", ".", "v%69deos", "a;b", "a?b"),
        *("*", "videos/*", "videos\n", "a b", "", 7, None, True, ["videos"]),
    ],
    ids=repr,
)
def test_a_path_that_cannot_be_opened_is_refused(path: Any) -> None:
    paths = ["decisions", path]
    refusals = faults(SETTINGS, changed(llm__providers__openai__pass_paths=paths))

    assert list(refusals) == ["llm.providers.openai.pass_paths.1"]


@pytest.mark.parametrize("paths", ["videos", {"videos": True}, 7], ids=str)
def test_paths_that_are_opened_are_a_list(paths: Any) -> None:
    refusals = faults(SETTINGS, changed(llm__providers__openai__pass_paths=paths))

    assert list(refusals) == ["llm.providers.openai.pass_paths"]


def test_paths_are_opened_at_the_provider_that_names_them() -> None:
    # No name but the first segment itself is taken.
    paths = ["decisions", "videos", "audio/voices", "chats", "fine_tuning/jobs"]
    made: Settings = SETTINGS(changed(llm__providers__openai__pass_paths=paths))

    assert made.llm.providers["openai"].pass_paths == tuple(paths)
    assert made.llm.providers["groq"].pass_paths == ()


def test_headers_that_are_passed_on_are_kept_in_lower_case() -> None:
    names = ["X-Tenant", "user-agent"]
    made: Settings = SETTINGS(changed(llm__providers__openai__pass_headers=names))

    assert made.llm.providers["openai"].pass_headers == ("x-tenant", "user-agent")
    assert made.llm.providers["groq"].pass_headers == ()


def test_a_header_that_the_settings_add_is_not_a_clients() -> None:
    refusals = faults(
        SETTINGS,
        changed(
            llm__providers__openai__pass_headers=["x-a", "X-b"],
            llm__providers__openai__headers={"X-B": "1"},
        ),
    )

    assert refusals == {"llm.providers.openai.pass_headers.1": "x-b is set by `headers` already"}


@pytest.mark.parametrize("cls", [settings.WebSocket, settings.Sse])
def test_no_face_can_have_the_path_of_something_else(cls: type[Any]) -> None:
    for path in TAKEN:
        assert "that no other route has" in faults(section(cls), {"endpoint": path})["endpoint"]


def test_keys_of_callers_are_named_once_and_come_from_one_place() -> None:
    client_key = {"name": "web", "sha256": "0" * 64}
    keys = [client_key, client_key, {"name": "c"}, {**client_key, "name": "d", "key_env": "D"}]

    refusals = faults(SETTINGS, changed(auth={"keys": keys, "open": True}))

    assert refusals == {
        "auth.keys.1.name": "another key is named web as well",
        "auth.keys.2": "needs exactly one of key_env, key_file, sha256",
        "auth.keys.3": "needs exactly one of key_env, key_file, sha256",
        "auth.open": "cannot be open and have keys",
    }


def test_a_caller_has_the_limits_of_the_contract() -> None:
    made: ClientKey = section(ClientKey)({"name": "web", "sha256": "0" * 64})

    assert (made.max_concurrent, made.requests_per_minute) == (20, 300)
    assert (made.priority, made.admin) == (1, False)


def test_no_secret_is_in_the_text_of_settings() -> None:
    data = changed(
        llm__providers__openai__api_key="canary",
        llm__providers__openai__headers={"Authorization": "canary"},
        llm__providers__openai__proxy="http://me:canary@canary@proxy",
        cluster={"redis_url": "redis://:canary@host?password=canary"},
        auth={"keys": [{"name": "web", "sha256": "ca" * 32}]},
    )

    made: Settings = SETTINGS(data)

    assert "canary" not in repr(made)
    assert "canary" not in str(plain(made))
    assert "caca" not in repr(made) + str(plain(made))
    assert plain(made)["cluster"]["redis_url"] == "redis://***@host?***"


def test_settings_are_values() -> None:
    made: Settings = SETTINGS(original())

    assert made == SETTINGS(original())
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.chat.websocket.port = 1  # type: ignore[misc]


@ANY_MACHINE
@drawn(
    st.fixed_dictionaries(
        {
            "max_connections": st.integers(1, 9),
            "max_keepalive": st.integers(0, 9),
            "concurrent_requests": st.integers(1, 9),
        }
    )
)
def test_a_pool_is_accepted_just_when_its_rules_hold(numbers: dict[str, int]) -> None:
    holds = numbers["max_connections"] >= max(
        numbers["max_keepalive"], numbers["concurrent_requests"]
    )
    try:
        made = section(HttpClient)({**ORIGINAL_CLIENT, **numbers})
    except Faults:
        assert not holds
    else:
        assert holds
        assert {key: getattr(made, key) for key in numbers} == numbers


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=10,
)


@ANY_MACHINE
@drawn(
    path=st.sampled_from([*paths(Settings)]),
    it=ANYTHING,
)
def test_any_value_anywhere_is_accepted_or_a_fault(path: str, it: object) -> None:
    plain_path = path.replace("<name>", "groq").replace("keys[]", "keys")
    data = changed(**{plain_path.replace(".", "__"): it}) if "keys" not in path else original()
    try:
        made = SETTINGS(data)
    except Faults:
        return

    assert isinstance(made, Settings)
