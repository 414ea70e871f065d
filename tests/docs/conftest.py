"""What several pages' examples are run against."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

from tests.support.command import serving

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def quick_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with a simulated provider that is quicker than `demo`."""
    folder = tmp_path_factory.mktemp("server")
    command = (sys.executable, "-m", "aioserver")
    quick = ("provider", "--port", "0", "--ttft", "0", "--interval", "0.001")
    with serving((*command, *quick), folder) as provider:
        settings = {
            "AIOSERVER__LLM__ACTIVE": "local",
            "AIOSERVER__LLM__PROVIDERS__LOCAL__BASE_URL": provider,
        }
        with serving((*command, "serve", "--port", "0"), folder, settings) as address:
            yield address
