"""How many files a stranger opens who follows a question down, from the client to the provider.

pytest tests/docs/test_path.py -s    # prints them, in the order in which they are entered
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.chat import CHAT
from tests.support.keys import bearer, keys_of
from tests.support.server import provider_entry

if TYPE_CHECKING:
    from types import FrameType

    from tests.support.server import MakeServer, RunningServer


PACKAGE = Path(__file__).parents[2] / "aioserver"
# What watches beside all requests, and may do so in the middle of one.
BESIDE = ("wings/simulator/", "monitoring/", "telemetry/loop_lag")
# A question is asked so often: the shortest way is that of a question that waits for nothing.
TIMES = 20


async def files_down(
    server: RunningServer, body: dict[str, Any], headers: dict[str, str]
) -> list[str]:
    """Ask several times; return the files that were entered before the provider had the question,
    on the shortest way: on a busy machine a question may have to wait.
    """
    ways: list[list[str]] = []
    entered: dict[str, None] = {}

    def enter(frame: FrameType, event: str, _argument: Any) -> None:
        if event != "call":
            return
        path = frame.f_code.co_filename
        if not path.startswith(str(PACKAGE)):
            return
        name = str(Path(path).relative_to(PACKAGE))
        if name.startswith("wings/simulator/"):
            sys.setprofile(None)
        elif not name.startswith(BESIDE):
            entered[name] = None

    for _ in range(TIMES + 1):
        entered.clear()
        sys.setprofile(enter)
        try:
            answer = await server.session.post(
                f"{server.v1}/chat/completions", json=body, headers=headers
            )
        finally:
            sys.setprofile(None)
        assert answer.status == 200, await answer.text()
        await answer.read()
        ways.append(list(entered))
    # The first question opens a connection.
    return min(ways[1:], key=len)


GROUP = {
    "llm.providers.other": provider_entry("http://127.0.0.1:9/v1"),
    "llm.models": {"pair": ["sim", "other"]},
}


@pytest.mark.parametrize(
    ("most", "changes"),
    [
        pytest.param(24, {}, id="a plain question"),
        pytest.param(28, keys_of("ann"), id="with a key"),
        pytest.param(28, GROUP, id="in a group"),
    ],
)
async def test_few_files_lead_from_a_client_to_a_provider(
    make_server: MakeServer, most: int, changes: dict[str, Any]
) -> None:
    server = await make_server(**changes)
    headers = bearer("ann") if "auth.keys" in changes else {}

    body = {**CHAT, "model": "pair"} if "llm.models" in changes else CHAT

    files = await files_down(server, body, headers)

    print(f"\n{len(files)} files", *files, sep="\n  ")
    assert len(files) <= most, files
