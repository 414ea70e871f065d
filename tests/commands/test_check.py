from __future__ import annotations

from typing import TYPE_CHECKING

import yaml

from aioserver.commands.check import check
from aioserver.config import Configuration
from aioserver.config.shipped import SHIPPED
from tests.support.configurations import ORIGINAL

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def test_a_valid_file_prints_what_it_comes_to(capsys: pytest.CaptureFixture[str]) -> None:
    code = check(SHIPPED)

    out, _ = capsys.readouterr()
    assert code == 0
    assert out.startswith(f"# {SHIPPED}, ")
    assert yaml.safe_load(out) == Configuration.load(SHIPPED).effective()


def test_secrets_are_masked_and_warnings_go_to_stderr(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "canary")

    code = check(ORIGINAL)

    out, err = capsys.readouterr()
    assert code == 0
    assert "canary" not in out + err
    assert "api_key: '***'" in out
    assert f"warning: {ORIGINAL}:142:1 mcp: ignored: the client runs the tools that " in err


def test_all_faults_go_to_stderr_and_nothing_to_stdout(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "c.yaml"
    text = SHIPPED.read_text().replace("port: 8000", "prot: 8000").replace("demo:", "x:")
    line = text[: text.index("prot: 8000")].count("\n") + 1
    file.write_text(text)

    code = check(file)

    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert f"{file}:{line}:5 chat.websocket.prot: unknown key (did you mean port?)\n" in err
    assert "is not among llm.providers" in err
    assert "Traceback" not in err


def test_a_file_that_cannot_serve_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    code = check(ORIGINAL)

    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert "openai is active but OPENAI_API_KEY is not set" in err


GROUPS = """\
llm:
  active: qwen
  models:
    qwen: {members: [gpu1, gpu2], choose: least_busy}
  providers:
    gpu1: {base_url: "http://10.0.0.1:8000/v1", model: qwen3, max_tokens: 100}
    gpu2: {like: gpu1, base_url: "http://10.0.0.2:8000/v1", models: [small, tiny]}
    gpu3: {like: gpu2, base_url: "http://10.0.0.3:8000/v1"}
"""


def test_what_is_like_another_and_names_that_route_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(GROUPS)

    code = check(file)

    out, err = capsys.readouterr()
    assert code == 0
    assert err == f"by name alone go to gpu2, gpu3: small, tiny\n{file} is valid\n"
    providers = yaml.safe_load(out)["llm"]["providers"]
    assert [provider["max_tokens"] for provider in providers.values()] == [100, 100, 100]
    assert providers["gpu3"]["models"] == ["small", "tiny"]
    assert providers["gpu3"]["http_client"] == providers["gpu1"]["http_client"]
    # What is printed is a whole configuration, which means the same.
    file.write_text(out)
    assert check(file) == 0
    assert yaml.safe_load(capsys.readouterr().out) == yaml.safe_load(out)
