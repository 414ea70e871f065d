"""`aioserver doctor` through a real nginx: as its sample in `deploy/` has it, and as it gathers
events.

It takes four seconds: the snapshots of `/events` come once a second.
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

from tests.support.process import Process
from tests.support.proxy import AUTHORITY, running
from tests.support.server import HTTP_CLIENT

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.server import MakeServer

SIMULATED = {"simulated": True, "model": "demo", "http_client": HTTP_CLIENT}
# Lines that many a site has. nginx obeys a header of ours in each stream, unless it is told not
# to.
GATHERS = {
    "proxy_buffering off;": "proxy_buffering on; proxy_ignore_headers X-Accel-Buffering;",
    "client_max_body_size 20m;": "client_max_body_size 1m;",
    "    http2 on;\n": "",
}


async def examined(
    path: Path, name: str, port: int, changes: dict[str, str], *options: str
) -> tuple[int, dict[str, list[str]]]:
    """The exit code of the doctor at a server behind nginx, and what it says, by its level."""
    folder = path / name
    folder.mkdir()
    async with (
        running("nginx", folder, port, changes) as proxy,
        await Process.start(
            *("-m", "aioserver", "doctor", proxy.base, "--json", *options),
            environ={"SSL_CERT_FILE": str(folder / AUTHORITY)},
        ) as process,
    ):
        code = await process.ended()
    findings: dict[str, list[str]] = {"ok": [], "warn": [], "fail": [], "skip": []}
    for finding in json.loads(process.out)["findings"]:
        findings[finding["level"]].append(f"{finding['subject']}: {finding['text']}")
    return code, findings


async def test_what_gathers_events_is_found_where_nothing_may_be_asked(
    tmp_path: Path, make_server: MakeServer
) -> None:
    server = await make_server(**{"auth.open": True})

    (good, well), (bad, ill) = await asyncio.gather(
        examined(tmp_path, "sample", server.port, {}, "--no-ask"),
        examined(tmp_path, "gathers", server.port, GATHERS, "--no-ask"),
    )

    assert (good, bad, well["warn"]) == (0, 0, []), well
    (streams,) = (line for line in ill["warn"] if line.startswith("streams: "))
    assert streams.startswith("streams: the snapshots of /events came in ")


async def test_doctor_passes_the_sample_of_nginx_and_finds_what_gathers_events(
    tmp_path: Path, make_server: MakeServer
) -> None:
    server = await make_server(**{"llm.providers.demo": SIMULATED, "auth.open": True})

    (good, well), (bad, ill) = await asyncio.gather(
        examined(tmp_path, "sample", server.port, {}),
        examined(tmp_path, "gathers", server.port, GATHERS),
    )

    assert (good, well["warn"], well["fail"]) == (0, [], []), well
    assert any("TLS: TLSv1.3, and a certificate that is valid" in line for line in well["ok"])
    assert any(line.startswith("server: HTTP/2 is offered") for line in well["ok"])
    assert "server: a body of 16 MiB is not refused by its head" in well["ok"]
    for face in ("WebSocket", "SSE", "OpenAI"):
        assert any(line.startswith(f"{face}: an answer came whole, each") for line in well["ok"])

    # A WebSocket is a tunnel, in which nothing is gathered.
    assert bad == 1
    assert [line.partition(":")[0] for line in ill["fail"]] == ["SSE", "OpenAI"], ill
    assert all("gathers" in line for line in ill["fail"])
    assert "server: a body of 16 MiB is refused by the proxy" in ill["warn"]
    assert any(line.startswith("server: HTTP/2 is not offered") for line in ill["warn"])
