"""The compliance tests of Open Responses (github.com/openresponses/openresponses), with `demo` and
over the bridge to a provider that has chat completions alone.

The score is in docs/testing.md: 17 of 17.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.programs import program_path, run
from tests.support.server import HTTP_CLIENT

if TYPE_CHECKING:
    from tests.support.server import MakeServer

pytestmark = [pytest.mark.suites, pytest.mark.timeout(180)]

VARIABLE = "AIOSERVER_OPEN_RESPONSES"
HINT = f"{VARIABLE} must name a checkout of openresponses/openresponses; see docs/testing.md"
TESTS = 17
DEMO = {"simulated": True, "model": "demo", "http_client": HTTP_CLIENT}


@pytest.mark.parametrize("model", ["demo", "sim"])
async def test_all_pass(make_server: MakeServer, tmp_path: Path, model: str) -> None:
    if not os.environ.get(VARIABLE):
        pytest.skip(HINT)
    program = Path(os.environ[VARIABLE]) / "bin/compliance-test.ts"
    bun = program_path("bun", "npm install bun")
    changes = {"llm.providers.sim.responses": False, "llm.providers.demo": DEMO}
    server = await make_server(**changes)

    ended = await run(
        *(bun, "run", program, "--json", "-k", "x"),
        *("-u", f"{server.base}/v1", "-m", model),
        home=tmp_path,
        within=150.0,
    )

    results = json.loads(ended.out)["results"]
    assert not [result for result in results if result["status"] != "passed"]
    assert len(results) == TESTS
    asked = {request.path for request in server.simulator.requests}
    assert asked == ({"/v1/chat/completions"} if model == "sim" else set())
