"""The configurations of groups in the pages are served as they stand, but for their addresses."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from aioserver.config import Configuration
from tests.support.server import QUICK
from tests.support.simulator import Behaviour, Simulator

if TYPE_CHECKING:
    from tests.support.server import MakeServer

ROOT = Path(__file__).parents[2]
FROM_LITELLM = (ROOT / "docs/from-litellm.md").read_text()
RECIPE = (ROOT / "docs/recipes.md").read_text().partition("\n## Several vLLM")[2]
# The same six deployments for LiteLLM, in the style of its documentation.
LITELLM = """\
model_list:
  - model_name: qwen
    litellm_params:
      model: hosted_vllm/Qwen/Qwen3-8B
      api_base: http://10.0.0.1:8000/v1
  - model_name: qwen
    litellm_params:
      model: hosted_vllm/Qwen/Qwen3-8B
      api_base: http://10.0.0.2:8000/v1
  - model_name: qwen
    litellm_params:
      model: hosted_vllm/Qwen/Qwen3-8B
      api_base: http://10.0.0.3:8000/v1
  - model_name: gpt-4o
    litellm_params:
      model: openai/gpt-4o
      api_key: os.environ/OPENAI_KEY_1
  - model_name: gpt-4o
    litellm_params:
      model: openai/gpt-4o
      api_key: os.environ/OPENAI_KEY_2
  - model_name: gpt-4o
    litellm_params:
      model: openai/gpt-4o
      api_key: os.environ/OPENAI_KEY_3
router_settings:
  routing_strategy: least-busy
  fallbacks: [{gpt-4o: [qwen]}]
"""
KEYS = {f"OPENAI_KEY_{number}": f"key-{number}" for number in (1, 2, 3)}


def blocks(page: str) -> list[str]:
    return re.findall(r"^```yaml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


async def answered(
    make_server: MakeServer, llm: dict[str, Any], model: str, number: int
) -> Counter[str]:
    """Which providers of *llm* have answered *number* questions at once, each with a simulator of
    its own in place of its address.
    """
    async with AsyncExitStack() as stack:
        changes: dict[str, Any] = {"llm.active": llm["active"], "llm.models": llm["models"]}
        for name, provider in llm["providers"].items():
            simulator = await stack.enter_async_context(Simulator(Behaviour(ttft=0.2, interval=0)))
            entry = {**provider, "base_url": simulator.base_url}
            if (variable := entry.pop("api_key_env", None)) is not None:
                entry["api_key"] = KEYS[variable]
            changes[f"llm.providers.{name}"] = entry
        # What the shipped file has beside them.
        shipped = yaml.safe_load((ROOT / "config.yaml").read_text())["llm"]["providers"]["local"]
        server = await make_server(QUICK, **{"llm.providers.local": shipped, **changes})

        async def ask(question: int) -> str:
            body = {"model": model, "messages": [{"role": "user", "content": f"Q{question}"}]}
            async with server.session.post(f"{server.v1}/chat/completions", json=body) as response:
                assert response.status == 200
                await response.read()
                return response.headers["x-aioserver-provider"]

        return Counter(await asyncio.gather(*map(ask, range(number))))


@pytest.mark.parametrize(
    ("model", "names"), [("qwen", "gpu1 gpu2 gpu3"), ("gpt-4o", "key1 key2 key3")]
)
async def test_the_file_of_who_comes_from_litellm_serves_all_deployments(
    make_server: MakeServer, model: str, names: str
) -> None:
    (text,) = blocks(FROM_LITELLM)

    counts = await answered(make_server, yaml.safe_load(text)["llm"], model, 30)

    assert counts.keys() == {*names.split()}


def test_that_file_is_whole_and_shorter(tmp_path: Path) -> None:
    (text,) = blocks(FROM_LITELLM)
    file = tmp_path / "config.yaml"
    file.write_text(text)

    configuration = Configuration.load(file, environ=KEYS)
    configuration.check_usable()

    assert configuration.warnings == ()
    assert configuration.settings.llm.chain("gpt-4o") == ("gpt-4o", "qwen")
    assert configuration.settings.llm.unknown_models == "refuse"
    deployments = yaml.safe_load(LITELLM)["model_list"]
    members = [
        member for group in configuration.settings.llm.models.values() for member in group.members
    ]
    assert len(members) == len(deployments)
    lines = LITELLM.count("\n")
    assert text.count("\n") < lines
    assert f"are {lines} lines of LiteLLM's" in FROM_LITELLM


async def test_the_recipe_of_several_engines_serves_them_all(make_server: MakeServer) -> None:
    (text,) = blocks(RECIPE)
    llm = yaml.safe_load(text)["llm"]

    counts = await answered(make_server, llm, llm["active"], 30)

    assert counts.keys() == {"gpu1", "gpu2", "gpu3"}
