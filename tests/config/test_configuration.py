from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from aioserver.config import Configuration
from aioserver.config.shipped import SHIPPED
from aioserver.files.reading import MAX_FILE_BYTES
from tests.support.configurations import ORIGINAL, ORIGINAL_CLIENT, load, refused, small

ROOT = Path(__file__).parents[2]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "c.yaml"


# Which file.


def test_a_given_path_wins_over_the_variable_and_that_over_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("config.yaml", "b.yaml", "c.yaml"):
        (tmp_path / name).write_text(small())
    environ = {"AIOSERVER_CONFIG": "b.yaml"}

    assert Configuration.load("c.yaml", environ=environ).source == "c.yaml"
    assert Configuration.load(environ=environ).source == "b.yaml"
    assert Configuration.load(environ={"AIOSERVER_CONFIG": ""}).source == "config.yaml"
    (tmp_path / "config.yaml").unlink()
    assert Configuration.load(environ={}).source == str(SHIPPED)


def test_a_link_to_nowhere_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").symlink_to("gone.yaml")

    assert refused(lambda: Configuration.load(environ={})) == [
        "config.yaml: cannot be read: No such file or directory"
    ]


def test_the_environment_of_the_process_is_the_default(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text(small())
    monkeypatch.setenv("AIOSERVER_CONFIG", str(file))
    monkeypatch.setenv("AIOSERVER__CHAT__WEBSOCKET__PORT", "9000")

    assert Configuration.load().settings.chat.websocket.port == 9000


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "F:1:1: the file is empty"),
        (b"# nothing\n", "F:1:1: the file is empty"),
        (b"- 1\n", "F:1:1: expected a section of keys, not a list"),
        (b"canary", "F:1:1: expected a section of keys, not text"),
        (b"a: 1\nbc: \xff\n", "F:2:5: not UTF-8"),
        (b"a: [\n", "F:2:1: not valid YAML: "),
        (b'a:\n  b: "open\n  c: 1\nd: 2\n', "F:2:6: not valid YAML: this quote is not closed"),
        (b"a: 'open\nb: 1\n", "F:1:4: not valid YAML: this quote is not closed"),
        (b"#" * (MAX_FILE_BYTES + 1), "F: larger than 1048576 bytes"),
    ],
)
def test_a_file_that_is_no_configuration_is_one_fault(
    content: bytes, fault: str, file: Path
) -> None:
    faults = refused(lambda: load(content, file), file)

    assert len(faults) == 1
    assert faults[0].startswith(fault)


def test_a_byte_order_mark_is_no_fault(file: Path) -> None:
    assert load(b"\xef\xbb\xbf" + small().encode(), file).settings.llm.active == "mine"


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("gone", "No such file or directory"),
        (".", "Is a directory"),
        ("a\0b", "this cannot be the name of a file"),
    ],
)
def test_a_file_that_cannot_be_read_says_why(name: str, why: str, tmp_path: Path) -> None:
    path = f"{tmp_path}/{name}"

    assert refused(lambda: Configuration.load(path, environ={})) == [
        f"{path}: cannot be read: {why}"
    ]


def test_a_file_without_permission_says_so(file: Path) -> None:
    file.write_text(small())
    file.chmod(0)

    # Root may read everything.
    user = os.geteuid()
    os.seteuid(user or 65534)
    try:
        faults = refused(lambda: Configuration.load(file, environ={}), file)
    finally:
        os.seteuid(user)

    assert faults == ["F: cannot be read: Permission denied"]


# Faults.


def test_every_fault_is_reported_at_once_with_its_place(file: Path) -> None:
    text = """\
chat:
  websocket:
    port: yes
    prot: 1
    ping_interval: .nan
    max_message_size: "16"
    concurrency:
      max_connections: 10
      connection_queue_size: 9
      uvicorn:
        backlog: 5
        access_log: false
        keepalive_timeout: ${KEEPALIVE}
        max_keepalive_requests: 1
        h11_max_incomplete_event_size: 1
        h11_max_request_line_size: 1
        h11_max_header_size: 1
        backlog: 7
llm:
  active: x
  providers:
    mine:
      base_url: http://h
      model: *m
      models: [a, 1]
      http_client:
        {max_connections: 2, max_keepalive: 3, keepalive_expiry: 1, connect_timeout: 1,
        read_timeout: 7, write_timeout: 1, pool_timeout: 0, requests_per_minute: 60,
        concurrent_requests: 2, max_retries: 0}
loging: {}
"""

    faults = refused(lambda: load(text, file, AIOSERVER__CHAT__SSE__ENDPOINT="1"), file)

    assert faults == [
        (
            "AIOSERVER__CHAT__SSE__ENDPOINT chat.sse.endpoint: expected text, "
            "not 1 (put it in quotes)"
        ),
        "F:3:5 chat.websocket.port: expected a whole number, not true",
        "F:4:5 chat.websocket.prot: unknown key (did you mean port?)",
        "F:5:5 chat.websocket.ping_interval: must be finite and at most 1000000000, not nan",
        (
            'F:6:5 chat.websocket.max_message_size: expected a whole number, not text "16" '
            "(write a number without quotes and without leading zeros)"
        ),
        (
            "F:9:7 chat.websocket.concurrency.connection_queue_size: "
            "must be >= max_connections (10), not 9"
        ),
        (
            "F:11:9 chat.websocket.concurrency.uvicorn.backlog: "
            "must be >= connection_queue_size (9), not 5"
        ),
        (
            "F:13:9 chat.websocket.concurrency.uvicorn.keepalive_timeout: KEEPALIVE is not set "
            "(set it, or write ${KEEPALIVE:-default})"
        ),
        (
            "F:18:9 chat.websocket.concurrency.uvicorn.backlog: "
            "this key appears twice (first on line 11)"
        ),
        'F:20:3 llm.active: text "x" is not among llm.providers (mine)',
        "F:24:14 llm.providers.mine.model: aliases are refused (write the value out)",
        "F:25:19 llm.providers.mine.models[1]: expected text, not 1 (put it in quotes)",
        (
            "F:27:30 llm.providers.mine.http_client.max_keepalive: "
            "must be <= max_connections (2), not 3"
        ),
        "F:28:44 llm.providers.mine.http_client.pool_timeout: must be greater than 0, not 0",
        "F:30:1 loging: unknown key (did you mean logging?)",
    ]


def test_a_missing_section_is_reported_at_the_top(file: Path) -> None:
    assert refused(lambda: load("logging: {}\n", file), file) == [
        "F:1:1 llm: required key is missing",
    ]


def test_faults_of_keys_and_files_come_with_all_others(file: Path) -> None:
    (file.parent / "bad").write_text("two words canary")
    text = small(
        "base_url: ftp://canary", "api_key_file: " + str(file.parent / "bad"), "ca_file: gone"
    )
    text += "auth: {keys: [{name: a, key_env: A}, {name: b, sha256: canary}]}\n"

    faults = refused(lambda: load(text, file), file)

    assert [fault.split(": ")[0] for fault in faults] == [
        "F:13:7 llm.providers.mine.base_url",
        "F:14:7 llm.providers.mine.api_key_file",
        "F:15:7 llm.providers.mine.ca_file",
        "F:20:15 auth.keys[0]",
        "F:20:48 auth.keys[1].sha256",
    ]
    assert "canary" not in "".join(faults)


def test_a_provider_with_faults_does_not_hide_the_others(file: Path) -> None:
    text = small("api_key: a b") + "  fallbacks: [x]\n"

    faults = refused(lambda: load(text, file), file)

    assert [fault.split(" ", 1)[1].split(":")[0] for fault in faults] == [
        "llm.providers.mine.base_url",
        "llm.providers.mine.api_key",
        "llm.fallbacks[0]",
    ]


# The environment.


def test_a_variable_overrides_the_file(file: Path) -> None:
    configuration = load(
        small(),
        file,
        AIOSERVER__CHAT__WEBSOCKET__PORT="9000",
        AIOSERVER__CHAT__WEBSOCKET__ALLOW_ORIGINS='["http://a", "*"]',
        AIOSERVER__LLM__PROVIDERS__MINE__MODEL="x: y",
        AIOSERVER__AUTH="{open: true}",
        AIOSERVER__LOGGING__SERVICE_NAME='"7"',
        AIOSERVER_UNRELATED="x",
    )

    websocket = configuration.settings.chat.websocket
    assert websocket.port == 9000
    assert websocket.allow_origins == ("http://a", "*")
    assert configuration.settings.llm.providers["mine"].model == "x: y"
    assert configuration.settings.auth is not None
    assert configuration.settings.logging.service_name == "7"


@pytest.mark.parametrize(
    ("name", "value", "fault"),
    [
        (
            "CHAT__WEBSOCKET__PORT",
            "canary-0123456789",
            "chat.websocket.port: expected a whole number, not text",
        ),
        ("CHAT__WEBSOCKET__PROT", "1", "chat.websocket.prot: unknown key (did you mean port?)"),
        ("CHAT__WEBSOCKET__PORT__X", "1", "chat.websocket.port: expected a whole number, not a"),
        ("CHAT__WEBSOCKET__PORT", "[1", "chat.websocket.port: not valid YAML: "),
        ("LLM__ACTIVE__X", "1", "llm.active: is not a section, so nothing can be set inside it"),
        ("", "1", "?: unknown key"),
    ],
)
def test_a_fault_of_an_override_names_the_variable(
    name: str, value: str, fault: str, file: Path
) -> None:
    faults = refused(lambda: load(small(), file, **{f"AIOSERVER__{name}": value}))

    assert faults[0].startswith(f"AIOSERVER__{name} {fault}")
    assert "canary" not in faults[0]


LIST = "a ${…} reference is always one value: write "


@pytest.mark.parametrize(
    ("setting", "value", "fault"),
    [
        (
            "fallbacks",
            "[local, groq]",
            (
                'F:11:3 llm.fallbacks: expected a list, not text "[local, '
                f'groq]" ({LIST}[local, groq] '
                "in the file, or set AIOSERVER__LLM__FALLBACKS='[local, groq]')"
            ),
        ),
        (
            "fallbacks",
            "canary-0123456789",
            (
                f"F:11:3 llm.fallbacks: expected a list, not text ({LIST}[a, b] "
                "in the file, or set AIOSERVER__LLM__FALLBACKS='[a, b]')"
            ),
        ),
        (
            "providers",
            "{a: canary}",
            (
                "F:11:3 llm.providers: expected a section of keys, not text "
                f"({LIST}{{a: …, b: …}} in the file, "
                "or set AIOSERVER__LLM__PROVIDERS='{a: …, b: …}')"
            ),
        ),
    ],
)
def test_a_reference_where_a_list_or_a_section_belongs_is_told_what_works(
    setting: str, value: str, fault: str, file: Path
) -> None:
    text = small()[: small().index("  active: ")] + f"  active: a\n  {setting}: ${{IT}}\n"

    assert fault in refused(lambda: load(text, file, IT=value), file)


def test_what_the_message_about_a_reference_names_works(file: Path) -> None:
    text = small().replace("active: mine", "active: mine\n  fallbacks: ${FB}")

    configuration = load(text, file, FB="x", AIOSERVER__LLM__FALLBACKS="[mine, mine]")

    assert configuration.settings.llm.fallbacks == ("mine", "mine")


def test_a_list_in_a_variable_without_brackets_is_told_of_them(file: Path) -> None:
    variables = {"AIOSERVER__LLM__FALLBACKS": "local,groq", "AIOSERVER__AUTH": "canary"}

    assert refused(lambda: load(small(), file, **variables), file) == [
        (
            "AIOSERVER__AUTH auth: expected a section of keys, "
            "not text (write AIOSERVER__AUTH='{a: …, b: …}')"
        ),
        (
            'AIOSERVER__LLM__FALLBACKS llm.fallbacks: expected a list, not text "local,groq" '
            "(write AIOSERVER__LLM__FALLBACKS='[local, groq]')"
        ),
    ]


def test_a_list_that_no_variable_can_set_belongs_in_the_file(file: Path) -> None:
    text = small().replace("    mine:", "    my-own:").replace("active: mine", "active: my-own")
    text = text.replace("model: m", "model: m\n      models: ${IT}")

    (fault,) = refused(lambda: load(text, file, IT="a,b"), file)

    assert fault.endswith(f'expected a list, not text "a,b" ({LIST}[a, b] in the file)')


def test_a_reference_is_typed_and_a_secret_may_be_one(file: Path) -> None:
    text = small("base_url: http://${HOST}/v1", "api_key: ${KEY}", "temperature: ${T:-0.5}")

    configuration = load(text, file, HOST="h", KEY="canary")

    provider = configuration.settings.llm.providers["mine"]
    assert (provider.base_url, provider.temperature) == ("http://h/v1", 0.5)
    assert configuration.warnings == ()
    assert provider.usable


# In Python.


def test_the_concurrency_is_a_plain_dict() -> None:
    concurrency = Configuration.load(ORIGINAL, environ={}).get_websocket_concurrency_config()

    assert concurrency["max_connections"] == 100
    assert concurrency["uvicorn"]["backlog"] == 2048
    assert type(concurrency["uvicorn"]) is dict


def test_the_http_client_is_that_of_the_active_or_of_a_named_provider() -> None:
    configuration = Configuration.load(ORIGINAL, environ={})

    assert configuration.get_http_client_config()["max_connections"] == 50
    assert configuration.get_http_client_config("groq")["max_connections"] == 30
    assert set(ORIGINAL_CLIENT) < set(configuration.get_http_client_config())
    with pytest.raises(ValueError, match="no provider 'x'; configured: openai, groq, openrouter"):
        configuration.get_http_client_config("x")


def test_the_effective_configuration_is_read_back_as_the_same(file: Path) -> None:
    for source in (ORIGINAL, SHIPPED):
        configuration = Configuration.load(source, environ={})

        again = load(yaml.safe_dump(configuration.effective()), file)

        assert again.settings == configuration.settings


def test_loading_imports_neither_the_server_nor_the_provider_side() -> None:
    code = (
        "import sys; from aioserver.config import Configuration;"
        "print(*sorted({name.split('.')[0] for name in sys.modules}))"
    )

    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout.split()

    assert not {"aiohttp", "asyncio", "ssl", "click", "httptools"} & set(loaded)
