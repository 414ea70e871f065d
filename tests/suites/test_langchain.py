"""LangChain's standard tests of a chat model (langchain-tests): `ChatOpenAI` with chat completions,
and with Responses that are translated for a provider that has chat completions alone.

The score is in docs/testing.md: all pass but the tests of `NEED_A_MODEL`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.programs import program_path, run

if TYPE_CHECKING:
    from tests.support.server import MakeServer

pytestmark = [pytest.mark.suites, pytest.mark.timeout(300)]

HINT = "python -m venv ~/suites && ~/suites/bin/pip install langchain-tests langchain-openai"
# The pictures, sounds and papers that the tests fetch from the web are a few bytes here.
TESTS = """
from types import SimpleNamespace

import pytest
from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests, chat_models


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    web = SimpleNamespace(get=lambda *_, **__: SimpleNamespace(content=b"some bytes"))
    monkeypatch.setattr(chat_models, "httpx", web)


class TestServer(ChatModelIntegrationTests):
    chat_model_class = ChatOpenAI
    chat_model_params = {
        "base_url": "{base}/v1",
        "api_key": "x",
        "model": "sim-model",
        "stream_usage": True,
        "use_responses_api": {responses},
    }
    supports_image_inputs = supports_image_urls = supports_pdf_inputs = True
    supports_audio_inputs = True
    supports_json_mode = True
    model_override_value = "sim-model"
"""
# ChatOpenAI keeps its connections for all of its instances.
OPTIONS = (
    *("-q", "-rfE", "--tb=short", "--asyncio-mode=auto", "-p", "no:cacheprovider"),
    *("-o", "asyncio_default_fixture_loop_scope=session"),
    *("-o", "asyncio_default_test_loop_scope=session"),
)
# The simulated model would have to understand `magic_function(3)` and "the keys 'setup' and
# 'punchline'".
NEED_A_MODEL = {
    "test_tool_calling[model0]",
    "test_tool_calling[model1]",
    "test_tool_calling_async",
    "test_json_mode",
}
PASSED = 42


@pytest.mark.parametrize("responses", [False, True], ids=["chat", "responses"])
async def test_all_pass_that_need_no_real_model(
    make_server: MakeServer, tmp_path: Path, responses: bool
) -> None:
    pytest_of_suites = Path(program_path("schemathesis", HINT)).with_name("pytest")
    home = tmp_path / "home"
    home.mkdir()
    server = await make_server(**{"llm.providers.sim.responses": False})
    tests = TESTS.replace("{base}", server.base).replace("{responses}", str(responses))
    (home / "test_server.py").write_text(tests)

    ended = await run(pytest_of_suites, *OPTIONS, "test_server.py", home=home, within=240.0)

    failed = set(re.findall(r"^(?:FAILED|ERROR) \S+::(\S+)", ended.out, re.MULTILINE))
    assert failed == NEED_A_MODEL, ended.out[-6000:]
    passed = re.search(r"(\d+) passed", ended.out)
    assert passed is not None
    assert int(passed[1]) >= PASSED, ended.out[-6000:]
