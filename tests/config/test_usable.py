from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from aioserver.config import Configuration
from aioserver.config.shipped import SHIPPED
from tests.support.configurations import ORIGINAL, load, refused, small

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "c.yaml"


def test_an_active_provider_without_its_key_says_what_to_set() -> None:
    shipped = Configuration.load(SHIPPED, environ={"AIOSERVER__LLM__ACTIVE": "openai"})
    original = Configuration.load(ORIGINAL, environ={})

    assert refused(shipped.check_usable) == [
        (
            "AIOSERVER__LLM__ACTIVE llm.active: openai is active but OPENAI_API_KEY is not set; "
            "set it, or set llm.active: demo"
        )
    ]
    (fault,) = refused(original.check_usable)
    assert ":80:3 llm.active: openai is active but OPENAI_API_KEY is not set; " in fault
    assert "llm.active: demo" in fault


def test_a_fallback_without_its_key_is_refused() -> None:
    environ = {"AIOSERVER__LLM__FALLBACKS": "[local, groq]"}

    assert refused(Configuration.load(SHIPPED, environ=environ).check_usable) == [
        (
            "AIOSERVER__LLM__FALLBACKS llm.fallbacks[1]: groq is a fallback "
            "but GROQ_API_KEY is not set; set it, or take groq out"
        )
    ]


def test_a_missing_key_file_of_the_active_provider_is_named(file: Path) -> None:
    configuration = load(small("base_url: http://h", "api_key_file: gone.key"), file)

    (fault,) = refused(configuration.check_usable)
    assert "mine is active but gone.key is not there" in fault


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST", "127.0.0.1", "127.9.9.9", "::1"])
def test_a_loopback_address_needs_no_keys(host: str, file: Path) -> None:
    load(small(), file, AIOSERVER__CHAT__WEBSOCKET__HOST=host).check_usable()


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "192.168.1.2", "chat.example", "127.0.0.1.example"]
)
def test_an_open_address_needs_keys_or_a_word(host: str, file: Path) -> None:
    environ = {"AIOSERVER__CHAT__WEBSOCKET__HOST": host}

    (fault,) = refused(load(small(), file, **environ).check_usable)

    assert f"{host} is open to others" in fault
    assert "open: true" in fault
    assert "aioserver key NAME" in fault
    assert refused(load(small() + "auth:\n", file, **environ).check_usable) == [fault]
    load(small() + "auth: {open: true}\n", file, **environ).check_usable()
    keys = small() + "auth: {keys: [{name: a, key_env: A}]}\n"
    load(keys, file, A="x", **environ).check_usable()
    closed = load(small() + "auth: {keys: []}\n", file, **environ)
    closed.check_usable()
    (warning,) = closed.warnings
    assert "auth.keys: there is no key, so nobody may chat" in warning


def test_open_beside_no_key_is_open_and_beside_a_file_a_fault(file: Path) -> None:
    (warning,) = load(small() + "auth: {keys: [], open: true}\n", file).warnings
    assert "everybody who can reach the port may chat, whatever keys says" in warning

    (file.parent / "keys.yaml").write_text("[]\n")
    text = f"{small()}auth: {{keys_file: {file.parent}/keys.yaml, open: true}}\n"
    (fault,) = refused(lambda: load(text, file))
    assert fault.endswith("auth.open: cannot be open and have keys_file")


@pytest.mark.parametrize("key", ["keys", "keys_file"])
def test_a_key_without_a_value_opens_nothing(file: Path, key: str) -> None:
    (fault,) = refused(lambda: load(f"{small()}auth:\n  {key}:\n", file))

    assert f"auth.{key}: expected" in fault


def test_every_reason_not_to_serve_is_reported_at_once(file: Path) -> None:
    text = small("base_url: http://h", "api_key_env: A")

    assert len(refused(load(text, file, AIOSERVER__CHAT__WEBSOCKET__HOST="::").check_usable)) == 2


def test_a_missing_guard_and_any_origin_are_warned_of(file: Path) -> None:
    text = small() + "auth: {open: true}\n"

    warnings = load(text, file, AIOSERVER__CHAT__WEBSOCKET__ALLOW_ORIGINS="['*']").warnings

    assert [warning.split(" ", 1)[1].split(":")[0] for warning in warnings] == [
        "chat.websocket.allow_origins",
        "auth.open",
    ]


def test_a_queue_in_which_nobody_waits_is_warned_of(file: Path) -> None:
    waits = "      queue_timeout: 5\n"
    for text, warned in (
        (small(), False),
        (small().replace(waits, "      queue_timeout: 0\n"), False),
        (small().replace(waits, ""), True),
    ):
        warnings = load(text, file).warnings
        assert any("nobody waits" in warning for warning in warnings) is warned, text

    override = {"AIOSERVER__CHAT__WEBSOCKET__CONCURRENCY__QUEUE_TIMEOUT": "5"}
    assert load(small().replace(waits, ""), file, **override).warnings == ()


def test_a_queue_of_a_key_that_can_never_be_full_is_warned_of(file: Path) -> None:
    assert "connection_queue_size: 10\n" in small()
    text = small() + "auth: {keys: ["
    text += "{name: a, key_env: A, queue_size: 5}, {name: b, key_env: B, queue_size: 6}]}\n"

    (warning,) = load(text, file, A="x", B="y").warnings

    assert " auth.keys[1].queue_size: 6 cannot wait over HTTP: at all keys together 5 can" in (
        warning
    )


@pytest.mark.parametrize(
    ("lines", "warned"),
    [
        (
            ("base_url: https://api.anthropic.com/v1", "messages: auto"),
            "messages: it speaks messages: nothing is to be found out (write true)",
        ),
        (
            ("base_url: http://h/v1/chat/completions/",),
            "base_url: paths are added to it (write http://h/v1)",
        ),
        (
            ("base_url: http://h:8001/",),
            "base_url: most APIs are below /v1 (write http://h:8001/v1)",
        ),
        (
            ("base_url: http://h:8001",),
            "base_url: most APIs are below /v1 (write http://h:8001/v1)",
        ),
        (("base_url: http://h:8001/openai",), None),
    ],
)
def test_an_address_that_looks_wrong_is_warned_of(
    lines: tuple[str, ...], warned: str | None, file: Path
) -> None:
    warnings = load(small(*lines), file).warnings

    told = [warning.split(" ", 1)[1].removeprefix("llm.providers.mine.") for warning in warnings]
    assert told == ([] if warned is None else [warned])


@pytest.mark.parametrize(
    ("host", "url", "warned"),
    [
        ("localhost", "http://127.0.0.1:8011/v1", True),
        ("127.0.0.1", "http://LocalHost:8011", True),
        ("0.0.0.0", "http://[::1]:8011/v1", True),
        ("10.0.0.5", "http://10.0.0.5:8011/v1", True),
        ("10.0.0.5", "http://127.0.0.1:8011/v1", False),
        ("localhost", "http://127.0.0.1:8012/v1", False),
        ("localhost", "http://example.com:8011/v1", False),
    ],
)
def test_a_base_url_that_leads_back_to_the_server_is_warned_of(
    file: Path, host: str, url: str, warned: bool
) -> None:
    environ = {
        "AIOSERVER__CHAT__WEBSOCKET__HOST": host,
        "AIOSERVER__CHAT__WEBSOCKET__PORT": "8011",
    }

    warnings = load(small(f"base_url: {url}"), file, **environ).warnings

    assert any("leads back to this server" in warning for warning in warnings) is warned


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("http://localhost:8000/chat", 'not text "http://localhost:8000/chat"'),
        ("https://canary@host/", "not text"),
        ("https://host/?key=canary", "not text"),
        ("https://host/" + "canary" * 20, "not text"),
    ],
)
def test_an_origin_with_a_path_is_shown_unless_it_may_have_a_secret(
    file: Path, written: str, shown: str
) -> None:
    origins = f"  websocket:\n    allow_origins: ['{written}']\n"
    text = small().replace("  websocket:\n", origins, 1)

    (fault,) = refused(lambda: load(text, file), file)

    assert fault.endswith(f"without a path or a slash at its end, {shown}")
    assert "canary" not in fault


@pytest.mark.parametrize("written", ["$MY_KEY", "os.environ/MY_KEY"])
def test_a_variable_that_is_not_replaced_is_warned_of(written: str, file: Path) -> None:
    text = small("base_url: http://h/v1", f"api_key: {written}", f"headers: {{x-team: {written}}}")

    warnings = load(text, file, MY_KEY="k").warnings

    assert [warning.split(" ", 1)[1] for warning in warnings] == [
        (
            "llm.providers.mine.api_key: this text is not replaced by a variable "
            "(write api_key_env: MY_KEY, or ${MY_KEY})"
        ),
        (
            "llm.providers.mine.headers.x-team: this text is not replaced by a variable "
            "(write ${MY_KEY})"
        ),
    ]


@pytest.mark.parametrize(
    ("lines", "hint"),
    [
        (("api_base: http://h/v1",), "api_base: unknown key (write base_url)"),
        (("base_url: http://h/v1", "timeout: 60"), "(write http_client.read_timeout)"),
        (("base_url: http://h/v1", "rpm: 60"), "(write http_client.requests_per_minute)"),
        (("base_url: http://h/v1", "api-key: canary"), "(write api_key_env)"),
        (
            ("base_url: http://h/v1", "http_client: {timeout: 9}"),
            "timeout: unknown key (write read_timeout)",
        ),
        # A word that is nobody's: as before.
        (("base_url: http://h/v1", "modell: m"), "(did you mean model?)"),
        (
            ("base_url: http://h/v1", "queue_size: 5"),
            "(it belongs in http_client: indent it further, below that key)",
        ),
    ],
)
def test_words_of_other_programs_lead_to_ours(
    lines: tuple[str, ...], hint: str, file: Path
) -> None:
    faults = refused(lambda: load(small(*lines), file), file)
    assert any(fault.endswith(hint) for fault in faults), faults
    assert "canary" not in str(faults)


def test_a_file_of_litellm_is_told_where_its_words_are(file: Path) -> None:
    text = "model_list:\n  - model_name: gpt-4o\nrouter_settings: {num_retries: 2}\n"
    faults = refused(lambda: load(text, file), file)
    assert (
        "F:1:1 model_list: unknown key (a file of LiteLLM: docs/from-litellm.md has its words)"
        in faults
    )
    assert any("router_settings" in fault and "LiteLLM" in fault for fault in faults)


@pytest.mark.parametrize(
    ("written", "host"), [("'[::1]'", "::1"), ("'::1'", "::1"), ("'[::]'", "::"), ("box", "box")]
)
def test_an_address_may_stand_in_brackets(written: str, host: str, file: Path) -> None:
    made = load(small(), file, AIOSERVER__CHAT__WEBSOCKET__HOST=written)
    assert made.settings.chat.websocket.host == host


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("127.0.0.1,::1", "expected one address"),
        ("127.0.0.1 ::1", "expected one address"),
        ("[127.0.0.1, 10.0.0.1]", "expected one address"),
        ("/run/aioserver.sock", "a UNIX socket is passed by systemd"),
        ("unix:/run/aioserver.sock", "a UNIX socket is passed by systemd"),
    ],
)
def test_what_is_not_one_address_says_what_to_do(written: str, words: str, file: Path) -> None:
    (fault,) = refused(lambda: load(small(), file, AIOSERVER__CHAT__WEBSOCKET__HOST=written), file)
    assert "host: " in fault
    assert words in fault
    assert "docs/install.md" in fault


def test_heartbeats_that_are_too_rare_while_calls_are_held_are_warned_of(file: Path) -> None:
    slow = {"AIOSERVER__CHAT__WEBSOCKET__PING_INTERVAL": "60"}

    (warning,) = load(small(), file, **slow).warnings

    assert "chat.websocket.ping_interval: above 50 s, while tool calls are held" in warning
    assert not load(small(), file, **slow, AIOSERVER__CHAT__STREAMS__HOLD="preamble").warnings
