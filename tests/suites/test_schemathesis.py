"""Requests that Schemathesis makes up from `/openapi.json`, and answers that it compares with it.

The score is in docs/testing.md: no failure.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from tests.support.keys import key_of, keys_of
from tests.support.process import serving
from tests.support.programs import is_installed, run
from tests.support.server import HTTP_CLIENT

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.suites, pytest.mark.timeout(300)]

INSTALL = (
    "schemathesis is not installed: python -m venv ~/suites && ~/suites/bin/pip install "
    "schemathesis, and run with AIOSERVER_CLIENTS=~/suites"
)
DEMO = {"simulated": True, "messages": True, "model": "demo", "http_client": HTTP_CLIENT}
# What the description cannot say: a provider refuses bodies that we pass on, JSON Schema has no
# word for printable characters, and the body of a login is read only where it is needed.
CHECKS = """
[[operations]]
include-path-regex = "^/(v1|sse)/"
checks.positive_data_acceptance.enabled = false

[[operations]]
include-path = "/session"
checks.negative_data_rejection.enabled = false
"""
# The requests are the same ones each time. A stream that does not end, and WebSockets, are left
# out.
OPTIONS = (
    *("--generation-deterministic", "--max-examples", "10", "--phases", "coverage,fuzzing"),
    *("--exclude-path", "/events", "--exclude-by", "/x-websocket == true"),
    *("--request-timeout", "10", "--continue-on-failure", "--no-color"),
)


@pytest.mark.parametrize("key", [None, "root"])
async def test_each_answer_is_one_that_the_description_has(
    tmp_path: Path, key: str | None
) -> None:
    if not is_installed("schemathesis"):
        pytest.fail(INSTALL)
    checks = tmp_path / "schemathesis.toml"
    checks.write_text(CHECKS)
    header = ("--header", f"Authorization: Bearer {key_of(key)}") if key else ()
    changes = {"llm.active": "demo", "llm.providers.demo": DEMO}

    async with serving(
        tmp_path / "config.yaml",
        "http://127.0.0.1:9/v1",
        changes={**changes, **(keys_of(key) if key else {})},
    ) as server:
        await server.ready()
        url = f"{server.base}/openapi.json"
        ended = await run(
            *("schemathesis", "--config-file", checks, "run", url, *header, *OPTIONS),
            home=tmp_path,
            within=240.0,
        )

    assert ended.code == 0, ended.out[-6000:]
    passed = re.search(r"(\d+) generated, (\d+) passed", ended.out)
    assert passed is not None, ended.out[-6000:]
    assert int(passed[2]) > 1000
