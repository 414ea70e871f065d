"""The file of keys while the server runs: it is changed by a command, and nothing else is done."""

from __future__ import annotations

import asyncio
import hashlib
from typing import TYPE_CHECKING, Any

import pytest

from aioserver.commands.key import add_key, revoke_key
from aioserver.config.settings import ClientKey
from tests.support.chat import chat, until_status
from tests.support.keys import bearer, code_of, cookie, entry, keys_of, log_in
from tests.support.raw import CLOSE, Raw, closing
from tests.support.simulator import Behaviour
from tests.support.waiting import until_result

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.server import MakeServer, RunningServer


# The server looks each two seconds, and sees some changes in a test.
pytestmark = pytest.mark.virtual_time
SLOW = Behaviour(ttft=0, interval=30.0, tokens=1000)


def add(file: Path, name: str, **limits: Any) -> None:
    assert add_key(ClientKey(**entry(name, **limits)), "", file) == 0


async def status(server: RunningServer, name: str | None) -> int:
    headers = {} if name is None else bearer(name)
    async with server.session.get(f"{server.v1}/models", headers=headers) as response:
        return response.status


async def until_let_in(server: RunningServer, *names: str) -> None:
    """Wait until exactly *names* have keys."""

    async def later() -> set[str]:
        # To look as often as `until` does takes longer than the test.
        await asyncio.sleep(0.25)
        return set(server.context.access.keys.quotas())

    await until_result(later, lambda there: there == set(names))


async def until_told(server: RunningServer) -> None:
    """Wait for an incident."""

    async def later() -> list[str]:
        await asyncio.sleep(0.25)
        return texts(server)

    await until_result(later, bool)


def texts(server: RunningServer) -> list[str]:
    return [each["text"] for each in server.incidents() if each["kind"] == "keys_file"]


async def test_a_new_key_works_and_a_revoked_one_ends_as_ever(
    make_server: MakeServer, tmp_path: Path
) -> None:
    file = tmp_path / "keys.yaml"
    add(file, "web", max_concurrent=3)
    server = await make_server(SLOW, **{"auth.keys_file": str(file), **keys_of("root")})
    async with Raw(server) as raw:
        assert await status(server, "web") == 200
        assert await status(server, "app") == 401
        await raw.upgrade(f"Authorization: {bearer('web')['Authorization']}")
        await raw.send_json(chat("mine"))
        while (await raw.json_frame())["status"] != "chunk":
            pass

        add(file, "app")
        await until_let_in(server, "root", "web", "app")
        assert await status(server, "app") == 200
        assert revoke_key("web", file) == 0
        await until_let_in(server, "root", "app")
        while (frame := await raw.frame())[0] != CLOSE:
            pass
        assert closing(frame[1]) == (1008, b"key revoked")
        raw.close()
        assert await status(server, "web") == 401
        assert await status(server, "root") == 200
    assert texts(server) == [
        f"keys of {file} applied: new app",
        f"keys of {file} applied: revoked web",
    ]


async def test_other_limits_hold_in_place(make_server: MakeServer, tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    add(file, "web", max_concurrent=3)
    server = await make_server(SLOW, **{"auth.keys_file": str(file)})
    async with server.connect(headers=bearer("web")) as ws:
        await ws.send_json(chat("r"))
        await until_status(ws, "chunk")
        quota = server.context.access.keys.quotas()["web"]

        file.write_text(file.read_text().replace("max_concurrent: 3", "max_concurrent: 1"))
        await until_told(server)

        assert (quota.limit, quota.running) == (1, 1)
        await ws.send_json(chat("s"))
        await until_status(ws, "error")
        await ws.send_json({"action": "cancel", "request_id": "r"})
        await until_status(ws, "cancelled")
    assert texts(server) == [f"keys of {file} applied: changed web"]


@pytest.mark.parametrize("how", ["half", "empty", "gone"])
async def test_what_cannot_be_used_changes_nothing_until_it_can(
    make_server: MakeServer,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    how: str,
) -> None:
    file = tmp_path / "keys.yaml"
    add(file, "web")
    server = await make_server(**{"auth.keys_file": str(file)})
    text = file.read_text()
    if how == "gone":
        file.unlink()
    else:
        file.write_text(text[:40] if how == "half" else "")
    await until_told(server)
    # Some more looks.
    await asyncio.sleep(7)

    assert await status(server, "web") == 200
    assert await status(server, None) == 401
    (told,) = texts(server)
    assert told.startswith(f"the former content stays in use: {file}:")
    warnings = [r.getMessage() for r in caplog.records if r.name == "aioserver.files"]
    assert warnings == [f"keys_file: {told}"]

    file.write_text(text.replace("name: ", "name:  ") + f"- {{name: b, sha256: {'0' * 64}}}\n")
    await until_let_in(server, "web", "b")


async def test_taking_the_last_key_out_opens_nothing(
    make_server: MakeServer, tmp_path: Path
) -> None:
    file = tmp_path / "keys.yaml"
    add(file, "web")
    server = await make_server(**{"auth.keys_file": str(file)})
    assert revoke_key("web", file) == 0
    await until_let_in(server)

    for name in ("web", None):
        assert await status(server, name) == 401
    async with server.session.get(f"{server.base}/session") as response:
        assert (await response.json())["key_required"] is True

    add(file, "web")
    await until_let_in(server, "web")
    assert await status(server, "web") == 200


async def test_a_reload_reads_it_and_follows_another_name(
    make_server: MakeServer, tmp_path: Path
) -> None:
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    add(one, "web")
    add(two, "app")
    server = await make_server(**{"auth.keys_file": str(one)})
    add(one, "more")
    assert await server.change(**{"auth.keys_file": str(one)})
    assert await status(server, "more") == 200

    assert await server.change(**{"auth.keys_file": str(two)})
    assert await status(server, "app") == 200
    assert await status(server, "web") == 401
    add(two, "last")
    await until_let_in(server, "app", "last")

    two.write_text("broken")
    assert not await server.change(**{"auth.keys_file": str(two)})
    assert await status(server, "app") == 200
    assert await server.change(**{"auth.keys": []})
    assert await status(server, "app") == 401
    assert await status(server, None) == 401
    assert await server.change()
    assert await status(server, None) == 200


async def test_a_session_dies_with_its_key_in_the_file(
    make_server: MakeServer, tmp_path: Path
) -> None:
    file = tmp_path / "keys.yaml"
    add(file, "web")
    server = await make_server(**{"auth.keys_file": str(file)})
    session = await log_in(server, "web")
    other = hashlib.sha256(b"other").hexdigest()
    file.write_text(f"- {{name: web, sha256: {other}}}\n")
    await until_told(server)

    async with server.session.get(f"{server.v1}/models", headers=cookie(session)) as response:
        assert (response.status, await code_of(response)) == (401, "invalid_api_key")
