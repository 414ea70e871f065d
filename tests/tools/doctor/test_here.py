"""The doctor without a URL: the configuration, this machine, the road to each provider."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import ssl
import sys
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import trustme
import yaml
from click.testing import CliRunner
from yarl import URL

from aioserver.__main__ import cli
from aioserver.config.shipped import SHIPPED
from aioserver.telemetry import kernel
from aioserver.tools.doctor.network import connect
from tests.support.doctor import Examined
from tests.support.doctor import examined as ask_doctor
from tests.support.process import run_command
from tests.support.scripted_provider import (
    DONE,
    EVENT_STREAM,
    LAST_CHUNK,
    ScriptedProvider,
    chunk,
)
from tests.support.scripted_provider import Peer as Connection
from tests.support.server import HTTP_CLIENT, NOWHERE, QUICK, provider_entry, write
from tests.support.simulator import Simulator

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

CANARY = "sk-canary-0123456789"
SIMULATED = {"simulated": True, "model": "demo", "http_client": HTTP_CLIENT}


async def examined(path: Path, base_url: str, changes: Any = (), **question: Any) -> Examined:
    """Ask the doctor about the configuration with *changes*; no key is in what it says."""
    file = path / "c.yaml"
    write(base_url, dict(changes), file)
    found = await ask_doctor(config=file, **question)
    assert CANARY not in str(found)
    return found


def refusing(status: str) -> Any:
    """A provider that answers each request with *status*, and repeats the key in its words."""
    body = json.dumps({"error": {"message": f"bad key {CANARY}"}}).encode()
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    )
    asked: list[str] = []

    async def play(peer: Connection) -> None:
        asked.append((await peer.request()).split(b"\r\n")[0].decode())
        await peer.send(f"{head}\r\n".encode() + body)

    return play, asked


async def test_the_active_provider_is_asked_for_its_first_token_and_no_more(
    tmp_path: Path,
) -> None:
    async with Simulator(QUICK) as simulator:
        changes = {"llm.providers.sim.api_key": CANARY, "llm.providers.demo": SIMULATED}

        found = await examined(tmp_path, simulator.base_url, changes)

        await simulator.until(lambda stats: (stats.requests, stats.active) == (1, 0))
    assert found.code == 0
    answered = [line for line in found.of("ok") if "answers: the first token" in line]
    assert "provider sim: its key is in the configuration" in found.of("ok")
    assert answered == [
        "provider sim: answers: the first token of sim-model came",
        "provider demo: answers: the first token of demo came",
    ]


@pytest.mark.parametrize(
    ("form", "habit", "text"),
    [
        ("prefill", "", "goes on with an answer that broke off (prefill)"),
        ("prefix", "repeats", "goes on with an answer that broke off (prefix)"),
        ("instruct", "", "goes on with an answer that broke off (instruct)"),
        ("prefill", "repeats", "says the beginning again"),
        ("final_message", "turn", "begins a new turn"),
        ("instruct", "turn", "begins a new turn"),
        ("prefill", "refuses", "does not go on with an answer: provider_error: sim answered 400"),
    ],
)
async def test_a_form_of_continuation_is_tried_and_what_came_is_told(
    form: str, habit: str, text: str, tmp_path: Path
) -> None:
    async with Simulator(replace(QUICK, prefill=habit)) as simulator:
        changes = {
            "llm.providers.sim.continuation": form,
            "llm.providers.sim.max_tokens": 4096,
        }
        found = await examined(tmp_path, simulator.base_url, changes)

        assert simulator.bodies[-1]["max_tokens"] == 16
    assert not found.of("fail")
    level = "ok" if text.startswith("goes on") else "warn"
    assert [line for line in found.of(level, "provider sim") if text in line]


@pytest.mark.parametrize("ask", [True, False])
@pytest.mark.parametrize(
    ("status", "text"),
    [
        ("401 Unauthorized", "provider_auth_error: sim refuses our key"),
        ("403 Forbidden", "provider_auth_error: sim does not allow this"),
        ("429 Too Many Requests", "provider_rate_limited: sim limits our rate"),
        ("500 Internal Server Error", "provider_error: sim answered 500"),
        ("302 Found", "provider_bad_response: sim answered 302"),
    ],
)
async def test_what_the_provider_answers_is_explained_without_its_words(
    status: str, text: str, ask: bool, tmp_path: Path
) -> None:
    play, asked = refusing(status)
    async with ScriptedProvider(play) as provider:
        changes = {"llm.providers.sim.api_key": CANARY}

        found = await examined(tmp_path, provider.url, changes, ask=ask)

    (failed,) = found.of("fail")
    assert text in failed
    # Without --no-ask the only request is the question; with it, only what costs nothing.
    assert [line.split()[0] for line in asked] == ["POST" if ask else "GET"]


async def test_an_error_in_a_stream_is_told_without_its_words(tmp_path: Path) -> None:
    error = json.dumps({"error": {"message": f"no room, {CANARY}", "code": 500}}).encode()

    async def play(peer: Connection) -> None:
        await peer.request()
        await peer.send(EVENT_STREAM + chunk(b"data: %b\n\n" % error) + LAST_CHUNK)

    async with ScriptedProvider(play) as provider:
        found = await examined(tmp_path, provider.url)

    (failed,) = found.of("fail")
    assert failed == "provider sim: provider_error: the provider reported an error"


@pytest.mark.parametrize(("configured_tokens", "sent"), [(None, None), (4096, 16), (5, 5)])
async def test_the_question_is_that_of_a_chat_but_short(
    configured_tokens: int | None, sent: int | None, tmp_path: Path
) -> None:
    bodies: list[Any] = []

    async def play(peer: Connection) -> None:
        bodies.append(json.loads((await peer.request()).partition(b"\r\n\r\n")[2]))

    async with ScriptedProvider(play) as provider:
        changes = {"llm.providers.sim.max_tokens": configured_tokens}
        found = await examined(tmp_path, provider.url, changes)

    assert [body.get("max_tokens") for body in bodies] == [sent]
    assert bodies[0]["stream"] is True
    assert "provider_disconnected" in found.of("fail")[0]


async def test_a_model_that_is_not_there_is_the_question_and_not_the_key(tmp_path: Path) -> None:
    play, _ = refusing("404 Not Found")
    async with ScriptedProvider(play) as provider:
        found = await examined(tmp_path, provider.url)

    (failed,) = found.of("fail")
    assert "sim answered 404" in failed
    assert "whether there is a model sim-model" in found.hint("answered 404")


async def test_a_provider_that_nobody_needs_only_warns_and_is_not_asked(tmp_path: Path) -> None:
    play, asked = refusing("401 Unauthorized")
    async with Simulator(QUICK) as simulator, ScriptedProvider(play) as provider:
        changes = {
            "llm.providers.refusing": provider_entry(provider.url),
            "llm.providers.away": provider_entry(NOWHERE),
            "llm.providers.keyless": {**provider_entry(NOWHERE), "api_key_env": "NOT_SET"},
        }
        found = await examined(tmp_path, simulator.base_url, changes)

    assert found.code == 0
    away, refused = found.of("warn", "provider")
    assert "provider refusing: provider_auth_error: refusing refuses our key" in refused
    assert "provider away: no connection: 127.0.0.1 port 9: Connection refused" in away
    assert "provider keyless: off: NOT_SET is not set" in found.of("skip")
    assert [line.split()[:2] for line in asked] == [["GET", "/v1/models"]]


@pytest.mark.parametrize("messages", [True, "auto"])
async def test_the_list_of_a_provider_of_messages_is_asked_for_in_a_version_of_that_api(
    tmp_path: Path, messages: bool | str
) -> None:
    asked: list[bytes] = []

    async def play(peer: Connection) -> None:
        asked.append(await peer.request())

    async with ScriptedProvider(play) as provider:
        changes = {"llm.providers.own": {**provider_entry(provider.url), "messages": messages}}
        await examined(tmp_path, NOWHERE, changes)

    assert asked[0].startswith(b"GET /v1/models ")
    assert (b"anthropic-version: 2023-06-01" in asked[0]) is (messages is True)


async def test_a_proxy_is_what_is_reached_and_its_password_is_not_shown(tmp_path: Path) -> None:
    changes = {"llm.providers.sim.proxy": f"http://me:{CANARY}@127.0.0.1:9"}

    found = await examined(tmp_path, "https://provider.example/v1", changes)

    assert "provider sim: reached through the proxy 127.0.0.1:9" in found.of("ok")
    (failed,) = found.of("fail")
    assert "no connection: 127.0.0.1 port 9: Connection refused" in failed


@pytest.mark.parametrize(
    ("name", "days", "trusted", "told"),
    [
        ("127.0.0.1", 30.0, True, "ok TLS: TLSv1.3, and a certificate that is valid for 30 days"),
        ("127.0.0.1", 3.0, True, "warn TLS: TLSv1.3, and a certificate that is valid for 3 days"),
        ("127.0.0.1", -1.0, True, "fail TLS: the certificate is refused: certificate has expired"),
        ("other.example", 30.0, True, "fail TLS: the certificate is refused: IP address mismatch"),
        ("127.0.0.1", 30.0, False, "fail TLS: the certificate is refused: unable to get local"),
    ],
)
async def test_the_certificate_is_read(name: str, days: float, trusted: bool, told: str) -> None:
    authority = trustme.CA()
    until = dt.datetime.now(dt.UTC) + dt.timedelta(days=days)
    theirs = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert(name, not_after=until).configure_cert(theirs)
    ours = ssl.create_default_context()
    if trusted:
        authority.configure_trust(ours)

    async def play(peer: Connection) -> None:
        await peer.left()

    async with ScriptedProvider(play, ssl=theirs) as listener:
        url = URL(f"https://127.0.0.1:{listener.port}")
        results, protocol = await connect(url, 20.0, ours)

    *before, secured = (f"{result.level} {result.text}" for result in results)
    assert secured.startswith(told)
    reached = not told.startswith("fail")
    assert protocol == ("" if reached else None)
    said = f"ok connected to 127.0.0.1 port {listener.port}"
    assert before == ([said] if reached else [])


async def test_tls_where_there_is_none_and_names_that_cannot_be_are_reported() -> None:
    async def play(peer: Connection) -> None:
        await peer.send(b"SSH-2.0-x\r\n")

    context = ssl.create_default_context()
    async with ScriptedProvider(play) as listener:
        url = URL(f"https://127.0.0.1:{listener.port}")
        (tls,), secured = await connect(url, 20.0, context)
    (name,), reached = await connect(URL(f"http://{'a' * 64}:1"), 20.0)

    assert tls.text.startswith("TLS: no handshake: ")
    assert name.text.startswith("the name aaa")
    assert secured is reached is None


def written(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


async def test_this_machine_is_measured_against_the_settings(tmp_path: Path) -> None:
    written(tmp_path / kernel.PORTS, "40000 40009")
    written(tmp_path / kernel.MACHINE, "MemTotal: 9 kB\nMemAvailable: 1024 kB\n")

    found = await examined(tmp_path, NOWHERE, root=tmp_path)

    ports, memory = found.of("warn", "machine")
    assert not found.of("fail", "machine")
    assert "local ports: 10, and up to 100 connections" in ports
    assert "memory: 1 MiB are free" in memory
    assert found.hint("local ports").startswith("sysctl -w net.ipv4.ip_local_port_range=")


async def test_a_system_that_does_not_show_its_limits_is_not_measured(tmp_path: Path) -> None:
    found = await examined(tmp_path, NOWHERE, root=tmp_path)

    assert found.of("skip", "machine") == [
        f"machine: {limit}: this system does not show it" for limit in ("local ports", "memory")
    ]


def test_the_limit_of_a_group_above_counts(tmp_path: Path) -> None:
    written(tmp_path / kernel.MACHINE, "MemAvailable: 10240 kB\n")
    written(tmp_path / kernel.OWN_CGROUP, "0::/outer/inner\n")
    outer = tmp_path / kernel.CGROUPS / "outer"
    written(outer / "inner" / "memory.max", "max\n")
    written(outer / "memory.max", f"{5 << 20}\n")
    written(outer / "memory.current", f"{3 << 20}\n")

    assert kernel.free_memory(tmp_path) == 2 << 20


async def test_a_package_that_the_settings_want_is_missed_as_the_server_would_miss_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "redis", None)

    found = await examined(tmp_path, NOWHERE, {"cluster.redis_url": "redis://127.0.0.1:9"})

    assert found.code == 2
    assert "redis is not installed" in found.of("fail", "configuration")[0]


async def test_a_provider_that_no_server_could_use_leaves_the_machine_to_be_examined(
    tmp_path: Path,
) -> None:
    written(tmp_path / "ca.pem", "no certificate")
    changes = {"llm.providers.sim.ca_file": str(tmp_path / "ca.pem")}

    found = await examined(tmp_path, "https://provider.example/v1", changes)

    assert found.code == 2
    assert "holds no certificates" in found.of("fail", "configuration")[0]
    assert {result.subject for result in found.results} == {"configuration", "machine", "streams"}


async def test_doctor_says_what_is_held_of_whose_answers(tmp_path: Path) -> None:
    keys = [
        {"name": "web", "sha256": "0" * 64},
        {"name": "batch", "sha256": "1" * 64, "hold": "turn"},
        {"name": "canvas", "sha256": "2" * 64, "hold": "preamble"},
    ]

    found = await examined(
        tmp_path, NOWHERE, {"chat.streams.hold": "calls", "auth.keys": keys}, ask=False
    )

    assert found.of("ok", "streams") == [
        "streams: chat.streams.hold: calls; key batch: turn; key canvas: preamble"
    ]


# The command.


def commanded(*arguments: str) -> tuple[int, str, str]:
    """The exit code, stdout and stderr of `aioserver doctor` with *arguments*."""
    result = CliRunner().invoke(cli, ["doctor", *arguments])
    return result.exit_code, result.stdout, result.stderr


def test_a_bad_configuration_is_reported_whole_with_exit_code_2(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(SHIPPED.read_text().replace("port: 8000", "prot: 8000").replace("demo:", "x:"))

    code, out, err = commanded("--config", str(file))

    assert (code, err) == (2, "")
    assert "chat.websocket.prot: unknown key (did you mean port?)" in out
    assert "is not among llm.providers" in out
    assert "Traceback" not in out


def test_an_active_provider_without_its_key_is_2_and_the_rest_is_examined_all_the_same(
    tmp_path: Path,
) -> None:
    file = tmp_path / "c.yaml"
    write(
        NOWHERE,
        {"llm.providers.sim.api_key_env": "NOT_SET", "llm.providers.demo": SIMULATED},
        file,
    )

    code, out, _ = commanded("--config", str(file), "--json")

    report = json.loads(out)
    texts = {
        f"{finding['subject']}: {finding['text']}": finding["level"]
        for finding in report["findings"]
    }
    assert (code, report["failed"]) == (2, True)
    assert any("sim is active but NOT_SET is not set" in text for text in texts)
    assert texts["provider sim: off: NOT_SET is not set"] == "skip"
    assert texts["provider demo: answers: the first token of demo came"] == "ok"


def test_the_shipped_configuration_is_well_and_asks_nobody(tmp_path: Path) -> None:
    data = yaml.safe_load(SHIPPED.read_text())
    del data["llm"]["providers"]["local"]
    data["chat"]["websocket"]["port"] = 0
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(data))

    code, out, err = commanded("--config", str(file))

    assert (code, err) == (0, ""), out
    assert "ok    provider demo: answers: the first token of demo came" in out


async def test_what_a_server_would_log_of_a_provider_is_not_printed(tmp_path: Path) -> None:
    """It takes two seconds: a server looks once a second at how its providers fail."""
    file = tmp_path / "c.yaml"

    async def play(peer: Connection) -> None:
        await peer.request()
        await asyncio.sleep(1.5)
        await peer.send(b"HTTP/1.1 500 Slow\r\nContent-Length: 0\r\n\r\n")

    async with ScriptedProvider(play) as provider:
        # The other one is asked while the server looks.
        changes = {"llm.providers.other": provider_entry(provider.url), "llm.fallbacks": ["other"]}
        write(provider.url, changes, file)
        code, out, err = await run_command("doctor", "--config", str(file))

    assert (code, err) == (1, ""), out
    assert out.count("answered 500") == 2


@pytest.mark.parametrize(
    "arguments", [["--idle", "5"], ["http://x", "--config", "c.yaml"], ["ftp://x"]]
)
def test_bad_usage_is_2(arguments: list[str]) -> None:
    code, out, err = commanded(*arguments)

    assert (code, out) == (2, "")
    assert "Usage: " in err


@asynccontextmanager
async def lists(*models: Any) -> AsyncIterator[str]:
    """A provider that lists *models*, each by its id or as an object; its base URL."""
    entries = [model if isinstance(model, dict) else {"id": model} for model in models]
    body = json.dumps({"object": "list", "data": entries, "key": CANARY}).encode()
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"

    async def play(peer: Connection) -> None:
        while (await peer.request()).startswith(b"GET /v1/models "):
            await peer.send(head % len(body) + body)

    async with ScriptedProvider(play) as provider:
        yield provider.url


async def groups_of(path: Path, models: dict[str, Any], **urls: str) -> list[str]:
    """What is told of the groups *models* of providers at these *urls*."""
    changes: dict[str, Any] = {
        f"llm.providers.{name}": provider_entry(url, "qwen3") for name, url in urls.items()
    }
    changes |= {"llm.providers.demo": SIMULATED, "llm.models": models}
    found = await examined(path, NOWHERE, changes, ask=False)
    return [str(result) for result in found.results if result.subject.startswith("group ")]


async def test_each_member_of_a_group_lists_its_model(tmp_path: Path) -> None:
    async with (
        lists("other", "qwen3") as good,
        lists("qwen3:latest", "models/small") as tagged,
        lists("qwen2") as wrong,
        lists({"no": "id"}, "q" * 100_000) as large,
    ):
        found = await groups_of(
            tmp_path,
            {"qwen": ["good", "tagged", "wrong", "large", "demo"], "small": "tagged/small"},
            good=good,
            tagged=tagged,
            wrong=wrong,
            large=large,
        )

    hint = (
        "\n        check `model` of the member, and the name by which its engine serves the model"
    )
    assert found == [
        "ok    group qwen: good lists qwen3",
        "ok    group qwen: tagged lists qwen3",
        f"warn  group qwen: wrong does not list qwen3 under /v1/models{hint}",
        f"warn  group qwen: large does not list qwen3 under /v1/models{hint}",
        "ok    group small: tagged lists small",
    ]


async def test_a_list_that_is_none_is_not_looked_at(tmp_path: Path) -> None:
    play, _ = refusing("404 Not Found")

    async def no_json(peer: Connection) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nno")

    async def cut(peer: Connection) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 200\r\n\r\n{")

    async with (
        ScriptedProvider(play) as refuses,
        ScriptedProvider(no_json) as says,
        ScriptedProvider(cut) as cuts,
    ):
        found = await groups_of(
            tmp_path,
            {"qwen": ["refuses", "says", "cuts", "nowhere"]},
            refuses=refuses.url,
            says=says.url,
            cuts=cuts.url,
            nowhere=NOWHERE,
        )

    assert found == [
        f"skip  group qwen: {name} shows no list of models that can be read"
        for name in ("refuses", "says", "cuts", "nowhere")
    ]


async def test_members_that_take_less_than_others_need_a_max_context(tmp_path: Path) -> None:
    async with (
        lists({"id": "qwen3", "max_model_len": 32_768}) as large,
        lists({"id": "qwen3", "max_model_len": 8192}) as less,
        lists({"id": "qwen3", "max_model_len": 4096}) as told,
        lists({"id": "qwen3", "max_model_len": "many"}) as unknown,
    ):
        found = await groups_of(
            tmp_path,
            {
                "qwen": ["large", "less", {"provider": "told", "max_context": 4096}, "unknown"],
                "alone": ["less", "unknown"],
            },
            large=large,
            less=less,
            told=told,
            unknown=unknown,
        )

    assert [line for line in found if line.startswith("warn")] == [
        (
            "warn  group qwen: less takes 8,192 tokens, and others take 32,768 (max_model_len)\n"
            "        set max_context: 8192 there, so that longer prompts go to the others"
        )
    ]


def chunks(*deltas: dict[str, Any]) -> bytes:
    """A streamed chat completion of these *deltas*."""
    choices: list[Any] = [
        [{"index": 0, "delta": delta, "finish_reason": None}] for delta in deltas
    ]
    choices.append([{"index": 0, "delta": {}, "finish_reason": "stop"}])
    written: list[dict[str, Any]] = [{"model": "m", "choices": choice} for choice in choices]
    events = [b"data: %b\n\n" % json.dumps(each).encode() for each in written]
    return EVENT_STREAM + chunk(b"".join(events) + DONE) + LAST_CHUNK


CALL = {
    "reasoning": "Hm",
    "tool_calls": [
        {
            "index": 0,
            "id": "c1",
            "type": "function",
            "function": {"name": "note", "arguments": '{"word": "ready"}'},
        }
    ],
}


def picky(*deltas: dict[str, Any], refused: str = "") -> Any:
    """An engine with chat completions alone, that refuses the word *refused*, and its requests."""
    asked: list[tuple[str, dict[str, Any]]] = []

    async def play(peer: Connection) -> None:
        while True:
            head, _, body = (await peer.request()).partition(b"\r\n\r\n")
            path, content = head.split(b" ")[1].decode(), json.loads(body)
            asked.append((path, content))
            status, answer = 404, {"error": "Not Found"}
            if path == "/v1/chat/completions":
                if not refused or refused not in content:
                    await peer.send(chunks(*deltas))
                    continue
                status, answer = 400, {"error": f"unknown field: {refused} {CANARY}"}
            data = json.dumps(answer).encode()
            await peer.send(
                b"HTTP/1.1 %d X\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
                % (status, len(data), data)
            )

    return play, asked


async def named(path: Path, play: Any, **changes: Any) -> Examined:
    """What is told of the provider of *play*, which is named, with these settings."""
    async with ScriptedProvider(play) as provider:
        settings = {f"llm.providers.sim.{name}": value for name, value in changes.items()}
        settings["llm.providers.other"] = provider_entry(NOWHERE, "m")
        found = await examined(path, provider.url, settings, only="sim")
    others = {result.subject for result in found.results} - {"configuration"}
    assert others == {"provider sim"}
    return found


async def test_a_named_provider_is_asked_for_a_call_over_each_bridge(tmp_path: Path) -> None:
    play, asked = picky(CALL, refused="reasoning_effort")

    found = await named(tmp_path, play, messages="auto")

    for text in (
        "/v1/responses, translated: its tool was called",
        "/v1/messages, translated: its tool was called",
    ):
        assert f"provider sim: {text}" in found.of("ok"), found
    assert not found.of("warn", "provider")
    probed = [body for path, body in asked if "tools" in body and path.endswith("completions")]
    assert all(body["stream"] for body in probed)
    # What was learned over the one bridge is known to the other.
    assert ["reasoning_effort" in body for body in probed] == [True, False, False]


async def test_an_engine_that_calls_no_tools_is_told(tmp_path: Path) -> None:
    play, _asked = picky({"content": '<tool_call>{"name": "note"}</tool_call>'})

    found = await named(tmp_path, play, messages=False)

    (none,) = found.of("warn", "provider")
    assert "/v1/responses, translated: 0 calls of its tool came" in none
    assert "--tool-call-parser" in found.hint("0 calls of its tool")
    (skipped,) = found.of("skip")
    assert "/v1/messages: not asked for, as messages is false" in skipped


async def test_an_engine_without_messages_that_is_said_to_have_them_is_told(
    tmp_path: Path,
) -> None:
    play, _asked = picky(CALL)

    found = await named(tmp_path, play, messages=True)

    assert found.of("warn", "provider") == [
        "provider sim: /v1/messages: no whole answer: HTTP 404"
    ]
    assert "`messages: auto`" in found.hint("/v1/messages")


def test_a_name_is_that_of_a_provider(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    write(NOWHERE, {"llm.providers.demo": SIMULATED}, file)

    code, out, _err = commanded("demo", "--config", str(file))
    unknown, told, _err = commanded("nobody", "--config", str(file))

    assert code == 0, out
    assert "provider demo: answers" in out
    assert "provider sim" not in out
    assert unknown == 2
    assert "no provider is named nobody" in told
