"""Sessions of agents that share a key wait apart from each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.raw import Raw
from tests.support.responses import connect, create
from tests.support.server import SILENT, SIM_HTTP_CLIENT
from tests.support.waiting import until

if TYPE_CHECKING:
    from tests.support.server import MakeServer, RunningServer

CHAT = {"messages": [{"role": "user", "content": "Hi"}], "stream": True}
# What asks, in this order: three of one session are followed by one of another, and a user.
ASKED = ("one", "one", "one", "two", "user")


async def served(server: RunningServer, raws: list[Raw]) -> list[int]:
    """The numbers of the requests, in the order in which the provider gets them."""
    order: list[int] = []
    for count in range(1, len(raws) + 1):
        await until(lambda count=count: len(server.simulator.bodies) == count)  # type: ignore[misc]
        order.append(int(server.simulator.bodies[-1]["model"]))
        raws[order[-1]].reset()
    return order


@pytest.mark.parametrize("header", ["session-id", "x-session-id", "X-Claude-Code-Session-Id"])
@pytest.mark.parametrize(
    ("path", "body"), [("chat/completions", CHAT), ("responses", {"input": "Hi", "stream": True})]
)
async def test_sessions_take_turns(
    make_server: MakeServer, path: str, body: dict[str, object], header: str
) -> None:
    server = await make_server(SILENT, **{f"{SIM_HTTP_CLIENT}.concurrent_requests": 1})
    raws: list[Raw] = []
    for number, name in enumerate(ASKED):
        raws.append(await Raw(server).__aenter__())
        user = {"user": "three"} if name == "user" else {}
        fields = {**body, **user, "model": f"{number}"}
        await raws[-1].post(f"/v1/{path}", fields, f"{header}: {name}")
        if not number:
            await server.simulator.until(lambda stats: stats.active == 1)
        else:
            await until(lambda number=number: server.held()["sim waiting"] == number)  # type: ignore[misc]

    order = await served(server, raws)
    assert (order[0], order[-1], sorted(order)) == (0, 2, [0, 1, 2, 3, 4])
    for raw in raws:
        raw.close()
    await server.nothing_held()


async def test_the_session_of_a_handshake_is_that_of_its_requests(make_server: MakeServer) -> None:
    server = await make_server(SILENT, **{f"{SIM_HTTP_CLIENT}.concurrent_requests": 1})
    async with (
        connect(server, headers={"session-id": "one"}) as one,
        connect(server, headers={"session-id": "two"}) as two,
    ):
        for number, ws in enumerate((one, one, one, two)):
            await ws.send_json(create(lane=f"q{number}", model=f"{number}"))
            if not number:
                await server.simulator.until(lambda stats: stats.active == 1)
            else:
                await until(lambda number=number: server.held()["sim waiting"] == number)  # type: ignore[misc]
        order = []
        for count in range(1, 4):
            await until(lambda count=count: len(server.simulator.bodies) == count)  # type: ignore[misc]
            order.append(server.simulator.bodies[-1]["model"])
            lane = {"type": "response.cancel", "stream_id": f"q{order[-1]}"}
            await (two if order[-1] == "3" else one).send_json(lane)

    assert order[0] == "0"
    assert "2" not in order
    await server.nothing_held()
